"""Several processes of one run (mlx.launch): what they agree on, how they end together.

All run the same commands. What one of them meets alone, a missing picture or a full
disk, must become known to the others: they would wait for its part of the next sum. So
every process comes to the same calls of this module, in the same order.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mm1_mlx.errors import MM1Error, ToldElsewhere

_TEXT = 2048  # bytes of a message that the others receive
# MLX moves whole numbers as they are; sums of floats with 0 would turn -0 into 0.
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def world() -> mx.distributed.Group:
    """All processes of this run; one, where nothing launched more."""
    return mx.distributed.init()


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return world().rank() == 0


def total(array: mx.array, group: mx.distributed.Group | None = None) -> mx.array:
    """The sum of every process's array, evaluated. Same shape and type."""
    if (group or world()).size() == 1:
        return array
    array = mx.distributed.all_sum(array, group=group, stream=mx.cpu)
    mx.eval(array)
    return array


def sums(values: list, group: mx.distributed.Group | None = None) -> list:
    """The sum of every process's numbers, one by one."""
    found: Any = total(mx.array(values), group).tolist()
    return found


def from_first(array: mx.array, group: mx.distributed.Group | None = None) -> mx.array:
    """The first process's array, to the bit; lazy. Others give one of its shape."""
    group = group or world()
    if group.size() == 1:
        return array
    if not array.ndim:  # a view needs an axis
        return from_first(array[None], group)[0]
    bits = array.view(_BITS[array.dtype.size])
    bits = bits if group.rank() == 0 else mx.zeros_like(bits)
    return mx.distributed.all_sum(bits, group=group).view(array.dtype)


def tree_from_first(tree: Any, group: mx.distributed.Group | None = None) -> Any:
    """The first process's arrays in a tree whose names and shapes are the same."""
    flat: Any = tree_flatten(tree)
    arrays = {name: from_first(array, group) for name, array in sorted(flat)}
    mx.eval(arrays)
    return tree_unflatten([(name, arrays[name]) for name, _ in flat])


def bytes_from_first(
    data: bytes | None, group: mx.distributed.Group | None = None
) -> bytes:
    """The first process's bytes; None where another process asks for them."""
    group = group or world()
    if group.size() == 1:
        assert data is not None
        return data
    data = data if data is not None and group.rank() == 0 else b""
    (length,) = sums([len(data)], group)
    given: Any = memoryview(data)
    own = mx.array(given) if data else mx.zeros((length,), mx.uint8)
    return _bytes(total(own, group)) if length else b""


def _bytes(array: Any) -> bytes:
    return bytes(memoryview(array))


def agree(error: Exception | None, group: mx.distributed.Group | None = None) -> None:
    """Nobody goes on unless all can: every process calls this with its error or None.

    Where one brought an error, the first process raises it, to be told, and the others
    raise ToldElsewhere. A single process raises its own.
    """
    group = group or world()
    if group.size() == 1 or is_lost(error):
        if error is not None:
            raise error
        return
    failed = [0] * group.size()
    failed[group.rank()] = int(error is not None)
    failed = sums(failed, group)
    if not any(failed):
        return
    text = _text_of(failed.index(1), error, group)
    raised: Exception = ToldElsewhere(text)
    if group.rank() == 0:
        raised = error or MM1Error(text)
    raised.agreed = True  # type: ignore[attr-defined]  # see cli.run
    raise raised from (error if error is not raised else None)


def _text_of(culprit: int, error: Exception | None, group: mx.distributed.Group) -> str:
    """What is told of the error of one process: its text, and where it was met."""
    own = b""
    if group.rank() == culprit:
        text = " ".join(str(error).split())
        if not isinstance(error, MM1Error):
            text = f"{type(error).__name__}: {text}"
        where = f"process {culprit + 1} of {group.size()} ({platform.node()}): "
        own = f"{where if culprit else ''}{text}".encode()[:_TEXT]
    letters = mx.array([*own, *[0] * (_TEXT - len(own))], mx.uint8)
    return _bytes(total(letters, group)).rstrip(b"\0").decode(errors="replace")


@contextmanager
def together(group: mx.distributed.Group | None = None) -> Iterator[None]:
    """All processes leave this block, or none does: see `agree`.

    The block itself holds nothing that waits for another process.
    """
    error = None
    try:
        yield
    except Exception as met:
        if (group or world()).size() == 1:
            raise
        error = met
    agree(error, group)


def meet(group: mx.distributed.Group | None = None) -> None:
    """Wait for the others, if they are still there.

    mlx.launch ends all processes when one has ended with an error, so nobody may leave
    while another writes or tells.
    """
    with suppress(RuntimeError):
        sums([0], group)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone."""
    tags = ("[ring]", "[jaccl]")  # MLX's back ends
    return isinstance(error, RuntimeError) and str(error).startswith(tags)
