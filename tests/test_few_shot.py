"""Examples before a question: which ones, how they are written, what is reused."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mm1_mlx import FewShot, generate
from mm1_mlx.errors import (
    DatasetError,
    MM1Error,
    PromptError,
)
from mm1_mlx.inference.features import Features
from mm1_mlx.inference.shot_template import split_answer
from mm1_mlx.inputs.examples import read_examples
from mm1_mlx.inputs.prompts import render_chat

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
        GOOD | {"image": (tmp_path / "pictures" / "a.png").as_uri()},
        GOOD | {"image": f"File://localhost{tmp_path}/b.png"},
    )
    first, second, third, *addresses = read_examples(file)
    assert [each.images for each in addresses] == [first.images, second.images[:1]]
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
        (GOOD | {"image": "file:///b.png"}, r"line 2: no image file /b\.png"),
        (GOOD | {"image": "file://pc/a.png"}, r"line 2: .* names the machine 'pc'"),
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
        (GOOD | {"video": "a.mp4"}, r'line 2: a shot has no video\. .* "images": \["1'),
        (
            {"video": "a.mp4", "prompt": "What?", "answer": "dog"},
            r"line 2: a shot has no video",
        ),
        (
            GOOD | {"prompt": "<video> What?"},
            r"line 2: a shot has no video\. Save some",
        ),
        (GOOD | {"answer": "<video>"}, r"line 2: a shot has no video"),
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
    wrong_values: list[tuple[dict, str]] = [
        ({"separator": ""}, "separator is an empty text: write one"),
        ({"answer_mark": " "}, "answer_mark is an empty text: write one"),
        ({"answer_mark": None}, "answer_mark is None, but must be a text"),
        ({"template": 5}, "template is 5, but must be a text"),
        ({"separator": 5}, "separator is 5, but must be a text"),
        ({"seed": None}, "seed is None, but must be a whole number"),
        ({"seed": True}, "seed is True, but must be a whole number"),
    ]
    for given, message in wrong_values:
        with pytest.raises(MM1Error, match=message):
            FewShot(BARE, **given)
    with pytest.raises(PromptError, match=r"separator stands between .*--shot-templ"):
        FewShot(ASKED, separator="#").ask("What?", processor=CHAT)
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
    assert render_chat(found.prompt, "llava-hf") == (
        "USER: <image>\nq1? ASSISTANT: a1</s>USER: <image>\nWhat? ASSISTANT:"
    )


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


def test_lines_of_reasoning_become_one_where_a_line_break_ends_an_answer():
    """Else the model would show its first line and be stopped."""
    long = [{**REASONED[0], "reasoning": "r1.\nr2.", "answer": "a\nb"}]
    found = FewShot(long).ask("Why?", "q.png", processor=PLAIN)
    assert found.stops == ("\n",)
    assert found.prompt == (
        "<image> Question: q1? r1. r2. Answer: a b\n<image> Question: Why?"
    )
    other = FewShot(long, template="{prompt} {reasoning} So {answer}", separator="##")
    assert "r1.\nr2. So a\nb##" in other.ask("<image> Why?", "q.png").prompt
    as_turns = FewShot(long).ask("Why?", "q.png", processor=CHAT)
    assert as_turns.prompt[1]["content"] == "r1.\nr2. Answer: a\nb"


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
        (BARE, {}, "", None, r"question is empty: give its picture \(--image\), or"),
        (
            REASONED,
            {"template": "{image}{prompt} {reasoning}\nSo {answer}"},
            "Why?",
            "q",
            r"has '\\n' between \{reasoning\} and \{answer\}, but that ends",
        ),
        (
            REASONED,
            {"template": "{prompt}{image} {answer}", "separator": "a1"},
            "Why?",
            "q",
            r"shot 1: the answer has 'a1' in it, which ends an answer here",
        ),
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
