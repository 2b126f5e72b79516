"""Apple's tamm 0.2.0: stored reference values, and its own modules where installed."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from parity import build, expected, hub_config, load, pixels, safetensors

from convert.rules import rename
from convert.sources import tamm
from helpers import assert_close, assert_equal, need
from mm1_mlx.config import DecoderConfig, VisionConfig
from mm1_mlx.models.connector import make_connector
from mm1_mlx.models.decoder import DecoderLayer
from mm1_mlx.models.vision import VisionEncoder

ATOL = 2e-5  # values of order 1; independent codes agree to 3e-6

CONFIG = hub_config("tamm")


def encoder_of_grid(side: int, width: int) -> VisionConfig:
    """An encoder config that says what a connector must know of it."""
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        image_size=14 * side,
    )


def connector(hub: dict, side: int, weights: dict):
    config = tamm.pooler_config(hub)
    made = make_connector(
        config, encoder_of_grid(side, hub["input_dim"]), hub["output_dim"]
    )
    return load(made, rename(weights, tamm.POOLER))


def test_vision_transformer():
    config = tamm.config(CONFIG["vision"])
    model = build(config, safetensors("tamm/vision"), tamm.VISION)
    values = expected("tamm")
    states = model.hidden_states(pixels(values["pixel_values"]))
    for i, state in enumerate(states[1:]):
        assert_close(state, values[f"after_layer_{i}"], atol=ATOL)
    out = model(pixels(values["pixel_values"]))
    assert_close(out, values["convolution_tokens"].reshape(out.shape), atol=ATOL)
    assert_close(model.norm_out(states[-1])[:, :1], values["class_tokens"], atol=ATOL)


@pytest.mark.parametrize(
    "name, source, target",
    [
        ("pooler", "convolution_tokens", "connector_output"),
        ("pooler27", "pooler27_input", "pooler27_output"),
    ],
)
def test_c_abstractor(name, source, target):
    values = expected("tamm")
    x = values[source]
    model = connector(CONFIG[name], x.shape[1], safetensors(f"tamm/{name}"))
    out = model(mx.array(x.reshape(1, -1, x.shape[-1])))
    assert_close(out, values[target], atol=ATOL)


def test_mixture_of_experts():
    hub, values = CONFIG["moe"], expected("tamm")
    text = DecoderConfig(
        hidden_size=hub["hidden_dim"],
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        vocab_size=1,
        norm_eps=hub["norm_eps"],
        moe_config=tamm.moe_config(hub),
    )
    layer = DecoderLayer(text, 0)
    weights = rename(safetensors("tamm/moe"), tamm.MOE)
    layer.load_weights(list(weights.items()), strict=False)  # it has attention too
    for name in weights:
        assert name.startswith(("norm2.", "moe."))
    layer.eval()

    x = mx.array(values["moe_input"][:, 0])  # one track
    outputs: list = []
    out = x + layer.moe(layer.norm2(x), outputs)
    assert_close(out, values["moe_output"][:, 0], atol=ATOL)
    logits, experts = outputs[0]
    probabilities = mx.softmax(logits, axis=-1)
    assert_close(probabilities, values["moe_router_probs"].reshape(-1, 4), atol=ATOL)
    chosen, order = np.array(experts), values["moe_topk_indices"].reshape(-1, 2)
    assert_equal(chosen, order)
    weights, _, _ = layer.moe.router(layer.norm2(x).reshape(-1, x.shape[-1]))
    assert_close(weights, values["moe_topk_weights"].reshape(-1, 2), atol=ATOL)


# --- Against the library itself, with other switches than the stored values ----------


def random_weights(module) -> dict[str, np.ndarray]:
    """Every weight of a torch module set at random; norms near 1."""
    torch = need("torch")
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            norm = name.endswith("weight") and weight.ndim == 1
            weight.copy_(torch.randn(weight.shape, generator=made) * 0.1 + norm)
    module.eval()
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_vision_transformer_of_the_library(class_tokens):
    torch, library = need("torch"), need("tamm")
    arguments = {
        "hidden_dim": 40,
        "num_layers": 2,
        "num_heads": 5,
        "hidden_dim_scale_factor": 3.0,
        "patch_size": (10, 10),
        "positional_embedding_shape": (4, 4),
        "num_class_tokens": class_tokens,
        "activation": "gelu",
        "norm_bias": True,
    }
    reference = library.models.VisionTransformer.create_builder(**arguments).build()
    weights = random_weights(reference)
    rules = tamm.VISION if class_tokens else tamm.VISION_WITHOUT_CLASS
    model = build(tamm.config(arguments), weights, rules)
    x = np.random.default_rng(0).standard_normal((2, 3, 40, 40), np.float32)
    with torch.no_grad():
        out = reference(torch.tensor(x)).last_hidden_state["convolution_tokens"]
    assert_close(model(pixels(x)), out.reshape(2, 16, 40), atol=ATOL)
    states = VisionEncoder(replace(tamm.config(arguments), feature_norm=False))
    states.update(model.parameters())
    normed = model.norm_out(states(pixels(x)))
    assert_close(normed, out.reshape(2, 16, 40), atol=ATOL)


@pytest.mark.parametrize(
    "side, out, width",
    [(7, 3, 40), (5, 5, 48), (9, 2, 24)],  # grids that do and do not divide
)
def test_c_abstractor_of_the_library(side, out, width):
    torch, library = need("torch"), need("tamm")
    arguments = {
        "input_dim": 48,
        "convolution_output_dim": width,
        "output_dim": 56,
        "pooler_output_shape": (out, out),
        "blocks_per_regnet_stage": 2,
        "regnet_activation": "silu",
        "feed_forward_activation": "silu",
        "apply_positional_embedding": True,
        "positional_embedding_shape": (side, side),
        "norm_bias": True,
        "squeeze_excitation_bias": True,
        "num_append_tokens": 2,
    }
    layer = library.layers.CAbstractorPooler.create_builder(**arguments).build()
    model = connector(arguments, side, random_weights(layer))
    x = np.random.default_rng(0).standard_normal((2, side, side, 48), np.float32)
    with torch.no_grad():
        expected_out = layer({"convolution_tokens": torch.tensor(x)})
    actual = model(mx.array(x.reshape(2, -1, 48)))
    assert_close(actual, expected_out, atol=ATOL)
