"""POPE: does the model see things that are not there?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm1_mlx.evaluation.metrics.intervals import of_sum, spread
from mm1_mlx.evaluation.metrics.scores import mean
from mm1_mlx.evaluation.samples import Answered, Score


@dataclass(frozen=True)
class Existence:
    """What POPE states of yes-or-no answers, each 0..1; yes is the positive class."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float  # the share of answers that are yes


def existence(answers: Sequence[str], references: Sequence[str]) -> Existence:
    """The five figures of answers that are "yes" or "no"; of nothing, 0.

    An answer that is neither ("other") is wrong and not a yes.
    """
    pairs = list(zip(answers, references, strict=True))
    hits = pairs.count(("yes", "yes"))
    said = sum(answer == "yes" for answer in answers)
    there = sum(reference == "yes" for reference in references)
    precision, recall = _over(hits, said), _over(hits, there)
    return Existence(
        accuracy=_over(sum(a == r for a, r in pairs), len(pairs)),
        precision=precision,
        recall=recall,
        f1=_over(2 * precision * recall, precision + recall),
        yes=_over(said, len(pairs)),
    )


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


_FIGURES = ("accuracy", "precision", "recall", "f1", "yes")


def pope_score(answered: Sequence[Answered]) -> Score:
    """F1 in percent, the mean of the splits (random, popular, adversarial).

    A sample that could not be asked (None) is neither a yes nor a no, so wrong.

    MM1.5 and the papers around it state this mean; groups has the five figures for
    all splits together (their mean) and for each of them.
    """
    return _score(answered, "f1")


def pope_accuracy(answered: Sequence[Answered]) -> Score:
    """The same with accuracy as the total, which some papers state."""
    return _score(answered, "accuracy")


def _score(answered: Sequence[Answered], main: str) -> Score:
    pairs = [(str(one.value), one.sample.answers[0].lower()) for one in answered]
    splits: dict[str, list[tuple[str, str]]] = {}
    for one, pair in zip(answered, pairs, strict=True):
        splits.setdefault(str(one.sample.fields.get("category", "all")), []).append(
            pair
        )
    found = {
        name: existence([a for a, _ in split], [r for _, r in split])
        for name, split in splits.items()
    }
    groups = {
        name: 100 * mean([getattr(figures, name) for figures in found.values()])
        for name in _FIGURES
    }
    if len(found) > 1:
        groups |= {
            f"{split} {name}": 100 * getattr(figures, name)
            for split, figures in found.items()
            for name in _FIGURES
        }
    low, high = _interval(list(splits.values()), main)
    return Score(
        total=groups[main],
        each=[float(said == right) for said, right in pairs],
        low=low,
        high=high,
        groups=groups,
    )


def _interval(splits: list[list[tuple[str, str]]], main: str) -> tuple[float, float]:
    """The interval of the mean over the splits, in percent; (0, 0) of nothing."""
    if not splits:
        return 0.0, 0.0
    # Both figures are a mean over a mean: right answers over 1, and for F1 twice
    # the hits over those who said yes and those that are yes.
    values = [
        np.array([(said == right, 1) for said, right in split], np.float64)
        if main == "accuracy"
        else np.array(
            [
                (2 * (said == right == "yes"), (said == "yes") + (right == "yes"))
                for said, right in split
            ],
            np.float64,
        )
        for split in splits
    ]

    def figure(means: list[np.ndarray]) -> np.ndarray:
        (part,) = means
        return part[:, 0] / np.maximum(part[:, 1], 1e-12)

    parts = [(figure([v.mean(0)[None]]).item(), *spread(v, figure)) for v in values]
    low, high = of_sum(parts)
    return 100 * low / len(parts), 100 * high / len(parts)
