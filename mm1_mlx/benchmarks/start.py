"""How long a user waits: the import, `--help`, and a whole cold answer.

Every time is that of a fresh process, from its start to its end. The machine's own
speed is taken out by a yardstick that runs in turn with the others: a Python that only
imports what any MLX program about pictures must import.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mm1_mlx.benchmarks.machine import machine, machine_lines
from mm1_mlx.errors import MM1Error

_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
YARDSTICK = "import mlx.core, mlx.nn, numpy, PIL, tokenizers"


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one command over several runs."""

    name: str
    command: str
    goal: float | None  # most times the yardstick
    median: float
    least: float
    most: float
    ratio: float  # median over the yardstick's median


def commands(picture: Path) -> list[tuple[str, list[str], float | None]]:
    """Name, arguments of Python, and goal of each measured command."""
    prompt = ["--image", str(picture), "--prompt", "What colour is the circle?"]
    return [
        ("yardstick", ["-c", YARDSTICK], None),
        ("import", ["-c", "import mm1_mlx"], None),
        ("help", ["-m", "mm1_mlx.generate", "--help"], 0.5),
        ("answer", ["-m", "mm1_mlx.generate", "--quiet", *prompt], 3.0),
    ]


def measure_start(
    runs: int = 5,
    *,
    progress: Callable[[int, int], None] | None = None,
    python: str = sys.executable,
) -> list[Timing]:
    """Time every command `runs` times, in turn, after one run that is not counted.

    progress: called with (rounds done, rounds in all). Raises MM1Error when a command
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "circle.png"
        draw_circle(picture)
        work = commands(picture)
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in work}
        for turn in range(runs + 1):
            for name, args, _ in work:
                took = _seconds([python, *args])
                if turn:  # the first round fills the disk's cache
                    seconds[name].append(took)
            if progress:
                progress(turn, runs)
    base = statistics.median(seconds["yardstick"])
    return [
        Timing(
            name=name,
            command=" ".join(["python", *args]).replace(str(picture), "circle.png"),
            goal=goal,
            median=statistics.median(seconds[name]),
            least=min(seconds[name]),
            most=max(seconds[name]),
            ratio=statistics.median(seconds[name]) / base,
        )
        for name, args, goal in work
    ]


def draw_circle(path: Path, colour: str = "#dc1e1e") -> None:
    """A circle on white, 256 x 256, as a PNG file."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((70, 60, 190, 180), fill=colour)
    picture.save(path)


def _seconds(command: list[str]) -> float:
    # A user's second run has its modules compiled; so have all runs here.
    environment = {k: v for k, v in os.environ.items() if k != _NO_BYTECODE}
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    took = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MM1Error(
            f"{' '.join(command)} failed with exit code {done.returncode}: {last}"
        )
    return took


def as_object(timings: list[Timing], runs: int) -> dict:
    """All of it for JSON: machine, settings, seconds, ratios, goals."""
    return {
        "machine": machine(),
        "runs": runs,
        "timings": [asdict(timing) for timing in timings],
    }


def as_table(timings: list[Timing], runs: int) -> str:
    """All of it as text, one line per command."""
    lines = [
        *machine_lines(),
        "",
        f"median of {runs} fresh processes each, run in turn; spread is least to most",
        f"{'':10} {'seconds':>8} {'spread':>15} {'ratio':>7} {'goal':>7}",
    ]
    for t in timings:
        spread = f"{t.least:.3f}-{t.most:.3f}"
        goal = f"<= {t.goal:g}" if t.goal else ""
        lines.append(
            f"{t.name:10} {t.median:8.3f} {spread:>15} {t.ratio:6.2f}x {goal:>7}"
        )
    lines += ["", *(f"{t.name}: {t.command}" for t in timings)]
    return "\n".join(lines)
