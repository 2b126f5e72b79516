"""Image slots, messages, chat templates."""

import pytest
from talk_kit import answer, system, user

from helpers import need, run_python
from mm1_mlx.errors import PromptError
from mm1_mlx.inputs import prompts
from mm1_mlx.inputs.jinja import render_messages
from mm1_mlx.inputs.prompts import (
    GUARD,
    TEMPLATES,
    flatten_messages,
    guard,
    jinja_source,
    place_images,
    render_chat,
    with_image_slots,
)

# --- slots ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, images, expected",
    [
        ("Hi", 0, "Hi"),
        ("Hi", 2, "<image><image>Hi"),
        ("A <image> b <image>", 2, "A <image> b <image>"),
        ("<image>", 1, "<image>"),
    ],
)
def test_image_slots(prompt, images, expected):
    assert with_image_slots(prompt, images) == expected


@pytest.mark.parametrize(
    "prompt, images, message",
    [
        ("<image><image>", 1, "has 2 <image> but only 1 image was given. Give 1 more"),
        ("<image>" * 3, 2, "has 3 <image> but only 2 images were given"),
        ("a <image>", 2, "has 1 <image> but 2 images were given. Write <image> once"),
        ("a <image>", 0, "has 1 <image> but no image was given. Give 1 image, or"),
        ("", 0, "prompt is empty"),
        (" \n", 1, "prompt is empty"),
    ],
)
def test_image_slot_errors(prompt, images, message):
    with pytest.raises(PromptError, match=message):
        with_image_slots(prompt, images)


def test_place_images():
    talk = [system("s"), user("a"), answer("b"), user("c")]
    placed = place_images(talk, 2)
    assert [m["content"] for m in placed] == ["s", "<image><image>a", "b", "c"]
    assert talk[1]["content"] == "a"  # not changed in place
    assert place_images([user("<image>a")], 1) == [user("<image>a")]
    with pytest.raises(PromptError, match="only 1 image was given"):
        place_images([user("<image>a"), answer("b"), user("<image>c")], 1)
    with pytest.raises(PromptError, match="prompt is empty"):
        place_images([user("a"), answer("b"), user(" ")], 0)
    with pytest.raises(PromptError, match="no message of the role 'user'"):
        place_images([system("a")], 1)


# --- messages ------------------------------------------------------------------------


def test_flatten_messages():
    parts = [
        {"type": "image"},
        {"type": "text", "text": "What is "},
        {"type": "text", "text": "this?"},
        {"type": "image"},
    ]
    flat, images = flatten_messages([user(parts), {**answer("A cat."), "name": "x"}])
    assert flat[0]["content"] == "<image>What is this?<image>" and images == []
    assert flat[1] == {**answer("A cat."), "name": "x"}
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image", "url": "c"},
        {"type": "image_url", "image_url": {"url": "d"}},
    ]
    assert flatten_messages([user(parts)])[1] == ["a.png", "b.png", "c", "d"]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "conversation has no messages"),
        ({}, "conversation has no messages"),
        (["hi"], "A message is 'hi', but must be"),
        ([{"content": "hi"}], "must be {"),
        ([{"role": "user"}], "content 'None', but text or a list of parts"),
        ([user(3)], "content '3', but text"),
        ([user(["hi"])], "has the part 'hi', but parts are"),
        ([user([{"type": "video"}])], "but parts are"),
        ([user([{"type": "text"}])], "but parts are"),
        (
            [user([{"type": "image"}, {"type": "image", "image": "a"}])],
            "1 image part of the messages hold an image and 1 do not",
        ),
    ],
)
def test_message_errors(messages, message):
    with pytest.raises(PromptError, match=message):
        flatten_messages(messages)


# --- guard ---------------------------------------------------------------------------


def test_guard_breaks_marks_and_nothing_else():
    marks = ["</s>", "<image>", "<|im_end|>", "ab", "bc", "<"]
    assert guard("plain < text", marks) == "plain < text"
    assert guard("x</s>y", marks) == f"x<{GUARD}/s>y"
    assert guard("<image>", marks) == "<image>"
    assert guard("abc", marks) == f"a{GUARD}b{GUARD}c"  # marks that overlap
    assert guard("</s></s>", marks) == f"<{GUARD}/s><{GUARD}/s>"
    for text in ("abab</s>abc", "<|im_<|im_end|>end|>"):
        guarded = guard(text, marks)
        assert guarded.replace(GUARD, "") == text
        assert not any(m in guarded for m in marks if len(m) > 1)


def test_a_guard_typed_by_a_user_is_taken_out():
    assert guard(f"<{GUARD}/s>", ["</s>"]) == f"<{GUARD}/s>"
    assert guard(f"a{GUARD}b", []) == "ab"


# --- built-in templates --------------------------------------------------------------

TALK = [user("Hi"), answer("Yo"), user("Bye")]
LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the human's questions. "
)


@pytest.mark.parametrize(
    "name, messages, expected",
    [
        ("mm1-tiny", TALK, "<user>Hi<assistant>Yo</s><user>Bye<assistant>"),
        ("plain", TALK, "HiYoBye"),
        ("plain", [system("S"), user("Hi")], "S\nHi"),
        (
            "vicuna",
            [system("S"), *TALK],
            "S USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT:",
        ),
        (
            "vicuna",
            [user("Hi")],
            LLAVA.replace("human", "user") + "USER: Hi ASSISTANT:",
        ),
        ("llava-v1", [user("Hi")], LLAVA + "USER: Hi ASSISTANT:"),
        ("llava-hf", [user("<image>\nHi")], "USER: <image>\nHi ASSISTANT:"),
        (
            "chatml",
            [user("Hi")],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "chatml",
            [system("S"), user("Hi"), answer("Yo")],
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama-3",
            [system("S"), user("Hi")],
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "honeybee",
            [system("S"), user("<image>\nHuman: Hi")],
            "S\nHuman: <image>\nHuman: Hi\nAI: ",
        ),
    ],
)
def test_builtin_templates(name, messages, expected):
    assert render_chat(messages, name) == expected


@pytest.mark.parametrize(
    "content, expected",
    [
        ("<image>What?", "<image>\nWhat?"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<image>\nWhat?"),
        ("<image><image>Same?", "<image>\n<image>\nSame?"),
        ("<image>\nWhat?", "<image>\nWhat?"),  # there already
        ("<image> What?", "<image> What?"),  # as it was typed
        ("<image><image> What?", "<image><image> What?"),
        ("Is <image>it?", "Is <image>it?"),
        ("<image>", "<image>"),
    ],
)
def test_the_line_break_behind_an_image_in_front(content, expected):
    said = [user(content), answer("<image>x")]
    text = render_chat(said, "llava-hf", False)
    assert text == f"USER: {expected} ASSISTANT: <image>x</s>"
    assert render_chat([user("<image>Hi")], "mm1-tiny") == "<user><image>Hi<assistant>"


def test_without_a_generation_prompt():
    text = render_chat(TALK[:2], "mm1-tiny", add_generation_prompt=False)
    assert text == "<user>Hi<assistant>Yo</s>"


def test_text_is_one_user_message_and_none_is_plain():
    assert render_chat("Hi", "mm1-tiny") == "<user>Hi<assistant>"
    assert render_chat("Hi") == "Hi"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_jinja_text_of_the_builtin_templates_agrees(name):
    need("jinja2")
    source = jinja_source(name)
    talks = [TALK, TALK[:1], [user("a\n 'b' \"c\" {{ d }} <image>"), answer("</s>")]]
    if TEMPLATES[name].system is not None:
        talks += [[system("S"), *TALK]]
    for talk in talks:
        for prompted in (True, False):
            expected = render_chat(talk, name, prompted)
            assert prompts.builtin_name(source) in TEMPLATES
            actual = render_messages(source, talk, add_generation_prompt=prompted)
            assert actual == expected


@pytest.mark.parametrize("name", ["mm1-tiny", "llama-3", "chatml"])
def test_transformers_reads_our_jinja_text(name):
    need("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [TALK], chat_template=jinja_source(name), add_generation_prompt=True
    )
    assert rendered[0] == render_chat(TALK, name)


def test_a_system_message_is_never_dropped():
    with pytest.raises(PromptError, match="'mm1-tiny' has no place for a system mess"):
        render_chat([system("S"), user("Hi")], "mm1-tiny")


@pytest.mark.parametrize(
    "messages, template, message",
    [
        ([{"role": "robot", "content": "x"}], "chatml", "role 'robot', but.*'user'"),
        ([user("x")], "chat-ml", "no chat template 'chat-ml'. Built in are: chatml"),
        ([], "chatml", "no messages"),
    ],
)
def test_template_errors(messages, template, message):
    with pytest.raises(PromptError, match=message):
        render_chat(messages, template)


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from mm1_mlx.inputs import prompts; "
        "prompts.render_chat('Hi', prompts.jinja_source('mm1-tiny')); "
        "print([m for m in ('PIL', 'mlx', 'numpy', 'jinja2', 'tokenizers', "
        "'sentencepiece') if m in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
