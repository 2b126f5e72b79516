"""How the samples make their kernels."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

Size = tuple[int, int, int]


def run(
    name: str,
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[Sequence[int], mx.Dtype]],
    *,
    grid: Size,
    threadgroup: Size,
    header: str = "",
    template: Sequence[tuple[str, Any]] = (),
    init_value: float | None = None,
    **settings: Any,
) -> list[mx.array]:
    """Make a kernel and call it. outputs: shape and dtype by name."""
    kernel: Any = mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        **settings,
    )
    return kernel(
        inputs=list(inputs.values()),
        template=list(template),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[tuple(shape) for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        init_value=init_value,
    )


def groups(size: int, of: int) -> int:
    """Threads for ceil(size / of) whole threadgroups of `of`: a grid counts threads."""
    return -(-size // of) * of
