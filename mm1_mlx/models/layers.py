"""Attention, MLPs, norms and rotary positions, shared by encoder and decoder."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.cpu_activations import fast_activation, rows_at_a_time
from mm1_mlx.kernels.cpu_attention import training_attention
from mm1_mlx.kernels.cpu_products import linear as apply_linear
from mm1_mlx.kernels.fused import fused
from mm1_mlx.kernels.quantized_attention import attend_quantized
from mm1_mlx.kernels.recompute import recomputed

Mask = mx.array | str | None


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), the activation of OpenAI's and Apple's CLIP."""
    return x * mx.sigmoid(1.702 * x)


def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0)^2 (arXiv 2109.08668). No exp: 40 times faster than SiLU on a CPU."""
    return mx.square(mx.maximum(x, 0))


_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "quick_gelu": quick_gelu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "silu": nn.silu,
    "relu": nn.relu,
    "relu2": relu_squared,
}


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The activation function of a config's `hidden_act`."""
    return _ACTIVATIONS[name]


@lru_cache
def gated_activation(name: str) -> Callable[[mx.array, mx.array], mx.array]:
    """act(gate) * up as one launch; the arrays may be halves of another."""
    act = activation(name)

    def gated(gate: mx.array, up: mx.array) -> mx.array:
        return act(gate) * up

    return fused(gated)


def add_projection(
    linear: nn.Module, x: mx.array, residual: mx.array | None
) -> mx.array:
    """residual + linear(x): of a plain weight one launch, where it is a sum of floats.

    (..., in), (..., out) or None -> (..., out).
    """
    if residual is None:
        return linear(x)  # type: ignore[operator]
    if not linear.training and (own := getattr(linear, "added_to", None)) is not None:
        return own(residual, x)  # one with an adapter
    call: Any = linear
    plain = type(linear) is nn.Linear and "bias" not in linear and not linear.training
    if not plain or not residual.dtype == x.dtype == call.weight.dtype:
        return residual + call(x)
    # As rows: of a batch MLX would make a product for every row.
    rows = x.reshape(-1, x.shape[-1])
    flat = residual.reshape(-1, residual.shape[-1])
    return mx.addmm(flat, rows, call.weight.T).reshape(residual.shape)


def norm(kind: str, dims: int, eps: float, bias: bool = True) -> nn.Module:
    """A norm over the last axis by a config's `norm_type`."""
    if kind == "rms_norm":
        return nn.RMSNorm(dims, eps=eps)
    return nn.LayerNorm(dims, eps=eps, bias=bias)


def project(linear: nn.Module, x: mx.array, before: nn.Module | None) -> mx.array:
    """A linear layer of x, or of a norm of x.

    In training the norm's result is made again for the gradient, not kept.
    """
    if not linear.training:
        return apply_linear(linear, x if before is None else before(x))  # type: ignore[operator]
    if before is None:
        return linear(x)  # type: ignore[operator]

    def both(x: mx.array) -> mx.array:
        return linear(before(x))  # type: ignore[operator]

    return recomputed(both, before, linear)(x)


class MLP(nn.Module):
    """Two projections with an activation, or three when gated (SwiGLU and kin).

    Gated: gate and up are one matmul, `gate_up_proj`, its first rows the gate.

    before: a norm of x, see project. residual: what is added to the result.

    Shapes:
        x, residual: (..., D)
        returns: (..., D)
    """

    def __init__(
        self, dims: int, hidden: int, act: str, *, gated: bool, bias: bool = False
    ):
        super().__init__()
        if gated:
            self.gate_up_proj = nn.Linear(dims, 2 * hidden, bias=bias)
        else:
            self.up_proj = nn.Linear(dims, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dims, bias=bias)
        self._gated = gated
        self._name, self._act, self._hidden = act, activation(act), hidden
        self._gate = gated_activation(act)

    def __call__(
        self,
        x: mx.array,
        before: nn.Module | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        up = self["gate_up_proj" if self._gated else "up_proj"]
        if not self.training:
            hidden = self._activate(project(up, x, before))
            return add_projection(self.down_proj, hidden, residual)
        out = self._train(up, x, before)
        return out if residual is None else residual + out

    def _train(self, up: nn.Module, x: mx.array, before: nn.Module | None) -> mx.array:
        rows = rows_at_a_time(self._hidden, x)
        if not rows:  # the activation is made again for the gradient, not kept
            return recomputed(self._down, self.down_proj)(project(up, x, before))

        def whole(x: mx.array) -> mx.array:
            return self._down(up(x if before is None else before(x)))  # type: ignore[operator]

        modules = [up, self.down_proj] + ([] if before is None else [before])
        flat = recomputed(whole, *modules, rows=rows)(x.reshape(-1, x.shape[-1]))
        return flat.reshape(x.shape)

    def _activate(self, hidden: mx.array) -> mx.array:
        if not self._gated:
            return self._act(hidden)
        gate, up = mx.split(hidden, 2, axis=-1)
        return self._gate(gate, up)

    def _down(self, x: mx.array) -> mx.array:
        act = fast_activation(self._name, x) or self._act
        if not self._gated:
            return self.down_proj(act(x))
        gate, up = mx.split(x, 2, axis=-1)
        return self.down_proj(act(gate) * up)


def llama3_frequencies(dims: int, theta: float, scaling: dict) -> mx.array:
    """Wavelengths / 2 pi of Llama 3.1's RoPE, as mx.fast.rope wants them, (dims/2,).

    Long wavelengths are stretched by `factor`, short ones kept, those between blended
    (transformers: modeling_rope_utils.py, rope_type "llama3").
    """
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    freqs = theta ** (mx.arange(0, dims, 2).astype(mx.float32) / dims)
    waves = 2 * math.pi * freqs
    blend = (original / waves - low) / (high - low)
    blended = freqs / ((1 - blend) / factor + blend)
    stretched = mx.where(waves > original / low, freqs * factor, blended)
    return mx.where(waves < original / high, freqs, stretched)


class RotaryEmbedding(nn.Module):
    """Rotary positions on the first `dims` of each head, halves rotated as in Llama.

    Shapes:
        x: (B, heads, L, head_dim)
        offset: position of the first token, an int or (B,)
        positions: (B, L), used instead of offset when rows are packed
        returns: like x
    """

    def __init__(self, dims: int, theta: float, scaling: dict | None = None):
        super().__init__()
        self.dims = dims
        self._theta = theta
        self._scale = 1.0
        self._freqs = None
        if scaling is not None:
            kind = scaling.get("rope_type", scaling.get("type"))
            if kind == "llama3":
                self._freqs = llama3_frequencies(dims, theta, scaling)
            else:  # "linear"
                self._scale = 1.0 / scaling["factor"]

    def __call__(
        self,
        x: mx.array,
        offset: int | mx.array = 0,
        positions: mx.array | None = None,
    ) -> mx.array:
        if positions is not None:
            return self._at(x, positions)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=False,
            base=None if self._freqs is not None else self._theta,
            scale=self._scale,
            offset=offset,
            freqs=self._freqs,
        )

    def _at(self, x: mx.array, positions: mx.array) -> mx.array:
        freqs = self._freqs
        if freqs is None:
            steps = mx.arange(0, self.dims, 2).astype(mx.float32) / self.dims
            freqs = self._theta**steps
        angles = self._scale * positions[:, None, :, None] / freqs  # (B, 1, L, dims/2)
        cos, sin = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
        half = self.dims // 2
        first, second, *rest = mx.split(x, [half, self.dims], axis=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        if self.dims < x.shape[-1]:
            parts += rest
        return mx.concatenate(parts, axis=-1)


def attend(cache, q, k, v, scale: float, mask: Mask) -> mx.array:
    """Attention of q over what the cache gave, which may be quantized.

    A tuple (data, scales, biases) without `cache.attend` is mlx-lm's quantized cache.
    """
    if (own := getattr(cache, "attend", None)) is not None:
        return own(q, k, v, scale=scale, mask=mask)
    if isinstance(k, tuple):
        size, bits = cache.group_size, cache.bits
        return attend_quantized(q, k, v, scale, mask, size, bits)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _last_row(mask: Mask) -> Mask:
    """What the last position sees: causally, everything."""
    return mask[..., -1:, :] if isinstance(mask, mx.array) else None


def head_turns(
    positions: int | mx.array, rows: int, heads: int, values: int
) -> mx.array:
    """By how many positions each head of one token turns; the last ones, values, by 0.

    positions: of the rows, an int or (B,). heads: in all. -> (B * heads,) int32.
    """
    if isinstance(positions, mx.array):
        positions = positions[:, None]
    return (positions * _turning(rows, heads, values)).reshape(-1)


@lru_cache(maxsize=64)
def _turning(rows: int, heads: int, values: int) -> mx.array:
    return mx.array([[1] * (heads - values) + [0] * values] * rows, mx.int32)


class Attention(nn.Module):
    """Multi-head attention with grouped keys; q, k and v are one matmul.

    rope: None in an encoder. qk_norm: None, "head" (RMSNorm over each head, Qwen3) or
    "full" (over all heads together, OLMoE), both before the rotation; or
    "rotated_head" (over each head, after it, Apple's tamm).

    Shapes:
        x: (B, L, D)
        mask: None, "causal", or bool/additive, broadcastable to (B, heads, L, keys)
        positions: (B, L) or None
        last_only: give the last position alone; all are still stored in the cache
        before: a norm of x, see project
        rows: (M,) flat places, those that are given alone
        residual: what is added to the result, of its shape
        turns: with one token a row: the position of each row's heads, see head_turns
        returns: (B, L, D), or (B, 1, D), or (M, D)
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: str | None = None,
        norm_eps: float = 1e-5,
        rope: RotaryEmbedding | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim
        rows = (num_heads + 2 * self.num_kv_heads) * head_dim
        self.qkv_proj = nn.Linear(dims, rows, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dims, bias=out_bias)
        self._rope = rope
        self._qk_norm = qk_norm
        if qk_norm is not None:
            wide = qk_norm == "full"
            q_dims = num_heads * head_dim if wide else head_dim
            k_dims = self.num_kv_heads * head_dim if wide else head_dim
            self.q_norm = nn.RMSNorm(q_dims, eps=norm_eps)
            self.k_norm = nn.RMSNorm(k_dims, eps=norm_eps)

    @property
    def norms_all_heads(self) -> bool:
        """Whether one norm goes over all heads together."""
        return self._qk_norm == "full"

    def __call__(
        self,
        x: mx.array,
        mask: Mask = None,
        cache=None,
        positions: mx.array | None = None,
        last_only: bool = False,
        before: nn.Module | None = None,
        rows: mx.array | None = None,
        residual: mx.array | None = None,
        turns: mx.array | None = None,
    ) -> mx.array:
        B, L, _ = x.shape
        H, hd = self.num_heads, self.head_dim
        qkv = project(self.qkv_proj, x, before)
        if turns is not None and self._qk_norm is None:
            q, k, v = self._one_token(qkv, cache, turns)
        else:
            q, k, v = self._rotated(qkv, cache, positions)
            if cache is not None:
                k, v = cache.update_and_fetch(k, v)
        if last_only and L > 1:
            q, mask, L = q[:, :, -1:], _last_row(mask), 1
        if self.training and cache is None:
            # With rotary positions it is a decoder's, which sees nothing later.
            causal = self._rope is not None
            out = training_attention(q, k, v, hd**-0.5, mask, causal)
        else:
            out = attend(cache, q, k, v, hd**-0.5, mask)
        out = out.swapaxes(1, 2).reshape(B, L, H * hd)
        if rows is not None:
            out = out.reshape(-1, H * hd)[rows]
        return add_projection(self.o_proj, out, residual)

    def _one_token(
        self, qkv: mx.array, cache, turns: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q of one token a row, and all keys and values. (B, 1, N) -> 3 arrays.

        All heads go through one rotation, each by its own angle: by 0, which changes
        nothing, where it is a value. So nothing is cut before it, which MLX would copy
        for a batch, and keys and values lie beside each other and are stored in one
        write.
        """
        B, H, KV, hd = qkv.shape[0], self.num_heads, self.num_kv_heads, self.head_dim
        assert self._rope is not None
        heads = self._rope(qkv.reshape(-1, 1, 1, hd), turns)
        heads = heads.reshape(B, H + 2 * KV, 1, hd)
        q, both = mx.split(heads, [H], axis=1)
        both = mx.unflatten(both, 1, (2, KV)).swapaxes(0, 1)  # (2, B, KV, 1, hd)
        if (update := getattr(cache, "update_both", None)) is not None:
            return q, *update(both)
        return q, *cache.update_and_fetch(both[0], both[1])

    def _rotated(
        self, qkv: mx.array, cache, positions: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q, k and v. (B, L, N) -> (B, H or KV, L, hd) each."""
        B, L, _ = qkv.shape
        H, KV, hd = self.num_heads, self.num_kv_heads, self.head_dim
        qk, v = mx.split(qkv, [(H + KV) * hd], axis=-1)
        if self._qk_norm in ("head", "full"):
            qk = self._normed(qk)
        elif B > 1 and not self.training and self._rope is not None:
            qk = qkv  # v turns for nothing, but MLX would copy a part of a batch
        qk = qk.reshape(B, L, -1, hd).swapaxes(1, 2)  # (B, heads, L, hd)
        v = v.reshape(B, L, KV, hd).swapaxes(1, 2)
        if self._rope is not None:  # q and k turn together: one launch
            offset = 0 if cache is None else getattr(cache, "positions", cache.offset)
            qk = self._rope(qk, offset, positions)
        # Slices would have gradients full of zeros.
        ends = [H] if qk.shape[1] == H + KV else [H, H + KV]
        q, k, *_ = mx.split(qk, ends, axis=1)
        if self.training and cache is None:
            v = mx.contiguous(v)  # or all of qkv would be kept for the gradient
        if self._qk_norm == "rotated_head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _normed(self, qk: mx.array) -> mx.array:
        B, L, _ = qk.shape
        q, k = mx.split(qk, [self.num_heads * self.head_dim], axis=-1)
        if self._qk_norm == "full":
            return mx.concatenate([self.q_norm(q), self.k_norm(k)], axis=-1)
        q = self.q_norm(q.reshape(B, L, -1, self.head_dim)).reshape(q.shape)
        k = self.k_norm(k.reshape(B, L, -1, self.head_dim)).reshape(k.shape)
        return mx.concatenate([q, k], axis=-1)
