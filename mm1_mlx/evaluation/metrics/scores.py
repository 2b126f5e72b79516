"""From one number per sample to a Score: totals, groups, intervals."""

from collections.abc import Sequence

from mm1_mlx.evaluation.metrics.intervals import spread, wilson
from mm1_mlx.evaluation.samples import Answered, Score


def said(one: Answered) -> str:
    """The value as text; "" where the sample could not be asked."""
    return "" if one.value is None else str(one.value)


def by_category(
    answered: Sequence[Answered], values: Sequence[float]
) -> dict[str, list[float]]:
    """The values of each `fields["category"]`, in order of appearance; {} without."""
    found: dict[str, list[float]] = {}
    for one, value in zip(answered, values, strict=True):
        category = one.sample.fields.get("category")
        if category is not None:
            found.setdefault(str(category), []).append(value)
    return found


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def category_means(
    answered: Sequence[Answered], values: Sequence[float], scale: float = 100.0
) -> dict[str, float]:
    """The mean of each category times scale."""
    groups = by_category(answered, values)
    return {name: scale * mean(group) for name, group in groups.items()}


def share(answered: Sequence[Answered], right: Sequence[bool]) -> Score:
    """The share of right answers in percent, with Wilson's interval."""
    each = [float(value) for value in right]
    low, high = wilson(sum(each), len(each))
    return Score(
        total=100 * mean(each),
        each=list(each),
        low=100 * low,
        high=100 * high,
        groups=category_means(answered, each),
    )


def average(
    answered: Sequence[Answered], each: Sequence[float], scale: float = 100.0
) -> Score:
    """The mean of partly right answers (0..1) times scale, with its interval."""
    if not each:
        return Score(total=0.0, each=[])
    low, high = spread(each)
    return Score(
        total=scale * mean(each),
        each=list(each),
        low=scale * low,
        high=scale * high,
        groups=category_means(answered, each, scale),
    )
