"""The decoder: positions, packing, switches, by hand and against itself."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import DENSE, LLAMA3, SPARSE, random_array, small_decoder

from helpers import assert_close, assert_equal
from mm1_mlx.models.layers import (
    MLP,
    Attention,
    RotaryEmbedding,
    llama3_frequencies,
    quick_gelu,
    relu_squared,
)

IDS = [5, 17, 33, 8, 71, 12, 64, 20, 9, 44, 6, 58]


# --- Rotary positions ------------------------------------------------------------

ROPES = {
    "plain": (8, 10000.0, None),
    "theta": (8, 500000.0, None),
    "partial": (4, 10000.0, None),
    "linear": (8, 10000.0, {"rope_type": "linear", "factor": 4.0}),
    "old linear": (8, 10000.0, {"type": "linear", "factor": 4.0}),
    "llama3": (8, 10000.0, LLAMA3),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("offset", [0, 1, 100])
def test_positions_given_one_by_one_equal_the_fast_path(name, offset):
    rope = RotaryEmbedding(*ROPES[name])
    x = random_array(2, 3, 7, 8)
    positions = mx.broadcast_to(mx.arange(offset, offset + 7), (2, 7))
    # float32 angles up to 106: sine and cosine of two implementations.
    assert_close(rope(x, positions=positions), rope(x, offset), atol=2e-5)


def test_offsets_per_row_equal_each_row():
    rope = RotaryEmbedding(8, 10000.0)
    x = random_array(3, 2, 5, 8)
    found = rope(x, mx.array([0, 7, -3]))
    for i, offset in enumerate([0, 7, -3]):
        assert_close(found[i : i + 1], rope(x[i : i + 1], offset), atol=1e-6)


def test_rotation_by_hand():
    """Two dimensions turn by the position, as halves: (x0, x2) and (x1, x3)."""
    rope = RotaryEmbedding(4, 100.0)
    x = mx.array([[[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]]])
    found = rope(x, 3)
    one, slow = 3.0, 4.0 / 10  # 100^(-2/4) = 1/10
    expected = [
        [math.cos(one), 0, math.sin(one), 0],
        [0, math.cos(slow), 0, math.sin(slow)],
    ]
    assert_close(found[0, 0], expected, atol=1e-6)


def test_dimensions_beyond_the_rotary_ones_stay():
    rope = RotaryEmbedding(4, 10000.0)
    x = random_array(1, 2, 5, 8)
    assert_equal(rope(x, 9)[..., 4:], x[..., 4:])


def test_only_distances_count():
    rope = RotaryEmbedding(8, 10000.0)
    q, k = random_array(1, 1, 1, 8), random_array(1, 1, 1, 8, seed=1)
    near = (rope(q, 5) * rope(k, 3)).sum()
    far = (rope(q, 45) * rope(k, 43)).sum()
    assert_close(near, far, atol=1e-5)


def test_llama3_stretches_long_waves_only():
    """As transformers' modeling_rope_utils.py writes it, in frequencies."""
    found = 1 / np.array(llama3_frequencies(32, 10000.0, LLAMA3), np.float64)
    plain = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    expected = []
    for frequency in plain:
        wave = 2 * np.pi / frequency
        if wave < 64 / 4:
            expected.append(frequency)
        elif wave > 64 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len({round(e / p, 3) for e, p in zip(expected, plain, strict=True)}) > 2
    assert_close(found, expected, atol=1e-6)


# --- Layers ----------------------------------------------------------------------


def test_activations_by_hand():
    x = mx.array([-1.0, 0.0, 2.0])
    assert relu_squared(x).tolist() == [0, 0, 4]
    expected = [-1 / (1 + math.exp(1.702)), 0, 2 / (1 + math.exp(-3.404))]
    assert_close(quick_gelu(x), expected, atol=1e-6)


def test_gated_mlp_takes_the_gate_from_the_first_rows():
    mlp = MLP(3, 2, "relu", gated=True)
    mlp.gate_up_proj.weight = mx.array(
        [[1.0, 0, 0], [0, -1.0, 0], [0, 0, 1.0], [0, 0, 2.0]]
    )
    mlp.down_proj.weight = mx.array([[1.0, 0], [0, 1.0], [1.0, 1.0]])
    # gate (2, -3 -> 0), up (5, 10)
    assert mlp(mx.array([2.0, 3.0, 5.0])).tolist() == [10, 0, 10]


def attention_by_loop(layer: Attention, x: mx.array) -> np.ndarray:
    """Causal attention, head by head, in float64; no rotation, no norm."""
    H, KV, hd = layer.num_heads, layer.num_kv_heads, layer.head_dim
    qkv = np.array(layer.qkv_proj(x), np.float64)[0]
    q, k, v = np.split(qkv, [H * hd, (H + KV) * hd], axis=-1)
    heads = []
    for h in range(H):
        g = h // (H // KV)
        qh = q[:, h * hd : (h + 1) * hd]
        kh, vh = k[:, g * hd : (g + 1) * hd], v[:, g * hd : (g + 1) * hd]
        scores = qh @ kh.T / np.sqrt(hd)
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ vh)
    out = np.concatenate(heads, axis=-1)
    return (out @ np.array(layer.o_proj.weight, np.float64).T)[None]


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (4, 1)])
def test_grouped_attention_equals_a_loop(heads, kv):
    mx.random.seed(0)
    layer = Attention(24, heads, 6, num_kv_heads=kv, qkv_bias=True)
    x = random_array(1, 5, 24)
    assert_close(layer(x, "causal"), attention_by_loop(layer, x), atol=2e-6)


# --- The decoder -----------------------------------------------------------------

STYLES = {
    "llama": {},
    "experts": {"moe_config": SPARSE.moe_config},
    "qwen3": {"qk_norm": "head", "head_dim": 12},
    "olmoe": {"qk_norm": "full"},
    "tamm": {"qk_norm": "rotated_head"},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "phi2": {
        "parallel_block": True,
        "norm_type": "layer_norm",
        "partial_rotary_factor": 0.5,
        "gated_mlp": False,
        "hidden_act": "gelu_pytorch_tanh",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    },
    "ours": {"hidden_act": "relu2", "gated_mlp": False},
    "llama3": {"rope_scaling": LLAMA3},
}


@pytest.fixture(params=STYLES)
def decoder(request):
    return small_decoder(replace(DENSE, **STYLES[request.param]))


def test_nobody_sees_the_future(decoder):
    ids = mx.array([IDS])
    other = mx.array([IDS[:6] + [80] * 6])
    assert_close(decoder(ids)[:, :6], decoder(other)[:, :6], atol=1e-5)
    assert mx.abs(decoder(ids)[:, 6:] - decoder(other)[:, 6:]).max().item() > 1e-2


def test_order_of_tokens_matters(decoder):
    swapped = [IDS[1], IDS[0], *IDS[2:]]
    difference = decoder(mx.array([IDS])) - decoder(mx.array([swapped]))
    assert mx.abs(difference[:, -1]).max().item() > 1e-4


def test_only_distances_count_for_a_whole_decoder(decoder):
    ids = mx.array([IDS])
    moved = decoder(ids, positions=mx.arange(100, 112)[None])
    assert_close(moved, decoder(ids), atol=2e-4)  # larger angles in float32


def test_packed_rows_equal_the_rows_alone(decoder):
    """Two documents in one row: a block mask and positions that start again."""
    ids = mx.array([IDS])
    positions = mx.array([[*range(5), *range(7)]])
    document = mx.array([0] * 5 + [1] * 7)
    mask = (document[:, None] == document) & mx.array(np.tri(12, dtype=bool))
    found = decoder(ids, mask=mask[None, None], positions=positions)
    assert_close(found[:, :5], decoder(ids[:, :5]), atol=2e-5)
    assert_close(found[:, 5:], decoder(ids[:, 5:]), atol=2e-5)


def test_embeddings_can_be_given(decoder):
    ids = mx.array([IDS])
    embeddings = decoder.embed_tokens(ids)
    assert_equal(decoder(None, input_embeddings=embeddings), decoder(ids))
    assert_equal(decoder(ids * 0, input_embeddings=embeddings), decoder(ids))


def test_head_of_the_last_state_is_the_last_logits(decoder):
    ids = mx.array([IDS, IDS[::-1]])
    hidden = decoder.hidden(ids)
    assert hidden.shape == (2, 12, 32)
    assert_close(decoder.head(hidden[:, -1]), decoder(ids)[:, -1], atol=1e-5)


def test_16_bit_decoder_gives_float32_logits(decoder):
    decoder.set_dtype(mx.bfloat16)
    logits = decoder(mx.array([IDS]))
    assert logits.dtype == mx.float32
    assert not mx.isnan(logits).any()
    cache = decoder.make_cache(left_padding=[3, 0])
    padded = decoder(mx.array([[0] * 3 + IDS[:9], IDS]), cache)
    assert not mx.isnan(padded).any()
    assert decoder.hidden(mx.array([[7], [8]]), cache).dtype == mx.bfloat16


def test_experts_stand_in_their_layers():
    moe = replace(SPARSE.moe_config, sparse_step=2, first_sparse_layer=1)
    decoder = small_decoder(replace(DENSE, num_hidden_layers=5, moe_config=moe))
    assert ["moe" in layer for layer in decoder.layers] == [False, True] * 2 + [False]
    outputs: list = []
    decoder(mx.array([IDS]), router_outputs=outputs)
    assert [(a.shape, b.shape) for a, b in outputs] == [((12, 4), (12, 2))] * 2


def test_tied_embeddings_are_the_head():
    decoder = small_decoder(replace(DENSE, tie_word_embeddings=True))
    names = [name for name, _ in tree_flatten(decoder.parameters())]
    assert not any("lm_head" in name for name in names)
    hidden = decoder.hidden(mx.array([IDS]))
    expected = hidden @ decoder.embed_tokens.weight.T
    assert_close(decoder(mx.array([IDS])), expected, atol=1e-5)
