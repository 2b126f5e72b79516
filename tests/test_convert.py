"""Every stored checkpoint through the real command: convert, load, forward, answer.

The reference values were made by the original code of each project (README of each
fixture). Tolerances: weights are exact here, so what is left is the order of sums in
float32; two independent codes differ by 3e-5 on logits of standard deviation 3.
"""

import json
import re
import shutil
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from parity import expected, pixels

from convert.__main__ import main
from helpers import FIXTURES, assert_close, assert_fails, need, run_python
from mm1_mlx import generate, load
from mm1_mlx.loading import load_model

VISION, CONNECTOR, LOGITS = 1e-6, 1e-6, 2e-4


@dataclass(frozen=True)
class Case:
    """folder: of the fixture. marker: what stands for an image in its input_ids, once
    per image, or once per token where per_token. suffix: of its reference arrays."""

    folder: str
    tower: str | None = None
    marker: int | None = None
    per_token: bool = False
    suffix: str = ""
    ids: str = "input_ids"
    image: str = "image"


MODELS = {
    "llava-4": Case("llava15/hf4", marker=320, per_token=True),
    "llava-5": Case("llava15/hf5", marker=320, per_token=True),
    "llava-original": Case(
        "llava15/original",
        "llava15/tower",
        marker=-200,
        suffix="_pad",
        ids="input_ids_original",
    ),
    "llava-1.6": Case("llava16", "llava16/tower", marker=-200),
    "auroracap": Case("auroracap", marker=-200),
    "moe-llava": Case("moe_llava_stablelm", "moe_llava_stablelm/tower", marker=-200),
    "honeybee": Case("honeybee/last", marker=-1, per_token=True, image="image_0"),
    "honeybee-old": Case(
        "honeybee/last_old", marker=-1, per_token=True, image="image_0"
    ),
    "360vl": Case("vl360", "vl360/tower", marker=-200),
}
DECODERS = [
    "decoder_vicuna/bin",
    "decoder_vicuna/safetensors",
    "decoder_llama3/config4",
    "decoder_llama3/config5",
    "decoder_qwen2",
    "decoder_qwen3",
    "decoder_mixtral",
    "decoder_olmoe",
    "decoder_qwen15_moe",
    "decoder_qwen3_moe/config4",
    "decoder_qwen3_moe/config5",
    "decoder_phi2",
]


def convert(folder, out, *more: str) -> None:
    """The command, which must succeed."""
    done = main(["--hf-path", str(folder), "--mlx-path", str(out), *map(str, more)])
    assert done == 0


def tower_of(case: Case) -> list[str]:
    return ["--vision-tower", str(FIXTURES / case.tower)] if case.tower else []


def prompt_of(case: Case, values: dict) -> str:
    """The reference's ids as a prompt: numbers, and <image> where images belong."""
    ids = values[case.ids].reshape(-1).tolist()
    words, inside = [], False
    for i in ids:
        if i == case.marker:
            if not (case.per_token and inside):
                words.append("<image>")
            inside = True
        else:
            words.append(str(i))
            inside = False
    return " ".join(words)


@pytest.mark.parametrize("case", MODELS.values(), ids=list(MODELS))
def test_models(case, tmp_path, capsys):
    out = tmp_path / "model"
    convert(FIXTURES / case.folder, out, "--dtype", "float32", *tower_of(case))
    assert "has no tokenizer: the model will take token ids" in capsys.readouterr().err
    model, processor = load(out)
    values = expected(case.folder.partition("/")[0])
    shots = values["pixel_values" + case.suffix]
    shots = pixels(shots.reshape(-1, *shots.shape[-3:]))
    features = model.vision(shots)
    assert_close(features, values["vision_features" + case.suffix], atol=VISION)
    text = prompt_of(case, values)
    inputs = processor(text, images=[values[case.image]], use_template=False)
    assert_close(inputs.pixel_values, shots, atol=3e-7)  # float32 of the same bytes
    tokens = model.encode_images(shots, inputs.layouts)
    whole = "image_sequence" if "image_sequence" in values else "connector_output"
    assert_close(tokens, values[whole + case.suffix], atol=CONNECTOR)
    logits = model(inputs.input_ids, shots, layouts=inputs.layouts)
    assert_close(logits, values["logits" + case.suffix], atol=LOGITS)


@pytest.mark.parametrize("case", MODELS.values(), ids=list(MODELS))
def test_greedy_answers_from_the_picture_itself(case, tmp_path):
    out = tmp_path / "model"
    convert(FIXTURES / case.folder, out, "--dtype", "float32", *tower_of(case))
    model, processor = load(out)
    values = expected(case.folder.partition("/")[0])
    answer = values["greedy_ids" + case.suffix].tolist()
    found = generate(
        model,
        processor,
        prompt_of(case, values),
        images=[values[case.image]],
        max_tokens=len(answer),
        use_template=False,
    )
    assert list(found.token_ids) == answer[: len(found.token_ids)]
    assert len(found.token_ids) == len(answer) or found.finish_reason == "stop"


@pytest.mark.parametrize("folder", DECODERS)
def test_decoders(folder, tmp_path):
    out = tmp_path / "model"
    convert(FIXTURES / folder, out, "--dtype", "float32")
    model, processor = load(out)
    assert not model.config.reads_images
    values = expected(folder.partition("/")[0])
    ids = values["input_ids"].reshape(1, -1)
    assert_close(
        model(mx.array(ids)),
        values["logits"].reshape(1, *values["logits"].shape[-2:]),
        atol=1e-4,
    )
    answer = values["greedy_ids"].reshape(-1).tolist()
    text = " ".join(map(str, ids[0]))
    found = generate(model, processor, text, max_tokens=len(answer))
    assert list(found.token_ids) == answer[: len(found.token_ids)]
    assert len(found.token_ids) == len(answer) or found.finish_reason == "stop"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llava-5", "honeybee", "moe-llava", "auroracap"])
def test_16_bit_models(name, dtype, tmp_path):
    """Loose: MLX's CPU back end multiplies 16-bit numbers coarsely."""
    case, out = MODELS[name], tmp_path / "model"
    convert(FIXTURES / case.folder, out, "--dtype", dtype, *tower_of(case))
    config = json.loads((out / "config.json").read_text())
    assert (
        config["extra"]["converted"]["dtype"]
        == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    )
    model, processor = load(out, dtype=dtype)
    values = expected(case.folder.partition("/")[0])
    shots = pixels(values["pixel_values"])
    image = np.zeros((50, 50, 3), np.uint8)
    inputs = processor(prompt_of(case, values), images=[image], use_template=False)
    logits = model(inputs.input_ids, shots)
    wanted = values["logits"]
    error = np.abs(np.array(logits) - wanted).max()
    # Of logits of standard deviation 3: 8 and 11 bits of mantissa through 7 layers.
    assert error < {"float16": 0.2, "bfloat16": 1.2}[dtype], error
    same = np.array(logits).argmax(-1) == wanted.argmax(-1)
    assert same.mean() > 0.85


ENCODERS = {
    "open-clip": ("openclip_vit_h/open_clip", "last_post_norm"),
    "clip-4": ("openclip_vit_h/hf4", "last_post_norm"),
    "clip-5": ("openclip_vit_h/hf5", "last_post_norm"),
    "siglip": ("siglip", "last_hidden_state"),
    "aimv2": ("aimv2/original", "last_hidden_state"),
    "aimv2-hf": ("aimv2/hf", "last_hidden_state"),
}


@pytest.mark.parametrize("folder, last", ENCODERS.values(), ids=list(ENCODERS))
def test_encoders(folder, last, tmp_path):
    from mm1_mlx.loading import load_encoder

    out = tmp_path / "encoder"
    convert(FIXTURES / folder, out, "--dtype", "float32")
    encoder, settings = load_encoder(out)
    values = expected(folder.partition("/")[0])
    shots = pixels(values["pixel_values"])
    states = encoder.hidden_states(shots)
    assert_close(encoder.norm_out(states[-1]), values[last], atol=2e-5)
    assert settings.size == encoder.config.image_size
    with pytest.raises(Exception, match="image encoder alone"):
        load(out)


def test_what_a_folder_keeps(tmp_path):
    out = tmp_path / "model"
    convert(FIXTURES / "decoder_qwen2", out)
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }
    made = json.loads((out / "config.json").read_text())["extra"]["converted"]
    assert made["source"] == "llama" and made["dtype"] == "BF16"
    weights = load_model(out, dtype=None).parameters()["decoder"]["norm"]["weight"]
    assert weights.dtype == mx.bfloat16


def test_no_theta_is_a_silent_default(tmp_path, capsys):
    """Old and sparse configs have none: the family's is taken, and said."""
    source = FIXTURES / "decoder_qwen2"
    convert(source, tmp_path / "named")
    assert "rope_theta" not in capsys.readouterr().err
    values = json.loads((source / "config.json").read_text())
    for key in ("rope_theta", "rope_parameters"):
        values.pop(key, None)
    folder = tmp_path / "sparse"
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(values))
    convert(folder, tmp_path / "unnamed")
    said = capsys.readouterr().err
    assert (
        "sparse names no rope_theta: 10000, the default of its family, is taken" in said
    )


def copied(source: str, place, **changes):
    """A fixture's folder with other values in its config.json."""
    shutil.copytree(FIXTURES / source, place)
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return place


def test_a_processor_config_of_transformers_5(tmp_path, capsys):
    """It holds what preprocessor_config.json held before."""
    folder = copied("llava15/hf5", tmp_path / "theirs")
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    values |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.6]}
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "image_processor": values})
    )
    convert(folder, tmp_path / "ours")
    assert "has no preprocessor" not in capsys.readouterr().err
    _, processor = load(tmp_path / "ours")
    assert processor.image_settings.image_mean == (0.1, 0.2, 0.3)
    assert processor.image_settings.resize_mode == "crop"


def test_ends_of_generation_config(tmp_path):
    """transformers answers until one of these, whatever config.json says."""
    folder = copied("decoder_qwen2", tmp_path / "theirs", eos_token_id=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    convert(folder, tmp_path / "ours")
    model, _ = load(tmp_path / "ours")
    assert model.config.eos_token_ids == (7, 9)


@pytest.mark.parametrize("equal", [True, False])
def test_an_output_table_beside_a_tied_one(equal, tmp_path, capsys):
    """Equal it is dropped with a reason; another one counts, as in transformers 5."""
    folder = copied("decoder_qwen2", tmp_path / "theirs", tie_word_embeddings=True)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = table if equal else table[::-1]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    main(["--hf-path", str(folder), "--dry-run", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["dropped"] == (
        {"lm_head.weight": "the token table (tied)"} if equal else {}
    )
    convert(folder, tmp_path / "ours")
    model, _ = load(tmp_path / "ours")
    assert model.config.text_config.tie_word_embeddings == equal


def test_two_layouts_of_the_same_weights(tmp_path):
    """Apple's DFN has both; the one of config.json counts."""
    folder = copied("openclip_vit_h/hf5", tmp_path / "theirs")
    for path in (FIXTURES / "openclip_vit_h/open_clip").iterdir():
        if path.name != "README.md":
            shutil.copy(path, folder)
    weights = folder / "model.safetensors"
    if weights.exists():
        weights.rename(folder / "pytorch_model.safetensors")
    convert(folder, tmp_path / "ours", "--dtype", "float32")
    names = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".safetensors")]
    assert len(names) == 2


def test_numbers_beyond_float16_are_told(tmp_path, capsys):
    folder = copied("decoder_qwen2", tmp_path / "theirs")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.layers.0.mlp.down_proj.weight"
    weights = {n: a.astype(mx.float32) for n, a in weights.items()}
    weights[name] = weights[name] * 0 + 1e6
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    convert(folder, tmp_path / "ours", "--dtype", "float16")
    said = capsys.readouterr().err
    assert f"{weights[name].size} weights are beyond the range of float16" in said


@pytest.mark.parametrize(
    "source, more, message",
    [
        ("decoder_qwen2", ["--vision-tower", "x"], r"leave out --vision-tower"),
        ("llava15/hf4", ["--vision-tower", "x"], r"leave out --vision-tower"),
        ("siglip", ["-q"], r"an image encoder alone, which keeps its 16 bits"),
        ("decoder_qwen2", ["-q", "--q-group-size", "128"], r"Nothing of this model wo"),
        ("decoder_qwen2", ["--revision", "x"], r"which has no revisions"),
    ],
)
def test_flags_that_would_do_nothing(source, more, message, tmp_path, capsys):
    flags = ["--hf-path", str(FIXTURES / source), "--mlx-path", str(tmp_path / "ours")]
    assert main([*flags, *more]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_originals_are_never_replaced(tmp_path, capsys):
    folder = copied("decoder_qwen2", tmp_path / "theirs")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    flags = ["--overwrite", "--mlx-path"]
    for target in (folder, tmp_path):
        args = ["--hf-path", str(folder), *flags, str(target)]
        assert main(args) == 1
        assert "the original is never replaced" in capsys.readouterr().err
    other = copied("siglip", tmp_path / "other")
    assert main(["--hf-path", str(folder), *flags, str(other)]) == 1
    assert "a checkpoint of another project" in capsys.readouterr().err
    convert(folder, tmp_path / "ours")
    args = ["upcycle", "--model", str(tmp_path / "ours"), *flags]
    assert main([*args, str(tmp_path / "ours")]) == 1
    assert "the original is never replaced" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_link_out_of_the_folder_is_named(tmp_path):
    folder = copied("decoder_qwen2", tmp_path / "theirs")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    link = folder / "model.safetensors"
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    command = ("-m", "convert", "--hf-path", folder, "--mlx-path", tmp_path / "o")
    done = run_python(*command)
    assert_fails(done, r"is a link to .*elsewhere\.safetensors, outside of the folder")
    (tmp_path / "elsewhere.safetensors").unlink()
    done = run_python(*command)
    assert_fails(done, r"elsewhere\.safetensors, which is not there")


@pytest.mark.parametrize(
    "front, licence, lines",
    [
        ("license: mit # fine", "mit", ["license: mit"]),
        ("license:\n- llama2\n- mit", "llama2, mit", ["license:", "- llama2", "- mit"]),
        (
            "license: other\nlicense_name: llama3",
            "other (llama3)",
            ["license: other", "license_name: llama3"],
        ),
        ("tags: [a]", None, []),
        ("license: [", None, []),
    ],
)
def test_licences_of_model_cards(front, licence, lines, tmp_path):
    need("huggingface_hub")
    folder = copied("decoder_qwen2", tmp_path / "theirs")
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    convert(folder, tmp_path / "ours")
    extra = json.loads((tmp_path / "ours/config.json").read_text())["extra"]
    assert extra["converted"].get("licence") == licence
    card = (tmp_path / "ours/README.md").read_text().split("---")[1].splitlines()
    assert [line for line in card if line in lines] == lines
