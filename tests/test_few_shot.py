"""Examples before a question: which ones, how they are written, what is reused."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small import DENSE, SPARSE, VISION, SmallProcessor, small_config, small_model
from small_tokenizers import write_tiny
from test_reuse import Work

from helpers import assert_close, assert_equal, need_tiny
from mm1_mlx import FewShot, Reuse, batch_generate, generate, image_features, load
from mm1_mlx.config import ConnectorConfig
from mm1_mlx.errors import (
    CheckpointError,
    ContextError,
    DatasetError,
    ImageError,
    MM1Error,
    MM1Warning,
    PromptError,
)
from mm1_mlx.inference.features import Features
from mm1_mlx.inference.generation import stream_generate
from mm1_mlx.inference.shot_template import split_answer
from mm1_mlx.inputs.examples import read_examples
from mm1_mlx.inputs.images import ImageSettings, load_image, pixels
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.inputs.video import video_frames

CHAT = SimpleNamespace(chat_template="mm1-tiny")
PLAIN = SimpleNamespace(chat_template=None)


def line(number: int, **more) -> dict:
    return {"image": f"{number}.png", "answer": f"a{number}"} | more


def asked(number: int, **more) -> dict:
    return line(number, prompt=f"q{number}?", **more)


BARE = [line(i) for i in (1, 2, 3, 4)]
ASKED = [asked(i) for i in (1, 2, 3, 4)]
REASONED = [asked(i, reasoning=f"r{i}.") for i in (1, 2, 3, 4)]


# --- the file ------------------------------------------------------------------------


def picture(path, colour=(200, 30, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)


def write(folder, *lines) -> str:
    path = folder / "shots.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(path)


def test_a_file_of_shots(tmp_path):
    picture(tmp_path / "pictures" / "a.png")
    picture(tmp_path / "b.png")
    file = write(
        tmp_path,
        {"image": "pictures/a.png", "prompt": "What?", "answer": "dog", "id": 7},
        "",
        {"images": ["b.png", str(tmp_path / "b.png")], "prompt": "Two?", "answer": 2},
        {"images": [], "prompt": "None?", "answer": "no", "reasoning": None},
    )
    first, second, third = read_examples(file)
    assert first.images == (tmp_path / "pictures" / "a.png",)
    assert (first.prompt, first.answer, first.reasoning) == ("What?", "dog", None)
    assert [first.number, second.number, third.number] == [1, 3, 4]
    assert second.images == (tmp_path / "b.png",) * 2 and second.answer == "2"
    assert third.images == () and third.where == f"{file}, line 4"


GOOD = {"image": "a.png", "prompt": "What?", "answer": "dog"}


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", r"line 2: not a JSON object \(.*character \d+\)"),
        ("[1]", r"line 2: not a JSON object but '\[1\]'"),
        ("\xff\xfe", r"line 2: not a JSON object"),
        (
            {"image": "a.png", "prompt": "What?"},
            r'line 2: no "answer"\. It has "image"',
        ),
        ({"prompt": "What?", "answer": "dog"}, r'line 2: no "image" \(nor "images"\)'),
        (GOOD | {"image": "b.png"}, r"line 2: no image file .*b\.png"),
        (GOOD | {"image": ""}, r"line 2: '' is no path of a picture"),
        (GOOD | {"image": 3}, r"line 2: '3' is no path of a picture"),
        (GOOD | {"image": ["a.png"]}, r'line 2: "image" must be one picture'),
        (GOOD | {"images": []}, r'line 2: both "image" and "images"'),
        ({"images": "a.png", "answer": "dog"}, r'line 2: "images" must be a list'),
        (GOOD | {"answer": ""}, r"line 2: \"answer\" is '', but must be a text"),
        (GOOD | {"answer": None}, r'line 2: "answer" is None, but must be a text'),
        (GOOD | {"answer": True}, r'line 2: "answer" is True, but must be a text'),
        (GOOD | {"answer": "a <image>"}, r'line 2: "answer" holds <image>'),
        (GOOD | {"prompt": " "}, r'line 2: "prompt" is \' \', but must be a text'),
        (GOOD | {"prompt": "<image><image>"}, r"2 <image>, but there is 1 image"),
        (GOOD | {"reasonning": "x"}, r'unknown key "reasonning"; .* "reasoning"\?'),
        (
            {"image": "a.png", "answer": "dog"},
            r'line 2: it has no "prompt", but .*ne 1',
        ),
        (GOOD | {"reasoning": "so"}, r'line 1: it has no "reasoning", but .*line 2'),
    ],
)
def test_wrong_lines_are_named(tmp_path, bad, message):
    picture(tmp_path / "a.png")
    file = write(tmp_path, GOOD, bad)
    with pytest.raises(DatasetError, match=message):
        FewShot(file)


def test_files_and_lists_that_are_none(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.jsonl cannot be read: No such"):
        FewShot(tmp_path / "absent.jsonl")
    with pytest.raises(DatasetError, match=r"cannot be read: Is a directory"):
        FewShot(tmp_path)
    with pytest.raises(DatasetError, match=r"shots\.jsonl is empty"):
        FewShot(write(tmp_path, ""))
    with pytest.raises(DatasetError, match=r"The list of shots is empty"):
        FewShot([])
    with pytest.raises(DatasetError, match=r"of the type int, but a file"):
        FewShot(3)
    with pytest.raises(DatasetError, match=r"shot 2: no \"answer\""):
        FewShot([line(1), {"image": "b.png"}])


# --- which ones ----------------------------------------------------------------------


def numbers(shots: list) -> list[int]:
    return [shot.number for shot in shots]


def test_all_or_the_first_or_any():
    many = [line(i) for i in range(1, 41)]
    assert numbers(FewShot(many).choose()) == list(range(1, 41))
    assert numbers(FewShot(many, 3, choice="first").choose()) == [1, 2, 3]
    drawn = numbers(FewShot(many, 5).choose())
    assert len(set(drawn)) == 5
    assert numbers(FewShot(many, 5, choice="random", seed=0).choose()) == drawn
    assert numbers(FewShot(many, 5, seed=1).choose()) != drawn
    # Fewer are some of the same: what a message says would fit can be relied on.
    assert numbers(FewShot(many, 3).choose()) == drawn[:3]
    expected = list(range(1, 41))
    random.Random(0).shuffle(expected)
    assert drawn == expected[:5]


def test_as_many_of_each_answer_as_can_be():
    kinds = ["cat"] * 6 + ["dog"] * 2 + ["cow"]
    many = [line(i, answer=kind) for i, kind in enumerate(kinds, 1)]

    def shown(count: int, **settings) -> list[str]:
        shots = FewShot(many, count, balanced=True, **settings).choose()
        return [shot.answer for shot in shots]

    assert shown(3, choice="first") == ["cat", "dog", "cow"]
    assert shown(6, choice="first") == ["cat", "dog", "cow", "cat", "dog", "cat"]
    for seed in range(5):
        assert sorted(shown(3, seed=seed)) == ["cat", "cow", "dog"]
        assert sorted(shown(5, seed=seed)) == ["cat", "cat", "cow", "dog", "dog"]


class Vectors(Features):
    """Pictures are vectors already."""

    def of(self, model, processor, images, **limits):
        return np.array(images, np.float32)


def near(*vectors, answers="abcdefg", **settings) -> FewShot:
    many = [
        {"images": [vector] if isinstance(vector, tuple) else vector, "answer": answer}
        for vector, answer in zip(vectors, answers, strict=False)
    ]
    return FewShot(many, choice="nearest", features=Vectors(), **settings)


def test_the_nearest_stand_last():
    shots = near((1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6), num_shots=3)
    assert numbers(shots.choose(None, None, [(1, 0)])) == [3, 4, 1]
    assert numbers(shots.choose(None, None, [(0, 1)])) == [4, 3, 2]
    # Of two that are as near, the first of the file is the nearer one.
    shots = near((1, 0), (0, 1), (1, 0))
    assert numbers(shots.choose(None, None, [(1, 0)])) == [2, 3, 1]
    # Several pictures count as their mean.
    shots = near([(1, 0), (0, 1)], [(1, 0), (1, 0)])
    assert numbers(shots.choose(None, None, [(1, 0)])) == [1, 2]


def test_the_nearest_of_each_answer():
    shots = near(
        (1, 0), (0.9, 0), (0.8, 0), (0.5, 0), answers="aaab", num_shots=2, balanced=True
    )
    assert numbers(shots.choose(None, None, [(1, 0)])) == [4, 1]


def test_choices_that_are_none():
    with pytest.raises(MM1Error, match=r"choice is 'best', .* first, random, nearest"):
        FewShot(BARE, choice="best")
    for wrong in (0, -1, 2.5, True, "3"):
        with pytest.raises(MM1Error, match="but must be a whole number above 0"):
            FewShot(BARE, wrong)
    with pytest.raises(DatasetError, match=r"5 shots .* there are 4\. .*--num-shots 4"):
        FewShot(BARE, 5)
    with pytest.raises(MM1Error, match="separator and answer_mark must be texts"):
        FewShot(BARE, separator="")
    with pytest.raises(MM1Error, match="separator and answer_mark must be texts"):
        FewShot(BARE, answer_mark=" ")
    with pytest.raises(PromptError, match=r"but the question has none: choose them at"):
        FewShot(BARE, choice="nearest").ask("What?", processor=CHAT)
    with pytest.raises(DatasetError, match=r"shot 1: it has no picture, so nothing"):
        shots = FewShot([{"images": [], "answer": "a"}], choice="nearest")
        shots.ask("What?", "q.png", processor=CHAT)
    with pytest.raises(
        MM1Error, match=r"shots is of the type str, but must be a FewSh"
    ):
        generate(None, None, "What?", shots="shots.jsonl")


# --- how they are written ------------------------------------------------------------


def test_turns_of_the_chat():
    found = FewShot(ASKED, 2, choice="first").ask("And this?", "q.png", processor=CHAT)
    assert found.prompt == [
        {"role": "user", "content": "<image>q1?"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "<image>q2?"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "<image>And this?"},
    ]
    assert found.images == ["1.png", "2.png", "q.png"]
    assert (found.stops, found.mark) == ((), None)
    assert numbers(found.shots) == [1, 2]


def test_turns_have_the_space_that_a_template_wants_behind_pictures():
    llava = SimpleNamespace(chat_template="llava-v1")
    found = FewShot(ASKED, 1, choice="first").ask("What?", "q.png", processor=llava)
    assert [m["content"] for m in found.prompt] == [
        "<image>\nq1?",
        "a1",
        "<image>\nWhat?",
    ]


def test_the_question_is_asked_of_examples_without_one():
    found = FewShot(BARE, 1, choice="first").ask("What?", "q.png", processor=CHAT)
    assert [m["content"] for m in found.prompt] == [
        "<image>What?",
        "a1",
        "<image>What?",
    ]
    found = FewShot(BARE, 1, choice="first").ask("In <image>?", "q.png", processor=CHAT)
    assert [m["content"] for m in found.prompt] == ["In <image>?", "a1", "In <image>?"]
    two = [{"images": ["a", "b"], "answer": "x"}]
    found = FewShot(two).ask("In <image>?", "q.png", processor=CHAT)
    assert found.prompt[0]["content"] == "<image><image>In ?"


def test_bare_lines_in_one_turn():
    """What mm1-tiny learns: pictures with labels, and one without."""
    found = FewShot(BARE, 2, choice="first").ask("", "q.png", processor=CHAT)
    assert found.prompt == "<image> a1\n<image> a2\n<image>"
    assert found.images == ["1.png", "2.png", "q.png"]
    assert found.stops == ("\n",)


def test_the_pretraining_form_where_there_is_no_chat_template():
    for processor, use in ((PLAIN, True), (CHAT, False)):
        found = FewShot(ASKED, 1, choice="first").ask(
            "And this?", "q.png", processor=processor, use_template=use
        )
        assert found.prompt == (
            "<image> Question: q1? Short answer: a1\n"
            "<image> Question: And this? Short answer:"
        )
        assert found.stops == ("\n",)


def test_a_template_of_ones_own():
    shots = FewShot(
        ASKED, 1, choice="first", template="{{{prompt}}} {image}\n= {answer}.",
        separator="\n\n",
    )  # fmt: skip
    found = shots.ask("What?", "q.png", processor=CHAT)
    assert found.prompt == "{q1?} <image>\n= a1.\n\n{What?} <image>\n="
    assert found.stops == (".", "\n\n")


def test_pictures_where_the_prompt_has_them():
    shots = [line(1, prompt="Is <image> red?")]
    found = FewShot(shots, template="{image} Q: {prompt} A: {answer}").ask(
        "Is <image> blue?", "q.png", processor=CHAT
    )
    assert found.prompt == "Q: Is <image> red? A: a1\nQ: Is <image> blue? A:"


def test_examples_go_behind_the_system_message_of_a_conversation():
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "x.png"},
                                     {"type": "text", "text": "First?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Second?"},
    ]  # fmt: skip
    found = FewShot(ASKED, 1, choice="first").ask(talk, processor=CHAT)
    texts = [m["content"] for m in found.prompt]
    assert texts == [
        "Be brief.",
        "<image>q1?",
        "a1",
        "<image>First?",
        "Yes.",
        "Second?",
    ]
    assert found.images == ["1.png", "x.png"]


def test_reasoning_stands_before_the_answer():
    shots = FewShot(REASONED, 1, choice="first")
    found = shots.ask("Why?", "q.png", processor=CHAT)
    assert found.prompt[1]["content"] == "r1. Answer: a1"
    assert found.mark == "Answer:"
    assert shots.ask("Why?", "q.png", processor=PLAIN).prompt == (
        "<image> Question: q1? r1. Answer: a1\n<image> Question: Why?"
    )
    without = FewShot(REASONED, 1, choice="first", reasoning=False)
    found = without.ask("Why?", "q.png", processor=CHAT)
    assert found.prompt[1]["content"] == "a1" and found.mark is None
    so = FewShot(REASONED, 1, choice="first", answer_mark="So:")
    assert so.ask("Why?", "q", processor=CHAT).prompt[1]["content"] == "r1. So: a1"
    own = FewShot(
        REASONED, 1, choice="first", template="{prompt}{image} {reasoning} => {answer}"
    )
    found = own.ask("Why?", "q", processor=CHAT)
    assert found.prompt == "q1?<image> r1. => a1\nWhy?<image>"
    assert found.mark == "=>"


def test_reasoning_and_answer_are_told_apart():
    assert split_answer("Two. Three. Answer: 3 ", "Answer:") == ("Two. Three.", "3")
    assert split_answer("Answer: no. Answer: 3", "Answer:") == ("Answer: no.", "3")
    assert split_answer(" three", "Answer:") == (None, "three")
    assert split_answer(" Answer: three", None) == (None, "Answer: three")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{image}", r"must end with \{answer\}"),
        ("{answer} {image}", r"must end with \{answer\}"),
        ("{reasoning} {image} {answer}", r"\{reasoning\} stands right before it"),
        ("{image} {label} {answer}", r"has \{label\} but it is none\. Fields are"),
        ("{image}{image} {answer}", r"has \{image\} twice"),
        ("{image {answer}", r"is broken \(.*\)\. A brace"),
        ("{image} {reasoning} {answer}", r"nothing between \{reasoning\} and \{ans"),
    ],
)
def test_templates_that_are_none(template, message):
    with pytest.raises(PromptError, match=message):
        FewShot(REASONED, template=template)


@pytest.mark.parametrize(
    "shots, settings, prompt, images, message",
    [
        (ASKED, {}, "", "q", r"shot 1 has a prompt, so the question needs one, too"),
        (BARE, {"template": "{answer}"}, "", "q", r"no \{image\}, but there are pict"),
        (
            BARE,
            {"template": "{image}{answer}"},
            "What?",
            "q",
            r"no \{prompt\}, so it .*",
        ),
        (ASKED, {"template": "{image}{prompt}{answer}"}, "", "q", r"question is empty"),
        (
            BARE,
            {"template": "{image} {reasoning} So {answer}"},
            "",
            "q",
            r"no \"reason",
        ),
        (BARE, {}, "<image> <image>?", "q", r"has 2 <image> but only 1 image was"),
        (BARE, {}, 3, "q", r"of the type int, but text or a list of messages"),
    ],
)
def test_questions_that_do_not_go_with_them(shots, settings, prompt, images, message):
    with pytest.raises((PromptError, DatasetError), match=message):
        FewShot(shots, **settings).ask(prompt, images, processor=CHAT)


def test_a_conversation_needs_turns():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.append({"role": "user", "content": "c"})
    with pytest.raises(PromptError, match="as turns of a chat template only"):
        FewShot(ASKED).ask(talk, processor=PLAIN)


def test_reasoning_that_is_not_there():
    with pytest.raises(DatasetError, match=r'shot 1: no "reasoning", but it shall be'):
        FewShot(ASKED, reasoning=True)


# --- in which resolution -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, resolution, expected",
    [
        ({}, None, None),
        ({}, 672, 672),
        ({"high_resolution_shots": 1}, 672, ["native", "native", 672, 672]),
        ({"high_resolution_shots": 0}, "dynamic", ["native"] * 3 + ["dynamic"]),
        ({"high_resolution_shots": 9}, 672, [672] * 4),
        ({"high_resolution_shots": 1}, None, ["native", "native", None, None]),
        ({}, [1344], [None, None, None, 1344]),
    ],
)
def test_the_last_shots_are_read_as_the_question(settings, resolution, expected):
    shots = FewShot(BARE, 3, choice="first", **settings)
    for question in ("", "What?"):
        found = shots.ask(question, "q.png", processor=CHAT, resolution=resolution)
        assert found.resolution == expected


def test_high_resolution_shots_have_one_meaning(paper):
    """The last ones as the question, which must be read higher than the others."""
    shots = FewShot(BARE, 3, choice="first", high_resolution_shots=1)
    with pytest.raises(PromptError, match=r"goes with one resolution, .* a list was"):
        shots.ask("", "q.png", processor=CHAT, resolution=[1344])
    for same in (None, "native", 24):  # 24 pixels are the encoder's own
        with pytest.raises(PromptError, match=r"that is the encoder's own, .*--resol"):
            shots.ask("", "q.png", processor=paper, resolution=same)
    found = shots.ask("", "q.png", processor=paper, resolution=48)
    assert found.resolution == ["native", "native", 48, 48]
    paper.resolution = 48  # what a call takes that is given none
    found = shots.ask("", "q.png", processor=paper)
    assert found.resolution == ["native", "native", None, None]
    one = Image.new("RGB", (24, 24))
    frames = video_frames([one, one], 2)  # are not cut here, either
    with pytest.warns(MM1Warning, match="Frames of a video are not cut"):
        found = shots.ask("", frames, processor=paper, resolution="dynamic")
    assert found.resolution == ["native", "native", "dynamic", "native", "native"]


def test_examples_that_are_left_out_make_room_for_others():
    assert numbers(FewShot(BARE, 3, choice="first").choose(leave_out={2})) == [1, 3, 4]
    drawn = numbers(FewShot(BARE, 4).choose())
    assert numbers(FewShot(BARE, 2).choose(leave_out={drawn[0]})) == drawn[1:3]
    shots = near((1, 0), (0, 1), (0.6, 0.8), num_shots=2)
    assert numbers(shots.choose(None, None, [(1, 0)], leave_out={1})) == [2, 3]


def test_every_picture_of_a_shot_has_its_resolution():
    two = [{"images": ["a", "b"], "answer": "x"}, {"image": "c", "answer": "y"}]
    shots = FewShot(two, high_resolution_shots=1)
    found = shots.ask("", ["q", "r"], processor=CHAT, resolution=672)
    assert found.resolution == ["native", "native", 672, 672, 672]


@pytest.mark.parametrize("wrong", [-1, 1.5, "2", True])
def test_numbers_of_large_shots_that_are_none(wrong):
    with pytest.raises(MM1Error, match=r"high_resolution_shots is .* must be a whole"):
        FewShot(BARE, high_resolution_shots=wrong)


# --- the same tokens, with less work -------------------------------------------------

# Of SmallProcessor: words are tokens, a picture is four; images are numbers.
SMALL = [
    {"image": 1, "prompt": "5 17", "answer": "33"},
    {"image": 2, "prompt": "8 20 41", "answer": "7"},
    {"image": 3, "prompt": "12", "answer": "9 30"},
]
TEMPLATE = "{image} {prompt} {answer}"
IN_FRONT = (
    1 + (4 + 2 + 1) + (4 + 3 + 1) + (4 + 1 + 2)
)  # the first token, and three shots
QUERIES = [("50 51", 7), ("60 61 62 63", 8), ("70", 9), ("80 81", 7)]
SHORT = {"max_tokens": 12}


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


def by_hand(prompt: str) -> str:
    lines = [f"<image> {s['prompt']} {s['answer']}" for s in SMALL]
    return "\n".join([*lines, f"<image> {prompt}"])


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize("settings", [{}, {"kv_bits": 8}, {"lookup": 2}], ids=str)
def test_shots_are_read_once_for_many_questions(text, settings, work):
    model, processor = small_model(text), SmallProcessor()
    shots = FewShot(SMALL, template=TEMPLATE)
    for i, (prompt, image) in enumerate(QUERIES):
        given = {**SHORT, **settings}
        work.since()
        found = generate(model, processor, prompt, [image], shots=shots, **given)
        pictures, tokens = work.since()
        again = generate(
            model, processor, by_hand(prompt), [1, 2, 3, image],
            reuse=False, stop="\n", **given,
        )  # fmt: skip
        assert found.token_ids == again.token_ids
        assert found.prompt_tokens == IN_FRONT + 4 + len(prompt.split())
        assert found.shots == (1, 2, 3)
        if i == 0:
            assert pictures == 4 and found.reused_tokens == 0
        elif image == 7 and i == 3:  # its picture was asked about before
            assert pictures == 0 and found.reused_tokens == IN_FRONT + 4
        else:
            assert pictures == 1 and found.reused_tokens == IN_FRONT
            if "kv_bits" not in settings:
                assert tokens == found.prompt_tokens - IN_FRONT


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
def test_shots_are_read_once_for_a_batch(text, work):
    model, processor = small_model(text), SmallProcessor()
    shots = FewShot(SMALL * 2, template=TEMPLATE)  # long enough to be read apart
    front = 1 + 2 * (IN_FRONT - 1)
    prompts, images = [p for p, _ in QUERIES], [[i] for _, i in QUERIES]
    work.since()
    found = batch_generate(model, processor, prompts, images, shots=shots, **SHORT)
    pictures, tokens = work.since()
    assert (
        pictures == 3 + 3
    )  # of the shots, which are there twice, and of the questions
    longest = max(each.prompt_tokens for each in found)
    assert tokens == front + len(QUERIES) * (longest - front)
    # Rows end together: a shorter one is read from as many columns before its end.
    others = [front - (longest - each.prompt_tokens) for each in found[1:]]
    assert [each.reused_tokens for each in found] == [0, *others]
    for each, prompt, image in zip(found, prompts, images, strict=True):
        alone = generate(
            model, processor, prompt, image, shots=shots, reuse=False, **SHORT
        )
        assert each.token_ids == alone.token_ids
        assert each.shots == (1, 2, 3, 4, 5, 6)


def test_a_later_batch_reads_no_shots(work):
    model, processor = small_model(SPARSE), SmallProcessor()
    shots, store = FewShot(SMALL, template=TEMPLATE), Reuse()
    prompts, images = ["50 51", "60"], [[7], [8]]
    given = {"shots": shots, "reuse": store, **SHORT}
    batch_generate(model, processor, prompts, images, **given)
    work.since()
    found = batch_generate(model, processor, ["70 71", "72 73"], [[9], [10]], **given)
    assert [each.reused_tokens for each in found] == [IN_FRONT] * 2
    assert work.since() == (2, 2 * (4 + 2))


def test_a_stream_has_shots_too():
    model, processor = small_model(), SmallProcessor()
    shots = FewShot(SMALL, template=TEMPLATE)
    pieces = list(stream_generate(model, processor, "50", [7], shots=shots, **SHORT))
    whole = generate(model, processor, "50", [7], shots=shots, **SHORT)
    assert [t for piece in pieces for t in piece.token_ids] == list(whole.token_ids)


def test_the_separator_ends_an_answer():
    model = small_model()
    first = generate(model, SmallProcessor(), by_hand("50"), [1, 2, 3, 7], **SHORT)
    words = {first.token_ids[2]: "\n"}
    shots = FewShot(SMALL, template=TEMPLATE)
    found = generate(model, SmallProcessor(words), "50", [7], shots=shots, **SHORT)
    assert found.token_ids == first.token_ids[:3]
    assert found.finish_reason == "stop" and "\n" not in found.text


def test_reasoning_and_answer_of_a_response():
    model = small_model()
    reasoned = [shot | {"reasoning": "4"} for shot in SMALL]
    settings = {"template": "{image} {prompt} {reasoning} 6 {answer}"}
    lines = [f"<image> {s['prompt']} 4 6 {s['answer']}" for s in SMALL]
    text = "\n".join([*lines, "<image> 50"])
    ids = generate(model, SmallProcessor(), text, [1, 2, 3, 7], **SHORT).token_ids
    processor = SmallProcessor({ids[2]: "6 "})
    shots = FewShot(reasoned, **settings)
    found = generate(model, processor, "50", [7], shots=shots, **SHORT)
    assert found.token_ids == ids
    reasoning, answer = found.text.rsplit("6", 1)
    assert (found.reasoning, found.answer) == (reasoning.strip(), answer.strip())
    (same,) = batch_generate(model, processor, ["50"], [[7]], shots=shots, **SHORT)
    assert (same.reasoning, same.answer) == (found.reasoning, found.answer)


# --- as many as in the paper ---------------------------------------------------------


@pytest.fixture
def paper(tmp_path) -> Processor:
    """144 tokens a picture, and a context of 4096 (MM1 section 4)."""
    vision = replace(VISION, image_size=24, patch_size=2)
    connector = ConnectorConfig(type="average_pool", num_query_tokens=144)
    text = replace(DENSE, vocab_size=400, max_position_embeddings=4096)
    config = small_config(
        text, vision_config=vision, connector_config=connector, image_token_id=4
    )
    tokenizer = load_tokenizer(write_tiny(tmp_path))
    settings = ImageSettings(size=24)
    return Processor(tokenizer, settings, config, chat_template="mm1-tiny")


def test_sixteen_pictures_fit_and_24_frames_do(paper):
    one = Image.new("RGB", (24, 24))
    many = [{"image": one, "answer": f"label {i}"} for i in range(40)]
    asked = FewShot(many, 16).ask("", one, processor=paper)
    inputs = paper(asked.prompt, asked.images)
    assert inputs.num_images == 17 and inputs.input_ids.shape[1] < 4096
    frames = video_frames([one] * 100)
    ids = paper("What happens?", frames).input_ids[0].tolist()
    assert ids.count(4) == 24 * 144 == 3456
    with pytest.raises(ContextError) as met:
        paper("What happens?", [one] * 40)
    assert (met.value.images, met.value.images_that_fit) == (40, 28)
    assert "28 of the 40 images" in str(met.value)


# --- with pictures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220)}


@pytest.fixture
def coloured(tmp_path):
    """A file of two pictures of each of three colours."""
    lines = []
    for size in (20, 60):
        for name, colour in COLOURS.items():
            path = tmp_path / f"{name}{size}.png"
            Image.new("RGB", (size, size), colour).save(path)
            lines.append({"image": path.name, "answer": name})
    return write(tmp_path, *lines)


def test_features_are_the_mean_of_patches(tiny, coloured, tmp_path):
    model, processor = tiny
    paths = [tmp_path / "red20.png", str(tmp_path / "blue60.png")]
    found = image_features(model, processor, paths)
    settings = processor.image_settings
    shots = np.stack([pixels(load_image(path), settings) for path in paths])
    patches = np.array(model.vision(mx.array(shots)).astype(mx.float32), np.float64)
    mean = patches.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    # Float32 sums of 144 patches in another order.
    assert_close(found, expected, atol=1e-5)
    assert image_features(model, processor, []).shape == (0, expected.shape[1])
    same = image_features(model, processor, [Image.open(paths[0])])
    assert_close(same[0], found[0], atol=1e-5)


def test_the_nearest_by_features(tiny, coloured, tmp_path):
    model, processor = tiny
    shots = FewShot(coloured, 2, choice="nearest")
    for name in COLOURS:
        query = tmp_path / f"{name}60.png"
        chosen = shots.choose(model, processor, [query])
        assert [shot.answer for shot in chosen] == [name, name]
        assert chosen[-1].images == (tmp_path / f"{name}20.png",)  # the same, enlarged


def count_encoded(model, monkeypatch) -> list[int]:
    counts: list[int] = []
    kind, vision = type(model.vision), type(model.vision).__call__

    def watched(self, pixel_values, **settings):
        counts.append(pixel_values.shape[0])
        return vision(self, pixel_values, **settings)

    monkeypatch.setattr(kind, "__call__", watched)
    return counts


def test_features_are_computed_once(tiny, coloured, tmp_path, monkeypatch):
    model, processor = tiny
    counts = count_encoded(model, monkeypatch)
    kept = tmp_path / "features.safetensors"
    query = [tmp_path / "green20.png"]
    shots = FewShot(coloured, 2, choice="nearest", features=kept)
    first = shots.choose(model, processor, query)
    assert counts == [6]  # the query is one of them
    assert numbers(shots.choose(model, processor, query)) == numbers(first)
    again = FewShot(coloured, 2, choice="nearest", features=kept)
    assert numbers(again.choose(model, processor, query)) == numbers(first)
    assert counts == [6]
    # A file with other contents under the same name is another picture.
    Image.new("RGB", (20, 20), (0, 0, 0)).save(tmp_path / "red20.png")
    again.choose(model, processor, query)
    assert counts == [6, 1]
    FewShot(coloured, 2, choice="nearest", features=kept).choose(
        model, processor, query
    )
    assert counts == [6, 1]


def test_features_that_are_held_are_those_of_looking_again(
    tiny, coloured, tmp_path, monkeypatch
):
    model, processor = tiny
    shots = FewShot(coloured, 3, choice="nearest")
    held = shots.looked(model, processor)
    opened = []
    plain = Features._opened
    monkeypatch.setattr(
        Features,
        "_opened",
        lambda self, image, limits: opened.append(image) or plain(self, image, limits),
    )
    for name in COLOURS:
        query = tmp_path / f"{name}20.png"
        near = held.choose(model, processor, [query])
        assert opened == [query]
        assert numbers(near) == numbers(shots.choose(model, processor, [query]))
        opened.clear()


def test_pictures_without_features_can_be_passed_over(tiny, coloured, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    names = ["red20.png", "bad.png", "blue20.png", "absent.png"]
    failed: dict = {}
    kept = Features()
    found = kept.of(*tiny, [tmp_path / name for name in names], failed=failed)
    assert sorted(failed) == [1, 3] and "bad.png is not an ima" in str(failed[1])
    assert not found[[1, 3]].any()
    alone = image_features(*tiny, [tmp_path / "red20.png", tmp_path / "blue20.png"])
    assert_equal(found[[0, 2]], alone)


def test_features_of_another_encoder_are_not_taken(tiny, coloured, tmp_path):
    model, processor = tiny
    kept = Features(tmp_path / "features.safetensors")
    paths = [tmp_path / "red20.png"]
    before = kept.of(model, processor, paths)
    weight = model.vision.patch_embed.weight
    model.vision.patch_embed.weight = weight * 2
    try:
        changed = kept.of(model, processor, paths)
        fresh = Features(tmp_path / "features.safetensors").of(model, processor, paths)
        assert_equal(changed, fresh)
        assert np.abs(changed - before).max() > 1e-3
    finally:
        model.vision.patch_embed.weight = weight
    assert_equal(kept.of(model, processor, paths), before)


def test_files_of_features_that_are_none(tiny, coloured, tmp_path):
    (tmp_path / "f.safetensors").write_text("no features")
    shots = FewShot(coloured, choice="nearest", features=tmp_path / "f.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is no file of image features\. Delete it"
    ):
        shots.choose(*tiny, [tmp_path / "red20.png"])
    shots = FewShot(coloured, choice="nearest", features=coloured + "/f.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        shots.choose(*tiny, [tmp_path / "red20.png"])
    with pytest.raises(ImageError, match="takes a list of pictures"):
        image_features(*tiny, str(tmp_path / "red20.png"))


def test_a_model_without_an_encoder_has_no_features(tiny):
    model = SimpleNamespace(config=SimpleNamespace(vision_config=None))
    with pytest.raises(PromptError, match="has no image encoder, so its pictures"):
        image_features(model, tiny[1], [])


@pytest.mark.parametrize("choice", ["first", "random", "nearest"])
def test_answers_are_those_of_the_written_out_prompt(tiny, coloured, tmp_path, choice):
    """Cached or not, alone or in a batch."""
    model, processor = tiny
    shots = FewShot(coloured, 3, choice=choice)
    queries = [tmp_path / f"{name}60.png" for name in COLOURS]
    given = {"shots": shots, "max_tokens": 6, "stop": "never"}
    store = Reuse()
    batch = batch_generate(model, processor, [""] * 3, queries, reuse=False, **given)
    for query, of_batch in zip(queries, batch, strict=True):
        cached = generate(model, processor, "", query, reuse=store, **given)
        fresh = generate(model, processor, "", query, reuse=False, **given)
        asked = shots.ask("", query, model=model, processor=processor)
        out = generate(
            model, processor, asked.prompt, asked.images, stop="\n", max_tokens=6
        )
        tokens = {r.token_ids for r in (cached, fresh, out, of_batch)}
        assert len(tokens) == 1
    if choice != "nearest":
        assert cached.reused_tokens >= 3 * processor.tokens_per_image


def test_mixed_resolutions_are_those_of_the_written_out_prompt(
    tiny, coloured, tmp_path
):
    model, processor = tiny
    shots = FewShot(coloured, 3, choice="first", high_resolution_shots=1)
    query, side = tmp_path / "blue60.png", 2 * processor.image_settings.size
    given = {"shots": shots, "max_tokens": 6, "resolution": side}
    (found,) = batch_generate(model, processor, [""], [query], reuse=False, **given)
    asked = shots.ask("", query, processor=processor, resolution=side)
    out = generate(
        *(model, processor, asked.prompt, asked.images),
        **{"resolution": ["native", "native", side, side], "max_tokens": 6},
        stop="\n",
    )
    assert found.token_ids == out.token_ids
    inputs = processor(
        asked.prompt, asked.images, resolution=["native", "native", side, side]
    )
    widths = [each.shape[-2] for each in inputs.pixel_values]
    assert widths == [side // 2, side // 2, side, side]


def test_a_broken_picture_of_a_shot_is_named_with_its_line(tiny, coloured, tmp_path):
    (tmp_path / "green20.png").write_text("no picture")
    for choice in ("first", "nearest"):
        shots = FewShot(coloured, choice=choice)
        with pytest.raises(DatasetError, match=r"line 2: .*green20\.png is not an ima"):
            generate(*tiny, "", tmp_path / "red20.png", shots=shots)
    with pytest.raises(ImageError, match=r"^No image file .*absent"):
        generate(*tiny, "", tmp_path / "absent.png", shots=FewShot(coloured, 1))


def test_more_shots_than_the_context_holds(tiny, coloured, tmp_path):
    """What the error says would fit does fit, and one more does not."""
    model, processor = tiny
    context = model.config.text_config.max_position_embeddings
    many = [{"image": tmp_path / "red20.png", "answer": "red"}] * (context // 64 + 2)
    shots = FewShot(many, choice="first")
    with pytest.raises(ContextError, match=r"--num-shots \d+ \(num_shots=\d+\)") as met:
        generate(model, processor, "", tmp_path / "red60.png", shots=shots)
    count = int(str(met.value).rpartition("=")[2].rstrip(")."))
    less = FewShot(many, count, choice="first")
    assert generate(
        model, processor, "", tmp_path / "red60.png", shots=less, max_tokens=1
    ).shots == tuple(range(1, count + 1))
    with pytest.raises(ContextError):
        more = FewShot(many, count + 1, choice="first")
        generate(model, processor, "", tmp_path / "red60.png", shots=more)
