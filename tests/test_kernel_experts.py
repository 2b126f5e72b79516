"""Routed experts in two launches: the definition, and the kernels against it."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_inputs import experts_exactly, experts_inputs, packed
from kernel_kit import BOUND, FLOATS, share

from helpers import assert_close, assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.kernels.metal import forced, has_metal, watched
from mm1_mlx.kernels.routed_experts import (
    ACTIVATIONS,
    experts_metal,
    experts_reference,
    fits,
    routed_experts,
    unpack,
)
from mm1_mlx.models.layers import activation
from mm1_mlx.models.moe import Experts, QuantizedStack

# --- the definition ---


def test_the_definition_by_hand():
    """Two experts of one inner place: relu of a product, times a column."""
    up = mx.array([[[1.0, 0.0]], [[0.0, 2.0]]])  # (2, 1, 2)
    down = mx.array([[[1.0], [0.0]], [[10.0], [100.0]]])  # (2, 2, 1)
    x = mx.array([[3.0, 4.0], [-3.0, 1.0]])
    weights = mx.array([[0.75, 0.25], [0.5, 0.5]])
    experts = mx.array([[0, 1], [1, 0]], mx.uint32)
    found = experts_reference(x, up, down, weights, experts, "relu", False)
    # 0.75 * 3 * (1, 0) + 0.25 * 8 * (10, 100), and 0.5 * 2 * (10, 100)
    assert found.tolist() == [[22.25, 200.0], [10.0, 100.0]]


@pytest.mark.parametrize("gated", [True, False])
def test_the_definition_against_numpy(gated):
    given = experts_inputs(5, 7, 6, 4, 3, gated=gated)
    x, up, down, weights, experts = (np.array(a, np.float64) for a in given)
    expected = np.zeros_like(x)
    for t in range(4):
        for k in range(3):
            e = int(experts[t, k])
            hidden = up[e] @ x[t]
            if gated:
                gate, hidden = hidden[:6], hidden[6:]
                hidden = gate / (1 + np.exp(-gate)) * hidden
            else:
                hidden = np.maximum(hidden, 0) ** 2
            expected[t] += weights[t, k] * (down[e] @ hidden)
    act = "silu" if gated else "relu2"
    found = experts_reference(*given, act, gated)
    assert_close(found, expected, atol=1e-6)  # float32, sums of 7 products


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_the_models_own(act):
    x = mx.linspace(-6, 6, 101)
    assert_equal(ACTIVATIONS[act](x), activation(act)(x))


@pytest.mark.parametrize("how", [None, packed(4, 32)], ids=["plain", "packed"])
def test_the_models_own_experts_give_the_same(how):
    experts = Experts(6, 64, 32, "silu", gated=True)
    if how:
        settings = {**how, "mode": "affine"}
        experts.quantize({"gate_up_proj": settings, "down_proj": settings})
    x, _, _, weights, chosen = experts_inputs(6, 64, 32, 3, 2)
    stacks = experts.gate_up_proj, experts.down_proj
    found = experts_reference(x, *stacks, weights, chosen, "silu", True)
    assert_close(found, experts.routed(x, weights, chosen), atol=1e-5)


# --- kernels against definition ---

CASES = [
    # E, D, F, T, K, dtype, act, gated, up, down
    (4, 31, 5, 1, 2, mx.float32, "silu", True, None, None),
    (2, 1, 1, 2, 1, mx.float32, "relu", False, None, None),
    (8, 64, 100, 8, 8, mx.float16, "relu2", False, None, None),
    (3, 100, 36, 3, 2, mx.bfloat16, "quick_gelu", True, None, None),
    (8, 64, 96, 3, 2, mx.float32, "gelu_pytorch_tanh", True, (4, 32), (8, 32)),
    (2, 128, 256, 1, 1, mx.float16, "silu", True, (4, 64), (4, 128)),
    (4, 1024, 64, 1, 2, mx.bfloat16, "silu", True, (8, 128), (4, 64)),
    (4, 64, 64, 2, 2, mx.float32, "silu", True, (4, 64), None),
]


@needs_host
@pytest.mark.parametrize(
    "E, D, F, T, K, dtype, act, gated, up, down", CASES, ids=map(str, CASES)
)
def test_kernels(E, D, F, T, K, dtype, act, gated, up, down):
    how = {"up": up and packed(*up), "down": down and packed(*down)}
    given = experts_inputs(E, D, F, T, K, dtype, gated=gated, **how)
    assert fits(*given, act, gated)
    with host_kernels():
        found = experts_metal(*given, act, gated)
    assert found.dtype == dtype
    assert share(found, experts_exactly(given, act, gated)) < BOUND[dtype]


@needs_host
def test_an_expert_that_is_chosen_twice_and_weights_that_do_not_sum_to_1():
    x, up, down, _, _ = experts_inputs(4, 31, 5, 1, 2)
    weights, experts = mx.array([[3.0, -0.5]]), mx.array([[2, 2]], mx.uint32)
    given = [x, up, down, weights, experts]
    with host_kernels():
        found = experts_metal(*given, "silu", True)
    once = experts_reference(x, up, down, weights[:, :1], experts[:, :1], "silu", True)
    assert share(found, once * (2.5 / 3)) < BOUND[mx.float32]


# --- the chooser ---


def test_off_by_default(monkeypatch):
    given = (*experts_inputs(4, 16, 8, 1, 2), "silu", True)
    monkeypatch.setattr("mm1_mlx.kernels.metal.has_metal", lambda: True)
    monkeypatch.setattr("mm1_mlx.kernels.trial.proven", lambda name: True)
    monkeypatch.setattr("mm1_mlx.kernels.metal.user_choices", dict)
    assert routed_experts(*given) is None


@needs_host
def test_chosen():
    given = (*experts_inputs(4, 31, 5, 1, 2), "silu", True)
    with forced("routed_experts"), host_kernels(), watched() as names:
        found = routed_experts(*given)
    assert names == ["mm1_experts_up_plain", "mm1_experts_down_plain"]
    assert found is not None
    assert share(found, experts_reference(*given)) < BOUND[mx.float32]
    with forced("router"):
        assert routed_experts(*given) is None


def declined() -> list[Any]:
    usual = experts_inputs(4, 64, 32, 2, 2)
    x, up, down, weights, experts = usual
    odd = QuantizedStack(up, group_size=32, bits=4, mode="mxfp4")
    five = QuantizedStack(up, group_size=64, bits=5)
    adapted = QuantizedStack(up)
    adapted.lora_a = mx.zeros((4, 64, 2))  # more than packed weights
    act = ("silu", True)
    return [
        pytest.param((*experts_inputs(4, 64, 32, 9, 2), *act), id="9 tokens"),
        pytest.param((*usual, "gelu", True), id="erf is not in Metal"),
        pytest.param((*usual, "silu", False), id="gated after all"),
        pytest.param((x, odd, *usual[2:], *act), id="another packing"),
        pytest.param((x, five, *usual[2:], *act), id="5 bits"),
        pytest.param((x, adapted, *usual[2:], *act), id="an adapter"),
        pytest.param((x[:, :63], *usual[1:], *act), id="x too narrow"),
        pytest.param((x[None], *usual[1:], *act), id="three axes"),
        pytest.param((x, up, down[:3], *usual[3:], *act), id="fewer experts down"),
        pytest.param((x, up, down, weights[:, :1], experts, *act), id="few weights"),
        pytest.param((x, up, down, weights, experts[:1], *act), id="few experts"),
        pytest.param((x, up.astype(mx.int32), *usual[2:], *act), id="whole numbers"),
    ]


@pytest.mark.parametrize("given", declined())
def test_what_is_declined(given):
    with forced("routed_experts"), watched() as names:
        assert routed_experts(*given) is None
    assert names == []


def test_unpacking_says_the_shape():
    stack = QuantizedStack(mx.zeros((3, 10, 256)), group_size=128, bits=8)
    found = unpack(stack)
    assert found is not None and found.shape == (3, 10, 256)
    assert (found.bits, found.group_size) == (8, 128)
    assert unpack(mx.zeros((3, 4))) is None and unpack(None) is None


@pytest.mark.metal
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "E, D, F, T, K, _, act, gated, up, down", CASES, ids=map(str, CASES)
)
def test_on_a_mac(E, D, F, T, K, _, act, gated, up, down, dtype):
    assert has_metal()
    how = {"up": up and packed(*up), "down": down and packed(*down)}
    given = experts_inputs(E, D, F, T, K, dtype, gated=gated, **how)
    found = experts_metal(*given, act, gated)
    assert share(found, experts_exactly(given, act, gated)) < 2 * BOUND[dtype]
