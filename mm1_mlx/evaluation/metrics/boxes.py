"""Referring expressions (RefCOCO): is the box over the right thing?"""

import math
from collections.abc import Sequence

from mm1_mlx.evaluation.metrics.scores import share
from mm1_mlx.evaluation.samples import Answered, Score

Box = Sequence[float]  # left, top, right, bottom
THRESHOLD = 0.5


def iou(a: Box, b: Box) -> float:
    """The area that two boxes share over the area that they cover, 0..1.

    Corners in any order; a box without area, or with a coordinate that is no number,
    shares nothing.
    """
    if not all(math.isfinite(value) for value in (*a, *b)):
        return 0.0
    (a0, a1), (a2, a3) = _sorted(a)
    (b0, b1), (b2, b3) = _sorted(b)
    both = max(0.0, min(a2, b2) - max(a0, b0)) * max(0.0, min(a3, b3) - max(a1, b1))
    either = (a2 - a0) * (a3 - a1) + (b2 - b0) * (b3 - b1) - both
    return both / either if either > 0 else 0.0


def _sorted(box: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    x0, y0, x1, y1 = box
    return (min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))


def box_accuracy(answered: Sequence[Answered]) -> Score:
    """The share of boxes with an IoU above 0.5 with `fields["box"]`, in percent.

    The value is a box in the same unit, or None where the answer held none.
    """
    right = [
        one.value is not None
        and one.sample.fields["box"] is not None  # of a picture of unknown size
        and iou(one.value, one.sample.fields["box"]) > THRESHOLD
        for one in answered
    ]
    return share(answered, right)
