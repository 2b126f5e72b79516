"""ANLS, the metric of DocVQA and InfographicVQA: how close two strings are."""

from collections.abc import Sequence

from mm1_mlx.evaluation.metrics.scores import average, said
from mm1_mlx.evaluation.samples import Answered, Score

THRESHOLD = 0.5


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements of characters."""
    if len(a) > len(b):
        a, b = b, a
    row = list(range(len(a) + 1))
    for i, y in enumerate(b, 1):
        before, row[0] = row[0], i  # before: the cell above and to the left
        for j, x in enumerate(a, 1):
            cost = before if x == y else 1 + min(before, row[j], row[j - 1])
            before, row[j] = row[j], cost
    return row[-1]


def anls(answer: str, references: Sequence[str], threshold: float = THRESHOLD) -> float:
    """The best similarity to a reference, 0..1; below the threshold 0.

    As the evaluation script of the challenge's server computes it (the one behind
    published DocVQA and InfographicVQA figures): lower case, runs of space as one, the
    distance over the length of the longer of the two as they were given; a
    similarity equal to the threshold counts.
    """
    return _best(answer, references, threshold, paper=False)


def anls_of_the_paper(
    answer: str, references: Sequence[str], threshold: float = THRESHOLD
) -> float:
    """The same as the papers define it (ST-VQA, arXiv 1905.13648, equation 1).

    It differs from the server's script in two places: lengths are those after
    runs of space became one, and a similarity equal to the threshold is 0.
    """
    return _best(answer, references, threshold, paper=True)


def _best(
    answer: str, references: Sequence[str], threshold: float, *, paper: bool
) -> float:
    best = 0.0
    for reference in references:
        a, b = (" ".join(text.lower().split()) for text in (answer, reference))
        # .upper(): as the script; it makes some letters longer (ß becomes SS).
        given = (a, b) if paper else (answer, reference)
        length = max(len(text.upper()) for text in given)
        far = edit_distance(a, b) / length if length else 0.0
        if far < threshold if paper else 1 - far >= threshold:
            best = max(best, 1 - far)
    return best


def anls_score(answered: Sequence[Answered]) -> Score:
    """ANLS x 100: the mean over the questions."""
    each = [anls(said(one), one.sample.answers) for one in answered]
    return average(answered, each)
