"""Image slots, messages, chat templates."""

import pytest

from helpers import need, run_python
from mm1_mlx.errors import MM1Warning, PromptError
from mm1_mlx.inputs import prompts
from mm1_mlx.inputs.jinja import _wants_parts, render_messages
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


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


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


# --- jinja ---------------------------------------------------------------------------


def test_jinja_as_transformers_renders_it():
    need("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    source = """
{%- if tools %}tools{% endif %}
{{ bos_token }}
{%- for message in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {% if message.role == 'assistant' %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ eos_token }}
    {% else %}
{{ message | tojson }} {{ {'é<': [1, none]} | tojson(indent=2) }}
    {% endif %}
{%- endfor %}
{% if add_generation_prompt %}{{ extra }}>{% endif %}
"""
    more = {"bos_token": "<s>", "eos_token": "</s>", "extra": "e"}
    theirs, _ = render_jinja_template(
        [TALK], chat_template=source, add_generation_prompt=True, **more
    )
    assert render_chat(TALK, source, **more) == theirs[0]


def test_templates_that_loop_over_parts():
    source = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c.type == 'image' %}[I]{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    assert render_chat([user("a <image> b")], source) == "a [I] b"
    selected = (
        "{%- for message in messages -%}{%- for content in message.content | "
        "selectattr('type', 'equalto', 'image') -%}<image>{%- endfor -%}"
        "{%- for content in message.content | selectattr('type', 'equalto', 'text') -%}"
        "{{ content['text'] }}{%- endfor -%}{%- endfor -%}"
    )
    assert render_chat([user("a b<image>")], selected) == "<image>a b"
    assert not _wants_parts("{% for m in messages %}{{ m.content }}{% endfor %}")


# What transformers' template for LLaVA does: all images, then all texts.
LLAVA_PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("<image>What?", ["image", "What?"]),
        ("<image>\nWhat?", ["image", "What?"]),  # as LLaVA's own data has it
        ("<image><image>Same?", ["image", "image", "Same?"]),
        ("<image>\n<image>\nSame?", ["image", "image", "Same?"]),
        ("What is it? <image>", ["What is it? ", "image"]),
        ("Hi", ["Hi"]),
    ],
)
def test_parts_are_rendered_as_transformers_does(text, parts):
    """Text with marks and messages of parts alike."""
    need("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [
        {"type": "image"} if part == "image" else {"type": "text", "text": part}
        for part in parts
    ]
    theirs, _ = render_jinja_template(
        [[user(given)]], chat_template=LLAVA_PARTS, add_generation_prompt=True
    )
    assert render_chat([user(given)], LLAVA_PARTS) == theirs[0]
    assert render_chat([user(text)], LLAVA_PARTS) == theirs[0]


def test_images_between_words_stay_there():
    """In a template that would write all images first; others of the talk as always."""
    asked = "First: <image> Second: <image> Which?"
    assert render_chat([user(asked)], LLAVA_PARTS) == f"USER: {asked} ASSISTANT:"
    begun = [user("What? <image>"), answer("red"), user("<image>Like <image>?")]
    assert render_chat(begun, LLAVA_PARTS) == (
        "USER: <image>\nWhat?  ASSISTANT: red USER: <image>\nLike <image>? ASSISTANT:"
    )
    deaf = LLAVA_PARTS.replace("c['text']", "c['text'] | replace('<image>', '')")
    with pytest.warns(MM1Warning, match="takes the pictures .* out of their places"):
        text = render_chat([user(asked)], deaf)
    assert text == "USER: <image>\n<image>\nFirst:   Second:   Which? ASSISTANT:"


def test_a_template_that_keeps_places_is_given_parts():
    source = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c.text or '(<image>)' }}"
        "{% endfor %}{% endfor %}"
    )
    text = render_chat([user("<image>A <image> b")], source)
    assert text == "(<image>)A (<image>) b"
    assert render_chat([user("<image>\nA")], source) == "(<image>)\nA"


# Templates that loop over parts in ways that no look at the source finds.
LOOPS = [
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% for x in c %}{{ x['text'] }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for x in m.get('content') %}{{ x.text }}{% endfor %}"
    "{% endfor %}",
    "{% for m in messages %}{{ m['content'] | map(attribute='text') | join }}"
    "{% endfor %}",
    "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
]


@pytest.mark.parametrize("source", LOOPS)
@pytest.mark.parametrize("text", ["Hi", "x", " a red star? ", "'q' \"q\" \n \\ é"])
def test_no_template_loses_the_users_text(source, text):
    assert render_chat([user(text)], source) == text


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{% for m in messages %}{{ m.content | trim | upper }};{% endfor %}", "A B;"),
        (
            "{% for m in messages %}{{ m | tojson(ensure_ascii=True) }}{% endfor %}",
            None,
        ),
        (
            "{% for m in messages %}{{ m.content.split() | join('_') }}{% endfor %}",
            "a_b",
        ),
        (
            "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}"
            "{% endfor %}",
            "a b",
        ),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
            "{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}",
            "a b",
        ),
    ],
)
def test_a_template_may_change_the_text_it_holds(source, expected):
    text = render_chat([user("a b")], source)
    assert text == (expected or '{"role": "user", "content": "a b"}')


@pytest.mark.parametrize(
    "source, messages, role",
    [
        ("{{ 'a user' }}", [user("user")], "user"),  # the word is there, not the text
        ("{{ messages[-1].content }}", [user("Hi"), answer("Yo"), user("Bye")], "user"),
        ("{{ messages[1].content }}", [system("S"), user("Hi")], "system"),
        (
            "{% for m in messages %}{% for x in m.content %}{{ x.txt }}{% endfor %}"
            "{% endfor %}",
            [user("Hi")],
            "user",
        ),
        (
            "{% for m in messages %}{% for x in m.content if x.type == 'image' %}"
            "<image>{% endfor %}{% endfor %}",
            [user("<image> What?")],
            "user",
        ),
        # Given parts it would print Python's spelling of a list.
        (
            "{% if messages[0].content is not string %}{{ messages }}{% endif %}",
            [user("Hi")],
            "user",
        ),
    ],
)
def test_a_template_that_drops_text_is_refused(source, messages, role):
    with pytest.raises(PromptError, match=f"drops the text of the {role}. Name a b"):
        render_chat(messages, source)


def test_what_has_no_text_cannot_be_dropped():
    source = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
    talk = [system(" "), user("<image>"), answer("</think>")]
    assert render_chat(talk, source) == "|<image>|</think>|"
    assert render_chat(talk[1:], "{{ 7 }}") == "7"


def test_dates():
    text = render_chat("x", "{{ strftime_now('%Y') }}{{ messages[0].content }}")
    assert len(text) == 5 and text[:4].isdigit()


def test_variables_may_have_any_name():
    source = "{{ tools }} {{ source }} {{ messages[0].content }}"
    assert render_chat("x", source, tools="t", source="s") == "t s x"


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must altern"),
        ("{{ messages[9].content.x }}", "fails on this conversation"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "fails on this conversation",
        ),
        ("{{ messages.append(1) }}", "fails on this conversation"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on this conversation"),
    ],
)
def test_hostile_jinja(source, message):
    with pytest.raises(PromptError, match=message) as caught:
        render_chat("x", source)
    assert "\n" not in str(caught.value)


def test_jinja_is_named_when_it_is_missing(monkeypatch):
    import sys

    from mm1_mlx.inputs import jinja

    jinja._compile.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PromptError, match="pip install jinja2"):
        render_chat("x", "{{ messages }}")


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from mm1_mlx.inputs import prompts; "
        "prompts.render_chat('Hi', prompts.jinja_source('mm1-tiny')); "
        "print([m for m in ('PIL', 'mlx', 'numpy', 'jinja2', 'tokenizers', "
        "'sentencepiece') if m in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
