"""Each Metal kernel beside its definition, once on every machine, before its first use.

Compilers and GPUs differ, and nobody has run every kernel on each of them. What was
found is kept for the next start, and found again when the kernels, MLX, the system or
the GPU are others than then.
"""

import json
import os
import platform
import warnings
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import mlx.core as mx

from mm1_mlx.errors import MM1Warning
from mm1_mlx.kernels.cases import KERNELS, bound, difference
from mm1_mlx.kernels.metal import forced, watched

RIGHT = "right"
_TRYING = "tried by process "
_ONE_AT_A_TIME = Lock()


@cache
def proven(name: str) -> bool:
    """Whether a kernel gives here what its definition gives; warns where not.

    Tried at the first call, in about the time that Metal needs to compile it. A kernel
    that ends the process counts as wrong from the next start on.
    """
    with _ONE_AT_A_TIME:
        return _proven(name)


def _proven(name: str) -> bool:
    if (found := _read().get(name, "")) == RIGHT:
        return True
    if found.startswith(_TRYING):
        if _runs(found.removeprefix(_TRYING)):
            return False  # nothing is known yet: not used this time
        found = _failed(name, "the process ended while it ran")
    elif not found:
        _write(name, f"{_TRYING}{os.getpid()}")
        if (found := _try(name)) != RIGHT:
            found = _failed(name, found)
    else:
        return False  # said when it was found
    _write(name, found)
    return found == RIGHT


def _try(name: str) -> str:
    """RIGHT, or what is wrong."""
    try:
        for case in KERNELS[name](True):
            arrays = case.make()
            with forced():
                expected = list(case.work(*arrays))
                mx.eval(expected)
            with forced(name), watched() as used:
                found = list(case.work(*arrays))
                mx.eval(found)
            error = difference(found, expected)
            if used and error > bound(case.dtype):
                return f"off by {error:.1e} of the largest value at {case.shape}"
    except RuntimeError as error:  # of Metal's compiler, or a limit of the GPU
        return " ".join(str(error).split())[:200]
    return RIGHT


def _failed(name: str, why: str) -> str:
    warnings.warn(
        f"The kernel {name} does not work on this machine ({why}): its definition is "
        f"used, which gives the same. Please report it, with what "
        f"`python -m mm1_mlx.benchmark kernels` prints.",
        MM1Warning,
        stacklevel=2,
    )
    return why


def trial_file() -> Path:
    """Where it is kept: in $MM1_MLX_CACHE, else the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("MM1_MLX_CACHE") or Path(base) / "mm1_mlx"
    return Path(folder).expanduser() / "kernels.json"


@cache
def _here() -> str:
    """Another text for other kernels, MLX, system or GPU."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    facts = [platform.platform(), version("mlx"), str(mx.device_info())]
    text = "\0".join([*facts, *(file.read_text("utf-8") for file in sources)])
    return sha256(text.encode()).hexdigest()[:16]


def _read() -> dict[str, str]:
    """What is known of the kernels here; nothing, where the file is none of ours."""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads(trial_file().read_text("utf-8")).get(_here(), {})
        return {name: each for name, each in found.items() if isinstance(each, str)}
    return {}


def _write(name: str, verdict: str) -> None:
    """Add what is known of one; of other machines and versions nothing is kept.

    Where it cannot be written, the next start tries again.
    """
    file = trial_file()
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({_here(): {**_read(), name: verdict}}, indent=2)
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, file)


def _runs(process: str) -> bool:
    """Whether another process of that number is running."""
    try:
        number = int(process)
        os.kill(number, 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:  # it is someone else's
        return True
    return number != os.getpid()
