"""What a step of fine-tuning takes: beside mlx-vlm's trainer, or beside our own ways.

Every run is a process of its own, and the ways run in turn, several times, so that what
else the machine does falls on all of them. The model has random weights; both programs
read the same ones, and are shown to have the same tokens and the same loss.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mm1_mlx.benchmarks.machine import machine, machine_lines
from mm1_mlx.benchmarks.random_llava import (
    Shape,
    write_llava,
    write_pictures,
    write_texts,
)
from mm1_mlx.benchmarks.sides import (
    OURS,
    PEERS,
    Tell,
    in_turn,
    our_command,
    peer_version,
    run_side,
)
from mm1_mlx.benchmarks.train_side import Side, Task

TIME_GOAL, MEMORY_GOAL = 0.8, 0.6  # most of mlx-vlm's
WARM = 1  # updates that are not counted: kernels are compiled, pictures cached
COUNTED = 2  # updates of each run that are
AFTER = 1  # the last: ours computes a loss once more before it saves, theirs does not
_SAMPLES = 4
_PEER = "mlx-vlm"
# Micro-batches hold one sample: mlx-vlm 0.7.10 fails with two.
_SETTINGS: dict[str, dict[str, Any]] = {
    "1": {},
    "4 x 1": {"accumulate": 4},
    "1, recomputed": {"recompute": True},
}


@dataclass(frozen=True)
class Row:
    """One way to train, and what an update took.

    seconds, cpu: medians over all runs, cpu of all threads together; least, most: of
    the seconds. peak: most bytes that MLX held; process: most bytes of the process,
    loading included. loss: of the first update. The ratios are to the row that `beside`
    names, which has 1.
    """

    name: str
    setting: str
    beside: str
    seconds: float
    least: float
    most: float
    cpu: float
    peak: int
    process: int
    loss: float
    time_ratio: float = 1.0
    cpu_ratio: float = 1.0
    peak_ratio: float = 1.0


@dataclass(frozen=True)
class Evidence:
    """Whether two programs train the same: tokens, and losses before training."""

    parameters: int
    trained: tuple[int, int]
    tokens: list[int]
    learned: list[int]
    same_tokens: bool
    ours: float
    theirs: float
    theirs_causal: float
    versions: dict[str, str]


def measure_against_peer(
    folder: Path,
    python: Path,
    runs: int,
    *,
    shape: Shape | None = None,
    tell: Tell = lambda line: None,
) -> tuple[list[Row], Evidence]:
    """Both programs in turn: one micro-batch in an update, four, and one with gradient
    checkpointing.

    folder: where to work, 2 GB. python: of an environment with mlx-vlm. Raises MM1Error
    where a run fails.
    """
    peer_version(python, _PEER)
    shape = shape or Shape()
    tell("writing a LLaVA of random weights")
    parameters = write_llava(folder, shape)
    data = folder / "data"
    write_pictures(data, _SAMPLES, shape.image_size)
    sides = {
        OURS: our_command("train"),
        _PEER: PEERS[_PEER].command(python, "train"),
    }
    models = {OURS: folder / "ours", _PEER: folder / _PEER}
    rows, found = [], {}
    for what, settings in _SETTINGS.items():
        jobs = {
            name: (command, _task(folder, models[name], data, **settings))
            for name, command in sides.items()
        }
        done = _in_turn(jobs, runs, what, tell, evidence=not found)
        found = found or {name: sides[0] for name, sides in done.items()}
        rows += _with_ratios([_row(n, what, _PEER, s) for n, s in done.items()])
    return rows, _evidence(parameters, found[OURS], found[_PEER])


def measure_alternatives(
    folder: Path,
    runs: int,
    *,
    shape: Shape | None = None,
    tell: Tell = lambda line: None,
) -> list[Row]:
    """Ours alone: the same 8 texts in an update, padded, packed, and with logits of
    the whole vocabulary at once. Raises MM1Error where a run fails."""
    shape = shape or Shape()
    tell("writing a LLaVA of random weights")
    write_llava(folder, shape, peer=False)
    data = folder / "texts"
    write_texts(data, 8)
    usual = _task(folder, folder / "ours", data, batch=8)
    ways = {
        "padded": usual,
        "packed": replace(usual, settings={"pack": True, "max_tokens": 1024}),
        "whole logits": replace(usual, settings={"chunk": shape.vocabulary}),
        "recomputed": replace(usual, recompute=True),
    }
    jobs = {name: (our_command("train"), task) for name, task in ways.items()}
    done = _in_turn(jobs, runs, "8 texts", tell)
    return _with_ratios([_row(n, "8 texts", "padded", s) for n, s in done.items()])


def _task(folder: Path, model: Path, data: Path, **settings: Any) -> Task:
    return Task(
        model=str(model),
        data=str(data),
        out=str(folder / "adapter"),
        updates=WARM + COUNTED + AFTER,
        **settings,
    )


def _in_turn(
    jobs: dict[str, tuple[list[str], Task]],
    runs: int,
    what: str,
    tell: Tell,
    *,
    evidence: bool = False,
) -> dict[str, list[Side]]:
    """Every job `runs` times. The first round also gives evidence, where asked."""

    def work(name: str) -> Callable[[int], Side]:
        command, task = jobs[name]
        return lambda turn: _run(
            name, command, replace(task, evidence=evidence and turn == 0)
        )

    return in_turn({name: work(name) for name in jobs}, runs, what, tell)


def _run(name: str, command: list[str], task: Task) -> Side:
    """One process; MM1Error says what it said last where it fails."""
    out = Path(task.out)
    for file in out.glob("*") if out.is_dir() else ():
        file.unlink()
    return Side(**run_side(name, command, task))


def _row(name: str, setting: str, beside: str, sides: list[Side]) -> Row:
    counted = slice(WARM, WARM + COUNTED)
    seconds = [x for side in sides for x in side.seconds[counted]]
    return Row(
        name=name,
        setting=setting,
        beside=beside,
        seconds=statistics.median(seconds),
        least=min(seconds),
        most=max(seconds),
        cpu=statistics.median(x for side in sides for x in side.cpu[counted]),
        peak=round(statistics.median(side.peak for side in sides)),
        process=round(statistics.median(side.process for side in sides)),
        loss=sides[0].losses[0],
    )


def _with_ratios(rows: list[Row]) -> list[Row]:
    base = next(row for row in rows if row.name == row.beside)
    return [
        replace(
            row,
            time_ratio=row.seconds / base.seconds,
            cpu_ratio=row.cpu / base.cpu,
            peak_ratio=row.peak / base.peak,
        )
        for row in rows
    ]


def _evidence(parameters: int, ours: Side, theirs: Side) -> Evidence:
    return Evidence(
        parameters=parameters,
        trained=(ours.trained, theirs.trained),
        tokens=[len(ids) for ids in ours.ids],
        learned=ours.learned,
        same_tokens=ours.ids == theirs.ids and ours.learned == theirs.learned,
        ours=ours.before,
        theirs=theirs.before,
        theirs_causal=theirs.before_causal,
        versions=theirs.versions | ours.versions,
    )


# --- for JSON and for people ---------------------------------------------------------


def as_object(rows: list[Row], evidence: Evidence | None, runs: int) -> dict[str, Any]:
    """All of it for JSON."""
    found: dict[str, Any] = {"machine": machine(), "runs": runs}
    if evidence is not None:
        goals = {"time_ratio": TIME_GOAL, "peak_ratio": MEMORY_GOAL}
        found |= {"evidence": asdict(evidence), "goals": goals}
    return found | {"rows": [asdict(row) for row in rows]}


def as_table(rows: list[Row], evidence: Evidence | None, runs: int) -> str:
    """All of it as text."""
    lines = machine_lines()
    if evidence is not None:
        lines += ["", *_told(evidence)]
    lines += [
        "",
        f"an update of LoRA, rank 8: median of {COUNTED} in each of {runs} processes, "
        f"run in turn; ratios to {rows[0].beside}",
        f"{'':13} {'samples':>13} {'seconds':>8} {'spread':>13} {'ratio':>6} "
        f"{'CPU s':>7} {'ratio':>6} {'peak GB':>8} {'ratio':>6} {'process':>8} "
        f"{'loss 1':>8}",
    ]
    for r in rows:
        spread = f"{r.least:.2f}-{r.most:.2f}"
        lines.append(
            f"{r.name:13} {r.setting:>13} {r.seconds:8.2f} {spread:>13} "
            f"{r.time_ratio:5.2f}x {r.cpu:7.2f} {r.cpu_ratio:5.2f}x "
            f"{r.peak / 1e9:8.3f} {r.peak_ratio:5.2f}x {r.process / 1e9:8.3f} "
            f"{r.loss:8.4f}"
        )
    if evidence is not None:
        lines.append(f"goals: seconds <= {TIME_GOAL}x, peak GB <= {MEMORY_GOAL}x")
    return "\n".join(lines)


def _told(e: Evidence) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in e.versions.items())
    same = "the same" if e.same_tokens else "DIFFERENT"
    return [
        f"{versions}; float32 on both sides; recomputed: with gradient checkpointing",
        f"LLaVA of {e.parameters / 1e6:.0f}M random parameters; trained: "
        f"{e.trained[0]:,} and {e.trained[1]:,}",
        f"samples of {min(e.tokens)} to {max(e.tokens)} tokens, "
        f"{min(e.learned)} to {max(e.learned)} of them learned: {same} ids on both "
        f"sides",
        f"loss before training: mm1_mlx {e.ours:.5f}, mlx-vlm {e.theirs:.5f}; mlx-vlm "
        f"with the causal mask that it leaves out {e.theirs_causal:.5f}",
    ]
