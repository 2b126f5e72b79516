"""CIDEr, the metric of captions: n-grams shared with what people wrote, weighted by
how rare they are (arXiv 1411.5726; the form CIDEr-D that all published figures use).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mm1_mlx.evaluation.metrics.ptb import tokenize
from mm1_mlx.evaluation.metrics.scores import average, said
from mm1_mlx.evaluation.samples import Answered, Score

N = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty on a difference in length, in words
Tokens = Sequence[str]
Gram = tuple[str, ...]


def cider(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> list[float]:
    """The CIDEr-D of each candidate with its references, 0..10.

    How rare an n-gram is, is counted over the references given: a caption's figure
    depends on the whole set, and a set of one gives 0.
    """
    seen = [[_grams(tokens) for tokens in one] for one in references]
    frequency = Counter(gram for one in seen for gram in set().union(*one))
    rarest = math.log(len(seen)) if seen else 0.0
    weights = {gram: rarest - math.log(count) for gram, count in frequency.items()}

    scores = []
    for tokens, grams in zip(candidates, seen, strict=True):
        said = _Vector.of(_grams(tokens), weights, rarest)
        others = [_Vector.of(one, weights, rarest) for one in grams]
        total = sum(_similarity(said, other) for other in others)
        scores.append(10 * total / len(others))
    return scores


def _grams(tokens: Tokens) -> Counter[Gram]:
    return Counter(
        tuple(tokens[i : i + n])
        for n in range(1, N + 1)
        for i in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True)
class _Vector:
    """A caption: each n-gram's count times its rarity, and the length per n."""

    values: dict[Gram, float]
    norms: list[float]
    words: int

    @classmethod
    def of(
        cls, grams: Counter[Gram], weights: dict[Gram, float], rarest: float
    ) -> "_Vector":
        values = {gram: n * weights.get(gram, rarest) for gram, n in grams.items()}
        squares = [0.0] * N
        for gram, value in values.items():
            squares[len(gram) - 1] += value * value
        words = sum(count for gram, count in grams.items() if len(gram) == 1)
        return cls(values, [math.sqrt(square) for square in squares], words)


def _similarity(said: _Vector, other: _Vector) -> float:
    """The mean over n of the clipped cosines, less for another length."""
    sums = [0.0] * N
    for gram, value in said.values.items():
        there = other.values.get(gram)
        if there is not None:
            sums[len(gram) - 1] += min(value, there) * there
    cosines = [
        total / (a * b) if a and b else total
        for total, a, b in zip(sums, said.norms, other.norms, strict=True)
    ]
    apart = said.words - other.words
    return sum(cosines) / N * math.exp(-(apart**2) / (2 * SIGMA**2))


def cider_score(answered: Sequence[Answered]) -> Score:
    """CIDEr x 100 of captions, tokenized as the reference does (`ptb`).

    The interval is a bootstrap of the captions' figures (None where they are all the
    same); rarities stay those of the whole set, for the groups, too: of fewer captions
    (a limit) words are rarer, or not there at all. each is CIDEr / 10.
    """
    captions = tokenize([said(one) for one in answered])
    flat = tokenize([text for one in answered for text in one.sample.answers])
    references, start = [], 0
    for one in answered:
        end = start + len(one.sample.answers)
        references.append(flat[start:end])
        start = end
    each = [score / 10 for score in cider(captions, references)]
    score = average(answered, each, scale=1000.0)
    return score if len(set(each)) > 1 else replace(score, low=None, high=None)
