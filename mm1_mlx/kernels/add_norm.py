"""A residual sum and the norm of it in one launch.

In place of an addition and mx.fast.rms_norm or layer_norm: 2 launches become 1, and the
sum is not read again: 4 rows of memory traffic in place of 5.

Its gradient is the definition's.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.metal import MetalKernel, bits_of, chosen

IN_REGISTERS = 16  # numbers of a row that one thread keeps; wider rows are read again
THREADS = 512  # most of a threadgroup: each may have 100 registers then
FLOATS = (mx.float32, mx.float16, mx.bfloat16)

Norm = Callable[[mx.array], mx.array]


def add_norm_reference(
    x: mx.array,
    delta: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    eps: float,
    centred: bool,
) -> tuple[mx.array, mx.array]:
    """x + delta, and its RMSNorm, or centred: its LayerNorm, over the last axis.

    The norm is of the sum as it is stored, in float32 inside.

    Shapes:
        x, delta: (..., D); weight, bias: (D,)
    """
    total = x + delta
    return total, _normed(total, weight, bias, eps, centred)


def _normed(
    total: mx.array, weight: mx.array, bias: mx.array | None, eps: float, centred: bool
) -> mx.array:
    if centred:
        return mx.fast.layer_norm(total, weight, bias, eps)
    return mx.fast.rms_norm(total, weight, eps)


# A sum over a threadgroup, of at most 32 SIMD-groups. Each call needs its own `parts`:
# the one before may still be read.
_HEADER = """
inline float mm1_group_sum(
    float value, threadgroup float* parts, uint lane, uint group, uint groups) {
    float sum = simd_sum(value);
    if (lane == 0) parts[group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < groups ? parts[lane] : 0.0f);
}
"""

_SOURCE = """
    constexpr int PER_THREAD = (D + THREADS - 1) / THREADS;
    constexpr bool KEEP = PER_THREAD <= IN_REGISTERS;
    threadgroup float means[32];
    threadgroup float squares[32];
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    int me = thread_position_in_threadgroup.x;
    size_t row = size_t(threadgroup_position_in_grid.y) * D;
    float kept[KEEP ? PER_THREAD : 1];
    float sum = 0.0f;
    for (int n = 0; n < PER_THREAD; n++) {
        int i = me + n * THREADS;
        T stored = static_cast<T>(0.0f);
        if (i < D) {
            stored = static_cast<T>(
                static_cast<float>(x[row + i]) + static_cast<float>(delta[row + i]));
            total[row + i] = stored;
        }
        float value = static_cast<float>(stored);
        if (KEEP) kept[n] = value;
        sum += CENTRED ? value : value * value;
    }
    float mean = 0.0f;
    if (CENTRED) {
        mean = mm1_group_sum(sum, means, lane, group, THREADS / 32) / D;
        sum = 0.0f;
        for (int n = 0; n < PER_THREAD; n++) {
            int i = me + n * THREADS;
            if (i < D) {
                float value = KEEP ? kept[n] : static_cast<float>(total[row + i]);
                sum += (value - mean) * (value - mean);
            }
        }
    }
    sum = mm1_group_sum(sum, squares, lane, group, THREADS / 32);
    float scale = metal::precise::rsqrt(sum / D + as_type<float>(EPS));
    for (int n = 0; n < PER_THREAD; n++) {
        int i = me + n * THREADS;
        if (i < D) {
            float value = KEEP ? kept[n] : static_cast<float>(total[row + i]);
            // Rounded where MLX's own kernels round: their products are in T.
            value = static_cast<float>(static_cast<T>((value - mean) * scale));
            T result = static_cast<T>(static_cast<float>(weight[i]) * value);
            BIAS
            normed[row + i] = result;
        }
    }
"""
_ADD_BIAS = """
            result = static_cast<T>(
                static_cast<float>(result) + static_cast<float>(bias[i]));
"""

_KERNEL = MetalKernel(
    "mm1_add_norm",
    inputs=["x", "delta", "weight"],
    outputs=["total", "normed"],
    header=_HEADER,
    source=_SOURCE.replace("BIAS", ""),
)
_KERNEL_WITH_BIAS = MetalKernel(
    "mm1_add_norm_bias",
    inputs=["x", "delta", "weight", "bias"],
    outputs=["total", "normed"],
    header=_HEADER,
    source=_SOURCE.replace("BIAS", _ADD_BIAS),
)


def add_norm_metal(
    x: mx.array,
    delta: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    eps: float,
    centred: bool,
) -> tuple[mx.array, mx.array]:
    """The same contract as add_norm_reference, within `fits`; without a gradient."""
    D = x.shape[-1]
    threads = min(THREADS, -(-D // 128) * 32)  # four numbers each, where they suffice
    kernel, more = (_KERNEL, []) if bias is None else (_KERNEL_WITH_BIAS, [bias])
    total, normed = kernel(
        [x, delta, weight, *more],
        template=[
            ("T", x.dtype), ("D", D), ("THREADS", threads), ("CENTRED", centred),
            ("IN_REGISTERS", IN_REGISTERS), ("EPS", bits_of(eps)),
        ],
        grid=(threads, x.size // D, 1),
        threadgroup=(threads, 1, 1),
        shapes=[x.shape, x.shape],
        dtypes=[x.dtype, x.dtype],
    )  # fmt: skip
    return total, normed


@cache
def _trainable(eps: float, centred: bool) -> Any:
    """The kernel with the definition's gradient."""

    def forwards(x: mx.array, delta: mx.array, weight: mx.array, *bias: mx.array):
        return add_norm_metal(x, delta, weight, bias[0] if bias else None, eps, centred)

    run: Any = mx.custom_function(forwards)

    @run.vjp
    def backwards(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        def norm(total: mx.array, weight: mx.array, *bias: mx.array) -> list[mx.array]:
            given = bias[0] if bias else None
            return [_normed(total, weight, given, eps, centred)]

        inputs = [outputs[0], *primals[2:]]
        _, (to_total, *others) = mx.vjp(norm, inputs, [cotangents[1]])
        to_total = to_total + cotangents[0]
        return [to_total, to_total, *others]

    return run


def fits(x: mx.array, delta: mx.array, weight: mx.array, bias: mx.array | None) -> bool:
    """Whether the kernel can: one type of float, and whole rows."""
    arrays = [x, delta, weight] + ([] if bias is None else [bias])
    return (
        x.dtype in FLOATS
        and all(array.dtype == x.dtype for array in arrays)
        and x.shape == delta.shape
        and x.size > 0
        and all(array.shape == x.shape[-1:] for array in arrays[2:])
    )


def add_norm(
    x: mx.array, delta: mx.array, norm: Any, *, trainable: bool = False
) -> tuple[mx.array, mx.array]:
    """x + delta and norm(x + delta), by the kernel where it applies.

    norm: any module; the kernel does nn.RMSNorm and nn.LayerNorm. trainable: with a
    gradient.
    """
    centred = type(norm) is nn.LayerNorm
    known = centred or type(norm) is nn.RMSNorm
    if known and "weight" in norm and chosen("add_norm"):
        weight, bias = norm.weight, norm.get("bias")
        if fits(x, delta, weight, bias):
            if not trainable:
                return add_norm_metal(x, delta, weight, bias, norm.eps, centred)
            given = (weight,) if bias is None else (weight, bias)
            return _trainable(norm.eps, centred)(x, delta, *given)
    total = x + delta
    return total, norm(total)
