"""The table of benchmarks: complete, and each reads, asks and scores its own."""

import pytest
from dataset_kit import lines, put

from helpers import ROOT
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import (
    captions,
    documents,
    options,
    science,
    vqa,
    yes_no,
)
from mm1_mlx.evaluation.published import _benchmarks, published
from mm1_mlx.evaluation.samples import Answered, Sample
from mm1_mlx.evaluation.table import find_task
from mm1_mlx.evaluation.tasks import ALIASES, TASKS

# Each benchmark that the project promises: its reader, split, metric, where shots are.
PROMISED = {
    "coco_karpathy_test": (captions.read_karpathy, "test", "cider_score", "train"),
    "nocaps_val": (captions.read_nocaps, "val", "cider_score", "train"),
    "textcaps_val": (captions.read_textcaps, "val", "cider_score", "train"),
    "vqav2_val": (vqa.read_vqav2, "val", "vqa_score", "train"),
    "ok_vqa_val2014": (vqa.read_okvqa, "val", "textvqa_score", "train"),
    "textvqa_val": (vqa.read_textvqa, "val", "textvqa_score", "train"),
    "vizwiz_vqa_val": (vqa.read_vizwiz, "val", "textvqa_score", "train"),
    "scienceqa": (science.read_scienceqa, "test", "choice_accuracy", "train"),
    "scienceqa_img": (science.read_scienceqa_img, "test", "choice_accuracy", "train"),
    "mmmu_val": (science.read_mmmu, "val", "mmmu_accuracy", "dev"),
    "mathvista_testmini": (
        *(science.read_mathvista, "testmini"),
        *("mathvista_accuracy", None),
    ),
    "ai2d": (science.read_ai2d, "test", "choice_accuracy", "train"),
    "chartqa": (documents.read_chartqa, "test", "relaxed_accuracy", "train"),
    "docvqa_val": (documents.read_docvqa, "val", "anls_score", "train"),
    "infovqa_val": (documents.read_infovqa, "val", "anls_score", "train"),
    "pope": (yes_no.read_pope, "test", "pope_score", None),
    "mme": (yes_no.read_mme, "test", "mme_score", None),
    "seedbench": (options.read_seed, "test", "choice_accuracy", None),
    "seedbench_image": (options.read_seed_image, "test", "choice_accuracy", None),
    "mmbench_en_dev": (options.read_mmbench, "dev", "circular_accuracy", None),
}


@pytest.mark.parametrize("name", PROMISED)
def test_what_is_promised(name):
    task = TASKS[name]
    found = (task.read, task.split, task.metric.__name__, task.shot_split)
    assert found == PROMISED[name]


def test_the_splits_of_refcoco():
    names = {name for name in TASKS if name.startswith("refcoco")}
    wanted = {f"refcoco{p}_{s}" for p in ("", "+") for s in ("val", "testA", "testB")}
    assert names == wanted | {"refcocog_val", "refcocog_test"}
    assert len({id(TASKS[f"refcoco{p}_val"].read) for p in ("", "+", "g")}) == 3


def test_every_task_is_whole():
    for name, task in TASKS.items():
        assert name == task.name and task.source and "\n" not in task.summary
        assert len(task.summary) <= 72, name
        assert task.max_tokens in (16, 32, 48, 64, 128, 256, 512)
        assert task.rule, "whose rule reads its answers"
    assert "our" in TASKS["mathvista_testmini"].summary  # the rule is not the paper's
    assert "MM1 states test-dev" in TASKS["vqav2_val"].source


@pytest.mark.parametrize(
    "name, said, right",
    [
        ("chartqa", "12.2", "12"),
        ("chartqa", " Yes\n", "yes"),
        ("docvqa_val", "Jan 3", "Jan 3"),
        ("seedbench", "B) a dog", "B"),
        ("mmbench_en_dev", "The answer is B", "B"),  # ours
        ("scienceqa", "It is one. The answer is B.", "B"),
    ],
)
def test_right_answers(name, said, right):
    assert score_of(name, said, right) == 100


@pytest.mark.parametrize(
    "name, said, right",
    [
        ("chartqa", "Yes.", "Yes"),  # as lmms-eval: nothing is cut
        ("chartqa", "12\nas the chart says", "12"),
        ("seedbench", "The answer is B", "B"),
        ("ai2d", "The answer is B", "B"),
        ("scienceqa", "(B)", "B"),
    ],
)
def test_wrong_answers(name, said, right):
    assert score_of(name, said, right) == 0


def score_of(name, said, right):
    task, choices = TASKS[name], ("a cat", "a dog")
    sample = Sample(id="0", choices=choices, answers=(right,))
    return task.metric([Answered(sample, said, task.clean(said, sample))]).total


def test_our_own_rules_are_called_ours():
    names = {name for name, task in TASKS.items() if task.rule.startswith("ours: ")}
    boxes = {name for name in TASKS if name.startswith("refcoco")}
    own = {"own_captions", "own_choices", "own_exact", "own_boxes"}
    mmbench = {"mmbench_en_dev", "mmbench_en_dev_once"}
    assert names == boxes | own | mmbench | {"mathvista_testmini"}


def test_shots_of_pretrained_models_end_and_are_cleaned_otherwise():
    task, one = TASKS["vqav2_val"], Sample(id="1")
    assert task.stop == () and task.shot_stop == ("\n", ".", ",", "Question")
    assert task.clean(" red, white.\nx ", one) == "red, white.\nx"
    assert task.shot_clean and task.shot_clean("red, white", one) == "red"
    assert TASKS["coco_karpathy_test"].shot_stop == ("\n",)


def test_names_that_are_known_elsewhere():
    assert find_task("coco") is TASKS["coco_karpathy_test"]
    assert find_task("refcoco+_bbox_rec_testA") is TASKS["refcoco+_testA"]
    assert set(ALIASES.values()) <= set(TASKS) and not set(ALIASES) & set(TASKS)


@pytest.mark.parametrize("name, near", [("vqa2", "vqav2"), ("MMBench", "mmbench")])
def test_a_name_that_is_not_known(name, near):
    message = rf"There is no task '{name}'. Did you mean '{near}'\? The tasks are ai2d"
    with pytest.raises(DatasetError, match=message) as raised:
        find_task(name)
    assert "own_vqa" in str(raised.value)
    with pytest.raises(DatasetError, match=r"There is no task 'zzzz'\. The tasks are"):
        find_task("zzzz")


def test_published_figures_belong_to_tasks():
    known = {benchmark for name in TASKS for benchmark in _benchmarks(name)}
    assert {one.benchmark for one in published()} <= known


def score(task, source, said):
    """What a task gives for these answers."""
    found = list(task.read(source, task.split))
    pairs = zip(found, said, strict=True)
    answered = [Answered(s, text, task.clean(text, s)) for s, text in pairs]
    return task.metric(answered)


def test_a_dataset_from_the_file_to_the_figure(tmp_path):
    good = {"image": "a.jpg", "text": "Is there a cat?", "label": "yes"}
    for part in yes_no.POPE_PARTS:
        rows = [good | {"question_id": 1}, good | {"question_id": 2, "label": "no"}]
        put(tmp_path, f"coco_pope_{part}.json", lines(rows))
    put(tmp_path, "val2014/a.jpg")
    said = ["Yes.", "No, there is not."] * 2 + ["yes", "yes"]
    found = score(TASKS["pope"], tmp_path, said)
    # F1: 1, 1 and 2 / 3
    assert found.total == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)


def test_questions_of_ones_own_from_the_file_to_the_figure(tmp_path):
    row = {"question": "?", "choices": ["u", "v"]}
    rows = [row | {"answer": "v"}, row | {"answer": "A"}]
    path = put(tmp_path, "mine.jsonl", lines(rows))
    assert score(TASKS["own_choices"], path, ["B.", "(B)"]).total == 50
    boxes = [{"question": "u", "box": [0, 0, 0.5, 0.5]}] * 2
    path = put(tmp_path, "boxes.jsonl", lines(boxes))
    said = ["<0,0,500,500>", "<500,500,999,999>"]
    assert score(TASKS["own_boxes"], path, said).total == 50


def test_the_readme_of_the_datasets_names_every_task_and_dataset():
    path = ROOT / "mm1_mlx" / "evaluation" / "datasets" / "README.md"
    text = path.read_text("utf-8")
    for name, task in TASKS.items():
        family = name.rpartition("_")[0]
        assert f"`{name}`" in text or family in text, name
        assert task.hub is None or task.hub.rpartition("/")[2] in text, name
