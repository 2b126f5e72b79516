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
    ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5, .* \(4\)"),
    ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0"),
    ({"sparse_step": 0}, r"sparse_step is 0"),
    ({"first_sparse_layer": -1}, r"first_sparse_layer is -1, but must be 0 or more"),
    ({"capacity_factor": 0.0}, r"capacity_factor is 0\.0, but must be above 0"),
    ({"top_k": 2}, r"moe_config: unknown keys \['top_k'\]"),
]


@pytest.mark.parametrize("change, message", MOE_MISTAKES)
def test_mistakes_in_the_moe_config(change, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig.from_dict({"num_local_experts": 4} | change)


TEXT_MISTAKES = [
    ({"vocab_size": -1}, r"text_config\.vocab_size is -1"),
    ({"qk_norm": "layer"}, r"qk_norm is 'layer', but must be one of None"),
    ({"num_attention_heads": 3}, r"or head_dim must be given"),
    ({"num_key_value_heads": 3}, r"is 4, but must be a multiple of .* \(3\)"),
    ({"partial_rotary_factor": 0}, r"partial_rotary_factor is 0, but must be above 0"),
    ({"partial_rotary_factor": 1.5}, r"above 0 and at most 1"),
    ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.rope_type is 'yarn'"),
    ({"rope_scaling": {}}, r"rope_scaling\.rope_type is None"),
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
    with pytest.raises(ConfigError, match=r"config: missing .*'image_token_id'"):
        MM1Config.from_dict({})
    with pytest.raises(ConfigError, match=r"vision_config is \[\], but must be an obj"):
        VisionConfig.from_dict([])  # type: ignore[arg-type]


def test_importing_it_loads_no_arrays():
    code = "import sys, mm1_mlx.config; print({'mlx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
