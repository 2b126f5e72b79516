"""Figures of several runs: median and spread, ratios of pairs, and goals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, least and most of several runs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def over(self, scale: float) -> "Spread":
        """In another unit."""
        return Spread(self.median / scale, self.least / scale, self.most / scale)

    def text(self, digits: int = 3) -> str:
        """ "1.25 (1.20-1.31)", in so many significant digits; "1.25" of one value."""
        middle, least, most = (
            number(value, digits) for value in (self.median, self.least, self.most)
        )
        return f"{middle} ({least}-{most})" if self.least < self.most else middle


def number(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, without an exponent: 0.0123, 12.3."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(places, 0)}f}"


def pair_ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of each pair that ran in turn: what the machine did meanwhile falls on both."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


@dataclass(frozen=True)
class Goal:
    """What a ratio should be: at least, or at most, `bound`; and better, `wish`."""

    bound: float
    wish: float | None = None
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether the bound holds."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def text(self, ratio: float) -> str:
        """ ">= 0.98 met, 1.15 missed" """
        sign = "<=" if self.at_most else ">="
        parts = [f"{sign} {self.bound:g} {_word(self.met(ratio))}"]
        if self.wish is not None:
            wish = Goal(self.wish, at_most=self.at_most)
            parts.append(f"{self.wish:g} {_word(wish.met(ratio))}")
        return ", ".join(parts)


def _word(met: bool) -> str:
    return "met" if met else "MISSED"
