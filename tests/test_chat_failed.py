"""Questions of a chat that fail: what stays, and what /retry asks."""

import json
import re
from dataclasses import replace

import pytest

from helpers import ROOT
from mm1_mlx.errors import PromptError
from mm1_mlx.inference import conversation, generation
from mm1_mlx.inputs import urls

SHAPES = ROOT / "examples" / "shapes.png"
STAR, CIRCLE = "What colour is the star?", "What colour is the circle?"
TWO = "What colour is the star in <image>?"


@pytest.fixture
def breaks(monkeypatch):
    """Have the first answer to a question fail after a piece of this text."""

    def make(question: str, text: str) -> list[int]:
        asked: list[int] = []  # pictures of each such question

        def stream(model, processor, prompt, images, **settings):
            real = generation.stream_generate(
                model, processor, prompt, images, **settings
            )
            failing = question in prompt[-1]["content"] and not asked
            if question in prompt[-1]["content"]:
                asked.append(len(images))
            for piece in real:
                if failing:
                    yield replace(piece, text=text, finish_reason=None)
                    raise PromptError("the power is gone.")
                yield piece

        monkeypatch.setattr(conversation, "stream_generate", stream)
        return asked

    return make


def turns(place) -> list:
    return [m["content"] for m in json.loads(place.read_text())["messages"]]


def test_retry_keeps_the_answer_where_asking_again_fails(chat, tmp_path):
    """A picture that waits for the next question is none of the one before."""
    save, more = tmp_path / "talk.json", f"/image {SHAPES}"
    first = (f"/image {SHAPES}", TWO, more)
    done = chat(*first, "/retry", f"/save {save}", "/image")
    assert (done.returncode, done.stdout) == (0, "yellow\nyellow\n"), done.stderr
    assert len(turns(save)) == 2
    assert f"2. {SHAPES} (for the next question)" in done.stderr


def test_retry_that_fails_puts_the_turn_back(chat, breaks, tmp_path):
    save = tmp_path / "talk.json"
    lines = (f"/image {SHAPES}", CIRCLE, STAR)
    asked = breaks(STAR, "")
    done = chat(*lines, "/retry", f"/save {save}")
    assert done.stdout.split() == ["red", "yellow"]
    assert asked == [1, 1] and len(turns(save)) == 4


def test_a_turn_that_was_answered_outlives_a_failed_retry(chat, monkeypatch, tmp_path):
    count = []

    def stream(*args, **settings):
        count.append(0)
        if len(count) == 2:
            raise PromptError("the power is gone.")
        return generation.stream_generate(*args, **settings)

    monkeypatch.setattr(conversation, "stream_generate", stream)
    save = tmp_path / "talk.json"
    done = chat(f"{SHAPES} {STAR}", "/retry", f"/save {save}", "/retry", "/image")
    assert done.stdout == "yellow\nyellow\n" and len(turns(save)) == 2
    assert done.stderr.splitlines()[-1] == f"1. {SHAPES}"


@pytest.mark.parametrize("text", ["", "half"])
def test_what_failed_after_its_first_piece_is_asked_again_only_if_it_is_not_kept(
    text, chat, breaks, tmp_path
):
    """A first piece may be no text yet; what is kept is not left open."""
    asked = breaks(STAR, text)
    save = tmp_path / "talk.json"
    done = chat(f"{SHAPES} {STAR}", f"/save {save}", "/retry", f"/save {save}")
    assert "the power is gone" in done.stderr and asked == [1, 1]
    assert ("no turn yet" in done.stderr) == (not text)
    assert len(turns(save)) == 2


def test_the_pictures_of_a_failed_line_go_with_it(chat):
    """The corrected line names them again; /retry brings them back."""
    wrong = f"{SHAPES} Is <image> as <image>?"
    done = chat(wrong, "/image", f"{SHAPES} {TWO}", "/image")
    assert done.stdout == "yellow\n"
    error, none, one = done.stderr.splitlines()
    assert "2 <image>" in error and none.startswith("no pictures")
    assert one == f"1. {SHAPES}"


def test_retry_asks_with_the_pictures_of_the_failed_line(chat, breaks):
    asked = breaks(STAR, "")
    done = chat(f"/image {SHAPES}", f"{SHAPES} {STAR}", "/image", "/retry")
    assert asked == [2, 2]
    assert re.findall(r"^\d\. .*", done.stderr, re.MULTILINE) == [
        f"1. {SHAPES} (for the next question)"
    ]


@pytest.mark.parametrize("line", ["{}", "{} {}", "{}?size=2"])
def test_a_line_of_addresses_is_no_question(line, chat, monkeypatch):
    url = "https://example.com/a.png"
    monkeypatch.setattr(urls, "fetch", lambda *a, **k: SHAPES.read_bytes())
    line = line.format(url, url)
    done = chat(line, "/image", flags=("--allow-url",))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("(for the next question)") == len(line.split())
    done = chat(line, "/image")
    assert done.returncode == 1 and "--allow-url" in done.stderr
    assert done.stderr.endswith("no pictures: /image PATH shows one\n")


@pytest.mark.parametrize("name", ["/", ".", "..", "sub/.."])
def test_save_needs_a_name(name, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = chat(STAR, f"/save {name}")
    expected = f"/save needs the name of a file, such as chat.json, not '{name}'"
    assert expected in done.stderr
    assert not list(tmp_path.iterdir())
