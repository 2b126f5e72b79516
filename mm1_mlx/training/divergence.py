"""When a loss is no longer noise: a run that has exploded, though it is finite."""

import math

_UNIFORM = 4.0  # times ln(V): the loss of one who bets evenly on V words is ln(V)
_BEFORE = 10.0  # times the mean of the steps before
_KEPT = 0.9  # of that mean, at each step


class Divergence:
    """Tells an exploded loss from a hard batch, step by step.

    words: V of the vocabulary; None: nothing is ever said. A loss has exploded where it
    is above 4 ln(V) and above 10 times the running mean of the sane ones. No batch is
    that hard for a model that has learned anything: of 32,000 words each would get a
    likelihood of 1e-18. A run that begins so high may come down.
    """

    def __init__(self, words: int | None):
        self._ceiling = _UNIFORM * math.log(words) if words else math.inf
        self._mean: float | None = None

    def said(self, loss: float | None) -> str:
        """What is wrong with the loss of the next step, or ''."""
        if loss is None:
            return ""
        if loss <= self._ceiling:
            before = loss if self._mean is None else self._mean
            self._mean = _KEPT * before + (1 - _KEPT) * loss
            return ""
        if self._mean is None or loss <= _BEFORE * self._mean:
            return ""
        return f"gave the loss {loss:.4g} after a mean of {self._mean:.4g}"
