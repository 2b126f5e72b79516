"""Exact match: the answer is one of the references."""

from collections.abc import Sequence

from mm1_mlx.evaluation.metrics.scores import share
from mm1_mlx.evaluation.samples import Answered, Score


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is a reference; space around it and capitals do not count."""
    said = answer.strip().lower()
    return any(said == reference.strip().lower() for reference in references)


def exact_accuracy(answered: Sequence[Answered]) -> Score:
    """The share of exact matches in percent, with Wilson's interval."""
    right = [
        one.value is not None and exact_match(str(one.value), one.sample.answers)
        for one in answered
    ]
    return share(answered, right)
