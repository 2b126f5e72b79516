"""Linear layers and experts with low-rank pairs beside their frozen weights.

A weight of ours may hold several projections (q, k and v; gate and up). Each projection
has its own pair, so that an adapter means what it means in mlx-lm and PEFT.

y = W x + scale * B (A x), with A random and B zero at first (LoRA, arXiv 2106.09685);
DoRA (2402.09353) also learns the length of every row of W + scale * B A.

To answer, the pairs of a layer are stacked once into one A and one B (zero off its
blocks), and DoRA's row scales are computed once: two products in place of two a
projection. They differ from training's by float rounding only (the order of sums).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.recompute import recomputed
from mm1_mlx.models.layers import add_projection
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


def _add_product(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """c + a @ b in one launch. (..., out), (..., R), (R, out) -> (..., out)."""
    if c.ndim == 3 and c.shape[0] == 1:
        return mx.addmm(c, a, b)
    # Else MLX makes a product of every row of the batch.
    flat = mx.addmm(c.reshape(-1, c.shape[-1]), a.reshape(-1, a.shape[-1]), b)
    return flat.reshape(c.shape)


def _same(some: list[mx.array], others: list[mx.array]) -> bool:
    """Whether they are the same arrays, not only equal ones."""
    return len(some) == len(others) and all(map(is_, some, others))


def _row_lengths(weight: mx.array) -> mx.array:
    return mx.linalg.norm(weight.astype(mx.float32), axis=-1)


class _Stacked:
    """The pairs of a layer as one A and one B, for inference.

    made_of: the arrays that they were made of; with others they do not hold.

    Shapes:
        of a linear layer: a (in, R), b (R, out), row_scales (out,)
        of experts: a (E, R, in), b (E, out, R), row_scales (E, out)
        R is the sum of the ranks; row_scales only with DoRA
    """

    def __init__(
        self,
        made_of: list[mx.array],
        a: mx.array,
        b: mx.array,
        row_scales: mx.array | None,
    ):
        self.made_of, self.a, self.b, self.row_scales = made_of, a, b, row_scales
        mx.eval(a, b, *([] if row_scales is None else [row_scales]))


class _Adapted(nn.Module):
    """What linear layers and experts share: pairs of some of a weight's projections."""

    def __init__(self, rows: Sequence[Rows], settings: PairSettings):
        super().__init__()
        self._rows = {part.name: part for part in rows}
        self._settings = settings
        self._key: mx.array | None = None
        self._stacked: _Stacked | None = None
        self._kept_scales: tuple[list[mx.array], mx.array] | None = None
        self.pairs: dict[str, Pair] = {}

    def add_pair(self, name: str, key: mx.array) -> None:
        """Start the pair of a projection. key: of its random numbers."""
        raise NotImplementedError

    @property
    def frozen(self) -> Any:
        """What stood in the model where this layer does: a layer, or a stack."""
        return self["base"] if "base" in self else self["weight"]

    def row_scales(self) -> mx.array:
        """DoRA's factor for each row of the weight."""
        raise NotImplementedError

    def stack(self) -> None:
        """Make what inference uses of the pairs; `eval` does. Evaluated at once."""
        if not self.pairs:
            return
        made_of, scales = self._made_of(), None
        if self._settings.dora:  # of all weights: kept when the stack is not
            if self._kept_scales is None or not _same(self._kept_scales[0], made_of):
                self._kept_scales = (made_of, self.row_scales())
            scales = self._kept_scales[1]
        self._stacked = _Stacked(made_of, *self._side_by_side_pairs(), scales)

    def unstack(self) -> None:
        """Give its memory back, but for DoRA's row scales, which are small and slow to
        compute; `train` gives back those, too."""
        self._stacked = None

    def stacked(self) -> _Stacked | None:
        """What `stack` made, where it still holds: pairs change in training, and where
        a caller sets, casts or differentiates them."""
        made = self._stacked
        if made is None or self.training:
            return None
        return made if _same(self._made_of(), made.made_of) else None

    def _made_of(self) -> list[mx.array]:
        arrays = [array for pair in self.pairs.values() for array in pair.values()]
        if self._settings.dora:
            frozen = self.frozen
            arrays.append(frozen if isinstance(frozen, mx.array) else frozen["weight"])
        return arrays

    def _side_by_side_pairs(self) -> tuple[mx.array, mx.array]:
        """A and B of all projections, with the scale in B; see _Stacked."""
        raise NotImplementedError

    def _in_order(self) -> dict[str, Pair]:
        """The pairs as their rows follow each other, however they were added."""
        return {name: self.pairs[name] for name in self._rows if name in self.pairs}

    def _blocks(self, b: dict[str, mx.array]) -> mx.array:
        """Each projection's B (..., rows, r) in its rows and columns, else zeros.

        -> (..., out, R)
        """
        rank = sum(block.shape[-1] for block in b.values())
        bands, before = [], 0
        for part in self._rows.values():
            block = b.get(part.name)
            if block is None:
                like = next(iter(b.values()))
                shape = (*like.shape[:-2], part.stop - part.start, rank)
                bands.append(mx.zeros(shape, like.dtype))
                continue
            after = rank - before - block.shape[-1]
            around = [(0, 0)] * (block.ndim - 1) + [(before, after)]
            bands.append(mx.pad(self._settings.scale * block, around))
            before += block.shape[-1]
        return mx.concatenate(bands, axis=-2)

    def _set_training_mode(self, mode: bool) -> None:  # what train() and eval() call
        super()._set_training_mode(mode)
        if mode:
            self._stacked = self._kept_scales = None
        elif self.stacked() is None:
            self.stack()

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
        """How wide what it reads is; packed weights hold several numbers in one."""
        columns = self.base.weight.shape[1]
        if isinstance(self.base, nn.QuantizedLinear):
            columns = columns * 32 // self.base.bits
        return columns

    def add_pair(self, name: str, key: mx.array) -> None:
        """Give a projection a fresh pair, which adds nothing yet: (in, r), (r, out)."""
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

    def _side_by_side_pairs(self) -> tuple[mx.array, mx.array]:
        pairs = self._in_order()
        a = mx.concatenate([pair.lora_a for pair in pairs.values()], axis=-1)
        b = self._blocks({name: pair.lora_b.T for name, pair in pairs.items()})
        return a, mx.contiguous(b.T)

    def added_to(self, residual: mx.array, x: mx.array) -> mx.array:
        """residual + what a call gives. (..., out), (..., in) -> (..., out)."""
        if not self.pairs:
            return add_projection(self.base, x, residual)
        made = self.stacked()
        if made is None or self._settings.dora:  # whose factor is not the residual's
            return residual + self(x)
        return self._with_stacked(x, add_projection(self.base, x, residual), made)

    def _with_stacked(self, x: mx.array, y: mx.array, made: _Stacked) -> mx.array:
        """y = W x (+ bias), or without DoRA more, with what the pairs add."""
        bias = self.base.get("bias") if self._settings.dora else None
        out = y if bias is None else y - bias
        low = x @ made.a  # (..., R) float32
        if out.dtype == made.b.dtype:
            out = _add_product(out, low, made.b)
        else:
            out = out + (low @ made.b).astype(out.dtype)
        if made.row_scales is not None:
            out = out * made.row_scales.astype(out.dtype)
        return out if bias is None else out + bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        if not self.pairs:
            return y
        if (made := self.stacked()) is not None:
            return self._with_stacked(x, y, made)
        if not self._settings.dora:
            return self._add_pairs(y, self.dropped(x))
        bias = self.base.get("bias")
        plain = y if bias is None else y - bias
        out = self._add_pairs(plain, self.dropped(x))
        out = out * self.row_scales().astype(out.dtype)
        return out if bias is None else out + bias

    def _add_pairs(self, y: mx.array, x: mx.array) -> mx.array:
        """y and what the pairs make of x. (..., out), (..., in) -> (..., out)."""
        pairs = list(self.pairs.values())

        def add(x: mx.array, y: mx.array, *halves: mx.array) -> mx.array:
            firsts, seconds = list(halves[: len(pairs)]), halves[len(pairs) :]
            low = self._settings.scale * (x @ mx.concatenate(firsts, axis=-1))
            # One product for all projections, added as it is made.
            wide = self._wide(dict(zip(self.pairs, seconds, strict=True)))
            if y.dtype == low.dtype:
                return mx.addmm(y, low, wide)
            return y + (low @ wide).astype(y.dtype)

        halves = [p.lora_a for p in pairs] + [p.lora_b for p in pairs]
        # The gradients of pairs are made before that of x: what they are made of, which
        # is large, would else be kept until those of all layers are made.
        adding = recomputed(add) if self.training else add
        # As rows: of a batch MLX would make as many products, and sum their gradients.
        flat = adding(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), *halves)
        return flat.reshape(y.shape)

    def _wide(self, seconds: dict[str, mx.array]) -> mx.array:
        """All lora_b in one, each in its own rows and columns, zeros beside it.

        (sum of ranks, out).
        """
        whole = max(part.stop for part in self._rows.values())
        parts = []
        for name, b in seconds.items():
            rows = self._rows[name]
            alone = rows.stop - rows.start == whole
            around = [(0, 0), (rows.start, whole - rows.stop)]
            parts.append(b if alone else mx.pad(b, around))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

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
        """E."""
        return self.weight.shape[0] if "weight" in self else self.base.num_experts

    def whole(self) -> mx.array:
        """The frozen numbers. (E, out, in)."""
        return self.weight if "weight" in self else self.base.whole()

    @property
    def input_dims(self) -> int:
        """How wide what it reads is; packed weights hold several numbers in one."""
        if "weight" in self:
            return self.weight.shape[-1]
        return self.base.weight.shape[-1] * 32 // self.base.bits

    def add_pair(self, name: str, key: mx.array) -> None:
        """Give a projection fresh pairs, which add nothing: (E, r, in), (E, out, r)."""
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

    def _side_by_side_pairs(self) -> tuple[mx.array, mx.array]:
        pairs = self._in_order()
        a = mx.concatenate([pair.lora_a for pair in pairs.values()], axis=1)
        return a, self._blocks({name: pair.lora_b for name, pair in pairs.items()})

    def gather(
        self,
        x: mx.array,
        indices: mx.array,
        sorted_: bool,
        rows: mx.array | None = None,
    ) -> mx.array:
        """Rows times the matrices of their experts; see models.moe.gather."""
        y = gather(x, self.frozen, indices, sorted_, rows=rows)
        if not self.pairs:
            return y
        if (made := self.stacked()) is not None:
            low = gather(x.astype(mx.float32), made.a, indices, sorted_, rows=rows)
            out = y + gather(low, made.b, indices, sorted_).astype(y.dtype)
            if made.row_scales is None:
                return out
            return out * made.row_scales[indices][:, None].astype(out.dtype)
        low = self.dropped(x).astype(mx.float32)
        deltas = {}
        for name, pair in self.pairs.items():
            z = gather(low, pair.lora_a, indices, sorted_, rows=rows)
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
