"""Benchmarks as parquet files with the columns of the hub's datasets."""

import pytest
from dataset_kit import cell, colour, write_table

from helpers import need
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import (
    captions,
    documents,
    options,
    refcoco,
    science,
    vqa,
    yes_no,
)
from mm1_mlx.evaluation.datasets.pictures import Stored
from mm1_mlx.evaluation.samples import Answered
from mm1_mlx.evaluation.tasks import TASKS

need("pyarrow")


def shard(folder, split: str, rows: list[dict], inside: str = "data"):
    return write_table(folder / inside / f"{split}-00000-of-00001.parquet", rows)


def one(folder, read, split, rows, *, name=None, inside="data"):
    """The samples of a table, and that the first one's picture is blue."""
    shard(folder, name or split, rows, inside)
    found = list(read(folder, split))
    assert colour(found[0]) == "blue"
    assert isinstance(found[0].images[0], Stored)
    return found


# --- each benchmark's columns ---


def test_coco_caption(tmp_path):
    rows = [
        {
            "question_id": "COCO_val2014_000000203564.jpg",
            "image": cell("blue"),
            "question": "Please carefully observe the image.",
            "answer": ["A bicycle.", "A clock."],
            "id": 37,
            "file_name": "COCO_val2014_000000203564.jpg",
        }
    ]
    (sample,) = one(tmp_path, captions.read_coco2014, "val", rows)
    assert (sample.id, sample.question) == ("203564", "")
    assert sample.answers == ("A bicycle.", "A clock.")


def test_karpathys_table_has_addresses(tmp_path):
    rows = [{"cocoid": 391895, "url": "https://x.org/1.jpg", "sentences": ["A man."]}]
    shard(tmp_path, "test", rows)
    (sample,) = captions.read_karpathy(tmp_path, "test")
    assert sample.images == ("https://x.org/1.jpg",) and sample.answers == ("A man.",)


def test_nocaps(tmp_path):
    rows = [
        {
            "image": cell("blue"),
            "image_id": 3,
            "image_domain": "near",
            "annotations_captions": ["A baby.", "A child."],
        }
    ]
    (sample,) = one(tmp_path, captions.read_nocaps, "val", rows, name="validation")
    assert (sample.id, sample.answers) == ("3", ("A baby.", "A child."))
    assert sample.fields["category"] == "near-domain"


def test_textcaps(tmp_path):
    rows = [{"image": cell("blue"), "image_id": "aa", "caption_str": ["A.", "B."]}]
    (sample,) = one(tmp_path, captions.read_textcaps, "val", rows)
    assert (sample.id, sample.answers) == ("aa", ("A.", "B."))


def test_vqav2(tmp_path):
    told = [{"answer": word, "answer_id": k} for k, word in enumerate(("a1", "a2"))]
    rows = [
        {
            "question_type": "is it",
            "multiple_choice_answer": "a1",
            "answers": told,
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
            "question": "Where?",
            "image": cell("blue"),
        }
    ]
    (sample,) = one(tmp_path, vqa.read_vqav2, "val", rows, name="validation")
    assert (sample.id, sample.answers) == ("262148000", ("a1", "a2"))
    assert sample.fields["answer_type"] == "other"


def test_okvqa_has_the_answers_as_people_gave_them(tmp_path):
    """A row of lmms-lab-encoder/OK-VQA: its original files have stems beside them."""
    people = ("racing",) * 6 + ("motocross",) * 2 + ("riding",) * 2
    rows = [
        {
            "question_id": "2971475",
            "image": cell("blue"),
            "question": "What sport can you use this for?",
            "answers": list(people),
            "question_type": "Vehicles and Transportation",
            "answer_type": "other",
        }
    ]
    (sample,) = one(tmp_path, vqa.read_okvqa, "val", rows, name="val2014")
    assert (sample.id, sample.answers) == ("2971475", people)
    assert "stems" not in sample.fields and sample.fields["category"] == "other"
    assert TASKS["ok_vqa_val2014"].target(sample) == "racing"
    for form in ("chat", "pretrain"):
        clean, metric, _ = TASKS["ok_vqa_val2014"].reading(form)
        score = metric([Answered(sample, "racing", clean("racing", sample))])
        assert score.total == 100, form


def test_vizwiz(tmp_path):
    rows = [
        {
            "question_id": "VizWiz_val_00000000.jpg",
            "image": cell("blue"),
            "question": "What is this?",
            "answers": ["basil"] * 10,
            "category": "other",
        }
    ]
    (sample,) = one(tmp_path, vqa.read_vizwiz, "val", rows)
    assert sample.id == "VizWiz_val_00000000.jpg"
    assert sample.answers == ("basil",) * 10


def test_textvqa_test_has_no_answers(tmp_path):
    rows = [
        {"question_id": 1, "question": "who?", "answers": [], "image": cell("blue")},
        {"question_id": 2, "question": "who?", "answers": ["x"], "image": cell()},
    ]
    found = one(tmp_path, vqa.read_textvqa, "test", rows)
    assert [sample.answers for sample in found] == [(), ("x",)]


@pytest.mark.parametrize("read", [vqa.read_textvqa, documents.read_docvqa])
def test_answers_must_be_there_in_val(tmp_path, read):
    row = {"question_id": 1, "questionId": 1, "question": "who?", "image": cell()}
    shard(tmp_path, "val", [row, {**row, "answers": ["x"]}])
    with pytest.raises(DatasetError, match=r"row 1: has no 'answers'"):
        read(tmp_path, "val")


def test_scienceqa_by_configuration(tmp_path):
    def row(image, answer):
        row = {"image": image, "question": "Which?", "choices": ["a", "b"]}
        return {**row, "answer": answer, "hint": "", "subject": "natural science"}

    full = [row(cell("blue"), 1), row(None, 0)]
    shard(tmp_path, "test", full, "ScienceQA-FULL")
    shard(tmp_path, "test", full[:1], "ScienceQA-IMG")
    with_picture, without = science.read_scienceqa(tmp_path, "test")
    assert (with_picture.answers, colour(with_picture)) == (("B",), "blue")
    assert (without.answers, without.images) == (("A",), ())
    assert without.fields["context"] == "none" and without.id == "2"
    (img,) = science.read_scienceqa_img(tmp_path, "test")
    assert img.fields["where"].startswith(str(tmp_path / "ScienceQA-IMG"))


def mmmu_row(**more):
    row = {f"image_{n}": None for n in range(1, 8)}
    row |= {
        "id": "validation_Art_Theory_7",
        "question": "Compare <image 2> with <image 1>.",
        "options": "['it is <image 1>', \"it's not\"]",
        "image_1": cell("red"),
        "image_2": cell("blue"),
        "answer": "B",
        "question_type": "multiple-choice",
        "topic_difficulty": "Easy",
    }
    return row | more


def test_mmmu_puts_pictures_where_the_text_names_them(tmp_path):
    opened = mmmu_row(
        id="validation_Accounting_1",
        question="How much?",
        options="[]",
        question_type="open",
        answer="['1,5', '1.5']",
        image_2=None,
    )
    shard(tmp_path, "validation", [mmmu_row()], "Art_Theory")
    shard(tmp_path, "validation", [opened], "Accounting")
    account, art = science.read_mmmu(tmp_path, "val")

    assert art.question == "Compare <image> with <image>."
    assert art.choices == ("it is <image>", "it's not") and art.answers == ("B",)
    assert [colour(art, n) for n in range(3)] == ["blue", "red", "red"]
    assert art.fields["category"] == "Art Theory"
    assert art.fields["kind"] == "multiple-choice"
    assert account.question == "<image>\nHow much?" and account.choices == ()
    assert account.answers == ("1,5", "1.5") and account.fields["kind"] == "open"
    assert len(account.images) == 1


def test_mmmu_keeps_the_answers_of_its_test_split_secret(tmp_path):
    shard(tmp_path, "test", [mmmu_row(answer="?")], "Art")
    (sample,) = science.read_mmmu(tmp_path, "test")
    assert sample.answers == () and len(sample.choices) == 2


@pytest.mark.parametrize(
    "more, message",
    [
        ({"image_1": None}, r"row 1: names <image 1>, but 'image_1' is empty"),
        ({"options": "[exit()]"}, r"'options' is .*, but must be a list"),
        ({"answer": "C"}, r"'answer' is 'C', but must name one of 2 choices"),
    ],
)
def test_mmmu_rows_that_make_no_sense(tmp_path, more, message):
    shard(tmp_path, "validation", [mmmu_row(**more)], "Art")
    with pytest.raises(DatasetError, match=message):
        science.read_mmmu(tmp_path, "val")


def test_mathvista(tmp_path):
    rows = [
        {
            "pid": "1",
            "question": "What is d?",
            "image": "images/1.jpg",
            "decoded_image": cell("blue"),
            "choices": None,
            "unit": None,
            "precision": 1.0,
            "answer": "1.2",
            "question_type": "free_form",
            "answer_type": "float",
            "metadata": {"category": "math", "skills": ["x"]},
            "query": "Hint: ...",
        },
        {"pid": "2", "question": "Q", "decoded_image": cell(), "choices": ["a", "b"]},
    ]
    rows[1]["answer"] = "b"
    path = tmp_path / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet"
    write_table(path, rows)
    found = list(science.read_mathvista(tmp_path, "testmini"))
    assert [s.answers for s in found] == [("1.2",), ("b",)] and colour(
        found[0]
    ) == "blue"
    assert found[0].fields["precision"] == 1
    assert found[0].fields["category"] == "math"


def test_ai2d(tmp_path):
    rows = [
        {"question": "Q", "options": ["a", "b"], "answer": "1", "image": cell("blue")}
    ]
    (sample,) = one(tmp_path, science.read_ai2d, "test", rows)
    assert (sample.id, sample.choices, sample.answers) == ("1", ("a", "b"), ("B",))


def test_chartqa_of_lmms_lab_and_of_hugging_face(tmp_path):
    rows = [
        {"type": kind, "question": "Q", "answer": "14", "image": cell("blue")}
        for kind in ("human_test", "augmented_test")
    ]
    found = one(tmp_path / "a", documents.read_chartqa, "test", rows)
    assert [s.fields["category"] for s in found] == ["human", "augmented"]
    assert [s.id for s in found] == ["1", "2"] and found[0].answers == ("14",)
    rows = [
        {"image": cell("blue"), "query": "Q", "label": ["14"], "human_or_machine": k}
        for k in (0, 1)
    ]
    found = one(tmp_path / "b", documents.read_chartqa, "test", rows)
    assert [s.fields["type"] for s in found] == ["human", "augmented"]


def test_docvqa_and_infovqa_are_two_configurations(tmp_path):
    def rows(kinds, answer):
        row = {"questionId": "337", "question": "Q", "image": cell("blue")}
        return [{**row, **kinds, "answers": answer}]

    doc = rows({"question_types": ["form"]}, ["1"])
    info = rows({"answer_type": ["single span"]}, ["2"])
    shard(tmp_path, "validation", doc, "DocVQA")
    shard(tmp_path, "validation", info, "InfographicVQA")
    (one,) = documents.read_docvqa(tmp_path, "val")
    (two,) = documents.read_infovqa(tmp_path, "val")
    assert (one.answers, two.answers) == (("1",), ("2",))
    assert (one.fields["category"], two.fields["category"]) == ("form", "single span")


def test_pope_takes_the_configuration_of_all_three(tmp_path):
    def row(part, number):
        row = {"id": "1", "question_id": number, "question": "Is it?", "answer": "yes"}
        return {**row, "image": cell("blue"), "category": part}

    shard(tmp_path, "adversarial", [row("adversarial", "9")], "Full")
    rows = [row("adversarial", "1"), row("random", "1")]
    found = one(tmp_path, yes_no.read_pope, "test", rows)
    assert [s.id for s in found] == ["adversarial-1", "random-1"]


def test_mme(tmp_path):
    rows = [
        {
            "question_id": "code_reasoning/0020.png",
            "image": cell("blue"),
            "question": question,
            "answer": answer,
            "category": "code_reasoning",
        }
        for question, answer in (("Is it 1?", "Yes"), ("Is it 2?", "No"))
    ]
    found = one(tmp_path, yes_no.read_mme, "test", rows)
    assert [s.answers for s in found] == [("yes",), ("no",)]
    assert {s.fields["pair"] for s in found} == {"code_reasoning/0020.png"}
    assert len({s.id for s in found}) == 2


def test_seed_has_lists_of_pictures(tmp_path):
    row = {f"choice_{k}": k.upper() for k in "abcd"}
    row |= {"question_id": "1", "question": "Q", "answer": "D"}
    rows = [
        {**row, "image": [cell("blue"), cell("green")], "data_type": "video"},
        {**row, "image": [cell("red")], "data_type": "image"},
    ]
    rows[0]["question_type_id"], rows[1]["question_type_id"] = 10, 5
    video, image = one(tmp_path, options.read_seed, "test", rows)
    assert [colour(video, 0), colour(video, 1)] == ["blue", "green"]
    assert video.fields["category"] == "Action Recognition"
    assert (video.id, image.id) == ("1", "1#2")  # an id that comes again
    (only,) = options.read_seed_image(tmp_path, "test")
    assert only.fields["category"] == "Instances Counting" and colour(only) == "red"


def test_mmbench_takes_the_english_configuration(tmp_path):
    def row(question):
        row = {"index": 241, "question": question, "hint": "nan", "answer": "A"}
        row |= {"A": "cat", "B": "dog", "C": "nan", "D": "nan", "category": "x"}
        return {**row, "L2-category": "y", "image": cell("blue")}

    shard(tmp_path, "dev", [row("中文?")], "cn")
    shard(tmp_path, "dev", [row("English?")], "en")
    (sample,) = options.read_mmbench(tmp_path, "dev")
    assert (sample.question, sample.choices) == ("English?", ("cat", "dog"))
    assert sample.fields["l2_category"] == "y" and colour(sample) == "blue"


def test_refcoco_has_several_phrases_in_a_row(tmp_path):
    rows = [
        {
            "question_id": "469306",
            "image": cell("blue"),  # 8 x 6
            "question": "Please carefully observe the area.",
            "answer": ["guy in middle", "man"],
            "segmentation": [1.0, 2.0],
            "bbox": [2.0, 3.0, 4.0, 1.5],
            "iscrowd": 0,
            "file_name": "COCO_train2014_000000296747_0.jpg",
        }
    ]
    found = one(tmp_path, refcoco.read_refcoco, "testA", rows)
    assert [(s.id, s.question) for s in found] == [
        ("469306-0", "guy in middle"),
        ("469306-1", "man"),
    ]
    assert found[1].fields["box"] == (0.25, 0.5, 0.75, 0.75)
    assert found[1].fields["size"] == (8, 6)
