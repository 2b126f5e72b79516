"""Files of samples: JSON lists, parquet, folders as on the hub, and what is broken."""

import base64
import builtins
import io
import json
import os
import random
import subprocess
import sys

import pytest
from PIL import Image

from helpers import ROOT, clean_environment, need
from mm1_mlx.checkpoint import parquet_file
from mm1_mlx.errors import DatasetError
from mm1_mlx.training import json_samples
from mm1_mlx.training.conversations import open_split, open_train, split_files
from mm1_mlx.training.json_samples import JsonList


def picture(colour="red") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(held, "PNG")
    return held.getvalue()


def entries(count: int) -> list[dict]:
    """Texts with all that a scan could stumble over."""
    hard = '"][{}, \\ é 猫 \n'
    return [{"question": f"{k} {hard}", "answer": hard + "x" * k} for k in range(count)]


def questions(samples) -> list[str]:
    return [samples[k].messages[0]["content"] for k in range(len(samples))]


# --- JSON ---


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [16, 33, 1 << 24])
def test_a_list_is_read_entry_by_entry(tmp_path, monkeypatch, indent, chunk):
    """Wherever the scan's parts end."""
    monkeypatch.setattr(json_samples, "_CHUNK", chunk)
    wanted = entries(30)
    for ascii_only, start in ((True, b""), (False, b"\xef\xbb\xbf \n")):
        text = json.dumps(wanted, indent=indent, ensure_ascii=ascii_only)
        (tmp_path / "train.json").write_bytes(start + text.encode() + b"\n")
        found = open_train(tmp_path)
        assert isinstance(found, JsonList) and len(found) == 30
        assert questions(found) == [x["question"] for x in wanted]
        assert found[7].where.endswith("train.json, entry 8")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", r"train\.json is empty"),
        ("  ", r"train\.json is empty"),
        ('"a"', r"begins with '\"a\"', but must be one JSON list, or have a JSON obj"),
        ('[{"question": "a", "answer": "b"}', r"after entry 1: the file's end, but"),
        ('[{"question": "a", "answer": "b"} {}]', r"after entry 1: '\{\}\]', but must"),
        ('[{"question": "a", "answer": "b"}, ]', r"entry 2: not a JSON object \(Expec"),
        ('[{"question": "a"}, {"question": "b', r"entry 2: not a JSON object \(Unter"),
        ('[{"a": 1}, {"a" 1}, {}]', r"entry 2: not a JSON object \(Expecting ':'"),
        ("[" + "[" * 100_000, r"entry 1: not a JSON object"),
    ],
)
def test_a_broken_list_is_refused(tmp_path, text, message):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DatasetError, match=message) as raised:
        open_train(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_entry_may_be_wrong_alone(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([3, *entries(1)]))
    found = open_train(tmp_path)
    assert found[1].messages
    with pytest.raises(DatasetError, match=r"entry 1: not a JSON object but '3'"):
        found[0]


def test_a_scan_holds_a_part_of_the_file(tmp_path, monkeypatch):
    """Of a list, and of an entry that never ends."""
    monkeypatch.setattr(json_samples, "_CHUNK", 1000)
    monkeypatch.setattr(json_samples, "_MOST", 4000)
    held = []

    class Watched(JsonList):
        def _entry(self, opened, base, at, text):
            held.append(len(text))
            return super()._entry(opened, base, at, text)

    (tmp_path / "a.json").write_text(json.dumps(entries(300)))
    assert len(Watched(tmp_path / "a.json")) == 300
    assert len(held) == 300 and max(held) < 4000
    (tmp_path / "b.json").write_text('[{"a": "' + "x" * 50_000 + '"}]')
    read = 0

    class Counted(io.BufferedReader):
        def read(self, size=-1):
            nonlocal read
            read += size
            return super().read(size)

    with (tmp_path / "b.json").open("rb", buffering=0) as raw:
        again = JsonList.__new__(JsonList)
        again.file, again._starts = tmp_path / "b.json", []
        with pytest.raises(DatasetError, match=r"entry 1: not a JSON object"):
            again._scan(Counted(raw))
    assert read < 20_000


def test_json_lines_that_are_called_json(tmp_path):
    text = "".join(json.dumps(x) + "\n" for x in entries(3))
    (tmp_path / "train.json").write_text(text)
    assert open_train(tmp_path)[2].where.endswith("train.json, line 3")


# --- Folders ---

SHARDS = [f"data/train-0000{k}-of-00002-b42a775f407cee45.parquet" for k in (0, 1)]


@pytest.mark.parametrize(
    "names, split, found",
    [
        (["train.jsonl", "valid.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "validation.json"], "valid", ["validation.json"]),
        (["val.parquet", "trainer.json", "train.txt"], "valid", ["val.parquet"]),
        ([*reversed(SHARDS), "README.md"], "train", SHARDS),
        (["train/0000.parquet", "train/a.png"], "train", ["train/0000.parquet"]),
        (["data/test/x.parquet"], "test", ["data/test/x.parquet"]),
        # A folder of pictures may hold other things, where the split is a file.
        (["train.jsonl", "train/1.json"], "train", ["train.jsonl"]),
        (
            ["train_2.jsonl", "train_1.jsonl"],
            "train",
            ["train_1.jsonl", "train_2.jsonl"],
        ),
        (["other/train.jsonl", "a.jsonl"], "train", []),
    ],
)
def test_the_files_of_a_split(names, split, found):
    assert split_files(names, split) == found


@pytest.mark.parametrize(
    "names, message",
    [
        (["train.json", "train.jsonl"], r"train\.json and train\.jsonl: it is not"),
        (["data/train.jsonl", "train.jsonl"], r"not known which is meant as the train"),
        (SHARDS[:1], r"There are 1 of the 2 files like data/train-00000"),
    ],
)
def test_files_that_do_not_say_what_is_meant(names, message):
    with pytest.raises(DatasetError, match=message):
        split_files(names, "train")


def test_numbered_files_and_pictures_that_lie_elsewhere(tmp_path):
    elsewhere = tmp_path / "pictures"
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(picture())
    folder = tmp_path / "data"
    folder.mkdir()
    for number in (0, 1):
        line = {"question": f"{number}", "answer": "b", "image": "a.png"}
        name = f"train-{number:05}-of-00002.jsonl"
        (folder / name).write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    found = open_train(tmp_path, elsewhere)  # in data/, as hub datasets
    assert len(found) == 4 and questions(found) == ["0", "0", "1", "1"]
    assert found[3].where.endswith("train-00001-of-00002.jsonl, line 2")
    assert found[3].images == [elsewhere / "a.png"]
    assert sorted(found.shuffled(random.Random(0))) == [0, 1, 2, 3]
    message = r"there is no image a\.png in .*data.*--image-folder"
    with pytest.raises(DatasetError, match=message):
        open_train(folder)[0]
    assert open_split(tmp_path, "valid") is None


def test_a_file_itself_is_what_is_trained_on(tmp_path):
    path = tmp_path / "mix665k.json"
    path.write_text(json.dumps(entries(2)))
    assert len(open_train(path)) == 2 and open_split(path, "valid") is None
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(DatasetError, match=r"notes\.txt is no data: expected a folder"):
        open_train(tmp_path / "notes.txt")
    (tmp_path / "inner").mkdir()
    with pytest.raises(DatasetError, match=r"no train\.jsonl .* Its folders are inner"):
        open_train(tmp_path)


def test_what_a_fingerprint_covers(tmp_path):
    """The file, byte for byte, and pictures by what is in them."""
    (tmp_path / "a.png").write_bytes(picture())
    line = {"question": "a", "answer": "b", "image": "a.png"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    before = open_train(tmp_path).fingerprint()
    os.utime(tmp_path / "a.png", (1, 1))  # copied: still the same
    assert open_train(tmp_path).fingerprint() == before
    (tmp_path / "a.png").write_bytes(picture("blue"))
    after = open_train(tmp_path).fingerprint()
    assert after["sha256"] == before["sha256"] and after != before
    parts = [{"type": "image", "image": "a.png"}]
    line = {"role": "user", "content": parts}, {"role": "assistant", "content": "b"}
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": line}) + "\n")
    inside = open_train(tmp_path).fingerprint()
    (tmp_path / "a.png").write_bytes(picture("green"))
    assert open_train(tmp_path).fingerprint()["pictures"] != inside["pictures"]


# --- Parquet ---


def write_parquet(path, rows: list[dict], group: int | None = None, schema=None):
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group
    )


def test_columns_are_the_keys_of_a_line(tmp_path):
    held = {"bytes": picture(), "path": None}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "x.png").write_bytes(picture())
    for values, images in (
        ({"question": "a", "answer": "b", "image": held, "unused": [1.0]}, [picture()]),
        ({"conversations": turns, "images": [held, held], "id": 3}, [picture()] * 2),
        ({"prompt": "a", "completion": "b", "image": picture()}, [picture()]),
        (
            {"question": "a", "answer": "b", "image": {"bytes": None, "path": "x.png"}},
            [tmp_path / "x.png"],
        ),
    ):
        write_parquet(tmp_path / "train.parquet", [values])
        sample = open_train(tmp_path)[0]
        assert [m["content"] for m in sample.messages] == ["a", "b"]
        assert sample.images == images
        assert sample.where.endswith("train.parquet, row 1")


def test_the_cauldron_and_messages_in_parts(tmp_path):
    """Two ways in which the hub's datasets hold what vision models learn from."""
    pa = need("pyarrow")
    texts = [
        {"user": "a", "assistant": "b", "source": "s"},
        {"user": "c", "assistant": "d", "source": "s"},
    ]
    held = {"bytes": picture(), "path": None}
    write_parquet(tmp_path / "one/train.parquet", [{"images": [held], "texts": texts}])
    sample = open_train(tmp_path / "one")[0]
    assert [m["content"] for m in sample.messages] == ["a", "b", "c", "d"]
    assert sample.images == [picture()]
    part = pa.struct(
        [("index", pa.int64()), ("text", pa.string()), ("type", pa.string())]
    )
    message = pa.struct([("content", pa.list_(part)), ("role", pa.string())])
    schema = pa.schema(
        [
            ("messages", pa.list_(message)),
            ("images", pa.list_(pa.struct([("bytes", pa.binary())]))),
        ]
    )
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image", "index": 0},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    rows = [{"messages": messages, "images": [{"bytes": picture()}]}]
    write_parquet(tmp_path / "two/train.parquet", rows, schema=schema)
    sample = open_train(tmp_path / "two")[0]
    assert sample.images == [picture()]
    assert sample.messages[0]["content"] == messages[0]["content"]


def test_rows_of_several_kinds_and_what_is_wrong_with_one(tmp_path):
    rows = [
        {"question": "a", "answer": "b", "caption": None},
        {"question": None, "answer": None, "caption": "c"},
        {"question": "a", "answer": None, "caption": None},
        {"question": None, "answer": None, "caption": None},
    ]
    write_parquet(tmp_path / "train.parquet", rows)
    found = open_train(tmp_path)
    assert found[0].messages[0]["content"] == "a"
    assert found[1].messages[1]["content"] == "c"
    with pytest.raises(
        DatasetError, match=r"train\.parquet, row 3: 'answer' is 'None'"
    ):
        found[2]
    with pytest.raises(
        DatasetError, match=r"train\.parquet, row 4: has the keys \[\],"
    ):
        found[3]


@pytest.fixture
def counted(monkeypatch):
    """Small windows, and the parts that are read."""
    monkeypatch.setattr(parquet_file, "WINDOW", 4000)
    monkeypatch.setattr(parquet_file, "_PART", 1000)
    read = []
    hold = parquet_file.ParquetTable._hold

    def watched(self, number, table):
        hold(self, number, table)
        read.append(number)
        assert self._bytes <= 4000 or len(self._held) == 1
        assert self._bytes == sum(self._parts[n].nbytes for n in self._held)
        assert len(self._held) <= 8 and len(self._readers) <= 9

    monkeypatch.setattr(parquet_file.ParquetTable, "_hold", watched)
    return read


@pytest.mark.parametrize("group", [3, 50, 1000], ids=["small", "some", "one"])
def test_an_epoch_reads_every_part_once_and_holds_a_window(tmp_path, counted, group):
    """Row groups that are smaller and larger than a window; two files."""
    rng = random.Random(0)
    for file in (0, 1):
        rows = [
            # Random, or the footer tells how little it takes when packed.
            {"question": f"{k + 100 * file} {rng.randbytes(100).hex()}", "answer": "b"}
            for k in range(100)
        ]
        name = f"train-{file:05}-of-00002.parquet"
        write_parquet(tmp_path / name, rows, group)
    found = open_train(tmp_path)
    assert [q.split()[0] for q in questions(found)] == [str(k) for k in range(200)]
    assert found[150].where.endswith("train-00001-of-00002.parquet, row 51")
    orders, found = [], open_train(tmp_path)
    for epoch in range(3):
        counted.clear()
        order = found.shuffled(random.Random(epoch))
        assert sorted(order) == list(range(200))
        for number in order:
            assert questions_of(found, number) == str(number)
        assert len(set(counted)) > 40
        # What is held from the epoch before need not be read.
        assert len(counted) <= len(found._parts) and len(counted) == len(set(counted))
        orders.append(list(order))
    assert len({order[0] // group for order in orders}) > 1 or group > 99
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == list(found.shuffled(random.Random(0)))


def questions_of(samples, number: int) -> str:
    return samples[number].messages[0]["content"].split()[0]


def test_pictures_that_repeat_take_what_they_take(tmp_path, monkeypatch):
    """Each is stored once in a row group, but stands in every row that is read."""
    monkeypatch.setattr(parquet_file, "WINDOW", 400_000)
    monkeypatch.setattr(parquet_file, "_PART", 100_000)
    held = random.Random(0).randbytes(10_000)
    rows = [{"question": f"{k}", "answer": "b", "image": held} for k in range(200)]
    write_parquet(tmp_path / "train.parquet", rows)
    assert (tmp_path / "train.parquet").stat().st_size < 50_000
    found = open_train(tmp_path)
    assert 5 <= max(part.rows for part in found._parts) <= 10
    for number in found.shuffled(random.Random(0)):
        assert found[number].images == [held]
        assert sum(table.nbytes for table in found._held.values()) <= 500_000


def test_rows_in_any_order(tmp_path, counted):
    """Also backwards, where a row group is read again from its start."""
    rows = [{"question": f"{k} {'x' * 150}", "answer": "b"} for k in range(120)]
    write_parquet(tmp_path / "train.parquet", rows, 60)
    found = open_train(tmp_path)
    for number in (119, 0, 60, 59, 118, 3, *range(119, -1, -7)):
        assert questions_of(found, number) == str(number)


def broken(path, how: str) -> None:
    whole = path.read_bytes()
    if how == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "not parquet":
        path.write_bytes(b"no parquet")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "footer":
        path.write_bytes(whole[:-40] + b"\xff" * 32 + whole[-8:])
    else:  # the data, which the footer does not know
        path.write_bytes(
            whole[:4] + b"\xff" * (len(whole) // 3) + whole[4 + len(whole) // 3 :]
        )


@pytest.mark.parametrize("how", ["cut off", "not parquet", "empty", "footer", "data"])
def test_broken_parquet_is_one_line(tmp_path, how):
    rng = random.Random(0)
    rows = [{"question": rng.randbytes(40).hex(), "answer": "b"} for _ in range(100)]
    write_parquet(tmp_path / "train.parquet", rows)
    broken(tmp_path / "train.parquet", how)
    message = r"train\.parquet(, row \d+)?: cannot be read as parquet \(.*\)\. Download"
    with pytest.raises(DatasetError, match=message) as raised:
        found = open_train(tmp_path)
        for number in range(100):
            found[number]
    assert "\n" not in str(raised.value)


def test_tables_that_are_no_samples(tmp_path):
    write_parquet(tmp_path / "train.parquet", [{"text": "a", "label": 1}])
    with pytest.raises(DatasetError, match=r"has the columns \['label', 'text'\], but"):
        open_train(tmp_path)
    pa = need("pyarrow")
    schema = pa.schema([("question", pa.string())])
    write_parquet(tmp_path / "train.parquet", [], schema=schema)
    with pytest.raises(DatasetError, match=r"train\.parquet is empty: it has no rows"):
        open_train(tmp_path)
    rows = [{"question": "a", "answer": "b", "image": 3.5}]
    write_parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(DatasetError, match=r"row 1: an image is '3\.5', but must be a"):
        open_train(tmp_path)[0]


def test_parquet_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DatasetError, match=r"is a parquet file.*pip install pyarrow"):
        open_train(tmp_path)


def test_only_parquet_needs_pyarrow(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    code = (
        "import sys, pathlib; from mm1_mlx.training.mixtures import Data, Source; "
        "Data([Source(sys.argv[1])]).train()[0]; "
        "print([m for m in ('pyarrow', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_table_is_compared_by_its_footer(tmp_path):
    rows = [{"question": f"{k}", "answer": "b"} for k in range(10)]
    write_parquet(tmp_path / "train.parquet", rows)
    before = open_train(tmp_path).fingerprint()
    assert before == open_train(tmp_path).fingerprint() and before["samples"] == 10
    rows[3]["question"] = "another"
    write_parquet(tmp_path / "train.parquet", rows)
    assert open_train(tmp_path).fingerprint() != before


def test_pictures_as_text_are_still_read(tmp_path):
    """The other forms of a picture, through a table."""
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    write_parquet(tmp_path / "train.parquet", [{"caption": "a", "image": url}])
    assert open_train(tmp_path)[0].images == [url]
