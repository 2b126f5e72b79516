"""mm1_mlx.config: strict reading, round trips, and one test per message."""

import dataclasses
import json
import subprocess
import sys

import pytest

from mm1_mlx.config import (
    ConnectorConfig,
    DecoderConfig,
    MM1Config,
    MoEConfig,
    VisionConfig,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import PRESETS

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 42,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def mm1(**changes):
    values = {
        "vision_config": VISION,
        "connector_config": {"type": "average_pool", "num_query_tokens": 4},
        "text_config": TEXT,
        "image_token_id": 3,
    }
    return MM1Config.from_dict(values | changes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    config = PRESETS[name]
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_nested_values_become_configs():
    config = mm1(text_config=TEXT | {"moe_config": {"num_local_experts": 4}})
    assert isinstance(config.vision_config, VisionConfig)
    assert isinstance(config.connector_config, ConnectorConfig)
    assert config.text_config.moe_config == MoEConfig(num_local_experts=4)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mm1().image_token_id = 4  # type: ignore[misc]


def test_derived_sizes():
    vision = VisionConfig(**VISION | {"image_size": 50})
    assert (vision.grid, vision.num_patches, vision.size_per_head) == (3, 9, 8)
    text = DecoderConfig(**TEXT | {"head_dim": 20, "partial_rotary_factor": 0.4})
    assert (text.kv_heads, text.size_per_head, text.rotary_dims) == (4, 20, 8)
    connector = {"type": "average_pool", "num_query_tokens": 4, "num_eos_tokens": 2}
    assert mm1(connector_config=connector).tokens_per_image == 6
    every = {"type": "mlp", "num_query_tokens": None}
    assert mm1(connector_config=every).tokens_per_image == 9
    assert mm1(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert mm1(eos_token_id=2).eos_token_ids == (2,)
    assert mm1().eos_token_ids == ()


def test_sparse_layers():
    second = MoEConfig(num_local_experts=4)
    assert [i for i in range(8) if second.is_sparse(i)] == [1, 3, 5, 7]
    fourth = MoEConfig(num_local_experts=4, sparse_step=4, first_sparse_layer=3)
    assert [i for i in range(12) if fourth.is_sparse(i)] == [3, 7, 11]
    assert not DecoderConfig(**TEXT).is_sparse(1)


def test_widths_of_the_two_c_abstractors():
    honeybee = ConnectorConfig(type="c_abstractor")
    assert honeybee.inner_width(1280) == 1024
    assert honeybee.squeeze_width(1280) == 320  # mm1-facts: of the block's input
    assert honeybee.readout_width(4096) == 4096
    tamm = ConnectorConfig(
        type="c_abstractor", variant="tamm", hidden_size=40, squeeze_ratio=1 / 16
    )
    assert tamm.inner_width(48) == 48
    assert [tamm.squeeze_width(w) for w in (48, 40, 32)] == [3, 3, 2]
    assert tamm.readout_width(56) == 40


VISION_MISTAKES = [
    ({"hidden_size": "32"}, r"hidden_size is '32', but must be a whole number\.$"),
    ({"hidden_size": None}, r"hidden_size is None, but must be a whole number\.$"),
    ({"hidden_size": 2**40}, r"hidden_size is 1099511627776, but must be at most"),
    ({"head_dim": 0}, r"head_dim is 0, but must be a whole number of at least 1"),
    ({"head_dim": "8"}, r"head_dim is '8', but must be a whole number or null\.$"),
    ({"num_channels": 1}, r"num_channels is 1, but must be 3: pictures are read as"),
    ({"gated_mlp": "no"}, r"gated_mlp is 'no', but must be true or false\.$"),
    ({"class_token": 1}, r"class_token is 1, but must be true or false"),
    ({"norm_eps": "1e-5"}, r"norm_eps is '1e-5', but must be a finite number\.$"),
    ({"norm_eps": float("nan")}, r"norm_eps is nan, but must be a finite number"),
    ({"norm_eps": float("inf")}, r"norm_eps is inf, but must be a finite number"),
    ({"norm_eps": 10**400}, r"norm_eps is 1000+\.\.\., but must be a finite number"),
    ({"norm_eps": False}, r"norm_eps is False, but must be a finite number"),
    ({"norm_eps": 0}, r"norm_eps is 0, but must be above 0"),
    ({"hidden_act": 3}, r"hidden_act is 3, but must be a text\.$"),
    ({"norm_in": ["all"]}, r"norm_in is \['all'\], but must be a text or null\.$"),
    (
        {"feature_norm": True, "norm_out": False},
        r"feature_norm is True, but must be false where norm_out is false",
    ),
    ({3: 4}, r"vision_config: unknown keys \[3\]\."),
    ({"hidden_size": 0}, r"hidden_size is 0, but must be a whole number"),
    ({"num_hidden_layers": True}, r"num_hidden_layers is True, but must be a whole"),
    ({"image_size": 42.0}, r"image_size is 42\.0, but must be a whole number"),
    ({"hidden_act": "tanh"}, r"hidden_act is 'tanh', but must be one of 'quick_gelu'"),
    ({"norm_type": "batch"}, r"norm_type is 'batch'"),
    ({"norm_in": "cls"}, r"norm_in is 'cls'"),
    ({"num_attention_heads": 5}, r"32, but must be a multiple of num_attention_heads"),
    ({"image_size": 13}, r"image_size is 13, but must be at least patch_size \(14\)"),
    ({"feature_layer": -3}, r"feature_layer is -3, but must be between -2 and -1"),
    ({"feature_layer": 0}, r"feature_layer is 0"),
    ({"heads": 4}, r"vision_config: unknown keys \['heads'\]\. Known keys: \["),
]


@pytest.mark.parametrize("change, message", VISION_MISTAKES)
def test_mistakes_in_the_vision_config(change, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig.from_dict(VISION | change)


CONNECTOR_MISTAKES = [
    ({}, r"connector_config: missing keys \['type'\]"),
    ({"type": None}, r"type is None, but must be a text\.$"),
    ({"type": "average_pool", "num_query_tokens": None}, r"num_query_tokens is None"),
    ({"type": "c_abstractor", "depth": -1}, r"depth is -1, but must be 0 or more"),
    ({"type": "mlp", "num_query_tokens": None, "mlp_depth": 1.0}, r"mlp_depth is 1\.0"),
    (
        {"type": "mlp", "num_query_tokens": None, "num_eos_tokens": -1},
        r"num_eos_tokens is -1, but must be 0 or more",
    ),
    ({"type": "c_abstractor", "squeeze_ratio": 0}, r"squeeze_ratio is 0, but must be "),
    ({"type": "c_abstractor", "norm_eps": -1e-5}, r"norm_eps is -1e-05, but must be a"),
    (
        {"type": "attention_pool", "hidden_size": 40},
        r"hidden_size is 40, but must be a multiple of num_attention_heads \(16\)",
    ),
    ({"type": "attention_pool", "depth": 0}, r"depth is 0, but must be at least 1 for"),
    ({"type": "q_former"}, r"type is 'q_former', but must be one of 'average_pool'"),
    ({"type": "mlp"}, r"num_query_tokens is 144, but an 'mlp' connector keeps every"),
    ({"type": "average_pool", "num_query_tokens": 10}, r"is 10, but 'average_pool'"),
    ({"type": "attention_pool", "num_query_tokens": 0}, r"num_query_tokens is 0"),
    ({"type": "c_abstractor", "pooling": "max"}, r"pooling is 'max'"),
    ({"type": "c_abstractor", "variant": "timm"}, r"variant is 'timm'"),
    ({"type": "c_abstractor", "hidden_act": "x"}, r"connector_config\.hidden_act"),
    ({"type": "c_abstractor", "mlp_depth": 0}, r"mlp_depth is 0"),
]


@pytest.mark.parametrize("values, message", CONNECTOR_MISTAKES)
def test_mistakes_in_the_connector_config(values, message):
    with pytest.raises(ConfigError, match=message):
        ConnectorConfig.from_dict(values)


def test_attention_pool_takes_any_number_of_tokens():
    ConnectorConfig(type="attention_pool", num_query_tokens=10)


MOE_MISTAKES = [
    ({"norm_topk_prob": "yes"}, r"norm_topk_prob is 'yes', but must be true or false"),
    ({"moe_intermediate_size": 0}, r"moe_intermediate_size is 0, but must be a whole"),
    ({"shared_expert_intermediate_size": -1}, r"size is -1, but must be 0 or more"),
    ({"router_aux_loss_coef": -0.1}, r"aux_loss_coef is -0\.1, but must be 0 or more"),
    ({"router_z_loss_coef": "x"}, r"z_loss_coef is 'x', but must be a finite number"),
    ({"capacity_factor": "2"}, r"factor is '2', but must be a finite number or null"),
    ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5, .* \(4\)"),
    ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0"),
    ({"num_local_experts": 1025}, r"experts is 1025, but must be at most 1024"),
    ({"sparse_step": 0}, r"sparse_step is 0"),
    ({"first_sparse_layer": -1}, r"first_sparse_layer is -1, but must be 0 or more"),
    ({"capacity_factor": 0.0}, r"capacity_factor is 0\.0, but must be above 0"),
    ({"top_k": 2}, r"moe_config: unknown keys \['top_k'\]"),
]


@pytest.mark.parametrize("change, message", MOE_MISTAKES)
def test_mistakes_in_the_moe_config(change, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig.from_dict({"num_local_experts": 4} | change)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

TEXT_MISTAKES = [
    ({"vocab_size": -1}, r"text_config\.vocab_size is -1"),
    ({"qk_norm": "layer"}, r"qk_norm is 'layer', but must be one of None"),
    ({"num_attention_heads": 3}, r"or head_dim must be given"),
    ({"num_key_value_heads": 3}, r"is 4, but must be a multiple of .* \(3\)"),
    ({"partial_rotary_factor": 0}, r"partial_rotary_factor is 0, but must be above 0"),
    ({"partial_rotary_factor": 1.5}, r"above 0 and at most 1"),
    ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.rope_type is 'yarn'"),
    ({"rope_scaling": {}}, r"rope_scaling\.rope_type is None"),
    ({"rope_scaling": "linear"}, r"rope_scaling is 'linear', but must be an object of"),
    ({"rope_scaling": {"rope_type": []}}, r"rope_scaling\.rope_type is \[\]"),
    (
        {"rope_scaling": {"rope_type": "linear"}},
        r"rope_scaling: missing keys \['factor",
    ),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        r"text_config\.rope_scaling: missing keys \['high_freq_factor', 'low_freq_fact",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        r"rope_scaling\.factor is '2', but must be a number above 0",
    ),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor is 0"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 1e6}},
        r"text_config\.rope_scaling: unknown keys \['rope_theta'\]",
    ),
    (
        {"rope_scaling": {"type": "llama3", "rope_type": "linear", "factor": 2}},
        r"rope_scaling\.type is 'llama3', but must be 'linear' as rope_type is",
    ),
    (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        r"high_freq_factor is 1\.0, but must be above low_freq_factor \(1\.0\)",
    ),
    ({"rope_theta": 0}, r"rope_theta is 0, but must be above 0"),
    ({"rope_theta": "1e4"}, r"rope_theta is '1e4', but must be a finite number"),
    (
        {"head_dim": 6, "partial_rotary_factor": 0.5},
        r"partial_rotary_factor \(0\.5\) of head_dim \(6\) is 3 rotary dimensions, but",
    ),
    ({"head_dim": 7}, r"of head_dim \(7\) is 7 rotary dimensions, but must be an even"),
    ({"partial_rotary_factor": 0.1}, r"is 0 rotary dimensions, but must be an even"),
    ({"partial_rotary_factor": None}, r"factor is None, but must be a finite number"),
    ({"head_dim": 0}, r"head_dim is 0, but must be a whole number of at least 1"),
    ({"num_key_value_heads": 0}, r"num_key_value_heads is 0, but must be a whole"),
    ({"num_key_value_heads": -2}, r"num_key_value_heads is -2, but must be a whole"),
    ({"moe_config": 3}, r"moe_config is 3, but must be an object of keys and values"),
    ({"gated_mlp": "no"}, r"text_config\.gated_mlp is 'no', but must be true or false"),
    (
        {"lm_head_bias": True, "tie_word_embeddings": True},
        r"lm_head_bias is True, but must be false where tie_word_embeddings is true",
    ),
    ({"num_attention_heads": "4"}, r"num_attention_heads is '4', but must be a whole"),
    ({"moe_config": {"experts": 4}}, r"moe_config: unknown keys \['experts'\]"),
]


@pytest.mark.parametrize("change, message", TEXT_MISTAKES)
def test_mistakes_in_the_text_config(change, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_dict(TEXT | change)


def test_mistakes_in_the_whole():
    with pytest.raises(ConfigError, match=r"config\.model_type is 'llava'.*converted"):
        mm1(model_type="llava")
    with pytest.raises(ConfigError, match=r"image_token_id is -200"):
        mm1(image_token_id=-200)
    with pytest.raises(ConfigError, match=r"config: unknown keys \['seed'\]"):
        mm1(seed=1)
    # A folder of another family: not a list of all its keys, but what to do.
    llava = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    with pytest.raises(ConfigError, match=r"model_type is 'llava'.*converted"):
        MM1Config.from_dict(llava)
    with pytest.raises(ConfigError, match=r"config: missing keys \['text_config'\]"):
        MM1Config.from_dict({})
    with pytest.raises(ConfigError, match=r"vision_config is \[\], but must be an obj"):
        VisionConfig.from_dict([])  # type: ignore[arg-type]


POOLED = {"num_query_tokens": 16, "pooling": "strided"}  # the encoder has 3 x 3
WHOLE_MISTAKES = [
    ({"connector_config": "x"}, r"config\.connector_config is 'x', but must be an obj"),
    (
        {"vision_config": None},
        r"image_token_id but no vision_config: give all",
    ),
    ({"image_token_id": 3.0}, r"image_token_id is 3\.0, but must be a whole number"),
    ({"bos_token_id": -1}, r"bos_token_id is -1, but must be 0 or more"),
    ({"pad_token_id": "0"}, r"pad_token_id is '0', but must be a whole number or null"),
    (
        {"eos_token_id": "</s>"},
        r"eos_token_id is '</s>', but must be a whole number or a list of whole number",
    ),
    ({"eos_token_id": [2, "3"]}, r"eos_token_id is \[2, '3'\], but must be a whole"),
    ({"eos_token_id": True}, r"eos_token_id is True, but must be a whole number or a"),
    ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\], but must be between 0"),
    ({"quantization": "4bit"}, r"quantization is '4bit', but must be an object of key"),
    ({"quantization": {}}, r"config\.quantization: missing keys \['bits'\]"),
    ({"quantization": {"bits": 4, "q": 1}}, r"quantization: unknown keys \['q'\]\. Kn"),
    (
        {"quantization": {"bits": 7}},
        r"quantization\.bits is 7, but must be one of 1, 2",
    ),
    ({"quantization": {"bits": True}}, r"quantization\.bits is True, but must be one"),
    (
        {"quantization": {"bits": 4, "group_size": 48}},
        r"group_size is 48, but must be one of 32, 64, 128 in the mode 'affine'",
    ),
    ({"quantization": {"bits": 4, "mode": "gptq"}}, r"mode is 'gptq', but must be one"),
    ({"quantization": {"bits": 8, "mode": "mxfp4"}}, r"bits is 8, .*'mxfp4'"),
    ({"extra": []}, r"config\.extra is \[\], but must be an object of keys and values"),
    (
        {"connector_config": POOLED | {"type": "average_pool"}},
        r"num_query_tokens is 16, but 'strided' pooling gives at most the encoder's 3",
    ),
    (
        {"connector_config": {"type": "c_abstractor", "squeeze_ratio": 0.01}},
        r"squeeze_ratio is 0\.01, but must be large enough to leave a channel of 32",
    ),
]


@pytest.mark.parametrize("change, message", WHOLE_MISTAKES)
def test_values_of_the_whole(change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        mm1(**change)
    assert "\n" not in str(raised.value)


def test_a_long_value_is_cut_short():
    with pytest.raises(
        ConfigError, match=r"is \['x{75}\.\.\., but must be a text"
    ) as found:
        VisionConfig(**VISION | {"hidden_act": ["x" * 500]})
    assert len(str(found.value)) < 250


GOOD = [
    {"rope_theta": 500000, "norm_eps": 1},  # JSON does not tell 1 from 1.0
    {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}},
    {"rope_scaling": LLAMA3},
    {"head_dim": 6, "partial_rotary_factor": 0.67},
    {"num_key_value_heads": 1},
]


@pytest.mark.parametrize("change", GOOD)
def test_what_makes_sense_is_taken(change):
    config = DecoderConfig.from_dict(TEXT | change)
    assert DecoderConfig.from_dict(config.to_dict()) == config
    assert all(getattr(config, key) == value for key, value in change.items())


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_the_default_rope_scaling_is_none(key):
    plain = DecoderConfig.from_dict(TEXT | {"rope_scaling": {key: "default"}})
    assert plain == DecoderConfig.from_dict(TEXT)


def test_strided_pooling_to_no_more_than_the_grid():
    nine = {"type": "average_pool", "num_query_tokens": 9, "pooling": "strided"}
    assert mm1(connector_config=nine).tokens_per_image == 9
    larger = {"type": "average_pool", "num_query_tokens": 16}  # adaptive repeats
    assert mm1(connector_config=larger).tokens_per_image == 16


def test_types_are_checked_in_python_too():
    """Not only what comes from a file: the same checks for VisionConfig(...)."""
    with pytest.raises(ConfigError, match="gated_mlp is 'no'"):
        VisionConfig(**VISION, gated_mlp="no")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"text_config is VisionConfig\(.*\.\.\., but"
    ):
        mm1(text_config=VisionConfig(**VISION))


def test_every_annotation_is_one_that_is_checked():
    """A new kind of annotation would need a new check."""
    from mm1_mlx.config_checks import _WORDS, Strict, _kinds

    for config in (VisionConfig, ConnectorConfig, MoEConfig, DecoderConfig, MM1Config):
        for name, kinds in _kinds(config):
            for kind in kinds:
                known = kind in _WORDS or issubclass(kind, Strict)
                assert known, f"{config.__name__}.{name}"


def test_importing_it_loads_no_arrays():
    code = "import sys, mm1_mlx.config; print({'mlx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
