"""Shots of a user's file through evaluate's command."""

import json
import random
import re
from pathlib import Path

import pytest
from evaluation_kit import COLOURS, write_dataset
from PIL import Image
from test_eval_shots import (
    KIT,
    data,
    file,
    tiny,
)

from helpers import assert_fails, run_cli, run_here
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import places
from mm1_mlx.evaluation.few_shot import pool_of
from mm1_mlx.evaluation.how import How
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.evaluation.table import find_task

assert data and file and tiny  # fixtures


def test_mathvista_with_shots_through_the_command(tiny, file, tmp_path):
    """As MM1 measures it: 0 and more shots with reasoning, in mixed resolution."""
    place = tmp_path / "mathvista"
    (place / "images").mkdir(parents=True)
    problems = {}
    for i in range(3):
        Image.new("RGB", (64, 64), COLOURS[i]).save(place / "images" / f"{i}.png")
        problems[str(i)] = {
            "pid": str(i),
            "image": f"images/{i}.png",
            "question": "Which colour is it?",
            "question_type": "multi_choice",
            "answer_type": "text",
            "answer": COLOURS[i],
            "choices": list(COLOURS[:3]),
        }
    (place / "testmini.json").write_text(json.dumps(problems))
    out = tmp_path / "out"
    command = (
        *("mm1_mlx.evaluate", "--model", "mm1-tiny", "--task", "mathvista"),
        *("--data", place, "--shots", "0,2", "--shots-from", file, "--output", out),
        *("--shot-choice", "nearest", "--high-resolution-shots", 1),
        *("--resolution", 192, "--max-tokens", 16),
    )
    done = run_cli(*command)
    assert done.returncode == 0, done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == [
        "mathvista_testmini 0-shot",
        "mathvista_testmini 2-shot, nearest, reasoning",
    ]
    report = (out / "report.md").read_text()
    assert "| mathvista_testmini | testmini | 2, nearest, reasoning |" in report
    assert (
        f"Shots of mathvista_testmini, 2-shot, nearest, reasoning: the nearest of "
        f"{file} by the encoder's features, their reasoning shown before 'Answer:', "
        f"the last 1 in resolution 192, those before in native."
    ) in report
    header, *kept = map(
        json.loads, (out / "mathvista_testmini-2shot.jsonl").read_text().splitlines()
    )
    assert header["settings"]["high_resolution_shots"] == 1
    for i, record in enumerate(kept):
        assert record["shots"][-1] == i + 1  # the shot of the same colour stands last
        said = record["prompt"][3]["content"]
        assert said.endswith(f"Answer: {COLOURS[i]}")
    again = run_cli(*command, "--shots", "2", "--shot-choice", "first")
    assert_fails(again, r"shot_choice \(nearest there, first now\)")


def test_tasks_of_mm1_tiny_take_a_files_shots():
    prompt = find_task("tiny_count").prompt
    assert prompt(Sample(id="line 1", question="How many?")) == "How many?"


def test_shots_of_the_split_are_named_in_the_report(tiny, data, tmp_path):
    out = tmp_path / "out"
    done = run_cli(
        *("mm1_mlx.evaluate", "--model", "mm1-tiny", "--tasks-from", KIT),
        *("--task", "colour", "--data", data, "--shots", "2", "--limit", 2),
        *("--seed", 3, "--output", out),
    )
    assert done.returncode == 0, done.stderr
    order = [f"train-{i}" for i in range(6)]
    random.Random(3).shuffle(order)
    assert (
        f"Shots of colour, 2-shot: of the training split, drawn with seed 3 (samples "
        f"{', '.join(order[:2])})."
    ) in (out / "report.md").read_text()


USAGE = [
    (("--shot-choice", "first"), r"--shot-choice goes with --shots K"),
    (("--shots-from", "x"), r"--shots-from goes with --shots K"),
    (("--new-shots",), r"--new-shots goes with --shots K"),
    (("--balance-shots",), r"--balance-shots goes with --shots K"),
    (("--high-resolution-shots", "0"), r"--high-resolution-shots goes with --shots K"),
    (("--shots", "2", "--no-shot-reasoning"), r"goes with --shots-from FILE"),
    (("--shots", "2", "--answer-mark", "x"), r"--answer-mark goes with --shots-from"),
    (("--shots", "2", "--shot-features", "x"), r"goes with --shot-choice nearest"),
    (("--shots", "2", "--shot-choice", "x"), r"one of: first, random, nearest"),
    (
        ("--shots", "2", "--new-shots", "--shot-choice", "nearest"),
        r"--new-shots draws at random for each question: leave it or --shot-choice n",
    ),
]


def test_the_help_says_that_one_file_is_for_all_tasks():
    done = run_here("evaluate", "--help")
    told = " ".join(done.stdout.split())
    assert "--shots-from FILE take them from here, one file for all --task" in told


@pytest.mark.parametrize("flags, message", USAGE, ids=[" ".join(u[0]) for u in USAGE])
def test_flags_that_do_not_go_together(flags, message):
    task = ("--model", "mm1-tiny", "--task", "vqav2")
    assert_fails(run_cli("mm1_mlx.evaluate", *task, *flags), message, code=2)


def test_rows_without_shots_are_told_and_the_others_asked(tiny, tmp_path):
    """Few datasets of the hub have a training split."""
    place = write_dataset(tmp_path / "colour", 4, shots=3)
    task = ("mm1_mlx.evaluate", "--model", "mm1-tiny", "--tasks-from", KIT)
    task += ("--task", "colour", "--data", place, "--output", tmp_path / "out")
    done = run_here(*task, "--shots", "0", "2,8")
    few = r"colour, 8-shot: error: .*3 samples, but 8 shots and one to spare"
    assert done.returncode == 1 and re.match(few, done.stderr), done.stderr
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == ["colour 0-shot", "colour 2-shot"]
    last = done.stderr.splitlines()[-1]
    assert last == "error: 1 of 3 rows could not be asked, see above"
    (place / "train.jsonl").unlink()
    message = (
        r"colour: its shots are drawn from the split 'train', which cannot be read: "
        r".*has no train\.jsonl\. Give the shots with --shots-from FILE, .*--shots 0\."
    )
    assert_fails(run_here(*task, "--shots", "2", "4"), message)


def test_okvqa_on_the_hub_has_no_training_split(monkeypatch):
    names = [f"data/val2014-0000{i}-of-00002.parquet" for i in range(2)]

    def download(repo, revision, choose):
        assert repo == "lmms-lab-encoder/OK-VQA" and choose(names) == names
        return Path("unused")

    monkeypatch.setattr(places, "download_dataset", download)
    with pytest.raises(DatasetError, match=r"It has: data/val2014.*--shots-from FILE"):
        pool_of(find_task("okvqa"), "lmms-lab-encoder/OK-VQA", How(shots=4))


def test_wrong_files_through_the_command(data, file, tmp_path):
    """Told before a model is loaded."""
    task = ("--model", "/absent", "--tasks-from", KIT, "--task", "no_shots")
    task = ("mm1_mlx.evaluate", *task, "--data", data, "--shots", "8", "--shots-from")
    assert_fails(run_cli(*task, tmp_path / "a.jsonl"), r"a\.jsonl cannot be read")
    few = r"8 shots were asked for, but .*shots\.jsonl has 6\. .* take --shots 6\."
    assert_fails(run_cli(*task, file), few)


def test_high_resolution_shots_need_a_high_resolution(tiny, data, file):
    """In both commands, with the same words."""
    message = r"that is the encoder's own, which all have: give a higher one, such as"
    flags = ("--high-resolution-shots", "1")
    asked = ("--shots", file, "--image", data / "val0.png", "-p", "Which?")
    assert_fails(run_cli("mm1_mlx.generate", *asked, *flags), message, code=2)
    task = ("--model", "mm1-tiny", "--tasks-from", KIT, "--task", "colour")
    task = ("mm1_mlx.evaluate", *task, "--data", data, "--shots", "2")
    assert_fails(run_cli(*task, *flags), message, code=2)
