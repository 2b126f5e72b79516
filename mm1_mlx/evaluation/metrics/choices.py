"""Multiple choice: ScienceQA, AI2D, SEED, MMBench, MMMU."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.metrics.open_answers import open_match
from mm1_mlx.evaluation.metrics.scores import mean, share
from mm1_mlx.evaluation.samples import Answered, Sample, Score

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_right(one: Answered) -> bool:
    """Whether the value is the letter that the sample has as its answer."""
    value = one.value
    if not isinstance(value, str):
        return False
    said = value.strip().upper()
    return any(said == right.strip().upper() for right in one.sample.answers)


def choice_accuracy(answered: Sequence[Answered]) -> Score:
    """The share of right letters in percent, with Wilson's interval."""
    return share(answered, [choice_right(one) for one in answered])


def rotations(sample: Sample) -> Iterator[Sample]:
    """A question with its choices turned by 0, 1, 2, ...: MMBench's circular form.

    Each copy knows its question by `fields["circle"]`. The right letter turns with
    the choices. (MMBench, arXiv 2307.06281, section 4.2.)
    """
    n = len(sample.choices)
    right = LETTERS.find(sample.answers[0].strip().upper())
    if not 0 <= right < n:
        raise DatasetError(
            f"Question {sample.id} has the answer {sample.answers[0]!r} and {n} "
            "choices; expected the letter of one of them."
        )
    for turn in range(n):
        yield replace(
            sample,
            id=sample.id if turn == 0 else f"{sample.id}+{turn}",
            choices=sample.choices[turn:] + sample.choices[:turn],
            answers=(LETTERS[(right - turn) % n],),
            fields={**sample.fields, "circle": sample.id},
        )


def circular_accuracy(answered: Sequence[Answered]) -> Score:
    """The share of questions that were right in every rotation, in percent.

    Rotated copies share `fields["circle"]`; each says of every copy whether its
    whole circle was right.
    """
    circles: dict[Any, bool] = {}
    first: dict[Any, Answered] = {}
    names = [one.sample.fields.get("circle", one.sample.id) for one in answered]
    for name, one in zip(names, answered, strict=True):
        circles[name] = circles.get(name, True) and choice_right(one)
        first.setdefault(name, one)
    score = share(list(first.values()), list(circles.values()))
    return replace(score, each=[float(circles[name]) for name in names])


def mmmu_accuracy(answered: Sequence[Answered]) -> Score:
    """The share of right answers in percent: letters, and open answers by MMMU's rule.

    A sample with choices is a multiple-choice one unless `fields["kind"]` says
    "open"; the value of an open one is what `open_answers.parse` gives. groups has
    the subjects (`fields["category"]`), and "macro", their mean.
    """
    right = [
        one.value is not None and open_match(one.value, one.sample.answers)
        if is_open(one.sample)
        # as the script: only the letter of the choice itself is right
        else choice_right(one)
        for one in answered
    ]
    score = share(answered, right)
    if not score.groups:
        return score
    macro = mean(list(score.groups.values()))
    return replace(score, groups={**score.groups, "macro": macro})


def is_open(sample: Sample) -> bool:
    """Whether a question of MMMU asks for free text."""
    return sample.fields.get("kind") == "open" or not sample.choices
