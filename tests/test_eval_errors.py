"""Datasets that are broken, hostile or not there; questions of one's own."""

import base64
import io
import zipfile

import pytest
from dataset_kit import cell, colour, lines, png, put, write_table

from helpers import need
from mm1_mlx.errors import DatasetError, ImageError
from mm1_mlx.evaluation.datasets import (
    captions,
    documents,
    options,
    own,
    pictures,
    science,
    tsv,
    vqa,
    yes_no,
)
from mm1_mlx.evaluation.datasets.rows import Fault, shown
from mm1_mlx.evaluation.tasks import TASKS
from mm1_mlx.inputs.images import load_image


def vizwiz(folder, *rows):
    put(folder, "Annotations/val.json", list(rows))
    put(folder, "val/a.jpg", "blue")
    return vqa.read_vizwiz(folder, "val")


GOOD = {"image": "a.jpg", "question": "Q", "answers": [{"answer": "x"}]}


# --- names of pictures that lead elsewhere ---


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.jpg", "/etc/passwd", "a/../../b.jpg", "..\\b.jpg", "C:\\b.jpg"),
        *("\\\\host\\b.jpg", "https://x.org/a.jpg", "a\0.jpg", "."),
    ],
)
def test_a_picture_outside_of_the_folder_is_refused(tmp_path, name):
    put(tmp_path, "secret.jpg")
    with pytest.raises(
        DatasetError, match=r"is not a path within the dataset's folder"
    ):
        vizwiz(tmp_path / "data", GOOD | {"image": name})


def test_a_link_is_followed(tmp_path):
    """People link the folders of COCO into several datasets."""
    put(tmp_path, "coco/a.jpg", "blue")
    put(tmp_path, "data/Annotations/val.json", [GOOD])
    (tmp_path / "data" / "val").symlink_to(tmp_path / "coco")
    (sample,) = vqa.read_vizwiz(tmp_path / "data", "val")
    assert colour(sample) == "blue"


@pytest.mark.parametrize(
    "row, message",
    [
        (GOOD | {"image": 3}, r"'image' is 3, but must be a text"),
        (
            GOOD | {"image": "b.jpg"},
            r"there is no picture 'b\.jpg' in val, images/val, .* of \S*/test_a",
        ),
        (GOOD | {"question": " "}, r"'question' is ' ', but must be a text"),
        (GOOD | {"answers": []}, r"'answers' is \[\], but must be a list of texts"),
        (GOOD | {"answers": [{"a": 1}]}, r"'answers' is .*, but must be a list of te"),
        ({"image": "a.jpg"}, r"has no 'question', only \["),
        ([1], r"not a JSON object but \[1\]"),
        ("x" * 500, r"not a JSON object but 'x+\.\.\.x+'"),
    ],
)
def test_a_field_that_is_missing_or_wrong(tmp_path, row, message):
    with pytest.raises(DatasetError, match=message) as raised:
        vizwiz(tmp_path, GOOD, row)
    assert "1 of 2 cannot be used. " in str(raised.value)
    assert "val.json, entry 2: " in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_five_problems_are_told_and_how_many_there_are(tmp_path):
    bad = [GOOD | {"image": f"{k}.jpg"} for k in range(7)]
    with pytest.raises(DatasetError) as raised:
        vizwiz(tmp_path, *bad, GOOD)
    text = str(raised.value)
    assert "7 of 8 cannot be used." in text and text.endswith("; and 2 more.")
    assert [f"entry {k}:" in text for k in range(1, 8)] == [True] * 5 + [False] * 2


# --- files ---


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1},\n {"b": 2]', r"val\.json, line 2, column 9: not JSON \("),
        ("", r"val\.json, line 1, column 1: not JSON"),
        (b"[\xff]", r"val\.json is not JSON"),
        ("[" * 100_000, r"val\.json is not JSON"),
        ('{"questions": []}', r"val\.json must hold one JSON list, but holds \{'que"),
        ("[]", r"val\.json holds no samples"),
    ],
)
def test_a_broken_json_file(tmp_path, text, message):
    put(tmp_path, "Annotations/val.json", text)
    with pytest.raises(DatasetError, match=message):
        vqa.read_vizwiz(tmp_path, "val")


def test_a_json_file_without_its_list(tmp_path):
    put(tmp_path, "TextVQA_0.5.1_val.json", {"rows": []})
    message = r"must hold an object with the list 'data', but holds \{'rows': \[\]\}"
    with pytest.raises(DatasetError, match=message):
        vqa.read_textvqa(tmp_path, "val")


@pytest.mark.parametrize(
    "read, split, message",
    [
        (captions.read_karpathy, "test", r"has no dataset_coco\.json \(as published\)"),
        (captions.read_coco2014, "val", r"has no captions_val2014\.json"),
        (captions.read_coco2017, "val", r"has no captions_val2017\.json"),
        (captions.read_nocaps, "val", r"has no nocaps_val_\*captions\.json"),
        (captions.read_textcaps, "val", r"has no TextCaps_\*_val\.json"),
        (vqa.read_vqav2, "val", r"has no v2_OpenEnded_mscoco_val2014_questions\.json"),
        (
            vqa.read_vqav2,
            "dev",
            r"has no split 'dev' \(it has train, val, testdev",
        ),
        (vqa.read_textvqa, "val", r"has no TextVQA_\*_val\.json"),
        (vqa.read_vizwiz, "val", r"has no Annotations/val\.json or val\.json"),
        (science.read_scienceqa, "test", r"has no problems\.json"),
        (science.read_mmmu, "val", r"has no parquet files of the split 'val', as MMMU"),
        (science.read_mathvista, "testmini", r"has no testmini\.json"),
        (science.read_ai2d, "test", r"has no ai2d_test_ids\.csv"),
        (documents.read_chartqa, "test", r"has no test_human\.json"),
        (documents.read_docvqa, "val", r"has no val_v1\.0_withQT\.json or val_v1\.0\."),
        (documents.read_infovqa, "val", r"has no infographicsVQA_val_v1\.0_withQT"),
        (yes_no.read_pope, "test", r"has no coco_pope_random\.json"),
        (yes_no.read_mme, "test", r"has no MME: MME_Benchmark_release_version"),
        (options.read_seed, "test", r"has no SEED-Bench\.json"),
        (options.read_mmbench, "dev", r"has no mmbench_dev_20230712\.tsv"),
        (own.read_own, "test", r"has no test\.jsonl or test\.json"),
    ],
)
def test_a_folder_without_the_dataset(tmp_path, read, split, message):
    put(tmp_path, "other.json", {})
    with pytest.raises(DatasetError, match=message) as raised:
        read(tmp_path, split)
    assert str(raised.value).endswith("It has: other.json.")


def test_questions_without_annotations_and_the_other_way(tmp_path):
    asked = {"image_id": 42, "question": "Q", "question_id": 1}
    put(
        tmp_path,
        "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [asked, asked | {"image_id": "x", "question_id": 2}]},
    )
    told = [{"answers": ["x"]}, {"question_id": 2, "answers": ["x"]}]
    put(tmp_path, "v2_mscoco_val2014_annotations.json", {"annotations": told})
    with pytest.raises(DatasetError) as raised:
        vqa.read_vqav2(tmp_path, "val")
    text = str(raised.value)
    assert "annotations.json, entry of 'annotations' 1: has no 'question_id'" in text
    assert "entry of 'questions' 1: question 1 has no annotation in " in text
    assert "'image_id' is 'x', but must be a number of COCO" in text
    assert "3 of 3 cannot be used" in text


def test_captions_that_do_not_fit(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]
    notes = [{"image_id": 1, "caption": "x"}, {"image_id": 2}]
    found = {"images": images, "annotations": notes}
    put(tmp_path, "captions_val2014.json", found)
    put(tmp_path, "val2014/a.jpg")
    with pytest.raises(DatasetError) as raised:
        captions.read_coco2014(tmp_path, "val")
    text = str(raised.value)
    assert "entry of 'annotations' 2: has no 'caption'" in text
    assert "entry of 'images' 2: the image 2 has no caption among 'annot" in text


def test_each_year_of_coco_has_captions_of_its_own(tmp_path):
    for year in ("2014", "2017"):
        images = [{"id": 1, "file_name": f"{year}.jpg"}]
        notes = [{"image_id": 1, "caption": year}]
        put(
            tmp_path,
            f"annotations/captions_val{year}.json",
            {"images": images, "annotations": notes},
        )
        put(tmp_path, f"val{year}/{year}.jpg")
    (old,) = TASKS["coco2014_cap_val"].read(tmp_path, "val")
    (new,) = TASKS["coco2017_cap_val"].read(tmp_path, "val")
    assert (old.answers, new.answers) == (("2014",), ("2017",))


def test_one_reference_is_too_few_for_vqa_accuracy(tmp_path):
    """Without the reader's check a right answer would get nothing."""
    rows = [
        {"question": "?", "answers": ["cat"] * 4},
        {"question": "?", "answer": "cat"},
    ]
    path = put(tmp_path, "test.jsonl", lines(rows))
    message = r"line 2: VQA accuracy compares 4 answers or more .* not 1; own_exact"
    with pytest.raises(DatasetError, match=message):
        list(TASKS["own_vqa"].read(path, "test"))
    path = put(tmp_path, "test.jsonl", lines(rows[:1]))
    assert len(list(TASKS["own_vqa"].read(path, "test"))) == 1


def test_scienceqa_without_its_split(tmp_path):
    put(tmp_path, "problems.json", {})
    put(tmp_path, "pid_splits.json", {"train": [], "test": ["9"]})
    message = r"has no split 'val' in pid_splits\.json \(train, test\)"
    with pytest.raises(DatasetError, match=message):
        science.read_scienceqa(tmp_path, "val")
    with pytest.raises(
        DatasetError, match=r"problem 9: has no 'choices', only \['pid'"
    ):
        science.read_scienceqa(tmp_path, "test")


def test_broken_lines_of_pope(tmp_path):
    good = {"question_id": 1, "image": "a.jpg", "text": "Q", "label": "yes"}
    for part in yes_no.POPE_PARTS:
        put(tmp_path, f"coco_pope_{part}.json", lines([good]))
    put(tmp_path, "val2014/a.jpg")
    text = lines([good]) + "\n{'a'}\n" + lines([good | {"label": "maybe"}]) + "[]\n"
    put(tmp_path, "coco_pope_popular.json", text.encode() + b"\xff\n")
    with pytest.raises(DatasetError) as raised:
        yes_no.read_pope(tmp_path, "test")
    text = str(raised.value)
    place = f"{tmp_path / 'coco_pope_popular.json'}, line "
    assert f"{place}3: not a JSON object (Expecting property name" in text
    assert f"{place}4: 'answer' is 'maybe', but must be yes or no" in text
    assert f"{place}5: not a JSON object but []" in text
    assert f"{place}6: not a JSON object (not UTF-8 text" in text
    assert "4 of 7 cannot be used" in text


def test_broken_lines_of_mme(tmp_path):
    put(tmp_path, "count/1.txt", "Is it?\tYes\nIs it not? No\n\n")
    put(tmp_path, "count/2.txt", "Is it?\tYes\n")
    put(tmp_path, "count/1.jpg")
    with pytest.raises(DatasetError) as raised:
        yes_no.read_mme(tmp_path, "test")
    text = str(raised.value)
    assert "1.txt, line 2: 'Is it not? No' must be a question, a tab and Yes" in text
    assert "2.txt, line 1: there is no picture 2.jpg or .png in count, count" in text


# --- tables with tabs ---


def test_quotes_tabs_and_line_ends_in_cells(tmp_path):
    path = put(
        tmp_path, "a.tsv", '\ufeffa\tb\tc\r\n1\t"x\ty\n""z"""\t5" pipe\r\n\r\n2\t\t3'
    )
    rows = list(tsv.table(path))
    assert [values for _, values in rows] == [
        {"a": "1", "b": 'x\ty\n"z"', "c": '5" pipe', "#": 2},
        {"a": "2", "b": "", "c": "3", "#": 5},
    ]
    for start, values in rows:
        assert tsv.row_at(path, start) | {"#": values["#"]} == values


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"line 1: must hold names of columns, with tabs"),
        ("a,b\n1,2\n", r"line 1: must hold names of columns"),
        ("a\tb\n1\t2\t3\n", r"line 2: has 3 cells, but there are 2 columns"),
        ('a\tb\n1\t2\n1\t"2\n3\n', r"line 3: a quote is opened and not closed"),
        (b"a\tb\n1\t\xff\n", r"line 2: not UTF-8 text"),
    ],
)
def test_broken_tables_with_tabs(tmp_path, text, message):
    path = put(tmp_path, "a.tsv", text)
    with pytest.raises(DatasetError, match=message):
        list(tsv.table(path))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"index": "x"}, r"'index' is 'x', but must be a number"),
        ({"B": ""}, r"must have two choices or more in 'A', 'B'"),
        ({"A": "", "C": "c"}, r"without a gap"),
        ({"answer": "D"}, r"'answer' is 'D', but must name one of 2 choices"),
        ({"image": "12"}, r"'image' names the question '12', which is not there"),
    ],
)
def test_rows_of_mmbench_that_make_no_sense(tmp_path, more, message):
    row = {"index": "1", "question": "Q", "A": "a", "B": "b", "C": "", "answer": "A"}
    row |= {"image": base64.b64encode(png()).decode()} | more
    text = "\t".join(row) + "\n" + "\t".join(row.values()) + "\n"
    put(tmp_path, "mmbench_dev_20230712.tsv", text)
    with pytest.raises(DatasetError, match=message):
        options.read_mmbench(tmp_path, "dev")


def test_a_picture_of_mmbench_that_is_no_base64(tmp_path):
    row = {"index": "1", "question": "Q", "A": "a", "B": "b", "answer": "A"}
    row |= {"image": "?" * 80}
    text = "\t".join(row) + "\n" + "\t".join(row.values()) + "\n"
    put(tmp_path, "mmbench_dev_20230712.tsv", text)
    (sample,) = options.read_mmbench(tmp_path, "dev")
    with pytest.raises(ImageError, match=r"question 1: the picture is no base64"):
        load_image(sample.images[0])


# --- archives ---


def archive(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members.items():
            opened.writestr(name, data)


def test_pictures_are_read_from_archives_beside_the_file(tmp_path):
    put(tmp_path, "Annotations/val.json", [GOOD])
    archive(tmp_path / "val.zip", {"val/a.jpg": png("green")})
    (sample,) = vqa.read_vizwiz(tmp_path, "val")
    assert colour(sample) == colour(sample) == "green"
    assert sample.images[0].name == f"{tmp_path / 'val.zip'}: val/a.jpg"


def test_an_archive_that_says_it_is_huge_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    put(tmp_path, "Annotations/val.json", [GOOD])
    archive(tmp_path / "val.zip", {"val/a.jpg": bytes(10_000)})
    message = r"val\.zip: val/a\.jpg has 10,000 bytes, but at most 1,000 are read"
    with pytest.raises(DatasetError, match=message):
        vqa.read_vizwiz(tmp_path, "val")


def test_of_an_archive_no_more_is_unpacked_than_is_asked(tmp_path, monkeypatch):
    """10 MB of zeros in 10 KB: unpacked is only what a reader takes."""
    archive(tmp_path / "val.zip", {"val/a.jpg": bytes(10_000_000)})
    put(tmp_path, "Annotations/val.json", [GOOD])
    (sample,) = vqa.read_vizwiz(tmp_path, "val")
    asked = []
    read = zipfile.ZipExtFile.read
    watched = lambda self, n=-1: asked.append(n) or read(self, n)  # noqa: E731
    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    assert len(sample.images[0].read(1000)) == 1000
    assert asked == [1000]


def test_a_damaged_archive(tmp_path):
    put(tmp_path, "Annotations/val.json", [GOOD])
    path = tmp_path / "val.zip"
    archive(path, {"val/a.jpg": png("green", (90, 90))})
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(data)
    (sample,) = vqa.read_vizwiz(tmp_path, "val")
    message = r"val/a\.jpg in .*val\.zip cannot be read \(.*Download it again"
    with pytest.raises(ImageError, match=message):
        load_image(sample.images[0])
    path.write_bytes(b"PK\3\4 nothing")
    with pytest.raises(DatasetError, match=r"there is no picture 'a\.jpg'"):
        vqa.read_vizwiz(tmp_path, "val")


def test_a_message_does_not_read_all_of_a_value():
    deep: list = []
    for _ in range(60):
        deep = [deep, deep]  # 2^60 brackets
    assert len(shown(deep)) <= 80
    assert len(shown({"a" * 10_000: "b" * 10_000})) <= 80


# --- questions of one's own ---


def test_questions_of_ones_own(tmp_path):
    rows = [
        {"image": "p/a.png", "question": "What?", "answer": "cat", "category": "x"},
        {"id": "two", "images": ["p/a.png", "p/b.png"], "question": "<image> <image>?"}
        | {"answers": ["cat", "a cat"]},
        {"image": "p/b.png", "question": "?", "choices": ["u", "v"], "answer": "v"},
        {"image": "p/b.png", "question": "?", "choices": ["u", "v"], "answer": "a"},
        {"image": "p/b.png", "question": "?", "choices": ["u", "v"], "answer": 1},
        {"image": "p/b.png", "question": "the u", "box": [0, 0.25, 0.5, 1]},
        {"question": "No picture?", "answer": "yes"},
        {"image": "p/a.png", "answers": ["A cat.", "One cat."]},
    ]
    put(tmp_path, "p/a.png", "blue")
    put(tmp_path, "p/b.png", "green")
    path = put(tmp_path, "test.jsonl", "\n" + lines(rows))

    for source in (path, str(path), tmp_path):
        found = list(own.read_own(source, "test"))
        assert [s.id for s in found] == ["1", "two", "3", "4", "5", "6", "7", "8"]
    assert found[0].fields == {"category": "x", "where": f"{path}, line 2"}
    assert [colour(found[1], 0), colour(found[1], 1)] == ["blue", "green"]
    assert found[1].answers == ("cat", "a cat")
    assert [s.answers for s in found[2:5]] == [("B",), ("A",), ("B",)]
    assert found[5].fields["box"] == (0.0, 0.25, 0.5, 1.0) and found[5].answers == ()
    assert found[6].images == () and found[7].question == ""


def test_own_questions_as_list_and_as_table(tmp_path):
    need("pyarrow")
    row = {"question": "?", "choices": ["u", "v"], "answer": "v", "category": None}
    put(tmp_path, "a/test.json", [row])
    rows = [row | {"image": cell("blue")}, row | {"image": None}]
    path = write_table(tmp_path / "b" / "data" / "test-0.parquet", rows)
    (listed,) = own.read_own(tmp_path / "a", "test")
    first, second = own.read_own(tmp_path / "b", "test")
    assert listed.answers == first.answers == second.answers == ("B",)
    assert colour(first) == "blue" and second.images == ()
    assert [s.id for s in own.read_own(path, "test")] == ["1", "2"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "Q"}, r"line 1: has no 'answers' or 'answer', only"),
        (
            {"question": "<image>?", "answer": "x"},
            r"the question has 1 <image> for 0",
        ),
        ({"question": 3, "answer": "x"}, r"'question' is 3, but must be a text"),
        (
            {"choices": ["u"], "answer": "u"},
            r"'choices' has 1 choices, but must hav",
        ),
        ({"choices": ["u", "v"], "answer": "w"}, r"'answer' is 'w', but must name one"),
        ({"choices": ["u", "v"], "answer": True}, r"'answer' is True, but must name"),
        ({"choices": ["u", "v"]}, r"has no 'answer' or 'answers'"),
        (
            {"question": "Q", "box": [0, 0, 10, 10]},
            r"'box' is \[0, 0, 10, 10\], but m",
        ),
        (
            {"question": "Q", "image": "no.png", "answer": "x"},
            r"there is no picture '",
        ),
        ({"id": [1], "answer": "x"}, r"'id' is \[1\], but must be a text or a number"),
    ],
)
def test_own_questions_that_cannot_be_used(tmp_path, row, message):
    path = put(tmp_path, "mine.jsonl", lines([row]))
    with pytest.raises(DatasetError, match=message):
        own.read_own(path, "test")


def test_own_questions_in_another_format(tmp_path):
    path = put(tmp_path, "mine.csv", "question,answer\n")
    with pytest.raises(DatasetError, match=r"is no data: expected \.jsonl, \.json or"):
        own.read_own(path, "test")


def test_a_source_gives_its_bytes_again_and_again():
    held = pictures.Stored("a picture", lambda limit: png("blue"))
    assert load_image(held).size == load_image(held).size == (8, 6)
    held = pictures.Stored("a.zip: b.png", lambda limit: b"nothing")
    with pytest.raises(ImageError, match=r"a\.zip: b\.png is not an image"):
        load_image(held)
    assert load_image(io.BytesIO(png())).size == (8, 6)


def test_a_path_within_the_folder_is_kept():
    assert str(pictures.relative("a/./b\\c.jpg")) == "a/b/c.jpg"
    with pytest.raises(Fault, match=r"not a path within"):
        pictures.relative("")
