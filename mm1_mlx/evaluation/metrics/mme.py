"""MME: two yes-or-no questions about each picture, in 14 categories."""

from collections.abc import Sequence

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.metrics.intervals import of_sum, spread
from mm1_mlx.evaluation.metrics.scores import mean
from mm1_mlx.evaluation.samples import Answered, Score

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_MOST = 200  # points of a picture, and of a category


def pair_points(right: Sequence[bool]) -> float:
    """What a picture's two answers give, 0..200.

    Accuracy in percent, and 100 more if both are right.
    """
    return 100 * sum(right) / len(right) + 100 * all(right)


def mme_points(answered: Sequence[Answered]) -> dict[str, list[float]]:
    """The points of each pair, by category.

    `fields["category"]` and `fields["pair"]` say what belongs together. A pair of
    which only one question was asked (--limit) is left out.
    """
    pairs: dict[str, dict[str, list[bool]]] = {}
    for one in answered:
        category, pair = _place(one)
        right = one.value == one.sample.answers[0].strip().lower().replace(".", "")
        pairs.setdefault(category, {}).setdefault(pair, []).append(right)
    points = {
        category: [pair_points(right) for right in found.values() if len(right) == 2]
        for category, found in pairs.items()
    }
    for category, found in pairs.items():
        for pair, right in found.items():
            if len(right) > 2:
                raise DatasetError(
                    f"MME: picture {pair} of {category} has {len(right)} questions, "
                    "expected 2. Give each picture its own `pair` in Sample.fields."
                )
    return {category: values for category, values in points.items() if values}


def _place(one: Answered) -> tuple[str, str]:
    try:
        return str(one.sample.fields["category"]), str(one.sample.fields["pair"])
    except KeyError as missing:
        raise DatasetError(
            f"MME: question {one.sample.id} has no field {missing}; expected the name "
            "of its category and `pair`, the picture that two questions share."
        ) from None


def mme_score(answered: Sequence[Answered]) -> Score:
    """The sum of perception and cognition, up to 2800.

    groups: `perception` (up to 2000), `cognition` (up to 800), `MM1.5 (/ 28)` (their
    sum over 28, 0..100, which MM1.5 averages with its other benchmarks), and each
    category (up to 200). A category without a whole pair adds nothing; then the sum is
    of fewer than MME has, and has no interval.
    """
    points = mme_points(answered)
    each: list[float | None] = [
        float(one.value == one.sample.answers[0].strip().lower().replace(".", ""))
        for one in answered
    ]
    means = {category: mean(values) for category, values in points.items()}
    cognition = sum(means[name] for name in means if name in COGNITION)
    total = sum(means.values())
    low = high = None
    if {*PERCEPTION, *COGNITION} <= set(points):
        shares = {name: [p / _MOST for p in found] for name, found in points.items()}
        parts = [(means[name] / _MOST, *spread(shares[name])) for name in means]
        low, high = (_MOST * end for end in of_sum(parts))
    groups = {
        "perception": total - cognition,
        "cognition": cognition,
        "MM1.5 (/ 28)": total / 28,
    }
    return Score(total=total, each=each, low=low, high=high, groups=groups | means)
