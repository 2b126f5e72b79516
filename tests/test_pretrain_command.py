"""python -m mm1_mlx.pretrain: what it prints, refuses, and survives."""

import random
import re
import signal
import sys
import time

import pytest
from training_kit import (
    assert_same_state,
    command,
    environment,
    recipe_with,
    start,
    uncompiled,
    wait_for,
    write_run,
)

from helpers import assert_fails, run_cli, run_here
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.training.pretraining_run import pretrain
from mm1_mlx.training.state import load_state

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)


def test_the_command_trains_and_tells(tmp_path):
    done = command(tmp_path, "--report-every", "2", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".*/run/model after \d+ s\n", done.stdout)
    lines = done.stderr.splitlines()
    assert [re.match(r"\w+ \d/\d", x)[0] for x in lines if " | " in x] == [
        *("encoder 2/4", "encoder 4/4", "joint 2/6", "joint 4/6", "joint 6/6")
    ]
    pattern = (
        r"joint 6/6 loss \S+ accuracy .* \| \d+ s, 0 s left, \S+ examples/s, "
        r"\d+ tokens/s, peak \d\.\d\d GB"
    )
    assert re.fullmatch(pattern, lines[-2])
    assert lines[-1].startswith("experts (▄ even, █ twice that): 1 ")


def test_until_is_told_and_is_no_interruption(tmp_path):
    done = command(tmp_path, "--stage", "joint", "--until", "3")
    assert done.returncode == 0 and not done.stdout, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "saved at step 3; the same command without --until goes on from here"


def broken(tmp_path, name, content=None):
    """Arguments with a file replaced, or removed."""
    write_run(tmp_path)
    path = tmp_path / name
    path.unlink() if content is None else path.write_bytes(content)


WRONG_INPUT = [
    ("recipe.json", None, r"There is no recipe .*recipe\.json"),
    ("recipe.json", b"{]", r"recipe\.json is not a JSON recipe"),
    ("recipe.json", b'{"modle": 1}', r"unknown keys \['modle'\]"),
    ("tokenizer.model", None, r"There is no sentencepiece model .*tokenizer\.model"),
    ("tokenizer.model", b"", r"tokenizer\.model is empty"),
    ("tokenizer.model", b"garbage", r"tokenizer\.model is not a sentencepiece model"),
    ("stub_data.py", None, r"data module 'stub_data' cannot be imported \(No module"),
    ("stub_data.py", b"", r"'stub_data' has no document\(rng, kind, progress\)"),
    (
        "stub_data.py",
        b"def document(rng, kind, progress): ...",
        r"has no region_picture\(rng, progress\)",
    ),
]


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """The command in this process, which finds the data module in the folder."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub_data", raising=False)
    yield lambda *arguments: run_here("pretrain", *arguments)
    sys.modules.pop("stub_data", None)


@pytest.mark.parametrize("name, content, message", WRONG_INPUT)
def test_wrong_input_is_one_line_and_exit_code_1(
    wrong, tmp_path, name, content, message
):
    arguments = write_run(tmp_path)
    path = tmp_path / name
    path.unlink() if content is None else path.write_bytes(content)
    assert_fails(wrong(*arguments), message)


WRONG_RECIPES = [
    ({"data": "/absent/folder"}, (), r"data folder /absent/folder does not exist"),
    ({"chat_template": "mine"}, (), r"'mine', but must be one of chatml"),
    ({}, ("--init", "/absent"), r"There is no folder /absent"),
    (
        {"stages": {"joint": recipe_with()["stages"]["joint"]}},
        ("--stage", "encoder"),
        r"The recipe has no stage 'encoder', only joint",
    ),
]


@pytest.mark.parametrize("changes, more, message", WRONG_RECIPES)
def test_recipes_that_cannot_run(wrong, tmp_path, changes, more, message):
    assert_fails(wrong(*write_run(tmp_path, **changes), *more), message)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("image_token_id", 9, r"image_token_id is 9, but .* has <image> at 4"),
        ("eos_token_id", 7, r"eos_token_id is 7, but .* has end of text at 2"),
        ("bos_token_id", None, r"bos_token_id is None, but .* begin of text at 1"),
        ("vocab_size", 100, r"has \d+ pieces, but text_config\.vocab_size is 100"),
    ],
)
def test_a_vocabulary_of_other_ids_is_refused(stub, key, value, message):
    model = recipe_with()["model"]
    place = model["text_config"] if key == "vocab_size" else model
    place[key] = value
    with pytest.raises(ConfigError, match=message):
        pretrain(*stub(model=model))


def test_documents_that_never_fit_are_told(stub):
    with pytest.raises(DatasetError, match=r"more than 8 tokens.*Raise the row length"):
        pretrain(*stub(joint={"row_length": 8}), stage="joint")


LONG = {"joint": {"steps": 60, "batch": 2}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The checkpoint of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = command(folder, "--stage", "joint", **LONG)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "joint.safetensors"


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted):
    arguments = [*write_run(tmp_path, **LONG), "--stage", "joint", "--save-every", "3"]
    checkpoint = tmp_path / "run" / "joint.safetensors"
    process = start(tmp_path, arguments)
    wait_for(checkpoint, process)
    time.sleep(random.SystemRandom().random() * 0.3)  # any moment will do
    process.kill()
    process.communicate()
    step = load_state(checkpoint)[1]["step"]
    assert step % 3 == 0

    done = run_cli("mm1_mlx.pretrain", *arguments, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    if step < 60:
        assert f"joint: going on from step {step}\n" in done.stderr
    assert_same_state(checkpoint, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, uninterrupted, number):
    arguments = [*write_run(tmp_path, **LONG), "--stage", "joint", "--save-every", "2"]
    checkpoint = tmp_path / "run" / "joint.safetensors"
    process = start(tmp_path, arguments)
    wait_for(checkpoint, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:  # the machine was fast: it had ended already
        pytest.skip("the run ended before the signal")
    assert process.returncode == 130 and not out
    assert err.endswith("stopped and saved; the same command goes on from here\n")
    assert "Traceback" not in err

    done = run_cli("mm1_mlx.pretrain", *arguments, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_state(checkpoint, uninterrupted)
