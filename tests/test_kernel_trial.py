"""The trial of each kernel before its first use: through the host harness, and with
stand-ins for kernels that are wrong, refused, or end the process."""

import os
import platform
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest

from helpers import ROOT, assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.benchmarks.kernels import Row, apply_choices
from mm1_mlx.errors import MM1Warning
from mm1_mlx.kernels import metal, trial
from mm1_mlx.kernels.cases import KERNELS, Case
from mm1_mlx.kernels.metal import chosen, user_choices

NAME = "stand"


@pytest.fixture(autouse=True)
def verdicts(tmp_path, monkeypatch):
    """A machine with Metal, where nothing was tried yet; gives what was found there."""
    monkeypatch.setenv("MM1_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MM1_MLX_SETTINGS", str(tmp_path / "settings.json"))
    monkeypatch.setattr(metal, "has_metal", lambda: True)
    restart()
    yield lambda: {
        file.name: file.read_text().strip()
        for file in (tmp_path / "cache").glob("kernels/*/*")
    }
    restart()


def restart() -> None:
    """As a new process: nothing is remembered but in files."""
    trial.proven.cache_clear()
    user_choices.cache_clear()


def stand(monkeypatch, off=0.0, fails: BaseException | None = None, used=True):
    """A kernel of that name; gives the list of its calls."""
    calls = []

    def work(x):
        if not chosen(NAME):
            return [x * 2]
        calls.append(x.shape)
        if fails is not None:
            raise fails
        names = metal._WATCHED.get()
        if used and names is not None:
            names.append(NAME)
        return [x * 2 + off]

    case = Case(NAME, "2 x 3", mx.float32, lambda: [mx.ones((2, 3))], work)
    monkeypatch.setitem(KERNELS, NAME, lambda small: iter([case]))
    return calls


@needs_host
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_right(verdicts, name):
    with host_kernels() as host, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(name)
    assert host.runs  # or it declined, and was compared with itself
    assert verdicts() == {name: "right"}


@needs_host
def test_a_kernel_with_a_bug_is_found(verdicts, monkeypatch):
    from mm1_mlx.kernels import add_norm

    for each in (add_norm._KERNEL, add_norm._KERNEL_WITH_BIAS):
        wrong = each.source.replace("sum / D", "sum / (D + 1)")
        assert wrong != each.source
        monkeypatch.setattr(each, "source", wrong)
        monkeypatch.setattr(each, "_built", None)  # and so what is built of it
        monkeypatch.setattr(each, "_maker", None)
    with host_kernels(), pytest.warns(MM1Warning, match="add_norm does not work on"):
        assert not chosen("add_norm")
    assert verdicts()["add_norm"].startswith("off by")


def test_a_kernel_is_tried_once(monkeypatch):
    calls = stand(monkeypatch)
    assert chosen(NAME) and chosen(NAME)
    restart()
    assert chosen(NAME)
    assert len(calls) == 1


def test_nothing_is_tried_that_is_not_wanted(verdicts, monkeypatch):
    calls = stand(monkeypatch)
    assert not chosen(NAME, default=False)
    metal.write_choices({NAME: False})
    assert not chosen(NAME)
    with metal.forced(NAME):
        assert chosen(NAME)
    assert not calls and not verdicts()


REFUSED = RuntimeError("[metal::Device] Unable to build\nprogram_source:7: error")
# MLX's own words where a pipeline has fewer threads than it is asked for.
LIMITED = ValueError(
    "Thread group size (512) is greater than the maximum allowed (448)"
)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"off": 0.1}, r"off by .* at 2 x 3"),
        ({"off": float("nan")}, "off by inf of the largest value"),
        ({"fails": REFUSED}, r"Unable to build program_source:7: error"),
        ({"fails": LIMITED}, r"Thread group size \(512\) is greater"),
        ({"used": False}, "it declined 2 x 3"),
    ],
)
def test_a_wrong_kernel_is_said_once_and_never_used(monkeypatch, wrong, said):
    calls = stand(monkeypatch, **wrong)
    with pytest.warns(
        MM1Warning, match=rf"kernel {NAME} does not work .*{said}.* remove .*{NAME}\."
    ):
        assert not chosen(NAME)
    restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not chosen(NAME)
    assert len(calls) == 1


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupt_says_nothing_of_the_kernel(verdicts, monkeypatch, stopped):
    stand(monkeypatch, fails=stopped)
    with pytest.raises(type(stopped)):
        chosen(NAME)
    assert not verdicts()
    stand(monkeypatch)
    assert chosen(NAME)


def test_other_versions_are_tried_again(verdicts, monkeypatch):
    stand(monkeypatch, off=0.1)
    with pytest.warns(MM1Warning):
        assert not chosen(NAME)
    restart()
    stand(monkeypatch)
    monkeypatch.setattr(trial, "_here", lambda: "another")
    assert chosen(NAME)


def test_a_better_kernel_is_tried_again(monkeypatch):
    """Where `benchmark kernels --apply` finds it right."""
    stand(monkeypatch, off=0.1)
    with pytest.warns(MM1Warning):
        assert not chosen(NAME)
    stand(monkeypatch)
    row = Row(NAME, "2 x 3", "float32", 0.0, 1e-5, 2e-6, 1e-6, (1e-6, 1e-6), 2.0)
    assert apply_choices([row]).endswith(f"{NAME} on.")
    assert chosen(NAME, default=False)


def ended_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_kernel_that_ended_one_process_is_tried_once_more(verdicts, monkeypatch):
    """It may have been killed, or its terminal closed."""
    calls = stand(monkeypatch)
    seen = []
    monkeypatch.setattr(
        trial, "_compared", lambda name: seen.append(verdicts()) or "right"
    )
    trial._write(NAME, f"tried by process {ended_process()} on {platform.node()}")
    assert chosen(NAME) and not calls
    assert seen[0][NAME].startswith("once more tried by process ")
    assert verdicts() == {NAME: "right"}


def test_a_kernel_that_ended_two_processes(verdicts, monkeypatch):
    calls = stand(monkeypatch)
    who = f"{ended_process()} on {platform.node()}"
    trial._write(NAME, f"once more tried by process {who}")
    with pytest.warns(MM1Warning, match="the process ended while it ran, twice"):
        assert not chosen(NAME)
    restart()
    assert not chosen(NAME) and not calls
    assert verdicts() == {NAME: "the process ended while it ran, twice"}


@pytest.mark.parametrize(
    "said",
    [
        "[malloc] Unable to allocate 10 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error",
    ],
)
def test_a_failure_of_the_moment_says_nothing_of_the_kernel(
    verdicts, monkeypatch, said
):
    stand(monkeypatch, fails=RuntimeError(said))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not chosen(NAME)
    assert not verdicts()
    restart()
    stand(monkeypatch)
    assert chosen(NAME)


@pytest.mark.parametrize("patience, tried", [(20, 0), (0.1, 1)])
@pytest.mark.parametrize("machine", [platform.node(), "another"])
def test_a_kernel_that_another_process_is_trying(monkeypatch, patience, tried, machine):
    """Its verdict is waited for; not for ever."""
    calls = stand(monkeypatch)
    monkeypatch.setattr(trial, "PATIENCE", patience)
    trial._write(NAME, f"tried by process {os.getppid()} on {machine}")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if patience > 1:
            trial._write(NAME, "right")

    monkeypatch.setattr(trial.time, "sleep", sleep)
    assert chosen(NAME)
    assert waited and len(calls) == tried


@pytest.mark.parametrize("text", ["", " \n", "\xff"])
def test_a_broken_file_is_written_anew(verdicts, monkeypatch, text):
    calls = stand(monkeypatch)
    file = trial._file(NAME)
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    assert chosen(NAME) and calls
    assert verdicts() == {NAME: "right"}  # and no draft is left


def test_a_file_that_cannot_be_written_costs_another_trial(tmp_path, monkeypatch):
    calls = stand(monkeypatch)
    (tmp_path / "cache").write_text("a file where a folder should be")
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
    calls = stand(monkeypatch)

    def work(x):
        assert chosen(NAME)
        return (x * mx.random.uniform()).sum()

    x = mx.array([1.0, 2.0])
    assert mx.grad(work)(x).shape == (2,)
    trial.forget(NAME)
    assert mx.compile(work, inputs=mx.random.state, outputs=mx.random.state)(x).item()
    assert len(calls) == 2


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
    assert run.stderr.startswith("warning: ours\n")
    assert "UserWarning: theirs" in run.stderr
