"""Quantized models: made here or by MLX's own tools, loaded, compared, reported."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from parity import expected
from small import random_array

from convert import numbers
from convert.conversion import convert
from helpers import FIXTURES, assert_close, assert_fails, need, need_tiny, run_python
from mm1_mlx import load
from mm1_mlx.checkpoint.folder import read_weights
from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.loading import damage_report, load_model, quantize
from mm1_mlx.models.moe import Experts, QuantizedStack
from mm1_mlx.quantization.damage import Trace, compare, record, table
from mm1_mlx.quantization.recipes import (
    MIXED,
    Recipe,
    part_of,
    parts_from_text,
    settings_for_config,
)
from mm1_mlx.quantize import main

TOWER = FIXTURES / "llava15/tower"

# --- Which weights -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, part",
    [
        ("vision.patch_embed.weight", None),
        ("vision.layers.3.attn.qkv_proj.weight", "encoder"),
        ("vision.layers.3.attn.qkv_proj.bias", None),
        ("vision.layers.3.norm1.weight", None),
        ("vision.position_embedding", None),
        ("connector.linear.0.weight", "connector"),
        ("connector.readout.1.weight", "connector"),
        ("connector.stage1.0.conv1.weight", None),
        ("decoder.embed_tokens.weight", "embeddings"),
        ("decoder.lm_head.weight", "head"),
        ("decoder.layers.0.attn.o_proj.weight", "attention"),
        ("decoder.layers.0.attn.q_norm.weight", None),
        ("decoder.layers.0.mlp.gate_up_proj.weight", "mlp"),
        ("decoder.layers.0.moe.experts.down_proj", "experts"),
        ("decoder.layers.0.moe.router.weight", None),
        ("decoder.layers.0.moe.shared_expert.down_proj.weight", "mlp"),
        ("decoder.layers.0.moe.shared_expert_gate.weight", None),
        ("decoder.norm.weight", None),
        ("image_newline", None),
    ],
)
def test_parts(name, part):
    assert part_of(name) == part


def chosen(recipe: Recipe, name: str, shape=(64, 128), layers: int = 16):
    found = recipe.chooser(layers)(name, shape)
    return None if found is None else (found["bits"], found["group_size"])


def test_what_a_recipe_chooses():
    mlp, router = "decoder.layers.0.mlp.down_proj.weight", "decoder.layers.0.moe.router"
    tower = "vision.layers.0.mlp.up_proj.weight"
    assert chosen(Recipe(), mlp) == (4, 64)
    assert chosen(Recipe(), mlp, (64, 96)) is None  # rows do not divide into groups
    assert chosen(Recipe(group_size=32), mlp, (64, 96)) == (4, 32)
    assert chosen(Recipe(mode="mxfp8"), mlp) == (8, 32)
    assert chosen(Recipe(mode="nvfp4"), mlp) == (4, 16)
    assert chosen(Recipe(bits=8), router + ".weight") is None
    assert chosen(Recipe(), tower) is None
    assert chosen(Recipe(parts={"encoder": 8}), tower) == (8, 64)
    assert chosen(Recipe(parts={"mlp": None}), mlp) is None
    assert chosen(Recipe(parts={"mlp": 3}), mlp) == (3, 64)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_recipes_give_mlx_lms_bits(name):
    """Against mlx-lm's own rule, layer by layer; our values share q and k's matrix."""
    need("mlx_lm")
    low, high = MIXED[name]
    layers = 13
    recipe = Recipe(mixed=name)
    for i in range(layers):
        eighth = layers // 8
        more = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
        for inner, wanted in (
            ("mlp.down_proj.weight", high if more else low),
            ("attn.qkv_proj.weight", high if more else low),
            ("attn.o_proj.weight", low),
            ("mlp.gate_up_proj.weight", low),
            ("moe.experts.down_proj", high if more else low),
            ("moe.experts.gate_up_proj", low),
        ):
            found = chosen(recipe, f"decoder.layers.{i}.{inner}", layers=layers)
            assert found == (wanted, 64), (i, inner)
    assert chosen(recipe, "decoder.lm_head.weight", layers=layers) == (high, 64)
    assert chosen(recipe, "decoder.embed_tokens.weight", layers=layers) == (low, 64)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mode": "int4"}, r"q-mode is 'int4', but must be one of 'affine'"),
        ({"bits": 7}, r"bits is 7, but must be one of"),
        ({"group_size": 48}, r"group_size is 48, but must be one of 32, 64, 128"),
        ({"mode": "mxfp4", "bits": 8}, r"bits is 8, but must be one of 4"),
        ({"mixed": "mixed_1_2"}, r"no recipe 'mixed_1_2'\. The recipes are: mixed_2_6"),
        ({"mixed": "mixed_3_6", "bits": 4}, r"has its own bits"),
        ({"parts": {"brain": 4}}, r"no part 'brain'\. The parts are: encoder"),
        ({"parts": {"experts": 7}}, r"bits is 7"),
    ],
)
def test_recipes_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)


def test_parts_as_text():
    assert parts_from_text(["experts=6", "encoder=16"]) == {
        "experts": 6,
        "encoder": None,
    }
    for text in ("experts", "experts=x", "x=4", "=4", "experts=-1"):
        with pytest.raises(ConfigError, match="must be PART=BITS"):
            parts_from_text([text])


def test_what_a_config_says():
    default, other = {"group_size": 64, "bits": 4}, {"group_size": 64, "bits": 8}
    found = settings_for_config({"a.weight": default, "b.weight": other}, default)
    assert found == default | {"b": other}


# --- Numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_casts_are_torchs(source, target, rng):
    torch = need("torch")
    kinds = {"F32": torch.float32, "F16": torch.float16}
    kinds |= {"BF16": torch.bfloat16, "F64": torch.float64}
    wide = rng.standard_normal(5000) * np.exp(rng.standard_normal(5000) * 8)
    wide[:6] = [np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4e38]
    tensor = torch.tensor(wide).to(kinds[source])

    def bits(t):
        return t.view(torch.int16).numpy().view(np.uint16)

    array = bits(tensor) if source == "BF16" else tensor.numpy()
    found = numbers.cast(array, source, target)
    wanted = tensor.to(kinds[target])
    wanted = bits(wanted) if target == "BF16" else wanted.numpy()
    np.testing.assert_array_equal(found, wanted)
    nan = numbers.cast(np.array([np.nan], np.float32), "F32", target)
    assert np.isnan(numbers.to_float32(nan, target)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 64, "bits": 3},
        {"group_size": 32, "bits": 6},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=str,
)
def test_slots_are_what_mlx_gives(settings, rng):
    block = rng.standard_normal((3, 5, 128)).astype(np.float32)
    made = numbers.quantize(block, "F32", settings)
    slots = numbers.quantized_slots(block.shape, "F32", settings)
    kinds = {"U32": np.uint32, "F32": np.float32, "U8": np.uint8}
    for array, (dtype, shape) in zip(made, slots.values(), strict=True):
        assert array.shape == shape and array.dtype == kinds[dtype]


# --- Modules -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_quantized_experts_are_those_of_the_unpacked_weights(bits, tokens):
    experts = Experts(4, 64, 128, "silu", gated=True)
    x, weights = random_array(tokens, 64, seed=1), random_array(tokens, 2, seed=2)
    chosen = mx.array(np.random.default_rng(0).integers(0, 4, (tokens, 2)), mx.uint32)
    how = {"group_size": 32, "bits": bits, "mode": "affine"}
    experts.quantize(dict.fromkeys(experts.stacks, how))
    assert isinstance(experts.down_proj, QuantizedStack)
    found = experts(x, weights, chosen)
    plain = Experts(4, 64, 128, "silu", gated=True)
    plain.gate_up_proj = experts.gate_up_proj.whole()
    plain.down_proj = experts.down_proj.whole()
    # The same numbers, summed in another order: values of order 0.1.
    assert_close(found, plain(x, weights, chosen), atol=2e-5)


# --- Folders -------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["decoder_mixtral", "llava15/hf5", "decoder_olmoe"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(bits=8, group_size=32),
        Recipe(group_size=32, parts={"experts": 8, "head": None}),
        Recipe(mode="mxfp8"),
        Recipe(mixed="mixed_4_6", group_size=32),
    ],
    ids=["8", "parts", "mxfp8", "mixed"],
)
def test_a_quantized_folder_is_the_one_that_mlx_makes(folder, recipe, tmp_path):
    """Unpacking what was written gives what mx.quantize gives for each weight."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    convert(FIXTURES / folder, plain, dtype="float32")
    convert(FIXTURES / folder, packed, dtype="float32", quantize=recipe)
    original, found = read_weights(plain), read_weights(packed)
    choose = recipe.chooser(load_model(plain).config.text_config.num_hidden_layers)
    count = 0
    for name, array in original.items():
        settings, stem = choose(name, array.shape), name.removesuffix(".weight")
        if settings is None:
            assert mx.array_equal(found[name], array), name
            continue
        count += 1
        for part, wanted in zip(
            ("weight", "scales", "biases"), mx.quantize(array, **settings), strict=False
        ):
            assert mx.array_equal(found[f"{stem}.{part}"], wanted), (name, part)
    assert count > 5
    model = load_model(packed)  # strict: every stored name has its place
    logits = model(mx.array([[5, 6, 7, 8]]))
    assert bool(mx.isfinite(logits).all())


def mlx_lm_folder(source: Path, out: Path, bits: int) -> tuple[object, Path]:
    """What mlx-lm writes of a checkpoint in `bits` bits, and its model."""
    utils = need("mlx_lm.utils")
    model, config = utils.load_model(source)
    model.set_dtype(mx.float32)
    model, config = utils.quantize_model(model, config, 32, bits)
    out.mkdir()
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    return model, out


@pytest.mark.parametrize(
    "name",
    ["llama3/config4", "qwen2", "qwen3", "mixtral", "olmoe", "qwen15_moe"],
)
def test_folders_of_mlx_lm_are_taken_as_they_are(name, tmp_path):
    name = f"decoder_{name}"
    theirs, folder = mlx_lm_folder(FIXTURES / name, tmp_path / "mlx", 4)
    out = tmp_path / "out"
    convert(folder, out)
    ids = mx.array(expected(name.partition("/")[0])["input_ids"].reshape(1, -1))
    found = load_model(out)(ids)
    assert_close(found, theirs(ids).astype(mx.float32), atol=5e-5)
    packed, ours = read_weights(folder), read_weights(out)
    q, k, v = (
        packed[f"model.layers.1.self_attn.{x}_proj.weight"] for x in ("q", "k", "v")
    )
    fused = ours["decoder.layers.1.attn.qkv_proj.weight"]
    assert mx.array_equal(fused, mx.concatenate([q, k, v]))  # bits, not numbers
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(folder, tmp_path / "again", quantize=Recipe())


def test_packed_weights_can_be_unpacked(tmp_path):
    theirs, folder = mlx_lm_folder(FIXTURES / "decoder_mixtral", tmp_path / "mlx", 6)
    convert(folder, tmp_path / "out", dequantize=True, dtype="float32")
    weights = read_weights(tmp_path / "out")
    assert not any(name.endswith("scales") for name in weights)
    ids = mx.array([[3, 4, 5, 6]])
    found = load_model(tmp_path / "out")(ids)
    assert_close(found, theirs(ids).astype(mx.float32), atol=5e-5)


def test_parts_of_one_matrix_in_different_bits(tmp_path):
    _, folder = mlx_lm_folder(FIXTURES / "decoder_qwen2", tmp_path / "mlx", 4)
    weights = read_weights(folder)
    stem = "model.layers.0.self_attn.v_proj"
    whole = mx.dequantize(
        *(weights[f"{stem}.{p}"] for p in ("weight", "scales", "biases")),
        group_size=32,
        bits=4,
    )
    parts = mx.quantize(whole, group_size=32, bits=6)
    for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
        weights[f"{stem}.{part}"] = array
    for path in folder.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["quantization"][stem] = {"group_size": 32, "bits": 6}
    values.pop("quantization_config", None)
    file.write_text(json.dumps(values))
    message = (
        r"quantized in different ways: q_proj 4 bits, k_proj 4 bits, v_proj 6 bits"
    )
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out", dequantize=True)
    values["quantization"].pop(stem)
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"v_proj: a weight of U32 .* cannot b"):
        convert(folder, tmp_path / "other")


# --- The command and its report ------------------------------------------------------


def test_the_command_quantizes_and_reports(tmp_path):
    need_tiny()
    out = tmp_path / "tiny-8"
    args = ("--model", "mm1-tiny", "--mlx-path", out, "--q-bits", "8")
    done = run_python("-m", "mm1_mlx.quantize", *args)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert "same likeliest token" in done.stdout and "decoder layer 3" in done.stdout
    model, _ = load(out)
    assert model.config.quantization["bits"] == 8
    again = run_python("-m", "mm1_mlx.quantize", *args)
    assert_fails(again, r"exists and is not empty")
    wrong = run_python(
        "-m", "mm1_mlx.quantize", *args[:3], tmp_path / "x", "--q-bits", "9"
    )
    assert wrong.returncode == 2


def test_damage_grows_as_bits_shrink(tmp_path):
    need_tiny()
    model, processor = load("mm1-tiny")
    before = record(model, processor)
    reports = []
    for bits in (8, 4, 2):
        out = tmp_path / str(bits)
        quantize("mm1-tiny", out, Recipe(bits=bits))
        reports.append(compare(before, record(*load(out))))
    for part in ("decoder.0", "decoder.3"):
        errors = [report["parts"][part] for report in reports]
        assert errors == sorted(errors) and errors[0] < 0.05 < errors[2]
    means = [report["kl"]["mean"] for report in reports]
    assert 0 <= means[0] < means[1] < means[2]
    assert reports[0]["top1"] > 0.95 > reports[2]["top1"]
    assert reports[0]["parts"]["encoder"] == 0.0
    assert "KL of the logits, mean" in table(reports[0])
    assert json.loads(json.dumps(reports[0])) == reports[0]


def test_nvfp4_says_what_it_loses(tmp_path):
    """Groups below the smallest scale become zero; others do not."""
    folder, lines = tmp_path / "theirs", []
    shutil.copytree(FIXTURES / "decoder_qwen2", folder)
    recipe = Recipe(mode="nvfp4")
    name = "model.layers.0.mlp.down_proj.weight"
    found = {}
    for place in (folder, tmp_path / "small"):
        done = convert(folder, place / "out", quantize=recipe, tell=lines.append)
        found[place.name] = done.lost_groups, done.groups
        weights = read_weights_of(folder)
        weights[name] = (weights[name] * 1e-4).astype(weights[name].dtype)
        mx.eval(weights)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (before, _), (after, count) = found["theirs"], found["small"]
    assert after - before == weights[name].size // 16
    assert lines[-1].startswith(
        f"warning: nvfp4 has rounded {after / count:.1%} of the"
    )


def test_a_wrong_picture_is_known_before_the_work(tmp_path, capsys):
    need_tiny()
    flags = ["--model", "mm1-tiny", "--mlx-path", str(tmp_path / "out")]
    assert main([*flags, "--image", "/nowhere.png"]) == 1
    assert "nowhere.png" in capsys.readouterr().err
    assert main([*flags, "--data", "/nowhere.jsonl"]) == 2
    assert "--data is of --method awq and dwq" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_any_two_folders_are_compared(tmp_path, capsys):
    """The report of a pair that is there, the same from the shell and from Python."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    convert(FIXTURES / "llava15/hf5", plain, dtype="float32")
    convert(FIXTURES / "llava15/hf5", packed, quantize=Recipe(bits=3, group_size=32))
    steps = []
    found = damage_report(
        plain,
        packed,
        prompts=["1 5 6 7"],
        images=["examples/shapes.png"],
        progress=lambda *at: steps.append(at),
    )
    assert 0 < found["kl"]["mean"] < found["kl"]["max"] and steps == [(1, 2), (2, 2)]
    assert found["parts"]["encoder"] < 0.01 < found["parts"]["decoder.0"]
    flags = ["--model", str(plain), "--compare", str(packed), "-p", "1 5 6 7"]
    flags += ["--image", "examples/shapes.png"]
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"damage": found}
    assert main(flags) == 0
    assert "same likeliest token" in capsys.readouterr().out
    assert main([*flags, "--q-bits", "4"]) == 2
    assert "--compare only reports" in capsys.readouterr().err
    convert(FIXTURES / "llava15/original", tmp_path / "other", tower=TOWER)
    assert main([*flags[:3], str(tmp_path / "other"), "-p", "4 5"]) == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_a_model_against_itself():
    need_tiny()
    model, processor = load("mm1-tiny")
    trace = record(
        model, processor, prompts=["How many?"], images=[np.zeros((9, 9, 3), np.uint8)]
    )
    report = compare(trace, trace)
    assert report["kl"] == {"mean": 0.0, "max": 0.0} and report["top1"] == 1.0
    assert set(report["parts"].values()) == {0.0}
    with pytest.raises(MM1Error, match="different questions"):
        compare(trace, Trace())


def test_kl_by_hand():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    first, second = (Trace([[1]], [np.log(x)], [{}]) for x in (p, q))
    found = compare(first, second)
    wanted = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found["kl"]["mean"] == pytest.approx(wanted)
    assert found["top1"] == 0.0


def test_without_a_tokenizer(tmp_path):
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    convert(FIXTURES / "decoder_mixtral", tmp_path / "a", dtype="float32")
    model, processor = load(tmp_path / "a")
    assert len(record(model, processor).logits) == 3


@pytest.mark.parametrize("tower", [False, True], ids=["decoder", "everything"])
def test_a_llava_of_mlx_vlm_is_taken_as_it_is(tower, tmp_path):
    """Its names are those of transformers 4, its patch weight is channels-last, and
    older folders have the tower quantized, too."""
    folder, out, plain = tmp_path / "mlx", tmp_path / "out", tmp_path / "plain"
    shutil.copytree(FIXTURES / "llava15/hf4", folder)
    weights = dict(read_weights_of(folder))
    how = {"group_size": 32, "bits": 4}
    rounded, packed = {}, {}
    for name, array in weights.items():
        inside = name.startswith("language_model.") or (tower and "encoder" in name)
        if array.ndim == 4:
            rounded[name], packed[name] = array, array.transpose(0, 2, 3, 1)
        elif array.ndim == 2 and inside and array.shape[-1] % 32 == 0:
            parts = mx.quantize(array.astype(mx.float32), **how)
            stem = name.removesuffix("weight")
            names = [stem + part for part in ("weight", "scales", "biases")]
            packed |= dict(zip(names, parts, strict=True))
            rounded[name] = mx.dequantize(*parts, **how)
        else:
            rounded[name] = packed[name] = array
    assert len(packed) > len(rounded)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    mx.save_safetensors(str(folder / "model.safetensors"), rounded)
    convert(folder, plain, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config | {"quantization": how}))
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    convert(folder, out)
    assert any(name.endswith(".scales") for name in read_weights(out))
    vision = [n for n in read_weights(out) if n.startswith("vision.") and "scales" in n]
    assert bool(vision) == tower
    (one, processor), (two, _) = load(out), load(plain)
    size = one.config.vision_config.image_size
    pixels = random_array(1, size, size, 3)
    inputs = processor("1 5 <image> 7", images=[np.zeros((9, 9, 3), np.uint8)])
    assert_close(
        one(inputs.input_ids, pixels), two(inputs.input_ids, pixels), atol=2e-4
    )


def read_weights_of(folder: Path) -> dict[str, mx.array]:
    found: dict = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(path))
    return found
