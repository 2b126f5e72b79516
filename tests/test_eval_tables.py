"""Tables of benchmarks: files of a split, rows that cannot be used, the hub."""

import pytest
from dataset_kit import cell, colour, put, write_table
from test_eval_hub import shard

from mm1_mlx.checkpoint import parquet_file
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import own, places, science, vqa
from mm1_mlx.evaluation.datasets.tables import Table

# --- tables ---


def test_a_picture_is_read_when_it_is_used(tmp_path, monkeypatch):
    """The texts of the whole file are read without the pictures' bytes."""
    row = {"question": "Q", "answers": ["x"], "image": cell("blue")}
    rows = [{**row, "question_id": str(k)} for k in range(40)]
    path = shard(tmp_path, "val", rows)
    asked: list[list[str]] = []
    read = parquet_file.ParquetTable._read_group

    def watched(self, first):
        asked.append(self._columns[0])
        return read(self, first)

    monkeypatch.setattr(parquet_file.ParquetTable, "_read_group", watched)
    found = list(vqa.read_vizwiz(tmp_path, "val"))
    assert len(found) == 40 and asked
    assert not any("image.bytes" in columns for columns in asked)
    asked.clear()
    assert colour(found[39]) == "blue" and colour(found[39]) == "blue"
    assert asked == [["image.bytes", "image.path"]]
    assert found[39].images[0].name == f"{path}, row 40, image"


def test_the_size_of_a_source_is_read_from_its_start(tmp_path):
    rows = [{"image": cell("blue")}]
    path = write_table(tmp_path / "a.parquet", rows)
    ((_, values),) = Table([path], tmp_path).rows()
    whole = values["image"].read()
    assert whole[:4] == b"\x89PNG" and values["image"].read(4) == whole[:4]


def test_a_table_may_hold_the_paths_of_pictures(tmp_path):
    image = {"bytes": None, "path": "pictures/1.png"}
    rows = [
        {"question": "Q", "options": ["a", "b"], "answer": "0", "image": image},
        {"question": "Q", "options": ["a", "b"], "answer": "0", "image": cell()},
    ]
    put(tmp_path, "pictures/1.png", "green")
    shard(tmp_path, "test", rows[::-1])
    found = list(science.read_ai2d(tmp_path, "test"))
    assert [colour(s) for s in found] == ["red", "green"]
    (tmp_path / "pictures" / "1.png").unlink()
    again = list(science.read_ai2d(tmp_path, "test"))
    message = r"row 2, image: there is no picture 'pictures/1\.png'"
    with pytest.raises(DatasetError, match=message):
        colour(again[1])


def test_several_files_are_one_split(tmp_path):
    def rows(*ids):
        row = {"question": "Q", "answers": ["x"], "image": cell("green")}
        return [{**row, "question_id": i} for i in ids]

    for number, ids in enumerate((("a", "b"), ("c",))):
        path = tmp_path / "data" / f"val-{number:05d}-of-00002.parquet"
        write_table(path, rows(*ids), row_group_size=1)
    found = list(vqa.read_vizwiz(tmp_path, "val"))
    assert [s.id for s in found] == ["a", "b", "c"]
    assert found[2].fields["where"] == f"{path}, row 1" and colour(found[2]) == "green"
    path.unlink()
    with pytest.raises(
        DatasetError, match=r"There are 1 of the 2 files like data/val-0"
    ):
        vqa.read_vizwiz(tmp_path, "val")


def test_rows_that_cannot_be_used_are_told_before_the_first_sample(tmp_path):
    rows = [
        {"question_id": str(k), "question": "Q", "answers": ["x"], "image": cell()}
        for k in range(9)
    ]
    for row in rows[2:]:
        row["question"] = ""
    rows[1]["image"] = None
    shard(tmp_path, "val", rows)
    with pytest.raises(DatasetError) as raised:
        vqa.read_vizwiz(tmp_path, "val")
    text = str(raised.value)
    path = tmp_path / "data" / "val-00000-of-00001.parquet"
    assert text.startswith(
        f"{path}: 8 of 9 cannot be used. {path}, row 2: has no picture in 'image'; "
        f"{path}, row 3: 'question' is '', but must be a text; "
    )
    assert text.endswith("; and 3 more.") and text.count("row ") == 5


# --- which files ---


@pytest.mark.parametrize(
    "names, split, config, wanted",
    [
        (["data/val-00000-of-00001.parquet", "data/test.parquet"], "val", None, [0]),
        (["data/validation-00000-of-00001.parquet"], "val", None, [0]),
        (["default/val/0000.parquet", "README.md"], "val", None, [0]),
        (["data/testA-0.parquet", "data/test-0.parquet"], "test", None, [1]),
        (["data/testdev-0.parquet", "data/test-0.parquet"], "testdev", None, [0]),
        (["en/dev-0.parquet", "cn/dev-0.parquet"], "dev", "en", [0]),
        (["EN/dev-0.parquet", "cn/dev-0.parquet"], "dev", "en", [0]),
        (["a/dev-0.parquet", "b/dev-0.parquet"], "dev", "*", [0, 1]),
        (["data/test-0.parquet", "Full/test-0.parquet"], "test", None, [0]),
        (["data/test-0.parquet"], "test", "absent", [0]),
        (["data/tested.parquet", "data/val.json"], "test", None, []),
    ],
)
def test_the_files_of_a_split(names, split, config, wanted):
    found = places.split_files(names, split, config)
    assert found == [names[k] for k in wanted]


def test_two_configurations_need_one_of_them_named():
    names = ["x/test-0.parquet", "y/test-0.parquet"]
    with pytest.raises(DatasetError, match=r"'test' is there several times, in x, y"):
        places.split_files(names, "test")


def hub(monkeypatch, folder, names):
    """A hub that holds a dataset; what is asked of it."""
    asked = []

    def download(repo, revision, choose):
        asked.append((repo, revision, choose(names)))
        return folder

    monkeypatch.setattr(places, "download_dataset", download)
    return asked


def test_the_hub_gives_the_split_alone(tmp_path, monkeypatch):
    row = {"question": "Q", "options": ["a", "b"], "answer": "1", "image": cell("blue")}
    shard(tmp_path, "test", [row])
    names = ["README.md", "data/test-00000-of-00001.parquet", "data/train-0.parquet"]
    asked = hub(monkeypatch, tmp_path, names)
    (sample,) = science.read_ai2d("lmms-lab-encoder/ai2d@main", "test")
    assert asked == [
        ("lmms-lab-encoder/ai2d", "main", ["data/test-00000-of-00001.parquet"])
    ]
    assert colour(sample) == "blue"
    message = r"'lmms-lab-encoder/ai2d' on the hub has no parquet files of the split "
    message += r"'dev'. It has: data/test, data/train"
    with pytest.raises(DatasetError, match=message):
        science.read_ai2d("lmms-lab-encoder/ai2d", "dev")


def test_what_is_here_wins_over_the_hub(tmp_path, monkeypatch):
    row = {"question": "Q", "options": ["a", "b"], "answer": "1", "image": cell()}
    shard(tmp_path / "org" / "name", "test", [row])
    monkeypatch.chdir(tmp_path)
    assert hub(monkeypatch, tmp_path, []) == []
    assert len(list(science.read_ai2d("org/name", "test"))) == 1


def test_own_questions_on_the_hub(tmp_path, monkeypatch):
    put(tmp_path, "test.jsonl", '{"image": "p/a.png", "answer": "x"}')
    put(tmp_path, "p/a.png", "green")
    names = ["README.md", "test.jsonl", "train.jsonl", "p/a.png", "weights.bin"]
    asked = hub(monkeypatch, tmp_path, names)
    (sample,) = own.read_own("me/mine", "test")
    assert colour(sample) == "green"
    assert asked == [("me/mine", None, ["test.jsonl", "p/a.png"])]
    with pytest.raises(DatasetError, match=r"no parquet files of the split 'dev'"):
        own.read_own("me/mine", "dev")


@pytest.mark.parametrize("source", ["no_such_folder", "a/b/c", "", "../up/x"])
def test_a_source_that_is_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"The dataset's folder .*does not exist: give a folder, or a dataset on"
    if source == "":
        source = tmp_path / "gone"
    with pytest.raises(DatasetError, match=message):
        science.read_ai2d(source, "test")


def test_a_file_is_no_folder(tmp_path):
    path = put(tmp_path, "a.json", [])
    with pytest.raises(DatasetError, match=r"a\.json is a file: give a folder"):
        science.read_ai2d(path, "test")


def test_broken_tables(tmp_path):
    put(tmp_path, "data/test-0.parquet", b"PAR1 nothing")
    with pytest.raises(
        DatasetError, match=r"test-0\.parquet: cannot be read as parquet"
    ):
        science.read_ai2d(tmp_path, "test")
