"""The GPU against the CPU: the same work on both, whole arrays.

Each test runs twice. Marked `metal`, it compares an Apple GPU, in the type under test,
with the CPU in float32 (from the same weights, rounded to that type). Unmarked, both
devices are the CPU: no kernel is tested then, but this file's own logic is, and each
bound must hold for the CPU's 16-bit arithmetic, which rounds more often than Metal's.

Bounds are shares of the largest expected value: `ROUNDINGS` roundings to the type under
test, which are 2^-24 in float32, 2^-11 in float16 and 2^-8 in bfloat16, and 2e-5 for
what float32 loses inside: sums of a few hundred products in another order, fast exp.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import CONNECTOR, DENSE, LLAMA3, SPARSE, VISION, random_array, small_decoder

from helpers import ROOT, assert_close, assert_equal, need_tiny, to_numpy
from mm1_mlx.config import ConnectorConfig
from mm1_mlx.kernels.quantized_attention import attend_quantized
from mm1_mlx.models.cache import KVCache, QuantizedKVCache
from mm1_mlx.models.connector import depthwise_conv3x3, make_connector
from mm1_mlx.models.layers import Attention, RotaryEmbedding, attend
from mm1_mlx.models.moe import MoE
from mm1_mlx.models.router import top_k
from mm1_mlx.models.vision import VisionEncoder

PAIRS = [
    pytest.param((mx.cpu, mx.cpu), id="here"),
    pytest.param((mx.gpu, mx.cpu), id="metal", marks=pytest.mark.metal),
]
both = pytest.mark.parametrize("devices", PAIRS)

TYPES = [mx.float32, mx.float16, mx.bfloat16]
in_types = pytest.mark.parametrize("dtype", TYPES, ids=str)
ROUNDINGS = 6  # inputs, two or three products, their sum, the result
ROUNDING = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}


@contextmanager
def running_on(device: Any) -> Iterator[None]:
    """The default device, which models ask for their fast paths, and its stream."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


def on(device: Any, work: Callable[[], Any]) -> Any:
    """What `work` gives on a device, evaluated there."""
    with running_on(device):
        found = work()
        mx.eval(found)
    return found


def bound(dtype: mx.Dtype) -> float:
    return ROUNDINGS * ROUNDING[dtype] + 2e-5


def assert_near(found: Any, expected: Any, share: float, what: str = "arrays") -> None:
    """Equal within a share of the largest expected value."""
    largest = float(np.abs(to_numpy(expected)).max())
    assert_close(found, expected, atol=share * largest, what=what)


def made(make: Callable[[], Any], dtype: mx.Dtype) -> tuple[Any, Any]:
    """A module in a type, and the same (rounded) weights in float32; made on the CPU,
    since random numbers need not be the same to the last bit everywhere."""

    def modules():
        mx.random.seed(0)
        module, exact = make(), make()
        module.set_dtype(dtype)
        exact.update(module.parameters())
        exact.set_dtype(mx.float32)
        for each in (module, exact):
            each.eval()
        return module, exact

    with running_on(mx.cpu):
        module, exact = modules()
        mx.eval(module.parameters(), exact.parameters())
    return module, exact


def rounded(dtype: mx.Dtype, *shape: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Random numbers in a type, and the same numbers in float32."""
    with running_on(mx.cpu):
        x = random_array(*shape, seed=seed).astype(dtype)
        exact = x.astype(mx.float32)
        mx.eval(x, exact)
    return x, exact


def compare(devices, dtype, make, inputs, share, call=lambda module, x: module(x)):
    """A module on the first device in `dtype` against the second in float32."""
    module, exact = made(make, dtype)
    x, x_exact = inputs
    found = on(devices[0], lambda: call(module, x))
    expected = on(devices[1], lambda: call(exact, x_exact))
    assert found.dtype == dtype
    assert_near(found, expected, share)


def test_a_difference_is_seen():
    """The comparison itself: off by more than the bound fails, by less does not."""
    expected = mx.array([100.0, 1.0])
    assert_near(expected + 0.09, expected, 1e-3)
    with pytest.raises(pytest.fail.Exception, match="largest difference"):
        assert_near(expected + 0.11, expected, 1e-3)
    before = mx.default_device()
    with pytest.raises(KeyError), running_on(mx.cpu):
        raise KeyError
    assert mx.default_device() == before


def test_float32_is_float32_here():
    """An M5 (and CUDA) multiplies float32 in 10 bits of mantissa unless told not to."""
    assert os.environ["MLX_ENABLE_TF32"] == "0"


# --- Experts -----------------------------------------------------------------------


@both
@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_with_ties(devices, k):
    values = np.random.default_rng(0).integers(-3, 4, (500, 16)).astype(np.float32)
    expected = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    for device in devices:
        assert_equal(on(device, lambda: top_k(mx.array(values), k)), expected)


@both
def test_top_k_of_zeros_and_infinities(devices):
    row = [-0.0, 0.0, -np.inf, np.inf, -1e-30, 1e-30, -1e30, 1e30]
    for device in devices:
        order = on(device, lambda: top_k(mx.array([row]), 8))
        assert order.tolist() == [[3, 7, 5, 0, 1, 4, 6, 2]]


def moe_layer() -> MoE:
    moe = replace(SPARSE.moe_config, moe_intermediate_size=48)
    return MoE(replace(SPARSE, hidden_size=64, moe_config=moe))


@both
@in_types
@pytest.mark.parametrize("way", ["routed", "dense"])
@pytest.mark.parametrize("tokens", [1, 3, 40])  # 40: rows sorted by expert
def test_experts(devices, dtype, way, tokens):
    """Twice the roundings: a gate times an up projection, and a sum over experts."""
    with running_on(mx.cpu):
        experts = top_k(random_array(tokens, 4, seed=2), 2)
        weights = mx.softmax(random_array(tokens, 2, seed=3), axis=-1)
        mx.eval(experts, weights)
    compare(
        devices,
        dtype,
        lambda: moe_layer().experts,
        rounded(dtype, tokens, 64),
        2 * bound(dtype),
        lambda module, x: getattr(module, way)(x, weights, experts),
    )


@both
def test_gradients_of_experts(devices):
    """Training runs on GPUs too: gather_mm's gradient, sorted rows, the router's."""
    layer, _ = made(moe_layer, mx.float32)
    x, _ = rounded(mx.float32, 40, 64)

    def gradients():
        def loss(layer):
            return mx.square(layer(x)).sum()

        return tree_flatten(nn.value_and_grad(layer, loss)(layer)[1])

    found, expected = (on(device, gradients) for device in devices)
    assert len(found) == 3
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        # A sum over 40 tokens of products of three matmuls.
        assert_near(ours, theirs, 5 * bound(mx.float32), name)


# --- Convolution -------------------------------------------------------------------


@both
@in_types
@pytest.mark.parametrize("rows, columns, channels", [(12, 12, 64), (3, 7, 5)])
def test_depthwise_convolution(devices, dtype, rows, columns, channels):
    """The GPU's grouped convolution against the CPU's nine shifted products."""
    x, x_exact = rounded(dtype, 2, rows, columns, channels)
    w, w_exact = rounded(dtype, channels, 3, 3, 1, seed=1)
    found = on(devices[0], lambda: depthwise_conv3x3(x, w))
    expected = on(devices[1], lambda: depthwise_conv3x3(x_exact, w_exact))
    assert_near(found, expected, bound(dtype))


@both
def test_gradients_of_the_depthwise_convolution(devices):
    x, _ = rounded(mx.float32, 2, 6, 6, 16)
    w, _ = rounded(mx.float32, 16, 3, 3, 1, seed=1)
    towards, _ = rounded(mx.float32, 2, 6, 6, 16, seed=2)

    def gradients():
        def loss(x, w):
            return (depthwise_conv3x3(x, w) * towards).sum()

        return mx.grad(loss, argnums=(0, 1))(x, w)

    found, expected = (on(device, gradients) for device in devices)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, bound(mx.float32))


# --- Attention ---------------------------------------------------------------------

# Queries, keys, mask: a prompt, its second piece, one step, rows that start later.
READS = {
    "prompt": (33, 33, "causal"),
    "chunk": (9, 40, "causal"),
    "step": (1, 70, None),
    "masked": (9, 9, mx.array(np.tril(np.ones((9, 9), bool)))),
}


@both
@in_types
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("read", READS)
def test_attention(devices, dtype, head_dim, read):
    """Phi-2's and Llama's head sizes: MLX has fused kernels for 128, not for all."""
    length, keys, mask = READS[read]
    q, q_exact = rounded(dtype, 2, 4, length, head_dim)
    k, k_exact = rounded(dtype, 2, 2, keys, head_dim, seed=1)
    v, v_exact = rounded(dtype, 2, 2, keys, head_dim, seed=2)
    scale = head_dim**-0.5
    found = on(devices[0], lambda: attend(None, q, k, v, scale, mask))
    expected = on(
        devices[1], lambda: attend(None, q_exact, k_exact, v_exact, scale, mask)
    )
    # exp turns a score's rounding (scores reach 4 here) into a share of the weight.
    assert_near(found, expected, 4 * bound(dtype))


@both
@in_types
def test_a_whole_attention_layer_with_its_cache(devices, dtype):
    def layer():
        return Attention(64, 4, 80, num_kv_heads=2, rope=RotaryEmbedding(32, 1e4))

    def read(module, x):
        cache = KVCache([0, 5])
        first = module(x[:, :12], cache.make_mask(12), cache)
        return mx.concatenate([first, module(x[:, 12:], cache.make_mask(1), cache)], 1)

    inputs = rounded(dtype, 2, 13, 64)
    compare(devices, dtype, layer, inputs, 4 * bound(dtype), read)


ROPES = {
    "plain": (80, None),
    "partial": (32, None),
    "linear": (80, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (80, LLAMA3),
}


@both
@in_types
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("offset", [0, 700, (0, 700)], ids=str)
@pytest.mark.parametrize("length", [1, 7])  # one token has a kernel of its own
def test_rotary_positions(devices, dtype, kind, offset, length):
    dims, scaling = ROPES[kind]
    x, x_exact = rounded(dtype, 2, 3, length, 80)
    starts = mx.array(offset) if isinstance(offset, tuple) else offset

    def turn(x):
        return RotaryEmbedding(dims, 1e4, scaling)(x, starts)

    found = on(devices[0], lambda: turn(x))
    expected = on(devices[1], lambda: turn(x_exact))
    # The angle 700 is known to 3e-5 in float32; the rest is for a GPU's fast sine.
    assert_near(found, expected, bound(dtype) + 3e-4)


@both
def test_packed_positions_equal_the_fast_path(devices):
    """What training rotates with, on the GPU, against what answering does."""
    x, _ = rounded(mx.float32, 2, 3, 7, 80)
    positions = mx.arange(700, 707) * mx.ones((2, 1), mx.int32)
    rope = RotaryEmbedding(80, 1e4)
    found = on(devices[0], lambda: rope(x, positions=positions))
    expected = on(devices[1], lambda: rope(x, 700))
    assert_near(found, expected, 3e-4)  # angles, as above


# --- Quantized keys and values ---------------------------------------------------


@both
@in_types
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])  # 80: groups of 32, zeros behind
@pytest.mark.parametrize("length", [1, 5])
def test_quantized_attention(devices, dtype, bits, head_dim, length):
    """Over the same quantized arrays, so only the arithmetic differs."""
    q, q_exact = rounded(dtype, 2, 4, length, head_dim)
    k, _ = rounded(dtype, 2, 2, 40, head_dim, seed=1)
    v, _ = rounded(dtype, 2, 2, 40, head_dim, seed=2)
    cache = QuantizedKVCache(bits=bits)
    keys, values = on(mx.cpu, lambda: cache.update_and_fetch(k, v))
    size, mask = cache.group_size, "causal" if length > 1 else None

    def read(q, keys, values):
        scale = head_dim**-0.5
        return attend_quantized(q, keys, values, scale, mask, size, bits)

    def exactly(parts):
        return [p if p.dtype == mx.uint32 else p.astype(mx.float32) for p in parts]

    found = on(devices[0], lambda: read(q, keys, values))
    expected = on(devices[1], lambda: read(q_exact, exactly(keys), exactly(values)))
    assert_near(found, expected, 4 * bound(dtype))


@both
@in_types
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_keeps_what_it_is_given(devices, dtype, bits):
    """Within one step of its group's range."""
    k, k_exact = rounded(dtype, 1, 2, 30, 64)

    def kept():
        cache = QuantizedKVCache(bits=bits)
        keys, _ = cache.update_and_fetch(k, k)
        how: Any = {"group_size": cache.group_size, "bits": bits}
        return mx.dequantize(*keys, **how).astype(mx.float32)

    found = np.array(on(devices[0], kept)) - np.array(k_exact)
    groups = np.array(k_exact).reshape(1, 2, 30, 1, 64)
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    # Half a step for the value, up to half for a group whose ends MLX moves so that
    # zero is exact; the stored scale and bias are rounded.
    slack = bound(dtype) * np.abs(groups).max()
    assert (np.abs(found) <= step + slack).all()


# --- Whole parts -------------------------------------------------------------------


@both
@in_types
@pytest.mark.parametrize("side", [16, 24])  # 24: positions of another grid
@pytest.mark.parametrize("act", ["quick_gelu", "gelu_pytorch_tanh", "relu2"])
def test_a_small_encoder(devices, dtype, side, act):
    """Two blocks of four matmuls and two norms each: their roundings add up."""
    compare(
        devices,
        dtype,
        lambda: VisionEncoder(replace(VISION, hidden_act=act)),
        rounded(dtype, 2, side, side, 3),
        3 * bound(dtype),
    )


CONNECTORS = {
    "average_pool": replace(CONNECTOR, type="average_pool"),
    "attention_pool": replace(CONNECTOR, type="attention_pool", num_attention_heads=2),
    "c_abstractor": replace(CONNECTOR, norm_output=True, num_eos_tokens=1),
    "tamm": replace(
        CONNECTOR,
        variant="tamm",
        pooling="strided",
        hidden_act="relu",
        norm_bias=False,
        squeeze_bias=False,
    ),
    "mlp": ConnectorConfig(type="mlp", num_query_tokens=None, hidden_act="gelu"),
}


@both
@in_types
@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("patches", [16, 36])  # 36: positions of another grid
def test_a_small_connector(devices, dtype, kind, patches):
    compare(
        devices,
        dtype,
        lambda: make_connector(CONNECTORS[kind], VISION, 24),
        rounded(dtype, 2, patches, 16),
        3 * bound(dtype),
    )


@both
@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_small_decoder_with_its_cache(devices, text, kv_bits):
    """float32: in 16 bits a nearly tied router may rightly choose another expert."""
    decoder = on(mx.cpu, lambda: small_decoder(text))
    mx.eval(decoder.parameters())
    ids = mx.array(np.random.default_rng(0).integers(4, 90, (2, 14)))

    def logits():
        cache = decoder.make_cache(left_padding=[0, 3], kv_bits=kv_bits)
        parts = [decoder(ids[:, :12], cache), decoder(ids[:, 12:13], cache)]
        return mx.concatenate([*parts, decoder(ids[:, 13:], cache)], axis=1)

    found, expected = (on(device, logits) for device in devices)
    # With 8 bits a value between two codes may go to either: a step of 1/255.
    share = 5 * bound(mx.float32) if kv_bits is None else 1e-2
    assert_near(found, expected, share)


@both
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_an_answer_of_mm1_tiny(devices, dtype):
    """The same words on both; None is what each device takes by itself."""
    from mm1_mlx.inference.generation import generate
    from mm1_mlx.loading import load

    need_tiny()
    picture = ROOT / "examples" / "shapes.png"
    texts = []
    for device in devices:
        with running_on(device):
            model, processor = load("mm1-tiny", dtype=dtype)
            question = "What colour is the star?"
            answer = generate(model, processor, question, picture, max_tokens=20)
        texts.append(answer.text)
    assert texts[0] == texts[1]
    assert "yellow" in texts[0].lower()
