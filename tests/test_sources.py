"""The config readers of convert.sources: both spellings, defaults, refusals."""

import json
from dataclasses import replace

import pytest
from parity import hub_config

from convert.sources import (
    aim,
    aimv2,
    hf_clip,
    honeybee,
    llama,
    llava,
    mixtral,
    moe_llava,
    olmoe,
    open_clip_vit,
    phi,
    qwen_moe,
    siglip,
    stablelm,
    tamm,
)
from helpers import need
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.presets import ENCODERS

READERS = {
    "llama": (llama, {"model_type": "llama"}),
    "mistral": (llama, {"model_type": "mistral"}),
    "qwen2": (llama, {"model_type": "qwen2"}),
    "qwen3": (llama, {"model_type": "qwen3"}),
    "mixtral": (mixtral, {}),
    "olmoe": (olmoe, {}),
    "qwen2_moe": (qwen_moe, {"model_type": "qwen2_moe"}),
    "qwen3_moe": (qwen_moe, {"model_type": "qwen3_moe"}),
    "stablelm": (stablelm, {}),
    "phi": (phi, {}),
}


@pytest.mark.parametrize("name", READERS)
def test_both_spellings_of_rope(name):
    """transformers 4 and 5; with neither, the family's own default."""
    source, hub = READERS[name]
    old = source.config(hub | {"rope_theta": 123456.0})
    new = source.config(hub | {"rope_parameters": {"rope_theta": 123456.0}})
    assert old == new
    assert old.rope_theta == 123456.0
    default = {"mixtral": 1e6}.get(name, 1e4)
    assert source.config(hub).rope_theta == default

    scaling = {"factor": 2.0}
    old = source.config(hub | {"rope_scaling": {"type": "linear", **scaling}})
    new = {"rope_type": "linear", "rope_theta": default, **scaling}
    assert old == source.config(hub | {"rope_parameters": new})
    assert old.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    plain = {"rope_type": "default", "rope_theta": default}
    assert source.config(hub | {"rope_parameters": plain}).rope_scaling is None
    for lacking in ({"rope_type": "default"}, {"rope_theta": None}):
        with pytest.raises(CheckpointError, match="rope_parameters without a rope_the"):
            source.config(hub | {"rope_parameters": lacking})


@pytest.mark.parametrize("name", READERS)
def test_class_defaults_are_those_of_transformers(name):
    """A sparse config means what the family's class says (transformers 5.23)."""
    transformers = need("transformers")
    kinds = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "mixtral": "MixtralConfig",
        "olmoe": "OlmoeConfig",
        "qwen2_moe": "Qwen2MoeConfig",
        "qwen3_moe": "Qwen3MoeConfig",
        "stablelm": "StableLmConfig",
        "phi": "PhiConfig",
    }
    full = getattr(transformers, kinds[name])().to_dict()
    source, hub = READERS[name]
    assert spelled_out(source.config(full)) == spelled_out(source.config(hub))


def spelled_out(text):
    """With the values that may be left out because others give them."""
    return replace(text, num_key_value_heads=text.kv_heads, head_dim=text.size_per_head)


@pytest.mark.parametrize(
    "source, kind",
    [
        (hf_clip, "CLIPVisionConfig"),
        (siglip, "SiglipVisionConfig"),
        (aimv2, "Aimv2VisionConfig"),
    ],
)
def test_class_defaults_of_encoders(source, kind):
    full = getattr(need("transformers"), kind)().to_dict()
    assert source.config(full) == source.config({})


def test_sparse_hub_configs_of_llava():
    config = llava.config(hub_config("llava15/hf4"))
    again = llava.config(hub_config("llava15/hf5"))
    assert config.vision_config == again.vision_config
    assert spelled_out(config.text_config) == spelled_out(again.text_config)
    assert (config.image_token_id, config.pad_token_id) == (320, 321)
    assert config.eos_token_ids == (2,)
    empty = llava.config({"model_type": "llava", "text_config": {}})
    assert empty.vision_config.image_size == 336
    assert empty.vision_config.feature_layer == -2
    assert empty.text_config.num_hidden_layers == 32


def test_a_known_tower_needs_no_folder():
    hub = hub_config("llava15/original")
    vision = llava.config(hub).vision_config
    assert (vision.hidden_size, vision.image_size) == (1024, 336)
    assert vision.feature_layer == -2
    hub = hub_config("honeybee/last")
    hub["vision_config"] = {
        "pretrained_vision_name_or_path": "openai/clip-vit-large-patch14"
    }
    assert honeybee.config(hub).vision_config == ENCODERS["vit-l-14-224"]


def test_both_spellings_of_honeybee():
    new = honeybee.config(hub_config("honeybee/last"))
    assert new == honeybee.config(hub_config("honeybee/last_old"))
    assert new.tokens_per_image == 9
    assert new.pad_token_id == 0


def test_moe_llava_layers():
    tower = hub_config("moe_llava_stablelm/tower")
    text = moe_llava.config(hub_config("moe_llava_stablelm"), tower).text_config
    assert [i for i in range(4) if text.is_sparse(i)] == [0, 2]
    assert text.moe_config.capacity_factor is None  # dropless
    assert (text.rotary_dims, text.qkv_bias) == (4, True)
    one = {"moe_layers_idx": [3], "num_experts": [4]}
    only = moe_llava.moe_config(one, 6)
    assert [i for i in range(6) if only.is_sparse(i)] == [3]


def test_sparse_layers_of_qwen():
    hub = {"model_type": "qwen3_moe", "decoder_sparse_step": 3, "num_hidden_layers": 9}
    text = qwen_moe.config(hub)
    assert [i for i in range(9) if text.is_sparse(i)] == [2, 5, 8]
    text = qwen_moe.config(hub | {"num_local_experts": 16})
    assert text.moe_config.num_local_experts == 16


def test_a_window_limits_the_context():
    """Within the window both kinds of attention are the same, beyond it not."""
    hub = {"model_type": "mistral", "max_position_embeddings": 32768}
    assert llama.config(hub).max_position_embeddings == 4096  # class default
    assert llama.config(hub | {"sliding_window": 1000}).max_position_embeddings == 1000
    full = {"sliding_window": None, "use_sliding_window": False}
    assert llama.config(hub | full).max_position_embeddings == 32768
    qwen = hub | {"model_type": "qwen2", "sliding_window": 4096}
    assert llama.config(qwen).max_position_embeddings == 32768
    qwen["use_sliding_window"] = True
    assert llama.config(qwen).max_position_embeddings == 4096


REFUSED = [
    (llama, {"model_type": "gemma"}, r"model_type 'gemma', but must be one of llama"),
    (
        llama,
        {"quantization_config": {"quant_method": "awq"}},
        r"is quantized by 'awq', which only its own",
    ),
    (llama, {"rope_scaling": {"type": "yarn"}}, r"RoPE scaling 'yarn', which is not"),
    (
        llama,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        r"RoPE scaling 'llama3' has no 'low_freq_factor'",
    ),
    (
        llama,
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        r"a RoPE for each kind of layer",
    ),
    (olmoe, {"clip_qkv": 8.0}, r"clip_qkv = 8\.0, which is not supported; only None"),
    (qwen_moe, {"model_type": "qwen2"}, r"must be one of qwen2_moe, qwen3_moe"),
    (
        qwen_moe,
        {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
        r"mlp_only_layers = \[0\]",
    ),
    (stablelm, {"qk_layernorm": True}, r"qk_layernorm = True"),
    (phi, {"tie_word_embeddings": True}, r"tie_word_embeddings = True"),
    (hf_clip, {"image_size": [224, 336]}, r"image_size = \[224, 336\], but must be sq"),
    (aimv2, {"is_native": True}, r"is_native = True"),
    (open_clip_vit, {"model_cfg": {}}, r"has no 'vision_cfg'"),
    (
        open_clip_vit,
        {"vision_cfg": {"timm_model_name": "vit_so400m"}},
        r"timm_model_name = 'vit_so400m'",
    ),
    (llava, {"model_type": "cumo"}, r"model_type 'cumo', but must be one of llava"),
    (
        llava,
        {"model_type": "llava", "mm_vision_tower": "x/y"},
        r"the vision tower 'x/y', whose shape is not in its config",
    ),
    (
        llava,
        {"text_config": {}, "vision_feature_layer": [-2, -5]},
        r"vision_feature_layer = \[-2, -5\]",
    ),
    (llava, {"text_config": {}, "vision_feature_layer": 3}, r"counted from the end"),
    (
        llava,
        {"text_config": {}, "vision_feature_select_strategy": "full"},
        r"vision_feature_select_strategy = 'full'",
    ),
    (honeybee, {"model_type": "mllm"}, r"no projector_config and text_config"),
    (
        honeybee,
        {
            "text_config": {},
            "vision_config": {"num_hidden_layers": 2},
            "projector_config": {"projector_type": "d-abs", "num_query_tokens": 9},
        },
        r"projector_type = 'd-abs'",
    ),
    (moe_llava, {"model_type": "moe_llava_qwen"}, r"'moe_llava_qwen', but of MoE-LL"),
    (tamm, {"num_class_tokens": 2}, r"num_class_tokens = 2"),
    (tamm, {"attention_logits_soft_cap": 50.0}, r"attention_logits_soft_cap = 50\.0"),
]


@pytest.mark.parametrize("source, hub, message", REFUSED)
def test_what_a_reader_refuses(source, hub, message):
    with pytest.raises(CheckpointError, match=message):
        source.config(hub)


def test_more_refusals():
    with pytest.raises(CheckpointError, match=r"projector 'resampler', which is not"):
        llava.mlp_connector("resampler")
    with pytest.raises(CheckpointError, match=r"has no 'num_blocks', and the family"):
        aim.config({"embed_dim": 8})
    layers = {"moe_layers_idx": [0, 1, 3], "num_experts": [4, 4, 4]}
    with pytest.raises(CheckpointError, match=r"in layers \[0, 1, 3\] of 4, which is"):
        moe_llava.moe_config(layers, 4)
    uneven = {"moe_layers_idx": [0, 2], "num_experts": [4, 8]}
    with pytest.raises(CheckpointError, match=r"has experts \[4, 8\]"):
        moe_llava.moe_config(uneven, 4)
    early = {"moe_layers_idx": [0, 2], "num_experts": [4, 4]}
    with pytest.raises(CheckpointError, match=r"up to the last"):
        moe_llava.moe_config(early, 8)
    with pytest.raises(CheckpointError, match=r"use_residual = True"):
        moe_llava.moe_config(early | {"use_residual": True}, 4)
    with pytest.raises(CheckpointError, match=r"activation = 'gelu'"):
        tamm.moe_config({"activation": "gelu"})
    mixed = {"input_dim": 8, "regnet_activation": "silu", "pooler_output_shape": (2, 2)}
    with pytest.raises(CheckpointError, match=r"feed_forward_activation = 'relu'"):
        tamm.pooler_config(mixed)


def test_a_read_config_survives_our_own_json():
    """Lists from a hub file must not make two equal configs differ."""
    tower = hub_config("moe_llava_stablelm/tower")
    config = moe_llava.config(hub_config("moe_llava_stablelm"), tower)
    assert MM1Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
