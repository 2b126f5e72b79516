"""What several test files share: comparing arrays, running commands, optional parts."""

import contextlib
import importlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
TINY = ROOT / "mm1_mlx" / "assets" / "mm1-tiny"

# What the outside may set and a test must not depend on.
_DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHONHOME")


def to_numpy(array: Any) -> np.ndarray:
    """An MLX, torch or NumPy array (or nested lists) as NumPy; 16-bit as float32."""
    module = type(array).__module__.partition(".")[0]
    if module == "mlx":
        import mlx.core as mx

        if array.dtype in (mx.bfloat16, mx.float16):
            array = array.astype(mx.float32)
        return np.array(array)
    if module == "torch":
        array = array.detach().cpu()
        return (array.float() if array.is_floating_point() else array).numpy()
    return np.asarray(array)


def _where(mask: np.ndarray) -> tuple[int, ...]:
    """The first place that is true."""
    return tuple(int(i) for i in np.unravel_index(np.argmax(mask), mask.shape))


def max_difference(actual: Any, expected: Any) -> float:
    """The largest absolute difference; shapes must be equal."""
    a, b = to_numpy(actual), to_numpy(expected)
    assert a.shape == b.shape, f"shapes differ: actual {a.shape}, expected {b.shape}"
    if a.size == 0:
        return 0.0
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))


def assert_close(
    actual: Any, expected: Any, *, atol: float, rtol: float = 0.0, what: str = "arrays"
) -> None:
    """Fail unless |actual - expected| <= atol + rtol * |expected| everywhere.

    Takes MLX, torch and NumPy arrays in any mix. Unequal shapes fail (no
    broadcasting), and so does a NaN or an infinity that only one side has.
    """
    __tracebackhide__ = True
    a, b = to_numpy(actual), to_numpy(expected)
    if a.shape != b.shape:
        pytest.fail(f"{what}: shapes differ: actual {a.shape}, expected {b.shape}")
    if a.size == 0:
        return
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        broken = ~same & ~(np.isfinite(a) & np.isfinite(b))
        if broken.any():
            i = _where(broken)
            pytest.fail(
                f"{what}: {int(broken.sum())} of {a.size} values are not finite on one "
                f"side; first at {i}: actual {a[i]}, expected {b[i]}"
            )
        difference = np.where(same, 0.0, np.abs(a - b))
        bound = np.where(same, 0.0, atol + rtol * np.abs(b))
    wrong = difference > bound
    if wrong.any():
        i = _where(difference == difference.max())
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {a.size} values differ (shape {a.shape}); "
            f"largest difference {difference.max():.3e} at {i}: actual {a[i]:.8g}, "
            f"expected {b[i]:.8g}; allowed atol {atol:g} + rtol {rtol:g}"
        )


def assert_equal(actual: Any, expected: Any, what: str = "arrays") -> None:
    """Fail unless both arrays have the same shape and exactly the same values."""
    __tracebackhide__ = True
    assert_close(actual, expected, atol=0.0, what=what)


def need(name: str, reason: str = "") -> types.ModuleType:
    """The module `name`, or a skip; a failure where CI promised to have it.

    Use it in place of pytest.importorskip: .ci/run sets MM1_REQUIRE_PARITY=1, so that
    a parity test can never be skipped there unseen.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"needs {name}{': ' + reason if reason else ''} ({error})"
    if os.environ.get("MM1_REQUIRE_PARITY") == "1":
        pytest.fail(f"MM1_REQUIRE_PARITY=1, but this test {message}", pytrace=False)
    pytest.skip(message, allow_module_level=True)


def needs(*names: str) -> pytest.MarkDecorator:
    """A mark that skips where a package is missing, without importing it.

    Not where MM1_REQUIRE_PARITY=1: there the test runs, and fails for want of it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    promised = os.environ.get("MM1_REQUIRE_PARITY") == "1"
    return pytest.mark.skipif(bool(missing) and not promised, reason=f"needs {missing}")


def need_tiny() -> Path:
    """The folder of the embedded model, or a skip while it is not built; CI fails."""
    if (TINY / "config.json").is_file():
        return TINY
    message = f"no embedded model at {TINY.relative_to(ROOT)}"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message, allow_module_level=True)


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment for a subprocess: this checkout first, nothing from outside."""
    kept = {k: v for k, v in os.environ.items() if k not in _DROPPED_VARIABLES}
    kept = {k: v for k, v in kept.items() if not k.startswith("MM1_")}
    kept |= {
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
        "NO_COLOR": "1",
    }
    return kept | extra


def run_python(
    *args: object,
    input: str | None = None,
    cwd: Path | str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run this Python with `args`; text in, text out. `env` adds to the clean one."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        input=input if input is not None else "",
        cwd=cwd or ROOT,
        env=clean_environment(**(env or {})),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


def run_cli(*args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m mm1_mlx ARGS` as a user would; see run_python for the settings.

    A first argument that starts with "mm1_mlx." is the module itself:
    run_cli("mm1_mlx.generate", "-p", "hi") is `python -m mm1_mlx.generate -p hi`.
    """
    if args and str(args[0]).startswith("mm1_mlx."):
        return run_python("-m", *args, **settings)
    return run_python("-m", "mm1_mlx", *args, **settings)


def run_here(
    *args: object,
    main: Callable[[list[str]], int] | None = None,
    input: str | None = None,
    cwd: Path | str | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """run_cli in this process: the same words, streams, exit code and environment.

    Where neither the start of a program nor its end is what is tested: a new Python
    imports for half a second. Every command has tests through run_cli, too. main: of
    another program than `python -m mm1_mlx`.
    """
    from unittest import mock

    from mm1_mlx.__main__ import main as ours

    words = [str(word) for word in args]
    if main is None:
        words[0] = words[0].removeprefix("mm1_mlx.")
    given = io.TextIOWrapper(io.BytesIO((input or "").encode()), "utf-8")
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)
    )
    with (
        mock.patch.dict(os.environ, clean_environment(**(env or {})), clear=True),
        mock.patch.object(sys, "stdin", given),
        contextlib.chdir(cwd or ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            code: Any = (main or ours)(words)
        except SystemExit as end:  # argparse's way
            code = end.code
    told = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(words, code or 0, *told)


def assert_fails(
    done: subprocess.CompletedProcess[str], *patterns: str, code: int = 1
) -> None:
    """A command failed as promised: its exit code, one line on stderr, no traceback.

    Each pattern (re.search) must be in that line. Notices before the error are allowed
    only if they are not errors themselves.
    """
    import re

    __tracebackhide__ = True
    report = f"\nexit {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}"
    assert done.returncode == code, f"expected exit code {code}{report}"
    assert "Traceback" not in done.stderr, f"a traceback reached the user{report}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, f"expected one line 'error: ...'{report}"
    assert done.stderr.splitlines()[-1] == errors[0], f"lines after the error{report}"
    for pattern in patterns:
        assert re.search(pattern, errors[0]), f"no {pattern!r} in the error{report}"


def heed_ctrl_c() -> None:
    """For Popen(preexec_fn=...): a runner in the background hands SIGINT down deaf."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def peak_bytes(function: Callable, *arrays: Any) -> int:
    """Most that MLX held, beside what it held before, while it evaluated a function.

    With a limit of no memory, so that MLX starts no operation before the one before it
    is done: how far it works ahead depends on what else the machine does.
    """
    import mlx.core as mx

    mx.eval(arrays, function(*arrays))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    limit = mx.set_memory_limit(0)
    try:
        mx.eval(function(*arrays))
    finally:
        mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before
