"""Assembly, upcycling, export, verification, and checkpoints that load converts."""

import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert import assemble as assembly
from convert.__main__ import main
from convert.conversion import convert
from convert.export import export, hub_config
from convert.upcycle import upcycle
from helpers import FIXTURES, assert_close, need, run_cli, run_python
from mm1_mlx import load
from mm1_mlx.checkpoint.folder import read_config, read_weights
from mm1_mlx.config import ConnectorConfig, TilingConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_encoder, load_model

IDS = mx.array([[5, 9, 17, 200, 33, 8]])

# --- Upcycling -----------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "folder", ["decoder_llama3/config5", "llava15/hf4", "decoder_phi2"]
)
def test_an_upcycled_model_answers_as_its_parent(folder, every, tmp_path):
    parent, child = tmp_path / "parent", tmp_path / "child"
    convert(FIXTURES / folder, parent, dtype="float32")
    upcycle(FIXTURES / folder, child, num_experts=4, every=every, dtype="float32")
    model = load_model(child)
    sparse = ["moe" in layer for layer in model.decoder.layers]
    assert sparse == [every == 1 or i % 2 == 1 for i in range(len(sparse))]
    assert_close(model(IDS), load_model(parent)(IDS), atol=1e-4)
    routers = [
        layer.moe.router.weight for layer in model.decoder.layers if "moe" in layer
    ]
    assert len(routers) == 1 or not mx.array_equal(routers[0], routers[1])


def test_one_of_our_own_folders_can_be_upcycled(tmp_path):
    parent, child = tmp_path / "parent", tmp_path / "child"
    convert(FIXTURES / "decoder_qwen2", parent, dtype="float32")
    flags = ["--num-experts", "3", "--top-k", "1", "--first", "0"]
    args = ["upcycle", "--model", str(parent), "--mlx-path", str(child), *flags]
    assert main(args) == 0
    assert_close(load_model(child)(IDS), load_model(parent)(IDS), atol=1e-4)
    made = json.loads((child / "config.json").read_text())["extra"]["upcycled"]
    assert made["num_experts"] == 3 and made["parent"]["source"] == "mm1"


@pytest.mark.parametrize(
    "folder, settings, message",
    [
        ("decoder_mixtral", {}, r"has experts already \(4\)"),
        ("siglip", {}, r"is an image encoder alone"),
        ("decoder_qwen2", {"first": 40}, r"none of \d+ has any"),
    ],
)
def test_what_cannot_be_upcycled(folder, settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        upcycle(FIXTURES / folder, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


# --- Assembly ------------------------------------------------------------------------


@pytest.mark.parametrize("kind, queries", [("c_abstractor", 9), ("mlp", None)])
def test_an_assembled_model_has_its_parts(kind, queries, tmp_path):
    out = tmp_path / "out"
    eyes, words = FIXTURES / "openclip_vit_h/open_clip", FIXTURES / "decoder_qwen3"
    connector = ConnectorConfig(type=kind, num_query_tokens=queries)
    assembly.assemble(eyes, words, out, connector=connector, dtype="float32")
    model, processor = load(out)
    convert(eyes, tmp_path / "eyes", dtype="float32")
    convert(words, tmp_path / "words", dtype="float32")
    shots = mx.array(
        np.random.default_rng(0).standard_normal((2, 70, 70, 3)), mx.float32
    )
    encoder, settings = load_encoder(tmp_path / "eyes")
    assert_close(model.vision(shots), encoder(shots), atol=0)
    assert_close(model(IDS), load_model(tmp_path / "words")(IDS), atol=0)
    assert processor.image_settings == settings
    tokens = model.connector(model.vision(shots))
    scale = mx.sqrt(mx.square(model.decoder.embed_tokens.weight).mean())
    found = mx.sqrt(mx.square(tokens).mean())
    assert_close(found, scale, atol=0.02 * float(scale))
    made = json.loads((out / "config.json").read_text())["extra"]["assembled"]
    assert made["vision"]["source"] == "open_clip_vit"
    assert made["decoder"]["source"] == "llama"


def tamm_folder(part: str, kind: str, place) -> Path:
    """A module of tamm as a folder: its weights, and its builder's arguments."""
    place.mkdir()
    arguments = json.loads((FIXTURES / "tamm" / "config.json").read_text())[part]
    config = arguments | {"model_type": kind}
    (place / "config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURES / "tamm" / part / "model.safetensors", place)
    return place


def test_an_encoder_and_a_connector_of_tamm(tmp_path):
    eyes = tamm_folder("vision", "tamm_vit", tmp_path / "eyes")
    bridge = tamm_folder("pooler", "tamm_c_abstractor", tmp_path / "bridge")
    values = np.load(FIXTURES / "tamm" / "expected.npz")
    convert(eyes, tmp_path / "encoder")
    encoder, settings = load_encoder(tmp_path / "encoder")
    assert settings.size == 84
    shots = mx.array(values["pixel_values"].transpose(0, 2, 3, 1))
    grid = encoder(shots)
    assert_close(grid, values["convolution_tokens"].reshape(grid.shape), atol=2e-5)
    with pytest.raises(CheckpointError, match=r"a connector alone .*assemble"):
        convert(bridge, tmp_path / "out")
    words = FIXTURES / "decoder_llama3/config5"  # of another width
    with pytest.raises(CheckpointError, match=r"2 misshaped: connector\.readout"):
        assembly.assemble(eyes, words, tmp_path / "out", connector=bridge)
    assert not (tmp_path / "out").exists()


def test_a_trained_connector_is_taken_over(tmp_path):
    model = FIXTURES / "llava15/hf4"
    out, whole = tmp_path / "out", tmp_path / "whole"
    convert(model, whole, dtype="float32")
    args = ["assemble", "--vision", str(model), "--decoder", str(model), "--connector"]
    flags = ["--mlx-path", str(out), "--dtype", "float32"]
    assert main([*args, str(whole), *flags]) == 0
    made, known = read_weights(out), read_weights(whole)
    assert made.keys() == known.keys()
    assert all(mx.array_equal(made[name], known[name]) for name in known)
    extra = json.loads((out / "config.json").read_text())["extra"]["assembled"]
    assert extra["connector"]["source"] == "mm1"
    assert main([*args, str(whole), *flags, "--num-query-tokens", "9"]) == 2


def test_the_command_assembles(tmp_path, capsys):
    parts = ["--vision", str(FIXTURES / "llava15/hf5")]
    parts += ["--decoder", str(FIXTURES / "decoder_mixtral")]
    flags = ["--mlx-path", str(tmp_path / "out"), "--num-query-tokens", "4"]
    assert main(["assemble", *parts, *flags, "--feature-layer", "-1"]) == 0
    assert "4 tokens per image" in capsys.readouterr().out
    model, _ = load(tmp_path / "out")  # the encoder of a whole model will do
    assert model.config.vision_config.feature_layer == -1


def test_parts_that_are_missing(tmp_path):
    siglip, qwen = FIXTURES / "siglip", FIXTURES / "decoder_qwen2"
    with pytest.raises(CheckpointError, match="is a decoder alone: it has no imag"):
        assembly.assemble(qwen, qwen, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is an image encoder alone: no decoder"):
        assembly.assemble(siglip, siglip, tmp_path / "out")


# --- Export --------------------------------------------------------------------------


def tower_of(folder):
    """The folder with the shape of the tower, of a fixture that only names it."""
    return FIXTURES / folder / "tower" if folder in ("llava16", "vl360") else None


@pytest.mark.parametrize(
    "folder",
    ["llava15/hf5", "auroracap", "decoder_llama3/config4", "decoder_qwen2",
     "decoder_qwen3", "decoder_mixtral", "decoder_vicuna/safetensors", "llava16",
     "vl360"],
)  # fmt: skip
def test_import_after_export_is_the_identity(folder, tmp_path):
    ours, hub, back = (tmp_path / name for name in ("ours", "hub", "back"))
    convert(FIXTURES / folder, ours, dtype="float32", tower=tower_of(folder))
    export(ours, hub)
    tower = hub / "vision_tower" if folder == "vl360" else None
    convert(hub, back, dtype="float32", tower=tower)
    first, second = read_weights(ours), read_weights(back)
    assert first.keys() == second.keys()
    for name, array in first.items():
        if name == "tile_connector.position_embedding":  # made smaller, and larger
            assert_close(second[name], array, atol=1e-7)
        else:
            assert mx.array_equal(array, second[name]), name
    shots = [f / "preprocessor_config.json" for f in (ours, back)]
    assert len({f.read_text() if f.exists() else "" for f in shots}) == 1
    configs = [json.loads((f / "config.json").read_text()) for f in (ours, back)]
    first_extra, extra = (config.pop("extra") for config in configs)
    if (
        folder == "auroracap"
    ):  # it comes back as a LLaVA, which says how it writes boxes
        assert configs[1].pop("box_config")["style"] == "llava"
        assert configs[0].pop("box_config") is None
    assert configs[0] == configs[1]
    assert list(extra) == ["converted", "exported", "converted 2"]
    assert extra["converted"] == first_extra["converted"]


def test_an_exported_folder_says_what_it_is(tmp_path, monkeypatch, capsys):
    source, ours, hub = (tmp_path / name for name in ("source", "ours", "hub"))
    shutil.copytree(FIXTURES / "decoder_qwen2", source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    convert(source, ours)
    flags = ["export", "--model", str(ours), "--hf-path", str(hub)]
    assert main(flags) == 0
    card = (hub / "README.md").read_text()
    assert "library_name: transformers" in card and "license: apache-2.0" in card
    assert "# A model for transformers" in card and "## Exported" in card
    assert "export --model ours --hf-path hub" in card and str(tmp_path) not in card
    assert main(flags) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert main([*flags[:-1], str(tmp_path / "full")]) == 1
    assert "1.0 kB are free on its disk" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "ours", "source"]


@pytest.mark.parametrize("folder", ["llava15/hf5", "decoder_mixtral", "decoder_qwen3"])
def test_transformers_reads_what_was_exported(folder, tmp_path):
    transformers, torch = need("transformers"), need("torch")
    ours, hub = tmp_path / "ours", tmp_path / "hub"
    convert(FIXTURES / folder, ours, dtype="float32")
    assert (
        main(["export", "--to", "hf", "--model", str(ours), "--hf-path", str(hub)]) == 0
    )
    kind = transformers.AutoModelForCausalLM
    if "llava" in folder:
        kind = transformers.LlavaForConditionalGeneration
    model, info = kind.from_pretrained(
        hub, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        wanted = model.eval()(torch.tensor(np.array(IDS))).logits
    assert_close(load_model(ours)(IDS), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "folder, message",
    [
        ("decoder_olmoe", "its experts are not like Mixtral's"),
        ("honeybee/last", "its connector is not LLaVA's MLP"),
        ("decoder_phi2", "its decoder is not like Llama"),
    ],
)
def test_what_cannot_be_exported(folder, message, tmp_path):
    convert(FIXTURES / folder, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "ours", tmp_path / "hub")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_360vl_in_its_own_layout(tmp_path):
    """Names, shapes and types are those of its authors; the numbers, too, but for the
    row that nobody reads and what two resizings of 16 bits round."""
    ours, hub = tmp_path / "ours", tmp_path / "hub"
    convert(FIXTURES / "vl360", ours, tower=tower_of("vl360"), dtype="bfloat16")
    assert main(["export", "--model", str(ours), "--hf-path", str(hub)]) == 0
    theirs, made = {}, read_weights(hub)
    for file in (FIXTURES / "vl360").glob("*.safetensors"):
        theirs |= mx.load(str(file))
    assert made.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (made[name].shape, made[name].dtype) == (array.shape, array.dtype), name
        if name.endswith("ctt.pos_emb"):
            largest = float(mx.abs(array).max())
            assert_close(made[name][:, 1:], array[:, 1:], atol=0.02 * largest)
        elif name.endswith("ori.pos_emb"):
            assert mx.array_equal(made[name][:, 1:], array[:, 1:])
        else:
            assert mx.array_equal(made[name], array), name
    written = json.loads((hub / "config.json").read_text())
    asked = json.loads((FIXTURES / "vl360" / "config.json").read_text())
    del asked["visual_projector_config"]["initializer_range"]
    for key in ("architectures", "mm_num_tokens", "visual_projector_config", "proj_2"):
        assert written[key] == asked[key]


def test_positions_that_were_trained_one_by_one_are_not_360vls(tmp_path):
    ours = tmp_path / "ours"
    convert(FIXTURES / "vl360", ours, tower=tower_of("vl360"), dtype="float32")
    weights = read_weights(ours)
    table = weights["tile_connector.position_embedding"]
    weights["tile_connector.position_embedding"] = table + 0.1 * mx.random.normal(
        table.shape, key=mx.random.key(0)
    )
    (file,) = ours.glob("*.safetensors")
    mx.save_safetensors(str(file), weights)
    with pytest.raises(CheckpointError, match="positions of its crops were trained"):
        export(ours, tmp_path / "hub")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    "folder, changed, message",
    [
        ("llava15/hf5", {"tiling_config": TilingConfig(type="dynamic")},
         r"how it cuts pictures \(dynamic\): only this folder can"),
        ("llava15/hf5", {"tiling_config": TilingConfig(type="sub_images")},
         r"how it cuts pictures \(sub_images\)"),
        ("llava16", {"tiling_config": TilingConfig(
            type="anyres", grids=[[1, 2]], overview="fit")}, "not padded as LLaVA-N"),
        ("vl360", {"tiling_config": TilingConfig(type="crops", grids=[[3, 3]])},
         "its tiling_config is not one that 360VL can have"),
        ("vl360", {"connector_config": {"norm_output": True}},
         "its connector_config is not one that 360VL can have"),
    ],
)  # fmt: skip
def test_tiles_that_no_layout_can_say(folder, changed, message, tmp_path):
    convert(FIXTURES / folder, tmp_path / "ours", tower=tower_of(folder))
    config = read_config(tmp_path / "ours")
    for key, value in changed.items():
        if isinstance(value, dict):
            value = replace(getattr(config, key), **value)
        config = replace(config, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        hub_config(config)


# --- Straight from load --------------------------------------------------------------


def test_load_converts_once_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("MM1_MLX_CACHE", str(tmp_path))
    lines = []
    model, processor = load(FIXTURES / "decoder_qwen2", tell=lines.append)
    assert "converting" in lines[0] and str(tmp_path) in lines[0]
    assert not processor.tokenizer.reads_text
    (made,) = tmp_path.iterdir()
    before = made.stat().st_mtime_ns
    lines.clear()
    again, _ = load(FIXTURES / "decoder_qwen2", tell=lines.append)
    assert not lines and made.stat().st_mtime_ns == before
    assert mx.array_equal(model(IDS), again(IDS))


def test_a_hub_id_that_is_converted_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("MM1_MLX_CACHE", str(tmp_path))

    class Unreachable:
        def model_info(self, *args, **settings):
            raise ConnectionError("no network")

    def download(repo, *, local_files_only=False, **settings):
        if repo == "org/other":
            raise FileNotFoundError("nothing was downloaded")
        return str(FIXTURES / "decoder_qwen2")

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    module.constants = types.SimpleNamespace(HF_HUB_OFFLINE=True)
    module.HfApi = Unreachable
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    first, _ = load("org/qwen")
    module.constants.HF_HUB_OFFLINE = False
    lines: list = []
    again, _ = load("org/qwen", tell=lines.append)
    assert not lines  # neither converted nor asked for
    assert_close(again(IDS), first(IDS), atol=0)
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        load("org/other")
    lines.clear()
    monkeypatch.setenv("MM1_MLX_CACHE", str(tmp_path / "empty"))
    load("org/third", tell=lines.append)  # from what an earlier download brought
    assert "converting org/third" in lines[0]


def test_the_command_answers_with_a_foreign_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # run_cli drops MM1_...
    folder = FIXTURES / "llava15" / "hf5"
    args = ("--model", folder, "--image", "examples/shapes.png", "-m", "4", "--quiet")
    done = run_cli("generate", *args, "-p", "1 5 <image> 6")
    assert done.returncode == 0, done.stderr
    assert "converting" in done.stderr
    assert "prompts and answers are token ids" in done.stderr
    assert len(done.stdout.split()) == 4
    words = run_cli("generate", *args, "-p", "hello <image>")
    assert words.returncode == 1
    assert "'hello' was found" in words.stderr
    text = run_cli(
        "generate", "--model", FIXTURES / "decoder_qwen2", *args[2:], "-p", "1 2"
    )
    assert "reads text only, but 1 image came with the prompt" in text.stderr


def test_python_m_convert_is_the_same_command():
    both = [
        run_python("-m", name, "--help").stdout
        for name in ("convert", "mm1_mlx.convert")
    ]
    assert both[0] == both[1] and "--hf-path" in both[0]
