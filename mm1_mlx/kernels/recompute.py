"""Functions whose inner results are computed again for the gradient, not kept.

A training step keeps whatever a gradient needs from its forward pass to its backward
pass, of all layers at once. What is cheap to make again (a norm, an activation, the
weights of an attention) need not be among it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Function = Callable[..., mx.array]


def recomputed(fn: Function, *modules: nn.Module, rows: int = 0) -> Function:
    """The same function of arrays, which keeps nothing but its inputs.

    modules: those that fn uses and that may have trainable weights; their gradients
    come out as usual. fn may use other arrays, too, but no gradient goes to them. rows:
    fn maps (T, in) to (T, out), each row alone, and so many are made at a time; 0: all.

    For the gradient fn is computed again, without its last operation where only that
    would need it: MLX is lazy, so a closing matmul is not repeated. The gradient of the
    first input is made after the others: it is what the layers before wait for, and
    until all are made what they are made of cannot be freed (MLX would make the
    weights' gradients of all layers at the end).
    """

    def run(*arrays: mx.array) -> mx.array:
        """fn of the arrays, with the modules' weights as arrays, too."""
        flat: list[Any] = [tree_flatten(m.trainable_parameters()) for m in modules]
        count = len(arrays)

        def whole(*every: mx.array) -> mx.array:
            _put(modules, flat, list(every[count:]))
            return fn(*every[:count])

        weights = [array for part in flat for _, array in part]
        function: Any = _by_rows(whole, rows) if rows else _at_once(whole)
        out = function(*arrays, *weights)
        _put(modules, flat, weights)
        return out

    return run


def after(arrays: Sequence[mx.array], made: Sequence[mx.array]) -> list[mx.array]:
    """The arrays, but not before others are made.

    Each alone: what is not needed is not kept for their sake.
    """
    if not made:
        return list(arrays)
    return [mx.depends([array], list(made))[0] for array in arrays]


def _at_once(whole: Function) -> Function:
    function = mx.custom_function(whole)

    @function.vjp
    def backwards(primals: Any, cotangent: mx.array, output: Any) -> Any:
        if isinstance(primals, mx.array):  # MLX gives one without its tuple
            return _gradients(whole, [primals], cotangent)[0]
        first, *others = _gradients(whole, primals, cotangent)
        return (*after([first], others), *others)

    return function  # type: ignore[return-value]


def slices(count: int, most: int) -> list[slice]:
    """All of `count` in parts of equal size, at most `most` and at least 1."""
    parts = -(-count // max(1, min(most, count)))
    size = -(-count // parts)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _by_rows(whole: Function, rows: int) -> Function:
    def forwards(x: mx.array, *others: mx.array) -> mx.array:
        outs: list[mx.array] = []
        for part in slices(x.shape[0], rows):
            (some,) = after([x[part]], outs[-1:])
            outs.append(whole(some, *others))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    function = mx.custom_function(forwards)

    @function.vjp
    def backwards(primals: Any, cotangent: mx.array, output: Any) -> Any:
        alone = isinstance(primals, mx.array)
        x, *others = [primals] if alone else primals
        firsts: list[mx.array] = []
        sums: list[mx.array] = []
        for part in slices(x.shape[0], rows):
            given = after([x[part], *others, cotangent[part]], firsts[-1:] + sums)
            first, *more = _gradients(whole, given[:-1], given[-1])
            sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
            firsts.append(first)
        grad = firsts[0] if len(firsts) == 1 else mx.concatenate(firsts)
        return grad if alone else (*after([grad], sums), *sums)

    return function  # type: ignore[return-value]


def _gradients(
    whole: Function, primals: Sequence[mx.array], cotangent: mx.array
) -> list[mx.array]:
    """Gradients of all inputs, which begin when the gradient has come this far."""
    made: Any = mx.vjp(whole, after(primals, [cotangent]), [cotangent])
    return list(made[1])


def _put(modules: tuple, flat: list[Any], weights: list[mx.array]) -> None:
    """Set the trainable weights of modules, in the order of their names."""
    rest = iter(weights)
    for module, part in zip(modules, flat, strict=True):
        module.update(tree_unflatten([(name, next(rest)) for name, _ in part]))
