"""Each Metal kernel beside its definition, once on every machine, before its first use.

Compilers and GPUs differ, and nobody has run every kernel on each of them. What was
found is kept for the next start, and found again when the kernels, MLX, the system or
the GPU are others than then.
"""

import os
import platform
import time
import warnings
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Lock

import mlx.core as mx

from mm1_mlx.errors import MM1Warning
from mm1_mlx.kernels.cases import KERNELS, bound, difference
from mm1_mlx.kernels.metal import forced, watched

RIGHT = "right"
PATIENCE = 20  # seconds for another process that tries the same kernel
_TRYING = "tried by process "
_AGAIN = "once more "
# What MLX says where memory or the GPU failed meanwhile: it tells nothing of a kernel.
_PASSING = ("memory", "malloc", "command buffer", "timeout")
_ONE_AT_A_TIME = Lock()


@cache
def proven(name: str) -> bool:
    """Whether a kernel gives here what its definition gives; warns where not.

    Tried at the first call: some ten variants are compiled, once. Where two processes
    have ended in the midst of it, the kernel counts as wrong from then on.
    """
    with _ONE_AT_A_TIME:
        found = _verdict(name)
        if found.startswith(_AGAIN):
            found = "the process ended while it ran, twice"
            _write(name, found)
            _warn(name, found)
        elif not found or found.startswith(_TRYING):
            found = _tried(name, _AGAIN if found else "")
        return found == RIGHT


def forget(*names: str) -> None:
    """Try these kernels again at their next use."""
    for name in names:
        with suppress(OSError):
            _file(name).unlink()
    proven.cache_clear()


def _verdict(name: str) -> str:
    """What is known of a kernel, if need be after another process has tried it."""
    until = time.monotonic() + PATIENCE
    while True:
        found = _read(name)
        _, trying, who = found.partition(_TRYING)
        if not trying or not _runs(who):
            return found
        if time.monotonic() > until:
            return ""  # it hangs, or its number is another process's by now
        time.sleep(0.05)


def _tried(name: str, before: str) -> str:
    """Try it, and keep what comes out of it."""
    try:
        _write(name, f"{before}{_TRYING}{os.getpid()} on {platform.node()}")
        found = _compared(name)
    except BaseException:  # an interrupt: nothing is known of the kernel
        forget(name)
        raise
    if any(word in found.lower() for word in _PASSING):
        forget(name)  # not used by this process; the next one tries again
        return found
    _write(name, found)
    if found != RIGHT:
        _warn(name, found)
    return found


def _compared(name: str) -> str:
    """RIGHT, or what is wrong."""
    for case in KERNELS[name](True):
        arrays = case.make()
        try:
            with forced():
                expected = list(case.work(*arrays))
                mx.eval(expected)
            with forced(name), watched() as used:
                found = list(case.work(*arrays))
                mx.eval(found)
        except (RuntimeError, ValueError) as error:  # Metal's compiler, a GPU's limit
            return " ".join(str(error).split())[:200]
        if not used:
            return f"it declined {case.shape}"
        if (error := difference(found, expected)) > bound(case.dtype):
            return f"off by {error:.1e} of the largest value at {case.shape}"
    return RIGHT


def _warn(name: str, why: str) -> None:
    warnings.warn(
        f"The kernel {name} does not work on this machine ({why}): its definition is "
        f"used, which gives the same. Please report it, with what `python -m "
        f"mm1_mlx.benchmark kernels` prints. To try it again, remove {_file(name)}.",
        MM1Warning,
        stacklevel=3,
    )


def _file(name: str) -> Path:
    """Where a verdict is kept: in $MM1_MLX_CACHE, else the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("MM1_MLX_CACHE") or Path(base) / "mm1_mlx"
    return Path(folder).expanduser() / "kernels" / _here() / name


@cache
def _here() -> str:
    """Another text for other kernels, MLX, system or GPU."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    mlx: str = mx.__version__  # type: ignore[attr-defined]
    facts = [platform.platform(), str(mx.device_info()), mlx]
    text = "\0".join([*facts, *(file.read_text("utf-8") for file in sources)])
    return sha256(text.encode()).hexdigest()[:16]


def _read(name: str) -> str:
    with suppress(OSError, ValueError):
        return _file(name).read_text("utf-8").strip()
    return ""


def _write(name: str, verdict: str) -> None:
    """Keep a verdict. Where it cannot be written, the next start tries again."""
    file = _file(name)
    draft = file.with_name(f"{name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(f"{verdict}\n", encoding="utf-8")
        os.replace(draft, file)


def _runs(who: str) -> bool:
    """Whether another process of that number is running, so far as can be known."""
    process, _, machine = who.partition(" on ")
    if machine != platform.node():
        return True  # of a home that machines share
    try:
        number = int(process)
        os.kill(number, 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:  # it is someone else's
        return True
    return number != os.getpid()
