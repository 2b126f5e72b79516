"""What is computed again for the gradient: the same numbers, and less that is kept."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_close, assert_equal, peak_bytes
from mm1_mlx.kernels.recompute import recomputed, slices


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


class Block(nn.Module):
    """Rows to rows: a norm with a trained weight, a frozen matrix, an activation."""

    def __init__(self, dims=8, seed=0):
        super().__init__()
        self.norm = nn.RMSNorm(dims)
        self.linear = nn.Linear(dims, dims)
        self.linear.weight = normal(dims, dims, seed=seed)
        self.linear.freeze(keys=["weight"], recurse=False)

    def __call__(self, x):
        return self.linear(nn.silu(self.norm(x)))


def both(block, fn, x):
    """Value, gradient of x and of the trainable weights."""
    into = normal(*x.shape, seed=9)

    def loss(parameters, x):
        block.update(parameters)
        return (fn(x) * into).sum()

    value, grads = mx.value_and_grad(loss, argnums=(0, 1))(
        block.trainable_parameters(), x
    )
    return value, dict(tree_flatten(grads[0])), grads[1]


@pytest.mark.parametrize("rows", [0, 3, 5, 10, 64])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_values_and_gradients_are_the_same(rows, compiled):
    block, x = Block(), normal(10, 8, seed=1)
    expected = both(block, block, x)
    again = recomputed(block, block, rows=rows)
    function = lambda x: both(block, again, x)  # noqa: E731
    actual = (mx.compile(function) if compiled else function)(x)
    assert set(actual[1]) == {"norm.weight", "linear.bias"}
    # float32; blocks of rows change the order of sums
    assert_close(actual[0], expected[0], atol=1e-4)
    assert_close(actual[2], expected[2], atol=1e-5)
    for name, wanted in expected[1].items():
        assert_close(actual[1][name], wanted, atol=1e-5)


def test_without_trainable_weights_and_with_several_arrays():
    x, y = normal(4, 3), normal(4, 3, seed=1)
    assert_close(
        mx.grad(recomputed(lambda x: mx.sin(x)))(x[0, 0]), mx.cos(x[0, 0]), atol=1e-6
    )
    product = recomputed(lambda x, y: x * mx.exp(y))
    grads = mx.grad(lambda x, y: product(x, y).sum(), argnums=(0, 1))(x, y)
    assert_close(grads[0], mx.exp(y), atol=1e-6)
    assert_close(grads[1], x * mx.exp(y), atol=1e-6)


def test_the_module_keeps_its_own_weights():
    block, x = Block(), normal(10, 8)
    before = dict(tree_flatten(block.parameters()))
    mx.eval(mx.grad(lambda x: recomputed(block, block, rows=4)(x).sum())(x))
    after = dict(tree_flatten(block.parameters()))
    for name, array in before.items():
        assert_equal(after[name], array)


@pytest.mark.parametrize("count, size", [(7, 3), (7, 0), (7, 7), (6, 100), (1, 1)])
def test_parts_cover_all(count, size):
    parts = slices(count, size)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert max(part.stop - part.start for part in parts) <= max(size, 1)


@pytest.mark.parametrize("rows", [0, 512])
def test_less_is_kept(rows):
    """Of each of 16 layers its input alone: 1 MB in place of 4 (norm, silu, sigmoid).

    Peaks are of the backward pass, with what MLX has begun of the next operations.
    """
    blocks, x = [Block(64, seed=i) for i in range(16)], normal(4096, 64)
    for block in blocks:
        block.freeze()

    def loss(x, wrapped):
        for block in blocks:
            x = recomputed(block, block, rows=rows)(x) if wrapped else block(x)
        return x.sum()

    plain = peak_bytes(mx.grad(lambda x: loss(x, False)), x)
    again = peak_bytes(mx.grad(lambda x: loss(x, True)), x)
    assert again < 0.75 * plain


def test_weights_gradients_do_not_wait_for_those_of_all_layers():
    """The gradient of a pair's second half is made of 1 MB. MLX makes those of all 24
    layers at the end, when it is free to."""
    up = [normal(64, 256, seed=i) for i in range(24)]
    down = [normal(256, 64, seed=i) for i in range(24)]
    pairs = [(normal(64, 4, seed=i), normal(4, 256, seed=i)) for i in range(24)]
    x = normal(1024, 64)

    def product(x, a, b):
        return x @ a @ b

    def loss(pairs, add):
        y = x
        for (a, b), w, v in zip(pairs, up, down, strict=True):
            y = y + (y @ w + add(y, a, b)) @ v
        return y.sum()

    free = peak_bytes(mx.grad(lambda p: loss(p, product)), pairs)
    ordered = peak_bytes(mx.grad(lambda p: loss(p, recomputed(product))), pairs)
    assert ordered < 0.7 * free
