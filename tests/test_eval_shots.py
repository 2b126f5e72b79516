"""Few-shot in evaluate: shots of a user's file, the nearest, reasoning, resolutions."""

import json
import re
from dataclasses import replace

import pytest
from evaluation_kit import COLOUR, COLOURS, exact, write_dataset
from PIL import Image
from test_evaluate import numbers

from helpers import ROOT, need_tiny
from mm1_mlx import FewShot, evaluate, generate, load
from mm1_mlx.errors import DatasetError, MM1Error
from mm1_mlx.evaluation.few_shot import TaskShots, pool_of
from mm1_mlx.evaluation.how import How
from mm1_mlx.evaluation.own_pictures import OwnPictures
from mm1_mlx.evaluation.runner import _Run
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.evaluation.tasks import TASKS
from mm1_mlx.inference.features import Features
from mm1_mlx.inputs.examples import read_examples

KIT = ROOT / "tests" / "evaluation_kit.py"
MATH = TASKS["mathvista_testmini"]


class Chat:
    """A processor as far as prompts need one."""

    chat_template = "mm1-tiny"

    class tokenizer:
        marks = {"</s>": 2}  # noqa: RUF012


def write(folder, lines, name="shots.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("shots") / "colour", 6, 6)


@pytest.fixture(scope="module")
def file(data):
    """A shot of each colour, on pictures that nobody is asked about."""
    lines = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (40 + i, 40), colour).save(data / f"shot{i}.png")
        lines.append(
            {
                "image": f"shot{i}.png",
                "prompt": "Which colour?",
                "answer": colour,
                "reasoning": f"It is painted {colour}, wholly.\nSo be it.",
            }
        )
    return write(data, lines)


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


def shots_of(task, source, form="chat", k=2, where="", **settings):
    given = {"shot_choice": "first"} | settings
    how = How(k, form=form, shots_from=source, **given)
    return TaskShots(task, pool_of(task, where, how), how, Chat)


def query(**changes):
    given = {"id": "q", "images": ("q.png",), "question": "What is it?"}
    return Sample(**(given | changes))


# --- how they are written -----------------------------------------------------------


def test_a_files_prompt_is_written_as_the_tasks_questions(file):
    """In both forms the shots look like the question behind them."""
    short = "Answer the question using a single word or phrase."
    task = TASKS["vqav2_val"]
    asked = shots_of(task, file, shot_reasoning=False, k=1).before(query())
    assert asked.prompt == [
        {"role": "user", "content": f"<image>Which colour?\n{short}"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": f"<image>What is it?\n{short}"},
    ]
    asked = shots_of(task, file, "pretrain", shot_reasoning=False).before(query())
    assert asked.prompt == (
        "<image> Question: Which colour? Short answer: red\n"
        "<image> Question: Which colour? Short answer: green\n"
        "<image> Question: What is it? Short answer:"
    )
    assert asked.images == [file.parent / f"shot{i}.png" for i in (0, 1)] + ["q.png"]


def test_reasoning_ends_in_the_answer(file):
    task = TASKS["vqav2_val"]
    asked = shots_of(task, file, k=1).before(query())
    said = asked.prompt[1]["content"]
    assert said == "It is painted red, wholly.\nSo be it. Answer: red"
    assert asked.mark == "Answer:"
    asked = shots_of(task, file, "pretrain", 1, answer_mark="So:").before(query())
    assert asked.prompt == (
        "<image> Question: Which colour? It is painted red, wholly. So be it. So: red\n"
        "<image> Question: What is it?"
    )


def test_lines_without_a_prompt_are_asked_what_the_question_is(data):
    path = write(data, [{"image": "shot0.png", "answer": "red"}] * 2, "bare.jsonl")
    asked = shots_of(COLOUR, path, k=1).before(query())
    assert asked.prompt[0]["content"] == "<image>What is it?"
    asked = shots_of(COLOUR, path, "pretrain", 1).before(query())
    assert asked.prompt == (
        "<image>Question: What is it? Answer: red\n<image>Question: What is it? Answer:"
    )


HINT = "Hint: Please answer the question "


@pytest.mark.parametrize(
    "line, prompt, answer",
    [
        (
            {"prompt": "How many?", "answer": 3},
            f"{HINT}requiring an integer answer and provide the final value, e.g., 1, "
            "2, 3, at the end.\nQuestion: How many?",
            "3",
        ),
        (
            {"prompt": "How long?", "answer": "-1.25", "unit": "cm"},
            f"{HINT}requiring a floating-point number with two decimal places and "
            "provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\n"
            "Question: How long? (Unit: cm)",
            "-1.25",
        ),
        (
            {"prompt": "Which?", "answer": "east", "choices": ["west", "east"]},
            f"{HINT}and provide the correct option letter, e.g., A, B, C, D, at the "
            "end.\nQuestion: Which?\nChoices:\n(A) west\n(B) east",
            "(B) east",
        ),
        ({"prompt": "Hint: As it is.\nQuestion: Q?", "answer": "B"}, None, "B"),
        ({"prompt": "Q?", "query": "All of it?", "answer": "B"}, "All of it?", "B"),
    ],
)
def test_mathvistas_shots(data, line, prompt, answer):
    """Written by the rule that makes MathVista's own queries; and what a model says
    after their example is what the extraction finds."""
    line = {"image": "shot0.png", "reasoning": "By 7, see (A).", **line}
    path = write(data, [line], "math.jsonl")
    shots = shots_of(MATH, path, k=1)
    asked = shots.before(query(fields={"query": "?"}))
    assert asked.prompt[0]["content"] == f"<image>{prompt or line['prompt']}"
    said = asked.prompt[1]["content"]
    assert said == f"By 7, see (A). Answer: {answer}"
    found = MATH.clean(said.rpartition("Answer:")[2], shots.pool.samples[0])
    assert found == str(line["answer"])


# --- which ones ---------------------------------------------------------------------


def test_the_same_shots_as_fewshot_draws(file):
    for k, seed in ((2, 0), (4, 7)):
        shots = shots_of(COLOUR, file, k=k, shot_choice="random", seed=seed)
        wanted = [shot.number for shot in FewShot(file, k, seed=seed).choose()]
        assert [shot.number for shot in shots.before(query()).shots] == wanted
    spread = write(
        file.parent,
        [{"image": "shot0.png", "answer": x} for x in "aaaab"],
        "spread.jsonl",
    )
    shots = shots_of(COLOUR, spread, balance_shots=True)
    assert [shot.answer for shot in shots.before(query()).shots] == ["a", "b"]


def test_the_nearest_are_those_of_fewshot(tiny, data, file, tmp_path):
    """Of each question; features are computed once, also for a run that goes on."""
    counts = []
    seen = []

    class Counted(Features):
        def _encode(self, model, waiting):
            counts.append(len(waiting))
            super()._encode(model, waiting)

    given = {"data": data, "shots": 2, "shots_from": file, "shot_choice": "nearest"}
    given |= {"max_tokens": 2, "shot_reasoning": False}
    result = evaluate(
        *(*tiny, COLOUR), **given, shot_features=Counted(), watch=seen.append
    )
    assert sum(counts) == 12  # 6 shots and 6 questions
    shown = [(p.done, p.total) for p in seen if p.how == "features"]
    assert shown == [(i, 12) for i in range(1, 13)]
    plain = FewShot(file, 2, choice="nearest")
    for sample, record in zip(result.samples, result.records, strict=True):
        chosen = plain.choose(*tiny, list(sample.images))
        assert record["shots"] == [shot.number for shot in chosen]
    # Kept in the output: a run that goes on opens no encoder.
    again = [evaluate(*tiny, COLOUR, **given, output=tmp_path) for _ in "12"]
    assert (tmp_path / "features.safetensors").is_file()
    assert again[0].records == result.records and again[1].answered == 0


def test_a_question_of_the_file_is_not_its_own_shot(data, file, tmp_path):
    """By the bytes of its picture, under whatever name."""
    copy = tmp_path / "copy.png"
    copy.write_bytes((data / "val2.png").read_bytes())
    pictures = [str(copy), *(str(data / f"shot{i}.png") for i in range(3))]
    lines = [{"image": p, "prompt": "?", "answer": "x"} for p in pictures]
    path = write(tmp_path, lines)
    shots = shots_of(COLOUR, path, k=3)
    samples = list(COLOUR.read(data, "val"))
    shown = [[s.number for s in shots.before(one).shots] for one in samples]
    assert shown == [[1, 2, 3] if i != 2 else [2, 3, 4] for i in range(6)]
    with pytest.raises(DatasetError, match=r"1 shot of .* has the pictures of .*val-2"):
        shots_of(COLOUR, path, k=4).before(samples[2])
    own = OwnPictures(read_examples([{"images": [], "prompt": "Q?", "answer": "x"}]))
    assert own.numbers(query(images=(), question="Q?")) == {1}
    assert own.numbers(query(images=(), question="R?")) == set()


def test_cached_or_not_alone_or_in_a_batch(tiny, data, file):
    """Every answer is what generate gives to the same shots and question."""
    given = {"data": data, "shots": 2, "shots_from": file, "max_tokens": 12}
    cached = evaluate(*tiny, COLOUR, **given)
    fresh = evaluate(*tiny, COLOUR, **given, reuse=False, batch_size=1)
    assert cached.records == fresh.records
    shots = FewShot(file, 2)
    model, processor = tiny
    for sample, record in zip(cached.samples, cached.records, strict=True):
        alone = generate(
            *(model, processor, sample.question.strip(), list(sample.images)),
            shots=shots,
            max_tokens=12,
            reuse=False,
        )
        assert record["answer"] == alone.text
        assert record["prompt_tokens"] == alone.prompt_tokens
        assert record["shots"] == list(alone.shots)


def test_the_last_shots_in_high_resolution(tiny, data, file):
    model, processor = tiny
    given = {"shots": 2, "shots_from": file, "max_tokens": 8, "resolution": 192}
    given |= {"limit": 2, "data": data, "shot_reasoning": False}
    found = evaluate(*tiny, COLOUR, **given, high_resolution_shots=1)
    shots = FewShot(file, 2, high_resolution_shots=1, reasoning=False)
    for sample, record in zip(found.samples, found.records, strict=True):
        alone = generate(
            *(model, processor, sample.question.strip(), list(sample.images)),
            shots=shots,
            max_tokens=8,
            resolution=192,
        )
        assert record["answer"] == alone.text
    with pytest.raises(DatasetError, match=r"could be asked.*the encoder's own, which"):
        given = given | {"resolution": None}
        evaluate(*tiny, COLOUR, **given, high_resolution_shots=1)


# --- what is made of answers --------------------------------------------------------


def reasoning_task(said, **changes):
    """A task of the small model, which hears `said` as the value of every answer."""
    return numbers(6, clean=lambda text, s: said.append(text) or text, **changes)


def test_the_answer_is_what_stands_behind_the_reasoning(model, processor, tmp_path):
    """The task's stops end the answer, not the reasoning; without a mark all counts."""
    said: list = []
    task = reasoning_task(said, stop=("9",), metric=exact)
    shots = [{"images": [], "prompt": "5", "answer": "6", "reasoning": "7"}] * 4
    how = {"shots": 2, "shots_from": shots, "form": "chat", "max_tokens": 8}
    result = evaluate(model, processor, task, **how, answer_mark="4")
    assert "stop" not in result.settings["generation"]
    assert result.how.name == "2-shot, reasoning"
    run = _Run(model, processor, task, result.how, {}, None, None, None)
    assert run._said("7. 9 4 8 4 6 9 8") == "6 "
    assert run._said("7. 9 8") == "7. 9 8"
    heard = [run._said(record["answer"]) for record in result.records]
    assert said[-6:] == heard
    longer = evaluate(model, processor, task, shots=2, shots_from=shots, form="chat",
                      answer_mark="4", limit=1)  # fmt: skip
    assert longer.settings["generation"]["max_tokens"] == 256
    without = {**how, "shot_reasoning": False, "limit": 1, "answer_mark": "4"}
    plain = evaluate(model, processor, task, **without)
    assert plain.settings["generation"]["stop"] == ["9"]


# --- what is wrong ------------------------------------------------------------------


def test_shots_that_do_not_fit_say_how_many_would(tiny, data, file):
    """What the message says would fit does fit."""
    model, processor = tiny
    context = model.config.text_config.max_position_embeddings
    k = context // processor.tokens_per_image + 2
    examples = [
        {"image": file.parent / f"shot{i % 6}.png", "prompt": "?", "answer": "red"}
        for i in range(k)
    ]
    given = {"data": data, "shots_from": examples, "max_tokens": 2, "limit": 2}
    given["shot_choice"] = "first"
    with pytest.raises(DatasetError, match=r"tokens.* context is \d+\..*--shots") as no:
        evaluate(*tiny, COLOUR, shots=k, **given)
    (fits,) = map(int, re.findall(r"\(shots=(\d+)\)", str(no.value)))
    assert f"What fits: {fits} of the {k} shots: --shots {fits}" in str(no.value)
    assert not evaluate(*tiny, COLOUR, shots=fits, **given).failed
    with pytest.raises(DatasetError, match="could be asked"):
        evaluate(*tiny, COLOUR, shots=fits + 1, **given)


def test_a_broken_picture_of_a_shot_is_named(tiny, data, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    path = write(tmp_path, [{"image": "bad.png", "prompt": "?", "answer": "red"}] * 2)
    given = {"data": data, "shots": 1, "shots_from": path, "limit": 2}
    for choice in ("first", "nearest"):
        with pytest.raises(DatasetError, match=r"shots\.jsonl, line 1: .*bad\.png is"):
            evaluate(*tiny, COLOUR, **given, shot_choice=choice)


def test_a_question_with_a_broken_picture_is_told_and_the_others_asked(
    tiny, file, tmp_path
):
    place = write_dataset(tmp_path / "data", 3, 3)
    (place / "val1.png").write_text("no picture")
    given = {"shots": 2, "shot_choice": "nearest", "max_tokens": 2}
    result = evaluate(*tiny, COLOUR, data=place, **given)
    assert [record["id"] for record in result.failed] == ["val-1"]
    assert "val1.png is not an image" in result.failed[0]["error"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shot_choice": "best"}, "shot_choice is 'best', but must be one of first, r"),
        ({"shot_choice": "first", "same_shots": False}, "same_shots=False draws other"),
        ({"shots_from": 3}, "The shots are of the type int, but a file"),
        ({"shots_from": "absent.jsonl"}, r"absent\.jsonl cannot be read: No such file"),
        (
            {"shots": 7},
            r"7 shots were asked for, but .*shots\.jsonl has 6\..*--shots",
        ),
    ],
)
def test_wrong_values(data, file, settings, message):
    given = {"data": data, "shots": 2, "shots_from": file} | settings
    with pytest.raises(MM1Error, match=message):
        evaluate(None, Chat, COLOUR, **given)


@pytest.mark.parametrize(
    "task, line, message",
    [
        ("ai2d", {"answer": "?"}, r"line 2: ai2d reads no answer in '\?'"),
        (
            "mathvista_testmini",
            {"answer": "a", "choices": ["a"]},
            r"line 2: 'choices' has 1 choices, but must have 2 to 26",
        ),
        ("ai2d", {"answer": "B", "image": "x.png"}, r"line 2: no image file .*x\.png"),
    ],
)
def test_lines_that_a_task_cannot_show(data, task, line, message):
    good = {"image": "shot0.png", "prompt": "Which?", "answer": "A"}
    path = write(data, [good, {**good, **line}], "lines.jsonl")
    with pytest.raises(DatasetError, match=message):
        pool_of(TASKS[task], "", How(1, shots_from=path))
    needs = replace(COLOUR, prompt=lambda sample: sample.fields["hint"])
    path = write(data, [good], "lines.jsonl")
    with pytest.raises(DatasetError, match=r"line 1: colour cannot write .*'hint'"):
        shots_of(needs, path, k=1).choose()


def test_nearest_needs_pictures(model, processor):
    """Of a split only samples with a picture are shots; every question has one."""
    how = How(2, shot_choice="nearest")
    pool = pool_of(numbers(21), "", how)
    assert len(pool.samples) == 7 and all(sample.images for sample in pool.samples)
    with pytest.raises(DatasetError, match=r"14 questions of 21 have no picture \("):
        evaluate(
            *(model, processor, numbers()),
            **{"shots": 2, "shot_choice": "nearest", "form": "chat"},
        )


# --- going on -----------------------------------------------------------------------


def test_other_shots_are_another_run(tiny, data, tmp_path):
    """A changed file, choice or picture is refused; the same goes on."""
    for name in ("shot0.png", "shot1.png"):
        Image.new("RGB", (30, 30), "red").save(tmp_path / name)
    lines = [
        {"image": f"shot{i}.png", "prompt": "Which?", "answer": "red"} for i in (0, 1)
    ]
    path = write(tmp_path, lines)
    given = {"data": data, "shots": 1, "shots_from": path, "max_tokens": 2, "limit": 2}
    given |= {"output": tmp_path / "out", "shot_choice": "first"}
    evaluate(*tiny, COLOUR, **given)
    assert evaluate(*tiny, COLOUR, **given).answered == 0
    refused = "was begun with other settings: .*"
    with pytest.raises(DatasetError, match=refused + "high_resolution_shots"):
        evaluate(*tiny, COLOUR, **given, high_resolution_shots=1, resolution=192)
    with pytest.raises(DatasetError, match=refused + "shot_choice"):
        evaluate(*tiny, COLOUR, **(given | {"shot_choice": "random", "seed": 1}))
    with pytest.raises(DatasetError, match=refused + "shots_from"):
        evaluate(*tiny, COLOUR, **(given | {"shots_from": lines_of(path)}))
    Image.new("RGB", (31, 31), "red").save(tmp_path / "shot0.png")
    with pytest.raises(DatasetError, match=refused + "shots_held"):
        evaluate(*tiny, COLOUR, **given)


def lines_of(path):
    return [
        json.loads(line) | {"image": path.parent / json.loads(line)["image"]}
        for line in path.read_text().splitlines()
    ]
