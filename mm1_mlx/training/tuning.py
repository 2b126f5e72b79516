"""Fine-tuning on conversations as a stage of the trainer.

Every batch is a function of (seed, step, process) alone: samples come in an order that
is shuffled anew each epoch, so a run that was interrupted goes on exactly.
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mm1_mlx.adapters.folder import adapted_layers
from mm1_mlx.adapters.targets import PARTS, part_of_weight
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.lessons import Lesson
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.conversations import ConversationFile, Order, lesson_of, too_long
from mm1_mlx.training.next_token import next_token_loss
from mm1_mlx.training.optimizers import OPTIMIZERS, Group
from mm1_mlx.training.packing import Row, Tokens, collate

BUCKET = 32  # rows are padded to a multiple of so many tokens: few shapes


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How a run learns.

    steps: updates. batch: samples of an update, over all processes; accumulate: in so
    many micro-batches. learning_rate: the peak, or "mm1" for the paper's law. floor:
    the last rate as a part of the peak. rates: of parts, as a part of the others'.
    max_tokens: of a sample, and of a packed row; too_long: "refuse" or "drop" what has
    more. pack: several samples in a row. chunk: words of the vocabulary whose logits
    are made at a time. router_losses: load balance and z-loss of experts.
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
    chunk: int = 8192
    router_losses: bool = False

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
        return asdict(self) | {"betas": list(self.betas)}


class TuneStage:
    """The stage of Trainer: samples to rows, and their loss."""

    name = "tune"
    law_parameters = "decoder.layers."

    def __init__(
        self,
        model: MM1,
        processor: Processor,
        samples: ConversationFile,
        settings: TuneSettings,
        seed: int,
    ):
        self.module: nn.Module = model
        self.settings = settings
        self._model, self.processor, self._samples = model, processor, samples
        self.dropped: set[int] = set()  # samples that were too long
        self._seed, self._order = seed, Order(len(samples), seed)
        self._layers = list(adapted_layers(model).values())
        self._drops = any(layer.settings.dropout for layer in self._layers)
        # Tiles lie differently in every batch, which a compiled graph cannot know.
        self.compiles = model.config.tiling_config is None

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
        first = step * s.batch + (micro * size + rank) * count
        return [self._order[place] for place in range(first, first + count)]

    def host_step(self, step: int, rank: int, size: int) -> tuple[list, int]:
        """The arrays of every micro-batch of a step, and how many samples they hold."""
        s = self.settings
        if s.batch % (s.accumulate * size):
            raise ConfigError(
                f"batch is {s.batch}, but must be a multiple of accumulate times the "
                f"number of processes ({s.accumulate} x {size})."
            )
        batches, count = [], 0
        for micro in range(s.accumulate):
            lessons = []
            for number in self.places(step, micro, rank, size):
                sample = self._samples[number]
                lesson = lesson_of(sample, self.processor)
                if self.fits(lesson, sample.where):
                    lessons.append(lesson)
                else:
                    self._drop(number)
            count += len(lessons)
            batches.append(self.arrays(lessons, f"{self._seed}/{step}/{micro}/{rank}"))
        return batches, count

    def _drop(self, number: int) -> None:
        self.dropped.add(number)
        if len(self.dropped) == len(self._samples):
            raise DatasetError(
                f"No sample has {self.settings.max_tokens} tokens or less: raise "
                f"--max-seq-length."
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
        rows = _rows(lessons, self.settings.max_tokens if self.settings.pack else 0)
        longest = max((row.length for row in rows), default=1)
        length = -(-longest // BUCKET) * BUCKET
        batch = collate(rows or [Row([])], length, self.processor.pad_token_id)
        size = 1
        if self.processor.image_settings is not None:
            size = self.processor.image_settings.size
        shots = [shots for shots, _ in batch.images if shots is not None]
        shots = shots or [np.zeros((0, size, size, 3), np.float32)]
        lying = [x for _, parts in batch.images for x in parts]
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
        key,
    ):  # fmt: skip
        """Mean loss of the learned tokens, and what is reported; "tokens": how many."""
        if self._drops:
            keys = mx.random.split(key, len(self._layers))
            for layer, own in zip(self._layers, keys, strict=True):
                layer.set_dropout_key(own)
        features = None
        if shots.shape[0]:
            known = [Layout(*row) for row in layouts.tolist()] if layouts.size else ()
            features = self._model.encode_images(shots, tuple(known))
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
        )
        return loss, metrics | {"tokens": (weight > 0).sum().astype(mx.float32)}

    def where(self, step: int, rank: int = 0, size: int = 1) -> list[str]:
        """File and line of the samples of a step, for messages."""
        numbers = [
            number
            for micro in range(self.settings.accumulate)
            for number in self.places(step, micro, rank, size)
        ]
        return [self._samples[number].where for number in numbers]


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
