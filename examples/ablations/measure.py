"""What a trained model knows: right answers by task, greedy, exact match.

The questions are tasks of `evaluate`, the same for every run, so differences are the
models'. A run that is done can be asked again:

    python -m mm1_mlx.evaluate --model runs/ablations/RUN/model --batch-size 60 \\
        --task ablations_zero --tasks-from examples.ablations.measure
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from examples.ablations import world
from examples.ablations.plan import FULL
from examples.ablations.world import MOST_SHOTS, Asked
from mm1_mlx.evaluation.metrics.scores import said
from mm1_mlx.evaluation.metrics.scores import share as share_right
from mm1_mlx.evaluation.samples import Answered, Sample, Score, Source, Task

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
    "naming0": "the same without these pictures: nothing to go by",
    "facts": "questions without a picture",
}
_PREFIX = "ablations_"  # of the tasks' names


def test_questions(each: int) -> dict[str, Callable[[], list[Asked]]]:
    """What makes the questions of a measure: 6 x each, 3 x each, 3 x each, ..."""
    fewer = max(each // 2, 1)
    return {
        "zero": partial(world.questions, each),
        "shots": partial(world.with_shots, fewer, MOST_SHOTS),
        "naming": partial(world.naming, 3 * each, MOST_SHOTS),
        "naming0": partial(world.naming, 3 * each, 0),
        "facts": partial(world.facts_asked, 3 * each),
    }


def _read(make: Callable[[], list[Asked]], where: Source, split: str) -> Iterator:
    for number, asked in enumerate(make()):
        yield Sample(
            id=f"{number:04}",
            images=tuple(asked.images),
            question=asked.prompt if isinstance(asked.prompt, str) else "",
            answers=(asked.answer,),
            fields={"prompt": asked.prompt, "category": asked.task},
        )


def _right(answered: Sequence[Answered]) -> Score:
    """Of answers that are the expected one to the letter, by task, too."""
    return share_right(
        answered, [said(one) == one.sample.answers[0] for one in answered]
    )


def tasks_of(each: int) -> dict[str, Task]:
    """The measures as tasks of `evaluate`. each: questions of a kind, see Size."""
    return {
        measure: Task(
            name=f"{_PREFIX}{measure}",
            summary=f"The ablations: {MEANINGS[measure]}",
            read=partial(_read, make),
            split="test",
            shot_split=None,
            prompt=lambda sample: sample.fields["prompt"],
            shot_prompt=None,
            target=lambda sample: sample.answers[0],
            max_tokens=MAX_TOKENS,
            clean=lambda text, sample: text.strip(),
            metric=_right,
            source="examples/ablations",
            needs_data=False,
        )
        for measure, make in test_questions(each).items()
    }


TASKS = list(tasks_of(FULL.each).values())


def measured(model: Any, processor: Any, name: str, each: int) -> dict[str, Any]:
    """What `evaluate` finds of every measure, as its own result.json has it. name: of
    the model."""
    from mm1_mlx.evaluation.report import FORMAT
    from mm1_mlx.evaluation.runner import evaluate
    from mm1_mlx.inference.identity import fingerprint

    ask = partial(evaluate, model, processor, batch_size=BATCH, reuse=False)
    return {
        "format": FORMAT,
        "model": name,
        "adapter": None,
        "weights": fingerprint(model),
        "results": [ask(task).to_dict() for task in tasks_of(each).values()],
    }


def share(result: dict[str, Any], measure: str) -> float:
    """Of a run's result.json, the share of right answers of a measure: the mean over
    its tasks."""
    (entry,) = (
        entry
        for entry in result["evaluation"]["results"]
        if entry["task"] == f"{_PREFIX}{measure}"
    )
    shares = [percent / 100 for percent in entry["groups"].values()]
    return sum(shares) / len(shares)
