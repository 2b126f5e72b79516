"""Fine-tuning on conversations as a stage of the trainer.

Every batch is a function of (seed, step, process) alone: samples come in an order that
is shuffled anew each epoch, so a run that was interrupted goes on exactly.
"""

import random
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx.adapters.folder import adapted_layers
from mm1_mlx.adapters.targets import PARTS, part_of_weight
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.lessons import Lesson
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import plural
from mm1_mlx.memory import weight_shapes
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.processes import world
from mm1_mlx.training.conversations import length_of, lesson_of, too_long
from mm1_mlx.training.mixtures import Mixture, as_mixture
from mm1_mlx.training.next_token import next_token_loss
from mm1_mlx.training.optimizers import OPTIMIZERS, Group
from mm1_mlx.training.packing import Row, Tokens, collate
from mm1_mlx.training.samples import Samples

BUCKET = 32  # rows are padded to a multiple of so many tokens: few shapes


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How a run learns.

    steps: updates. batch: samples of an update, over all processes; accumulate: in so
    many micro-batches. learning_rate: the peak, or "mm1" for the paper's law. floor:
    the last rate as a part of the peak. rates: of parts, as a part of the others'.
    max_tokens: of a sample, and of a packed row; too_long: "refuse" or "drop" what has
    more. pack: several samples in a row. window: steps whose samples are sorted by
    length, so that batches have samples of like length; 1: each has its own. chunk:
    words of the vocabulary whose logits are made at a time. router_losses: load balance
    and z-loss of experts. recompute: make a layer's inner states again instead of
    keeping them (gradient checkpointing). resolution, max_tiles: of pictures, as
    Processor takes them.
    """

    steps: int
    batch: int = 4
    accumulate: int = 1
    learning_rate: float | str = 1e-4
    warmup: int = 10
    floor: float = 0.1
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    rates: dict[str, float] = field(default_factory=dict)
    max_tokens: int = 2048
    too_long: str = "refuse"
    pack: bool = False
    window: int = 1
    chunk: int = 8192
    router_losses: bool = False
    recompute: bool = False
    resolution: str | int | None = None
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer is {self.optimizer!r}, but must be one of "
                f"{', '.join(OPTIMIZERS)}."
            )
        if self.batch % self.accumulate:
            raise ConfigError(
                f"batch is {self.batch}, but must be a multiple of accumulate "
                f"({self.accumulate}): each micro-batch has as many samples."
            )
        if self.window < 1:
            raise ConfigError(f"window is {self.window}, but must be 1 step or more.")
        if self.too_long not in ("refuse", "drop"):
            raise ConfigError(
                f"too_long is {self.too_long!r}, but must be 'refuse' or 'drop'."
            )
        if unknown := sorted(self.rates.keys() - set(PARTS)):
            raise ConfigError(
                f"There is no part {unknown[0]!r} with a learning rate of its own. The "
                f"parts are: {', '.join(PARTS)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a checkpoint keeps it."""
        values = asdict(self) | {"betas": list(self.betas)}
        for key in ("resolution", "max_tiles"):  # checkpoints of before have none
            if values[key] is None:
                del values[key]
        return values


class TuneStage:
    """The stage of Trainer: samples to rows, and their loss."""

    name = "tune"
    goes_on_with = " (--resume --force goes on with other settings)"
    law_parameters = "decoder.layers."  # see law_count

    def __init__(
        self,
        model: MM1,
        processor: Processor,
        samples: Samples | Mixture,
        settings: TuneSettings,
        seed: int,
    ):
        self.module: nn.Module = model
        self.settings = settings
        self._model, self.processor = model, processor
        if settings.resolution is not None or settings.max_tiles is not None:
            self.processor = copy(processor)
            self.processor.resolution = settings.resolution
            self.processor.max_tiles = settings.max_tiles
        self.samples = as_mixture(samples)
        self.dropped: set[int] = set()  # samples that were too long
        self._left = [len(part) for part in self.samples.parts]  # that were not yet
        self._seed, self._number_at = seed, self.samples.order(seed)
        self._window: tuple[int, list[list[int]]] = -1, []  # the last one, sorted
        _check_shares(settings)
        _check_rates(settings.rates, model)
        self._layers = list(adapted_layers(model).values())
        self._drops = any(layer.settings.dropout for layer in self._layers)
        # Tiles that the model arranges lie differently in every batch, which a compiled
        # graph cannot know. And MLX's CPU back end takes seconds to compile, again for
        # every new shape.
        gpu = mx.default_device().type != mx.cpu
        tiling = model.config.tiling_config
        self.arranges = tiling is not None and tiling.arranges
        self.compiles = gpu and not self.arranges
        # Refuses a micro-batch that would take too much memory; see memory_plan.
        self.check: Callable[[tuple[np.ndarray, ...]], None] = lambda arrays: None

    @property
    def words(self) -> int:
        """Of the vocabulary."""
        return self._model.config.text_config.vocab_size

    @property
    def law_count(self) -> int:
        """N of MM1's law: the decoder's parameters without embeddings, as they are
        without adapters and unpacked (4 bits: eight numbers lie in one)."""
        shapes = weight_shapes(self._model.config).items()
        return sum(prod(s) for n, s in shapes if n.startswith(self.law_parameters))

    def rate_groups(self) -> list[Group]:
        """Parts with a rate of their own."""

        def group(part: str, rate: float) -> Group:
            return (lambda name: _part_of(name) == part), rate

        return [group(part, rate) for part, rate in self.settings.rates.items()]

    # --- data ------------------------------------------------------------------------

    def places(self, step: int, micro: int, rank: int, size: int) -> list[int]:
        """The samples of one micro-batch of one process, by number."""
        s = self.settings
        count = s.batch // (s.accumulate * size)
        first = (micro * size + rank) * count
        return self._batch(step)[first : first + count]

    def _batch(self, step: int) -> list[int]:
        """The samples of a step, of all processes, by number."""
        s = self.settings
        if s.window == 1:
            return [self._number_at(step * s.batch + k) for k in range(s.batch)]
        window, inside = divmod(step, s.window)
        known, batches = self._window
        if known != window:
            batches = self._sorted_batches(window)
            self._window = window, batches
        return batches[inside]

    def _sorted_batches(self, window: int) -> list[list[int]]:
        """Batches of like length from the samples of a window, in any order."""
        s = self.settings
        count = s.window * s.batch
        numbers = [self._number_at(window * count + k) for k in range(count)]
        lengths = [length_of(self.samples[n], self.processor) for n in numbers]
        order = sorted(range(count), key=lambda k: -lengths[k])
        batches = [
            [numbers[k] for k in order[start : start + s.batch]]
            for start in range(0, count, s.batch)
        ]
        random.Random(f"{self._seed}/window/{window}").shuffle(batches)
        return batches

    def host_step(self, step: int, rank: int, size: int) -> tuple[list, int]:
        """The arrays of every micro-batch of a step, and how many samples they hold.

        Rows of like length are put into one micro-batch: that changes no gradient, as
        they are all of one step, but less of a row is padding.
        """
        s = self.settings
        lessons = []
        for number in self.numbers(step, rank, size):
            sample = self.samples[number]
            lesson = lesson_of(sample, self.processor)
            if self.fits(lesson, sample.where):
                lessons.append(lesson)
            else:
                self._drop(number)
        rows = _rows(lessons, s.max_tokens if s.pack else 0)
        rows.sort(key=lambda row: -row.length)
        each = max(-(-len(rows) // s.accumulate), 1)
        parts = [rows[k : k + each] for k in range(0, max(len(rows), 1), each)]
        name = f"{self._seed}/{step}"
        batches = [
            self._arrays(part, f"{name}/{k}/{rank}") for k, part in enumerate(parts)
        ]
        for made in batches:
            self.check(made)
        return batches, len(lessons)

    def some_lessons(self, count: int) -> Iterator[Lesson]:
        """So many samples from all over the data; what does not fit is left out."""
        for number in range(0, len(self.samples), len(self.samples) // count + 1):
            sample = self.samples[number]
            lesson = lesson_of(sample, self.processor)
            if self.fits(lesson, sample.where):
                yield lesson

    def _drop(self, number: int) -> None:
        """Leave out a sample; DatasetError where its source has no other."""
        if number in self.dropped:
            return
        self.dropped.add(number)
        part = self.samples.part_of(number)
        self._left[part] -= 1
        if not self._left[part]:
            several = len(self._left) > 1
            whose = f" of {self.samples.names[part]}" if several else ""
            raise DatasetError(
                f"No sample{whose} has {self.settings.max_tokens} tokens or less: "
                f"raise --max-seq-length."
            )

    def fits(self, lesson: Lesson, where: str) -> bool:
        """Whether a sample is short enough; DatasetError where it must be."""
        limit = self.settings.max_tokens
        if len(lesson.ids) <= limit:
            return True
        if self.settings.too_long != "drop":
            raise DatasetError(too_long(lesson, where, limit))
        return False

    def arrays(self, lessons: list[Lesson], name: str) -> tuple[np.ndarray, ...]:
        """Lessons as the arrays that `loss` takes. name: decides what dropout drops."""
        pack = self.settings.max_tokens if self.settings.pack else 0
        return self._arrays(_rows(lessons, pack), name)

    def _arrays(self, rows: list[Row], name: str) -> tuple[np.ndarray, ...]:
        longest = max((row.length for row in rows), default=1)
        # Few shapes, where each is compiled; else no more than there is.
        bucket, targets = (BUCKET, 64) if self.compiles else (1, 1)
        length = -(-longest // bucket) * bucket
        pad = self.processor.pad_token_id
        batch = collate(rows or [Row([])], length, pad, targets)
        size = 1
        if self.processor.image_settings is not None:
            size = self.processor.ways(1)[0].settings.size
        shots = [shots for shots, _ in batch.images if shots is not None]
        shots = shots or [np.zeros((0, size, size, 3), np.float32)]
        lying = [x for _, parts in batch.images for x in parts if self.arranges]
        layouts = [[x.rows, x.columns, x.width, x.height] for x in lying]
        key = random.Random(name).getrandbits(64)
        return (
            batch.ids, batch.document, batch.branch, batch.position,
            np.concatenate(shots), np.array(layouts, np.int32),
            batch.source, batch.target, batch.weight,
            np.array([key >> 32, key & 0xFFFFFFFF], np.uint32),
        )  # fmt: skip

    # --- loss ------------------------------------------------------------------------

    def loss(
        self, ids, document, branch, position, shots, layouts, source, target, weight,
        key, *, walk: LayerWalk | None = None,
    ):  # fmt: skip
        """Mean loss of the learned tokens, and what is reported; "tokens": how many."""
        if self._drops:
            keys = mx.random.split(key, len(self._layers))
            for layer, own in zip(self._layers, keys, strict=True):
                layer.set_dropout_key(own)
        features = None
        if shots.shape[0]:
            known = [Layout(*row) for row in layouts.tolist()] if layouts.size else ()
            features = self._model.encode_images(shots, tuple(known), walk=walk)
        loss, metrics = next_token_loss(
            self._model,
            ids,
            document,
            branch,
            position,
            features,
            source,
            target,
            weight,
            chunk=self.settings.chunk,
            router_losses=self.settings.router_losses,
            walk=walk,
        )
        return loss, metrics | {"tokens": (weight > 0).sum().astype(mx.float32)}

    def numbers(self, step: int, rank: int = 0, size: int = 1) -> list[int]:
        """The samples of a step of one process, by number."""
        every = range(self.settings.accumulate)
        return [n for micro in every for n in self.places(step, micro, rank, size)]

    def where(self, step: int, rank: int = 0, size: int = 1) -> list[str]:
        """File and line of the samples of a step, for messages."""
        return [self.samples[n].where for n in self.numbers(step, rank, size)]


def _check_shares(settings: TuneSettings) -> None:
    """ConfigError unless every process has as many samples in every micro-batch."""
    processes = world().size()
    if settings.batch % (settings.accumulate * processes):
        raise ConfigError(
            f"The batch has {settings.batch} samples, but must be a multiple of "
            f"{settings.accumulate} micro-batches times "
            f"{plural(processes, 'process', 'processes')} (--batch-size, "
            f"--grad-accumulation-steps)."
        )


def _check_rates(rates: dict[str, float], model: nn.Module) -> None:
    flat: Any = tree_flatten(model.trainable_parameters())
    trained = {_part_of(name) for name, _ in flat}
    if idle := sorted(rates.keys() - trained):
        shown = ", ".join(part for part in PARTS if part in trained)
        raise ConfigError(
            f"The part {idle[0]!r} has a learning rate of its own (--part-rate), but "
            f"is not trained. Trained are: {shown} (--train)."
        )


def _part_of(name: str) -> str:
    path, inside, _ = name.partition(".pairs.")
    return part_of_weight(path + ".weight" if inside else name)


def _rows(lessons: list[Lesson], length: int) -> list[Row]:
    """Each lesson in a row, or side by side in rows of `length` tokens, the longest
    first; 0: none is packed."""
    rows: list[Row] = []
    for lesson in sorted(lessons, key=lambda x: -len(x.ids)) if length else lessons:
        tokens = _tokens(lesson)
        room = (row for row in rows if row.length + len(tokens.ids) <= length)
        if (row := next(room, None)) is not None:
            row.parts.append(tokens)
        else:
            rows.append(Row([tokens]))
    return rows


def _tokens(lesson: Lesson) -> Tokens:
    count = len(lesson.ids)
    images = [(lesson.pixel_values, lesson.layouts)] if lesson.image_tokens else []
    return Tokens(
        ids=lesson.ids,
        branch=[0] * count,
        position=list(range(count)),
        weight=[1.0 if flag else 0.0 for flag in lesson.learned],
        images=images,
        regions=[],
        tasks=[""],
    )
