"""lora through its door: --config and --resume, wandb, pictures, the first process."""

import json
import re
import subprocess
import sys
import types

import pytest
from test_lora_command import data, flags, same_arrays  # noqa: F401
from test_two_processes import two_processes
from training_kit import planned_once, uncompiled

from helpers import ROOT, clean_environment, need
from mm1_mlx.lora import main

pytestmark = pytest.mark.usefixtures(planned_once.__name__, uncompiled.__name__)

LEFT = {
    *("adapters.safetensors", "adapter_config.json", "tune.safetensors"),
    *("metrics.jsonl", "run.json", "config.yaml"),
}


def metrics(folder) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_its_own_configuration(data, tmp_path, capsys):  # noqa: F811
    """As the flags say it, and what --resume with the saved file goes on with."""
    need("yaml")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--iters", 4, "--no-plot", "--train", "attention=2", "--train", "experts")
    assert main(flags(data, whole, *more, "--part-rate", "experts=0.5")) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"model: mm1-tiny\ndata: {data}\nadapter-path: {parts}\niters: 9\nplot: false\n"
        "batch_size: 4\nwarmup: 1\ntrain: {attention: 2, experts: }\n"
        "part_rate:\n  experts: 0.5\n"
    )
    assert main(["--config", str(file), "--iters", "4", "--until", "2"]) == 0
    assert len(metrics(parts)) == 2
    saved = parts / "config.yaml"
    assert main(["--config", str(saved), "--resume"]) == 0
    assert {p.name for p in parts.iterdir()} == LEFT
    assert same_arrays(whole / "tune.safetensors", parts / "tune.safetensors")
    first, second = (
        (f / "config.yaml").read_text().splitlines() for f in (whole, parts)
    )
    assert len(first) == len(second) > 20
    assert first[0].endswith(f"--config {whole / 'config.yaml'} --resume goes on")
    differ = [a for a, b in zip(first, second, strict=True) if a != b]
    assert [line.partition(":")[0] for line in differ[1:]] == ["adapter_path"]
    assert main(["--config", str(saved), "--resume", "--alpha", "2"]) == 1
    assert "was made with other settings" in capsys.readouterr().err


def test_pictures_and_answers(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    need("matplotlib")
    from mm1_mlx.training import plots

    drawn = []
    draw = plots.plot_curves
    monkeypatch.setattr(plots, "plot_curves", lambda f: drawn.append(draw(f)))
    out = tmp_path / "run"
    more = ("--iters", 4, "--steps-per-eval", 2, "--task-accuracy", 4)
    assert main(flags(data, out, *more, "--task-samples", 1)) == 0
    pictures = {"curves.png", "answers.png", "answers.json"}
    assert {p.name for p in out.iterdir()} == LEFT | pictures
    assert len(drawn) == 2  # at the first evaluation, and at the end
    told = capsys.readouterr().err
    assert " of 1 answers right" in told and "right " in told.split("tune 4/4")[1]
    assert "experts (▄ even" in told and "tokens/s (" in told
    assert [m["step"] for m in metrics(out) if "task_accuracy" in m] == [0, 4]
    assert [m["step"] for m in metrics(out) if "valid" in m] == [2, 4]
    assert [m["step"] for m in metrics(out) if "expert_load" in m] == [4]

    def broken(folder):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(plots, "plot_curves", broken)
    assert main(flags(data, tmp_path / "two", "--iters", 1)) == 0
    assert "no curves.png: no room" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_line(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mm1_mlx.cli.watching.find_spec", lambda name: None)
    assert main(flags(data, tmp_path / "run", "--iters", 1)) == 0
    assert "pip install 'mm1_mlx[train]'" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "run").iterdir()} == LEFT
    assert main(flags(data, tmp_path / "two", "--iters", 1, "--no-plot")) == 0
    assert "matplotlib" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task-accuracy", "0"], r"--task-accuracy: must be a whole number of 1"),
        (["--task-samples", "x"], r"--task-samples: must be a whole number of 1"),
        (["--wandb", ""], r"--wandb: must be a text of at least one character"),
        (["--scale", "0"], r"--scale: must be a number above 0"),
        (["--scale", "2", "--alpha", "2"], r"not allowed with argument --scale"),
        (["--scale", "2", "--rslora"], r"give --scale or --rslora, not both"),
    ],
)
def test_wrong_flags(data, tmp_path, capsys, more, message):  # noqa: F811
    try:
        code = main(flags(data, tmp_path / "run", *more))
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and re.search(message, capsys.readouterr().err)


def test_a_task_without_held_out_samples(data, tmp_path, capsys):  # noqa: F811
    for name in ("train.jsonl", *(f"{number}.png" for number in range(12))):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    assert main(flags(tmp_path, tmp_path / "run", "--task-accuracy", 1)) == 1
    assert "the data needs a valid.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- wandb ---------------------------------------------------------------------------


class FakeRun:
    """What wandb.init gives; keeps what it is told."""

    def __init__(self, settings: dict, fails: bool):
        self.settings, self.fails = settings, fails
        self.logged, self.defined, self.ended = [], [], None

    def define_metric(self, name, **more):
        self.defined.append((name, more))

    def log(self, values):
        if self.fails:
            raise OSError("the network\nis gone")
        self.logged.append(values)

    def finish(self, exit_code=None):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place."""
    module = types.ModuleType("wandb")
    module.runs, module.fails = [], False

    def init(**settings):
        if settings["project"] == "refused":
            raise RuntimeError("api_key not configured")
        module.runs.append(FakeRun(settings, module.fails))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_in_wandb_and_its_second_half(data, tmp_path, wandb):  # noqa: F811
    more = ("--iters", 4, "--steps-per-report", 2, "--steps-per-eval", 3, "--no-plot")
    out = tmp_path / "run"
    command = flags(data, out, *more, "--wandb", "mine", "--task-accuracy", 4)
    assert main([*command, "--until", "2"]) == 0
    assert main([*command, "--resume"]) == 0
    one, two = wandb.runs
    kept = json.loads((out / "run.json").read_text())["wandb"]
    assert kept == {"project": "mine", "id": one.settings["id"]}
    assert two.settings["id"] == one.settings["id"]
    assert one.settings["resume"] == "allow" and one.settings["name"] == "run"
    assert one.settings["dir"] == str(out)
    assert one.settings["config"]["iters"] == 4
    assert ("*", {"step_metric": "step"}) in one.defined
    assert [x["step"] for x in one.logged] == [2]
    assert [x["step"] for x in two.logged] == [3, 4]
    assert {"train/loss", "train/rate", "train/tokens_per_second"} <= set(one.logged[0])
    assert "valid/loss" in two.logged[0] and "valid/task_accuracy" in two.logged[1]
    assert 0 < two.logged[1]["experts/layer_1_most"] <= 1
    assert json.dumps(two.logged)  # plain numbers
    assert (one.ended, two.ended) == (0, 0)
    no_wandb = [w for w in command if w not in ("--wandb", "mine")]
    assert main([*no_wandb, "--resume"]) == 0  # the id stays for later
    assert json.loads((out / "run.json").read_text())["wandb"] == kept


def test_wandb_cannot_end_a_run(data, tmp_path, wandb, capsys):  # noqa: F811
    wandb.fails = True
    more = ("--iters", 2, "--steps-per-report", 1, "--no-plot")
    assert main(flags(data, tmp_path / "run", *more, "--wandb", "mine")) == 0
    told = capsys.readouterr().err
    assert told.count("wandb: the network is gone; no more is logged there") == 1
    assert main(flags(data, tmp_path / "no", *more, "--wandb", "refused")) == 1
    told = capsys.readouterr().err
    assert "wandb cannot start (api_key not configured). Run wandb login" in told


def test_wandb_that_is_not_installed(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(flags(data, tmp_path / "run", "--wandb", "mine")) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --wandb needs the package wandb: pip install wandb")
    assert told.count("\n") == 1 and not (tmp_path / "run").exists()


# --- Two processes -------------------------------------------------------------------

# Counts the files that this process opens to write in the run's folder.
_ONE_OF_TWO = """
import sys, os
folder = sys.argv[1]
def hook(event, args):
    ours = event == "open" and str(args[0]).startswith(folder)
    if ours and args[1] not in ("r", "rb"):
        print("wrote", os.path.basename(str(args[0])), flush=True)
sys.addaudithook(hook)
from mm1_mlx.lora import main
sys.exit(main(sys.argv[2:]))
"""


def test_the_first_of_two_processes_writes_and_tells(data, tmp_path):  # noqa: F811
    """Both ask their share of the samples, and the count is of both."""
    out = tmp_path / "run"
    more = ("--iters", 2, "--task-accuracy", 2, "--task-samples", 2, "--no-plot")
    command = [sys.executable, "-c", _ONE_OF_TWO, str(out), *flags(data, out, *more)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for settings in two_processes(tmp_path)
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert ends[1] == ("", "")
    assert "wrote metrics.jsonl" in ends[0][0] and "config.partial.yaml" in ends[0][0]
    assert metrics(out)[-1]["task_samples"] == 2
