"""How much memory a training step takes, by the shape of its batch.

A few small steps are measured on the machine itself, piece by piece (training.pieces).
What a piece has in use is, in rows * length, rows * length^2, pictures and targets, a
straight line: attention without a fused kernel makes the square, all other arrays the
rest. So larger steps are known before they are made, for every kind of layer and on
every back end. A test holds the predictions to what MLX then uses.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx.errors import MM1Error
from mm1_mlx.memory import bytes_text
from mm1_mlx.training.trainer import Trainer


@dataclass(frozen=True)
class StepShape:
    """What decides about a micro-batch's memory.

    rows, length: of token ids (B, L). images: pictures, or tiles, that the encoder
    reads (N). targets: tokens that are learned (M).
    """

    rows: int
    length: int
    images: int
    targets: int

    def terms(self) -> list[float]:
        """1, B*L, B*L^2, N and M."""
        tokens = self.rows * self.length
        return [1.0, tokens, tokens * self.length, self.images, self.targets]

    def is_within(self, other: "StepShape") -> bool:
        """Whether nothing of it is more than another's."""
        return all(a <= b for a, b in zip(self.terms(), other.terms(), strict=True))


# (rows, length, pictures, targets): no term is a sum of the others, without the last,
# too, which is the largest.
_PROBES = (
    (1, 64, 1, 64),
    (1, 128, 1, 64),
    (2, 128, 1, 128),
    (1, 192, 4, 64),
    (2, 64, 4, 128),
    (1, 512, 1, 192),
)


# How far from small steps the largest may be guessed too high.
_DOUBT = 1.2


class StepMemory:
    """Bytes that a step needs beside what is there before it; made by `measure`.

    optimizer: bytes of its states, which are there before.
    """

    def __init__(
        self, peaks: np.ndarray, made: np.ndarray, update: int, optimizer: int
    ):
        self._peaks, self._made = peaks, made  # each (terms, pieces)
        self._update = update
        self.optimizer = optimizer

    def needed(self, shape: StepShape) -> int:
        """The most that any piece of a step has in use, in bytes."""
        pieces = np.array(shape.terms()) @ self._peaks
        return max(int(pieces.max()), self._update)

    def largest_piece(self, shape: StepShape) -> int:
        """The most bytes that are made between two evaluations."""
        return int((np.array(shape.terms()) @ self._made).max())


class StepTooLarge(MM1Error):
    """Already a small step takes more memory than there is."""


def measure(
    trainer: Trainer,
    arrays: Callable[[StepShape], Any],
    tiles: int,
    wanted: StepShape,
    limit: int,
) -> StepMemory:
    """Learn what steps need from a few small ones, which change nothing.

    arrays: makes a micro-batch of a shape. tiles: that a picture has; 0 for text alone.
    limit: bytes that may be in use; the largest step is not tried where it is known to
    exceed that, as it might end the program. StepTooLarge where a step does that is no
    larger than `wanted`, the one that will be made.
    """
    shapes = [StepShape(b, n, tiles * i, m) for b, n, i, m in _PROBES]
    trainer.peaks([arrays(shapes[0])])  # makes what is kept: the optimizer's states
    gc.collect()  # what others left would be counted as there before
    base, states = mx.get_active_memory(), trainer.state_bytes()
    flat: Any = tree_flatten(trainer.module.parameters())
    kept = states + sum(array.nbytes for _, array in flat)
    found: list[np.ndarray] = []
    *small, large = shapes
    for shape in small:
        # Twice: how soon an array is let go of depends on other threads.
        twice = [trainer.peaks([arrays(shape)]) for _ in range(2)]
        found.append(np.max(twice, axis=0))
        most = kept + int(found[-1][:, 0].max()) - base
        if most > limit and shape.is_within(wanted):
            raise StepTooLarge(
                f"Already a step of {shape.rows} x {shape.length} tokens and "
                f"{shape.images} images takes {bytes_text(most)}, but there are "
                f"{bytes_text(limit)}. What helps: gradient checkpointing, where it is "
                f"off, training less of the model, a quantized model."
            )
    known = _memory(small, found, base, states)
    if kept + known.needed(large) / _DOUBT <= limit:
        twice = [trainer.peaks([arrays(large)]) for _ in range(2)]
        found.append(np.max(twice, axis=0))
        known = _memory(shapes, found, base, states)
    return known


def _memory(
    shapes: list[StepShape], found: list[np.ndarray], base: int, states: int
) -> StepMemory:
    """What was found of these shapes, as straight lines. base: bytes before a step."""
    terms = np.array([shape.terms() for shape in shapes])
    pieces = np.stack(found).astype(float)[:, :-1]  # (probes, pieces, 2)
    peaks = [_fit(terms, values - base) for values in pieces[..., 0].T]
    made = [_fit(terms, values) for values in pieces[..., 1].T]
    update = int(max(probe[-1, 0] for probe in found)) - base
    return StepMemory(np.stack(peaks, 1), np.stack(made, 1), update, states)


def _fit(terms: np.ndarray, bytes_: np.ndarray) -> np.ndarray:
    """Least squares with no term below 0, which none can be but the constant."""
    scale = np.maximum(terms.max(axis=0), 1.0)
    kept = list(range(terms.shape[1]))
    while True:
        found = np.linalg.lstsq((terms / scale)[:, kept], bytes_, rcond=None)[0]
        worst = min(range(len(kept)), key=lambda i: found[i] if kept[i] else 0.0)
        if kept[worst] == 0 or found[worst] >= 0:
            break
        del kept[worst]
    known = np.zeros(terms.shape[1])
    known[kept] = found / scale[kept]
    return known
