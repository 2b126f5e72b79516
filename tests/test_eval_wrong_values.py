"""Dataset files with fields that are missing, of a wrong type, or lead elsewhere."""

import pytest
from dataset_kit import lines, put
from test_eval_published import science_qa
from test_eval_published_choices import seed
from test_eval_refcoco import dataset, instances

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import captions, options, refcoco, rows, science
from mm1_mlx.evaluation.datasets.rows import Fault
from mm1_mlx.evaluation.tasks import TASKS


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("own_boxes", {"answer": "x"}, r"line 2: has no 'box', only \['#', 'answer'"),
        ("own_choices", {"answer": "x"}, r"line 2: has no 'choices', only"),
        ("own_choices", {"choices": [], "answer": "x"}, r"line 2: 'choices' is empty"),
        ("own_exact", {"box": [0, 0, 1, 1]}, r"line 2: has no 'answers' or 'answer'"),
        ("own_captions", {"box": [0, 0, 1, 1]}, r"line 2: has no 'answers' or 'answe"),
        ("own_boxes", {"box": [True, 0, 1, 1]}, r"line 2: 'box' is \[True, 0, 1, 1\]"),
        ("own_boxes", {"box": [0.5, 0, 0.5, 1]}, r"'box' is .*, a box without area"),
    ],
)
def test_own_questions_have_what_their_task_needs(tmp_path, task, row, message):
    good = {"answer": "A", "choices": ["A", "B"], "box": [0, 0, 1, 1], "question": "Q"}
    path = put(tmp_path, "mine.jsonl", lines([good, {"question": "Q"} | row]))
    with pytest.raises(DatasetError, match=message):
        TASKS[task].read(path, "test")


PROBLEM = {"question": "Q", "image": "1.jpg", "answer": "1.2", "pid": "1"}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"answer": None}, r"problem 1: has no 'answer'"),
        ({"answer_type": "float"}, r"problem 1: has no 'precision'"),
        ({"precision": "x"}, r"'precision' is 'x', but must be a number of decimals"),
        ({"precision": [1]}, r"'precision' is \[1\], but"),
        ({"precision": float("inf")}, r"'precision' is inf, but"),
        ({"precision": float("nan")}, r"'precision' is nan, but"),
        ({"precision": 1.5}, r"'precision' is 1\.5, but"),
        ({"query": 5}, r"'query' is 5, but must be a text"),
    ],
)
def test_mathvista(tmp_path, more, message):
    put(tmp_path, "testmini.json", {"1": PROBLEM | more})
    put(tmp_path, "1.jpg")
    with pytest.raises(DatasetError, match=message):
        science.read_mathvista(tmp_path, "testmini")


@pytest.mark.parametrize(
    "more, message",
    [
        ({"hint": 5}, r"problem 4: 'hint' is 5, but must be a text"),
        ({"hint": ["a"]}, r"problem 4: 'hint' is \['a'\], but must be a text"),
        ({"answer": float("nan")}, r"problem 4: 'answer' is nan, but must name"),
        ({"answer": 0.5}, r"problem 4: 'answer' is 0\.5, but must name"),
        ({"split": "../.."}, r"problem 4: .* is not a path within the dataset's fold"),
    ],
)
def test_scienceqa(tmp_path, more, message):
    science_qa(tmp_path)
    problems = rows.read_json(tmp_path / "problems.json")
    problems["4"] |= more
    put(tmp_path, "problems.json", problems)
    put(tmp_path.parent, "4/image.png")
    with pytest.raises(DatasetError, match=message):
        science.read_scienceqa(tmp_path, "test")


@pytest.mark.parametrize(
    "more, message",
    [
        ({"filepath": "../out"}, r"'\.\./out' is not a path within the dataset's fol"),
        ({"sentences": ["x"]}, r"a sentence is 'x', but must be an object"),
        ({"sentences": [{"raw": 1}]}, r"'raw' is 1, but must be a text"),
        ({"sentences": []}, r"'sentences' is empty"),
    ],
)
def test_coco_of_karpathy(tmp_path, more, message):
    image = {"filepath": "val2014", "filename": "a.jpg", "cocoid": 1, "split": "test"}
    image |= {"sentences": [{"raw": "A cat."}]} | more
    put(tmp_path, "data/dataset_coco.json", {"images": [image]})
    put(tmp_path, "data/val2014/a.jpg")
    put(tmp_path, "out/a.jpg")
    with pytest.raises(DatasetError, match=message):
        captions.read_karpathy(tmp_path / "data", "test")


@pytest.mark.parametrize("width", [0, "8", True, None, float("inf")])
def test_the_size_of_a_picture_of_refcoco(tmp_path, width):
    images = instances(1, 2)["images"]
    dataset(tmp_path, images=[images[0] | {"width": width}, images[1]])
    with pytest.raises(DatasetError, match=r"has the size|has no 'width'"):
        list(refcoco.read_refcoco(tmp_path, "val"))


@pytest.mark.parametrize("box", [[0, 0, float("inf"), 8], [True, 0, 8, 8], "abcd"])
def test_the_box_of_refcoco(tmp_path, box):
    notes = instances(1, 2)["annotations"]
    dataset(tmp_path, annotations=[notes[0] | {"bbox": box}, notes[1]])
    with pytest.raises(DatasetError, match=r"'bbox' is .*, but must be left, top, wid"):
        list(refcoco.read_refcoco(tmp_path, "val"))


def test_ai2d_whose_test_ids_are_no_text(tmp_path):
    put(tmp_path, "ai2d_test_ids.csv", b"\xff\xfe")
    put(tmp_path, "questions/1.png.json", {})
    with pytest.raises(DatasetError, match=r"ai2d_test_ids\.csv cannot be read"):
        science.read_ai2d(tmp_path, "test")


def test_seed_whose_kinds_are_lists(tmp_path):
    seed(tmp_path)
    path = tmp_path / "SEED-Bench.json"
    found = rows.read_json(path)
    put(tmp_path, "SEED-Bench.json", found | {"question_type": {"Scene": [1]}})
    (sample,) = options.read_seed_image(tmp_path, "test")
    assert sample.fields["category"] == "5"


def test_any_other_wrong_type_is_told_with_its_place():
    """Whatever a reader did not think of."""

    def make(values):
        return [values["a"] + 1]

    with pytest.raises(DatasetError, match=r"line 3: a value of the wrong type \('can"):
        rows.samples_of(lambda: [("line 3", {"a": "x"})], make, "file")


@pytest.mark.parametrize("value", [float("nan"), 0.5, -1, 4, True])
def test_a_letter_that_names_no_choice(value):
    with pytest.raises(Fault, match="must name one of 4 choices"):
        rows.letter({"answer": value}, "answer", 4)
    assert rows.letter({"answer": 2.0}, "answer", 4) == "C"
