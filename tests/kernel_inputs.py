"""What the tests give Metal kernels, and what they should make of it exactly."""

from typing import Any

import mlx.core as mx
import numpy as np
from kernel_kit import wide

from mm1_mlx.kernels.quantized_attention import attention_reference, fill_last_axis
from mm1_mlx.kernels.routed_experts import experts_reference
from mm1_mlx.models.moe import QuantizedStack

# The same numbers are rounded at the same places, but the sum of squares is taken in
# another order: a number that lies between two may go to either. Of the largest value.
NEAR = {mx.float32: 2e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}


# --- the router


def tied_logits(T: int, E: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Few different values, so that ties are many, zeros of both signs among them."""
    numbers = np.random.default_rng(E).integers(-6, 7, (T, E)) / 2
    numbers[0, : E // 2] = -0.0
    return mx.array(numbers.astype(np.float32)).astype(dtype)


# --- add_norm


def norm_inputs(
    shape: tuple[int, ...], dtype: mx.Dtype = mx.float32, bias: bool = False
) -> tuple[Any, ...]:
    """x (not centred: LayerNorm must take its mean away), delta, weight, bias."""
    x = (mx.random.normal(shape) * 3 + 1).astype(dtype)
    delta, weight, added = (
        mx.random.normal(s).astype(dtype) for s in (shape, shape[-1:], shape[-1:])
    )
    mx.eval(x, delta, weight, added)
    return x, delta, weight, added if bias else None


# --- routed_experts


def packed(bits: int, group_size: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size}


def experts_inputs(
    E: int,
    D: int,
    F: int,
    T: int,
    K: int,
    dtype: mx.Dtype = mx.float32,
    *,
    gated: bool = True,
    up: dict | None = None,
    down: dict | None = None,
) -> list[Any]:
    """x, up, down, weights and experts, as the choosers take them."""
    rows = 2 * F if gated else F
    stacks: list[Any] = [
        (mx.random.normal((E, rows, D)) * D**-0.5).astype(dtype),
        (mx.random.normal((E, D, F)) * F**-0.5).astype(dtype),
    ]
    for i, how in enumerate((up, down)):
        if how is not None:
            stacks[i] = QuantizedStack(stacks[i], **how)
    experts = mx.argsort(mx.random.normal((T, E)), axis=-1)[:, :K]
    weights = mx.softmax(mx.random.normal((T, K)), axis=-1)
    found = [mx.random.normal((T, D)).astype(dtype), *stacks, weights, experts]
    mx.eval(found[0], found[3:])
    return found


def experts_exactly(given: list[Any], act: str, gated: bool) -> mx.array:
    """The definition in float32, from the same rounded numbers."""
    return experts_reference(*wide([*map(whole, given)]), act, gated)


def whole(stack: Any) -> mx.array:
    """The numbers that a packed stack stands for, not rounded to 16 bits."""
    if isinstance(stack, mx.array):
        return stack
    scales, biases = wide([stack.scales, stack.biases])
    how = packed(stack.bits, stack.group_size)
    return mx.dequantize(stack.weight, scales, biases, **how)


# --- quantized_attention


def cached(
    shape: tuple[int, int, int, int],
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    room: int = 0,
) -> tuple[mx.array, ...]:
    """Packed keys or values, as the cache gives them: a slice of a larger store."""
    B, KV, columns, width = shape
    x = mx.random.normal((B, KV, columns + room, width)).astype(dtype)
    how = {"group_size": group_size, "bits": bits}
    stored = mx.quantize(fill_last_axis(x, group_size), **how)
    found = tuple(array[..., :columns, :] for array in stored)
    mx.eval(found)
    return found


def padding(columns: int, *padded: int) -> mx.array:
    """A mask (B, 1, 1, columns) that hides the first columns of each row."""
    return mx.arange(columns) >= mx.array(padded)[:, None, None, None]


def attention_inputs(
    B: int,
    H: int,
    KV: int,
    L: int,
    width: int,
    columns: int,
    bits: int,
    group_size: int,
    dtype: mx.Dtype = mx.float32,
    mask: Any = None,
    room: int = 3,
) -> tuple[Any, ...]:
    """The choosers' arguments. q is a slice, too: q and k are turned at once."""
    qk = mx.random.normal((B, H + KV, L, width)).astype(dtype) * 2
    mx.eval(qk)
    shape = (B, KV, columns, width)
    kv = [cached(shape, bits, group_size, dtype, room) for _ in range(2)]
    return qk[:, :H], *kv, width**-0.5, mask, group_size, bits


def attention_exactly(given: tuple[Any, ...]) -> mx.array:
    return attention_reference(*wide(given[:3]), *given[3:])
