"""Attention for training on MLX's CPU back end, where softmax is most of its time.

There `exp` is one scalar library call per number (18 ns), so the softmax of a training
step costs more than its matmuls. This version takes exp from a polynomial and a bit
shift, which compile to vector instructions, and gets the denominators from the same
matmul as the result. Gain: 1.2x of a whole training step (2 cores, x86-64, float32).
Gradients: exact for the function as computed. On a GPU the definition is used.
"""

from typing import Any

import mlx.core as mx

_LN2 = 0.6931471805599453
# Taylor terms of 2^f for |f| <= 1/2: relative error below 1e-7.
_TERMS = tuple(_LN2**i / f for i, f in enumerate((1, 1, 2, 6, 24, 120, 720)))


@mx.custom_function
def fast_exp(x: mx.array) -> mx.array:
    """e^x in float32 for -60 <= x <= 88, relative error 2e-7; exactly 0 below -60.

    The zero matters: a masked weight of 1e-38 times a gradient is a denormal number,
    and denormals made a whole training step five times slower (measured).
    """
    y = mx.clip(x, -87.0, 88.0) * (1 / _LN2)
    # The exponent's bits; a cut after + 1/2 rounds, and unlike mx.round it is fused.
    bits = (y + 127.5).astype(mx.int32)
    part = y - (bits.astype(mx.float32) - 127)
    power = mx.array(_TERMS[-1], mx.float32)
    for term in reversed(_TERMS[:-1]):
        power = term + part * power
    power = power * (bits << 23).view(mx.float32)
    return mx.where(x < -60, 0.0, power)


@fast_exp.vjp
def _fast_exp_vjp(primals, cotangent, output):
    return cotangent * output


def attention_reference(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """softmax(q k^T * scale) v.

    Shapes:
        q: (B, heads, L, head_dim); k, v: (B, KV, T, head_dim)
        mask: None, "causal", or bool, broadcastable to (B, heads, L, T)
        returns: like q
    """
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def attention_cpu(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """The same contract for float32, one key head per query head, bool or no mask."""
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -1e4)
    top = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights: Any = fast_exp(scores - top)
    ones = mx.ones((*v.shape[:-1], 1), v.dtype)
    out = weights @ mx.concatenate([v, ones], axis=-1)
    return out[..., :-1] / out[..., -1:]


def fits(q: mx.array, k: mx.array, mask: mx.array | str | None) -> bool:
    """Whether attention_cpu applies and pays: CPU, float32, plain heads, many rows."""
    return (
        mx.default_device().type == mx.cpu
        and q.dtype == mx.float32
        and q.shape[1] == k.shape[1]
        and q.shape[2] >= 16
        and not isinstance(mask, str)
        and (mask is None or mask.dtype == mx.bool_)
    )


def training_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention by the version that fits."""
    choose: Any = attention_cpu if fits(q, k, mask) else attention_reference
    return choose(q, k, v, scale, mask)
