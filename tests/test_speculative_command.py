"""Guesses in the real command: the same answer, and what is told of them."""

import json
import re
from dataclasses import replace

import pytest
from process_kit import run_two
from small import DENSE, small_model

from helpers import ROOT, assert_fails, need_tiny, run_cli, run_here, run_python
from mm1_mlx import load, save
from mm1_mlx.inference.generation import generate
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import number_tokenizer

SHAPES = ROOT / "examples" / "shapes.png"
ASK = ("mm1_mlx.generate", "--image", SHAPES, "-p", "What colour is the star?")
GUESSERS = [("--lookup", "2"), ("--draft-model", "mm1-tiny", "--num-draft-tokens", "4")]


@pytest.fixture(scope="module")
def answer():
    need_tiny()
    return run_cli(*ASK, "--quiet").stdout


@pytest.mark.parametrize("more", GUESSERS, ids=["lookup", "draft"])
def test_the_answer_is_the_same_and_the_guesses_are_told(answer, more):
    done = run_here(*ASK, *more)
    assert (done.returncode, done.stdout) == (0, answer), done.stderr
    line = re.search(r"^Draft: (\d+) of (\d+) tokens accepted$", done.stderr, re.M)
    assert line and int(line[1]) <= int(line[2])
    values = json.loads(run_here(*ASK, *more, "--json", "--quiet").stdout)
    assert values["text"].strip() == answer.strip()
    counts = values["accepted_tokens"], values["drafted_tokens"]
    assert counts == (int(line[1]), int(line[2]))


def test_without_guesses_nothing_is_told_of_them(answer):
    done = run_here(*ASK)
    assert "Draft" not in done.stderr
    values = json.loads(run_here(*ASK, "--json", "--quiet").stdout)
    assert values["drafted_tokens"] is None and values["accepted_tokens"] is None


def test_real_pictures_and_prompts_with_every_guesser():
    """mm1-tiny guesses for itself, with pictures and without, and by lookup."""
    need_tiny()
    model, processor = load("mm1-tiny")
    questions = (
        "How many circles are there?",
        "Is there a red square?",
        "What is written in the picture?",
        "What is above the star? Name its colour.",
    )
    right = 0
    for sampled in ({}, {"temp": 1.2, "seed": 5}):
        for question in questions:
            settings = {"max_tokens": 12, **sampled}
            plain = generate(model, processor, question, [SHAPES], **settings)
            for draft in (
                {"draft_model": model},  # without the picture
                {"draft_model": (model, processor)},
                {"lookup": 3},
            ):
                found = generate(
                    model, processor, question, [SHAPES], **settings, **draft
                )
                assert found.token_ids == plain.token_ids
                assert found.text == plain.text
                right += found.accepted_tokens
    assert right > 5


def test_a_draft_of_another_vocabulary_is_refused(tmp_path):
    need_tiny()
    alone = {"vision_config": None, "connector_config": None, "image_token_id": None}
    model = small_model(replace(DENSE, vocab_size=64), **alone)
    processor = Processor(number_tokenizer(64), None, model.config)
    save(model, processor, tmp_path / "draft")
    done = run_here(*ASK, "--draft-model", tmp_path / "draft")
    assert_fails(done, r"draft model's vocabulary is not the model's")
    done = run_here(*ASK, "--draft-model", tmp_path / "gone")
    assert_fails(done, r"gone")


def test_two_processes_look_up_and_take_no_draft(tmp_path, answer):
    ask = ("-m", *ASK)
    first, second = run_two(tmp_path, *ask, "--quiet", "--lookup", "2")
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert first.stdout == answer and second.stdout == ""
    first, second = run_two(tmp_path, *ask, "--draft-model", "mm1-tiny")
    assert_fails(first, r"--draft-model does not go with several processes", code=2)


def test_the_help_does_not_need_mlx():
    done = run_python("-X", "importtime", "-m", "mm1_mlx.generate", "--help")
    assert "--draft-model" in done.stdout and "mlx.core" not in done.stderr
