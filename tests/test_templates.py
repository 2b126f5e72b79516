"""Jinja templates of checkpoints: as transformers renders them, and hostile ones."""

import pytest
from talk_kit import answer, system, user

from helpers import need
from mm1_mlx.errors import MM1Warning, PromptError
from mm1_mlx.inputs.jinja import _wants_parts
from mm1_mlx.inputs.prompts import render_chat

TALK = [user("Hi"), answer("Yo"), user("Bye")]


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
