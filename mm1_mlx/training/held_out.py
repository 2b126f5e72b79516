"""Losses of held-out samples, and that these can be read at all."""

from collections.abc import Callable, Sized

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import MM1Error
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.processes import sums, together, world
from mm1_mlx.training.conversations import Lesson, lesson_of
from mm1_mlx.training.mixtures import Mixture, as_mixture
from mm1_mlx.training.pieces import evaluate_step
from mm1_mlx.training.samples import Samples
from mm1_mlx.training.tuning import TuneStage


def check_read(
    stage: TuneStage, most: int, **splits: Samples | Mixture | None
) -> dict[str, Mixture]:
    """The splits that there are, as mixtures. The first `most` samples of each source
    are read once, and none is kept: what is wrong with them is found before the first
    step, not after hours. Raises DatasetError."""
    held = {name: as_mixture(part) for name, part in splits.items() if part is not None}
    for part in (part for mixture in held.values() for part in mixture.parts):
        for number in range(min(len(part), most)):
            sample = part[number]
            stage.fits(lesson_of(sample, stage.processor), sample.where)
    return held


def losses_of(
    stage: TuneStage,
    mixture: Mixture,
    name: str,
    most: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss of all learned tokens, as `name`; of several sources also of each.

    most: samples that are read of each source, the first ones; None for all. Several
    processes share the samples and get the same numbers. report: receives how many of
    this process's samples are done, and of how many. stop: asked after every batch;
    where it is True in any process, nothing is found: {}.
    """
    shares = [
        _share(part if most is None else range(min(len(part), most)))
        for part in mixture.parts
    ]
    total, done = sum(map(len, shares)), 0

    def measured(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    stage.module.eval()
    found: list[tuple[float, float]] = []
    with together():
        found = [
            _sum_of(stage, part, share, measured, stop)
            for part, share in zip(mixture.parts, shares, strict=True)
        ]
    stage.module.train()
    *flat, short = sums([*(n for pair in found for n in pair), float(done < total)])
    if short:
        return {}
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    losses, tokens = (sum(column) for column in zip(*pairs, strict=True))
    told = {name: losses / max(tokens, 1)}
    if len(pairs) > 1:
        for whose, (part, count) in zip(mixture.names, pairs, strict=True):
            told[f"{name} {whose}"] = part / max(count, 1)
    return told


def _share(samples: Sized) -> range:
    """The numbers of the samples that this process measures."""
    return range(world().rank(), len(samples), world().size())


def _sum_of(
    stage: TuneStage,
    samples: Samples,
    numbers: range,
    measured: Callable[[int], None],
    stop: Callable[[], bool],
) -> tuple[float, float]:
    """The summed loss of learned tokens, and their number; a micro-batch at a time."""
    total, tokens = 0.0, 0.0
    settings = stage.settings
    some = max(settings.batch // (settings.accumulate * world().size()), 1)
    for first in range(0, len(numbers), some):
        if stop():
            break
        lessons = []
        for number in numbers[first : first + some]:
            sample = samples[number]
            lesson = lesson_of(sample, stage.processor)
            if stage.fits(lesson, sample.where):
                lessons.append(lesson)
        if lessons:
            loss, count = _sum_of_batch(stage, lessons)
            total += loss
            tokens += count
        measured(len(numbers[first : first + some]))
    return total, tokens


def _has_room(stage: TuneStage, arrays: tuple[np.ndarray, ...]) -> bool:
    """Whether a batch would even fit as one that is learned."""
    try:
        stage.check(arrays)
    except MM1Error:
        return False
    return True


def _sum_of_batch(stage: TuneStage, lessons: list[Lesson]) -> tuple[float, float]:
    arrays, walk = stage.arrays(lessons, "valid"), LayerWalk()
    if len(lessons) > 1 and not _has_room(stage, arrays):
        alone = [_sum_of_batch(stage, [lesson]) for lesson in lessons]
        return sum(loss for loss, _ in alone), sum(count for _, count in alone)
    _, metrics = stage.loss(*map(mx.array, arrays), walk=walk)
    evaluate_step(walk.ahead, {}, {}, metrics)
    count = float(metrics["tokens"])
    return float(metrics["text"]) * count, count
