"""Whole models and connectors against stored reference values, in float32.

Each model runs in the order encoder, connector, logits, so that a failure is located.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from parity import (
    bins,
    build,
    embed,
    expected,
    greedy,
    greedy_without_cache,
    hub_config,
    load,
    pixels,
    safetensors,
    spliced,
)

from convert.rules import prefixed, rename
from convert.sources import hf_clip, honeybee, llava, moe_llava
from helpers import FIXTURES, assert_close, assert_equal
from mm1_mlx.config import VisionConfig
from mm1_mlx.models.connector import make_connector, to_grid
from mm1_mlx.models.mm1 import MM1

VISION, CONNECTOR = 1e-6, 1e-6  # independent codes agree to 4e-8 and 1e-7


def check_model(model, values, ids, *, logits_atol, suffix=""):
    """Encoder, connector, logits, greedy ids with and without a cache."""
    pixel_values = pixels(values["pixel_values" + suffix])
    features = model.vision(pixel_values)
    assert_close(features, values["vision_features" + suffix], atol=VISION)
    image_tokens = model.connector(features)
    assert_close(image_tokens, values["connector_output" + suffix], atol=CONNECTOR)
    embeddings = embed(model, ids, image_tokens)
    logits = model.decoder(None, None, embeddings)
    assert_close(logits, values["logits" + suffix], atol=logits_atol)
    answer = values["greedy_ids" + suffix].tolist()
    assert greedy(model.decoder, embeddings, len(answer)) == answer
    assert greedy_without_cache(model.decoder, embeddings, len(answer)) == answer
    return embeddings


# --- C-Abstractor ------------------------------------------------------------------

NETS = json.loads((FIXTURES / "c_abstractor_core" / "config.json").read_text())


@pytest.mark.parametrize("name", NETS)
def test_c_abstractor(name):
    net, values = NETS[name], expected("c_abstractor_core")
    config = honeybee.abstractor_config(net)
    vision = VisionConfig(
        hidden_size=net["encoder_hidden_size"],
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        image_size=14 * net["input_grid"],
    )
    weights = safetensors("c_abstractor_core", f"{name}.safetensors")
    rules = prefixed(honeybee.ABSTRACTOR, source="abstractor.")
    connector = make_connector(config, vision, net["output_hidden_size"])
    load(connector, rename(weights, rules))

    x = mx.array(values[f"{name}/input"])
    grid = to_grid(x + connector.position_embedding)
    for block in connector.stage1:
        grid = block(grid)
    rows = "stage1_first_rows" if "27" in name else "stage1"
    stage1 = values[f"{name}/{rows}"].transpose(0, 2, 3, 1)
    # Stages are of order 1; the output's standard deviation is 0.02.
    assert_close(grid[:, : stage1.shape[1]], stage1, atol=2e-5)
    grid = connector._pool(grid)
    pooled = values[f"{name}/pooled"].transpose(0, 2, 3, 1)
    assert_close(grid, pooled, atol=2e-5)
    for block in connector.stage2:
        grid = block(grid)
    stage2 = values[f"{name}/stage2"].transpose(0, 2, 3, 1)
    assert_close(grid, stage2, atol=2e-5)
    assert_close(connector(x), values[f"{name}/output"], atol=1e-6)


# --- Honeybee ----------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["last", "last_old"])
def test_honeybee(folder):
    config = honeybee.config(hub_config(f"honeybee/{folder}"))
    model = build(config, bins(f"honeybee/{folder}"), honeybee.RULES)
    values = expected("honeybee")
    ids = spliced(values["input_ids"], -1, model)
    check_model(model, values, ids, logits_atol=1e-4)  # of standard deviation 3


# --- LLaVA -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf4", "hf5"])
def test_llava_of_transformers(layout):
    config = llava.config(hub_config(f"llava15/{layout}"))
    assert config.vision_config.feature_layer == -2
    model = build(config, safetensors(f"llava15/{layout}"), llava.RULES)
    values = expected("llava15")
    ids = mx.array(values["input_ids"])
    check_model(model, values, ids, logits_atol=2e-4)  # two reference codes: 8e-6
    # The same through the model's own door: here the image id is in the vocabulary.
    logits = model(ids, pixels(values["pixel_values"]))
    assert_close(logits, values["logits"], atol=2e-4)


@pytest.fixture(scope="module")
def original_llava():
    tower = hub_config("llava15/tower")
    config = llava.config(hub_config("llava15/original"), tower)
    weights = rename(bins("llava15/original", "pytorch_model-*.bin"), llava.RULES)
    # The projector is in the shards, or beside them in mm_projector.bin.
    projector = rename(bins("llava15/original", "mm_projector.bin"), llava.RULES)
    inside = rename(bins("llava15/tower"), prefixed(hf_clip.RULES, target="vision."))
    return load(MM1(config), inside | projector | weights)


def test_original_llava(original_llava):
    values = expected("llava15")
    ids = spliced(values["input_ids_original"], -200, original_llava)
    check_model(original_llava, values, ids, logits_atol=2e-4, suffix="_pad")


def test_original_and_hub_llava_are_the_same_net(original_llava):
    config = llava.config(hub_config("llava15/hf4"))
    hub = build(config, safetensors("llava15/hf4"), llava.RULES)
    values = expected("llava15")
    ids = mx.array(values["input_ids"])
    tokens = hub.encode_images(pixels(values["pixel_values"]))
    # The tower and the projector are stored in float16 in the hub's layout.
    ours = original_llava.encode_images(pixels(values["pixel_values"]))
    assert_close(ours, tokens, atol=1e-6)
    logits = hub.decoder(None, None, embed(hub, ids, tokens))
    again = original_llava.decoder(None, None, embed(hub, ids, tokens))
    # The vocabulary was padded from 320 to 384.
    assert_close(again, logits[..., :320], atol=2e-4)


# --- MoE-LLaVA ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe_llava_model():
    tower = hub_config("moe_llava_stablelm/tower")
    config = moe_llava.config(hub_config("moe_llava_stablelm"), tower)
    weights = safetensors("moe_llava_stablelm")
    return build(config, weights, moe_llava.rules(config))


def test_moe_llava(moe_llava_model):
    values = expected("moe_llava_stablelm")
    ids = spliced(values["input_ids"], -200, moe_llava_model)
    check_model(moe_llava_model, values, ids, logits_atol=2e-4)


def test_moe_llava_routing(moe_llava_model):
    model, values = moe_llava_model, expected("moe_llava_stablelm")
    ids = spliced(values["input_ids"], -200, model)
    features = model.encode_images(pixels(values["pixel_values"]))
    outputs: list = []
    embeddings = embed(model, ids, features)
    model.decoder.hidden(None, None, embeddings, router_outputs=outputs)
    assert len(outputs) == 2
    for layer, (logits, experts) in zip((0, 2), outputs, strict=True):
        probabilities = mx.softmax(logits, axis=-1)
        assert_close(probabilities, values[f"router_probs_layer{layer}"], atol=2e-5)
        assert_equal(experts, values[f"top2_indices_layer{layer}"])
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        assert_close(weights, values[f"top2_weights_layer{layer}"], atol=2e-5)


def test_a_swapped_expert_would_be_seen(moe_llava_model):
    model, values = moe_llava_model, expected("moe_llava_stablelm")
    ids = spliced(values["input_ids"], -200, model)
    features = model.encode_images(pixels(values["pixel_values"]))
    weights = model.decoder.layers[0].moe.experts
    kept = weights.down_proj
    try:
        weights.down_proj = kept[mx.array([1, 0, 2, 3])]
        logits = model.decoder(None, None, embed(model, ids, features))
    finally:
        weights.down_proj = kept
    assert np.abs(np.array(logits) - values["logits"]).max() > 0.1
