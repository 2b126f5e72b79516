"""Accuracy of mm1-tiny by task: greedy answers, exact match, 95% intervals.

    python -m examples.mm1_tiny.evaluate --model mm1-tiny -n 500 --json result.json

Every question is asked twice: with its own picture, and with the picture of another
question of the same task. What the second still gets right is guessed from the text.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.mm1_tiny.photos import UNKNOWN_ANSWER
from examples.mm1_tiny.tasks import SCENE_TASKS, TASKS, Example

# What the model must reach, by task; the others are reported.
GOALS = {
    **dict.fromkeys(SCENE_TASKS, 0.97),
    "digits": 0.95,
    "words": 0.95,
    "compare": 0.95,
    "held_out": 0.90,
    "elsewhere": 0.93,
    "unknown": 0.95,
}
MARGIN = 0.25  # above the same model with the wrong picture


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def make_examples(task: str, n: int, seed: int) -> list[Example]:
    """n questions of a task; the same seed gives the same ones."""
    rng = random.Random(f"evaluate/{seed}/{task}")
    return [TASKS[task](rng) for _ in range(n)]


def wrong_pictures(examples: list[Example]) -> list[list[Any]]:
    """For each question the pictures of another one with as many pictures."""
    groups: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(len(example.images), []).append(i)
    taken: list[list[Any]] = [[] for _ in examples]
    for group in groups.values():
        for place, i in enumerate(group):
            taken[i] = examples[group[(place + 1) % len(group)]].images
    return taken


def answers(
    model: Any,
    processor: Any,
    prompts: list[str],
    images: list[list[Any]],
    batch: int,
) -> Iterator[tuple[int, str]]:
    """(index, answer) of every prompt, in batches of like length."""
    from mm1_mlx import batch_generate

    order = sorted(range(len(prompts)), key=lambda i: (len(images[i]), len(prompts[i])))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        results = batch_generate(
            model,
            processor,
            [prompts[i] for i in chosen],
            [images[i] for i in chosen],
            max_tokens=60,
        )
        yield from zip(chosen, (r.text.strip() for r in results), strict=True)


def evaluate_task(
    model: Any, processor: Any, task: str, n: int, seed: int, batch: int, bar: tqdm
) -> dict:
    """Counts of a task: right, right with the wrong picture, not known; and misses."""
    examples = make_examples(task, n, seed)
    prompts = [example.prompt for example in examples]
    right = wrong = unknown = 0
    misses = []
    own = [example.images for example in examples]
    for i, answer in answers(model, processor, prompts, own, batch):
        bar.update()
        right += answer == examples[i].answer
        unknown += answer == UNKNOWN_ANSWER
        if answer != examples[i].answer:
            misses.append([prompts[i], examples[i].answer, answer])
    for i, answer in answers(
        model, processor, prompts, wrong_pictures(examples), batch
    ):
        bar.update()
        wrong += answer == examples[i].answer
    low, high = wilson(right, n)
    goal = GOALS.get(task)
    return {
        "n": n,
        "accuracy": right / n,
        "interval": [low, high],
        "wrong_picture": wrong / n,
        "says_unknown": unknown,
        "goal": goal,
        "most_common_answer": Counter(e.answer for e in examples).most_common(1)[0][1]
        / n,
        "misses": misses[:20],
    }


def is_reached(task: str, row: dict) -> bool | None:
    """Whether a task's goal is reached; None where there is no goal.

    Photographs have one answer whatever is asked, so a wrong photograph changes
    nothing: there only the accuracy counts.
    """
    if row["goal"] is None:
        return None
    if task in SCENE_TASKS and row["says_unknown"]:
        return False
    seen = row["accuracy"] - row["wrong_picture"] >= MARGIN or task == "unknown"
    return row["accuracy"] >= row["goal"] and seen


def markdown(results: dict) -> str:
    """The table of a result."""
    lines = [
        "| task | exact match | 95% interval | wrong picture | goal |",
        "|---|---|---|---|---|",
    ]
    for task, row in results["tasks"].items():
        low, high = row["interval"]
        goal = "-" if row["goal"] is None else f"{row['goal']:.0%}"
        if is_reached(task, row) is False:
            goal += ", not reached"
        lines.append(
            f"| {task} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {row['wrong_picture']:.1%} | {goal} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="mm1-tiny", help="name or folder; default: %(default)s")
    add("-n", type=int, default=500, help="questions per task; default: %(default)s")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    add("--seed", type=int, default=1000)
    add("--batch", type=int, default=50)
    add("--json", type=Path, help="write the whole result, with misses, to this file")
    args = parser.parse_args()

    from mm1_mlx import load

    model, processor = load(args.model)
    start = time.time()
    results: dict[str, Any] = {"n": args.n, "seed": args.seed, "tasks": {}}
    with tqdm(total=2 * args.n * len(args.tasks), unit="answer") as bar:
        for task in args.tasks:
            bar.set_description(task)
            row = evaluate_task(
                model, processor, task, args.n, args.seed, args.batch, bar
            )
            results["tasks"][task] = row
    results["seconds"] = round(time.time() - start, 1)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(markdown(results))
    failed = [t for t, row in results["tasks"].items() if is_reached(t, row) is False]
    if failed:
        print(f"not reached: {', '.join(failed)}", file=sys.stderr)


if __name__ == "__main__":
    main()
