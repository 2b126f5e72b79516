"""Counts of right answers with their intervals, and the tables made of them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from mm1_mlx.evaluation.metrics.intervals import wilson

# What mm1-tiny must reach; it must also stand MARGIN above the wrong picture.
GOALS = {
    **dict.fromkeys(
        (
            "count", "count_colour", "count_shape", "count_pair", "colour", "shape",
            "existence", "position", "relation", "caption",
        ),
        0.97,
    ),
    "digits": 0.95,
    "words": 0.95,
    "compare": 0.95,
    "held_out": 0.90,
    "unknown": 0.95,
    "elsewhere": 0.93,
}  # fmt: skip
MARGIN = 0.25
# What each task asks, for readers of the tables.
MEANINGS = {
    "count": "how many things",
    "count_colour": "how many of a colour",
    "count_shape": "how many of a shape",
    "count_pair": "how many of a colour and shape",
    "colour": "colour of a shape",
    "shape": "shape of a colour",
    "existence": "is there such a thing",
    "position": "where it is, in nine words",
    "relation": "left, right, above, below another",
    "caption": "all things, left to right",
    "digits": "1 to 3 digits, handwritten and rendered",
    "words": "a short word",
    "compare": "two pictures compared",
    "held_out": "colour and shape never seen together in training",
    "unknown": "photographs: says that it does not know",
    "elsewhere": "scenes drawn by other programs",
    "of_two": "a question about one of two pictures",
    "absent": "asked about a thing that is not there",
    "many": "asked about one of several",
}


# Abilities, and what shows that an answer comes from there: the same questions without.
COMPARED = {
    "naming_right": ("naming_shuffled", "naming_none"),
    "worth_steps": ("worth_at_once",),
    "small_dynamic": ("small_native",),
    "small_text_dynamic": ("small_text_native",),
    "talk": ("talk_alone",),
}
# Points by which a task must be above the first of those beside it.
GAPS = {"naming_right": 30, "small_dynamic": 30, "small_text_dynamic": 30}


def tally(outcomes: Iterable[bool]) -> dict[str, Any]:
    """n, right, accuracy, and the interval's low and high."""
    outcomes = list(outcomes)
    n, right = len(outcomes), sum(outcomes)
    low, high = wilson(right, n)
    accuracy = right / n if n else 0.0
    return {
        "n": n,
        "right": right,
        "accuracy": round(accuracy, 6),
        "low": round(low, 6),
        "high": round(high, 6),
    }


def grouped(
    outcomes: Sequence[bool], groups: Sequence[dict[str, str]]
) -> dict[str, dict[str, Any]]:
    """A tally for each value of each name that the questions are grouped by."""
    found: dict[str, dict[str, list[bool]]] = {}
    for outcome, names in zip(outcomes, groups, strict=True):
        for name, value in names.items():
            found.setdefault(name, {}).setdefault(value, []).append(outcome)
    return {
        name: {value: tally(values[value]) for value in sorted(values)}
        for name, values in sorted(found.items())
    }


def missed(report: dict[str, Any]) -> list[str]:
    """One line for each goal that a report does not reach."""
    lines = []
    for task, result in report["tasks"].items():
        goal = GOALS.get(task)
        if goal is None:
            continue
        if result["accuracy"] < goal:
            lines.append(f"{task}: {percent(result['accuracy'])}, goal {percent(goal)}")
        wrong = result.get("wrong_image")
        if wrong and result["accuracy"] - wrong["accuracy"] < MARGIN:
            lines.append(
                f"{task}: only {percent(result['accuracy'] - wrong['accuracy'])} above "
                f"the wrong picture, goal {percent(MARGIN)}"
            )
    known = report["says_unknown"]
    if known["right"]:
        lines.append(f"unknown: said of {known['right']} of {known['n']} scenes")
    return lines


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(result: dict[str, Any]) -> str:
    return f"{100 * result['low']:.1f} to {100 * result['high']:.1f}"


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report."""
    parts = [_main_table(report), _unknown_line(report)]
    parts += _group_tables(report)
    if report.get("few_shot"):
        parts.append(_few_shot_table(report["few_shot"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _main_table(report: dict[str, Any]) -> str:
    lines = [
        "| task | what is asked | accuracy | 95% interval | wrong picture | goal | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, result in report["tasks"].items():
        wrong, goal = result.get("wrong_image"), GOALS.get(task)
        cells = [
            task,
            MEANINGS.get(task, ""),
            percent(result["accuracy"]),
            _interval(result),
            percent(wrong["accuracy"]) if wrong else "-",
            percent(goal) if goal else "none",
            str(result["n"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _unknown_line(report: dict[str, Any]) -> str:
    known = report["says_unknown"]
    if not known["n"]:
        return ""
    return (
        f"Of {known['n']} scenes, it said of {known['right']} that it does not know "
        f"this kind of picture (95% interval: at most {100 * known['high']:.2f}%)."
    )


def _group_tables(report: dict[str, Any]) -> list[str]:
    tables = []
    for task, result in report["tasks"].items():
        for name, values in result.get("groups", {}).items():
            lines = [
                f"| {task}, by {name} | accuracy | 95% interval | n |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {value} | {percent(r['accuracy'])} | {_interval(r)} | {r['n']} |"
                for value, r in values.items()
            ]
            tables.append("\n".join(lines))
    return tables


def _few_shot_table(results: dict[str, Any]) -> str:
    shots = list(results)
    named = sorted({name for r in results.values() for name in r["groups"]["named"]})
    lines = [
        f"| few-shot, by what is named | {' | '.join(f'{s} shots' for s in shots)} |",
        f"|---|{'---|' * len(shots)}",
    ]
    for name in named:
        cells = [
            percent(results[s]["groups"]["named"][name]["accuracy"]) for s in shots
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [f"{percent(results[s]['accuracy'])}" for s in shots]
    lines.append(f"| all (n = {results[shots[0]]['n']} each) | {' | '.join(cells)} |")
    return "\n".join(lines)


def abilities_markdown(results: list[dict[str, Any]], meanings: dict[str, str]) -> str:
    """The tables of what `python -m mm1_mlx.evaluate` found (its result.json).

    meanings: what each task asks, without "tiny_". Tasks of `markdown` are left out.
    """
    found = {
        r["task"].removeprefix("tiny_"): r
        for r in results
        if not r.get("wrong_images") and not r.get("shots")
    }
    beside = {name for others in COMPARED.values() for name in others}
    lines = [
        "| task | what is asked | accuracy | 95% interval | without | accuracy | "
        "points between | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    grouped_tasks, below = [], []
    for name, meaning in meanings.items():
        if name not in found or name in beside:
            continue
        one = found[name]
        if one["groups"]:
            grouped_tasks.append(name)
        others = [x for x in COMPARED.get(name, ()) if x in found]
        for first, other in enumerate(others or [""]):
            cells = ["", "", "", ""]
            if not first:
                interval = f"{one['low']:.1f} to {one['high']:.1f}"
                cells = [name, meaning, f"{one['total']:.1f}%", interval]
            cells += ["", "", ""]
            if other:
                total = f"{found[other]['total']:.1f}%"
                gap, low, high = difference(one, found[other])
                cells[4:] = [
                    meanings[other],
                    total,
                    f"{gap:.1f} ({low:.1f} to {high:.1f})",
                ]
                goal = GAPS.get(name, 0)
                if not first and gap < goal:
                    below.append(
                        f"- {name} is {gap:.1f} points above {other}, not {goal}"
                    )
            lines.append(f"| {' | '.join([*cells, str(one['n'])])} |")
    parts = ["\n".join(lines), *_side_by_side(found, grouped_tasks)]
    if below:
        parts += ["Below its goal:", "\n".join(below)]
    return "\n\n".join(parts)


def difference(
    one: dict[str, Any], other: dict[str, Any]
) -> tuple[float, float, float]:
    """The points between two results of `mm1_mlx.evaluate`, and a 95% interval.

    Newcombe's from the two Wilson intervals (1998, method 10), as if the questions were
    others: where they are the same, the true interval is narrower.
    """
    gap = one["total"] - other["total"]
    down = math.hypot(one["total"] - one["low"], other["high"] - other["total"])
    up = math.hypot(one["high"] - one["total"], other["total"] - other["low"])
    return gap, gap - down, gap + up


def _side_by_side(found: dict[str, Any], names: list[str]) -> list[str]:
    """A table for tasks that have the same groups."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        tables.setdefault(tuple(sorted(found[name]["groups"])), []).append(name)
    made = []
    for groups, tasks in tables.items():
        rows = [f"| | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
        for group in groups:
            cells = [f"{found[task]['groups'][group]:.0f}%" for task in tasks]
            rows.append(f"| {group} | {' | '.join(cells)} |")
        made.append("\n".join(rows))
    return made
