"""What a trained model knows: right answers by task, greedy, exact match.

The questions are the same for every run, so differences are the models'.
"""

from collections.abc import Callable, Sequence
from typing import Any

from examples.ablations import world
from examples.ablations.world import MOST_SHOTS, Asked

BATCH = 60
MAX_TOKENS = 24  # the longest caption takes 20
# What a run is measured by: key, what it is, and the paper's name for its like.
MEASURES = {
    "zero": "0-shot",
    "shots": "3-shot",
    "naming": "naming",
    "facts": "text only",
}
MEANINGS = {
    "zero": "questions about one picture, mean over six tasks",
    "shots": "the same after three answered pictures",
    "naming": "three named pictures tell what of the fourth is to be named",
    "facts": "questions without a picture",
}


def test_questions(each: int) -> dict[str, list[Asked]]:
    """All test questions by measure: 6 x each, 3 x each, 3 x each, 3 x each."""
    fewer = max(each // 2, 1)
    return {
        "zero": world.questions(each),
        "shots": world.with_shots(fewer, MOST_SHOTS),
        "naming": world.naming(3 * each, MOST_SHOTS),
        "naming0": world.naming(3 * each, 0),
        "facts": world.facts_asked(3 * each),
    }


def measured(
    model: Any, processor: Any, each: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Counts of right answers: {measure: {task: [right, asked]}}. advance: told how
    many questions were answered."""
    from mm1_mlx import batch_generate

    found: dict[str, Any] = {}
    for measure, asked in test_questions(each).items():
        right: dict[str, list[int]] = {}
        for chunk in _chunks(asked):
            answers = batch_generate(
                model,
                processor,
                [item.prompt for item in chunk],
                [item.images or None for item in chunk],
                max_tokens=MAX_TOKENS,
                reuse=False,
            )
            for item, answer in zip(chunk, answers, strict=True):
                count = right.setdefault(item.task, [0, 0])
                count[0] += answer.text.strip() == item.answer
                count[1] += 1
            advance(len(chunk))
        found[measure] = right
    return found


def _chunks(asked: Sequence[Asked]) -> list[Sequence[Asked]]:
    return [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)]


def share(scores: dict[str, Any], measure: str) -> float:
    """The mean over a measure's tasks of the share of right answers."""
    tasks = scores[measure].values()
    return sum(right / asked for right, asked in tasks) / len(tasks)
