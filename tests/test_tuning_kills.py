"""A run that is killed, runs out of disk or is interrupted loses nothing.

The real command on a model of a few thousand weights, so that a step takes a few
milliseconds and half of the time goes into saving.
"""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import pytest
from small import DENSE
from small_tokenizers import write_tiny
from test_tuning import parts, same_file
from training_kit import measured

from helpers import ROOT, clean_environment, heed_ctrl_c
from mm1_mlx.loading import save
from mm1_mlx.training.state import load_state

KILLS, STEPS = 8, 200
# Half of the batch at a time, several samples in a row, and dropout: all that a step's
# randomness and order can depend on. A checkpoint after every step.
FLAGS = [
    *("--train", "attention=lora:2", "--train", "norms=full"),
    *("--batch-size", "4", "--grad-accumulation-steps", "2", "--pack"),
    *("--dropout", "0.2", "--max-seq-length", "96", "--save-every", "1"),
    *("--warmup", "5", "--weight-decay", "0.1", "--iters", str(STEPS)),
    # Measured after a checkpoint: a run that is killed between makes up for it.
    *("--steps-per-eval", "2", "--no-plot"),
]
RARELY = ("--save-every", "100")  # at the end alone, and when it is asked to stop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions and answers of several lengths."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    lines = [
        {
            "question": "How many?" * rng.randint(1, 4),
            "answer": "3 " * rng.randint(1, 9),
        }
        for _ in range(30)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "valid.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in lines[:2])
    )
    return write_tiny(folder)


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """The folder of a small model."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model, processor = parts(data, replace(DENSE, num_hidden_layers=1))
    save(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def start(small, data):
    """The command in the background: folder of the run, more flags -> process."""
    running = []

    def begin(out, *more, **settings) -> subprocess.Popen:
        command = [sys.executable, "-m", "mm1_mlx.lora", "--model", str(small)]
        command += ["--data", str(data), "--adapter-path", str(out)]
        command += [*FLAGS, *map(str, more)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(MLX_DISABLE_COMPILE="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **settings,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run without a break, and the seconds to its first step."""
    out, begun = tmp_path_factory.mktemp("runs") / "whole", time.monotonic()
    process = start(out, *RARELY)
    while not steps_logged(out) and process.poll() is None:
        time.sleep(0.005)
    beginning = time.monotonic() - begun
    ended(process)
    return out, beginning


def ended(process: subprocess.Popen) -> str:
    """What a process told, when it has ended as it should."""
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def steps_logged(folder) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def saved_step(folder) -> int:
    """The step of the checkpoint, which must be whole; 0 where there is none."""
    file = folder / "tune.safetensors"
    if not file.exists():
        return 0
    trees, facts = load_state(file)
    mx.eval(trees)
    return facts["step"]


# --- kill -9 -------------------------------------------------------------------------


def kill(process, out, how: str, rng: random.Random, beginning: float) -> None:
    """Kill a run at a random moment.

    how: "any": since it was started; "step": after a step of its own; "checkpoint",
    "adapter": while it writes that file. beginning: how long the first step takes.
    """
    if how == "any":
        time.sleep(rng.uniform(0.1, 1.1) * beginning)
    else:
        before, deadline = steps_logged(out), time.monotonic() + 120
        file = {"checkpoint": "tune", "adapter": "adapters"}.get(how)
        written = out / f".{file}.partial.safetensors"
        while time.monotonic() < deadline and process.poll() is None:
            if steps_logged(out) > before and (file is None or written.exists()):
                break
        late = 0.05 if file is None else rng.choice((0.0, 0.005))
        time.sleep(rng.uniform(0, late))
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_killed_at_many_random_moments(start, whole, tmp_path):
    """Then the same command with --resume: the same to the last bit."""
    (whole, beginning), out, rng = whole, tmp_path / "run", random.Random(11)
    saved, left = 0, 0
    moments = ["step", "checkpoint", "any", "adapter"] * (KILLS // 4)
    for how in moments:
        kill(start(out, "--resume"), out, how, rng, beginning)
        left += any(out.glob(".*partial*")) if out.is_dir() else 0
        assert saved_step(out) >= saved, "what was saved is lost"
        saved = saved_step(out)
    assert 0 < saved < STEPS
    assert left, "no kill came while a file was written"
    assert f"going on from step {saved} of {STEPS}" in ended(
        start(out, "--resume", *RARELY)
    )
    for name in ("adapters.safetensors", "tune.safetensors"):
        assert same_file(whole / name, out / name)
    assert measured(whole / "metrics.jsonl") == measured(out / "metrics.jsonl")
    for name in ("run.json", "adapter_config.json"):
        assert (whole / name).read_text() == (out / name).read_text()
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


# --- A full disk ---------------------------------------------------------------------


def no_file_larger_than(size: int):
    """For Popen(preexec_fn=...): writing more fails, as it does on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("step", [0, 3], ids=["the_first_save", "a_later_save"])
def test_a_full_disk(start, whole, tmp_path, step):
    """One line says so, what was there before is whole, and it can be gone on with."""
    whole, out = whole[0], tmp_path / "run"
    if step:
        ended(start(out, "--until", step))
    # The adapter fits, the checkpoint with the optimizer's state does not.
    size = (whole / "tune.safetensors").stat().st_size - 1000
    assert (whole / "adapters.safetensors").stat().st_size < size
    more = ["--resume"] if step else []
    process = start(out, *more, preexec_fn=no_file_larger_than(size))
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in told, told
    assert "tune.safetensors could not be written" in errors[0]
    assert errors[0].endswith("What was there before is whole.")
    assert saved_step(out) == step and not list(out.glob(".*partial*"))
    ended(start(out, "--resume", *RARELY))
    for name in ("adapters.safetensors", "tune.safetensors"):
        assert same_file(whole / name, out / name)


# --- Ctrl-C --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(start, whole, tmp_path, number):
    out = tmp_path / "run"
    process = start(out, *RARELY, preexec_fn=heed_ctrl_c)
    while not steps_logged(out) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "saved; the same command with --resume goes on from here" in told
    step = saved_step(out)
    assert step == steps_logged(out) and 0 < step < STEPS
    told = ended(start(out, "--resume", *RARELY))
    assert f"going on from step {step} of {STEPS}" in told
    assert same_file(whole[0] / "tune.safetensors", out / "tune.safetensors")
