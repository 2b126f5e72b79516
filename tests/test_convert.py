"""Every stored checkpoint through the real command: convert, load, forward, answer.

The reference values were made by the original code of each project (README of each
fixture). Tolerances: weights are exact here, so what is left is the order of sums in
float32; two independent codes differ by 3e-5 on logits of standard deviation 3.
"""

import json
import shutil
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from parity import expected, pixels

from convert.__main__ import main
from helpers import FIXTURES, assert_close
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
