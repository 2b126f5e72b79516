"""What an adapter says, whatever its form: pairs and whole weights, in float32."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Base = Callable[[str], np.ndarray]  # name of ours -> the model's weight, float32


@dataclass(frozen=True)
class Pair:
    """What is added to a matrix: scale * b a; m: DoRA's row lengths, or None.

    Shapes:
        a (r, in), b (out, r), m (out,); of experts with a first axis E each
    """

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    def with_scale(self, scale: float) -> "Pair":
        """The same under another scale: what is between them goes into b."""
        if scale == self.scale:
            return self
        factor = np.float32(self.scale / scale)
        return replace(self, b=self.b * factor, scale=scale)

    def with_rank(self, rank: int) -> "Pair":
        """The same with rows of zeros, up to a larger rank."""
        if rank == self.rank:
            return self
        more = [(0, 0)] * (self.a.ndim - 2)
        space = (0, rank - self.rank)
        return replace(
            self,
            a=np.pad(self.a, [*more, space, (0, 0)]),
            b=np.pad(self.b, [*more, (0, 0), space]),
        )

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """A weight with what the pair adds. (out, in) float32."""
        whole = weight + np.float32(self.scale) * (self.b @ self.a)
        if self.m is None:
            return whole
        lengths = np.linalg.norm(whole, axis=-1)
        return whole * (self.m / lengths)[..., None]


@dataclass
class Adapter:
    """pairs: by the names of our adapter files. whole: weights, by the model's names.

    notes: what a reader had to change, for people. reading: the resolution and
    max_tiles that it was trained with, None is the model's own.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    whole: dict[str, np.ndarray] = field(default_factory=dict)
    dropout: float = 0.0
    notes: list[str] = field(default_factory=list)
    reading: dict[str, Any] = field(default_factory=dict)


def most_common(values: Iterable) -> object:
    """The value that is there most often, the first of them."""
    return Counter(values).most_common(1)[0][0]


def of_expert(pair: Pair, expert: int) -> Pair:
    """The pair of one expert."""
    m = None if pair.m is None else pair.m[expert]
    return Pair(pair.a[expert], pair.b[expert], m, pair.scale)


def even(pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs with one rank and one scale."""
    rank = max(pair.rank for pair in pairs)
    scale: Any = most_common(pair.scale for pair in pairs)
    return [pair.with_scale(scale).with_rank(rank) for pair in pairs]


def stack(pairs: Sequence[Pair]) -> Pair:
    """Pairs of all experts as one; ranks and scales made equal."""
    alike = even(pairs)
    lengths = [pair.m for pair in alike if pair.m is not None]
    return Pair(
        np.stack([pair.a for pair in alike]),
        np.stack([pair.b for pair in alike]),
        np.stack(lengths) if lengths else None,
        alike[0].scale,
    )


def split_rows(pair: Pair, sizes: Sequence[int]) -> list[Pair]:
    """The pair of a module as one for each of the projections that it holds.

    They share a. Where each has columns of b of its own (as PEFT puts gate and up
    together), it keeps only these, as if it had never been put there.
    """
    cuts = np.cumsum(sizes)[:-1]
    blocks = np.split(pair.b, cuts, axis=-2)
    lengths = [None] * len(blocks)
    if pair.m is not None:
        lengths = np.split(pair.m, cuts, axis=-1)
    ranges = _own_columns(blocks)
    return [
        Pair(pair.a[..., own, :], np.ascontiguousarray(b[..., own]), m, pair.scale)
        for b, m, own in zip(blocks, lengths, ranges, strict=True)
    ]


def _own_columns(blocks: list[np.ndarray]) -> list[slice]:
    """Which columns each block uses, if these follow each other; else all of each."""
    every = [slice(None)] * len(blocks)
    if len(blocks) == 1:
        return every
    used = [np.flatnonzero(b.reshape(-1, b.shape[-1]).any(axis=0)) for b in blocks]
    rank, count = blocks[0].shape[-1], len(blocks)
    if not any(len(columns) for columns in used) and rank % count == 0:
        # Not trained yet: any share is right, and this one gives back what was joined.
        return [slice(k * rank // count, (k + 1) * rank // count) for k in range(count)]
    if not all(len(columns) for columns in used):
        return every
    starts = [0, *(int(columns[0]) for columns in used[1:])]
    stops = [*starts[1:], rank]
    fits = all(
        columns[0] >= start and columns[-1] < stop
        for columns, start, stop in zip(used, starts, stops, strict=True)
    )
    if not fits:
        return every
    return [slice(a, b) for a, b in zip(starts, stops, strict=True)]


def join_rows(pairs: Sequence[Pair]) -> Pair:
    """One pair for a module that holds several projections: split_rows read backwards.

    Pairs with the same a keep it; else their ranks add up and b is made of blocks.
    """
    first = pairs[0]
    even = [pair.with_scale(first.scale) for pair in pairs]
    m = None
    if first.m is not None:
        m = np.concatenate([pair.m for pair in even], axis=-1)  # type: ignore[misc]
    if all(np.array_equal(pair.a, first.a) for pair in even):
        b = np.concatenate([pair.b for pair in even], axis=-2)
        return Pair(first.a, b, m, first.scale)
    rank, start, blocks = sum(pair.rank for pair in even), 0, []
    for pair in even:
        block = np.zeros((*pair.b.shape[:-1], rank), np.float32)
        block[..., start : start + pair.rank] = pair.b
        blocks.append(block)
        start += pair.rank
    a = np.concatenate([pair.a for pair in even], axis=-2)
    return Pair(a, np.concatenate(blocks, axis=-2), m, first.scale)
