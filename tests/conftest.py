"""Settings of the whole test run: markers, the start state of every test."""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from mm1_mlx.cli.backend import require_mlx
from mm1_mlx.errors import MM1Error

# No test may reach a hub; tests/ sets it before anything can import a client.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# An M5 and CUDA multiply float32 with a mantissa of 10 bits unless this says no, which
# no float32 tolerance here allows for (github.com/ml-explore/mlx/issues/3860). MLX
# reads it at its first product.
os.environ["MLX_ENABLE_TF32"] = "0"


def pytest_configure():
    """Multiply with what the commands multiply with: OpenBLAS, where it is installed.

    Before any test imports MLX; the wheel's own product takes up to 20 times as long.
    MM1_WHEEL_PRODUCT=1 tests with that one, as a machine without OpenBLAS has it.
    """
    if os.environ.get("MM1_WHEEL_PRODUCT") == "1":
        return
    # What it sets for OpenBLAS is read at once, and not for the commands of the tests.
    with suppress(MM1Error), mock.patch.dict(os.environ):  # no MLX: the tests say so
        require_mlx()


def _has_metal() -> bool:
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return False
    import mlx.core as mx

    return mx.metal.is_available()


def pytest_collection_modifyitems(config, items):
    """Skip what this machine cannot run, unless it was asked for by name."""
    skips = {}
    if not _has_metal():
        skips["metal"] = "needs an Apple GPU"
    if not os.environ.get("MM1_WEIGHTS"):
        skips["weights"] = "needs MM1_WEIGHTS, a folder with downloaded weights"
    for item in items:
        for marker, reason in skips.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, the tests of a file run in one process, as they share its fixtures."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files with few tests are often the longest
    return LoadFileScheduling(config, log)


_skipped: dict[str, None] = {}  # names of tests and of whole files, in order


def _note(report):
    if report.skipped:
        _skipped[report.nodeid] = None


pytest_runtest_logreport = pytest_collectreport = _note


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a process of `-n` has skipped: xdist itself tells of a reason only once."""
    _skipped.update(dict.fromkeys(getattr(node, "workeroutput", {}).get("skipped", ())))


def pytest_sessionfinish(session):
    """Leave what was skipped in the file $MM1_SKIPPED: `pytest @FILE` runs it again."""
    if hasattr(session.config, "workeroutput"):  # of one process of several
        session.config.workeroutput["skipped"] = list(_skipped)
    elif file := os.environ.get("MM1_SKIPPED"):
        text = "".join(f"{name}\n" for name in _skipped)
        Path(file).write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def _same_start_for_every_test(request):
    """Each test starts with fixed seeds, and must leave MLX's device as it was."""
    import random

    import mlx.core as mx
    import numpy as np

    device = mx.default_device()
    random.seed(0)
    np.random.seed(0)
    mx.random.seed(0)
    yield
    left = mx.default_device()
    if left != device:
        mx.set_default_device(device)
        pytest.fail(f"the test left the default device at {left}, it was {device}")


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    """A small random model; a file that needs another overrides it."""
    from small import small_model

    return small_model()


@pytest.fixture
def processor():
    """A processor without files: ids in, ids out; see small.py."""
    from small import SmallProcessor

    return SmallProcessor()


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The files of a run, importable here too; gives the arguments of pretrain()."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub_data", raising=False)

    def make(**changes):
        from training_kit import write_run

        write_run(tmp_path, **changes)
        return (
            tmp_path / "recipe.json",
            tmp_path / "run",
            tmp_path / "tokenizer.model",
        )

    yield make
    sys.modules.pop("stub_data", None)


@pytest.fixture
def chat(monkeypatch, capsys):
    """A chat in this process, its lines as through a pipe."""
    import io
    import warnings
    from types import SimpleNamespace

    from helpers import need_tiny
    from mm1_mlx.chat import main

    need_tiny()

    def talk(*lines: object, flags: tuple = ()):
        text = "".join(f"{line}\n" for line in lines)
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with warnings.catch_warnings():
            code = main([str(flag) for flag in flags])
        out, error = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=error)

    return talk
