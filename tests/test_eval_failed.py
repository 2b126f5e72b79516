"""Samples that could not be asked count as wrong, whatever the metric."""

import json
from dataclasses import replace

import pytest
from evaluation_kit import COLOUR
from PIL import Image
from test_evaluate import numbers, run, too_long

from helpers import need_tiny
from mm1_mlx import load
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation import cleaning
from mm1_mlx.evaluation.metrics.pope import pope_score
from mm1_mlx.evaluation.samples import Answered, Sample
from mm1_mlx.evaluation.tasks import TASKS


def answered(sample: Sample) -> Answered:
    """One that could not be asked."""
    return Answered(sample, "", None)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_could_not_be_asked_is_wrong(name):
    fields = {"answer_type": "text", "box": (0, 0, 1, 1), "category": "count"}
    yes = Sample(id="1", answers=("yes",), fields=fields | {"pair": "p"})
    none = replace(yes, answers=("None", "none"))
    options = replace(yes, answers=("A",), choices=("A", "a longer one"))
    for sample in (yes, none, options):
        assert TASKS[name].metric([answered(sample)]).each == [0.0]


def test_what_could_not_be_asked_is_no_yes_and_no_no():
    rows = [Sample(id=str(i), answers=(a,)) for i, a in enumerate(("yes", "no"))]
    score = pope_score([answered(row) for row in rows])
    assert score.total == 0 and score.groups["accuracy"] == score.groups["yes"] == 0


def test_a_rule_that_finds_yes_in_nothing_is_not_asked(model, processor):
    """POPE's rule makes "yes" of an empty answer."""
    task = replace(too_long([2]), clean=cleaning.pope_yes_or_no, metric=pope_score)
    made = [replace(s, answers=("yes",)) for s in task.read("", "val")]
    task = replace(task, read=lambda where, split: iter(made))
    result = run(model, processor, task)
    assert [r["score"] for r in result.records].index(0.0) == 2
    assert result.records[2]["value"] is None and result.score.each[2] == 0.0


# --- what was mended, and what was changed ------------------------------------------


def write(folder, **colours):
    """A picture for each name; one that is None is broken."""
    for name, colour in colours.items():
        path = folder / f"{name}.png"
        if colour is None:
            path.write_bytes(b"no picture")
        else:
            Image.new("RGB", (64, 64), colour).save(path)


def pictures(folder, answers="red", count=2):
    """A task with a picture file for each sample."""

    def read(where, split):
        for i in range(count):
            image = folder / f"{'abcdef'[i]}.png"
            yield Sample(id=str(i), images=(image,), question="5", answers=(answers,))

    return replace(
        COLOUR, name="files", read=read, needs_data=False, prompt=lambda s: s.question
    )


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


def asked(tiny, task, **settings):
    model, processor = tiny
    return run(model, processor, task, **settings)


def test_a_picture_that_was_mended_is_asked_again(tiny, tmp_path):
    out = tmp_path / "out"
    write(tmp_path, a="red", b=None)
    first = asked(tiny, pictures(tmp_path), output=out)
    assert [r["id"] for r in first.failed] == ["1"]
    write(tmp_path, b="blue")
    again = asked(tiny, pictures(tmp_path), output=out)
    assert again.failed == [] and again.answered == 2


def test_a_picture_that_was_changed_is_refused(tiny, tmp_path):
    out = tmp_path / "out"
    write(tmp_path, a="red", b="blue")
    asked(tiny, pictures(tmp_path), output=out)
    Image.new("RGB", (80, 64), "green").save(tmp_path / "b.png")
    with pytest.raises(DatasetError, match=r"picture file of sample 1 was another one"):
        asked(tiny, pictures(tmp_path), output=out)


def test_what_is_expected_is_todays(tiny, tmp_path):
    write(tmp_path, a="red", b="blue")
    asked(tiny, pictures(tmp_path), output=tmp_path / "out")
    other = asked(tiny, pictures(tmp_path, "blue"), output=tmp_path / "out")
    assert other.answered == 0
    assert [r["expected"] for r in other.records] == [["blue"], ["blue"]]


def test_a_prompt_that_shots_make_too_long_says_so(model, processor):
    with pytest.raises(DatasetError, match=r"2 of the 3 shots: --shots 2 \(shots"):
        run(model, processor, too_long([2]), shots=3, limit=1, shot_choice="first")


def test_the_measured_speed_stays(model, processor, tmp_path):
    def entry(**settings):
        run(model, processor, numbers(9), output=tmp_path, **settings)
        (found,) = json.loads((tmp_path / "result.json").read_text())["results"]
        return found["timing"]

    first = entry(limit=4)
    assert entry(limit=4) == first and first["answered"] == 4
    more = entry()
    assert more["answered"] >= 9 and more["seconds"] > first["seconds"]
    assert entry() == more
    assert entry(force=True)["answered"] == 9
