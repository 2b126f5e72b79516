"""What the tests of Metal kernels share."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mm1_mlx import kernels
from mm1_mlx.kernels.metal import MetalKernel

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
# Of a result, as a share of the largest: one rounding to the type and one half way off,
# and what float32 loses in sums of a few thousand products in another order.
BOUND = {mx.float32: 5e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}


def our_kernels() -> Iterator[MetalKernel]:
    """Those that stand in a module of the kernels, alone or in a list."""
    for module in pkgutil.iter_modules(kernels.__path__):
        named = vars(importlib.import_module(f"mm1_mlx.kernels.{module.name}"))
        for value in named.values():
            every = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in every if isinstance(each, MetalKernel))


def wide(tree: Any) -> Any:
    """Arrays of floats in float32, others as they are."""
    if isinstance(tree, list | tuple):
        return type(tree)(wide(x) for x in tree)
    is_float = isinstance(tree, mx.array) and mx.issubdtype(tree.dtype, mx.floating)
    return tree.astype(mx.float32) if is_float else tree


def share(found: mx.array, expected: mx.array) -> float:
    """The largest difference, as a share of the largest expected value."""
    assert found.shape == expected.shape
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    difference: Any = mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-30)
    return difference.item()
