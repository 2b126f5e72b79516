"""Whole models with their kernels on, run by the harness: the same answers."""

from dataclasses import replace

import mlx.core as mx
import pytest
from small import DENSE, MOE, SPARSE, random_array, small_decoder

from helpers import assert_close, need_tiny
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx import generate, load
from mm1_mlx.benchmarks.launches import ALL_KERNELS
from mm1_mlx.kernels.metal import forced, watched
from mm1_mlx.models.decoder import Decoder

KERNELS = (*ALL_KERNELS, "quantized_attention")
IDS = [[5, 17, 33, 8, 71, 12, 64, 20], [9, 44, 3, 58, 2, 31, 77, 6]]
OFTEN = replace(MOE, first_sparse_layer=0, sparse_step=1)
MODELS = {
    "dense": DENSE,
    "layer norm": replace(DENSE, norm_type="layer_norm"),
    "experts": replace(SPARSE, moe_config=OFTEN),
    "three of eight": replace(
        SPARSE, moe_config=replace(OFTEN, num_local_experts=8, num_experts_per_tok=3)
    ),
    "not renormalised": replace(
        SPARSE, moe_config=replace(OFTEN, norm_topk_prob=False)
    ),
}


def greedy(decoder: Decoder, tokens: int, **settings) -> tuple[list, mx.array]:
    """Tokens of both rows, and all logits that they were chosen by."""
    cache, ids = decoder.make_cache(**settings), mx.array(IDS)
    found, logits = [], []
    for _ in range(tokens):
        logits.append(decoder(ids, cache=cache)[:, -1])
        ids = mx.argmax(logits[-1], axis=-1, keepdims=True)
        found.append(ids[:, 0].tolist())
    return found, mx.stack(logits)


@needs_host
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same(name):
    decoder = small_decoder(MODELS[name])
    expected, logits = greedy(decoder, 6)
    with forced(*KERNELS), host_kernels(), watched() as used:
        found, close = greedy(decoder, 6)
    assert found == expected
    assert_close(close, logits, atol=1e-4)  # sums in another order, of deviation 3
    wanted = {"mm1_add_norm_bias" if name == "layer norm" else "mm1_add_norm"}
    if "norm" not in name and name != "dense":
        wanted |= {"mm1_router_matvec", "mm1_experts_up_plain"}
    assert wanted <= set(used), set(used)


@needs_host
def test_a_quantized_cache_and_a_long_prompt():
    """Prompts that are sorted by expert, then tokens over 8-bit keys and values."""
    decoder = small_decoder(MODELS["three of eight"])
    x = random_array(1, 40, 32)
    plain, fast = decoder.make_cache(kv_bits=8), decoder.make_cache(kv_bits=8)
    expected = decoder(None, plain, x)
    with forced(*KERNELS), host_kernels(), watched() as used:
        found = decoder(None, fast, x)
        again = decoder(mx.array([[7]]), fast)
    assert_close(found, expected, atol=1e-4)
    assert_close(again, decoder(mx.array([[7]]), plain), atol=1e-4)
    names = {"mm1_router_keyed", "mm1_quantized_attention"}
    assert all(any(n.startswith(name) for n in used) for name in names), set(used)


@needs_host
def test_mm1_tiny_answers_the_same():
    folder = need_tiny()
    model, processor = load(folder)
    picture = "examples/shapes.png"
    prompts = ["What colour is the star?", "How many things are there?"]
    for prompt in prompts:
        expected = generate(model, processor, prompt, images=picture, max_tokens=8)
        with forced(*KERNELS), host_kernels(checked=False), watched() as used:
            found = generate(model, processor, prompt, images=picture, max_tokens=8)
        wanted = {"mm1_add_norm", "mm1_router_matvec", "mm1_experts_up_plain"}
        assert wanted <= set(used), set(used)
        assert found.token_ids == expected.token_ids
