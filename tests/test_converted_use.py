"""All that mm1-tiny does, with converted models: the commands on three fixtures.

Their weights are random, so no answer means anything: that commands run, what they
count, and what they refuse. The numbers of tokens are those of the fixtures' READMEs.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
from evaluation_kit import write_dataset
from PIL import Image
from small_tokenizers import write_llama

from convert.conversion import convert
from examples import receipts
from helpers import FIXTURES, assert_fails, run_here

TILED = {"llava16": "anyres", "vl360": "crops"}
# Of a picture of 60 x 64 pixels: tiles, tokens. LLaVA-NeXT: 2 x 2 tiles with a mark
# after each of their 8 rows, and the overview. 360VL: two connectors of 9 queries.
SEEN = {"llava15": (1, 4 * 4), "llava16": (5, 8 * (8 + 1) + 4 * 4), "vl360": (5, 9 + 9)}
MODELS = list(SEEN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of the models, each converted once, with a small tokenizer."""
    made = {}
    for name in MODELS:
        foreign = tmp_path_factory.mktemp(name) / "foreign"
        source = FIXTURES / ("llava15/original" if name == "llava15" else name)
        shutil.copytree(source, foreign)
        write_llama(foreign, size=320)  # as many as their embeddings
        made[name] = foreign.parent / "ours"
        tower = FIXTURES / name / "tower"
        convert(foreign, made[name], dtype="float32", tower=tower)
    return made


@pytest.fixture(params=MODELS)
def name(request):
    """Which model."""
    return request.param


@pytest.fixture
def model(name, folders):
    """Its folder."""
    return folders[name]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Questions about circles, as a dataset, and shots of the same kind."""
    folder = write_dataset(tmp_path_factory.mktemp("pictures"), 3)
    lines = [json.loads(x) for x in (folder / "train.jsonl").read_text().splitlines()]
    shots = [{"prompt": line["question"], **line} for line in lines]
    text = "".join(json.dumps(shot) + "\n" for shot in shots)
    (folder / "shots.jsonl").write_text(text)
    (folder / "test.jsonl").write_text((folder / "val.jsonl").read_text())
    return folder


def ask(model, pictures, *more):
    """`generate` with a question about a picture."""
    about = ("--image", pictures / "val1.png", "-p", "What colour is it?")
    return run_here("generate", "--model", model, *about, "-m", 4, *more)


def test_a_picture(model, pictures):
    done = ask(model, pictures)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_nearest_shots(model, pictures):
    shots = ("--shots", pictures / "shots.jsonl", "--num-shots", 2)
    done = ask(model, pictures, *shots, "--shot-choice", "nearest")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    plan = json.loads(ask(model, pictures, *shots, "--plan", "--json").stdout)
    assert plan["plan"]["work"]["images"] == 3


def test_a_chat(model, pictures):
    lines = f"/image {pictures / 'val0.png'}\nWhat is it?\nWhat colour?\n"
    done = run_here("chat", "--model", model, "-m", 4, input=lines)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") >= 2


def test_what_is_seen_of_a_picture(name, model, pictures, tmp_path):
    out = tmp_path / "tiles.png"
    asked = ("info", "--model", model, "--image", pictures / "val0.png")
    done = run_here(*asked, "--tiles", "--output", out)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "predicted memory" in told and "to the first token" in told
    with Image.open(out) as drawn:
        assert drawn.format == "PNG"
    found = json.loads(run_here(*asked, "--json").stdout)
    assert (found["tiles"], found["tokens"]) == SEEN[name]


def test_an_evaluation_with_shots(model, pictures, tmp_path):
    out = tmp_path / "out"
    done = run_here(
        *("evaluate", "--model", model, "--task", "own_exact", "--data", pictures),
        *("--shots", 0, 1, "--max-tokens", 4, "--output", out),
    )
    assert done.returncode == 0, done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == ["own_exact 0-shot", "own_exact 1-shot"]
    for shots in (0, 1):
        lines = (out / f"own_exact-{shots}shot.jsonl").read_text().splitlines()
        assert len(lines) == 1 + 3  # the settings, and a line for each question


@pytest.mark.parametrize("name", TILED, indirect=True)
@pytest.mark.parametrize("resolution", ["112", "dynamic"])
def test_tiles_are_cut_as_the_model_was_trained_to(name, model, pictures, resolution):
    message = (
        rf"as it was trained to \({TILED[name]}\) .* \(--resolution native\), "
        rf"not '?{resolution}"
    )
    assert_fails(ask(model, pictures, "--resolution", resolution), message)


# --- examples.receipts ---


RECEIPT = {
    "merchant": "Ca fe",
    "date": "2026-01-02",
    "currency": "EUR",
    "total": "4,50",
    "items": [{"name": "tea", "price": 2}, {"name": "bun", "price": "2.50"}],
}


def read_receipts(model, pictures, out):
    """The command, and the lines that it wrote."""
    words = (pictures, out, "--model", model, "--max-tokens", 4)
    done = run_here(*words, main=receipts.main)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == sorted(
        path.name for path in pictures.glob("*.png")
    )
    return done.stdout, lines


@pytest.mark.parametrize("name", TILED, indirect=True)
def test_receipts_are_read_in_tiles(name, model, pictures, tmp_path):
    told, lines = read_receipts(model, pictures, tmp_path / "out.jsonl")
    assert "0 of 7 answers are JSON, 0 were there" in told  # random weights
    for line in lines:
        assert (line["fields"], line["adds_up"]) == (None, None)
        assert line["cut"] and line["answer"]


def test_a_receipt_becomes_fields(folders, pictures, tmp_path, monkeypatch):
    """The command with a model that could read: all but its answers is real."""
    import mm1_mlx

    seen = []

    def reads(model, processor, prompt, images, **settings):
        inputs = processor(prompt, images=images)
        seen.append((inputs.image_tokens, settings))
        values = RECEIPT | ({"total": 5} if len(seen) == 2 else {})
        text = f"Here it is:\n```json\n{json.dumps(values)}\n```\n"
        return SimpleNamespace(text=text, finish_reason="stop")

    monkeypatch.setattr(mm1_mlx, "generate", reads)
    out = tmp_path / "out.jsonl"
    told, lines = read_receipts(folders["llava16"], pictures, out)
    assert "7 of 7 answers are JSON, 0 were there" in told
    assert lines[0]["fields"] == RECEIPT | {
        "total": 4.5,
        "items": [{"name": "tea", "price": 2.0}, {"name": "bun", "price": 2.5}],
    }
    assert [line["adds_up"] for line in lines] == [True, False] + [True] * 5
    assert lines[1]["fields"]["total"] == 5.0
    assert not any(line["cut"] for line in lines)
    assert all(settings == {"max_tokens": 4} for _, settings in seen)
    assert all(sum(tokens) > 4 * 4 for tokens, _ in seen)  # more than an overview
