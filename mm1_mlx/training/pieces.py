"""Evaluates a training step in pieces of bounded work.

MLX would work through the whole step at once. A Mac's display shares the GPU, and macOS
ends programs that hold it for too long (mlx issue 3267). In pieces, each of which is
waited for, memory is also free again as soon as it can be: a layer's inner states go
before those of the next are made.

A piece is one layer forwards or back, a part of the vocabulary's losses, or some of the
weights of an update. So it has OPERATIONS operations of MLX's graph at most, however
deep a model is, which a test counts. (On MLX's CPU back end attention is made in
blocks, which are more; nobody waits for a display there.) It makes BYTES at most where
micro-batches are small enough, which memory_plan predicts; MLX itself divides a piece
into command buffers.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

# Forwards a layer is 20 to 80 operations, backwards up to 400.
OPERATIONS = 1000
BYTES = 4 << 30

# Arrays of an update: each takes up to 40 operations (AdamW, clipped).
_ARRAYS = OPERATIONS // 50

# Weights after the last layer, which the loss is made of.
_LAST = ("decoder.norm.", "decoder.lm_head.")


def evaluate_step(
    ahead: dict[str, mx.array],
    back: dict[str, mx.array],
    grads: dict[str, mx.array],
    others: Any,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Evaluate what a walk made, in order; nothing is left in `ahead` and `back`.

    ahead, back: of LayerWalk. grads: gradients by the weight's name, evaluated each
    with its layer. others: what else is wanted, such as the loss. after: called after
    each evaluation.
    """
    place: dict[str, int] = {}
    for number, name in enumerate(ahead):
        place.setdefault(name.partition(" ")[0], number)
    for name in list(ahead):
        _evaluate(ahead, name)
        after()
    mx.eval(others)
    after()
    owners = {name: _owner(name, place) for name in grads}
    for name in list(back):
        reached = place[name.partition(" ")[0]]
        ready = [weight for weight, owner in owners.items() if owner > reached]
        for weight in ready:
            del owners[weight]
        _evaluate(back, name, [grads[weight] for weight in ready])
        after()
    evaluate_arrays([grads[name] for name in owners], after)


def _evaluate(
    states: dict[str, mx.array], name: str, more: list[mx.array] | None = None
) -> None:
    """Evaluate a state, and let go of it."""
    mx.eval(states.pop(name), more or [])


def _owner(name: str, place: dict[str, int]) -> int:
    """Where along the walk a weight is used first; -1: before its first state."""
    if name.startswith(_LAST):
        return place.get("loss", len(place))
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (found := place.get(".".join(parts[:count]))) is not None:
            return found
    return -1


def evaluate_arrays(tree: Any, after: Callable[[], None] = lambda: None) -> None:
    """Evaluate the arrays of a tree: BYTES / 4, _ARRAYS or one array at a time."""
    flat: Any = tree_flatten(tree)
    some, size = [], 0
    for _, array in flat:
        some.append(array)
        size += array.nbytes
        if size >= BYTES // 4 or len(some) == _ARRAYS:
            mx.eval(some)
            after()
            some, size = [], 0
    mx.eval(some)
    after()
