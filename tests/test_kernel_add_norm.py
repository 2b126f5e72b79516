"""Residual sum and norm in one launch: against MLX's own two."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_inputs import NEAR, norm_inputs
from kernel_kit import FLOATS, share

from helpers import assert_close, assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.kernels.add_norm import add_norm, add_norm_metal, add_norm_reference, fits
from mm1_mlx.kernels.metal import forced, has_metal, watched

KINDS = {"rms": (False, False), "layer": (True, False), "layer with bias": (True, True)}


def assert_same(found: Any, expected: Any, dtype: mx.Dtype) -> None:
    assert_equal(found[0], expected[0])
    assert found[1].dtype == dtype
    assert share(found[1], expected[1]) < NEAR[dtype]


# --- the definition ---


def test_the_definition_by_hand():
    x, delta = mx.array([[1.0, 2.0, 3.0]]), mx.array([[2.0, -2.0, 0.0]])
    one, weight = mx.ones(3), mx.array([1.0, 2.0, 0.5])
    total, normed = add_norm_reference(x, delta, weight, None, 0.0, False)
    assert total.tolist() == [[3.0, 0.0, 3.0]]
    root = 6**0.5  # of the mean of 9, 0, 9
    assert_close(normed, [[3 / root, 0.0, 1.5 / root]], atol=1e-6)
    total, normed = add_norm_reference(x, delta, one, weight, 0.0, True)
    root = 2**0.5  # mean 2, differences 1, -2, 1
    assert_close(normed, [[1 / root + 1, -2 / root + 2, 1 / root + 0.5]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_against_numpy(kind):
    centred, has_bias = KINDS[kind]
    given = norm_inputs((4, 33), bias=has_bias)
    found = add_norm_reference(*given, 1e-5, centred)
    x, delta, weight, bias = (None if a is None else np.array(a) for a in given)
    total = x + delta
    from_mean = total - total.mean(axis=-1, keepdims=True) if centred else total
    square = (from_mean.astype(np.float64) ** 2).mean(axis=-1, keepdims=True)
    expected = from_mean / np.sqrt(square + 1e-5) * weight
    assert_equal(found[0], total)
    assert_close(found[1], expected if bias is None else expected + bias, atol=1e-5)


# --- kernel against definition ---

CASES = [
    ("rms", (2, 1), mx.float32),
    ("layer", (3, 31), mx.float16),
    ("layer with bias", (2, 3, 64), mx.bfloat16),
    ("rms", (1, 100), mx.bfloat16),
    ("layer with bias", (7, 100), mx.float32),
    ("rms", (2, 4096), mx.float16),
    ("layer", (2, 4096), mx.float32),
    ("rms", (1, 5000), mx.float32),
    # Wider than what threads keep: read again.
    ("layer with bias", (2, 16500), mx.bfloat16),
    ("rms", (1, 16500), mx.float32),
]


@needs_host
@pytest.mark.parametrize("kind, shape, dtype", CASES, ids=map(str, CASES))
def test_kernel(kind, shape, dtype):
    centred, has_bias = KINDS[kind]
    given = norm_inputs(shape, dtype, has_bias)
    with host_kernels():
        found = add_norm_metal(*given, 1e-5, centred)
    assert_same(found, add_norm_reference(*given, 1e-5, centred), dtype)


@needs_host
def test_a_row_of_zeros_and_one_far_from_zero():
    """eps alone is under the root; and a mean that is large beside the spread."""
    row = mx.random.normal((1, 100))
    x = mx.concatenate([mx.zeros((1, 100)), 1000 + row])
    given = (x, mx.zeros_like(x), mx.ones(100), mx.zeros(100))
    with host_kernels():
        found = add_norm_metal(*given, 1e-5, True)
    assert found[1][0].tolist() == [0.0] * 100
    expected = add_norm_reference(*given, 1e-5, True)
    # 1000 has 2^-14 below its last bit, and a mean of hundred such is no better.
    assert_close(found[1], expected[1], atol=1e-3)


@needs_host
@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind):
    """The definition's, of both results and to all inputs."""
    centred, has_bias = KINDS[kind]
    module = nn.LayerNorm(100, bias=has_bias) if centred else nn.RMSNorm(100)
    x, delta, weight, bias = norm_inputs((7, 100), bias=has_bias)
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})

    def loss(x, delta, weights):
        module.update(weights)
        total, normed = add_norm(x, delta, module, trainable=True)
        return (mx.sin(total) * normed).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2))
    with forced("add_norm"), host_kernels(), watched() as names:
        found = gradient(x, delta, weights)
        mx.eval(found)
    assert names
    with forced():
        expected = gradient(x, delta, weights)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert share(a, b) < 1e-5
    for name in weights:
        assert share(found[2][name], expected[2][name]) < 1e-5


# --- the chooser ---


@needs_host
@pytest.mark.parametrize("kind", KINDS)
def test_chosen(kind):
    centred, has_bias = KINDS[kind]
    module = nn.LayerNorm(100, bias=has_bias) if centred else nn.RMSNorm(100)
    module.weight = mx.random.normal((100,))
    x, delta, *_ = norm_inputs((7, 100))
    with forced("add_norm"), host_kernels(), watched() as names:
        found = add_norm(x, delta, module)
    assert names == ["mm1_add_norm_bias" if has_bias else "mm1_add_norm"]
    with forced(), watched() as names:
        expected = add_norm(x, delta, module)
    assert names == []
    assert_same(found, expected, mx.float32)


def test_what_is_declined():
    x, delta, weight, _ = norm_inputs((2, 3, 8))
    half = weight.astype(mx.float16)
    assert fits(x, delta, weight, weight)
    assert not fits(x, delta, half, None)
    assert not fits(x, delta, weight, half)
    assert not fits(x, delta.astype(mx.float16), weight, None)
    assert not fits(x, delta[:1], weight, None)
    assert not fits(x, delta, weight[:1], None)
    assert not fits(x[:0], delta[:0], weight, None)
    whole = x.astype(mx.int32)
    assert not fits(whole, whole, whole[0, 0], None)

    class Own(nn.RMSNorm):
        """Another norm under a known one's name would be a wrong number."""

        def __call__(self, x):
            return super().__call__(x) * 2

    modules = [Own(8), nn.LayerNorm(8, affine=False), nn.GroupNorm(1, 8), nn.RMSNorm(8)]
    modules[-1].weight = half  # mixed types
    for module in modules:
        with forced("add_norm"), watched() as names:
            found = add_norm(x, delta, module)
        assert names == []
        assert_equal(found[0], x + delta)
        assert_equal(found[1], module(x + delta))


@pytest.mark.metal
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 31, 64, 100, 3072, 4096, 16500, 40000])
def test_on_a_mac(width, kind, dtype):
    assert has_metal()
    centred, has_bias = KINDS[kind]
    given = norm_inputs((3, width), dtype, has_bias)
    found = add_norm_metal(*given, 1e-5, centred)
    expected = add_norm_reference(*given, 1e-5, centred)
    assert_equal(found[0], expected[0])
    assert share(found[1], expected[1]) < 4 * NEAR[dtype]
