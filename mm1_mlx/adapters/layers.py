"""Linear layers and experts with low-rank pairs beside their frozen weights.

A weight of ours may hold several projections (q, k and v; gate and up). Each projection
has its own pair, so that an adapter means what it means in mlx-lm and PEFT.

y = W x + scale * B (A x), with A random and B zero at first (LoRA, arXiv 2106.09685);
DoRA (2402.09353) also learns the length of every row of W + scale * B A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.models.moe import QuantizedStack, gather


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """rank: of the pairs. scale: of what they add. dropout: of what A reads, in
    training. dora: whether row lengths are learned, too."""

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    dora: bool = False


@dataclass(frozen=True)
class Rows:
    """A projection inside a weight: its name and its rows."""

    name: str
    start: int
    stop: int


class Pair(nn.Module):
    """lora_a and lora_b of one projection, and with DoRA its row lengths `m`.

    Shapes:
        of a linear layer, as in mlx-lm: lora_a (in, r), lora_b (r, out), m (out,)
        of experts, as in mlx-lm: lora_a (E, r, in), lora_b (E, out, r), m (E, out)
    """

    def __init__(self, lora_a: mx.array, lora_b: mx.array, m: mx.array | None):
        super().__init__()
        self.lora_a, self.lora_b = lora_a, lora_b
        if m is not None:
            self.m = m


def _row_lengths(weight: mx.array) -> mx.array:
    return mx.linalg.norm(weight.astype(mx.float32), axis=-1)


class _Adapted(nn.Module):
    """What linear layers and experts share: pairs of some of a weight's projections."""

    def __init__(self, rows: Sequence[Rows], settings: PairSettings):
        super().__init__()
        self._rows = {part.name: part for part in rows}
        self._settings = settings
        self._key: mx.array | None = None
        self.pairs: dict[str, Pair] = {}

    def add_pair(self, name: str, key: mx.array) -> None:
        """Start the pair of a projection. key: of its random numbers."""
        raise NotImplementedError

    @property
    def projections(self) -> list[Rows]:
        """All projections inside the weight, with a pair or without."""
        return list(self._rows.values())

    @property
    def settings(self) -> PairSettings:
        return self._settings

    def set_dropout_key(self, key: mx.array | None) -> None:
        """The randomness of the next step's dropout; None: none is dropped."""
        self._key = key

    def dropped(self, x: mx.array) -> mx.array:
        """x with numbers left out at random, in training."""
        rate = self._settings.dropout
        if not self.training or rate == 0 or self._key is None:
            return x
        kept = mx.random.bernoulli(1 - rate, x.shape, key=self._key)
        return x * kept.astype(x.dtype) * (1 / (1 - rate))

    def _side_by_side(self, deltas: dict[str, mx.array], like: mx.array) -> mx.array:
        """Deltas of all projections in one row; zeros where there is no pair."""
        whole = []
        for part in self._rows.values():
            delta = deltas.get(part.name)
            if delta is None:
                shape = (*like.shape[:-1], part.stop - part.start)
                delta = mx.zeros(shape, like.dtype)
            whole.append(delta.astype(like.dtype))
        return whole[0] if len(whole) == 1 else mx.concatenate(whole, axis=-1)


class AdaptedLinear(_Adapted):
    """A linear layer, plain or quantized, with pairs. (..., in) -> (..., out)."""

    def __init__(self, base: nn.Module, rows: Sequence[Rows], settings: PairSettings):
        super().__init__(rows, settings)
        self.base: Any = base
        self.base.freeze()

    @property
    def input_dims(self) -> int:
        columns = self.base.weight.shape[1]
        if isinstance(self.base, nn.QuantizedLinear):
            columns = columns * 32 // self.base.bits
        return columns

    def add_pair(self, name: str, key: mx.array) -> None:
        columns, part = self.input_dims, self._rows[name]
        bound = columns**-0.5
        shape = (columns, self._settings.rank)
        lora_a = mx.random.uniform(-bound, bound, shape, key=key)
        lora_b = mx.zeros((self._settings.rank, part.stop - part.start))
        m = None
        if self._settings.dora:
            m = _row_lengths(self.weight()[part.start : part.stop])
        self.pairs[name] = Pair(lora_a, lora_b, m)

    def weight(self) -> mx.array:
        """The frozen weight as numbers. (out, in)."""
        base = self.base
        if not isinstance(base, nn.QuantizedLinear):
            return base.weight
        return mx.dequantize(
            base.weight,
            base.scales,
            base.get("biases"),
            group_size=base.group_size,
            bits=base.bits,
            mode=base.mode,
        )

    def delta(self, name: str) -> mx.array:
        """What a projection's pair adds to its rows. (rows, in) float32."""
        pair = self.pairs[name]
        return self._settings.scale * (pair.lora_a @ pair.lora_b).T

    def merged(self) -> mx.array:
        """The weight that gives the same results without pairs. (out, in) float32."""
        weight = self.weight().astype(mx.float32)
        parts = []
        for part in self._rows.values():
            rows = weight[part.start : part.stop]
            if part.name in self.pairs:
                rows = rows + self.delta(part.name)
                if (m := self.pairs[part.name].get("m")) is not None:
                    rows = rows * (m / _row_lengths(rows))[:, None]
            parts.append(rows)
        return mx.concatenate(parts)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        if not self.pairs:
            return y
        names = list(self.pairs)
        wide = mx.concatenate([self.pairs[n].lora_a for n in names], axis=-1)
        low = self.dropped(x) @ wide  # (..., sum of ranks) float32
        low = mx.split(low, len(names), axis=-1) if len(names) > 1 else [low]
        scale = self._settings.scale
        deltas = {
            name: scale * (z @ self.pairs[name].lora_b)
            for name, z in zip(names, low, strict=True)
        }
        if not self._settings.dora:
            return y + self._side_by_side(deltas, y)
        bias = self.base.get("bias")
        out = (y if bias is None else y - bias) + self._side_by_side(deltas, y)
        out = out * self.row_scales().astype(out.dtype)
        return out if bias is None else out + bias

    def row_scales(self) -> mx.array:
        """DoRA's m / |W + scale B A| per row; the length has no gradient. (out,)."""
        weight = self.weight().astype(mx.float32)
        scales = []
        for part in self._rows.values():
            pair = self.pairs.get(part.name)
            if pair is None:
                scales.append(mx.ones((part.stop - part.start,)))
                continue
            rows = weight[part.start : part.stop] + self.delta(part.name)
            scales.append(pair.m / mx.stop_gradient(_row_lengths(rows)))
        return mx.concatenate(scales)


class AdaptedStack(_Adapted):
    """One projection (or gate and up) of all experts, with a pair for each expert.

    base: the stack (E, out, in), or a QuantizedStack.
    """

    def __init__(
        self,
        base: "mx.array | QuantizedStack",
        rows: Sequence[Rows],
        settings: PairSettings,
    ):
        super().__init__(rows, settings)
        if isinstance(base, mx.array):
            self.weight = base
        else:
            self.base = base
        self.freeze()

    @property
    def num_experts(self) -> int:
        return self._stack().shape[0] if "weight" in self else self.base.num_experts

    def _stack(self) -> Any:
        return self.weight if "weight" in self else self.base

    def whole(self) -> mx.array:
        """The frozen numbers. (E, out, in)."""
        return self.weight if "weight" in self else self.base.whole()

    @property
    def input_dims(self) -> int:
        if "weight" in self:
            return self.weight.shape[-1]
        return self.base.weight.shape[-1] * 32 // self.base.bits

    def add_pair(self, name: str, key: mx.array) -> None:
        E, columns, r = self.num_experts, self.input_dims, self._settings.rank
        part, bound = self._rows[name], columns**-0.5
        lora_a = mx.random.uniform(-bound, bound, (E, r, columns), key=key)
        lora_b = mx.zeros((E, part.stop - part.start, r))
        m = None
        if self._settings.dora:
            m = _row_lengths(self.whole()[:, part.start : part.stop])
        self.pairs[name] = Pair(lora_a, lora_b, m)

    def delta(self, name: str) -> mx.array:
        """What a projection's pairs add. (E, rows, in) float32."""
        pair = self.pairs[name]
        return self._settings.scale * (pair.lora_b @ pair.lora_a)

    def merged(self) -> mx.array:
        """The stack that gives the same results without pairs. (E, out, in) float32."""
        stack = self.whole().astype(mx.float32)
        parts = []
        for part in self._rows.values():
            rows = stack[:, part.start : part.stop]
            if part.name in self.pairs:
                rows = rows + self.delta(part.name)
                if (m := self.pairs[part.name].get("m")) is not None:
                    rows = rows * (m / _row_lengths(rows))[..., None]
            parts.append(rows)
        return mx.concatenate(parts, axis=1)

    def gather(self, x: mx.array, indices: mx.array, sorted_: bool) -> mx.array:
        """Each row times the matrix of its expert. (R, 1, in) -> (R, 1, out)."""
        y = gather(x, self._stack(), indices, sorted_)
        if not self.pairs:
            return y
        low = self.dropped(x).astype(mx.float32)
        deltas = {}
        for name, pair in self.pairs.items():
            z = gather(low, pair.lora_a, indices, sorted_)
            delta = gather(z, pair.lora_b, indices, sorted_)
            deltas[name] = self._settings.scale * delta
        out = y + self._side_by_side(deltas, y)
        if not self._settings.dora:
            return out
        return out * self.row_scales()[indices][:, None].astype(out.dtype)

    def row_scales(self) -> mx.array:
        """(E, out); see AdaptedLinear."""
        stack = self.whole().astype(mx.float32)
        scales = []
        for part in self._rows.values():
            pair = self.pairs.get(part.name)
            if pair is None:
                scales.append(mx.ones((len(stack), part.stop - part.start)))
                continue
            rows = stack[:, part.start : part.stop] + self.delta(part.name)
            scales.append(pair.m / mx.stop_gradient(_row_lengths(rows)))
        return mx.concatenate(scales, axis=1)
