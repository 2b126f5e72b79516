"""The memory of a fine-tuning run, before it: what it needs, and what would fit."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import MM1Error
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.lessons import Lesson
from mm1_mlx.memory import bytes_text, working_set
from mm1_mlx.processes import sums, together, world
from mm1_mlx.training.optimizers import STATES
from mm1_mlx.training.packing import TARGETS, Row, collate
from mm1_mlx.training.pieces import BYTES
from mm1_mlx.training.step_memory import StepMemory, StepShape, StepTooLarge, measure
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import BUCKET, TuneSettings, TuneStage

AUTO = ("accumulate", "chunk", "recompute")
_SEEN = 256  # samples that are looked at for the longest
_LOGITS = 64 << 20  # bytes of logits at a time that "auto" aims at


@dataclass(frozen=True)
class MemoryWish:
    """What memory a run may take. limit: bytes; None is the machine's working set.
    auto: fields of TuneSettings, of AUTO, that are chosen so that the run fits.
    only_tell: give the plan even where it does not fit."""

    limit: int | None = None
    auto: tuple[str, ...] = ()
    only_tell: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What a run is predicted to need, in bytes.

    weights: frozen ones. trained: weights or pairs that learn. step: the most that a
    step adds: gradients, states of the layers, logits. logits: of a chunk, in it.
    piece: the most that is made between two evaluations (training.pieces).
    shape: of the largest micro-batch that samples like those seen can make.
    """

    weights: int
    trained: int
    optimizer: int
    step: int
    logits: int
    piece: int
    limit: int
    shape: StepShape
    settings: TuneSettings

    @property
    def peak(self) -> int:
        """All together."""
        return self.weights + self.trained + self.optimizer + self.step

    @property
    def fits(self) -> bool:
        """Whether that is within the limit."""
        return self.peak <= self.limit

    @property
    def bounded(self) -> bool:
        """Whether no evaluation makes more than training.pieces allows."""
        return self.piece <= BYTES

    def line(self) -> str:
        """For one line of a log."""
        return (
            f"memory: {bytes_text(self.peak)} predicted of {bytes_text(self.limit)} "
            f"(weights {bytes_text(self.weights)}, trained {bytes_text(self.trained)}, "
            f"optimizer {bytes_text(self.optimizer)}, step {bytes_text(self.step)})"
            + ("" if self.bounded else f"; {self._too_much()}")
        )

    def _too_much(self) -> str:
        return (
            f"up to {bytes_text(self.piece)} are made at once: with a display on, "
            f"macOS may end the run, and smaller micro-batches help"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes."""
        return asdict(self) | {"peak": self.peak, "fits": self.fits}

    def table(self) -> str:
        """For people."""
        s, shape = self.settings, self.shape
        rows = [
            ("frozen weights", self.weights, ""),
            ("trained", self.trained, "pairs, or weights that are trained whole"),
            ("optimizer", self.optimizer, s.optimizer),
            ("step", self.step, "gradients, states of layers, logits"),
            ("  of it logits", self.logits, f"{s.chunk} words at a time"),
            ("  at once", self.piece, "between two evaluations"),
        ]
        lines = [
            f"{name:<16}{bytes_text(n):>10}  {note}".rstrip() for name, n, note in rows
        ]
        lines.append(
            f"{'predicted peak':<16}{bytes_text(self.peak):>10}  "
            f"of {bytes_text(self.limit)}: {'fits' if self.fits else 'does not fit'}"
        )
        lines.append(
            f"for micro-batches of {shape.rows} x {shape.length} tokens, "
            f"{shape.images} images and {shape.targets} learned tokens; "
            f"{s.accumulate} of them a step; gradient checkpointing "
            f"{'on' if s.recompute else 'off'}"
        )
        return "\n".join(lines)


def plan_memory(stage: TuneStage, wish: MemoryWish, seed: int = 0) -> MemoryPlan:
    """Predict what the stage's run needs, and choose what the wish leaves open.

    The chosen settings are in the plan, and set in the stage with what it needs to
    refuse a larger batch later. MM1Error where nothing fits: with the numbers, and what
    to change. Several processes choose the same, by what the smallest machine has.
    """
    limit = _of_smallest(wish.limit or working_set())
    with together():
        _check_kept(stage, limit)
        mx.eval(stage.module.parameters())
        sizes = [_size(lesson) for lesson in stage.some_lessons(_SEEN)]
    sizes = sizes or [StepShape(1, BUCKET, 0, TARGETS)]  # none fits: the run says so
    known: dict[bool, StepMemory] = {}
    plan = fitting = error = None
    for settings in _candidates(stage, wish, sizes):
        shape = largest(sizes, settings)
        with together():
            try:
                plan = _plan_of(stage, shape, limit, seed, known, settings)
            except StepTooLarge as met:  # without what its frames hold
                plan, error = None, met.with_traceback(None)
        if _all_agree(plan is not None and plan.fits and plan.bounded):
            return plan  # type: ignore[return-value]
        if fitting is None and _all_agree(plan is not None and plan.fits):
            fitting = plan
    if fitting is not None:  # no choice makes less at once: told in its line
        return _plan_of(stage, fitting.shape, limit, seed, known, fitting.settings)
    with together():
        if plan is None:
            assert error is not None
            raise error
        if not wish.only_tell and not plan.fits:
            raise MM1Error(_refusal(plan))
    return plan


def _of_smallest(limit: int) -> int:
    """The least that a process has."""
    own = [0] * world().size()
    own[world().rank()] = limit >> 10  # in 32 bits
    return limit if len(own) == 1 else min(sums(own)) << 10


def _check_kept(stage: TuneStage, limit: int) -> None:
    """MM1Error, before anything is tried, where what is there all the time exceeds the
    limit: weights, and the states and gradients of what is trained."""
    weights = _bytes(stage.module.parameters())
    if weights > limit:
        raise MM1Error(
            f"The weights alone take {bytes_text(weights)}, but there are "
            f"{bytes_text(limit)}. Quantize the model (python -m mm1_mlx.quantize) and "
            f"train pairs on it."
        )
    trained = _bytes(stage.module.trainable_parameters())
    states = STATES[stage.settings.optimizer] * trained
    if weights + states + trained > limit:
        raise MM1Error(
            f"This run would take more than {bytes_text(weights + states + trained)}, "
            f"but there are {bytes_text(limit)}: weights {bytes_text(weights)}, "
            f"{stage.settings.optimizer}'s states {bytes_text(states)}, gradients "
            f"{bytes_text(trained)}. Train less of the model (--fine-tune-type lora, "
            f"--train), or with an optimizer of fewer states (adafactor)."
        )


def _all_agree(fits: bool) -> bool:
    """Whether every process says so; they must choose the same."""
    told = mx.distributed.all_sum(mx.array(int(fits)), stream=mx.cpu)
    count: Any = told.item()
    return count == mx.distributed.init().size()


def _candidates(
    stage: TuneStage, wish: MemoryWish, sizes: list[StepShape]
) -> list[TuneSettings]:
    """Settings in the order of what they cost: smaller micro-batches, recomputing."""
    s = stage.settings
    share = s.batch // mx.distributed.init().size()
    counts = [s.accumulate]
    if "accumulate" in wish.auto:
        counts = [n for n in range(1, share + 1) if share % n == 0]
    again = [False, True] if "recompute" in wish.auto else [s.recompute]
    found = [
        replace(s, accumulate=count, recompute=recompute)
        for recompute in again
        for count in counts
    ]
    if "chunk" in wish.auto:
        vocab = _config(stage).text_config.vocab_size
        words = _LOGITS // (4 * largest(sizes, found[0]).targets) // 1024 * 1024
        found = [replace(x, chunk=min(max(words, 1024), vocab)) for x in found]
    return found


def _size(lesson: Lesson) -> StepShape:
    tiles = sum(layout.tiles for layout in lesson.layouts) or len(lesson.image_tokens)
    return StepShape(1, len(lesson.ids), tiles, sum(lesson.learned))


def largest(sizes: list[StepShape], settings: TuneSettings) -> StepShape:
    """The largest micro-batch that samples of these sizes can make."""
    s = settings
    rows = s.batch // (s.accumulate * mx.distributed.init().size())
    longest = max(size.length for size in sizes)
    length = longest
    if s.pack:  # as many as fit side by side
        length = min(s.max_tokens, rows * longest)
        beside = length // longest
        images, targets = rows, rows
        rows = -(-rows // beside)
    else:
        images = targets = rows
    return StepShape(
        rows,
        -(-length // BUCKET) * BUCKET,
        images * max(size.images for size in sizes),
        -(-targets * max(size.targets for size in sizes) // TARGETS) * TARGETS,
    )


def _plan_of(
    stage: TuneStage,
    shape: StepShape,
    limit: int,
    seed: int,
    known: dict[bool, StepMemory],
    s: TuneSettings,
) -> MemoryPlan:
    stage.settings = s
    if s.recompute not in known:
        trainer = Trainer(stage, Path(), seed, {})
        made = partial(probe, stage)
        known[s.recompute] = measure(trainer, made, _tiles(stage), shape, limit)
    memory = known[s.recompute]
    trained = _bytes(stage.module.trainable_parameters())
    several = s.accumulate > 1 or world().size() > 1
    extra = trained if several else 0  # the sum of the gradients so far
    weights = _bytes(stage.module.parameters()) - trained
    rest = weights + trained + memory.optimizer + extra

    def check(arrays: tuple[np.ndarray, ...]) -> None:
        made = shape_of(arrays)
        if rest + (step := memory.needed(made)) > limit:
            raise MM1Error(
                f"A micro-batch of {made.rows} x {made.length} tokens and "
                f"{made.images} images would take {bytes_text(rest + step)}, but there "
                f"are {bytes_text(limit)}: it is larger than what was planned for. "
                f"Lower --max-seq-length, or raise --grad-accumulation-steps."
            )

    stage.check = check
    return MemoryPlan(
        weights=weights,
        trained=trained,
        optimizer=memory.optimizer,
        step=memory.needed(shape) + extra,
        logits=4 * shape.targets * s.chunk,
        piece=memory.largest_piece(shape),
        limit=limit,
        shape=shape,
        settings=s,
    )


def _config(stage: TuneStage) -> MM1Config:
    model: Any = stage.module
    return model.config


def _tiles(stage: TuneStage) -> int:
    """How many tiles a probe's picture has; 0 where the data has none."""
    config = _config(stage)
    if not config.reads_images:
        return 0
    return _layout(config).tiles if stage.arranges else 1


def _layout(config: MM1Config) -> Layout:
    """The smallest way to cut a picture."""
    assert config.tiling_config is not None and config.vision_config is not None
    rows, columns = min(config.tiling_config.grids, key=lambda grid: grid[0] * grid[1])
    side = config.vision_config.image_size
    return Layout(rows, columns, columns * side, rows * side)


def probe(stage: TuneStage, shape: StepShape) -> tuple[np.ndarray, ...]:
    """A micro-batch of a shape, of nothing in particular."""
    config = _config(stage)
    pad = stage.processor.pad_token_id
    made = collate([Row([])] * shape.rows, shape.length, pad, targets=shape.targets)
    side, layouts = 1, []
    if config.vision_config is not None and stage.processor.image_settings is not None:
        side = stage.processor.ways(1)[0].settings.size
    if stage.arranges and shape.images:
        lying = _layout(config)
        one = [lying.rows, lying.columns, lying.width, lying.height]
        layouts = [one] * (shape.images // lying.tiles)
    return (
        made.ids, made.document * 0, made.branch, made.position,
        np.zeros((shape.images, side, side, 3), np.float32),
        np.array(layouts, np.int32), made.source, made.target, made.weight + 1,
        np.zeros(2, np.uint32),
    )  # fmt: skip


def shape_of(arrays: tuple[np.ndarray, ...]) -> StepShape:
    """The shape of a micro-batch as TuneStage.arrays makes it."""
    rows, length = arrays[0].shape
    return StepShape(rows, length, len(arrays[4]), len(arrays[6]))


def _bytes(tree: Any) -> int:
    flat: Any = tree_flatten(tree)
    return sum(array.nbytes for _, array in flat)


def _refusal(plan: MemoryPlan) -> str:
    s = plan.settings
    ways = []
    if s.batch > s.accumulate * mx.distributed.init().size():
        ways.append("more --grad-accumulation-steps (or auto)")
    if not s.recompute:
        ways.append("--grad-checkpoint on")
    ways += ["a smaller --max-seq-length", "a quantized model"]
    return (
        f"This run would take {bytes_text(plan.peak)}, but there are "
        f"{bytes_text(plan.limit)}: {plan.line().partition('(')[2][:-1]}, for "
        f"{plan.shape.rows} x {plan.shape.length} tokens at a time. What helps: "
        f"{', '.join(ways)}."
    )
