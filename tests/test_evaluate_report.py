"""The report of evaluate: tables, failures to look at, and their sheet."""

import json

import pytest
from evaluation_kit import COLOUR
from PIL import Image
from test_evaluate import numbers, run

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation import report
from mm1_mlx.evaluation.report import failures, markdown
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.evaluation.sheet import wrapped


def made_result(scores, **changes):
    from types import SimpleNamespace

    samples = [
        Sample(id=str(i), question=f"q{i} | a", answers=("x",), images=())
        for i in range(len(scores))
    ]
    kept = [
        {"id": s.id, "prompt": "p", "answer": f"a{i}", "score": score}
        for i, (s, score) in enumerate(zip(samples, scores, strict=True))
    ]
    made = {"task": COLOUR, "samples": samples, "records": kept, "failed": []}
    return SimpleNamespace(**(made | changes))


def test_the_worst_answers_are_shown():
    assert [f.id for f in failures(made_result([1.0, 0.5, 0.0, None, 0.2]), 2)] == [
        "2",
        "4",
    ]
    spread = [f.id for f in failures(made_result([0.0] * 10), 5)]
    assert spread == ["0", "2", "4", "6", "8"]
    assert failures(made_result([1.0, None])) == []
    result = made_result([0.0])
    result.records[0]["error"] = "no picture"
    assert failures(result) == []


def test_the_tables_of_the_report(monkeypatch):
    entry = {
        "task": "t",
        "split": "val",
        "shots": 4,
        "wrong_images": False,
        "n": 10,
        "failed": 1,
        "total": 71.25,
        "low": 60.0,
        "high": None,
        "groups": {"a": 50.0},
        "settings": {
            "data": "d",
            "form": "chat",
            "same_shots": True,
            "seed": 0,
            "generation": {"max_tokens": 8, "stop": ["\n"]},
        },
        "versions": {"mlx": "1"},
        "timing": {"answered": 10, "seconds": 2.0, "tokens_per_second": 5.0},
        "errors": [{"id": "s|1", "error": "a\nb"}],
        "mistakes": {
            "sheet": "t.png",
            "of": 1,
            "listed": [{"id": "1", "question": "q" * 300, "expected": "", "found": ""}],
        },
    }
    tables = {"t": "PUBLISHED"}
    monkeypatch.setattr(report, "published_table", lambda name: tables[name])
    text = markdown({"model": "m", "adapter": "ad", "results": [entry]})
    lines = text.splitlines()
    assert lines[0] == "# m with the adapter ad"
    assert "| t | val | 4 | 71.2 | - | 10 | 1 |" in lines
    assert "| a | 50.0 |" in lines and "PUBLISHED" in lines and "### t" in lines
    assert "| s\\|1 |  | a b |" in lines
    assert "![failures of t, 4-shot](t.png)" in lines
    assert all(len(line) < 400 for line in lines)


def test_python_leaves_what_the_command_leaves(model, processor, tmp_path):
    """evaluate(output=...): the report of all that was asked there, and the sheet."""
    task = numbers(5, rule="ours: x", shot_rule="theirs: y")
    run(model, processor, task, output=tmp_path)
    run(model, processor, task, output=tmp_path, shots=2)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["model"] == "a model in memory" and kept["adapter"] is None
    assert [(e["task"], e["shots"]) for e in kept["results"]] == [
        ("numbers", 0),
        ("numbers", 2),
    ]
    text = (tmp_path / "report.md").read_text()
    assert "| numbers | val | 2 |" in text
    assert "Answers of numbers, 0-shot are read by: ours: x." in text
    assert task.reading("pretrain")[2] == "theirs: y"
    with Image.open(tmp_path / "numbers-0shot-failures.png") as sheet:
        assert sheet.width > 100
    kept["weights"] = {"config": "of another"}
    (tmp_path / "result.json").write_text(json.dumps(kept))
    with pytest.raises(DatasetError, match=r"results of another model \(a model in"):
        run(model, processor, task, output=tmp_path)
    run(model, processor, task, output=tmp_path, force=True)
    assert len(json.loads((tmp_path / "result.json").read_text())["results"]) == 1


def test_text_on_a_sheet_stays_in_its_lines():
    from PIL import ImageFont

    font = ImageFont.load_default(15)
    text = "a question of several words " * 10
    lines = wrapped(text, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 200 for line in lines)
    long = wrapped("字" * 100, font, 200, 50)
    assert "".join(long) == "字" * 100
    assert all(font.getlength(line) <= 200 for line in long)
    assert wrapped("", font, 200, 3) == [""]


def test_a_sheet_shows_pictures_and_what_cannot_be_read(tmp_path):
    import numpy as np

    from mm1_mlx.evaluation.sheet import Failure, draw_sheet

    red = Image.new("RGB", (40, 40), "red")
    found = [
        Failure("a", (red,), "q", "x", "y"),
        Failure("b", (), "q", "x", ""),
        Failure("c", ("/absent.png", red, red), "q", "x", "y"),
        Failure("d", (red,), "q", "x", "y"),
        # Of many the last one, which is asked about, is shown.
        Failure("e", (*[Image.new("RGB", (40, 40), "blue")] * 8, red), "q", "x", "y"),
    ]
    path = tmp_path / "sheet.png"
    draw_sheet(found, path, "title")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    reds = (pixels == [255, 0, 0]).all(-1)
    assert reds[:300, :380].sum() > 30_000  # in the first cell, made larger
    assert not reds[:300, 380:720].any()  # text only
    assert reds[:300, 740:].sum() > 10_000  # beside the one that is missing
    assert reds[300:, :380].sum() > 30_000
    assert reds[300:, 540:720].sum() > 10_000
