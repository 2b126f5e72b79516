"""lora's data flags on the command line: mixtures, parquet, LLaVA's list, the hub."""

import json

import pytest
from PIL import Image

from helpers import assert_fails, need, need_tiny, run_cli, run_here
from mm1_mlx.lora import main


@pytest.fixture
def places(tmp_path):
    """Three sources: a list and its pictures elsewhere, lines, and a table."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (48, 48), "red").save(pictures / "red.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat colour is it?"},
        {"from": "gpt", "value": "red red"},
    ]
    mix = [{"id": "1", "image": "red.png", "conversations": turns}] * 6
    (tmp_path / "llava_mix.json").write_text(json.dumps(mix))
    lines = tmp_path / "lines"
    lines.mkdir()
    line = json.dumps({"question": "Say it.", "answer": "it it it"}) + "\n"
    for split, count in (("train", 8), ("valid", 2), ("test", 3)):
        (lines / f"{split}.jsonl").write_text(line * count)
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    table = tmp_path / "table" / "data"
    table.mkdir(parents=True)
    held = {"bytes": (pictures / "red.png").read_bytes(), "path": "red.png"}
    turns = [{"user": "What is it?", "assistant": "a square", "source": "s"}]
    rows = pa.Table.from_pylist([{"images": [held], "texts": turns}] * 5)
    pq.write_table(rows, table / "train-00000-of-00001.parquet")
    pq.write_table(rows.slice(0, 2), table / "validation-00000-of-00001.parquet")
    return tmp_path


def flags(places, *more) -> list[str]:
    need_tiny()
    data = ("llava_mix.json=0.45", "lines=0.45", "table=0.1")
    given = [part for name in data for part in ("--data", str(places / name))]
    given += ["--image-folder", str(places / "pictures")]
    out = ["--adapter-path", str(places / "adapter")]
    return ["--model", "mm1-tiny", *given, *out, *map(str, more)]


def test_a_mixture_is_checked_and_trained_on(places, capsys):
    more = ("--iters", 10, "--batch-size", 4, "--warmup", 1, "--steps-per-eval", 5)
    assert main(flags(places, "--check", *more)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("llava_mix train: 6 samples, 6 images, ")
    assert "a sample, 3 to 3); longest" in shown[1] or "a sample, " in shown[1]
    assert [line.split(":")[0] for line in shown] == [
        *("llava_mix train", "lines train", "lines valid", "lines test"),
        *("table train", "table valid", "llava_mix", "lines", "table"),
    ]
    assert shown[-3] == "llava_mix: 45.0% of what is learned from, 3 times over"
    assert shown[-1] == "table: 10.0% of what is learned from, 0.8 times over"
    assert main(flags(places, "--check", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["table"]["valid"]["samples"] == 2 and set(found["lines"]) == {
        *("train", "valid", "test")
    }
    assert main(flags(places, *more, "--json")) == 0
    told = capsys.readouterr()
    assert "first batch (4 samples: 2 llava_mix, 2 lines, 0 table)" in told.err
    assert "test loss " in told.err
    metrics = json.loads(told.out)["metrics"]
    assert {"valid", "valid lines", "valid table", "test", "text"} <= metrics.keys()
    recipe = json.loads((places / "adapter/run.json").read_text())["data"]
    assert {name: part["share"] for name, part in recipe.items()} == {
        "llava_mix": 0.45,
        "lines": 0.45,
        "table": 0.1,
    }


def test_what_is_wrong_in_any_source_is_named(places):
    lines = places / "lines/test.jsonl"
    lines.write_text(lines.read_text() + '{"question": "a", "image": "no.png"}\n')
    done = run_cli("lora", *flags(places, "--check"))
    assert done.returncode == 1
    (error,) = (x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert "lines/test.jsonl, line 4: 'answer' is 'None'" in error


@pytest.mark.parametrize(
    "data, message, code",
    [
        ("lines=0", r"--data is '.*lines=0', but the weight after '=' must be", 2),
        ("nothing", r"There is no data folder .*nothing: expected one with", 1),
        ("adapter.txt", r"adapter\.txt is no data: expected a folder, or a file", 1),
    ],
)
def test_wrong_data_flags(places, data, message, code):
    (places / "adapter.txt").write_text("")
    done = run_here("lora", "--model", "mm1-tiny", "--data", places / data)
    assert_fails(done, message, code=code)


def test_an_unknown_dataset_without_network():
    need("huggingface_hub")
    done = run_here("lora", "--model", "mm1-tiny", "--data", "no-such-org/no-such-data")
    assert_fails(done, r"'no-such-org/no-such-data' is neither a folder here nor in")
