"""Fine-tuning in two processes: the gradients, metrics and adapter of one."""

import json
import math
import random
import shutil
import signal
import sys
import time

import mlx.core as mx
import pytest
from PIL import Image
from process_kit import ends_of, free_ports, run_two, start_two

from helpers import (
    assert_close,
    assert_equal,
    assert_fails,
    need_tiny,
    run_cli,
    run_python,
)
from mm1_mlx.training.state import load_state

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
LEARN = [
    *("--warmup", "0", "--floor", "1", "--clip", "1e9", "--rank", "4"),
    *("--train", "attention", "--train", "mlp"),
]
# MLX's CPU back end compiles by a C++ compiler: seconds for each shape.
UNCOMPILED = {"MLX_DISABLE_COMPILE": "1"}
SGD = [*LEARN, "--optimizer", "sgd", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Answers of one to seven words: a mean over processes would not be one over
    tokens."""
    need_tiny()
    folder = tmp_path_factory.mktemp("data")
    rng, lines = random.Random(0), []
    for number in range(16):
        name = rng.choice(sorted(COLOURS))
        Image.new("RGB", (48, 48), COLOURS[name]).save(folder / f"{number}.png")
        answer = " ".join([name] * (1 + 6 * (number % 3 == 0)))
        line = {"question": "Say it.", "answer": answer, "image": f"{number}.png"}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "valid.jsonl").write_text("\n".join(lines[:5]) + "\n")
    return folder


@pytest.fixture(scope="module")
def texts(data, tmp_path_factory):
    """The same without pictures: many steps in little time."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train.jsonl", "valid.jsonl"):
        lines = [json.loads(line) for line in (data / name).read_text().splitlines()]
        kept = [{"question": x["question"], "answer": x["answer"]} for x in lines]
        (folder / name).write_text("\n".join(map(json.dumps, kept)) + "\n")
    return folder


def flags(data, out, *more) -> list[str]:
    base = ["--model", "mm1-tiny", "--data", data, "--adapter-path", out]
    return [*map(str, base), "--batch-size", "4", *map(str, more)]


def one(data, out, *more) -> None:
    """In a process of its own: a command may load a faster BLAS than the tests."""
    done = run_cli("mm1_mlx.lora", *flags(data, out, *more), env=UNCOMPILED)
    assert done.returncode == 0, done.stderr


def two(tmp_path, data, out, *more, **settings):
    command = ("-m", "mm1_mlx.lora", *flags(data, out, *more))
    return run_two(tmp_path, *command, **UNCOMPILED, **settings)


def arrays(out) -> dict[str, mx.array]:
    return dict(mx.load(str(out / "adapters.safetensors")))


def assert_adapters(out, other, tolerance: float) -> None:
    """Every array within `tolerance` of its largest number; lora_b begins with 0."""
    found, wanted = arrays(out), arrays(other)
    assert found.keys() == wanted.keys()
    for name in wanted:
        largest = mx.abs(wanted[name]).max().item()
        assert_close(found[name], wanted[name], atol=tolerance * largest, what=name)


def metrics_of(out) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# What a process has after one step from pairs that are not zero: its gradients.
_GRADIENTS = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mm1_mlx import load
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.processes import world
from mm1_mlx.training.conversations import open_train
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage

data, out, part, accumulate = sys.argv[1:]
model, processor = load("mm1-tiny")
pairs = Target(pairs=PairSettings(rank=4, scale=2.0))
adapt(model, Plan(parts={part: pairs, "connector": Target()}), 0)
mx.random.seed(1)
for name, array in tree_flatten(model.trainable_parameters()):
    if name.endswith("lora_b"):
        model.load_weights([(name, 0.02 * mx.random.normal(array.shape))], strict=False)
model.train()
settings = TuneSettings(steps=2, batch=8, accumulate=int(accumulate))
stage = TuneStage(model, processor, open_train(Path(data)), settings, seed=0)
trainer = Trainer(stage, Path(out), 0, {"recipe": {}})
rank, size = world().rank(), world().size()
batches, _ = stage.host_step(0, rank, size)
grads, metrics = trainer._gradients(model.trainable_parameters(), batches)
arrays = dict(tree_flatten(grads))
arrays |= {f"metric {name}": value for name, value in metrics.items()}
mx.save_safetensors(f"{out}/{rank}-of-{size}.safetensors", arrays)
"""


@pytest.mark.parametrize("part, accumulate", [("attention", 1), ("experts", 2)])
def test_gradients_are_those_of_the_doubled_batch(data, tmp_path, part, accumulate):
    """The issue's figure, 1e-6: the length of the difference over the gradients'."""
    script = ("-c", _GRADIENTS, data, tmp_path, part, str(accumulate))
    for end in run_two(tmp_path, *script, **UNCOMPILED):
        assert end.returncode == 0, end.stderr
    done = run_python(*script, env=UNCOMPILED)
    assert done.returncode == 0, done.stderr
    first, second, whole = (
        dict(mx.load(str(tmp_path / f"{name}.safetensors")))
        for name in ("0-of-2", "1-of-2", "0-of-1")
    )
    assert first.keys() == second.keys()
    differences, lengths = {}, {}
    for name, wanted in whole.items():
        assert_equal(first[name], second[name], name)  # metrics, too, are everyone's
        if name in ("metric balance", "metric z", "metric max_load"):
            continue  # not means over learned tokens
        if name.startswith("metric "):
            assert_close(first[name], wanted, atol=0, rtol=2e-6, what=name)
            continue
        lengths[name] = mx.linalg.norm(wanted).item()
        differences[name] = mx.linalg.norm(first[name] - wanted).item()
        # A norm's weight is a long sum: one array may lie further off than all do.
        assert differences[name] <= 5e-6 * lengths[name], name
    assert math.hypot(*differences.values()) <= 1e-6 * math.hypot(*lengths.values())


def test_twenty_steps_of_sgd_give_the_adapter_of_one_process(texts, tmp_path):
    """Through the command; the issue's figure is 1e-5. Progress and files once."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = [*SGD, "--steps-per-eval", 10, "--steps-per-report", 5]
    one(texts, alone, *more, "--iters", 20)
    first, second = two(tmp_path, texts, shared, *more, "--iters", 20)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert (
        first.stderr.count("tune 20/20") == 1 and second.stderr == second.stdout == ""
    )
    assert_adapters(shared, alone, 1e-5)
    found, wanted = metrics_of(shared), metrics_of(alone)
    assert [line["step"] for line in found] == list(range(1, 21))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["tokens"] == pytest.approx(sum_of_batch(texts, mine["step"]))
        assert mine.keys() == theirs.keys()
        for name in ("text", "accuracy", "norm", "valid"):
            wanted = pytest.approx(theirs.get(name, 0), rel=1e-4)
            assert mine.get(name, 0) == wanted, name


def sum_of_batch(data, step: int) -> float:
    """The learned tokens of a step's four samples."""
    from mm1_mlx import load
    from mm1_mlx.training.conversations import lesson_of, open_train
    from mm1_mlx.training.mixtures import Order

    samples, order = open_train(data), Order(16, 0)
    _, processor = load("mm1-tiny", lazy=True)
    numbers = [order[place] for place in range(4 * step - 4, 4 * step)]
    return sum(sum(lesson_of(samples[n], processor).learned) for n in numbers)


# --- Nobody waits for ever -----------------------------------------------------------


TIMES = 38  # so many samples that a plan looks at every third of them only


def with_line(data, folder, number: int, **changes) -> None:
    """The data, many times over, with one line changed."""
    shutil.copytree(data, folder)
    lines = (folder / "train.jsonl").read_text().splitlines() * TIMES
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def sample_of_second() -> tuple[int, int]:
    """A sample that only the second of two processes reads, in steps of four, and that
    no plan looks at; and its step."""
    from mm1_mlx.training.mixtures import Order

    order = Order(16 * TIMES, 0)
    found = [(order[4 * step + 2], step) for step in range(2, 8)]
    return next((number, step) for number, step in found if number % 3)


def test_a_sample_that_one_process_cannot_read_ends_both(data, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    number, step = sample_of_second()
    with_line(data, broken, number, image="broken.png")
    (broken / "broken.png").write_bytes(b"no picture")
    more = [*SGD, "--iters", 8, "--save-every", 8]
    first, second = two(tmp_path, broken, out, *more)
    assert_fails(first, rf"process 2 of 2 \(.+\): .*line {number + 1}: .*broken\.png")
    assert (second.returncode, second.stderr) == (1, "")
    facts = load_state(out / "tune.safetensors")[1]
    assert facts["step"] == step == len(metrics_of(out))  # what was done is saved


def test_a_valid_sample_that_one_process_cannot_read_ends_both(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    lines = (folder / "valid.jsonl").read_text().splitlines()
    lines[1] = "{}"
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n")
    more = [*SGD, "--iters", 4, "--steps-per-eval", 1]
    first, second = two(tmp_path, folder, tmp_path / "out", *more)
    assert_fails(first, r"valid\.jsonl, line 2: has the keys \[\]")
    assert (second.returncode, second.stderr) == (1, "")


def test_what_the_first_cannot_write_ends_both(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    first, second = two(tmp_path, data, out, *SGD, "--iters", 2)
    assert_fails(first, r"is no adapter folder")
    assert (second.returncode, second.stderr) == (1, "")


def wait_for_steps(out, process, count: int) -> None:
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(metrics_of(out)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no steps"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_stops_and_saves_both(data, tmp_path, number):
    """A lost terminal is how mlx.launch's Ctrl-C reaches another Mac."""
    out = tmp_path / "out"
    more = flags(data, out, *SGD, "--iters", 5000)
    processes = start_two(tmp_path, "-m", "mm1_mlx.lora", *more, **UNCOMPILED)
    wait_for_steps(out, processes[0], 2)
    processes[1].send_signal(number)
    first, second = ends_of(processes)
    assert (first.returncode, second.returncode) == (130, 130), first.stderr
    assert "the same command with --resume goes on from here" in first.stderr
    step = load_state(out / "tune.safetensors")[1]["step"]
    assert metrics_of(out)[-1]["step"] == step and arrays(out)


def test_a_process_that_was_killed_ends_the_other(texts, tmp_path):
    out = tmp_path / "out"
    more = flags(texts, out, *SGD, "--iters", 5000, "--save-every", 1)
    processes = start_two(tmp_path, "-m", "mm1_mlx.lora", *more, **UNCOMPILED)
    wait_for_steps(out, processes[0], 2)
    processes[1].send_signal(signal.SIGKILL)
    first, _ = ends_of(processes)
    assert first.returncode == 1
    assert "error: The processes of this run have lost each other" in first.stderr
    assert load_state(out / "tune.safetensors")[1]["step"] >= 1


# --- Two machines, and going on ------------------------------------------------------


def test_a_resumed_run_is_exact_though_only_the_first_has_files(texts, tmp_path):
    """Two folders stand for two Macs; the adapter's path is relative."""
    macs = (tmp_path / "mac1", tmp_path / "mac2")
    for mac in macs:
        mac.mkdir()
    adam = [*LEARN, "--dropout", "0.2", "--learning-rate", "1e-3", "--save-every", 2]
    adam += ["--iters", 6]
    for end in two(tmp_path, texts, "whole", *adam, cwd=macs):
        assert end.returncode == 0, end.stderr
    for more in (["--until", 3], ["--resume"]):
        first, second = two(tmp_path, texts, "parts", *adam, *more, cwd=macs)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "going on from step 3 of 6" in first.stderr and "begun" not in first.stderr
    for name in ("adapters.safetensors", "tune.safetensors"):
        whole, parts = (
            dict(mx.load(str(macs[0] / out / name))) for out in ("whole", "parts")
        )
        for key in whole:
            assert_equal(parts[key], whole[key], key)
    assert [line["step"] for line in metrics_of(macs[0] / "parts")] == [*range(1, 7)]
    assert not list(macs[1].iterdir())


def test_another_number_of_processes_goes_on_and_says_so(texts, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    more = [*SGD, "--iters", 6]
    one(texts, alone, *more)
    one(texts, shared, *more, "--until", 3)
    first, _ = two(tmp_path, texts, shared, *more, "--resume")
    assert first.returncode == 0, first.stderr
    assert "begun with 1 process, going on with 2: each step has the" in first.stderr
    assert_adapters(shared, alone, 1e-5)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--learning-rate", "0.5"], r"\(settings\.learning_rate: 0\.02, now 0\.5\)"),
        (["--save-every", "7"], r"\(save: 100, now 7\)"),
    ],
)
def test_processes_must_be_asked_for_the_same(data, tmp_path, more, message):
    command = ["-m", "mm1_mlx.lora", *flags(data, tmp_path / "out", *SGD)]
    first, second = run_two(tmp_path, *command, second=[*command, *more])
    assert_fails(first, r"process 2 of 2 .*not started as the first one " + message)
    assert (second.returncode, second.stderr) == (1, "")


def test_a_batch_that_does_not_divide(texts, tmp_path):
    command = ["-m", "mm1_mlx.lora", *flags(texts, tmp_path / "out", *SGD)]
    first, second = run_two(tmp_path, *command, "--batch-size", "3")
    assert_fails(
        first,
        r"The batch has 3 samples, but must be a multiple of 1 micro-batches times 2",
    )
    assert (second.returncode, second.stderr) == (1, "")


def test_both_end_where_the_memory_does_not_do(texts, tmp_path):
    """Before the first step: each tries small steps alone, and both choose the same."""
    command = ["-m", "mm1_mlx.lora", *flags(texts, tmp_path / "out", *SGD)]
    first, second = run_two(tmp_path, *command, "--memory-limit", "0.0115")
    assert_fails(first, r"but there are 11\.5 MB")
    assert (second.returncode, second.stderr) == (1, "")
    assert not (tmp_path / "out").exists()


def test_the_launcher_of_mlx_runs_the_command(texts, tmp_path):
    """As README.md says it; the launcher itself always exits with 0."""
    out = tmp_path / "out"
    launch = "from mlx._distributed_utils.launch import main; main()"
    port = str(free_ports(1)[0])
    command = ["-n", "2", "-p", port, "--", sys.executable, "-m", "mm1_mlx.lora"]
    done = run_python(
        *("-c", launch, *command, *flags(texts, out, *SGD, "--iters", 2)),
        env=UNCOMPILED,
        timeout=120,
    )
    assert "adapters" not in done.stderr and f"{out} after " in done.stdout
    assert len(metrics_of(out)) == 2 and "exited with" not in done.stderr
