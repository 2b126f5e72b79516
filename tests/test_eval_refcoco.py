"""RefCOCO as published: a pickle that is read and never executed."""

import os
import pickle

import pytest
from dataset_kit import colour, put

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import refcoco
from mm1_mlx.evaluation.datasets.plain_pickle import read_plain


def ref(number: int, split: str = "val", **more) -> dict:
    return {
        "sent_ids": [10 * number, 10 * number + 1],
        "file_name": f"COCO_train2014_{number:012d}_{number}.jpg",
        "ann_id": 7000 + number,
        "ref_id": number,
        "image_id": number,
        "split": split,
        "category_id": 1,
        "sentences": [
            {"tokens": ["the", "man"], "raw": "The man!", "sent_id": 10 * number}
            | {"sent": "the man"},
            {"tokens": ["left"], "raw": "left", "sent_id": 10 * number + 1}
            | {"sent": "left"},
        ],
    } | more


def instances(*numbers: int) -> dict:
    return {
        "images": [
            {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg"}
            | {"width": 200, "height": 100}
            for n in numbers
        ],
        "annotations": [
            {"id": 7000 + n, "image_id": n, "bbox": [20, 10.0, 100.5, 80]}
            for n in numbers
        ],
        "categories": [],
    }


def dataset(root, folder="refcoco", owner="unc", refs=None, protocol=2, **more):
    refs = [ref(1), ref(2, "testA")] if refs is None else refs
    put(root, f"{folder}/refs({owner}).p", pickle.dumps(refs, protocol))
    put(root, f"{folder}/instances.json", instances(1, 2) | more)
    for number, shade in ((1, "blue"), (2, "green")):
        name = f"COCO_train2014_{number:012d}.jpg"
        put(root, f"images/mscoco/images/train2014/{name}", shade)
    return root


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_phrases_and_boxes(tmp_path, protocol):
    dataset(tmp_path, protocol=protocol)
    first, second = refcoco.read_refcoco(tmp_path, "val")
    assert [(s.id, s.question) for s in (first, second)] == [
        ("10", "the man"),
        ("11", "left"),
    ]
    assert first.fields["box"] == (0.1, 0.1, 0.6025, 0.9)
    assert first.fields["size"] == (200, 100) and first.fields["image_id"] == "1"
    assert colour(first) == "blue"
    where = first.fields["where"]
    assert where == f"{tmp_path / 'refcoco' / 'refs(unc).p'}, entry 1"
    assert [s.id for s in refcoco.read_refcoco(tmp_path, "testA")] == ["20", "21"]


def test_the_three_of_them_lie_beside_each_other(tmp_path):
    dataset(tmp_path, "refcoco", refs=[ref(1)])
    dataset(tmp_path, "refcoco+", refs=[ref(2)])
    dataset(tmp_path, "refcocog", "umd", refs=[ref(1, "test")])
    assert [s.id for s in refcoco.read_refcoco(tmp_path, "val")] == ["10", "11"]
    assert [s.id for s in refcoco.read_refcoco_plus(tmp_path, "val")] == ["20", "21"]
    assert [s.id for s in refcoco.read_refcocog(tmp_path, "test")] == ["10", "11"]


def test_one_of_them_is_not_taken_for_another(tmp_path):
    dataset(tmp_path, "refcoco+")
    with pytest.raises(DatasetError, match=r"has no refcoco/refs\(unc\)\.p \(as publ"):
        refcoco.read_refcoco(tmp_path, "val")
    # its own folder may have another name
    dataset(tmp_path / "mine", "annotations")
    assert len(list(refcoco.read_refcoco(tmp_path / "mine", "val"))) == 2


def test_a_split_that_is_not_there(tmp_path):
    dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"refs\(unc\)\.p, split 'testB' holds no"):
        refcoco.read_refcoco(tmp_path, "testB")


@pytest.mark.parametrize(
    "more, message",
    [
        ({"ann_id": 1}, r"entry 1: annotation 1 is not in .*instances\.json"),
        ({"image_id": 9}, r"entry 1: image 9 is not in .*instances\.json"),
        ({"sentences": 3}, r"'sentences' must be a list"),
        ({"sentences": [3]}, r"a sentence is 3, but must be an object"),
        ({"sentences": [{"sent_id": 1}]}, r"has no 'sent' or 'raw'"),
        ({"split": None}, r"has no 'split'"),
    ],
)
def test_references_that_do_not_fit(tmp_path, more, message):
    dataset(tmp_path, refs=[ref(1, **more)])
    with pytest.raises(DatasetError, match=message):
        refcoco.read_refcoco(tmp_path, "val")


@pytest.mark.parametrize(
    "box, message",
    [
        ([1, 2, 3], r"'bbox' is \[1, 2, 3\], but must be left, top, width, height"),
        ([1, 2, 0, 4], r"'bbox' is \[1, 2, 0, 4\], a box without area"),
        (["1", 2, 3, 4], r"but must be left, top, width, height"),
    ],
)
def test_boxes_that_are_none(tmp_path, box, message):
    notes = instances(1)["annotations"]
    dataset(tmp_path, annotations=[notes[0] | {"bbox": box}])
    with pytest.raises(DatasetError, match=message):
        refcoco.read_refcoco(tmp_path, "val")


# --- the pickle ---


def plain(tmp_path, data: bytes):
    return read_plain(put(tmp_path, "refs(unc).p", data))


def test_what_python_2_wrote(tmp_path):
    """By hand, as its cPickle writes protocol 0 and 1."""
    text = (
        b"(lp1\n(dp2\nS'sent_ids'\np3\n(lp4\nI0\naL12L\nasS'raw'\np5\n"
        b"Vcaf\\u00e9\np6\nsS'area'\nF2.5\nsS'it\\'s'\ng5\nsa."
    )
    found = plain(tmp_path, text)
    wanted = {"sent_ids": [0, 12], "raw": "café", "area": 2.5, "it's": "raw"}
    assert found == [wanted] == pickle.loads(text)
    binary = b"]q\x01}q\x02(U\x03rawq\x03X\x03\0\0\0manq\x04K\x05J\x01\0\0\0ua."
    assert plain(tmp_path, binary) == [{"raw": "man", 5: 1}] == pickle.loads(binary)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    shared = ["a", "b"]
    data = {
        "list": [1, -1, 255, 256, 70_000, 2**40, -(2**62), 0.5, True, False, None],
        "shared": [shared, shared],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "text": ["", "é", "猫", "x" * 300],
        1: {},
    }
    assert plain(tmp_path, pickle.dumps(data, protocol)) == data


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_is_a_program_is_not_run(tmp_path, protocol):
    made = str(tmp_path / "made")
    data = pickle.dumps([ref(1) | {"x": _Attack(made)}], protocol)
    message = r"is a pickle that names \w+\.mkdir.* and was not run"
    with pytest.raises(DatasetError, match=message):
        plain(tmp_path, data)
    assert not os.path.exists(made)
    pickle.loads(data)  # Python's own would have
    assert os.path.exists(made)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"(S'true'\nios\nsystem\n.", r"names INST"),
        (b"(cos\nsystem\nS'true'\no.", r"names os\.system"),
        (b"(I1\nI2\no.", r"names OBJ"),
        (b"Pname\n.", r"names PERSID|names .*name"),
        (b"I1\nQ.", r"names 1"),
        (b"\x80\x02\x82\x05.", r"names EXT1"),
        (b"\x80\x02}K\x01\x81.", r"no pickle of plain data: .*Nothing of it was run"),
        (b"\x80\x02K\x01K\x02R.", r"no pickle of plain data"),
        (b"(l0.", r"no pickle of plain data"),
        (b"(I1\nd.", r"a key has no value"),
        (b"((I1\nlI2\nd.", r"it has a list as a key"),
        (b"g9\n.", r"it is damaged"),
        (b"I1", r"it is damaged|ends too early"),
        (b"", r"no pickle of plain data"),
        (b"not a pickle", r"no pickle of plain data"),
        (b"L" + b"9" * 100_000 + b"L\n.", r"no pickle of plain data"),
    ],
)
def test_pickles_that_are_refused(tmp_path, data, message):
    with pytest.raises(DatasetError, match=message) as raised:
        plain(tmp_path, data)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_pickle_of_something_else(tmp_path):
    dataset(tmp_path, refs={"a": 1})
    with pytest.raises(DatasetError, match=r"must hold one JSON list, but holds \{'a"):
        refcoco.read_refcoco(tmp_path, "val")
    deep = b"]" + b"2]2\x61" * 3 + b"."
    with pytest.raises(DatasetError, match=r"the operation DUP"):
        plain(tmp_path, deep)
