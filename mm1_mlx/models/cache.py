"""Keys and values of what was read already, so that a step reads only what is new."""

import mlx.core as mx


class KVCache:
    """Keys and values of one layer, grown by `step` positions at a time.

    offset: positions stored. positions: what RoPE starts from (offset, per row).
    Shapes:
        update_and_fetch: keys, values (B, KV, L, head_dim) -> all so far
    """

    step = 256

    def __init__(self):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    @property
    def positions(self) -> int | mx.array:
        return self.offset

    def make_mask(self, length: int) -> mx.array | str | None:
        return "causal" if length > 1 else None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        start, stop = self.offset, self.offset + keys.shape[2]
        if self.keys is None or stop > self.keys.shape[2]:
            self._grow(keys, values, stop)
        self.keys[..., start:stop, :] = keys
        self.values[..., start:stop, :] = values
        self.offset = stop
        return self.keys[..., :stop, :], self.values[..., :stop, :]

    def _grow(self, keys: mx.array, values: mx.array, stop: int) -> None:
        size = -(-stop // self.step) * self.step
        B, heads = keys.shape[:2]
        room = size - self.offset
        new_keys = mx.zeros((B, heads, room, keys.shape[3]), keys.dtype)
        new_values = mx.zeros((B, heads, room, values.shape[3]), values.dtype)
        if self.keys is not None and self.offset:
            used_keys = self.keys[..., : self.offset, :]
            used_values = self.values[..., : self.offset, :]
            new_keys = mx.concatenate([used_keys, new_keys], axis=2)
            new_values = mx.concatenate([used_values, new_values], axis=2)
        self.keys, self.values = new_keys, new_values
