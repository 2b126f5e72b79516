"""verify: a model against its original in PyTorch, stage by stage."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import VISION, small_model
from test_parts import tamm_folder
from test_quantization import mlx_lm_folder

from convert.__main__ import main
from convert.conversion import convert
from convert.verify import Stage, Verification, table
from helpers import FIXTURES, need
from mm1_mlx.checkpoint.folder import read_weights
from mm1_mlx.config import ConnectorConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.quantization.recipes import Recipe


def verified(source, model, *more, tower=None):
    need("torch"), need("transformers")
    from mm1_mlx.convert.verify import verify

    return verify(FIXTURES / source, model, *more, tokens=6, tower=tower)


@pytest.mark.parametrize(
    "folder, tower",
    [
        ("llava15/hf5", None),
        ("llava15/original", "llava15/tower"),
        ("llava16", "llava16/tower"),
        ("vl360", "vl360/tower"),
        ("honeybee/last_old", None),
        ("moe_llava_stablelm", "moe_llava_stablelm/tower"),
        ("auroracap", None),
        ("decoder_qwen15_moe", None),
        ("decoder_phi2", None),
    ],
)
def test_a_conversion_is_verified_stage_by_stage(folder, tower, tmp_path):
    tower = FIXTURES / tower if tower else None
    convert(FIXTURES / folder, tmp_path / "ours", dtype="float32", tower=tower)
    text, images = "1 5 6 7 9 10", None
    if not folder.startswith("decoder"):
        text, images = "1 5 6 <image> 7 9", ["examples/shapes.png"]
    found = verified(folder, tmp_path / "ours", text, images, tower=tower)
    assert found.passed, found.first_difference
    assert max(stage.relative for stage in found.stages) < 5e-5
    names = [stage.name for stage in found.stages]
    assert names[-1] == "logits" and "decoder layer 1" in names
    if images:
        assert names[:2] == ["pixels", "patch embedding"] and "connector" in names


@pytest.mark.parametrize(
    "folder", ["openclip_vit_h/open_clip", "openclip_vit_h/hf5", "siglip", "aimv2/hf"]
)
def test_an_encoder_is_verified_layer_by_layer(folder, tmp_path):
    convert(FIXTURES / folder, tmp_path / "ours", dtype="float32")
    found = verified(folder, tmp_path / "ours", "", ["examples/shapes.png"])
    assert found.passed, found.first_difference
    names = [stage.name for stage in found.stages]
    assert names[:2] == ["pixels", "patch embedding"] and len(names) > 4
    assert max(stage.relative for stage in found.stages) < 5e-5
    with pytest.raises(CheckpointError, match="give it a picture"):
        verified(folder, tmp_path / "ours", "", [])


@pytest.mark.parametrize(
    "folder, tower",
    [
        ("llava15/hf5", None),
        ("llava16", "llava16/tower"),
        ("vl360", "vl360/tower"),
        ("honeybee/last", None),
        ("moe_llava_stablelm", "moe_llava_stablelm/tower"),
        ("decoder_llama3/config5", None),
        ("decoder_mixtral", None),
        ("decoder_olmoe", None),
        ("decoder_phi2", None),
        ("decoder_qwen15_moe", None),
        ("decoder_qwen3", None),
    ],
)
def test_our_own_code_in_torch_agrees(folder, tower, tmp_path):
    """A folder of ours as the original of itself: MM1 in PyTorch against MLX."""
    tower = FIXTURES / tower if tower else None
    ours = tmp_path / "ours"
    convert(FIXTURES / folder, ours, dtype="float32", tower=tower)
    text, images = "1 5 6 7 9 10", None
    if not folder.startswith("decoder"):
        text, images = "1 5 6 <image> 7 9", ["examples/shapes.png"]
    found = verified(ours, ours, text, images)
    assert found.passed, found.first_difference
    assert max(stage.relative for stage in found.stages) < 5e-5
    assert found.reference.startswith("our own code in PyTorch")


CONNECTORS = [
    {"type": "average_pool", "num_query_tokens": 4, "norm_input": True},
    {"type": "attention_pool", "num_query_tokens": 3, "num_attention_heads": 2},
    {"type": "c_abstractor", "num_query_tokens": 4, "norm_output": True, "depth": 1},
    {
        "type": "c_abstractor",
        "num_query_tokens": 4,
        "variant": "tamm",
        "pooling": "strided",
        "hidden_act": "relu",
        "norm_bias": False,
        "squeeze_bias": False,
        "num_eos_tokens": 2,
    },
]


@pytest.mark.parametrize("connector", CONNECTORS, ids=lambda c: c["type"])
@pytest.mark.parametrize(
    "vision",
    [
        {"norm_in": "patches", "feature_norm": True, "norm_bias": False},
        {"norm_in": "embed", "norm_type": "rms_norm", "gated_mlp": True},
        {"norm_in": "all", "class_token": False, "feature_layer": -2},
    ],
    ids=lambda v: v["norm_in"],
)
def test_every_connector_and_encoder_in_torch(connector, vision, tmp_path):
    settings = {"type": "mlp", "hidden_size": 24, **connector}
    model = small_model(
        seed=3,
        connector_config=ConnectorConfig(**settings),
        vision_config=replace(VISION, **vision),
    )
    folder = tmp_path / "ours"
    weights = {
        name: array + 0.1 * mx.random.normal(array.shape)
        for name, array in tree_flatten(model.parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = model.config.to_dict()
    size = {"size": model.config.vision_config.image_size}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    found = verified(folder, folder, "1 5 <image> 7", ["examples/shapes.png"])
    assert found.passed, found.first_difference
    assert max(stage.relative for stage in found.stages) < 5e-5


def test_an_mm1_of_torch_is_verified(tmp_path):
    """The source mm1_torch: its spelling on one side, the converted model on the other;
    and what MM1 in PyTorch calls its weights is a spelling that it reads."""
    torch = need("torch")
    from convert.references.mm1 import Connector, Decoder, Encoder

    config = small_model(seed=1).config
    parts = {
        "vision": Encoder(config.vision_config),
        "connector": Connector(
            config.connector_config,
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.vision_config.num_patches,
        ),
        "decoder": Decoder(config.text_config),
    }
    arrays = {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(arrays, folder / "model.pt")
    values = config.to_dict() | {"model_type": "mm1_torch"}
    (folder / "config.json").write_text(json.dumps(values))
    convert(folder, tmp_path / "ours", dtype="float32")
    found = verified(
        folder, tmp_path / "ours", "1 5 <image> 7", ["examples/shapes.png"]
    )
    assert found.passed, found.first_difference


def test_a_vision_transformer_of_tamm_is_verified(tmp_path):
    folder = tamm_folder("vision", "tamm_vit", tmp_path / "eyes")
    convert(folder, tmp_path / "ours", dtype="float32")
    found = verified(folder, tmp_path / "ours", "", ["examples/shapes.png"])
    assert found.passed, found.first_difference


def test_verification_says_where_it_begins(tmp_path):
    ours = tmp_path / "ours"
    convert(FIXTURES / "llava15/hf5", ours, dtype="float32")
    weights = dict(read_weights(ours))
    mx.eval(weights)
    name = "decoder.layers.2.attn.o_proj.weight"
    weights[name] = weights[name] * 1.05
    mx.save_safetensors(str(ours / "model.safetensors"), weights)
    found = verified("llava15/hf5", ours, "1 5 6 <image> 7 9", ["examples/shapes.png"])
    assert not found.passed
    assert found.first_difference.name == "decoder layer 2"
    values = found.to_dict()
    assert values["first_difference"] == "decoder layer 2"
    assert json.loads(json.dumps(values)) == values


def test_the_command_verifies(tmp_path, capsys):
    need("torch"), need("transformers")
    ours = tmp_path / "ours"
    convert(FIXTURES / "decoder_qwen2", ours)
    flags = ["--source", str(FIXTURES / "decoder_qwen2"), "--model", str(ours)]
    done = main(["verify", *flags, "-p", "4 5 6", "--tokens", "3"])
    shown = capsys.readouterr().out
    assert done == 0, shown
    assert "greedy tokens: the first 3 of 3 are the same" in shown


@pytest.mark.parametrize("name", ["llama3/config4", "mixtral", "qwen15_moe"])
def test_a_packed_original_is_unpacked_for_the_reference(name, tmp_path):
    """Both sides have the same numbers then, so the usual tolerance counts."""
    _, folder = mlx_lm_folder(FIXTURES / f"decoder_{name}", tmp_path / "mlx", 4)
    convert(folder, tmp_path / "ours")
    found = verified(folder, tmp_path / "ours", "1 5 6 7 9 10")
    assert found.judged and found.passed, found.first_difference
    assert max(stage.relative for stage in found.stages) < 5e-5


def test_a_quantized_model_is_not_judged(tmp_path, capsys):
    need("torch"), need("transformers")
    source, ours = FIXTURES / "llava15/hf5", tmp_path / "ours"
    convert(source, ours, quantize=Recipe(bits=2, group_size=32))
    flags = ["--source", str(source), "--model", str(ours), "-p", "1 <image> 7 8"]
    done = main(["verify", *flags, "--image", "examples/shapes.png", "--tokens", "8"])
    shown = capsys.readouterr().out
    assert done == 0, shown
    assert "mm1_mlx quantize --compare" in shown and "above" not in shown
    rows = {line.split("  ")[0]: line.split()[-1] for line in shown.splitlines()}
    assert rows["pixels"] == "1e-05" and rows["logits"] == "-"


def test_wrong_pixels_of_tiles_are_seen(tmp_path):
    """Tiles that are cut from another canvas are not the original's."""
    tower, ours = FIXTURES / "llava16/tower", tmp_path / "ours"
    convert(FIXTURES / "llava16", ours, dtype="float32", tower=tower)
    path = ours / "config.json"
    config = json.loads(path.read_text())
    config["tiling_config"]["pad_color"] = [255, 0, 0]
    path.write_text(json.dumps(config))
    picture = np.random.default_rng(0).integers(0, 256, (40, 100, 3), np.uint8)
    found = verified("llava16", ours, "1 5 <image> 7", [picture], tower=tower)
    assert found.first_difference.name == "pixels"


def test_computed_weights_are_judged_by_their_type(tmp_path):
    """360VL's table of tile positions is resized and then rounded to its 16 bits."""
    tower, ours = FIXTURES / "vl360/tower", tmp_path / "ours"
    convert(FIXTURES / "vl360", ours, tower=tower)
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (90, 60, 3), np.uint8)
    found = verified("vl360", ours, "1 7 <image> 9", [picture], tower=tower)
    assert found.passed and found.stages[-1].tolerance > 1e-3
    convert(FIXTURES / "llava15/hf4", tmp_path / "copy")  # float16, as it is
    found = verified("llava15/hf4", tmp_path / "copy", "1 7 <image> 9", [picture])
    assert found.passed and found.stages[-1].tolerance == 1e-3


def test_a_weight_of_another_shape_is_named(tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(FIXTURES / "decoder_qwen2", folder)
    convert(folder, tmp_path / "ours")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] //= 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"8 misshaped: .*mlp\.down_proj"):
        verified(folder, tmp_path / "ours", "1 5 6")


def test_the_table_says_where_answers_part():
    stages = [Stage("logits", 0.001, 2.0, 0.01)]
    shown = table(Verification(stages, [4, 5, 6], [4, 5, 7]))
    assert "the first 2 of 3 are the same" in shown
    assert "differ from token 3 on, with every stage within its tolerance" in shown
