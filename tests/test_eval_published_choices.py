"""Benchmarks of yes or no and of choices, as they are published."""

import base64

import pytest
from dataset_kit import colour, lines, png, put
from test_eval_published import plain

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import options, yes_no

# --- yes or no ---


def test_pope(tmp_path):
    def row(number, thing, label):
        return {
            "question_id": number,
            "image": "COCO_val2014_000000310196.jpg",
            "text": f"Is there a {thing} in the image?",
            "label": label,
        }

    for part in yes_no.POPE_PARTS:
        rows = [row(1, "snowboard", "yes"), row(2, part, "no")]
        put(tmp_path, f"coco_pope_{part}.json", lines(rows))
    put(tmp_path, "val2014/COCO_val2014_000000310196.jpg", "blue")

    found = list(yes_no.read_pope(tmp_path, "test"))
    assert [(s.id, s.answers, s.fields["category"]) for s in found] == [
        ("random-1", ("yes",), "random"),
        ("random-2", ("no",), "random"),
        ("popular-1", ("yes",), "popular"),
        ("popular-2", ("no",), "popular"),
        ("adversarial-1", ("yes",), "adversarial"),
        ("adversarial-2", ("no",), "adversarial"),
    ]
    assert found[3].question == "Is there a popular in the image?"
    assert colour(found[5]) == "blue"
    assert found[1].fields["where"] == f"{tmp_path / 'coco_pope_random.json'}, line 2"
    part = list(yes_no.read_pope_part("popular")(tmp_path, "test"))
    assert [s.id for s in part] == ["popular-1", "popular-2"]


@pytest.mark.parametrize(
    "start",
    [
        *("", "MME_Benchmark/", "MME_Benchmark_release_version/"),
        "MME_Benchmark_release_version/MME_Benchmark/",
    ],
)
def test_mme(tmp_path, start):
    """Some categories have two folders, others one."""
    asked = "Is it a cat? Please answer yes or no.\t{}\nIs it a dog? Please.\t{}\n"
    put(tmp_path, f"{start}count/0001.txt", asked.format("Yes", "No"))
    put(tmp_path, f"{start}count/0001.jpg", "blue")
    inside = f"{start}artwork/questions_answers_YN/x 1.txt"
    put(tmp_path, inside, asked.format("No", "Yes"))
    put(tmp_path, f"{start}artwork/images/x 1.png", "green")

    art, _, count, last = sorted(yes_no.read_mme(tmp_path, "test"), key=lambda s: s.id)
    assert art.question == "Is it a cat? Please answer yes or no."
    assert (art.answers, colour(art)) == (("no",), "green")
    assert plain(art) == {"category": "artwork", "pair": "artwork/x 1"}
    assert (count.answers, last.answers) == (("yes",), ("no",))
    assert count.fields["pair"] == last.fields["pair"] == "count/0001"
    assert count.id != last.id and colour(last) == "blue"


# --- choices ---


def seed(folder) -> None:
    def question(number, kind, data_id, type_id):
        return {
            "question_id": number,
            "question": "How many towels?",
            "question_type_id": type_id,
            "choice_a": "One",
            "choice_b": "Two",
            "choice_c": "Three",
            "choice_d": "Four",
            "answer": "C",
            "data_id": data_id,
            "data_type": kind,
        }

    asked = [
        question("101669", "image", "1454426_2591111986", 5),
        question("103000", "video", "video_1.mp4", 10),
    ]
    kinds = {"Instances Counting": 5, "Action Recognition": 10}
    put(folder, "SEED-Bench.json", {"questions": asked, "question_type": kinds})
    # its pictures have no endings
    (folder / "SEED-Bench-image").mkdir(parents=True)
    (folder / "SEED-Bench-image" / "1454426_2591111986").write_bytes(png("blue"))


def test_seed(tmp_path):
    seed(tmp_path)
    put(tmp_path, "SEED-Bench-video-image/103000.png", "green")
    image, video = options.read_seed(tmp_path, "test")
    assert (image.id, image.answers) == ("101669", ("C",))
    assert image.choices == ("One", "Two", "Three", "Four")
    assert plain(image) == {"category": "Instances Counting", "data_type": "image"}
    assert plain(video) == {"category": "Action Recognition", "data_type": "video"}
    assert [colour(image), colour(video)] == ["blue", "green"]


def test_seed_images_alone_need_no_frames_of_videos(tmp_path):
    seed(tmp_path)
    (image,) = options.read_seed_image(tmp_path, "test")
    assert image.id == "101669"


NAMES = "index question hint A B C D answer category image source l2-category split"


def mmbench(rows: list[dict]) -> str:
    names = NAMES.split()
    table = [names, *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join("\t".join(map(str, row)) for row in table) + "\n"


@pytest.mark.parametrize(
    "file",
    ["mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_en_20231003.tsv"],
)
def test_mmbench(tmp_path, file):
    image = base64.b64encode(png("green")).decode()
    row = {
        "index": 241,
        "question": '"Which ""one"",\nof these?"',  # in quotes, over two lines
        "hint": "nan",
        "A": "cat",
        "B": "dog",
        "answer": "B",
        "category": "identity_reasoning",
        "image": image,
        "l2-category": "attribute_reasoning",
    }
    turned = {**row, "index": 1000241, "A": "dog", "B": "cat", "answer": "A"}
    turned |= {"image": 241, "hint": "Look.", "question": "Which?"}
    put(tmp_path, file, mmbench([row, turned]))

    first, second = options.read_mmbench(tmp_path, "dev")
    assert first.question == 'Which "one",\nof these?'
    assert (first.id, first.choices, first.answers) == ("241", ("cat", "dog"), ("B",))
    assert plain(first) == {
        "hint": "",
        "category": "identity_reasoning",
        "l2_category": "attribute_reasoning",
        "index": 241,
        "circle": "241",
        "pair": "241",
    }
    assert (second.id, second.answers) == ("1000241", ("A",))
    assert second.fields["circle"] == "241" and second.fields["hint"] == "Look."
    assert second.fields["where"].endswith(", line 4")  # after the two of the first
    assert [colour(first), colour(second)] == ["green", "green"]
    assert [s.id for s in options.read_mmbench_once(tmp_path, "dev")] == ["241"]


def test_none_is_a_choice_of_mmbench(tmp_path):
    """As a word, unlike a cell that pandas wrote as nan."""
    row = {"index": 7, "question": "Which?", "hint": "nan", "A": "None", "B": "red"}
    row |= {"answer": "A", "category": "x", "l2-category": "y"}
    row["image"] = base64.b64encode(png("green")).decode()
    put(tmp_path, "MMBench_DEV_EN.tsv", mmbench([row]))
    (found,) = options.read_mmbench(tmp_path, "dev")
    assert (found.choices, found.answers) == (("None", "red"), ("A",))


def test_mmbench_in_chinese_is_not_taken_for_it(tmp_path):
    put(tmp_path, "mmbench_dev_cn_20231003.tsv", mmbench([]))
    put(tmp_path, "mmbench_test_20230712.tsv", mmbench([]))
    with pytest.raises(
        DatasetError, match=r"has no mmbench_dev_20230712\.tsv or MMBen"
    ):
        options.read_mmbench(tmp_path, "dev")
