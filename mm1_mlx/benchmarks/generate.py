"""What an answer takes, part by part: alone, or beside another program.

Every answer is given by a process of its own that has loaded its model and warmed up;
the programs run in turn, on the same weights. All sides are timed from outside by the
same code (peers.side_kit), and shown to give the same tokens.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mm1_mlx.benchmarks.figures import Goal, Spread, pair_ratios
from mm1_mlx.benchmarks.peers.side_kit import Answer
from mm1_mlx.benchmarks.roofline import TokenBytes
from mm1_mlx.benchmarks.sides import (
    OURS,
    PEERS,
    Tell,
    in_turn,
    our_command,
    peer_version,
    run_side,
)
from mm1_mlx.benchmarks.works import CASES, Work

SPEED = Goal(0.98, 1.15)  # of mlx-lm's and mlx-vlm's
TOGETHER = Goal(1.3)  # rows at once, beside one by one
AGAIN = Goal(0.15, at_most=True)  # the second question's first token


@dataclass(frozen=True)
class Measure:
    """One figure of an answer. kind: "seconds", "rate" (more is better) or "bytes"."""

    name: str
    label: str
    kind: str
    of: Callable[[Answer], float | None]
    goal: Goal | None = None


def _read(answer: Answer) -> float | None:
    """Of a text it is nothing: its tokens are given."""
    return answer.read if answer.encode else None


MEASURES = (
    Measure("read", "read prompt, picture, s", "seconds", _read),
    Measure("encode", "encode picture, s", "seconds", lambda a: a.encode or None),
    Measure("ttft", "time to first token, s", "seconds", lambda a: a.ttft),
    Measure("prefill", "prefill, tokens/s", "rate", lambda a: a.prefill_rate, SPEED),
    Measure("decode", "decode, tokens/s", "rate", lambda a: a.decode_rate, SPEED),
    Measure("cpu_ttft", "CPU to first token, s", "seconds", lambda a: a.cpu[0]),
    Measure("cpu_token", "CPU per token, s", "seconds", lambda a: a.cpu_per_token),
    Measure("peak", "peak of MLX, GB", "bytes", lambda a: a.peak),
    Measure("process", "peak of process, GB", "bytes", lambda a: a.process),
)


@dataclass(frozen=True)
class Evidence:
    """Whether two programs gave the same answer.

    same_prompt: the same ids went in. same_tokens: of the greedy answer, before the
    first that differs. difference: largest, of these tokens' log-probabilities.
    """

    same_prompt: bool
    same_tokens: int
    tokens: int
    difference: float

    @property
    def same(self) -> bool:
        """The same ids in, and the same tokens out."""
        return self.same_prompt and self.same_tokens == self.tokens


@dataclass(frozen=True)
class Limit:
    """The roofline of decoding. bandwidth: bytes a second; share: of it, reached."""

    bytes: TokenBytes
    bandwidth: float
    measured: bool
    rate: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """All about one question.

    figures: of each side, by measure. ratios: ours over the peer's in each pair, as
    speed (above 1 is faster), of bytes as they are (below 1 is less).
    """

    name: str
    what: str
    prompt_tokens: int
    tokens: int
    runs: int
    versions: dict[str, str]
    figures: dict[str, dict[str, Spread]]
    ratios: dict[str, Spread] = field(default_factory=dict)
    evidence: Evidence | None = None
    limit: Limit | None = None
    rows: dict[str, Any] | None = None
    again: dict[str, Any] | None = None


@dataclass(frozen=True)
class Against:
    """A peer, and the Python that has it."""

    peer: str
    python: Path

    def check(self) -> str:
        """Its version; MM1Error where it cannot be run."""
        return peer_version(self.python, self.peer)

    def command(self) -> list[str]:
        """What starts its side."""
        return PEERS[self.peer].command(self.python, "generate")


def measure_work(
    work: Work,
    runs: int,
    against: Against | None = None,
    bandwidth: float | None = None,
    *,
    measured: bool = True,
    tell: Tell = lambda line: None,
) -> Result:
    """Ask `runs` times in turn. bandwidth: bytes a second, for the roofline.

    Beside a peer only the answer itself is timed. Raises MM1Error where a run fails.
    """
    tasks = {OURS: (our_command("generate"), work.task)}
    if against is not None:
        tasks[OURS] = (our_command("generate"), work.of(work.ours))
        tasks[against.peer] = (against.command(), work.of(work.theirs))

    def job(name: str) -> Callable[[int], Answer]:
        command, task = tasks[name]
        return lambda turn: Answer(**run_side(name, command, task))

    answers = in_turn({name: job(name) for name in tasks}, runs, work.name, tell)
    theirs = answers.get(against.peer) if against else None
    return result(work, answers[OURS], theirs, against, bandwidth, measured)


def result(
    work: Work,
    ours: list[Answer],
    theirs: list[Answer] | None,
    against: Against | None,
    bandwidth: float | None,
    measured: bool,
) -> Result:
    """The figures of answers that were given."""
    figures = {OURS: _figures(ours)}
    more: dict[str, Any] = {}
    versions = dict(ours[0].versions)
    if theirs is not None and against is not None:
        figures[against.peer] = _figures(theirs)
        more["ratios"] = _ratios(ours, theirs)
        more["evidence"] = compare(ours[0], theirs[0])
        versions = theirs[0].versions | versions
    if bandwidth is not None and "bytes" in ours[0].more:
        found = TokenBytes(**ours[0].more["bytes"])
        limit = found.limit(bandwidth)
        share = figures[OURS]["decode"].median / limit
        more["limit"] = Limit(found, bandwidth, measured, limit, share)
    return Result(
        name=work.name,
        what=work.what,
        prompt_tokens=len(ours[0].ids),
        tokens=len(ours[0].tokens),
        runs=len(ours),
        versions=versions,
        figures=figures,
        rows=_rows([a.more["rows"] for a in ours if "rows" in a.more]),
        again=_again([a.more["again"] for a in ours if "again" in a.more]),
        **more,
    )


def _values(measure: Measure, answers: list[Answer]) -> list[float]:
    """Of each answer; none where a side cannot tell."""
    found = [measure.of(answer) for answer in answers]
    known = [value for value in found if value is not None and not math.isnan(value)]
    return known if len(known) == len(found) else []


def _figures(answers: list[Answer]) -> dict[str, Spread]:
    values = {m.name: _values(m, answers) for m in MEASURES}
    return {name: Spread.of(found) for name, found in values.items() if found}


def _ratios(ours: list[Answer], theirs: list[Answer]) -> dict[str, Spread]:
    found = {}
    for measure in MEASURES:
        a, b = _values(measure, ours), _values(measure, theirs)
        if a and b:
            upside = measure.kind == "seconds"
            found[measure.name] = pair_ratios(b, a) if upside else pair_ratios(a, b)
    return found


def compare(ours: Answer, theirs: Answer) -> Evidence:
    """Prompt, tokens and log-probabilities of two answers."""
    pairs = list(zip(ours.tokens, theirs.tokens, strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    scores = zip(ours.logprobs[:same], theirs.logprobs[:same], strict=False)
    return Evidence(
        same_prompt=ours.ids == theirs.ids,
        same_tokens=same,
        tokens=max(len(ours.tokens), len(theirs.tokens)),
        difference=max((abs(a - b) for a, b in scores), default=math.inf),
    )


def _rows(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not found:
        return None
    rates = [row["rate"] for row in found]
    single = [row["one_by_one"] for row in found]
    return {
        "rows": found[0]["rows"],
        "rate": Spread.of(rates),
        "one_by_one": Spread.of(single),
        "ratio": pair_ratios(rates, single),
        "same_tokens": all(row["same_tokens"] for row in found),
    }


def _again(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not found:
        return None
    first, second = ([one[key] for one in found] for key in ("first", "second"))
    return {
        "prompt_tokens": found[0]["prompt_tokens"],
        "first": Spread.of(first),
        "second": Spread.of(second),
        "ratio": pair_ratios(second, first),
        "same_tokens": all(one["same_tokens"] for one in found),
    }


def goals_of(found: Result, peer: str | None) -> dict[str, tuple[Goal, float]]:
    """What ratios should be, and are. None beside transformers, which is compared for
    its own sake; of rows and again only where the model is one of CASES."""
    goals: dict[str, tuple[Goal, float]] = {}
    if peer in ("mlx-lm", "mlx-vlm"):
        for measure in MEASURES:
            if measure.goal is not None and measure.name in found.ratios:
                ratio = found.ratios[measure.name].median
                goals[measure.name] = measure.goal, ratio
    if found.name in CASES and found.rows is not None:
        goals["rows"] = TOGETHER, found.rows["ratio"].median
    if found.name in CASES and found.again is not None:
        goals["again"] = AGAIN, found.again["ratio"].median
    return goals


def as_object(found: Result, peer: str | None) -> dict[str, Any]:
    """For JSON, with the goals and whether they are met."""
    values = asdict(found)
    values["goals"] = {
        name: asdict(goal) | {"met": goal.met(ratio)}
        for name, (goal, ratio) in goals_of(found, peer).items()
    }
    if found.limit is not None:
        values["limit"]["bytes"]["total"] = found.limit.bytes.total
    if found.evidence is not None:
        values["evidence"]["same"] = found.evidence.same
    return values
