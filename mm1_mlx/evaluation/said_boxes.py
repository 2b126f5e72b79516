"""The box in an answer, as parts of the picture's sides."""

import re

from mm1_mlx.evaluation.samples import Sample

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{0,12})?|-?\.\d{1,12})\s*"
_BOX = re.compile(rf"{_NUMBER}\)?,\s*\(?{_NUMBER}\)?,\s*\(?{_NUMBER},{_NUMBER}")
_SCALE = 1000


def first_box(text: str, sample: Sample) -> tuple[float, ...] | None:
    """The first four numbers with commas between them: left, top, right, bottom.

    Decimals up to 1 are parts of the sides; whole numbers are parts of 1000, as MM1.5
    (<1,2,3,4>), Ferret ([1, 2, 3, 4]) and Qwen-VL ((1,2),(3,4)) write them. None where
    there is no box.
    """
    match = _BOX.search(text)
    if match is None:
        return None
    numbers = [float(number) for number in match.groups()]
    decimals = "." in match.group(0) and max(map(abs, numbers)) <= 1
    scale = 1 if decimals else _SCALE
    return tuple(min(max(number / scale, 0.0), 1.0) for number in numbers)
