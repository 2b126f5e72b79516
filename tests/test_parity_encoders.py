"""Encoders against stored reference values, through convert's tables, in float32.

Tolerances are the fixtures' own: at least ten times what independent codes differ by.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from parity import bins, build, expected, hub_config, pixels, safetensors

from convert.sources import aimv2, hf_clip, open_clip_vit, siglip
from helpers import assert_close
from mm1_mlx.models.vision import VisionEncoder

BLOCK = 1e-6  # block outputs: independent codes agree to 9e-8, values around 0.03
NORMED = 2e-5  # after the last norm, which divides by about 0.03: they agree to 2e-6

CLIP = {
    "open_clip": (open_clip_vit, "open_clip_config.json"),
    "hf4": (hf_clip, "config.json"),
    "hf5": (hf_clip, "config.json"),
}


def normed(model: VisionEncoder, pixel_values: mx.array) -> mx.array:
    return model.norm_out(model.hidden_states(pixel_values)[-1])


@pytest.mark.parametrize("layout", CLIP)
def test_clip_vit_h(layout):
    source, file = CLIP[layout]
    folder = f"openclip_vit_h/{layout}"
    weights = bins(folder) if layout == "open_clip" else safetensors(folder)
    config = source.config(hub_config(folder, file))
    assert config.size_per_head == 80
    model = build(config, weights, source.RULES)
    values = expected("openclip_vit_h")

    for i, state in enumerate(model.hidden_states(pixels(values["pixel_values"]))[1:]):
        assert_close(state, values[f"hidden_after_block{i}"], atol=BLOCK)
    out = normed(model, pixels(values["pixel_values"]))
    assert_close(out, values["last_post_norm"], atol=NORMED)

    # What the connector reads: without the class token, from the chosen layer.
    before = VisionEncoder(replace(config, feature_layer=-2))
    before.update(model.parameters())
    features = before(pixels(values["pixel_values"]))
    assert_close(features, values["hidden_after_block1"][:, 1:], atol=BLOCK)


def test_siglip():
    config = siglip.config(hub_config("siglip"))
    model = build(config, safetensors("siglip"), siglip.RULES)
    values = expected("siglip")
    states = model.hidden_states(pixels(values["pixel_values"]))
    for i, state in enumerate(states):  # 0 is the embedding
        # Values of 0.007; independent codes agree to 9e-9.
        assert_close(state, values[f"hidden_state_{i}"], atol=1e-7)
    out = normed(model, pixels(values["pixel_values"]))
    assert_close(out, values["last_hidden_state"], atol=NORMED)


AIMV2 = {
    "original": ("aimv2/original", "model.safetensors"),
    "channels_last": ("aimv2/original", "mlx_model.safetensors"),
    "transformers": ("aimv2/hf", "model.safetensors"),
}


@pytest.mark.parametrize("layout", AIMV2)
def test_aimv2(layout):
    folder, file = AIMV2[layout]
    config = aimv2.config(hub_config(folder))
    model = build(config, safetensors(folder, file), aimv2.RULES)
    values = expected("aimv2")
    states = model.hidden_states(pixels(values["pixel_values"]))
    for i, state in enumerate(states[1:]):
        assert_close(state, values[f"hidden_after_block{i}"], atol=BLOCK)
    out = normed(model, pixels(values["pixel_values"]))
    assert_close(out, values["last_hidden_state"], atol=NORMED)


def test_aimv2_with_feature_norm_gives_the_last_hidden_state():
    config = aimv2.config(hub_config("aimv2/hf"))
    config = replace(config, feature_norm=True)
    model = build(config, safetensors("aimv2/hf"), aimv2.RULES)
    values = expected("aimv2")
    out = model(pixels(values["pixel_values"]))
    assert_close(out, values["last_hidden_state"], atol=NORMED)


def test_a_wrong_activation_would_be_seen():
    """quick_gelu read as gelu: the mistake that fails nowhere else (trap 7)."""
    folder = "openclip_vit_h/hf5"
    config = replace(hf_clip.config(hub_config(folder)), hidden_act="gelu")
    model = build(config, safetensors(folder), hf_clip.RULES)
    values = expected("openclip_vit_h")
    state = model.hidden_states(pixels(values["pixel_values"]))[-1]
    gap = np.abs(np.array(state) - values["hidden_after_block2"]).max()
    assert gap > 100 * BLOCK
