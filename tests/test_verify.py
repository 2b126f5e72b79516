"""verify: a model against its original in PyTorch, stage by stage."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from test_quantization import mlx_lm_folder

from convert.__main__ import main
from convert.conversion import convert
from convert.verify import Stage, Verification, table
from helpers import FIXTURES, need
from mm1_mlx.checkpoint.folder import read_weights
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


def test_a_weight_of_another_shape_is_named(tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(FIXTURES / "decoder_qwen2", folder)
    convert(folder, tmp_path / "ours")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] //= 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp\..*shape"):
        verified(folder, tmp_path / "ours", "1 5 6")


def test_the_table_says_where_answers_part():
    stages = [Stage("logits", 0.001, 2.0, 0.01)]
    shown = table(Verification(stages, [4, 5, 6], [4, 5, 7]))
    assert "the first 2 of 3 are the same" in shown
    assert "differ from token 3 on, with every stage within its tolerance" in shown
