"""Files that are dropped into a chat: which pictures, and where in a question."""

import re
import shutil

import pytest
from PIL import Image

from helpers import ROOT
from mm1_mlx.cli import chat_paths
from mm1_mlx.inference import conversation, generation

SHAPES = ROOT / "examples" / "shapes.png"
STAR, CIRCLE = "What colour is the star?", "What colour is the circle?"


SHOT = "Shot 9.41\u202fAM.png"  # a space that macOS puts into names


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Pictures with names that terminals quote."""
    for name in (
        *("a.png", "cat.png", "my cat.png", "it's (1).png", "no_suffix", SHOT),
    ):
        Image.new("RGB", (9, 9)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


A, CAT, ITS = "{}/a.png", "{}/my cat.png", "{}/it's (1).png"
DROPPED = [  # {} is the folder
    ("{}/a.png ", [A], ""),
    ("{}/my\\ cat.png ", [CAT], ""),
    ("'{}/my cat.png'", [CAT], ""),
    ('"{}/my cat.png" ', [CAT], ""),
    ("{}/my cat.png", [CAT], ""),
    ("{}/it\\'s\\ \\(1\\).png", [ITS], ""),
    ("'{}/it'\\''s (1).png'", [ITS], ""),  # as Linux terminals quote it
    ("{}/Shot\\ 9.41\u202fAM.png What?", ["{}/" + SHOT], "What?"),
    ("file://{}/my%20cat.png", [CAT], ""),
    ("{}/no_suffix", ["{}/no_suffix"], ""),
    ("a.png", ["a.png"], ""),
    ("{}/absent.png", ["{}/absent.png"], ""),  # an error about it, not a question
    ("{}/a.png '{}/my cat.png' ", [A, CAT], ""),
    ("{}/a.png What is this?", [A], "What is this?"),
    ("{}/my cat.png What is this?", [CAT], "What is this?"),
    ("What's this? {}/my\\ cat.png ", [CAT], "What's this?"),
    ("It's Bob's: '{}/my cat.png'", [CAT], "It's Bob's:"),
    ("a.png Same? 'my cat.png' a.png", ["a.png", "my cat.png", "a.png"], "Same?"),
    ("What is a.png here?", ["a.png"], "What is <image> here?"),
    ("Compare a.png and cat.png", ["a.png", "cat.png"], "Compare <image> and <image>"),
    (
        "Is (a.png) my cat.png, or?",
        ["a.png", "my cat.png"],
        "Is (<image>) <image>, or?",
    ),
    ("Is absent.png or notes.txt red?", [], "Is absent.png or notes.txt red?"),
    ("Is {}/old/my cat.png red?", [], "Is {}/old/my cat.png red?"),
    ("What is in {}/a.png ?", [A], "What is in <image> ?"),
    ("What is in {}/a.png?", [A], "What is in <image>?"),
    ("What is in {}/my cat.png, and why?", [CAT], "What is in <image>, and why?"),
    ("Is {}/my\\ cat.png red?", [CAT], "Is <image> red?"),
    ("Is '{}/my cat.png' red and/or big?", [CAT], "Is <image> red and/or big?"),
    ('Is "{}/my cat.png" red?', [CAT], "Is <image> red?"),
    ("Isn't (file://{}/my%20cat.png) it?", [CAT], "Isn't (<image>) it?"),
    ("Is '{}/it'\\''s (1).png' Bob's?", [ITS], "Is <image> Bob's?"),
    ("Is {}/it\\'s\\ \\(1\\).png Bob's?", [ITS], "Is <image> Bob's?"),
    ("{}/a.png, {}/a.png: same?", [A, A], "<image>, <image>: same?"),
    (
        "{}/a.png Is {}/my cat.png, or a.png",
        [A, CAT, "a.png"],
        "<image> Is <image>, or <image>",
    ),
    ("Look at\n{}/a.png\nIs it red?", [A], "Look at\n<image>\nIs it red?"),
    ("{}/a.png\nIs it red?", [A], "Is it red?"),
    ("Look at my cat.png", ["my cat.png"], "Look at"),  # and not at cat.png
    ("Is {}/old/my cat.png", [], "Is {}/old/my cat.png"),  # nor at another cat.png
    ("Is {}/old/my\\ cat.png", [], "Is {}/old/my\\ cat.png"),
    ("Is it {}/absent.png, or?", [], "Is it {}/absent.png, or?"),
    ("<image> Is {}/a.png red?", [], "<image> Is {}/a.png red?"),
    ("Is {}/notes.txt red?", [], "Is {}/notes.txt red?"),
    (
        "Is it red and/or 1/2 of ./a, ~ or / ?",
        [],
        "Is it red and/or 1/2 of ./a, ~ or / ?",
    ),
    ("Is it /absent.png", [], "Is it /absent.png"),
    ("Yes / no: a.png", ["a.png"], "Yes / no:"),
    ("1 /2 of what? a.png", ["a.png"], "1 /2 of what?"),
    ("Is {}/absent.png like a.png", ["a.png"], "Is {}/absent.png like"),
    ("notes.txt", [], "notes.txt"),
    ("What is this?", [], "What is this?"),
    ("What \t is\nthis?", [], "What \t is\nthis?"),
    ("", [], ""),
    ("'", [], "'"),
    ("\\", [], "\\"),
    ("\0.png", [], "\0.png"),
    ("~nobody/a.png", ["~nobody/a.png"], ""),
    ("x " * 9999, [], ("x " * 9999).strip()),
]


@pytest.mark.parametrize("line, paths, rest", DROPPED, ids=[d[0][:40] for d in DROPPED])
def test_pictures_in_a_line(line, paths, rest, pictures):
    def filled(text: str) -> str:
        return text.replace("{}", str(pictures))

    found = chat_paths.split_paths(filled(line))
    assert found == ([filled(path) for path in paths], filled(rest))


def test_a_broken_picture_takes_no_other_along(chat, pictures):
    """The question is not asked, so its other pictures wait for no other one."""
    (pictures / "broken.png").write_bytes(b"x")
    done = chat(f"Is {pictures}/a.png like {pictures}/broken.png ?", "/image")
    assert "broken.png is not an image" in done.stderr
    assert "no pictures: /image PATH" in done.stderr and done.returncode == 1


def test_the_paths_of_a_command(pictures):
    assert chat_paths.paths_in("my cat.png") == ["my cat.png"]
    assert chat_paths.paths_in("a.png 'my cat.png' no.png") == [
        "a.png",
        "my cat.png",
        "no.png",
    ]
    assert chat_paths.paths_in("isn't.png x.png") == ["isn't.png", "x.png"]


NO_PICTURE = [
    ("{}/b.png what is this?", "{}/b.png"),
    ("./b.png What colour is it?", "./b.png"),
    ("'{}/my dog.png' what?", "'{}/my dog.png'"),
    ("{}/my\\ dog.png, what?", "{}/my\\ dog.png"),
    ("{}/my dog.png", "{}/my dog.png"),
    ("file://{}/b.png what?", "file://{}/b.png"),
    ("/b.png what?", "/b.png"),
    ("{}", "{}"),
    ("{} what is in it?", "{}"),
    ("'{}'", "'{}'"),
    ("./ is this folder", None),
    ("'{}' is what?", None),  # may be meant as text
    ("{}/a.png what is this?", None),
    ("/imge b.png", None),
    ("/", None),
    ("~", None),
    ("What is b.png?", None),
    ("What is {}/b.png?", "{}/b.png"),
    ("Is {}/a.png like {}/b.png, or not?", "{}/b.png"),
    ("Is {}/old/my cat.png red?", "{}/old/my cat.png"),
    ("Is '{}/my dog.png' red?", "'{}/my dog.png'"),
    ("Is {}/my\\ dog.png red?", "{}/my\\ dog.png"),
    ("Is it in file://{}/b.png", "file://{}/b.png"),
    ("b.png", "b.png"),
    ("b.png a.png", "b.png"),
    ("a.png", None),
    ("Is it red and/or 1/2 of ./a, ~ or / ?", None),
    ("Is {}/notes.txt red, or {} ?", None),
    ("", None),
]


@pytest.mark.parametrize("line, path", NO_PICTURE, ids=[n[0] for n in NO_PICTURE])
def test_a_line_that_begins_with_what_is_no_picture(line, path, pictures):
    found = chat_paths.no_picture(line.replace("{}", str(pictures)))
    assert found == (path and path.replace("{}", str(pictures)))


def test_a_missing_picture_is_told_and_nothing_asked(chat, pictures):
    lines = (f"{pictures}/aa.png What?", "./aa.png like a.png", f"{pictures} ", "/imge")
    done = chat(*lines)
    assert (done.returncode, done.stdout) == (1, "")
    told = done.stderr.splitlines()
    missing = re.escape(f"error: No image file {pictures}/aa.png. Did you mean a.png?")
    assert re.fullmatch(missing, told[0])
    assert told[1] == "error: No image file aa.png. Did you mean a.png?"
    assert "is a folder, but an image file was expected" in told[2]
    assert "unknown command '/imge'; did you mean '/image'?" in told[3]
    inside = (
        f"Is a.png like {pictures}/aa.png ?",
        "a.png aa.png",
        "/image a.png aa.png",
    )
    done = chat(*inside, "/image")
    assert (done.returncode, done.stdout) == (1, "")
    *told, last = done.stderr.splitlines()
    assert [line.startswith("error: No image file ") for line in told].count(True) == 3
    assert last == "no pictures: /image PATH shows one"  # the others wait for nothing


def test_marks_around_a_path_are_no_question(chat, pictures):
    done = chat("a.png.", f"({pictures}/cat.png)", "/image")
    assert (done.returncode, done.stdout) == (0, "")
    assert "/a.png (for the next question)" in done.stderr
    assert "/cat.png (for the next question)" in done.stderr


def test_dropped_pictures_are_shown(chat, pictures):
    place = pictures / "a b.png"
    shutil.copy(SHAPES, place)
    done = chat(f"{str(place).replace(' ', chr(92) + ' ')} ", STAR)
    assert (done.returncode, done.stdout) == (0, "yellow\n"), done.stderr
    done = chat(f"{STAR} '{place}' ", "/image", str(pictures / "absent" / "x.png"))
    assert done.stdout == "yellow\n"
    assert f"1. {place}\n" in done.stderr and "No image file" in done.stderr


def test_a_path_within_a_question_is_the_picture_there(chat, pictures, monkeypatch):
    """Behind those that wait."""
    place, asked = pictures / "a b.png", []
    shutil.copy(SHAPES, place)

    def stream(model, processor, prompt, images, **settings):
        asked.append((prompt[-1]["content"], len(images)))
        return generation.stream_generate(model, processor, prompt, images, **settings)

    monkeypatch.setattr(conversation, "stream_generate", stream)
    short = {"flags": ("-m", "1")}
    assert chat(f"Is {place} red ?", **short).returncode == 0
    assert chat("/image a.png", f"Is '{place}' red?", **short).returncode == 0
    assert chat("Is it red and/or 1/2 blue ?", **short).returncode == 0
    assert asked == [
        ("Is <image> red ?", 1),
        ("<image>Is <image> red?", 2),
        ("Is it red and/or 1/2 blue ?", 0),
    ]
