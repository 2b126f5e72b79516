"""Activations of training on the CPU: equal to the definitions, finite everywhere."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from helpers import assert_close
from mm1_mlx.kernels import cpu_activations
from mm1_mlx.kernels.cpu_activations import fast_activation, rows_at_a_time
from mm1_mlx.models.layers import MLP, activation

NAMES = ["silu", "quick_gelu", "gelu_pytorch_tanh"]


@pytest.fixture(autouse=True)
def on_cpu():
    """Wherever the tests run: these are the CPU's versions."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_definition(name):
    x = mx.array(np.linspace(-30, 30, 20_001).astype(np.float32))
    fast, plain = fast_activation(name, x), activation(name)
    assert fast is not None and fast is not plain
    # float32: 4e-7 of values up to 30
    assert_close(fast(x), plain(x), atol=2e-5, rtol=1e-6)
    slopes = [mx.grad(lambda x, f=f: f(x).sum())(x) for f in (fast, plain)]
    assert_close(slopes[0], slopes[1], atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_far_from_zero_all_is_finite(name):
    x = mx.array([-1e4, -300.0, -90.0, 90.0, 300.0, 1e4])
    fast = fast_activation(name, x)
    assert_close(fast(x), mx.maximum(x, 0), atol=1e-6)
    slope = mx.grad(lambda x: fast(x).sum())(x)
    assert_close(slope, (x > 0).astype(mx.float32), atol=1e-6)


def test_what_has_no_faster_version():
    x = mx.zeros((4,))
    assert fast_activation("relu2", x) is None
    assert fast_activation("silu", x.astype(mx.float16)) is None
    assert rows_at_a_time(64, x.astype(mx.float16)) == 0
    assert rows_at_a_time(2752, x) == 285
    assert rows_at_a_time(1 << 20, x) == 64


def test_a_gpu_gets_the_definitions(monkeypatch):
    class Gpu:
        type = mx.gpu

    x = mx.zeros((4,))
    monkeypatch.setattr(cpu_activations.mx, "default_device", Gpu)
    found = fast_activation("silu", x), rows_at_a_time(64, x)
    monkeypatch.undo()
    assert found == (None, 0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [0, 5, 64])
def test_an_mlp_trains_as_it_answers(gated, normed, rows, monkeypatch):
    """In blocks of rows or whole, with a norm in front or without."""
    monkeypatch.setattr("mm1_mlx.models.layers.rows_at_a_time", lambda *_: rows)
    mx.random.seed(0)
    mlp, norm = MLP(8, 12, "silu", gated=gated, bias=True), nn.RMSNorm(8)
    x = mx.random.normal((2, 7, 8))
    into = mx.random.normal((2, 7, 8))
    before = norm if normed else None

    def run():
        def loss(parameters, x):
            mlp.update(parameters)
            return (mlp(x, before) * into).sum()

        found = mx.value_and_grad(loss, argnums=(0, 1))(mlp.parameters(), x)
        return found[0], *found[1][0]["down_proj"].values(), found[1][1]

    mlp.eval()
    expected = run()
    mlp.train()
    for mine, theirs in zip(run(), expected, strict=True):
        assert_close(mine, theirs, atol=2e-5)  # float32
