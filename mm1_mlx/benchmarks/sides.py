"""Programs side by side: each run is a process of its own, and they run in turn."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mm1_mlx.errors import MM1Error

OURS = "mm1_mlx"
_FOLDER = Path(__file__).with_name("peers")
_OPENBLAS = "libopenblas.so.0"

Result = TypeVar("Result")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """A program to compare with. install: what pip needs in its environment."""

    package: str
    install: str

    def command(self, python: Path, subject: str) -> list[str]:
        """What starts its side of a subject."""
        file = f"{self.package.replace('-', '_')}_{subject}.py"
        return [str(python), str(_FOLDER / file)]


_VLM = 'mlx-vlm==0.7.10 "transformers==5.17.0" (and "mlx[cpu]" on Linux)'
PEERS = {
    peer.package: peer
    for peer in (
        Peer("mlx-vlm", _VLM),
        Peer("mlx-lm", 'mlx-lm==0.32.2 (and "mlx[cpu]" on Linux)'),
        Peer("transformers", "transformers torch pillow"),
    )
}


def our_command(subject: str) -> list[str]:
    """What starts our side of a subject."""
    return [sys.executable, "-m", f"mm1_mlx.benchmarks.{subject}_side"]


def peer_version(python: Path, package: str) -> str:
    """The version of a peer in a Python; MM1Error where there is none."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise MM1Error(
            f"--peer-python {python} cannot be run ({error.strerror}): give the Python "
            f"of an environment with {package}."
        ) from error
    if done.returncode:
        raise MM1Error(
            f"--peer-python {python} has no {package}. In an environment of its own: "
            f"pip install {PEERS[package].install}."
        )
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """Of every side's process: no network, and OpenBLAS for all alike.

    Our commands load OpenBLAS by themselves where it is installed (see cli.backend);
    other programs run on the reference BLAS of MLX's Linux wheel, many times slower.
    """
    values = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if sys.platform.startswith("linux") and "LD_PRELOAD" not in values:
        with suppress(OSError):  # not installed
            ctypes.CDLL(_OPENBLAS)
            values["LD_PRELOAD"] = _OPENBLAS
            values.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    return values


def libraries() -> dict[str, str]:
    """What MLX computes with in every side's process: device, and on Linux its BLAS."""
    import mlx.core as mx

    found = {"device": str(mx.default_device())}
    if sys.platform.startswith("linux"):
        preloaded = "openblas" in environment().get("LD_PRELOAD", "")
        found["blas"] = "OpenBLAS, preloaded for all" if preloaded else "MLX's own"
    return found


def run_side(name: str, command: list[str], task: Any) -> dict[str, Any]:
    """Run a side with its task (a dataclass); MM1Error says what it said last."""
    done = subprocess.run(
        [*command, json.dumps(asdict(task))],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MM1Error(f"{name}'s run failed with code {done.returncode}: {last}")
    return json.loads(lines[-1])


def in_turn(
    jobs: dict[str, Callable[[int], Result]],
    runs: int,
    what: str,
    tell: Tell,
) -> dict[str, list[Result]]:
    """Every job `runs` times; each is given the number of the round.

    Every other round goes backwards, so that a machine that grows slower or faster
    favours nobody.
    """
    done: dict[str, list[Result]] = {name: [] for name in jobs}
    for turn in range(runs):
        names = list(jobs) if turn % 2 == 0 else list(jobs)[::-1]
        for name in names:
            tell(f"{what}, round {turn + 1} of {runs}: {name}")
            done[name].append(jobs[name](turn))
    return done
