"""Decoders against stored reference values, through convert's tables, in float32."""

import mlx.core as mx
import pytest
from parity import (
    build,
    expected,
    greedy,
    greedy_without_cache,
    hub_config,
    safetensors,
)

from convert.sources import llama, mixtral, olmoe, phi, qwen_moe
from helpers import assert_close, assert_equal

LOGITS = 1e-4  # of standard deviation 3; independent codes agree to 2e-5
HIDDEN = 1e-4  # after the last norm, values up to 12
ROUTER = 2e-5  # probabilities, as the fixtures suggest

# fixture: (source, folder of the config, folder of the weights)
DECODERS = {
    "decoder_vicuna": (llama, "decoder_vicuna/safetensors", None),
    "decoder_llama3": (llama, "decoder_llama3/config4", None),
    # The two config spellings share the weights, which are stored once here.
    "decoder_llama3_config5": (
        llama,
        "decoder_llama3/config5",
        "decoder_llama3/config4",
    ),
    "decoder_qwen2": (llama, "decoder_qwen2", None),
    "decoder_qwen3": (llama, "decoder_qwen3", None),
    "decoder_phi2": (phi, "decoder_phi2", None),
    "decoder_mixtral": (mixtral, "decoder_mixtral", None),
    "decoder_olmoe": (olmoe, "decoder_olmoe", None),
    "decoder_qwen15_moe": (qwen_moe, "decoder_qwen15_moe", None),
    "decoder_qwen3_moe": (qwen_moe, "decoder_qwen3_moe/config4", None),
    "decoder_qwen3_moe_config5": (
        qwen_moe,
        "decoder_qwen3_moe/config5",
        "decoder_qwen3_moe/config4",
    ),
}


def model_of(name):
    source, folder, weights = DECODERS[name]
    config = source.config(hub_config(folder))
    return build(config, safetensors(weights or folder), source.RULES)


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, model_of(name))


@pytest.mark.parametrize("name", DECODERS)
def test_hidden_states_and_logits(models, name):
    model, values = models(name), expected(name.removesuffix("_config5"))
    ids = mx.array(values["input_ids"])
    assert_close(model.hidden(ids), values["final_hidden"], atol=HIDDEN)
    assert_close(model(ids), values["logits"], atol=LOGITS)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_ids(models, name):
    model, values = models(name), expected(name.removesuffix("_config5"))
    embeddings = model.embed_tokens(mx.array(values["input_ids"]))
    answer = values["greedy_ids"].tolist()
    assert greedy(model, embeddings, len(answer)) == answer
    assert greedy_without_cache(model, embeddings, len(answer)) == answer


@pytest.mark.parametrize("name", [n for n in DECODERS if "moe" in n or "mix" in n])
def test_routing(models, name):
    model, values = models(name), expected(name.removesuffix("_config5"))
    outputs: list = []
    model.hidden(mx.array(values["input_ids"]), router_outputs=outputs)
    sparse = [i for i in range(3) if model.config.is_sparse(i)]
    assert len(outputs) == len(sparse) == 3
    for i, (logits, experts) in zip(sparse, outputs, strict=True):
        probabilities = mx.softmax(logits, axis=-1)
        assert_close(probabilities, values[f"router_probs_layer{i}"], atol=ROUTER)
        assert_equal(experts, values[f"topk_indices_layer{i}"])
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        if model.config.moe_config.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        assert_close(weights, values[f"topk_weights_layer{i}"], atol=ROUTER)


def test_the_routers_own_weights(models):
    """What Router returns, on random states, against the definition in NumPy."""
    import numpy as np

    for name in ("decoder_mixtral", "decoder_olmoe"):  # renormalised, and not
        model = models(name)
        moe = model.layers[0].moe
        x = np.random.default_rng(0).standard_normal((33, 64)).astype(np.float32)
        weights, experts, logits = moe.router(mx.array(x))
        router = np.array(moe.router.weight, np.float64)
        scores = x.astype(np.float64) @ router.T
        odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
        odds /= odds.sum(axis=-1, keepdims=True)
        k = model.config.moe_config.num_experts_per_tok
        order = np.argsort(-odds, axis=-1, kind="stable")[:, :k]
        best = np.take_along_axis(odds, order, axis=-1)
        if model.config.moe_config.norm_topk_prob:
            best /= best.sum(axis=-1, keepdims=True)
        assert_equal(experts, order)
        assert_close(weights, best, atol=1e-6)  # float32 softmax
        assert_close(logits, scores, atol=2e-6)  # sums of 64 products
