"""Pairs stacked to answer: the numbers of training's way, in fewer launches."""

import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from small import DENSE, random_array, small_model

from helpers import assert_close, assert_equal
from mm1_mlx.adapters.folder import adapted_layers
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack, PairSettings, Rows
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.models.moe import QuantizedStack

LORA = PairSettings(rank=4, scale=2.0)
DORA = PairSettings(rank=4, scale=2.0, dora=True)
QKV = [Rows("q_proj", 0, 32), Rows("k_proj", 32, 48), Rows("v_proj", 48, 64)]
CHOICES = [("q_proj", "k_proj", "v_proj"), ("v_proj", "q_proj"), ("k_proj",)]


def filled(layer, names):
    """The layer with pairs that add something."""
    for k, name in enumerate(names):
        layer.add_pair(name, mx.random.key(k))
        pair = layer.pairs[name]
        pair.lora_b = mx.random.normal(pair.lora_b.shape, key=mx.random.key(50 + k))
        if "m" in pair:
            pair.m = pair.m * 1.1
    return layer


def linear(settings, bits=None, names=CHOICES[0], bias=True):
    base = nn.Linear(64, 64, bias=bias)
    if bits:
        base = nn.QuantizedLinear.from_linear(base, 32, bits)
    return filled(AdaptedLinear(base, QKV, settings), names)


def unstacked(layer, *inputs):
    """What a layer gives the way that training takes."""
    layer.unstack()
    call = layer.gather if isinstance(layer, AdaptedStack) else layer
    return call(*inputs)


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 8], ids=["plain", "packed"])
@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_stacked_pairs_give_the_same(settings, bits, names):
    layer = linear(settings, bits, names)
    layer.eval()
    assert layer.stacked() is not None
    for shape in ((2, 3, 64), (1, 1, 64), (64,)):
        x = random_array(*shape)
        actual = layer(x)
        # Sums of 64 products of size 1, in another order.
        assert_close(actual, unstacked(layer, x), atol=3e-5)
        layer.stack()


def test_ranks_may_differ():
    layer = linear(LORA)
    for k, pair in enumerate(layer.pairs.values()):
        pair.lora_a, pair.lora_b = pair.lora_a[:, : 4 - k], pair.lora_b[: 4 - k]
    layer.eval()
    x = random_array(5, 64)
    wanted = x @ layer.merged().T + layer.base.bias
    assert_close(layer(x), wanted, atol=3e-5)


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_stacked_pairs_of_experts_give_the_same(settings, packed, names):
    stack = random_array(4, 64, 64) / 8
    base = QuantizedStack(stack, 32, 8) if packed else stack
    layer = filled(AdaptedStack(base, QKV, settings), names)
    layer.eval()
    indices = mx.array([0, 1, 1, 3, 2], mx.uint32)
    x = random_array(5, 1, 64)
    actual = layer.gather(x, indices, False)
    assert layer.stacked() is not None
    assert_close(actual, unstacked(layer, x, indices, False), atol=3e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_in_16_bits_the_pairs_stay_in_32(dtype):
    layer = linear(LORA, bias=False)
    layer.base.set_dtype(dtype)
    layer.eval()
    x = random_array(3, 64).astype(dtype)
    actual = layer(x)
    assert actual.dtype == dtype and layer.stacked().b.dtype == mx.float32
    # Both round the same float32 sums, whose last bits differ, to 8 or 11 bits.
    rounding = 2**-7 if dtype == mx.bfloat16 else 2**-10
    wanted = unstacked(layer, x)
    assert_close(actual, wanted, atol=rounding * float(mx.abs(wanted).max()))


def test_what_was_stacked_holds_only_as_long_as_its_pairs():
    layer = linear(LORA)
    layer.eval()
    x = random_array(3, 64)
    before = layer(x)
    layer.pairs["k_proj"].lora_b = layer.pairs["k_proj"].lora_b * 2
    assert layer.stacked() is None
    changed = layer(x)
    assert not mx.allclose(changed, before, atol=1e-2)
    layer.eval()  # stacks what is there now
    assert layer.stacked() is not None
    assert_close(layer(x), changed, atol=3e-5)
    layer.update({"pairs": {"q_proj": {"lora_a": mx.zeros((64, 4))}}})
    assert layer.stacked() is None
    del layer.pairs["k_proj"]
    assert_equal(layer(x)[:, :48], layer.base(x)[:, :48])


def test_dora_follows_its_frozen_weight():
    layer = linear(DORA)
    layer.eval()
    x = random_array(3, 64)
    layer.base.weight = layer.base.weight * 3
    assert layer.stacked() is None
    assert_close(layer(x), unstacked(layer, x), atol=0)


def test_row_scales_outlive_the_stack(monkeypatch):
    """A switch would else read every weight."""
    layer, x = linear(DORA), random_array(3, 64)
    calls, compute = [], AdaptedLinear.row_scales
    monkeypatch.setattr(
        AdaptedLinear, "row_scales", lambda self: calls.append(1) or compute(self)
    )
    layer.eval()
    before = layer(x)
    layer.unstack()
    layer.stack()
    assert_equal(layer(x), before)
    assert len(calls) == 1
    layer.pairs["q_proj"].m = layer.pairs["q_proj"].m * 2
    layer.stack()
    assert not mx.allclose(layer(x), before)
    assert len(calls) == 2
    layer.train()
    layer.eval()
    assert len(calls) == 3


def test_training_never_sees_the_stack():
    layer = linear(LORA)
    x = random_array(3, 64)
    before = layer(x)
    layer.eval()
    layer(x)
    layer.train()
    assert layer._stacked is None
    layer.stack()
    assert layer.stacked() is None  # kept, but for eval only
    assert_equal(layer(x), before)  # bit for bit


def test_gradients_of_pairs_in_eval():
    layer = linear(LORA)
    layer.freeze()
    for pair in layer.pairs.values():
        pair.unfreeze()
    x = random_array(3, 64)

    def loss(module, x):
        return mx.square(module(x)).mean()

    _, wanted = nn.value_and_grad(layer, loss)(layer, x)
    layer.eval()
    _, actual = nn.value_and_grad(layer, loss)(layer, x)
    for name in layer.pairs:
        for half in ("lora_a", "lora_b"):
            grad = actual["pairs"][name][half]
            assert_equal(grad, wanted["pairs"][name][half])
            assert float(mx.abs(grad).max()) > 0
    assert layer.stacked() is None  # MLX has put arrays of its own there
    layer.eval()
    assert layer.stacked() is not None
    of_x = mx.grad(lambda x: loss(layer, x))(x)  # through what is stacked
    layer.unstack()
    assert_close(of_x, mx.grad(lambda x: loss(layer, x))(x), atol=1e-5)


_VIEWS = {
    "AsStrided",
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
}


def launches(model, tmp_path) -> int:
    """Operations of a decoding step that compute something."""
    mx.eval(model.parameters())
    cache = model.make_cache()
    model.decoder(mx.array([[1, 2, 3]]), cache)
    mx.eval([entry.state for entry in cache])
    path = tmp_path / "step.dot"
    mx.export_to_dot(str(path), model.decoder(mx.array([[4]]), cache))
    names = re.findall(r'label ?="?(\w+)"?, shape=rectangle', path.read_text())
    assert names
    return sum(n for name, n in Counter(names).items() if name not in _VIEWS)


@pytest.mark.parametrize("settings, more", [(LORA, 2), (DORA, 3)], ids=["lora", "dora"])
def test_launches_of_a_token(settings, more, tmp_path):
    """Per adapted weight: A, then B added in the same launch; DoRA's factor, after
    which the residual can only be added on its own, twice a layer."""
    base = launches(small_model(DENSE), tmp_path)
    model = small_model(DENSE)
    targets = {part: Target(pairs=settings) for part in ("attention", "mlp")}
    adapt(model, Plan(parts=targets))
    model.eval()
    count = len(adapted_layers(model))
    assert count == 4 * DENSE.num_hidden_layers
    alone = 2 * DENSE.num_hidden_layers if settings.dora else 0
    assert launches(model, tmp_path) == base + more * count + alone
    for layer in adapted_layers(model).values():
        layer.unstack()
    assert launches(model, tmp_path) > base + (more + 3) * count
