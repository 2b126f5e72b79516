"""A test question, and when an answer to it is right."""

import re
from dataclasses import dataclass, field
from typing import Any

from examples.mm1_tiny.reasoning import ANSWER

LEAST_IOU = 0.5  # RefCOCO's
JUDGES = ("exact", "last", "box")


@dataclass
class Example:
    """One test question. Text has no role marks; images without an `<image>` mark in
    it come first.

    prompt: text, or the messages of a conversation. judge: one of JUDGES. resolution:
    as `generate` takes it. groups: what it counts for, beside its task.
    """

    images: list[Any]
    prompt: Any
    answer: str
    task: str
    judge: str = "exact"
    resolution: str | None = None
    groups: dict[str, str] = field(default_factory=dict)


def is_right(answer: str, text: str, judge: str = "exact") -> bool:
    """Whether a model's text is the answer.

    judge: "exact"; "last": what stands after the last "Answer:", if there is one, is
    the answer; "box": a box that overlaps with IoU > 0.5.
    """
    text = text.strip()
    if judge == "last":
        text = text.rsplit(ANSWER, 1)[-1].strip()
    if judge == "box":
        return iou(numbers_of(answer), numbers_of(text)) > LEAST_IOU
    return text == answer


def numbers_of(text: str) -> list[int] | None:
    """The four numbers of the first "<x1,y1,x2,y2>"."""
    found = re.search(r"<(\d+),(\d+),(\d+),(\d+)>", text)
    return [int(n) for n in found.groups()] if found else None


def iou(a: list[int] | None, b: list[int] | None) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    if a is None or b is None:
        return 0.0
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    both = max(across, 0) * max(down, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return both / (sum(areas) - both) if both else 0.0
