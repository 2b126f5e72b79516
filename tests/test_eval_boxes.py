"""Tasks of boxes: read, shown and drawn as the model's folder says."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from dataset_kit import cell, png, write_table
from PIL import Image
from small import SmallProcessor
from test_evaluate import run

from mm1_mlx.config_boxes import BoxFormat
from mm1_mlx.evaluation.datasets import refcoco
from mm1_mlx.evaluation.report import failures
from mm1_mlx.evaluation.said_boxes import form_in_words, in_form_of
from mm1_mlx.evaluation.samples import Answered, Sample
from mm1_mlx.evaluation.sheet import Failure, draw_sheet
from mm1_mlx.evaluation.tasks import TASKS

TASK = TASKS["own_boxes"]
# 100 x 50 in a square of 100: 25 rows of border above and below.
SAMPLE = Sample(
    id="a",
    question="7",
    images=(png("red", (100, 50)),),
    fields={"box": (0.1, 0.2, 0.5, 0.6)},
)


def processor(box_config: BoxFormat | None):
    """What in_form_of asks of a processor."""
    return SimpleNamespace(
        config=SimpleNamespace(box_config=box_config),
        image_settings=SimpleNamespace(resize_mode="pad"),
    )


@pytest.mark.parametrize(
    "form, text",
    [
        (BoxFormat(style="mm1", scale=200), "<20,40,100,120>"),
        # rows 10 and 30 of 50 are rows 35 and 55 of the square
        (BoxFormat(style="llava"), "[0.10, 0.35, 0.50, 0.55]"),
        (BoxFormat(style="qwen", frame="padded"), "<box>(100,350),(500,550)</box>"),
        (None, "<100,200,500,600>"),
    ],
)
def test_boxes_are_the_models_own(form, text):
    task = in_form_of(TASK, processor(form))
    assert task.target(SAMPLE) == text
    assert task.clean(f"It is at {text}.", SAMPLE) == pytest.approx(
        SAMPLE.fields["box"], abs=0.01
    )
    sized = replace(SAMPLE, images=(), fields={**SAMPLE.fields, "size": (100, 50)})
    assert task.target(sized) == text
    assert task.clean("nowhere", SAMPLE) is None


def test_other_tasks_stay_as_they_are():
    form = BoxFormat(style="llava")
    assert in_form_of(TASKS["own_exact"], processor(form)) is TASKS["own_exact"]


def test_the_report_names_the_form():
    words = form_in_words(processor(BoxFormat(style="qwen", scale=100)))
    assert words == "qwen, parts of 100 of the picture"
    words = form_in_words(processor(BoxFormat(style="llava")))
    assert words == "llava, parts of 100 of the padded picture"
    assert form_in_words(processor(None)).endswith("parts of 1000 of the picture")


def task_of(*samples: Sample):
    return replace(
        TASK,
        read=lambda where, split: iter(samples),
        prompt=lambda sample: sample.question,
        needs_data=False,
    )


def test_a_box_stands_in_record_and_report(model, tmp_path):
    small = SmallProcessor()
    vars(small).update(vars(processor(BoxFormat(style="mm1", scale=200))))
    task = task_of(replace(SAMPLE, images=()))
    result = run(model, small, task, output=tmp_path)
    (record,) = result.records
    assert record["expected"] == ["<20,40,100,120>"] and record["score"] == 0.0
    (shown,) = failures(result)
    assert shown.expected == "<20,40,100,120>"
    assert shown.expected_box == SAMPLE.fields["box"] and shown.found_box is None
    settings = json.loads((tmp_path / "result.json").read_text())["results"][0]
    assert settings["settings"]["boxes"] == "mm1, parts of 200 of the picture"
    text = (tmp_path / "report.md").read_text()
    assert "Boxes of own_boxes, 0-shot: mm1, parts of 200 of the picture." in text


def test_both_boxes_are_drawn(tmp_path):
    picture = Image.new("RGB", (340, 240), "white")
    boxes = (0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 0.75, 0.75)
    draw_sheet(
        [Failure("a", (picture,), "q", "e", "f", *boxes)], tmp_path / "s.png", ""
    )
    with Image.open(tmp_path / "s.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(9999) or []}
        left, top = 20 + 85, 59 + 60  # where the first box begins
        assert sheet.convert("RGB").getpixel((left, top + 5)) == (0x1D, 0x4E, 0xD8)
        assert (0xB9, 0x1C, 0x1C) in colours


def test_one_broken_picture_does_not_end_refcoco(tmp_path):
    """The hub's rows do not say how large a picture is."""
    row = {"question_id": "1", "answer": ["the man"], "bbox": [2.0, 3.0, 4.0, 3.0]}
    rows = [row | {"image": cell()}]
    rows += [row | {"question_id": "2", "image": {"bytes": b"no", "path": None}}]
    write_table(tmp_path / "data" / "val-00000-of-00001.parquet", rows)
    whole, broken = refcoco.read_refcoco(tmp_path, "val")
    assert whole.fields["box"] == (0.25, 0.5, 0.75, 1.0)
    assert broken.fields["box"] is None
    for task in (
        TASKS["refcoco_val"],
        in_form_of(TASK, processor(BoxFormat(style="mm1"))),
    ):
        assert task.target(broken) == ""
        answered = [Answered(whole, "", (0.25, 0.5, 0.75, 1.0))]
        answered += [Answered(broken, "", None), Answered(broken, "", (0, 0, 1, 1))]
        assert task.metric(answered).each == [1.0, 0.0, 0.0]
