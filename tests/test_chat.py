"""The chat as users type it: through pipes, and in a terminal (a pseudo terminal)."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from helpers import ROOT, assert_fails, clean_environment, need_tiny, run_cli, run_here
from mm1_mlx.cli import chat_session
from mm1_mlx.inference import conversation, generation
from mm1_mlx.inputs.boxes import Region

SHAPES = ROOT / "examples" / "shapes.png"
STAR, CIRCLE = "What colour is the star?", "What colour is the circle?"


# --- through a pipe ---


def test_each_line_is_a_turn_and_only_answers_are_printed():
    need_tiny()
    lines = f"/image {SHAPES}\n{STAR}\n\n{CIRCLE}\n"
    done = run_cli("mm1_mlx.chat", input=lines)
    assert (done.returncode, done.stdout, done.stderr) == (0, "yellow\nred\n", "")


def test_statistics_tell_what_was_used_again(chat):
    done = chat(f"/image {SHAPES}", STAR, "/stats on", CIRCLE, "/stats off", STAR)
    assert done.stdout == "yellow\nred\nyellow\n"
    (reused,) = re.findall(r"^Reused: (\d+) of \d+ prompt", done.stderr, re.MULTILINE)
    assert int(reused) > 64  # the picture
    assert re.search(r"^Context: \d+ of \d+ tokens$", done.stderr, re.MULTILINE)
    assert done.stderr.count("Peak memory") == 1
    assert chat(STAR, "/stats").stderr.count("Peak memory") == 1
    flag = chat(f"/image {SHAPES}", STAR, CIRCLE, flags=("--stats",))
    assert flag.stderr.count("Peak memory") == 2


def test_what_fails_is_one_line_and_the_chat_goes_on(chat):
    done = chat(
        f"/image {SHAPES}", "/image absent.png", "/imge x", "/stats maybe",
        "/load x.json", "/save", "/undo", "/retry", "/drop none", "/draw x.png", "/",
        STAR,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "yellow\n")
    errors = done.stderr.splitlines()
    patterns = [
        r"No image file absent\.png",
        r"unknown command '/imge'; did you mean '/image'\?",
        r"/stats takes on or off, not 'maybe'",
        r"x\.json cannot be read: No such file",
        r"/save needs the name of a file",
        r"There is no question to take back",
        r"There is no question to ask again",
        r"/drop takes how many turns, not 'none'",
        r"/draw FILE goes with an answer that has boxes",
        r"unknown command '/'",
    ]
    assert len(errors) == len(patterns)
    for line, pattern in zip(errors, patterns, strict=True):
        assert line.startswith("error: ") and re.search(pattern, line), line


def test_a_conversation_is_saved_and_loaded(chat, tmp_path):
    place = tmp_path / "talk.json"
    save = (f"/save {tmp_path / 'talk'}", f"/save {tmp_path / 'talk.md'}")
    assert chat(f"/image {SHAPES}", STAR, *save).returncode == 0
    values = json.loads(place.read_text())
    assert values["model"] == "mm1-tiny" and len(values["messages"]) == 2
    markdown = (tmp_path / "talk.md").read_text()
    assert f"![]({SHAPES})\n\n{STAR}\n\n**Assistant:**\n\nyellow" in markdown
    loaded = chat(f"/load {place}", CIRCLE, "/image", f"/save {place}")
    assert (loaded.returncode, loaded.stdout) == (0, "red\n")
    assert f"1. {SHAPES}\n" in loaded.stderr
    assert len(json.loads(place.read_text())["messages"]) == 4
    again = chat("/undo", CIRCLE, f"/save {place}", flags=("--load", place))
    assert (again.returncode, again.stdout) == (0, "red\n"), again.stderr
    other = chat(STAR, f"/save {place}")
    assert "talk.json is there already: give another name" in other.stderr
    assert len(json.loads(place.read_text())["messages"]) == 4
    assert "There is no turn yet to save" in chat(f"/save {place}").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talk.json", "talk.md"]


def test_a_chat_goes_on_with_what_generate_reads(chat, tmp_path):
    """JSON Lines, pictures beside the messages, paths from the file's folder; and a
    name in quotes."""
    Image.open(SHAPES).save(tmp_path / "a.png")
    part = {"type": "image", "image": "a.png"}
    said = {"role": "assistant", "content": "yellow"}
    first = {"role": "user", "content": [part, {"type": "text", "text": STAR}]}
    lines = "\n".join(map(json.dumps, (first, said)))
    (tmp_path / "my talk.jsonl").write_text(lines)
    flat = {"messages": [first | {"content": STAR}, said], "images": ["a.png"]}
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    for name in ("my talk.jsonl", "flat.json"):
        save = f"/save '{tmp_path}/saved {name}'"
        done = chat(f'/load "{tmp_path / name}"', "/image", save)
        assert (done.returncode, done.stderr) == (0, f"1. {tmp_path / 'a.png'}\n")
        saved = json.loads((tmp_path / f"saved {name}").read_text())["messages"]
        named = {"type": "image", "image": str(tmp_path / "a.png")}
        assert saved[0]["content"] == [named, {"type": "text", "text": STAR}]


def test_a_conversation_with_a_video_is_saved_again(chat, tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / "film").mkdir(exist_ok=True)
        shutil.copy(SHAPES, tmp_path / "film" / name)
    content = [{"type": "video", "video": "film"}, {"type": "text", "text": STAR}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    place = tmp_path / "talk.json"
    place.write_text(json.dumps(said))
    done = chat(f"/save {place}", flags=("--load", place))
    assert (done.returncode, done.stderr) == (0, "")
    film = {"type": "video", "video": str(tmp_path / "film"), "frames": 24}
    assert json.loads(place.read_text())["messages"][0]["content"] == [film, content[1]]


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("{", r"x\.json: not JSON"),
        ("{}", r"x\.json, message 1: A message is '\{\}', but must be"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            r"Message 1 .* 'user",
        ),
    ],
)
def test_a_file_that_is_no_conversation(text, pattern, tmp_path):
    need_tiny()
    (tmp_path / "x.json").write_text(text)
    flags = ("--load", tmp_path / "x.json")
    assert_fails(run_here("chat", *flags, input=f"{STAR}\n"), pattern)


def test_turns_are_taken_back_asked_again_and_forgotten(chat):
    done = chat(f"/image {SHAPES}", STAR, "/undo", "/image", CIRCLE, "/retry")
    assert done.stdout == "yellow\nred\nred\n"
    assert f"1. {SHAPES} (for the next question)" in done.stderr
    done = chat(f"/image {SHAPES}", STAR, "/clear", "/image", "/undo")
    assert "no pictures: /image PATH" in done.stderr
    assert "no question to take back" in done.stderr


def test_an_input_of_several_lines(chat):
    done = chat(
        f"/image {SHAPES}", '"""What colour', 'is the star?"""', "What colour\\",
        "is the circle?", STAR, "/save /", '"""', STAR,
    )  # fmt: skip
    assert done.stdout.count("\n") == 4  # the last one is open at the end
    assert done.stdout.splitlines()[2:] == ["yellow", "yellow"]


def test_a_full_context_says_what_to_do_and_goes_on_when_asked(chat, tmp_path):
    """In a model whose context holds two turns."""
    shutil.copytree(need_tiny(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 130
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    picture = f"/image {SHAPES}"
    done = chat(
        picture, STAR, picture, STAR, "/drop", "/retry",
        flags=("--model", tmp_path / "model", "-m", "5"),
    )  # fmt: skip
    assert done.stdout == "yellow\nyellow\n"
    (error,) = done.stderr.splitlines()
    assert re.search(r"^error: The prompt .* \d+ .* context .*130", error)
    assert error.endswith(
        "/clear starts anew, /drop forgets the oldest turn, then /retry asks again."
    )


def test_more_pictures_than_the_context_holds_can_be_taken_back(chat):
    pictures = " ".join([str(SHAPES)] * 80)
    done = chat(f"/image {pictures}", STAR, "/image -", f"/image {SHAPES}", STAR)
    assert done.stdout == "yellow\n"
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: The prompt is too long: ")
    assert error.endswith(
        " or give fewer images. /image - takes the waiting pictures back."
    )


def test_lines_that_are_not_text():
    need_tiny()
    done = subprocess.run(
        [sys.executable, "-m", "mm1_mlx.chat", "--image", str(SHAPES)],
        input=b"what \xff?\nWhat colour is the star?\n",
        capture_output=True,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout) == (1, b"yellow\n")
    assert done.stderr == b"error: A line on stdin is not UTF-8 text (byte 5).\n"


def test_boxes_of_an_answer_are_drawn(chat, monkeypatch, tmp_path):
    found = [Region(place=(0.1, 0.1, 0.5, 0.5), label="a thing")]
    monkeypatch.setattr(chat_session, "regions_of", lambda *given: found)
    out = tmp_path / "out.png"
    done = chat(
        f"/image {SHAPES}", STAR, f"/draw '{out}'", f"/draw {SHAPES}", "/draw",
        f"/draw {out}", "/draw x.bmp",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "yellow\n")
    told = done.stderr.splitlines()
    assert told[0] == f"drawn: 1 on {out}"
    assert "is there already: give another" in told[1] and "/draw FILE" in told[2]
    assert told[3] == told[0]  # over its own
    assert told[4].startswith("error: /draw x.bmp must end with .png")
    assert Image.open(out).size == Image.open(SHAPES).size
    lines = (f"/image {SHAPES}", STAR, f"/draw {out}", f"/draw {tmp_path / 'b.png'}")
    quiet = chat(*lines, flags=("--quiet",))
    assert quiet.stderr == f"error: {out} is there already: give another name\n"
    assert (tmp_path / "b.png").exists()


@pytest.fixture
def says(monkeypatch):
    """Have the model answer with a given text, as if it had seen all pictures."""

    def make(text: str) -> None:
        def stream(model, processor, prompt, images, **settings):
            real = generation.stream_generate(
                model, processor, prompt, images, **settings | {"max_tokens": 1}
            )
            for piece in real:
                yield replace(piece, text=text, finish_reason="stop")

        monkeypatch.setattr(conversation, "stream_generate", stream)

    return make


def test_boxes_are_drawn_on_the_pictures_that_the_answer_was_given_for(
    chat, says, tmp_path
):
    """Not on those that are left after /drop; and of a conversation that was loaded."""
    says("In image 1 a star <10,10,50,50>, in image 2 a circle <10,10,90,90>")
    small = tmp_path / "small.png"
    Image.new("RGB", (50, 40)).save(small)
    out, save = tmp_path / "out.png", tmp_path / "talk.json"
    asked = (f"/image {SHAPES}", STAR, f"/image {small}", STAR)
    done = chat(*asked, f"/save {save}", "/drop", f"/draw {out}")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr
    drawn = [tmp_path / "out-1.png", tmp_path / "out-2.png"]
    found = re.findall(r"^drawn: 1 on (\S+)", done.stderr, re.MULTILINE)
    assert found == [str(place) for place in drawn]
    sizes = [Image.open(place).size for place in drawn]
    assert sizes == [Image.open(SHAPES).size, (50, 40)]
    for place in drawn:
        place.unlink()
    done = chat(f"/load {save}", "/drop", f"/draw {out}", "/undo", f"/draw {out}")
    assert done.stderr.startswith(f"drawn: 1 on {drawn[0]}")
    assert "/draw FILE goes with an answer" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("redirection, code", [("<&-", 1), ("< /dev/null", 0)])
def test_a_chat_without_input(redirection, code):
    need_tiny()
    done = subprocess.run(
        f"{sys.executable} -m mm1_mlx.chat {redirection}",
        shell=True,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (code, "")
    if code:
        assert_fails(done, "read from stdin, but stdin is closed")


def test_a_reader_that_leaves_ends_it_quietly():
    need_tiny()
    process = subprocess.Popen(
        [sys.executable, "-m", "mm1_mlx.chat", "--image", str(SHAPES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        text=True,
        bufsize=1,
    )
    process.stdin.write(f"{STAR}\n")
    assert process.stdout.readline() == "yellow\n"
    process.stdout.close()
    process.stdin.write(f"{STAR}\n")
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_ctrl_c_before_the_first_token_and_twice_ends_at_once():
    """And in between it waits for the token that comes."""
    before = signal.getsignal(signal.SIGINT)
    with chat_session._stoppable(True) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.may_wait = True
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


WRONG_START = [
    (("--image", "absent.png"), r"No image file absent\.png", 1),
    (("--load", "absent.json"), r"absent\.json cannot be read: No such", 1),
    (("--system", "Be brief."), r"no place for a system message", 1),
    (("--model", "mm1-tinny"), r"mm1-tinny.*mm1-tiny", 1),
    (("--prompt", "x"), r"unknown flag '--prompt'", 2),
    (("--max-tokens", "0"), r"whole number of 1 or more", 2),
    (("--prefix-cache-size", "1"), r"goes with --prefix-cache FOLDER", 2),
]


@pytest.mark.parametrize(
    "flags, pattern, code", WRONG_START, ids=[" ".join(f) for f, _, _ in WRONG_START]
)
def test_wrong_flags_end_it_in_one_line(flags, pattern, code):
    need_tiny()
    done = run_here("chat", *flags, input=f"{STAR}\n")
    assert_fails(done, pattern, code=code)
    assert not done.stdout and done.stderr.count("\n") == 1


def test_flags_of_generate_hold_for_every_turn(chat):
    shorter = chat(f"/image {SHAPES}", "Describe the picture.", flags=("-m", "2"))
    assert 0 < len(shorter.stdout) < 20
    flags = ("--kv-bits", "8", "--lookup", "2", "--stats")
    done = chat(f"/image {SHAPES}", STAR, CIRCLE, flags=flags)
    assert done.stdout == "yellow\nred\n" and done.stderr.count("Draft: ") == 2
