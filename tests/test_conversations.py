"""Samples to fine-tune on: every format, what is wrong with a line, and their order."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from helpers import need_tiny
from mm1_mlx.errors import DatasetError
from mm1_mlx.loading import load
from mm1_mlx.training.conversations import (
    check_samples,
    lesson_of,
    open_split,
    open_train,
)
from mm1_mlx.training.mixtures import Order
from mm1_mlx.training.samples import CAPTION_PROMPT, Samples, parse_sample

USER, ANSWER = "What is this?", "A cat."
TURNS = [
    {"role": "user", "content": USER},
    {"role": "assistant", "content": ANSWER},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 12), "red").save(tmp_path / "pictures" / name)
    return tmp_path


def lines(folder, *values) -> Samples:
    text = "".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values)
    (folder / "train.jsonl").write_text(text)
    return open_train(folder)


PICTURE = "pictures/a.png"


def encoded(folder) -> str:
    return base64.b64encode((folder / PICTURE).read_bytes()).decode()


FORMATS = {
    "messages": {"messages": TURNS, "images": [PICTURE]},
    "one image": {"messages": TURNS, "image": PICTURE},
    "conversations": {
        "conversations": [
            {"from": "human", "value": USER},
            {"from": "gpt", "value": ANSWER},
        ],
        "image": PICTURE,
    },
    "question": {"question": USER, "answer": ANSWER, "image": PICTURE},
    "prompt": {"prompt": USER, "completion": ANSWER, "images": [PICTURE]},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_a_line(kind, folder):
    sample = lines(folder, FORMATS[kind])[0]
    assert sample.messages == TURNS and sample.images == [folder / PICTURE]
    assert sample.where.endswith("train.jsonl, line 1")


def test_captions_parts_and_text_alone(folder):
    url = f"data:image/png;base64,{encoded(folder)}"
    parts = [
        {"type": "image", "image": PICTURE},
        {"type": "text", "text": USER},
        {"type": "image", "image": {"bytes": encoded(folder)}},
    ]
    found = lines(
        folder,
        {"image": url, "caption": ANSWER},
        "\n",
        {"messages": [{"role": "user", "content": parts}, TURNS[1]]},
        {"question": USER, "answer": ANSWER},
    )
    assert len(found) == 3
    assert found[0].messages[0]["content"] == CAPTION_PROMPT
    assert found[0].images == [url]
    content = found[1].messages[0]["content"]
    assert content[0]["image"] == folder / PICTURE
    assert isinstance(content[2]["image"], bytes) and found[1].where.endswith("line 3")
    assert found[2].images == []
    need_tiny()
    _, processor = load("mm1-tiny")
    shapes = [lesson_of(found[k], processor).image_tokens for k in range(3)]
    assert shapes == [(64,), (64, 64), ()]


@pytest.mark.parametrize(
    "value, message",
    [
        ("{", r"line 1: not a JSON object"),
        ("[1]\n", r"line 1: not a JSON object but '\[1\]'"),
        ({"text": "a"}, r"has the keys \['text'\], but a sample has one of 'messages'"),
        ({"messages": []}, r"'messages' must be a list of messages"),
        (
            {"messages": TURNS * 2, "images": [PICTURE]},
            r"its 1 image may belong to any of 2 questions: write <image> into",
        ),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            r"the role 'robot', bu",
        ),
        ({"conversations": [{"from": "cat", "value": "a"}]}, r"is 'from' 'cat'"),
        (
            {"conversations": [{"from": "gpt", "value": " "}]},
            r"'value' is ' ', but",
        ),
        ({"question": "a", "answer": 3}, r"'answer' is '3', but must be a text"),
        ({**FORMATS["question"], "image": "no.png"}, r"there is no image .*no\.png"),
        ({**FORMATS["question"], "image": 7}, r"an image is '7', but must be a path"),
        ({**FORMATS["question"], "images": []}, r"has 'image' and 'images'"),
        (
            {**FORMATS["question"], "image": {"bytes": "%%"}},
            r"an image's bytes are no base64",
        ),
    ],
)
def test_a_wrong_line_is_named(value, message, folder):
    with pytest.raises(DatasetError, match=message):
        lines(folder, value)[0]


@pytest.mark.parametrize(
    "value, message",
    [
        ({"messages": TURNS[:1]}, r"line 1: The conversation has no message of the ro"),
        ({"question": "<image> a", "answer": "b"}, r"has 1 <image> but no image"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": " "}]}, r"nothing to learn"),
    ],
)
def test_a_line_that_teaches_nothing(value, message, folder):
    need_tiny()
    _, processor = load("mm1-tiny")
    with pytest.raises(DatasetError, match=message):
        lesson_of(lines(folder, value)[0], processor)


def test_folders_without_data(tmp_path):
    with pytest.raises(DatasetError, match=r"There is no data folder"):
        open_train(tmp_path / "none")
    with pytest.raises(DatasetError, match=r"has no train\.jsonl"):
        open_train(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n \n")
    with pytest.raises(DatasetError, match=r"is empty"):
        open_train(tmp_path)
    assert open_split(tmp_path, "valid") is None


def test_a_check_counts_and_lists_what_is_wrong(folder):
    need_tiny()
    _, processor = load("mm1-tiny")
    (folder / "pictures/broken.png").write_bytes(b"no picture")
    samples = lines(
        folder,
        FORMATS["question"],
        {"question": USER + " Tell me more.", "answer": ANSWER},
        {**FORMATS["question"], "image": "pictures/broken.png"},
        "{\n",
    )
    steps = list(check_samples(samples, processor))
    assert len(steps) == 4
    last = steps[-1]
    assert (last.samples, last.images) == (2, 1)
    assert last.longest_where.endswith("line 1") and last.longest > 64
    assert 0 < last.learned < 40 < last.tokens
    assert [p.split(": ")[0].rpartition(" ")[2] for p in last.problems] == ["3", "4"]
    for drop, (count, left_out, wrong) in ((True, (1, 1, 2)), (False, (2, 0, 3))):
        *_, last = check_samples(samples, processor, limit=60, drop=drop)
        assert (last.samples, last.dropped, len(last.problems)) == (
            count,
            left_out,
            wrong,
        )


def test_every_epoch_is_another_order_of_the_same(folder):
    order = Order(50, seed=3)
    first, second = ([order[50 * e + k] for k in range(50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    again = Order(50, seed=3)
    assert [again[k] for k in (70, 3, 51, 0)] == [
        second[20],
        first[3],
        second[1],
        first[0],
    ]
    other = Order(50, seed=4)
    assert [other[k] for k in range(50)] != first
    assert np.all(np.array([Order(1, 0)[k] for k in range(5)]) == 0)


def parsed(folder, **values):
    return parse_sample(values, folder, "here")


def test_pictures_as_addresses_of_parts(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    sample = parsed(tmp_path, messages=[{"role": "user", "content": parts}])
    held = sample.messages[0]["content"]
    assert held == [{"type": "image", "image": tmp_path / "a.png"}]
    parts[0]["image_url"]["url"] = "https://somewhere/a.png"
    with pytest.raises(DatasetError, match=r"here: the image https.* is an address"):
        parsed(tmp_path, messages=[{"role": "user", "content": parts}])


def test_a_long_name_is_no_picture(tmp_path):
    with pytest.raises(DatasetError, match=r"here: there is no image g{97}\.\.\. in"):
        parsed(tmp_path, question="a", answer="b", image="g" * 5000)
    with pytest.raises(DatasetError, match=r"here: there is no image"):
        parsed(tmp_path, question="a", answer="b", image="a\0b")


def test_the_system_of_a_conversation_is_kept(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    sample = parsed(tmp_path, conversations=turns, system="Be brief.")
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[0]["content"] == "Be brief."
    with pytest.raises(DatasetError, match=r"'system' is '3', but must be a text"):
        parsed(tmp_path, conversations=turns, system=3)
