"""Chains of elementwise operations that are one launch on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import mlx.core as mx

Chain = Callable[..., Any]
Replacement = Callable[[Chain, tuple[mx.array, ...]], Any]

_REPLACED: ContextVar[Replacement | None] = ContextVar("replaced", default=None)


def fused(chain: Chain) -> Chain:
    """A function of arrays made of elementwise operations alone, as one launch.

    On a GPU through mx.compile, any shapes. On the CPU back end, where that would start
    a C++ compiler, operation by operation.
    """
    compiled = mx.compile(chain, shapeless=True)

    @wraps(chain)
    def run(*arrays: mx.array) -> Any:
        if (replacement := _REPLACED.get()) is not None:
            return replacement(chain, arrays)
        return chain(*arrays) if on_cpu() else compiled(*arrays)

    return run


def tied(x: mx.array, other: mx.array) -> mx.array:
    """x as it is, made in the same launch as `other`.

    mx.compile makes one kernel of what one result is made of. Results that only share
    inputs would be a kernel each.
    """
    return mx.where(other == other, x, x)


def counting() -> bool:
    """Whether this runs inside `replaced`."""
    return _REPLACED.get() is not None


def on_cpu() -> bool:
    """Whether arrays are computed by MLX's CPU back end; not inside `replaced`."""
    return _REPLACED.get() is None and mx.default_device().type == mx.cpu


@contextmanager
def replaced(replacement: Replacement) -> Iterator[None]:
    """Call replacement(chain, arrays) in place of every fused chain: to count what a
    GPU would do."""
    token = _REPLACED.set(replacement)
    try:
        yield
    finally:
        _REPLACED.reset(token)
