"""The figures of `benchmark generate`, for people."""

from mm1_mlx.benchmarks.figures import number
from mm1_mlx.benchmarks.generate import (
    MEASURES,
    Evidence,
    Limit,
    Measure,
    Result,
    goals_of,
)
from mm1_mlx.benchmarks.sides import OURS
from mm1_mlx.memory import bytes_text


def as_table(found: Result, peer: str | None) -> str:
    """A question's figures, a line each; then what is beside them."""
    goals = {
        name: goal.text(ratio) for name, (goal, ratio) in goals_of(found, peer).items()
    }
    versions = ", ".join(
        f"{name} {version}" for name, version in found.versions.items()
    )
    runs = "1 run" if found.runs == 1 else f"{found.runs} runs"
    lines = [
        f"{found.name}: {found.what}",
        f"{found.prompt_tokens} prompt tokens, {found.tokens} generated; {versions}",
        f"median (least-most) of {runs}, each a fresh process"
        + (", in turn; ratios of pairs, above 1 is faster" if peer else ""),
    ]
    if found.evidence is not None:
        lines.append(_evidence(found.evidence))
    heads = "".join(f" {side:>22}" for side in found.figures)
    lines.append(f"{'':24}{heads}" + (f" {'ratio':>20}  goal" if peer else ""))
    lines += [
        _line(measure, found, goals)
        for measure in MEASURES
        if measure.name in found.figures[OURS]
    ]
    if found.limit is not None:
        lines += _limit(found.limit)
    if found.rows is not None:
        lines += _rows(found.rows, goals)
    if found.again is not None:
        lines += _again(found.again, goals)
    return "\n".join(line.rstrip() for line in lines)


def _line(measure: Measure, found: Result, goals: dict[str, str]) -> str:
    scale = 1e9 if measure.kind == "bytes" else 1
    line = f"{measure.label:24}"
    for figures in found.figures.values():
        spread = figures.get(measure.name)
        text = spread.over(scale).text() if spread else "-"
        line += f" {text:>22}"
    ratio = found.ratios.get(measure.name)
    if ratio is not None:
        line += f" {ratio.text():>20}"
        if measure.name in goals:
            line += f"  {goals[measure.name]}"
        elif measure.kind == "bytes":
            line += "  below 1 is less"
    return line


def _evidence(e: Evidence) -> str:
    prompt = "the same" if e.same_prompt else "DIFFERENT"
    text = (
        f"{prompt} prompt ids on both sides; the same {e.same_tokens} of {e.tokens} "
        f"greedy tokens, log-probabilities within {e.difference:.1e}"
    )
    return text if e.same else f"{text}: THE ANSWERS DIFFER"


def _limit(limit: Limit) -> list[str]:
    b, how = limit.bytes, "measured by a copy" if limit.measured else "given"
    return [
        f"bytes per token: {bytes_text(b.total)} (weights {bytes_text(b.weights)}, "
        f"chosen experts {bytes_text(b.experts)}, keys and values of {b.context} "
        f"tokens {bytes_text(b.cache)})",
        f"memory {number(limit.bandwidth / 1e9)} GB/s ({how}): at most "
        f"{number(limit.rate)} tokens/s, of which {limit.share:.0%} was reached",
    ]


def _rows(rows: dict, goals: dict[str, str]) -> list[str]:
    ratio = rows["ratio"]
    return [
        f"{rows['rows']} rows together: {rows['rate'].text()} tokens/s, one by one "
        f"{rows['one_by_one'].text()}{_same(rows)}",
        f"  ratio {ratio.text()}{_goal(goals, 'rows')}",
    ]


def _again(again: dict, goals: dict[str, str]) -> list[str]:
    ratio = again["ratio"]
    return [
        f"two questions about one picture, {again['prompt_tokens']} prompt tokens: "
        f"first token after {again['first'].text()} s and {again['second'].text()} s"
        f"{_same(again)}",
        f"  ratio {ratio.text()}{_goal(goals, 'again')}",
    ]


def _goal(goals: dict[str, str], name: str) -> str:
    return f", goal {goals[name]}" if name in goals else ""


def _same(found: dict) -> str:
    return ", the same tokens" if found["same_tokens"] else ", DIFFERENT TOKENS"
