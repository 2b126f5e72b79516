"""Intervals of 95%: Wilson's for shares, the bootstrap for everything else, and both
for sums of figures of several groups."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959963984540054  # two-sided 95% of the normal distribution
ROUNDS = 1000  # the ends then move by about 2% of the width between seeds


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's score interval); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + Z * Z / (2 * n)
    reach = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # At 0 and 1 rounding must not put the end beyond the share itself.
    low = 0.0 if right == 0 else (middle - reach) / scale
    high = 1.0 if right == n else (middle + reach) / scale
    return low, high


def bootstrap(
    strata: Sequence[Sequence[float] | np.ndarray],
    combine: Callable[[list[np.ndarray]], np.ndarray] | None = None,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> tuple[float, float]:
    """The 95% percentile interval of a figure made of the means of some groups.

    strata holds each group's values, (n,) or (n, k). Each is drawn anew with
    replacement within itself, so that a benchmark keeps its mix of categories.
    combine gets the groups' means, one array of (rounds,) or (rounds, k) each, and
    gives the figure, (rounds,); without it, their mean over all values.

    The same seed gives the same interval on every machine.
    """
    groups = [np.asarray(values, np.float64) for values in strata if len(values)]
    if not groups:
        raise ValueError("bootstrap of nothing")
    random = np.random.default_rng(seed)
    means = []
    for values in groups:
        n = len(values)  # one round at a time: (rounds, n) may not fit
        draws = (values[random.integers(n, size=n)] for _ in range(rounds))
        means.append(np.stack([draw.mean(axis=0) for draw in draws]))
    if combine is not None:
        figures = combine(means)
    else:
        sizes = np.array([len(values) for values in groups], np.float64)
        figures = np.average(np.stack(means), axis=0, weights=sizes)
    low, high = np.percentile(figures, [2.5, 97.5])
    return float(low), float(high)


def spread(
    values: Sequence[float] | np.ndarray,
    figure: Callable[[list[np.ndarray]], np.ndarray] | None = None,
) -> tuple[float, float]:
    """The 95% interval of one group's mean, or figure of means, in 0..1.

    The bootstrap's; where no draw changes it, as of answers that are all right,
    Wilson's, for the bootstrap takes that for certain.
    """
    low, high = bootstrap([values], figure)
    return (low, high) if low < high else wilson(low * len(values), len(values))


def of_sum(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The 95% interval of a sum of independent figures.

    parts: each figure with its own interval. The distances to their ends are added as
    squares (Zou and Donner 2008, "method of variance estimates recovery").
    """
    total = sum(figure for figure, _, _ in parts)
    down = math.hypot(*(figure - low for figure, low, _ in parts))
    up = math.hypot(*(high - figure for figure, _, high in parts))
    return total - down, total + up
