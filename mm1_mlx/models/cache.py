"""Keys and values of what was read already, so that a step reads only what is new.

Both caches know left-padded batches: the rows of a batch end together, shorter ones
start later, and each row counts its positions from its own first token. So a row gives
what it gives alone.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import MM1Error
from mm1_mlx.kernels.quantized_attention import attend_quantized, fill_last_axis

QUANTIZED_BITS = (4, 8)


class _Cache:
    """What both caches share: storage that grows, padding, masks, trimming.

    offset: columns stored, padding included. left_padding: columns of each row that
    hold no token, or None. Each array of the store is (..., B, KV, columns, width).
    """

    step = 256  # columns that the store grows by; they are its last axis but one

    def __init__(self, left_padding: Sequence[int] | None = None):
        self.offset = 0
        self.adapter: Any = None  # the mark of the one that filled it; see claim
        self._arrays: list[mx.array] = []
        self._set_padding(left_padding)

    def _set_padding(self, left_padding: Sequence[int] | None) -> None:
        padded = left_padding is not None and any(left_padding)
        self.left_padding = list(left_padding) if padded and left_padding else None
        self._starts = mx.array(self.left_padding) if self.left_padding else None

    @property
    def positions(self) -> int | mx.array:
        """Where RoPE starts for the next token: an int, or (B,) when rows are padded.

        Below 0 in the padding, which nobody sees.
        """
        return self.offset if self._starts is None else self.offset - self._starts

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask for the next `length` tokens, as mlx-lm's caches give it.

        None or "causal" where that says it all, else bool (length, columns), or
        (B, 1, length, columns) when rows are padded. A place in the padding sees
        itself: a row of a softmax that sees nothing would be NaN and spread.
        """
        if self._starts is None and window_size is None:
            if length == 1:
                return None
            if not return_array:
                return "causal"
        keys = mx.arange(self.offset + length)
        queries = mx.arange(self.offset, self.offset + length)[:, None]
        mask = keys <= queries
        if window_size is not None:
            mask = mask & (keys > queries - window_size)
        if self._starts is None:
            return mask
        is_token = keys >= self._starts[:, None, None, None]  # (B, 1, 1, columns)
        return (mask & is_token) | (keys == queries)

    def _grow(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence) -> slice:
        """Make room for arrays of these shapes; the columns that they go to."""
        start, stop = self.offset, self.offset + shapes[0][-2]
        if not self._arrays or stop > self._arrays[0].shape[-2]:
            room = -(-stop // self.step) * self.step - start
            old = self._arrays or [None] * len(shapes)
            self._arrays = [
                _with_room(array, start, shape, dtype, room)
                for array, shape, dtype in zip(old, shapes, dtypes, strict=True)
            ]
        self.offset = stop
        return slice(start, stop)

    def _append(self, new: Sequence[mx.array]) -> list[mx.array]:
        """Store arrays behind the others; give all that is stored."""
        columns = self._grow([x.shape for x in new], [x.dtype for x in new])
        for array, part in zip(self._arrays, new, strict=True):
            array[..., columns, :] = part
        return self._stored()

    def _stored(self) -> list[mx.array]:
        return [array[..., : self.offset, :] for array in self._arrays]

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The stored arrays without spare room; empty before the first token."""
        return tuple(self._stored())

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        self._arrays = [mx.array(array) for array in arrays]
        self.offset = self._arrays[0].shape[-2] if self._arrays else 0

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(array.nbytes for array in self._arrays)

    def size(self) -> int:
        """Columns stored."""
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens (at most all); how many were forgotten."""
        n = max(0, min(n, self.offset))
        self.offset -= n
        return n

    def filter(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; drop padding that all share."""
        keep = mx.array(list(rows))
        shared = 0
        if self.left_padding is not None:
            padding = [self.left_padding[row] for row in rows]
            shared = min(padding, default=0)
            self._set_padding([p - shared for p in padding])
        self._arrays = [
            mx.take(array, keep, axis=-4)[..., shared:, :] for array in self._arrays
        ]
        self.offset -= shared


def claim(cache: Sequence[Any], adapter: Any) -> None:
    """Note which adapter fills a cache; MM1Error where another one has begun it.

    adapter: its mark, equal to those of the same weights; None for the base model.
    """
    for entry in cache:
        if not isinstance(entry, _Cache) or entry.adapter is adapter:
            continue
        if not entry.empty() and entry.adapter != adapter:
            raise MM1Error(
                f"This cache or answer was begun with {_called(entry.adapter)}, but "
                f"{_called(adapter)} is in use now, to which it means nothing. Begin "
                f"again with an empty cache, or use the one that it was begun with."
            )
        entry.adapter = adapter


def _called(adapter: Any) -> str:
    return "the base model" if adapter is None else f"the adapter {adapter.name!r}"


def _with_room(
    array: mx.array | None, used: int, shape: tuple[int, ...], dtype: Any, room: int
) -> mx.array:
    """The first `used` columns of an array with `room` zero columns behind them.

    shape: of what is to be added.
    """
    *before, _, width = shape
    space = mx.zeros((*before, room, width), dtype)
    if array is None or not used:
        return space
    return mx.concatenate([array[..., :used, :], space], axis=-2)


class KVCache(_Cache):
    """Keys and values of one layer, stored as they are.

    In one array (2, B, KV, columns, head_dim), so that those of a token are one write.

    Shapes:
        update_and_fetch: keys, values (B, KV, L, head_dim) -> all so far
        update_both: (2, B, KV, L, head_dim) -> all keys and all values so far
    """

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Add new tokens; see Shapes."""
        columns = self._grow([(2, *keys.shape)], [keys.dtype])
        self._arrays[0][0, ..., columns, :] = keys
        self._arrays[0][1, ..., columns, :] = values
        return self._both()

    def update_both(self, both: mx.array) -> tuple[mx.array, mx.array]:
        """Add new tokens whose keys and values are one array; see Shapes."""
        self._append([both])
        return self._both()

    def begin(
        self,
        parts: Sequence[tuple[int, int, mx.array, mx.array]],
        shape: tuple[int, int, int],
    ) -> None:
        """Be one that has read this, without another copy of it.

        parts: at least one row, first column, and keys and values (1, KV, C, head_dim)
        that belong there. shape: rows, columns that count as read, columns to have room
        for.
        """
        rows, read, room = shape
        _, heads, _, width = parts[0][2].shape
        columns = -(-room // self.step) * self.step
        space = mx.zeros((2, rows, heads, columns, width), parts[0][2].dtype)
        for row, start, *both in parts:
            for which, array in enumerate(both):
                stop = start + array.shape[-2]
                space[which, row : row + 1, :, start:stop] = array
        self._arrays, self.offset = [space], read

    def _both(self) -> tuple[mx.array, mx.array]:
        # An index would be a launch that copies; parts are views.
        (stored,) = self._stored()
        keys, values = mx.split(stored, 2)
        return keys.squeeze(0), values.squeeze(0)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """Keys and values so far, (B, KV, L, head_dim) each, or nothing."""
        return self._both() if self._arrays else ()

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        self._arrays = [mx.stack(list(arrays))] if arrays else []
        self.offset = self._arrays[0].shape[-2] if self._arrays else 0

    @property
    def keys(self) -> mx.array | None:
        """(B, KV, L, head_dim) with room behind them, or None."""
        return self._arrays[0][0] if self._arrays else None

    @property
    def values(self) -> mx.array | None:
        """(B, KV, L, head_dim) with room behind them, or None."""
        return self._arrays[0][1] if self._arrays else None

    def to_quantized(self, group_size: int = 64, bits: int = 8) -> "QuantizedKVCache":
        """What is stored, quantized; new tokens will be too."""
        quantized = QuantizedKVCache(
            self.left_padding, group_size=group_size, bits=bits
        )
        if self._arrays:
            quantized.update_and_fetch(*self._both())
        quantized.adapter = self.adapter
        return quantized


class QuantizedKVCache(_Cache):
    """Keys and values of one layer in 8 or 4 bits, with their own attention.

    Groups of `group_size` numbers share a scale and a bias. Where a head is not a
    multiple of it, the next smaller size that MLX has is used, and after 32 zeros fill
    the last group.

    Shapes:
        update_and_fetch: keys, values (B, KV, L, head_dim) -> both as (data, scales,
        biases), all so far
    """

    def __init__(
        self,
        left_padding: Sequence[int] | None = None,
        *,
        group_size: int = 64,
        bits: int = 8,
    ):
        assert bits in QUANTIZED_BITS, bits
        super().__init__(left_padding)
        self.group_size, self.bits = group_size, bits

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Quantize and add new tokens; all so far, as weights, scales and biases."""
        if self.empty():
            width = keys.shape[-1]
            fitting = [g for g in (128, 64) if g <= self.group_size and width % g == 0]
            self.group_size = fitting[0] if fitting else 32
        stored = self._append([*self._quantize(keys), *self._quantize(values)])
        return tuple(stored[:3]), tuple(stored[3:])

    def _quantize(self, x: mx.array) -> Sequence[mx.array]:
        x = fill_last_axis(x, self.group_size)
        return mx.quantize(x, group_size=self.group_size, bits=self.bits)

    def attend(
        self,
        q: mx.array,
        keys: tuple[mx.array, ...],
        values: tuple[mx.array, ...],
        *,
        scale: float,
        mask: mx.array | str | None = None,
    ) -> mx.array:
        """Attention over what update_and_fetch gave; see kernels.attend_quantized."""
        return attend_quantized(
            q, keys, values, scale, mask, self.group_size, self.bits
        )


def make_cache(
    num_layers: int,
    *,
    left_padding: Sequence[int] | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> list[KVCache] | list[QuantizedKVCache]:
    """An empty cache entry per layer; kv_bits 4 or 8 stores them quantized."""
    if kv_bits is None:
        return [KVCache(left_padding) for _ in range(num_layers)]
    return [
        QuantizedKVCache(left_padding, group_size=kv_group_size, bits=kv_bits)
        for _ in range(num_layers)
    ]
