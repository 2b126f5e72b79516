"""The trial of each kernel before its first use: through the host harness, and with
stand-ins for kernels that are wrong, refused, or end the process."""

import json
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest

from helpers import ROOT, assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.errors import MM1Warning
from mm1_mlx.kernels import metal, trial
from mm1_mlx.kernels.cases import KERNELS, Case
from mm1_mlx.kernels.metal import chosen, user_choices

NAME = "stand"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """One with Metal, where nothing was tried yet; gives the file of verdicts."""
    monkeypatch.setenv("MM1_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MM1_MLX_SETTINGS", str(tmp_path / "settings.json"))
    monkeypatch.setattr(metal, "has_metal", lambda: True)
    restart()
    yield tmp_path / "cache" / "kernels.json"
    restart()


def restart() -> None:
    """As a new process: nothing is remembered but in files."""
    trial.proven.cache_clear()
    user_choices.cache_clear()


def stand(monkeypatch, off=0.0, refuse=""):
    """A kernel of that name; gives the list of its calls."""
    calls = []

    def work(x):
        if not chosen(NAME):
            return [x * 2]
        calls.append(x.shape)
        if refuse:
            raise RuntimeError(refuse)
        metal._WATCHED.get().append(NAME)
        return [x * 2 + off]

    case = Case(NAME, "2 x 3", mx.float32, lambda: [mx.ones((2, 3))], work)
    monkeypatch.setitem(KERNELS, NAME, lambda small: iter([case]))
    return calls


@needs_host
@pytest.mark.parametrize("name", ["router", "add_norm"])
def test_a_kernel_is_tried_and_right(machine, name):
    with host_kernels(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(name)
    (verdicts,) = json.loads(machine.read_text()).values()
    assert verdicts == {name: "right"}


@needs_host
def test_a_kernel_with_a_bug_is_found(monkeypatch):
    from mm1_mlx.kernels import add_norm

    for each in (add_norm._KERNEL, add_norm._KERNEL_WITH_BIAS):
        wrong = each.source.replace("sum / D", "sum / (D + 1)")
        assert wrong != each.source
        monkeypatch.setattr(each, "source", wrong)
        monkeypatch.setattr(each, "_built", None)  # and so what is built of it
        monkeypatch.setattr(each, "_maker", None)
    with host_kernels(), pytest.warns(MM1Warning, match="add_norm does not work on"):
        assert not chosen("add_norm")


def test_a_kernel_is_tried_once(machine, monkeypatch):
    calls = stand(monkeypatch)
    assert chosen(NAME) and chosen(NAME)
    restart()
    assert chosen(NAME)
    assert len(calls) == 1


def test_nothing_is_tried_that_is_not_wanted(machine, monkeypatch):
    calls = stand(monkeypatch)
    assert not chosen(NAME, default=False)
    metal.write_choices({NAME: False})
    assert not chosen(NAME)
    with metal.forced(NAME):
        assert chosen(NAME)
    assert not calls and not machine.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"off": 0.1}, r"off by .* at 2 x 3"),
        ({"off": float("nan")}, "off by inf of the largest value"),
        (
            {"refuse": "[metal::Device] Unable to build\nprogram_source:7: error"},
            r"Unable to build program_source:7: error",
        ),
    ],
)
def test_a_wrong_kernel_is_said_once_and_never_used(machine, monkeypatch, wrong, said):
    calls = stand(monkeypatch, **wrong)
    with pytest.warns(MM1Warning, match=f"kernel {NAME} does not work .*{said}"):
        assert not chosen(NAME)
    restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not chosen(NAME)
    assert len(calls) == 1


def test_other_versions_are_tried_again(machine, monkeypatch):
    calls = stand(monkeypatch, off=0.1)
    with pytest.warns(MM1Warning):
        assert not chosen(NAME)
    restart()
    calls = stand(monkeypatch)
    monkeypatch.setattr(trial, "_here", lambda: "another")
    assert chosen(NAME) and calls
    assert json.loads(machine.read_text()) == {"another": {NAME: "right"}}


def test_a_kernel_that_ended_the_process(machine, monkeypatch):
    calls = stand(monkeypatch)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    trial._write(NAME, f"tried by process {ended.pid}")
    with pytest.warns(MM1Warning, match="the process ended while it ran"):
        assert not chosen(NAME)
    restart()
    assert not chosen(NAME) and not calls


def test_a_kernel_that_another_process_is_trying(machine, monkeypatch):
    calls = stand(monkeypatch)
    trial._write(NAME, f"tried by process {os.getppid()}")
    before = machine.read_bytes()
    assert not chosen(NAME)
    assert not calls and machine.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"x": 1}', "\xff"])
def test_a_broken_file_is_written_anew(machine, monkeypatch, text):
    calls = stand(monkeypatch)
    machine.parent.mkdir()
    machine.write_bytes(text.encode("latin-1"))
    assert chosen(NAME) and calls
    (verdicts,) = json.loads(machine.read_text()).values()
    assert verdicts == {NAME: "right"}
    assert os.listdir(machine.parent) == ["kernels.json"]  # no draft is left


def test_a_file_that_cannot_be_written_costs_another_trial(machine, monkeypatch):
    calls = stand(monkeypatch)
    machine.parent.write_text("a file where a folder should be")
    for _ in range(2):
        restart()
        assert chosen(NAME)
    assert len(calls) == 2


@needs_host
def test_the_user_s_random_numbers_go_on():
    mx.random.seed(3)
    expected = mx.random.normal((4,))
    mx.random.seed(3)
    with host_kernels():
        assert chosen("router")
    assert_equal(mx.random.normal((4,)), expected)


def test_in_the_middle_of_a_trace(monkeypatch):
    """A model asks first while mx.compile or mx.grad is looking on."""
    stand(monkeypatch)

    def work(x):
        assert chosen(NAME)
        return (x * mx.random.uniform()).sum()

    x = mx.array([1.0, 2.0])
    assert mx.grad(work)(x).shape == (2,)
    restart()
    stand(monkeypatch, off=0.0)
    os.remove(trial.trial_file())
    assert mx.compile(work, inputs=mx.random.state, outputs=mx.random.state)(x).item()


def test_a_command_says_it_in_one_line():
    code = (
        "import sys, warnings; from mm1_mlx.cli.run import _show_warning as show\n"
        "from mm1_mlx.errors import MM1Warning\n"
        "warnings.showwarning = show\n"
        "warnings.warn('ours', MM1Warning); warnings.warn('theirs')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (
        run.stderr.startswith("warning: ours\n") and "UserWarning: theirs" in run.stderr
    )
