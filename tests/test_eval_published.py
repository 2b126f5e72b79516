"""Benchmarks in the layouts in which they are published, made up and tiny."""

from pathlib import Path

import pytest
from dataset_kit import colour, put

from mm1_mlx.evaluation.datasets import captions, documents, science, vqa
from mm1_mlx.evaluation.samples import Sample


def plain(sample: Sample) -> dict:
    """Its fields without the place."""
    return {key: value for key, value in sample.fields.items() if key != "where"}


# --- captions ---


def test_coco_by_karpathys_split(tmp_path):
    def image(number, split, folder="val2014"):
        return {
            "filepath": folder,
            "filename": f"COCO_{folder}_{number:012d}.jpg",
            "split": split,
            "cocoid": number,
            "imgid": 7,
            "sentences": [
                {"raw": f"Picture {number}.", "tokens": ["picture"], "sentid": 1},
                {"raw": "A thing.", "tokens": ["a", "thing"], "sentid": 2},
            ],
        }

    images = [
        image(42, "test"),
        image(43, "val"),
        image(44, "restval"),
        image(45, "train", "train2014"),
    ]
    put(tmp_path, "dataset_coco.json", {"images": images, "dataset": "coco"})
    put(tmp_path, "val2014/COCO_val2014_000000000042.jpg", "blue")
    for number in (43, 44):
        put(tmp_path, f"val2014/COCO_val2014_{number:012d}.jpg")
    put(tmp_path, "train2014/COCO_train2014_000000000045.jpg", "green")

    (found,) = captions.read_karpathy(tmp_path, "test")
    assert found.id == "42" and found.question == "" and found.choices == ()
    assert found.answers == ("Picture 42.", "A thing.")
    assert colour(found) == "blue"
    assert plain(found) == {"image_id": "42"}
    assert found.fields["where"] == f"{tmp_path / 'dataset_coco.json'}, entry of " + (
        "'images' 1"
    )
    trained = list(captions.read_karpathy(tmp_path, "train"))
    assert [sample.id for sample in trained] == ["44", "45"]
    assert colour(trained[1]) == "green"


def captions_json(names: dict[int, str], **more) -> dict:
    return {
        "images": [{"id": n, "file_name": f, **more} for n, f in names.items()],
        "annotations": [
            {"image_id": n, "id": 10 * n + k, "caption": f"{f} {k}"}
            for k in range(2)
            for n, f in names.items()
        ],
    }


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_by_the_api_of_coco(tmp_path, year):
    found = captions_json({9: "nine.jpg", 3: "three.jpg"})
    put(tmp_path, f"annotations/captions_val{year}.json", found)
    put(tmp_path, f"val{year}/nine.jpg", "blue")
    put(tmp_path, f"val{year}/three.jpg")

    nine, three = getattr(captions, f"read_coco{year}")(tmp_path, "val")
    assert (nine.id, nine.answers) == ("9", ("nine.jpg 0", "nine.jpg 1"))
    assert (three.id, three.answers) == ("3", ("three.jpg 0", "three.jpg 1"))
    assert [colour(nine), colour(three)] == ["blue", "red"]


def test_nocaps_has_domains_and_borrows_shots_of_coco(tmp_path):
    found = captions_json({0: "0013ea.jpg"}, domain="out-domain")
    put(tmp_path, "nocaps_val_4500_captions.json", found)
    put(tmp_path, "validation/0013ea.jpg", "green")
    put(tmp_path, "captions_train2014.json", captions_json({5: "five.jpg"}))
    put(tmp_path, "train2014/five.jpg")

    (sample,) = captions.read_nocaps(tmp_path, "val")
    assert sample.answers == ("0013ea.jpg 0", "0013ea.jpg 1")
    assert plain(sample) == {
        "image_id": "0",
        "domain": "out-domain",
        "category": "out-domain",
    }
    (shot,) = captions.read_nocaps(tmp_path, "train")
    assert shot.id == "5"


def test_textcaps_has_a_row_for_each_caption(tmp_path):
    def row(image, caption):
        return {
            "image_id": image,
            "caption_str": caption,
            "caption_id": 1,
            "image_path": f"train/{image}.jpg",
            "reference_strs": ["not read"],
        }

    rows = [row("aa", "A sign."), row("bb", "A can."), row("aa", "A stop sign.")]
    put(tmp_path, "TextCaps_0.1_val.json", {"dataset_name": "textcaps", "data": rows})
    put(tmp_path, "train_images/aa.jpg", "blue")
    put(tmp_path, "train_images/bb.jpg")

    a, b = captions.read_textcaps(tmp_path, "val")
    assert (a.id, a.answers) == ("aa", ("A sign.", "A stop sign."))
    assert (b.id, b.answers) == ("bb", ("A can.",))
    assert colour(a) == "blue"


# --- questions with ten answers ---


def ten(word: str, **more) -> list[dict]:
    return [
        {"answer": word, "answer_confidence": "yes", "answer_id": k, **more}
        for k in range(1, 11)
    ]


def vqa_files(folder, prefix: str, annotations: str, answers: list[dict]) -> None:
    asked = {"image_id": 42, "question": "What is it?", "question_id": 420}
    told = {
        "image_id": 42,
        "question_id": 420,
        "question_type": "what is",
        "answer_type": "other",
        "multiple_choice_answer": "cat",
        "answers": answers,
    }
    put(folder, f"{prefix}_val2014_questions.json", {"questions": [asked]})
    put(folder, f"{annotations}_val2014_annotations.json", {"annotations": [told]})
    put(folder, "val2014/COCO_val2014_000000000042.jpg", "blue")


def test_vqav2(tmp_path):
    vqa_files(tmp_path, "v2_OpenEnded_mscoco", "v2_mscoco", ten("cat"))
    (sample,) = vqa.read_vqav2(tmp_path, "val")
    assert (sample.id, sample.question) == ("420", "What is it?")
    assert sample.answers == ("cat",) * 10
    assert plain(sample) == {
        "image_id": 42,
        "question_type": "what is",
        "answer_type": "other",
        "category": "other",
        "multiple_choice_answer": "cat",
    }
    assert colour(sample) == "blue"


def test_vqav2_test_dev_has_no_answers(tmp_path):
    asked = [{"image_id": 7, "question": "Why?", "question_id": 70}]
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    put(tmp_path, name, {"questions": asked})
    put(tmp_path, "test2015/COCO_test2015_000000000007.jpg")
    (sample,) = vqa.read_vqav2(tmp_path, "testdev")
    assert sample.answers == () and colour(sample) == "red"


def test_okvqa_keeps_the_answers_as_they_were_given(tmp_path):
    answers = ten("race", raw_answer="racing")
    vqa_files(tmp_path, "OpenEnded_mscoco", "mscoco", answers)
    vqa_files(tmp_path, "v2_OpenEnded_mscoco", "v2_mscoco", ten("cat"))  # beside it
    (sample,) = vqa.read_okvqa(tmp_path, "val")
    assert sample.answers == ("racing",) * 10
    assert sample.fields["stems"] == ("race",) * 10


def test_textvqa(tmp_path):
    row = {
        "question": "what does it say?",
        "question_id": 34602,
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Sign"],
        "answers": ["stop"] * 10,
        "set_name": "val",
    }
    put(tmp_path, "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": [row]})
    put(tmp_path, "train_images/003a8ae2ef43b901.jpg", "green")
    (sample,) = vqa.read_textvqa(tmp_path, "val")
    assert (sample.id, sample.question) == ("34602", "what does it say?")
    assert sample.answers == ("stop",) * 10 and colour(sample) == "green"


def test_vizwiz(tmp_path):
    row = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. There is another picture I hope it is a better one.",
        "answers": ten("unanswerable"),
        "answer_type": "unanswerable",
        "answerable": 0,
    }
    put(tmp_path, "Annotations/val.json", [row])
    put(tmp_path, "val/VizWiz_val_00000000.jpg", "blue")
    (sample,) = vqa.read_vizwiz(tmp_path, "val")
    assert sample.id == "VizWiz_val_00000000"
    assert sample.answers == ("unanswerable",) * 10
    assert sample.fields["category"] == "unanswerable" and colour(sample) == "blue"


# --- school, college, diagrams ---


def science_qa(folder) -> None:
    def problem(answer, image, split="test"):
        return {
            "question": "Which is it?",
            "choices": ["west", "east"],
            "answer": answer,
            "hint": "Look.",
            "image": image,
            "grade": "grade2",
            "subject": "social science",
            "topic": "geography",
            "split": split,
        }

    put(
        folder,
        "problems.json",
        {
            "1": problem(0, "image.png", "train"),
            "4": problem(1, "image.png"),
            "5": problem(0, None),
        },
    )
    put(folder, "pid_splits.json", {"train": ["1"], "test": ["4", "5"], "val": []})
    put(folder, "images/test/4/image.png", "green")
    put(folder, "images/train/1/image.png")


def test_scienceqa(tmp_path):
    science_qa(tmp_path)
    four, five = science.read_scienceqa(tmp_path, "test")
    assert (four.id, four.choices, four.answers) == ("4", ("west", "east"), ("B",))
    assert colour(four) == "green" and four.fields["context"] == "image"
    assert (five.id, five.images, five.answers) == ("5", (), ("A",))
    assert plain(five) == {
        "hint": "Look.",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "social science",
        "context": "text",
    }
    assert [s.id for s in science.read_scienceqa_img(tmp_path, "test")] == ["4"]
    assert [s.id for s in science.read_scienceqa(tmp_path, "train")] == ["1"]


def test_mathvista(tmp_path):
    problem = {
        "question": "What is d?",
        "image": "images/1.jpg",
        "choices": None,
        "unit": None,
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "pid": "1",
        "metadata": {"category": "math-targeted-vqa", "task": "textbook", "skills": []},
        "query": "Hint: ...\nQuestion: What is d?",
    }
    choice = {
        **problem,
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["(a)", "(b)"],
        "answer": "(b)",
        "precision": None,
    }
    put(tmp_path, "testmini.json", {"1": problem, "2": choice})
    put(tmp_path, "images/1.jpg", "blue")
    one, two = science.read_mathvista(tmp_path, "testmini")
    assert (one.id, one.answers, one.choices) == ("1", ("1.2",), ())
    assert one.fields["precision"] == 1 and one.fields["answer_type"] == "float"
    assert one.fields["category"] == "math-targeted-vqa"
    assert one.fields["query"] == "Hint: ...\nQuestion: What is d?"
    assert (two.id, two.answers, two.choices) == ("2", ("(b)",), ("(a)", "(b)"))
    assert colour(one) == "blue" and "precision" not in two.fields


def test_ai2d(tmp_path):
    def question(label, number, file):
        return {
            "abcLabel": label,
            "answerTexts": ["ears", "nose", "mouth", "face"],
            "correctAnswer": 3,
            "questionId": f"{file}-{number}",
        }

    asked = {
        "What is A?": question(True, 0, "10.png"),
        "What lives?": question(False, 1, "10.png"),
    }
    other = {"Which?": question(False, 0, "2.png")}
    for file, questions in (("10.png", asked), ("2.png", other)):
        found = {"questions": questions, "imageName": file}
        put(tmp_path, f"ai2d/questions/{file}.json", found)
    put(tmp_path, "ai2d/images/10.png", "red")
    put(tmp_path, "ai2d/abc_images/10.png", "blue")
    put(tmp_path, "ai2d/images/2.png")
    put(tmp_path, "ai2d_test_ids.csv", "10\n11\n")

    a, b = science.read_ai2d(tmp_path, "test")
    assert (a.id, a.question, a.answers) == ("10.png-0", "What is A?", ("D",))
    assert a.choices == ("ears", "nose", "mouth", "face")
    assert [colour(a), colour(b)] == ["blue", "red"]
    assert [s.id for s in science.read_ai2d(tmp_path, "train")] == ["2.png-0"]


# --- charts and documents ---


def test_chartqa(tmp_path):
    def row(query, label):
        return {"imgname": "two.png", "query": query, "label": label}

    root = tmp_path / "ChartQA Dataset"
    put(root, "test/test_human.json", [row("How many?", "14")])
    put(root, "test/test_augmented.json", [row("What?", "0.57"), row("Who?", "Me")])
    put(root, "test/png/two.png", "green")
    put(root, "val/val_human.json", [])

    found = list(documents.read_chartqa(tmp_path, "test"))
    assert [(s.id, s.question, s.answers) for s in found] == [
        ("human-0", "How many?", ("14",)),
        ("augmented-0", "What?", ("0.57",)),
        ("augmented-1", "Who?", ("Me",)),
    ]
    assert plain(found[1]) == {"type": "augmented", "category": "augmented"}
    assert colour(found[0]) == "green"


def test_chartqa_in_a_folder_that_is_named_from_here(tmp_path, monkeypatch):
    for part in ("human", "augmented"):
        row = {"imgname": "two.png", "query": "How many?", "label": "14"}
        put(tmp_path, f"charts/test/test_{part}.json", [row])
    put(tmp_path, "charts/test/png/two.png", "green")
    monkeypatch.chdir(tmp_path)
    found = list(documents.read_chartqa(Path("charts"), "test"))
    assert [colour(sample) for sample in found] == ["green", "green"]


@pytest.mark.parametrize("place", ["documents", "spdocvqa_images"])
def test_docvqa(tmp_path, place):
    row = {
        "questionId": 49153,
        "question": "What is the value?",
        "question_types": ["figure/diagram"],
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "answers": ["0.28", ".28"],
        "data_split": "val",
    }
    found = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": [row]}
    put(tmp_path, "spdocvqa_qas/val_v1.0_withQT.json", found)
    put(tmp_path, f"{place}/pybv0228_81.png", "blue")
    (sample,) = documents.read_docvqa(tmp_path, "val")
    assert (sample.id, sample.answers) == ("49153", ("0.28", ".28"))
    assert sample.fields["category"] == "figure/diagram" and colour(sample) == "blue"


def test_infovqa(tmp_path):
    row = {
        "questionId": 98313,
        "question": "Which browser?",
        "answers": ["firefox"],
        "answer_type": ["single span"],
        "image_local_name": "20471.jpeg",
        "ocr_output_file": "20471.json",
        "data_split": "val",
    }
    put(tmp_path, "infographicsVQA_val_v1.0_withQT.json", {"data": [row]})
    put(tmp_path, "infographicsvqa_images/20471.jpeg", "green")
    (sample,) = documents.read_infovqa(tmp_path, "val")
    assert (sample.id, sample.answers) == ("98313", ("firefox",))
    assert sample.fields["category"] == "single span" and colour(sample) == "green"
