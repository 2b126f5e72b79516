"""The commands as users type them: right input, wrong input, exit codes, messages."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from helpers import (
    ROOT,
    assert_fails,
    clean_environment,
    need,
    need_tiny,
    run_cli,
    run_here,
)
from mm1_mlx import __version__
from mm1_mlx.cli.doors import DOORS

SHAPES = ROOT / "examples" / "shapes.png"
ASK = ("-p", "What colour is the star?")


def generate(*args: object, **settings):
    return run_here("generate", *args, **settings)


# --- help and the table of doors ---


def test_help_lists_every_door():
    done = run_cli("--help")
    assert done.returncode == 0 and not done.stderr
    for name, (_, what) in DOORS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", done.stdout, re.MULTILINE)


def test_version():
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"mm1_mlx {__version__}\n")


@pytest.mark.parametrize("door", DOORS)
def test_both_spellings_of_a_door_give_the_same_help(door):
    done, same = run_cli(door, "--help"), run_cli(f"mm1_mlx.{door}", "--help")
    assert done.returncode == same.returncode == 0, done.stderr + same.stderr
    assert done.stdout == same.stdout
    assert not done.stderr and not same.stderr
    assert done.stdout.startswith(f"usage: mm1_mlx {door} [-h]")


# --- wrong flags: exit code 2, one line, no model needed ---

USAGE_ERRORS = [
    ("genrate", r"unknown command 'genrate'; did you mean 'generate'\?"),
    ("xyz", r"unknown command 'xyz' \(one of: generate, .*\)\."),
    ("generate", r"required: -p/--prompt\. See: mm1_mlx generate --help"),
    ("generate --promt hi", r"unknown flag '--promt'; did you mean '--prompt'\?"),
    ("generate -p hi --max-token 3", r"'--max-token'; did you mean '--max-tokens'"),
    ("generate -p hi --max-token=3", r"'--max-token'; did you mean '--max-tokens'"),
    ("generate -p hi -z", r"unknown flag '-z'"),
    ("generate -p hi a.png", r"unrecognized arguments: a\.png"),
    ("generate -p", r"-p/--prompt: expected one argument"),
    ("generate -p hi --image", r"--image: expected at least one argument"),
    ("generate -p hi --temp -1", r"--temp.* must be a number of 0 or more, not '-1'"),
    ("generate -p hi --temperature x", r"must be a number of 0 or more, not 'x'"),
    ("generate -p hi --temp nan", r"must be a number of 0 or more, not 'nan'"),
    ("generate -p hi --top-p 0", r"--top-p: .*above 0 and at most 1, not '0'"),
    ("generate -p hi --top-p 1.5", r"--top-p: .*above 0 and at most 1, not '1\.5'"),
    ("generate -p hi --top-k -1", r"--top-k: .*whole number of 0 or more, not '-1'"),
    ("generate -p hi --min-p 2", r"--min-p: must be a number from 0 to 1, not '2'"),
    ("generate -p hi -m 0", r"--max-tokens: .*whole number of 1 or more, not '0'"),
    ("generate -p hi -m 1.5", r"--max-tokens: .*whole number of 1 or more, not '1\.5'"),
    ("generate -p hi --seed -3", r"--seed: .*whole number from 0 to .*, not '-3'"),
    ("generate -p hi --repetition-penalty 0", r"must be a number above 0, not '0'"),
    ("generate -p hi --repetition-context-size 0", r"whole number of 1 or more"),
    ("generate -p hi --kv-bits 5", r"--kv-bits: unknown value '5' \(one of: 4, 8\)"),
    ("generate -p hi --kv-group-size 5", r"unknown value '5' \(one of: 32, 64, 128\)"),
    ("generate -p hi --prefill-step-size 0", r"whole number of 1 or more, not '0'"),
    ("generate -p hi --resize-mode padd", r"'padd'; did you mean 'pad'\?"),
    ("generate -p hi --max-image-pixels 0", r"whole number of 1 or more, not '0'"),
    ("generate -p hi --quantized-kv-start -1", r"whole number of 0 or more, not '-1'"),
    ("generate -p hi --lookup 0", r"--lookup: must be a whole number from 1 to 16"),
    ("generate -p hi --lookup 17", r"must be a whole number from 1 to 16, not '17'"),
    ("generate -p hi --num-draft-tokens 0", r"whole number from 1 to 64, not '0'"),
    ("generate -p hi --num-draft-tokens 65", r"whole number from 1 to 64, not '65'"),
    ("generate -p hi --prefix-cache-size 0", r"-size: must be a number above 0, not"),
    ("generate -p hi --prefix-cache-size inf", r"must be a number above 0, not 'inf'"),
    ("generate -p hi --prefix-cache-size 1", r"-size goes with --prefix-cache FOLDER"),
    ("generate -p hi --lookup 2 --draft-model x", r"not allowed with argument --look"),
    ("generate -p hi --stop=", r"--stop: must be a text of at least one character\."),
    ("generate -p hi --chat-template-config x", r"a JSON object like .*, not 'x'"),
    (
        "generate -p hi --chat-template-config [1]",
        r"a JSON object like .*, not '\[1\]'",
    ),
    ("generate -p hi --ignore-chat-templat", r"mean '--ignore-chat-template'"),
    ("generate -p hi --quiet --verbose", r"not allowed with argument --quiet"),
    ("benchmark --json start", r"start must be the first word, before its flags"),
    ("benchmark strat", r"unknown value 'strat'; did you mean 'start'\?"),
    ("benchmark start -n 0", r"--runs: must be a whole number of 1 or more, not '0'"),
    ("pretrain --promt x", r"unknown flag '--promt'\. See"),
    ("Info", r"unknown command 'Info'; did you mean 'info'\?"),
    ("generate -p hi --MODEL x", r"unknown flag '--MODEL'; did you mean '--model'\?"),
    ("info --modle x", r"unknown flag '--modle'; did you mean '--model'\?"),
]


@pytest.mark.parametrize(
    "command, pattern", USAGE_ERRORS, ids=[c for c, _ in USAGE_ERRORS]
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(command, pattern):
    done = run_here(*command.split())
    assert_fails(done, pattern, code=2)
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("module", [(), ("mm1_mlx.generate",)])
def test_a_process_ends_with_the_exit_codes(module):
    """As all else that is wrong is tested within this process."""
    need_tiny()
    door = module or ("generate",)
    assert_fails(run_cli(*door, "--promt", "hi"), "unknown flag '--promt'", code=2)
    assert_fails(run_cli(*door, *ASK, "--image", "absent.png"), r"absent\.png", code=1)


# --- wrong input: exit code 1, one line ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no picture behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures that are not as they should be."""
    folder = tmp_path_factory.mktemp("pictures")
    whole = SHAPES.read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is not a picture")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "no_model").mkdir()
    (folder / "with space.png").write_bytes(whole)
    return folder


WRONG_INPUT = [
    ("no such image", ("--image", "{}/absent.png"), r"[Nn]o .*absent\.png"),
    ("near name", ("--image", "{}/truncate.png"), r"Did you mean truncated\.png\?"),
    (
        "not an image",
        ("--image", "{}/text.png"),
        r"text\.png is not an image, or of a format that is not read\. Readable are",
    ),
    (
        "truncated",
        ("--image", "{}/truncated.png"),
        r"truncated\.png is a damaged or cut off PNG file \(.+\)\. Save or download it",
    ),
    ("0 bytes", ("--image", "{}/empty.png"), r"empty \(0 bytes\)"),
    ("a folder", ("--image", "{}"), r"is a folder"),
    ("bomb", ("--image", "{}/bomb.png"), r"60,?000.*--max-image-pixels"),
    ("pixel limit", ("--image", str(SHAPES), "--max-image-pixels", "100"), r"100\b"),
    ("address", ("--image", "https://a.example/a.png"), r"--allow-url"),
    (
        "private address",
        ("--image", "https://127.0.0.1/a.png", "--allow-url"),
        r"127\.0\.0\.1",
    ),
    ("plain http", ("--image", "http://a.example/a.png", "--allow-url"), r"https"),
    ("other scheme", ("--image", "ftp://a.example/a.png"), r"ftp"),
    ("more slots", ("--image", str(SHAPES), "-p", "<image> <image> both?"), r"2.*1"),
    (
        "more images",
        ("--image", str(SHAPES), str(SHAPES), "-p", "<image> what?"),
        r"1.*2",
    ),
    ("slot, no image", ("-p", "<image> what?"), r"<image>"),
    ("empty prompt", ("--image", str(SHAPES), "-p", ""), r"empty"),
    ("blank prompt", ("-p", "  "), r"empty"),
    ("long prompt", ("-p", "red circle " * 3_000), r"context|tokens"),
    ("unknown model", ("--model", "mm1-tinny"), r"mm1-tinny.*mm1-tiny"),
    (
        "a preset has no weights",
        ("--model", "mm1-3b"),
        r"'mm1-3b' is a size of the papers, without public weights\. Give a public "
        r".*convert assemble.*or the built-in mm1-tiny\.",
    ),
    (
        "a system message without a template",
        ("--ignore-chat-template", "--system", "Be brief."),
        r"Without the chat template there is no place for a system message",
    ),
    ("a folder without a model", ("--model", "{}/no_model"), r"config\.json"),
]


@pytest.mark.parametrize(
    "args, pattern",
    [row[1:] for row in WRONG_INPUT],
    ids=[row[0] for row in WRONG_INPUT],
)
def test_wrong_input_is_one_line_and_exit_code_1(args, pattern, pictures):
    need_tiny()
    args = [str(arg).replace("{}", str(pictures)) for arg in args]
    done = generate(*([] if "-p" in args else ASK), *args)
    assert_fails(done, pattern)
    assert not done.stdout
    # The note on the built-in model comes only when the input could be read.
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback():
    need_tiny()
    done = generate(*ASK, "--image", "absent.png", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ImageError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_are_answered_or_refused_in_one_line(size, tmp_path):
    need_tiny()
    from PIL import Image

    Image.new("RGB", size, "red").save(tmp_path / "odd.png")
    done = generate(*ASK, "--image", tmp_path / "odd.png")
    if done.returncode:
        assert_fails(done, r"odd\.png")
    else:
        assert done.stdout.strip() and "Traceback" not in done.stderr


def test_a_prompt_that_is_not_text_is_named(tmp_path):
    need_tiny()
    command = [sys.executable, "-m", "mm1_mlx.generate", "-p", "-"]
    done = subprocess.run(
        command, input=b"what \xff?", capture_output=True, env=clean_environment()
    )
    assert done.returncode == 1
    assert b"error: The prompt on stdin is not UTF-8 text (byte 5)" in done.stderr


# --- right input ---


@pytest.fixture(scope="module")
def answer():
    """One plain answer with its statistics, of a process of its own."""
    need_tiny()
    return run_cli("mm1_mlx.generate", *ASK, "--image", SHAPES)


def test_the_answer_stands_alone_on_stdout(answer):
    assert answer.returncode == 0, answer.stderr
    assert "yellow" in answer.stdout.lower()
    assert answer.stdout.endswith("\n") and answer.stdout.count("\n") == 1


def test_statistics_are_the_lines_that_scripts_read(answer):
    lines = answer.stderr.splitlines()
    assert lines[0].startswith("note: mm1-tiny, the built-in model")
    assert "--model" in lines[0]
    rate = r"\d+ tokens, \d+\.\d{3} tokens-per-sec"
    patterns = [
        r"={10}",
        r"Image: 1 \((\d+)x\1\), \d+ tokens, encode \d+\.\d\d s",
        rf"Prompt: {rate}",
        rf"Generation: {rate}",
        r"TTFT: \d+\.\d\d s",
        r"Peak memory: \d+\.\d{3} GB",
    ]
    assert len(lines) == 1 + len(patterns)
    for pattern, line in zip(patterns, lines[1:], strict=True):
        assert re.fullmatch(pattern, line), line


def test_json_is_one_object_with_the_same_answer(answer):
    done = generate(*ASK, "--image", SHAPES, "--json", "--quiet")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count("\n") == 1
    values = json.loads(done.stdout)
    assert values["text"].strip() == answer.stdout.strip()
    assert values["model"] == "mm1-tiny"
    assert values["num_images"] == 1 and values["image_tokens"] > 0
    assert values["finish_reason"] == "stop"
    assert values["generation_tokens"] == len(values["token_ids"])
    assert values["prompt_tokens"] > values["image_tokens"]


def test_one_token_has_no_rate():
    need_tiny()
    done = generate(*ASK, "--image", SHAPES, "-m", "1")
    assert "nan" not in done.stderr
    assert "Generation: 1 tokens\n" in done.stderr


def test_the_note_comes_with_an_object_too():
    need_tiny()
    done = generate(*ASK, "--image", SHAPES, "--json")
    assert done.stderr.startswith("note: mm1-tiny")
    assert json.loads(done.stdout)["text"].strip()


def test_without_the_chat_template_the_prompt_is_all_there_is(answer):
    whole = "<user><image>" + ASK[1] + "<assistant>"
    raw = ("--ignore-chat-template", "--image", SHAPES, "--json", "--quiet")
    same = json.loads(generate("-p", whole, *raw).stdout)
    assert same["text"].strip() == answer.stdout.strip()
    bare = json.loads(generate(*ASK, *raw).stdout)
    assert bare["prompt_tokens"] < same["prompt_tokens"]


def test_variables_reach_the_chat_template(answer, tmp_path):
    need("jinja2")
    shutil.copytree(need_tiny(), tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    source = template.read_text()
    template.write_text(source + "{% if word %}{{ word }}{% endif %}")
    ask = (*ASK, "--image", SHAPES, "--model", tmp_path / "model", "--json", "--quiet")
    plain = json.loads(generate(*ask).stdout)
    assert plain["text"].strip() == answer.stdout.strip()
    more = generate(*ask, "--chat-template-config", '{"word": "a red circle"}')
    assert json.loads(more.stdout)["prompt_tokens"] > plain["prompt_tokens"]


def test_quiet_prints_the_answer_only(answer):
    done = run_cli("generate", *ASK, "--image", SHAPES, "--quiet")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", answer.stdout)


def test_a_named_model_needs_no_note_and_verbose_says_what_ran(answer):
    done = generate(*ASK, "--image", SHAPES, "--model", "mm1-tiny", "--verbose")
    assert done.stdout == answer.stdout
    assert "note:" not in done.stderr
    assert re.match(r"Model: mm1-tiny, load \d+\.\d\d s, Device", done.stderr)


def test_the_model_can_be_a_folder(answer):
    done = generate(*ASK, "--image", SHAPES, "--model", need_tiny())
    assert done.stdout == answer.stdout, done.stderr


def test_the_prompt_can_come_from_stdin(answer):
    done = run_cli("generate", "-p", "-", "--image", SHAPES, input=ASK[1] + "\n")
    assert done.stdout == answer.stdout, done.stderr


def test_both_doors_answer_alike(answer):
    done = run_cli("generate", *ASK, "--image", SHAPES)
    assert done.stdout == answer.stdout, done.stderr


def test_the_installed_command_is_the_same_door(answer):
    command = Path(sys.executable).parent / "mm1_mlx"
    if not command.exists():
        if os.environ.get("CI"):
            pytest.fail("the package is not installed")
        pytest.skip("the package is not installed")
    done = subprocess.run(
        [command, "generate", *ASK, "--image", SHAPES],
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.stdout == answer.stdout, done.stderr


@pytest.mark.parametrize("paste", ["'{}'", '"{}"', " {} ", "escaped", "file"])
def test_paths_as_a_terminal_pastes_them(paste, pictures, answer):
    path = str(pictures / "with space.png")
    if paste == "escaped":
        given = path.replace(" ", "\\ ")
    elif paste == "file":
        given = "file://" + path.replace(" ", "%20")
    else:
        given = paste.format(path)
    done = generate(*ASK, "--image", given, "--quiet")
    assert done.stdout == answer.stdout, done.stderr


def test_images_after_one_flag_or_repeated():
    need_tiny()
    once = generate("-p", "Which has more?", "--image", SHAPES, SHAPES, "--json")
    twice = generate(
        "-p", "Which has more?", "--image", SHAPES, "--image", SHAPES, "--json"
    )
    assert json.loads(once.stdout)["num_images"] == 2
    assert json.loads(once.stdout)["text"] == json.loads(twice.stdout)["text"]


def test_a_prompt_without_a_picture_is_answered():
    need_tiny()
    done = generate("-p", "What colour is the star?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Image:" not in done.stderr


def test_max_tokens_and_finish_reason():
    need_tiny()
    ask = ("-p", "Describe the picture.", "--image", SHAPES, "--json", "-m", "2")
    values = json.loads(generate(*ask).stdout)
    assert values["generation_tokens"] == 2
    assert values["finish_reason"] == "length"


def test_stop_text_ends_the_answer_before_it():
    need_tiny()
    ask = ("-p", "Describe the picture.", "--image", SHAPES, "--quiet")
    whole = generate(*ask).stdout.strip()
    word = whole.split()[-1]
    cut = generate(*ask, "--stop", word).stdout
    assert word not in cut
    assert whole.startswith(cut.strip())


def test_a_seed_repeats_a_sampled_answer():
    need_tiny()
    ask = ("-p", "Describe the picture.", "--image", SHAPES, "--quiet", "--temp", "2")
    first, again = (generate(*ask, "--seed", "7", "-m", "20").stdout for _ in "12")
    others = {generate(*ask, "--seed", str(s), "-m", "20").stdout for s in range(3)}
    assert first == again
    assert len(others | {first}) > 1


def test_few_bits_for_keys_and_values_give_the_same_answer(answer):
    bits = ("--kv-bits", "8", "--kv-group-size", "32")
    for start in ((), ("--quantized-kv-start", "5")):
        done = generate(*ASK, "--image", SHAPES, *bits, *start)
        assert done.stdout == answer.stdout, done.stderr
