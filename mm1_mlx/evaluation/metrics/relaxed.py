"""ChartQA's relaxed accuracy: numbers within 5%, other answers the same."""

from collections.abc import Sequence

from mm1_mlx.evaluation.metrics.intervals import of_sum, wilson
from mm1_mlx.evaluation.metrics.scores import by_category, mean, share
from mm1_mlx.evaluation.samples import Answered, Score

PARTS = {"human", "augmented"}  # of ChartQA
TOLERANCE = 0.05  # relative to the reference (ChartQA, arXiv 2203.10244, section 5.1)


def number(text: str) -> float | None:
    """The number that a text is, 12.5% as 0.125; None if it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(answer: str, reference: str, tolerance: float = TOLERANCE) -> bool:
    """Whether an answer is the reference, give or take 5% if both are numbers.

    A reference of 0 has no relative distance: it must be written the same.
    """
    said, right = number(answer), number(reference)
    if said is not None and right:
        return abs(said - right) / abs(right) <= tolerance
    return answer.lower() == reference.lower()


def relaxed_accuracy(answered: Sequence[Answered]) -> Score:
    """Relaxed accuracy in percent: of ChartQA the mean of its parts, human and
    augmented; of other questions the share of right answers.

    Both parts of ChartQA's test set have 1250 questions, so that this is also the
    share of right answers; with a limit on the samples it keeps both parts equal.
    """
    right = [
        one.value is not None
        and any(relaxed_match(str(one.value), answer) for answer in one.sample.answers)
        for one in answered
    ]
    score = share(answered, right)
    parts = by_category(answered, [float(value) for value in right])
    if set(parts) != PARTS or sum(map(len, parts.values())) < len(right):
        return score
    low, high = of_sum(
        [(mean(part), *wilson(sum(part), len(part))) for part in parts.values()]
    )
    return Score(
        total=100 * mean([mean(part) for part in parts.values()]),
        each=score.each,
        low=50 * low,  # half of the sum of both
        high=50 * high,
        groups=score.groups,
    )
