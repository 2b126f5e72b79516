"""How arrays lie in memory on MLX's Metal back end, and so which of its views copy.

MLX 0.32 decides by an array's strides whether an operation can read it as it is. The
rules here are those of mlx/backend/common/{common,slicing,utils}.cpp; tests hold the
strides of views equal to those that MLX gives on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """An array without its numbers.

    strides: in elements. data_size: elements of the memory that it looks at.
    contiguous: whether it looks at all of them.
    """

    shape: Shape
    itemsize: int
    strides: Shape
    data_size: int
    contiguous: bool = True
    row_contiguous: bool = True
    col_contiguous: bool = False

    @property
    def size(self) -> int:
        """How many numbers; what is repeated counts each time."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What reading it moves: what is repeated counts once."""
        return min(self.size, self.data_size) * self.itemsize


def natural(shape: Sequence[int]) -> Shape:
    """Strides of an array that was just made."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def fresh(shape: Sequence[int], itemsize: int) -> Layout:
    """An array that an operation has just made, row by row."""
    shape = tuple(shape)
    vector = sum(size != 1 for size in shape) <= 1
    return Layout(shape, itemsize, natural(shape), prod(shape), col_contiguous=vector)


def _order(shape: Shape, strides: Shape) -> tuple[int, bool, bool]:
    """Elements without repetition, row contiguous, column contiguous."""
    size = forward = backward = 1
    rows = columns = True
    for i in range(len(shape)):
        j = len(shape) - 1 - i
        columns &= strides[i] == forward or shape[i] == 1
        rows &= strides[j] == backward or shape[j] == 1
        forward *= shape[i]
        backward *= shape[j]
        size *= shape[i] if strides[i] > 0 else 1
    return size, rows, columns


def transposed(x: Layout, axes: Sequence[int]) -> Layout:
    """x with its axes in another order."""
    shape = tuple(x.shape[axis] for axis in axes)
    strides = tuple(x.strides[axis] for axis in axes)
    out = replace(x, shape=shape, strides=strides)
    if not x.contiguous or x.data_size != x.size:
        return out
    _, rows, columns = _order(shape, strides)
    return replace(out, row_contiguous=rows, col_contiguous=columns)


def sliced(x: Layout, shape: Shape, steps: Sequence[int]) -> Layout:
    """A part of x, every so many numbers of each axis."""
    strides = tuple(s * step for s, step in zip(x.strides, steps, strict=True))
    ends = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    reach = sum(abs(end) for end in ends) + 1
    size, rows, columns = _order(shape, strides)
    return replace(
        x,
        shape=shape,
        strides=strides,
        data_size=reach,
        contiguous=size == reach,
        row_contiguous=rows,
        col_contiguous=columns,
    )


def split(x: Layout, shape: Shape) -> Layout:
    """A part of x along an axis."""
    size, rows, columns = _order(shape, x.strides)
    contiguous = x.contiguous
    if size == 1:
        contiguous = True
    elif size != x.data_size:
        contiguous = contiguous and (rows or columns)
    return replace(
        x,
        shape=shape,
        data_size=size,
        contiguous=contiguous,
        row_contiguous=rows,
        col_contiguous=columns,
    )


def expanded(x: Layout, shape: Shape, axes: Sequence[int]) -> Layout:
    """x with more axes, of one."""
    strides = list(x.strides)
    for axis in axes:
        strides.insert(axis, 1)
    return replace(x, shape=shape, strides=tuple(strides))


def squeezed(x: Layout, shape: Shape, axes: Sequence[int]) -> Layout:
    """x with fewer axes, of one."""
    strides = tuple(s for i, s in enumerate(x.strides) if i not in set(axes))
    return replace(x, shape=shape, strides=strides)


def broadcast(x: Layout, shape: Shape) -> Layout:
    """x repeated along axes, without a copy."""
    strides = [0] * len(shape)
    for i in range(1, len(x.shape) + 1):
        strides[-i] = x.strides[-i] if x.shape[-i] == shape[-i] else 0
        if x.shape[-i] == 1 and shape[-i] == 1:
            strides[-i] = x.strides[-i]
    same = prod(shape) == x.size
    return replace(
        x,
        shape=shape,
        strides=tuple(strides),
        row_contiguous=x.row_contiguous and same,
        col_contiguous=x.col_contiguous and same,
    )


def _collapsed(x: Layout) -> tuple[list[int], list[int]]:
    shape, strides = [x.shape[0]], [x.strides[0]]
    for size, stride in zip(x.shape[1:], x.strides[1:], strict=True):
        if size == 1:
            continue
        if stride * size != strides[-1]:
            shape.append(size)
            strides.append(stride)
        else:
            shape[-1] *= size
            strides[-1] = stride
    return shape, strides


def reshaped(x: Layout, shape: Shape) -> Layout | None:
    """None where MLX must copy to reshape."""
    if x.row_contiguous or not x.size:
        vector = not shape or x.size == max(shape)
        return replace(x, shape=shape, strides=natural(shape), col_contiguous=vector)
    if not x.shape:
        return replace(x, shape=shape, strides=(0,) * len(shape))
    sizes, strides = _collapsed(x)
    out: list[int] = []
    j = 0
    for size in shape:
        if j < len(sizes) and sizes[j] % size == 0:
            sizes[j] //= size
            out.append(sizes[j] * strides[j])
            j += sizes[j] == 1
        elif size == 1:
            out.append(out[-1])
        else:
            return None
    return replace(x, shape=shape, strides=tuple(out))


def viewed(x: Layout, shape: Shape, itemsize: int) -> Layout | None:
    """The same bytes as another type; None where MLX must copy."""
    smaller = itemsize < x.itemsize and x.strides[-1] == 1
    if itemsize != x.itemsize and not smaller and not x.row_contiguous:
        return None
    strides = [s * x.itemsize // itemsize for s in x.strides[:-1]]
    return replace(
        x,
        shape=shape,
        itemsize=itemsize,
        strides=(*strides, x.strides[-1]) if x.strides else (),
        data_size=x.data_size * x.itemsize // itemsize,
    )
