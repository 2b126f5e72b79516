"""What `generate` asks: interleaved pictures, conversations and shots, from flags."""

import json
import re
from importlib import import_module
from types import SimpleNamespace

import pytest
from PIL import Image

from helpers import ROOT, assert_fails, need_tiny, run_cli
from mm1_mlx.cli.asking import read_asked
from mm1_mlx.errors import ImageError, PromptError
from mm1_mlx.inputs.conversation import read_conversation

SHAPES = ROOT / "examples" / "shapes.png"
STAR = "What colour is the star?"


@pytest.fixture
def generate(capsys):
    """The command in this process: a new one takes a second each time."""
    need_tiny()
    door = import_module("mm1_mlx.generate")

    def run(*args):
        capsys.readouterr()
        try:
            code = door.main([*map(str, args), "--json", "--quiet"])
        except SystemExit as exit:  # argparse
            code = exit.code
        out, error = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=error)

    return run


@pytest.fixture
def answer(generate):
    """Its answer, as --json has it."""

    def run(*args) -> dict:
        done = generate(*args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures 1, 2, 10 in three colours, and files of shots."""
    place = tmp_path_factory.mktemp("asking")
    for number, colour in zip((1, 2, 10), COLOURS.values(), strict=True):
        Image.new("RGB", (40, 40), colour).save(place / f"p{number}.png")
    lines = [
        {"image": f"p{number}.png", "answer": name}
        for number, name in zip((1, 2, 10), COLOURS, strict=True)
    ]

    def write(name: str, *values: dict) -> None:
        text = "\n".join(json.dumps(value) for value in values)
        (place / name).write_text(text)

    write("bare.jsonl", *lines)
    asked = [line | {"prompt": "What colour is it?"} for line in lines]
    write("asked.jsonl", *asked)
    write("reasoned.jsonl", *(line | {"reasoning": "I look."} for line in asked))
    write("broken.jsonl", lines[0], lines[1] | {"image": "p3.png"})
    return place


# --- pictures ------------------------------------------------------------------------


def test_pictures_stand_where_the_prompt_has_them(folder, answer):
    """In the order of the flags, whatever the form."""
    pictures = [folder / "p1.png", folder / "p2.png"]
    ask = ("-p", "Is <image> like <image>?", "-m", "4")
    one = answer("--image", *pictures, *ask)
    assert one["num_images"] == 2
    assert (
        answer("--image", pictures[0], "--image", pictures[1], *ask)["text"]
        == (one["text"])
    )
    talk = [{"role": "user", "content": "Is <image> like <image>?"}]
    content = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": "p1.png"},
        {"type": "text", "text": " like "},
        {"type": "image", "image": "p2.png"},
        {"type": "text", "text": "?"},
    ]
    (folder / "talk.json").write_text(json.dumps([talk[0] | {"content": content}]))
    same = answer("--messages", folder / "talk.json", "-m", "4")
    assert same["token_ids"] == one["token_ids"]
    assert same["prompt_tokens"] == one["prompt_tokens"]


def test_a_pattern_is_every_file_that_fits_in_the_order_of_people(
    folder, answer, generate
):
    ask = ("-p", "What are they?", "-m", "4")
    pattern = answer("--image", f"{folder}/p*.png", *ask)
    names = [folder / f"p{n}.png" for n in (1, 2, 10)]
    assert pattern["num_images"] == 3
    assert pattern["token_ids"] == answer("--image", *names, *ask)["token_ids"]
    message = r"No file fits the pattern .*x\*\.png\. Check the folder"
    assert_fails(generate("--image", f"{folder}/x*.png", *ask), message)


def test_the_order_of_pictures(folder):
    """Of the flags, and within a pattern as people count."""
    parser = import_module("mm1_mlx.generate").parser()
    flags = ["--image", str(SHAPES), f"{folder}/p*.png", "--image", "last.png"]
    args = parser.parse_args(["-p", "Hi", *flags])
    names = [str(folder / f"p{n}.png") for n in (1, 2, 10)]
    assert read_asked(args) == ("Hi", [str(SHAPES), *names, "last.png"])


def test_a_file_whose_name_looks_like_a_pattern(tmp_path, answer):
    path = tmp_path / "a[1].png"
    Image.new("RGB", (40, 40)).save(path)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "a1.png")
    ask = ("-p", "What is it?", "-m", "4")
    found = answer("--image", path, *ask)
    assert found["num_images"] == 1
    quoted = answer("--image", f"'{path}'", *ask)
    assert quoted["token_ids"] == found["token_ids"]


@pytest.mark.parametrize(
    "prompt, count, message",
    [
        ("<image> <image>", 1, r"has 2 <image> but only 1 image was given\. Giv"),
        ("<image>", 2, r"has 1 <image> but 2 images were given\. Write <image> once"),
        ("<image>", 0, r"has 1 <image> but no image was given"),
    ],
)  # fmt: skip
def test_other_counts_have_one_line(folder, prompt, count, message, generate):
    pictures = ("--image", *[SHAPES] * count) if count else ()
    assert_fails(generate("-p", prompt, *pictures), message)


# --- conversations -------------------------------------------------------------------

TALK = [
    {"role": "user", "content": [{"type": "image", "image": "p1.png"}, "text"]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "And now?"},
]
TALK[0]["content"][1] = {"type": "text", "text": "What colour?"}


def write(folder, name, text):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_forms_of_a_conversation(tmp_path):
    flat = [
        {"role": "user", "content": "<image>What colour?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And now?"},
    ]
    picture = str(write(tmp_path, "p1.png", ""))
    for form in (
        write(tmp_path, "a.json", TALK),
        write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, TALK)) + "\n\n"),
        write(tmp_path, "c.json", json.dumps({"messages": TALK}, indent=1)),
        write(tmp_path, "d.json", {"messages": flat, "images": ["p1.png"]}),
        write(tmp_path, "h.json", {"messages": flat, "image": "p1.png"}),
    ):
        assert read_conversation(form) == (flat, [picture]), form
    odd = [flat[2] | {"content": "And\u2028now\u0085?"}, flat[1]]
    lines = "\r\n".join(json.dumps(m, ensure_ascii=False) for m in odd)
    (tmp_path / "g.jsonl").write_text(lines, encoding="utf-8")
    assert read_conversation(tmp_path / "g.jsonl") == (odd, [])
    one = write(tmp_path, "e.jsonl", flat[2])
    assert read_conversation(one) == ([flat[2]], [])
    other = [TALK[0] | {"content": [{"type": "image", "image": "https://a.example/a"}]}]
    address = write(tmp_path, "f.json", other)
    assert read_conversation(address)[1] == ["https://a.example/a"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"not JSON \(.*character 1\)"),
        ("[1", r"not JSON \(.*character 3\)"),
        ('{"role": "user", "content": "a"}\n{"role"', r"line 2: not JSON"),
        ("3", r"is no conversation: expected a JSON list of messages"),
        ("[]", r"The conversation has no messages"),
        ('{"messages": 3}', r"is no conversation"),
        ('{\n "role": "user",\n "content": x}', r"not JSON .*line 3, character 13"),
        (
            '{"role": "user", "content": "a"}\n\n{"role": "user"}',
            r"talk\.json, line 3: A message of",
        ),
        (
            '{"role": "user", "content": "a"}\n'
            '{"role": "user", "content": [{"type": "image", "image": "no.png"}]}',
            r"talk\.json, line 2: No image file .*no\.png",
        ),
        (
            [TALK[1], TALK[1] | {"role": 3}],
            r"talk\.json, message 2: A message is",
        ),
        ('{"messages": [], "images": ["no.png"]}', r"has no messages"),
        (
            {"messages": TALK[1:], "images": ["no.png"]},
            r'talk\.json, "images": No image file .*no\.png',
        ),
        (
            {"messages": TALK[1:], "image": "a", "images": ["b"]},
            r'has "image" and "images": write one',
        ),
        (
            [TALK[0] | {"content": "What?", "images": ["p1.png"]}],
            r'message 1: A message has "images" beside its content, which nothing',
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": ""}]}],
            r"message 1: The image path is empty",
        ),
        ('[{"role": 3}]', r"A message is \"\{'role': 3\}\", but must be"),
        ('[{"role": "user", "content": [{"type": "sound"}]}]', r"has the part"),
        (
            {"messages": TALK, "images": ["a"]},
            r"hold pictures, and \"images\" has",
        ),
    ],
)
def test_files_that_hold_no_conversation(tmp_path, text, message):
    write(tmp_path, "p1.png", "")
    with pytest.raises((PromptError, ImageError), match=message) as met:
        read_conversation(write(tmp_path, "talk.json", text))
    assert str(met.value).startswith(str(tmp_path))


def test_files_of_conversations_that_cannot_be_read(tmp_path):
    with pytest.raises(PromptError, match=r"absent\.json cannot be read: No such file"):
        read_conversation(tmp_path / "absent.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match=r"a\.json is not UTF-8 text \(byte 0\)"):
        read_conversation(tmp_path / "a.json")


def test_a_video_has_no_mark_in_a_conversation(folder, generate):
    talk = write(folder, "talk.json", [{"role": "user", "content": "<video> What?"}])
    done = generate("--messages", talk, "--video", folder)
    assert_fails(done, r"has <video> in its text, which --video does not fill: write a")


def test_a_conversation_goes_on(folder, answer, generate):
    """With the file's last question, or with another one and another picture."""
    whole = write(folder, "talk.json", TALK)
    begun = write(folder, "begun.json", TALK[:2])
    first = answer("--messages", whole, "-m", "4")
    again = answer("--messages", begun, "-p", "And now?", "-m", "4")
    assert first["token_ids"] == again["token_ids"]
    assert first["prompt_tokens"] == again["prompt_tokens"]
    ask = ("--messages", begun, "-p", "And this?", "--image", folder / "p2.png")
    assert answer(*ask, "-m", "4")["num_images"] == 2
    assert_fails(generate("--messages", begun), r"ends with an answer: ask .* with -p")
    more = generate("--messages", whole, "--image", SHAPES)
    assert_fails(more, r"holds its pictures: give no others, or a question")
    raw = generate("--messages", whole, "--ignore-chat-template")
    assert_fails(raw, r"--messages needs the chat template", code=2)
    picture = {"type": "image", "image": "p9.png"}
    absent = write(folder, "absent.json", [TALK[0] | {"content": [picture]}, TALK[2]])
    assert_fails(generate("--messages", absent), r"No image file .*asking.*p9\.png")


def test_pictures_fill_the_marks_of_a_conversation_first(folder, answer):
    """Then those of the prompt; the rest comes in front of it."""
    said = [
        {"role": "user", "content": "<image>What colour?"},
        {"role": "assistant", "content": "red"},
    ]
    talk = write(folder, "marked.json", said)
    pictures = [str(folder / f"p{n}.png") for n in (1, 2, 10)]
    parser = import_module("mm1_mlx.generate").parser()

    def asked(prompt, *flags):
        flags = ("--messages", talk, "-p", prompt, *flags)
        messages, images = read_asked(parser.parse_args([*map(str, flags)]))
        assert messages[:2] == said
        return messages[2]["content"], images

    one, two, all_of_them = (("--image", *pictures[:n]) for n in (1, 2, 3))
    assert asked("And?", *one) == ("And?", pictures[:1])
    assert asked("And?", *two) == ("<image>And?", pictures[:2])
    assert asked("<image> <image>?", *all_of_them) == ("<image> <image>?", pictures)
    content, images = asked("So <video>?", *one, "--video", pictures[1])
    assert content == "So <image>?" and images[0] == pictures[0] and len(images) == 2
    with pytest.raises(PromptError, match=r"has 1 <image> but no image was given"):
        asked("And?")
    with pytest.raises(PromptError, match=r"has 1 <image> but no image was given"):
        asked("And?", "--video", pictures[1])  # not the conversation's picture
    with pytest.raises(PromptError, match=r"has 1 <image> but no image .* Give 1 i"):
        asked("So <image>?", *one)
    ask = ("--messages", talk, "-p", "And?", "-m", "2")
    assert answer(*ask, *one)["num_images"] == 1
    assert answer(*ask, *two)["num_images"] == 2


# --- shots ---------------------------------------------------------------------------


def test_shots_are_the_written_out_conversation(folder, answer):
    ask = ("-p", "What colour is it?", "--image", SHAPES, "-m", "4")
    found = answer("--shots", folder / "asked.jsonl", *ask)
    assert found["shots"] == [1, 2, 3] and found["num_images"] == 4
    turns = []
    for number, name in zip((1, 2, 10), COLOURS, strict=True):
        image = {"type": "image", "image": f"p{number}.png"}
        text = {"type": "text", "text": "What colour is it?"}
        turns.append({"role": "user", "content": [image, text]})
        turns.append({"role": "assistant", "content": name})
    talk = write(folder, "turns.json", turns)
    same = answer("--messages", talk, *ask)
    assert same["token_ids"] == found["token_ids"]
    assert same["prompt_tokens"] == found["prompt_tokens"]
    assert "shots" not in same


def test_bare_shots_need_no_prompt(folder, answer):
    found = answer("--shots", folder / "bare.jsonl", "--image", SHAPES, "-m", "4")
    lines = [f"<image> {name}\n" for name in COLOURS]
    pictures = [folder / f"p{n}.png" for n in (1, 2, 10)]
    same = answer(
        *("--image", *pictures, SHAPES, "-p", "".join([*lines, "<image>"])),
        *("--stop", "\n", "-m", "4"),
    )
    assert same["token_ids"] == found["token_ids"]
    assert same["prompt_tokens"] == found["prompt_tokens"]


def test_some_of_the_shots(folder, answer):
    ask = ("--shots", folder / "bare.jsonl", "--image", folder / "p2.png", "-m", "4")
    assert answer(*ask, "--num-shots", 2, "--shot-choice", "first")["shots"] == [1, 2]
    kept = ("--shot-features", folder / "features.safetensors")
    for _ in "12":
        near = answer(*ask, "--num-shots", 1, "--shot-choice", "nearest", *kept)
        assert near["shots"] == [2]
    drawn = {
        tuple(answer(*ask, "--num-shots", 2, "--shot-seed", seed)["shots"])
        for seed in (0, 0, 1, 2)
    }
    assert len(drawn) > 1
    every = answer(*ask, "--num-shots", 3, "--balance-shots", "--shot-choice", "first")
    assert every["shots"] == [1, 2, 3]


def test_large_shots_on_the_command_line(folder, answer):
    ask = ("--shots", folder / "bare.jsonl", "--image", SHAPES, "-m", "4")
    found = answer(*ask, "--resolution", "192", "--high-resolution-shots", "1")
    assert found["num_images"] == 4
    plain = answer(*ask)
    assert found["shots"] == plain["shots"]


def test_a_template_on_the_command_line(folder, answer):
    ask = ("--shots", folder / "asked.jsonl", "--image", SHAPES, "-m", "4")
    found = answer(
        *(*ask, "-p", "Which?", "--num-shots", 1, "--shot-choice", "first"),
        *("--shot-template", r"Q: {prompt}{image}\nA: {answer}"),
        *("--shot-separator", r"\n\n", "--ignore-chat-template"),
    )
    text = "Q: What colour is it?<image>\nA: red\n\nQ: Which?<image>\nA:"
    pictures = ("--image", folder / "p1.png", SHAPES)
    stop = ("--stop", "\n\n", "--ignore-chat-template", "-m", "4")
    assert answer("-p", text, *pictures, *stop)["token_ids"] == found["token_ids"]


def test_reasoning_is_told_apart(folder, answer):
    ask = ("--shots", folder / "reasoned.jsonl", "--image", SHAPES, "-p", STAR)
    found = answer(*ask, "-m", "8")
    assert {"reasoning", "answer"} <= found.keys()
    text = found["text"]
    if "Answer:" in text:
        assert [found["reasoning"], found["answer"]] == [
            part.strip() for part in text.rsplit("Answer:", 1)
        ]
    else:
        assert (found["reasoning"], found["answer"]) == (None, text.strip())
    assert "reasoning" not in answer(*ask, "--no-shot-reasoning", "-m", "4")
    marked = answer(*ask, "--answer-mark", "So the colour of it must be:", "-m", "4")
    assert marked["prompt_tokens"] > found["prompt_tokens"]


def test_a_second_run_reads_no_shots(folder, tmp_path, answer):
    """--prefix-cache keeps them on the disk, for other questions too."""
    ask = ("--shots", folder / "asked.jsonl", "--image", SHAPES, "-m", "4")
    cache = ("--prefix-cache", tmp_path / "cache")
    fresh = answer(*ask, "-p", STAR)
    assert (
        answer(*ask, "-p", "How many circles are there?", *cache)["reused_tokens"] == 0
    )
    cached = answer(*ask, "-p", STAR, *cache)
    assert cached["reused_tokens"] >= 3 * 64
    assert cached["token_ids"] == fresh["token_ids"]


def test_a_plan_counts_shots(folder):
    need_tiny()
    ask = ("-p", STAR, "--image", SHAPES, "--shots", folder / "asked.jsonl", "--plan")
    done = run_cli("mm1_mlx.generate", *ask, "--shot-choice", "nearest")
    assert done.returncode == 0, done.stderr
    assert re.search(r"pictures .* 4 through the encoder", done.stdout)


WRONG = [
    (("--num-shots", "2"), r"--num-shots goes with --shots FILE", 2),
    (("--shot-choice", "first"), r"--shot-choice goes with --shots FILE", 2),
    (("--shot-seed", "2"), r"--shot-seed goes with --shots FILE", 2),
    (("--shot-template", "{image}"), r"--shot-template goes with --shots FILE", 2),
    (("--shot-separator", "x"), r"--shot-separator goes with --shots FILE", 2),
    (("--shot-features", "x"), r"--shot-features goes with --shots FILE", 2),
    (("--balance-shots",), r"--balance-shots goes with --shots FILE", 2),
    (("--no-shot-reasoning",), r"--no-shot-reasoning goes with --shots FILE", 2),
    (("--high-resolution-shots", "1"), r"-resolution-shots goes with --shots FILE", 2),
    (
        ("--shots", "a", "--high-resolution-shots", "-1"),
        r"whole number of 0 or more",
        2,
    ),
    (("--answer-mark", "x"), r"--answer-mark goes with --shots FILE", 2),
    (
        ("--shots", "{}/asked.jsonl", "--shot-seed", "2"),
        r"--shot-seed goes with --shot-choice random",
        2,
    ),
    (
        ("--shots", "{}/asked.jsonl", "--answer-mark", "x"),
        r'--answer-mark goes with shots that have "reasoning"',
        2,
    ),
    (
        ("--shots", "{}/asked.jsonl", "--no-shot-reasoning"),
        r'--no-shot-reasoning goes with shots that have "reasoning"',
        2,
    ),
    (
        ("--shots", "{}/reasoned.jsonl", "--no-shot-reasoning", "--answer-mark", "x"),
        r"--answer-mark goes with reasoning: --no-shot-reasoning hides it",
        2,
    ),
    (
        (
            *("--shots", "{}/reasoned.jsonl", "--answer-mark", "x"),
            *("--shot-template", "{image} {reasoning} So {answer}"),
        ),
        r"--answer-mark: --shot-template says what is shown",
        2,
    ),
    (
        ("--shots", "{}/asked.jsonl", "--shot-separator", "x"),
        r"these are turns of a chat: give a template",
        1,
    ),
    (("--shots", "{}/asked.jsonl", "--num-shots", "0"), r"whole number of 1 or mor", 2),
    (("--shots", "{}/asked.jsonl", "--shot-choice", "x"), r"one of: first, random", 2),
    (("--shots", "{}/asked.jsonl", "--shot-seed", "-1"), r"whole number from 0 to", 2),
    (("--shots", "{}/asked.jsonl", "--num-shots", "4"), r"4 shots .* there are 3\.", 1),
    (("--shots", "{}/absent.jsonl"), r"absent\.jsonl cannot be read", 1),
    (("--shots", "{}/broken.jsonl"), r"broken\.jsonl, line 2: no image file .*p3", 1),
    (("--shots", "{}/asked.jsonl", "--shot-template", "x"), r"must end with \{ans", 1),
]


@pytest.mark.parametrize("flags, message, code", WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_flags_of_shots(folder, flags, message, code, generate):
    flags = [flag.replace("{}", str(folder)) for flag in flags]
    assert_fails(generate("-p", STAR, *flags), message, code=code)


def test_what_is_missing_to_ask(folder, generate):
    assert_fails(generate(), r"arguments are required: -p/--prompt", code=2)
    nothing = generate("--shots", folder / "asked.jsonl", "--image", SHAPES)
    assert_fails(nothing, r"asked\.jsonl, line 1 has a prompt, so the question needs")
    text = generate("--shots", folder / "asked.jsonl", "-p", "", "--image", SHAPES)
    assert_fails(text, r"so the question needs one, too")
    near = ("--shots", folder / "asked.jsonl", "--shot-choice", "nearest", "-p", "Hi")
    assert_fails(generate(*near), r"nearest shots are those of a picture, but")
