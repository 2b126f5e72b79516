"""A training step's walk through the layers: what is kept, and where it may pause."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

# What a layer gives beside its state: (logits, experts) of a router.
Routed = list[tuple[mx.array, mx.array]]


class LayerWalk:
    """One walk through the layers of a model, forwards and back.

    recompute: what a layer makes inside is made again on the way back instead of being
    kept (gradient checkpointing, arXiv 1604.06174).

    ahead: the state after each layer, by name, in order. back: the gradients of these
    states, from the last; they come while MLX takes the gradients. Nothing of it is
    evaluated yet. Evaluated one by one they bound the work that is done at once, and a
    layer's memory is free again before the next one needs its own.
    """

    def __init__(self, recompute: bool = False):
        self.recompute = recompute
        self.ahead: dict[str, mx.array] = {}
        self.back: dict[str, mx.array] = {}

    def through(
        self,
        name: str,
        layer: nn.Module,
        x: mx.array,
        run: Callable[[mx.array, Routed], mx.array],
        routed: Routed | None = None,
    ) -> mx.array:
        """The state after a layer.

        run: the state and a list, which receives what the layer's router gives, to the
        next state. routed: where that goes.
        """
        found: Routed = []
        x = _recomputed(layer, run, x, found) if self.recompute else run(x, found)
        if routed is not None:
            routed.extend(found)
        return self.mark(name, x)

    def mark(self, name: str, x: mx.array) -> mx.array:
        """Remember a state, and its gradient when there will be one.

        A layer that is gone through again is remembered as "name 2", "name 3".
        """
        if uses := sum(known.partition(" ")[0] == name for known in self.ahead):
            name = f"{name} {uses + 1}"

        @mx.custom_function
        def same(x: mx.array) -> mx.array:
            return x

        @same.vjp
        def _(primals, cotangent, outputs):
            self.back[name] = cotangent
            return cotangent

        x = same(x)  # type: ignore[assignment]
        self.ahead[name] = x
        return x


def _recomputed(
    layer: nn.Module,
    run: Callable[[mx.array, Routed], mx.array],
    x: mx.array,
    found: Routed,
) -> mx.array:
    """run(x, found), which is run again when the gradients are taken."""
    flat: list = tree_flatten(layer.trainable_parameters())  # type: ignore[assignment]
    names = [name for name, _ in flat]

    def again(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        layer.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        own: Routed = []
        try:
            y = run(x, own)
        finally:
            layer.update(tree_unflatten(flat))
        return [y, *(array for pair in own for array in pair)]

    y, *rest = mx.checkpoint(again)(x, *(array for _, array in flat))
    found.extend(zip(rest[::2], rest[1::2], strict=True))
    return y
