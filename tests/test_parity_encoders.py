"""Encoders against stored reference values, through convert's tables, in float32.

Tolerances are the fixtures' own: at least ten times what independent codes differ by.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from parity import bins, build, expected, hub_config, load, pixels, safetensors

from convert.rules import rename
from convert.sources import aim, aimv2, hf_clip, open_clip_vit, siglip
from helpers import assert_close, need
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.presets import ENCODERS

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


def test_aim():
    """Against PyTorch written from the paper; the positions are not in the file."""
    torch = need("torch")
    from reference.aim import AIM

    torch.manual_seed(0)
    reference = AIM(width=48, blocks=3, heads=3, side=5, patch=9)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    hub = {
        "img_size": 45,
        "patch_size": 9,
        "embed_dim": 48,
        "num_blocks": 3,
        "num_heads": 3,
    }
    config = aim.config({"config": hub})
    assert config == aim.config(hub)
    weights = {k: v.numpy() for k, v in reference.state_dict().items()}
    weights = rename(weights, aim.RULES) | aim.additions(config)
    model = load(VisionEncoder(config), weights)
    x = np.random.default_rng(0).standard_normal((2, 3, 45, 45), np.float32)
    with torch.no_grad():
        states, last = reference(torch.tensor(x))

    for ours, theirs in zip(model.hidden_states(pixels(x))[1:], states, strict=True):
        assert_close(ours, theirs, atol=2e-5)  # states of order 10
    assert_close(normed(model, pixels(x)), last, atol=NORMED)


def test_aim_presets_are_the_readers():
    for name, width, heads in (
        ("aim-600m", 1536, 12),
        ("aim-1b", 2048, 16),
        ("aim-3b", 3072, 24),
    ):
        hub = {"embed_dim": width, "num_blocks": 24, "num_heads": heads}
        assert aim.config(hub) == ENCODERS[name]


def test_other_presets_are_the_readers():
    """What public config.json files say (checkpoints.md section 2) gives the preset."""
    dfn_h = {"image_size": 378, "layers": 32, "width": 1280, "head_width": 80}
    dfn_h["patch_size"] = 14
    model_cfg = {"vision_cfg": dfn_h, "quick_gelu": True}
    preset = ENCODERS["vit-h-14-378"]
    assert open_clip_vit.config({"model_cfg": model_cfg}) == preset
    openai = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    assert hf_clip.config({"vision_config": openai}) == ENCODERS["vit-l-14-336"]
    so400m = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    assert siglip.config({"vision_config": so400m}) == ENCODERS["siglip-so400m"]
    large = {"hidden_size": 1024, "intermediate_size": 2816, "image_size": 448}
    large |= {"num_hidden_layers": 24, "num_attention_heads": 8, "patch_size": 14}
    assert aimv2.config(large | {"use_bias": False}) == ENCODERS["aimv2-l-448"]
