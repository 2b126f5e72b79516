"""Encoders, decoders and LLaVA against transformers, with the same random weights.

The reference is saved with save_pretrained, so the public names and the config.json of
transformers 5 are read; the stored fixtures cover the spelling of transformers 4.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from parity import as_float, build, pixels

from convert.sources import (
    aimv2,
    hf_clip,
    llama,
    llava,
    mixtral,
    olmoe,
    phi,
    qwen_moe,
    siglip,
    stablelm,
)
from helpers import assert_close, need

ENCODER = 2e-5  # states of order 1, float32, sums of up to 300 products
LOGITS = 5e-5  # of order 1; the largest difference seen is 5e-6


def randomize(module) -> None:
    """Every weight at random, norms near 1: a default of 0 or 1 would hide mistakes."""
    torch = need("torch")
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            norm = weight.ndim == 1 and name.endswith("weight")
            scale = 0.1 if weight.ndim == 1 else min(0.3, weight.shape[-1] ** -0.5)
            weight.copy_(torch.randn(weight.shape, generator=made) * scale + norm)
    module.eval()


def saved(module, folder: Path) -> tuple[dict, dict]:
    """The config and the weights that save_pretrained writes."""
    module.save_pretrained(folder, safe_serialization=True)
    weights: dict = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {k: as_float(v) for k, v in mx.load(str(file)).items()}
    return json.loads((folder / "config.json").read_text()), weights


def make(name: str, **settings):
    """A small random model of transformers, and its class name's config."""
    transformers = need("transformers")
    need("torch").manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"
    kinds = {
        "CLIPVision": "CLIPVisionModel",
        "SiglipVision": "SiglipVisionModel",
        "Aimv2Vision": "Aimv2VisionModel",
        "Llava": "LlavaForConditionalGeneration",
    }
    model = getattr(transformers, kinds.get(name, f"{name}ForCausalLM"))(config)
    randomize(model)
    return model


VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 47,  # the last pixels do not fill a patch
    "patch_size": 9,
}

ENCODERS = {
    "clip": ("CLIPVision", hf_clip, {}),
    "clip_gelu": (
        "CLIPVision",
        hf_clip,
        {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    ),
    "siglip": ("SiglipVision", siglip, {}),
    "aimv2": ("Aimv2Vision", aimv2, {"use_head": False}),
    "aimv2_head_and_biases": (
        "Aimv2Vision",
        aimv2,
        {"use_head": True, "qkv_bias": True, "mlp_bias": True},
    ),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_encoder(case, tmp_path):
    torch = need("torch")
    name, source, changes = ENCODERS[case]
    reference = make(name, **VISION | changes)
    hub, weights = saved(reference, tmp_path)
    model = build(source.config(hub), weights, source.RULES)
    x = np.random.default_rng(0).standard_normal((2, 3, 47, 47), np.float32)
    with torch.no_grad():
        out = reference(torch.tensor(x), output_hidden_states=True)

    states = model.hidden_states(pixels(x))
    for ours, theirs in zip(states, out.hidden_states, strict=True):
        assert_close(ours, theirs, atol=ENCODER)
    last = model.norm_out(states[-1])
    if name == "CLIPVision":  # its post-norm is for the class token alone
        assert_close(last[:, 0], out.pooler_output, atol=ENCODER)
    else:
        assert_close(last, out.last_hidden_state, atol=ENCODER)


TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

DECODERS = {
    "llama": ("Llama", llama, {}),
    "llama3_scaling": ("Llama", llama, {"rope_parameters": LLAMA3}),
    "llama_linear_scaling": ("Llama", llama, {"rope_parameters": LINEAR}),
    "llama_biases": ("Llama", llama, {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("Llama", llama, {"head_dim": 12, "tie_word_embeddings": True}),
    "mistral": ("Mistral", llama, {"sliding_window": None}),
    "qwen2": ("Qwen2", llama, {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", llama, {"head_dim": 20}),
    "qwen3_bias": ("Qwen3", llama, {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("Mixtral", mixtral, {"num_local_experts": 5}),
    "olmoe": ("Olmoe", olmoe, {"num_experts": 5, "num_experts_per_tok": 3}),
    "olmoe_renormalised": (
        "Olmoe",
        olmoe,
        {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        qwen_moe,
        EXPERTS | {"shared_expert_intermediate_size": 56, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3Moe", qwen_moe, EXPERTS | {"head_dim": 12}),
    "qwen3_moe_every_second": (
        "Qwen3Moe",
        qwen_moe,
        EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": True, "head_dim": 8},
    ),
    "phi": ("Phi", phi, {"partial_rotary_factor": 0.5}),
    "stablelm": ("StableLm", stablelm, {}),
    "stablelm_bias": (
        "StableLm",
        stablelm,
        {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    ),
    "stablelm_parallel": ("StableLm", stablelm, {"use_parallel_residual": True}),
}


@pytest.mark.parametrize("case", DECODERS)
def test_decoder(case, tmp_path):
    torch = need("torch")
    name, source, changes = DECODERS[case]
    reference = make(name, **TEXT | changes)
    hub, weights = saved(reference, tmp_path)
    config = source.config(hub)
    model = build(config, weights, source.RULES)
    ids = np.random.default_rng(0).integers(0, 100, (2, 37))
    with torch.no_grad():
        out = reference(torch.tensor(ids), output_hidden_states=True)

    hidden = model.hidden(mx.array(ids))
    assert_close(hidden, out.hidden_states[-1], atol=LOGITS)
    assert_close(model(mx.array(ids)), out.logits, atol=LOGITS)


@pytest.mark.parametrize("layer", [-1, -2])
def test_llava(layer, tmp_path):
    torch, transformers = need("torch"), need("transformers")
    reference = make(
        "Llava",
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=7,
        vision_feature_layer=layer,
    )
    hub, weights = saved(reference, tmp_path)
    model = build(llava.config(hub), weights, llava.RULES)
    assert model.config.tokens_per_image == 25
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 47, 47), np.float32)
    ids = rng.integers(8, 100, (1, 60))
    ids[0, 3:28] = ids[0, 30:55] = 7  # two images
    with torch.no_grad():
        out = reference(input_ids=torch.tensor(ids), pixel_values=torch.tensor(x))
    assert_close(model(mx.array(ids), pixels(x)), out.logits, atol=LOGITS)


def test_llava_as_transformers_5_holds_it_in_memory(tmp_path):
    """state_dict() has other prefixes than the files."""
    transformers = need("transformers")
    reference = make(
        "Llava",
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=7,
    )
    hub, weights = saved(reference, tmp_path)
    config = llava.config(hub)
    memory = {k: v.numpy() for k, v in reference.state_dict().items()}
    assert memory.keys() != weights.keys()
    one = build(config, weights, llava.RULES)
    two = build(config, memory, llava.RULES)
    x = np.random.default_rng(0).standard_normal((1, 3, 47, 47), np.float32)
    assert_close(one.encode_images(pixels(x)), two.encode_images(pixels(x)), atol=0)


def test_experts_as_transformers_5_holds_them_in_memory(tmp_path):
    reference = make("Mixtral", **TEXT | {"num_local_experts": 5})
    hub, weights = saved(reference, tmp_path)
    memory = {k: v.numpy() for k, v in reference.state_dict().items()}
    assert memory.keys() != weights.keys()
    ids = mx.array([[1, 2, 3, 4, 5]])
    one = build(mixtral.config(hub), weights, mixtral.RULES)
    two = build(mixtral.config(hub), memory, mixtral.RULES)
    assert_close(one(ids), two(ids), atol=0)
