"""lora and fuse through the command line, on the built-in model."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from PIL import Image
from training_kit import planned_once, uncompiled

from helpers import ROOT, assert_close, assert_fails, need_tiny, run_cli, run_here
from mm1_mlx import load
from mm1_mlx.cli.training import Reporter, StopOnSignal, awake
from mm1_mlx.lora import main, parser, plan
from mm1_mlx.training.trainer import Progress

pytestmark = pytest.mark.usefixtures(planned_once.__name__, uncompiled.__name__)

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A new habit: colours are answered in capitals, twice."""
    folder = tmp_path_factory.mktemp("data")
    rng, lines = random.Random(0), []
    for number in range(12):
        name = rng.choice(sorted(COLOURS))
        Image.new("RGB", (48, 48), COLOURS[name]).save(folder / f"{number}.png")
        answer = f"{name} {name}"
        line = {"question": "Say it twice.", "answer": answer, "image": f"{number}.png"}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "valid.jsonl").write_text("\n".join(lines[:2]) + "\n")
    return folder


def flags(data, out, *more) -> list[str]:
    need_tiny()
    base = ["--model", "mm1-tiny", "--data", str(data), "--adapter-path", str(out)]
    return [*base, "--batch-size", "4", "--warmup", "1", *map(str, more)]


def test_train_generate_fuse(data, tmp_path, capsys):
    """A user's whole way: check, train, ask with the adapter, fuse, ask again."""
    out, fused = tmp_path / "adapter", tmp_path / "fused"
    assert main(flags(data, out, "--check")) == 0
    shown = capsys.readouterr().out
    assert "train: 12 samples, 12 images" in shown and "valid: 2 samples" in shown
    assert not out.exists()
    more = ("--iters", 30, "--learning-rate", "5e-3", "--steps-per-eval", 15)
    more += ("--batch-size", 2)
    assert main(flags(data, out, *more, "--rank", 4, "--json")) == 0
    told = capsys.readouterr()
    metrics = json.loads(told.out)["metrics"]
    assert metrics["text"] < 0.5 and metrics["valid"] < 0.5
    assert "supervised " in told.err and "LoRA, rank 4, scale 4" in told.err
    assert "tune 30/30" in told.err
    ask = ["--model", "mm1-tiny", "--image", data / "0.png", "-p", "Say it twice."]
    done = run_cli("generate", *ask, "--adapter-path", out, "--quiet")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert len(words) == 2 and words[0] == words[1] in COLOURS
    done = run_cli(
        "fuse", "--model", "mm1-tiny", "--adapter-path", out, "--save-path", fused
    )
    assert done.returncode == 0, done.stderr
    same = re.search(r"same likeliest token[^\d]*([\d.]+)", done.stdout)
    assert "adapted layers fused" in done.stdout
    assert same and float(same[1]) >= 99, done.stdout  # weights rounded to float16
    one, processor = load("mm1-tiny", adapter_path=out)
    two, _ = load(fused)
    inputs = processor("Say it twice.", images=[data / "0.png"])
    first = one(inputs.input_ids, inputs.pixel_values)
    second = two(inputs.input_ids, inputs.pixel_values)
    assert_close(second, first, atol=0.05 * float(mx.abs(first).max()))  # float16
    made = json.loads((fused / "config.json").read_text())["extra"]["fused"]
    assert made["adapter"] == "adapter"
    again = ["--save-path", fused, "--overwrite", "--adapter-path", out]
    done = run_cli("fuse", "--model", fused, *again)
    assert_fails(done, r"the original is never replaced")
    assert "## Fused" in (fused / "README.md").read_text()


def start(data, out, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "mm1_mlx.lora", *flags(data, out, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def same_arrays(one, two) -> bool:
    first, second = mx.load(str(one)), mx.load(str(two))
    return first.keys() == second.keys() and all(
        mx.array_equal(first[name], second[name]) for name in first
    )


def steps_logged(folder) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_killed_at_random_moments_and_resumed(data, tmp_path):
    """kill -9, then the same command with --resume: as if nothing had happened."""
    more = ("--iters", 24, "--save-every", 2, "--dropout", 0.2, "--steps-per-report", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(data, whole, *more)  # also a process: they load a faster BLAS
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    rng, kills = random.Random(5), 0
    for moment in (3, 8, None):
        resumed = ("--resume",) if kills else ()
        process = start(data, parts, *more, *resumed)
        while moment and process.poll() is None and steps_logged(parts) < moment:
            time.sleep(0.01)
        if moment and process.poll() is None:
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, told = process.communicate(timeout=120)
    assert kills == 2 and process.returncode == 0, told
    lines = (parts / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))
    for name in ("adapters.safetensors", "tune.safetensors"):
        assert same_arrays(whole / name, parts / name)
    assert not list(parts.glob(".*partial*"))


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    out = tmp_path / "adapter"
    process = start(data, out, "--iters", 5000, "--steps-per-report", 1)
    deadline = time.time() + 120
    while not (out / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "the same command with --resume goes on from here" in told
    assert (out / "tune.safetensors").exists()


@pytest.mark.parametrize(
    "more, message, code",
    [
        (["--train", "brain"], r"no part 'brain' to train\. The parts are", 1),
        (
            ["--train", "experts", "--train", "router=8"],
            r"'router' takes no low-rank",
            1,
        ),
        (["--train", "attention=big"], r"PART or PART=HOW, where HOW is a rank", 2),
        (["--train", "attention=" + "9" * 5000], r"where HOW is a rank up to 65536", 2),
        (["--rank", "9" * 400], r"must be a whole number from 1 to 65536", 2),
        (["--rank", "300"], r"The rank is 300, but .* and can have 128 at most", 1),
        (["--seed", "9" * 400], r"--seed: must be a whole number from 0", 2),
        (["--projections", "q_proj,w_proj"], r"no projection 'w_proj'.* o_proj, q", 1),
        (["--learning-rate", "fast"], r"must be above 0, or mm1", 2),
        (["--part-rate", "connector=x"], r"--part-rate is 'connector=x'", 2),
        (
            ["--part-rate", "connector=0.1"],
            r"'connector' has a .*but is not trained",
            1,
        ),
        (["--force"], r"--force is for going on: give --resume, too", 2),
        (["--num-layers", "0"], r"--num-layers must be -1 for all", 2),
        (["--first-layers", "1", "--num-layers", "1"], r"not both", 2),
        (["--grad-accumulation-steps", "3"], r"a multiple of accumulate \(3\)", 1),
        (["--resume", "--adapter-path", "examples"], r"has no tune\.safetensors to", 1),
        (["--max-seq-length", "30"], r"line \d+: the sample has \d+ tokens", 1),
        (["--adapter-path", "examples"], r"is no adapter folder", 1),
    ],
)
def test_wrong_use(data, tmp_path, more, message, code):
    done = run_here("lora", *flags(data, tmp_path / "adapter", "--iters", 2, *more))
    assert_fails(done, message, code=code)
    assert not (tmp_path / "adapter" / "adapters.safetensors").exists()


def test_wrong_data(tmp_path):
    done = run_cli("lora", *flags(tmp_path / "none", tmp_path / "adapter"))
    assert_fails(done, r"There is no data folder")
    (tmp_path / "train.jsonl").write_text('{"question": "a"}\n{"caption": "b"}\n{\n')
    done = run_here("lora", *flags(tmp_path, tmp_path / "adapter", "--check"))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split("line ")[1][0] for line in lines] == ["1", "3"]


def test_what_the_flags_train(data, tmp_path):
    need_tiny()
    model, _ = load("mm1-tiny")

    def parts(*more: str) -> dict:
        return plan(
            parser().parse_args(flags(data, tmp_path, *more)), model.config
        ).parts

    assert set(parts()) == {"attention", "mlp", "experts"}
    found = parts(
        "--train", "attention=dora:4", "--train", "connector=full", "--rslora"
    )
    assert found["connector"].pairs is None
    pairs = found["attention"].pairs
    assert (pairs.rank, pairs.scale, pairs.dora) == (4, 8.0, True)
    assert parts("--fine-tune-type", "full")["mlp"].pairs is None
    assert parts("--rank", "32", "--alpha", "64")["mlp"].pairs.scale == 2.0


def test_what_failed_half_way_is_not_lost(data, tmp_path, capsys):
    """A broken sample that is met late: what was done is there, and is gone on from."""
    folder, out = tmp_path / "data", tmp_path / "adapter"
    folder.mkdir()
    good = [json.dumps({"question": "a?", "answer": "b"})] * 8
    (folder / "train.jsonl").write_text("\n".join(good) + "\n")
    bad = '{"question": "a?", "answer": ""}'
    (folder / "test.jsonl").write_text(f"{good[0]}\n{bad}\n")
    late = ("--iters", 2, "--val-samples", 1)  # only the first is read at the start
    assert main(flags(folder, out, *late)) == 1
    assert "test.jsonl, line 2: 'answer' is ''" in capsys.readouterr().err
    assert steps_logged(out) == 2
    (out / "adapters.safetensors").unlink()
    (folder / "test.jsonl").unlink()
    assert main(flags(folder, out, *late, "--resume")) == 0
    assert (out / "adapters.safetensors").is_file()

    more = ("--iters", 2, "--max-seq-length", 16)
    (folder / "train.jsonl").write_text(good[0].replace("b", "b " * 40) + "\n")
    early = tmp_path / "early"
    assert main(flags(folder, early, *more)) == 1  # before anything was saved
    assert main(flags(folder, early, *more, "--too-long", "drop")) == 1
    assert "No sample has 16 tokens or less" in capsys.readouterr().err
    (folder / "train.jsonl").write_text("\n".join(good) + "\n")
    assert main(flags(folder, early, *more, "--resume", "--until", 1)) == 0
    assert main(flags(folder, early, *more, "--resume", "--until", 1)) == 0
    assert steps_logged(early) == 1


def test_a_mac_stays_awake_for_as_long_as_it_trains(tmp_path, monkeypatch):
    """A program in the place of macOS's, which notes how it was called, and its end."""
    note = tmp_path / "note"
    program = tmp_path / "caffeinate"
    program.write_text(
        f'#!/bin/sh\ntrap "echo ended >> {note}; exit" TERM\n'
        f'echo "$@" > {note}\nwhile :; do :; done\n'  # dash may lose a signal in sleep
    )
    program.chmod(0o755)
    with awake():  # elsewhere there is nothing to ask
        pass
    assert sys.platform == "darwin" or not note.exists()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("mm1_mlx.cli.training.sys.platform", "darwin")
    with awake():
        deadline = time.monotonic() + 20
        while not note.exists() or not note.read_text():
            assert time.monotonic() < deadline
    assert note.read_text().splitlines() == [f"-i -m -w {os.getpid()}", "ended"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered(number, capfd):
    with StopOnSignal() as signals:
        os.kill(os.getpid(), number)
        assert signals.asked()
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(5)


def test_held_out_samples_are_told_now_and_then(monkeypatch, capsys):
    now = iter((0.0, 5.0, 25.0, 25.0, 26.0, 50.0, 60.0))
    monkeypatch.setattr("mm1_mlx.cli.training.time.monotonic", lambda: next(now))
    reporter = Reporter(1)
    for done in (4, 8, 12):
        reporter.measured("test", done, 12)
    reporter.measured("valid", 2, 12)
    reporter.close()
    assert capsys.readouterr().err == "test: 8 of 12 samples\n"


def test_a_value_that_is_not_in_every_step_is_told_as_it_is(capsys):
    reporter = Reporter(2)
    for step, metrics in ((1, {"text": 1.0}), (2, {"text": 2.0, "valid": 8.0})):
        reporter.step(Progress("tune", step, 2, metrics, 1.0, 1))
    reporter.close()
    assert "loss 1.5 valid 8 " in capsys.readouterr().err
