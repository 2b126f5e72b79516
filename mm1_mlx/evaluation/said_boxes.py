"""The box in an answer, as parts of the picture's sides."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

from mm1_mlx.config_boxes import BoxFormat
from mm1_mlx.evaluation.samples import Sample, Task
from mm1_mlx.inputs.boxes import frame_of, from_pixels, parse
from mm1_mlx.inputs.images import image_size

_DIGITS = r"(-?\d{1,6}(?:\.\d{0,12})?|-?\.\d{1,12})"
# Few spaces: an answer may be nothing else.
_NUMBER = rf"\s{{0,4}}{_DIGITS}\s{{0,4}}"
_COMMA = r"\)?,\s{0,4}\(?"
_BOX = re.compile(rf"{_NUMBER}{_COMMA}{_NUMBER}{_COMMA}{_NUMBER},{_NUMBER}")
_SPACED = r"\s{1,4}".join([_DIGITS] * 4)
_IN_BRACKETS = re.compile(
    rf"[\[(<]\s{{0,4}}\(?{_BOX.pattern}\)?\s{{0,4}}[\])>]|<\s{{0,4}}{_SPACED}\s{{0,4}}>"
)
_SCALE = 1000


def first_box(text: str, sample: Sample) -> tuple[float, ...] | None:
    """The first four numbers with commas between them: left, top, right, bottom.

    Those that stand in brackets go first; in < > spaces may take the place of commas.
    Numbers up to 1 are parts of the sides; others are parts of 1000, as MM1.5
    (<1,2,3,4>), Ferret ([1, 2, 3, 4]) and Qwen-VL ((1,2),(3,4)) write them. None where
    there is no box.
    """
    match = _IN_BRACKETS.search(text) or _BOX.search(text)
    if match is None:
        return None
    numbers = [float(number) for number in match.groups() if number is not None]
    scale = 1 if max(map(abs, numbers)) <= 1 else _SCALE
    return tuple(min(max(number / scale, 0.0), 1.0) for number in numbers)


# --- as the model's folder says ---


def in_form_of(task: Task, processor: Any) -> Task:
    """A task of boxes that reads and shows them as the model's folder says.

    Every other task, and all for a folder that does not say it, as they are.
    """
    form = _form_of(processor)
    if not task.boxes or form is None:
        return task
    more = {"form": form, "mode": _mode_of(processor)}
    return replace(task, clean=partial(_said, **more), target=partial(_shown, **more))


def form_in_words(processor: Any) -> str:
    """The form for the report: "qwen, parts of 1000 of the picture"."""
    form = _form_of(processor)
    if form is None:
        return f"not told by the model's folder: parts of {_SCALE} of the picture"
    frame = frame_of(form, _mode_of(processor))
    of = "picture" if frame == "image" else f"{frame} picture"
    return f"{form.style}, parts of {form.scale} of the {of}"


def _form_of(processor: Any) -> BoxFormat | None:
    return getattr(getattr(processor, "config", None), "box_config", None)


def _mode_of(processor: Any) -> str:
    settings = processor.image_settings
    return settings.resize_mode if settings else "pad"


def _said(
    text: str, sample: Sample, *, form: BoxFormat, mode: str
) -> tuple[float, ...] | None:
    """The first box of an answer, as parts of the picture's sides; None without one."""
    regions = parse(text, form, resize_mode=mode)
    box = next((region for region in regions if region.kind == "box"), None)
    if box is None:
        return None
    width, height = _size_of(sample, box.frame)
    pixels = box.to_pixels(width, height)
    sides = (width, height, width, height)
    return tuple(value / side for value, side in zip(pixels, sides, strict=True))


def _shown(sample: Sample, *, form: BoxFormat, mode: str) -> str:
    """The box of a sample as the model writes it; "" as spelled_box."""
    box = sample.fields["box"]
    if box is None:
        return ""
    width, height = _size_of(sample, frame_of(form, mode))
    sides = (width, height, width, height)
    pixels = [part * side for part, side in zip(box, sides, strict=True)]
    return from_pixels(pixels, width, height, form, resize_mode=mode)


def _size_of(sample: Sample, frame: str) -> tuple[int, int]:
    """Of the sample's picture; of any, where boxes are parts of the picture itself."""
    if frame == "image":
        return 1, 1
    size = sample.fields.get("size")
    if size is not None:
        return size
    source = sample.images[0]
    return image_size(source.read() if hasattr(source, "read") else source)
