"""One row times a wide matrix, on MLX's CPU back end.

OpenBLAS copies a matrix before it multiplies, and of a wide one so much at a time that
the copy has left the processor's cache when it is read. Weights that stand in one
matrix for a GPU's sake (q, k and v; gate and up) would cost more here than apart. In
parts of 1024 rows, float32, 2 cores of x86-64: 3072 x 1024 takes 1.6 ms in place of
1.9, 5504 x 1024 takes 3.0 in place of 4.0. On a GPU the definition is used.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.fused import on_cpu

_ROWS = 1024  # of a part: 4 MB at a width of 1024


def linear_reference(linear: Any, x: mx.array) -> mx.array:
    """linear(x). (..., in) -> (..., out)."""
    return linear(x)


def linear_cpu(linear: nn.Linear, x: mx.array) -> mx.array:
    """The same contract for a plain nn.Linear without a bias."""
    weight = linear.weight
    starts = range(0, weight.shape[0], _ROWS)
    parts = [x @ weight[start : start + _ROWS].T for start in starts]
    return mx.concatenate(parts, axis=-1)


def fits(linear: Any, x: mx.array) -> bool:
    """Whether it gains: a single row, and a plain matrix that is wide, in float32."""
    return (
        x.size == x.shape[-1]
        and type(linear) is nn.Linear
        and "bias" not in linear
        and x.dtype == linear.weight.dtype == mx.float32
        and linear.weight.shape[0] >= 2 * _ROWS
    )


def linear(layer: Any, x: mx.array) -> mx.array:
    """layer(x), in parts where that is faster."""
    if on_cpu() and fits(layer, x):
        return linear_cpu(layer, x)
    return linear_reference(layer, x)
