"""From nothing to the first token in a fresh process, beside mlx-vlm's command."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.benchmarks.figures import Goal, Spread, pair_ratios
from mm1_mlx.benchmarks.machine import machine, machine_lines
from mm1_mlx.benchmarks.random_llava import Shape, write_llava
from mm1_mlx.benchmarks.sides import (
    OURS,
    Tell,
    environment,
    in_turn,
    libraries,
    peer_version,
)
from mm1_mlx.benchmarks.start import draw_circle
from mm1_mlx.errors import MM1Error

GOAL = Goal(0.25, at_most=True)
PEER = "mlx-vlm"
_SMALL = Shape(
    image_size=56,
    vision_width=64,
    vision_layers=2,
    width=128,
    hidden=256,
    layers=2,
    head_size=32,
    vocabulary=1024,
)
# what: the model, and whether it is shown a picture. The large one is asked a few words
# alone, since reading 576 image tokens would hide how it starts.
CASES = {"small, a picture": (_SMALL, True), "207M, a text": (Shape(), False)}


@dataclass(frozen=True)
class Start:
    """Wall seconds of whole processes that answer one token; ratio: of pairs."""

    what: str
    seconds: dict[str, Spread]
    ratio: Spread


def measure_cold_start(
    folder: Path,
    python: Path,
    runs: int,
    *,
    cases: dict[str, tuple[Shape, bool]] | None = None,
    tell: Tell = lambda line: None,
) -> list[Start]:
    """Both commands in turn, after a round that is not counted; 2 GB in `folder`.

    python: of an environment with mlx-vlm. Raises MM1Error where a command fails.
    """
    peer_version(python, PEER)
    picture = folder / "circle.png"
    draw_circle(picture)
    starts = []
    for number, (what, (shape, shown)) in enumerate((cases or CASES).items()):
        place = folder / str(number)
        tell(f"writing a LLaVA of random weights ({what})")
        write_llava(place, shape)
        more = ["--prompt", "What is it?", "--max-tokens", "1"]
        more += ["--image", str(picture)] if shown else []
        ours = [sys.executable, "-m", "mm1_mlx.generate", "--quiet"]
        theirs = [str(python), "-m", "mlx_vlm.generate", "--temperature", "0"]
        commands = {
            OURS: [*ours, "--model", str(place / "ours"), *more],
            PEER: [*theirs, "--model", str(place / "mlx-vlm"), *more],
        }
        jobs = {name: _job(name, command) for name, command in commands.items()}
        found = in_turn(jobs, runs + 1, what, tell)
        found = {name: seconds[1:] for name, seconds in found.items()}
        starts.append(
            Start(
                what,
                {name: Spread.of(seconds) for name, seconds in found.items()},
                pair_ratios(found[OURS], found[PEER]),
            )
        )
    return starts


def _job(name: str, command: list[str]) -> Callable[[int], float]:
    """Seconds of the command, from its start to its end."""

    def run(turn: int) -> float:
        start = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment()
        )
        took = time.perf_counter() - start
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MM1Error(f"{name} failed with code {done.returncode}: {last}")
        return took

    return run


def as_object(starts: list[Start], runs: int, version: str) -> dict[str, Any]:
    """All of it for JSON."""
    met = [GOAL.met(start.ratio.median) for start in starts]
    return {
        "machine": machine() | libraries() | {PEER: version},
        "runs": runs,
        "goal": asdict(GOAL),
        "starts": [
            asdict(start) | {"met": good}
            for start, good in zip(starts, met, strict=True)
        ],
    }


def as_table(starts: list[Start], runs: int, version: str) -> str:
    """All of it as text."""
    lines = [
        *machine_lines(libraries() | {PEER: version}),
        "",
        f"seconds of a whole process that answers one token: median (least-most) of "
        f"{runs}, in turn",
        f"{'':18} {OURS:>20} {PEER:>20} {'ratio':>20}  goal",
    ]
    for start in starts:
        texts = [start.seconds[name].text() for name in (OURS, PEER)]
        texts.append(start.ratio.text())
        shown = " ".join(f"{text:>20}" for text in texts)
        lines.append(f"{start.what:18} {shown}  {GOAL.text(start.ratio.median)}")
    return "\n".join(lines)
