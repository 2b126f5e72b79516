"""Boxes and points: out of answers, into prompts, and to pixels and back.

A model writes them as text, in a format of its own (mm1_mlx.config_boxes). Here they
are parts of a side, 0 to 1, of a frame: the picture, or the square the model reads.
"""

import math
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mm1_mlx.config_boxes import STYLES, BoxFormat
from mm1_mlx.errors import MM1Warning, PromptError
from mm1_mlx.inputs.images import image_size, load_image
from mm1_mlx.inputs.phrases import label_before, picture_before
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, plural

__all__ = ["Region", "boxes_of", "from_pixels", "parse", "to_pixels", "with_boxes"]

BOX_SLOT, POINT_SLOT = "<box>", "<point>"
Size = tuple[int, int]  # width, height

_NUMBER = r"[-+]?(?:\d{1,6}(?:\.\d{0,12})?|\.\d{1,12})"
_GAP = r"(?:\s{0,4}[,;]\s{0,4}|\s{1,4})"
_JOINT = rf"(?:{_GAP}|\s{{0,4}}\)\s{{0,4}},?\s{{0,4}}\(\s{{0,4}})"  # (x,y),(x,y)
_REGION = re.compile(
    rf"[<\[(]\s{{0,4}}({_NUMBER}){_GAP}({_NUMBER})"
    rf"(?:({_JOINT})({_NUMBER}){_GAP}({_NUMBER}))?\s{{0,4}}[>\])]"
)
_CLOSING = {"<": ">", "[": "]", "(": ")"}
_OWN = {"mm1": "<", "ferret": "[", "llava": "[", "qwen": "("}
# What Qwen-VL and its relatives put around the numbers.
_BEFORE = re.compile(r"<\|?(?:box|point)(?:_start)?\|?>\s{0,4}\[?\s{0,4}$")
_AFTER = re.compile(r"\s{0,4}\]?\s{0,4}<(?:/|\|)(?:box|point)(?:_end\|)?>")
_BEYOND = 1.05  # a number up to here is meant to lie on the edge


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box or a point of a text.

    place: left, top, right, bottom (a point: x, y) as parts of the frame's sides, in
    this order and from 0 to 1; a box may have no width or height. label: the phrase
    before it, or "". span: where it stands in the text. picture: its picture, from 0.
    frame: "image", "padded" or "cropped". guessed: whether the model's folder does not
    say how it writes boxes.
    """

    place: tuple[float, ...]
    label: str = ""
    span: tuple[int, int] = (0, 0)
    picture: int = 0
    frame: str = "image"
    guessed: bool = False

    @property
    def kind(self) -> str:
        """ "box" or "point"."""
        return "box" if len(self.place) == 4 else "point"

    def to_pixels(self, width: int, height: int) -> tuple[float, ...]:
        """Where it lies in a picture of this size, not rounded."""
        return to_pixels(self.place, width, height, self.frame)


# --- frames --------------------------------------------------------------------------


def frame_of(boxes: BoxFormat, resize_mode: str) -> str:
    """The frame of boxes for a model that is shown pictures in this way."""
    if boxes.frame == "image":
        return "image"
    return {"pad": "padded", "crop": "cropped"}.get(resize_mode, "image")


def _frame_box(width: int, height: int, frame: str) -> tuple[float, ...]:
    """Left, top, width and height of a frame, in the picture's pixels.

    As inputs.images makes it: of the border half, rounded down, is in front; what is
    cut off is measured after resizing, so half of it is.
    """
    if frame == "image":
        return 0, 0, width, height
    if frame == "padded":
        side = max(width, height)
        return -((side - width) // 2), -((side - height) // 2), side, side
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side, side


def to_pixels(
    place: Sequence[float], width: int, height: int, frame: str = "image"
) -> tuple[float, ...]:
    """Parts of a frame (x, y, ...) as pixels of the picture, clipped to it."""
    left, top, wide, high = _frame_box(width, height, frame)
    starts, sides, most = (left, top), (wide, high), (width, height)
    return tuple(
        min(max(starts[i % 2] + part * sides[i % 2], 0.0), float(most[i % 2]))
        for i, part in enumerate(place)
    )


def _to_parts(
    pixels: Sequence[float], width: int, height: int, frame: str
) -> tuple[float, ...]:
    """The inverse of to_pixels, clipped to the frame."""
    left, top, wide, high = _frame_box(width, height, frame)
    starts, sides = (left, top), (wide, high)
    return tuple(
        min(max((value - starts[i % 2]) / sides[i % 2], 0.0), 1.0)
        for i, value in enumerate(pixels)
    )


# --- out of a text -------------------------------------------------------------------


def parse(
    text: str,
    boxes: BoxFormat | None = None,
    *,
    resize_mode: str = "pad",
    pictures: int = 1,
) -> list[Region]:
    """The boxes and points of a text, in their order; any text will do.

    boxes: how the model writes them; None tries all styles, and marks what it finds as
    guessed. resize_mode: how the model is shown pictures, see frame_of. pictures: how
    many there are; a region is of the one that the text names last before it ("image
    2", "the second picture"), else of the last one.

    Corners are put in order. A number a little outside of the frame is clipped, and
    one further out shows that it is no region. Decimals up to 1 are parts of a side in
    any style. A region right behind another one has its label.
    """
    found: list[Region] = []
    for match in _REGION.finditer(text):
        span, wrapped = _whole_span(text, match)
        style = _style_of(match, boxes, wrapped)
        if style is None:
            continue
        place = _parts(match, style)
        if place is None:
            continue
        before = found[-1] if found else None
        label = label_before(text, span, before.span[1] if before else 0)
        if not label and before is not None:
            label = before.label
        found.append(
            Region(
                place=place,
                label=label,
                span=span,
                picture=picture_before(text[: span[0]], pictures),
                frame=frame_of(style, resize_mode),
                guessed=boxes is None,
            )
        )
    return found


def _whole_span(text: str, match: re.Match) -> tuple[tuple[int, int], bool]:
    """Where a region stands, with the marks around it, and whether it has some."""
    start, end = match.span()
    before = _BEFORE.search(text, max(start - 24, 0), start)
    if before is None:
        return (start, end), False
    after = _AFTER.match(text, end)
    return (before.start(), after.end() if after else end), True


def _style_of(
    match: re.Match, boxes: BoxFormat | None, wrapped: bool
) -> BoxFormat | None:
    """The format to read a match by, None for what only looks like a region."""
    text, joint = match[0], match[3]
    opening, is_box = text[0], joint is not None
    paired = is_box and ")" in joint
    if text[-1] != _CLOSING[opening] or (paired and opening != "("):
        return None
    if opening == "<" and not is_box and text != f"<{text[1:-1].strip()}>":
        return None  # "3 < 4, 5 > 2"
    if boxes is not None:
        # Boxes in any brackets; two numbers in brackets are often something else.
        own = opening == _OWN[boxes.style] or wrapped
        return boxes if is_box or own else None
    if wrapped or paired:
        return BoxFormat(style="qwen")
    if opening == "<":
        return BoxFormat(style="mm1")
    if not is_box:
        return None
    return BoxFormat(style="llava" if "." in text else "ferret")


def _parts(match: re.Match, boxes: BoxFormat) -> tuple[float, ...] | None:
    """The numbers as parts of a side, in order; None where they cannot be.

    A whole number stands for the strip of the side behind it, so for its middle.
    """
    words = [word for word in match.group(1, 2, 4, 5) if word is not None]
    values = [float(word) for word in words]
    assert boxes.scale is not None
    parts = boxes.style == "llava" or (
        max(values) <= 1 and any("." in w for w in words)
    )
    if not parts:
        values = [(value + 0.5) / boxes.scale for value in values]
    if not all(1 - _BEYOND <= value <= _BEYOND for value in values):
        return None
    values = [min(max(value, 0.0), 1.0) for value in values]
    if len(values) == 2:
        return tuple(values)
    (left, right), (top, bottom) = sorted(values[::2]), sorted(values[1::2])
    return left, top, right, bottom


def boxes_of(
    answer: Any,
    processor: Any,
    *,
    pictures: int | None = None,
    form: BoxFormat | None = None,
) -> list[Region]:
    """The boxes and points of an answer.

        for region in boxes_of(result, processor):
            print(region.label, region.to_pixels(*Image.open("a.png").size))

    answer: text, or what `generate` gave. pictures: how many the prompt had, those of
    examples before it not counted; None is as many as `generate` was given, of text 1.
    form: how the model writes them, where its folder does not say.
    """
    settings = processor.image_settings
    shown = getattr(answer, "num_images", 1) - getattr(answer, "shot_images", 0)
    return parse(
        str(answer),
        form or processor.config.box_config,
        resize_mode=settings.resize_mode if settings else "pad",
        pictures=max(shown, 1) if pictures is None else pictures,
    )


# --- into a prompt -------------------------------------------------------------------


def from_pixels(
    pixels: Sequence[float],
    width: int,
    height: int,
    boxes: BoxFormat,
    *,
    resize_mode: str = "pad",
) -> str:
    """A box (x1, y1, x2, y2) or point (x, y) of a picture as the model writes it.

    Corners may come in any order; what lies outside of the picture is cut off.
    resize_mode: as in parse. PromptError where nothing of it lies in the picture, or
    nothing in the frame that the model counts in.
    """
    shown = _shown(pixels, width, height, frame_of(boxes, resize_mode))
    return _spell(_to_parts(shown, width, height, frame_of(boxes, resize_mode)), boxes)


def _shown(pixels: Sequence[float], width: int, height: int, frame: str) -> list[float]:
    """What of a box or point is in the picture and in the frame, in pixels.

    Tiles may show more than the frame; the model's numbers cannot say it.
    """
    inside = _inside(pixels, width, height)
    x, y, wide, high = _frame_box(width, height, frame)
    cut = [
        min(max(value, start), start + side)
        for value, start, side in zip(
            inside, (x, y) * 2, (wide, high) * 2, strict=False
        )
    ]
    is_box = len(cut) == 4
    if (cut[0] == cut[2] or cut[1] == cut[3]) if is_box else cut != inside:
        what = "box" if is_box else "point"
        raise PromptError(
            f"The {what} {_listed(pixels)} cannot be told to this model: of the "
            f"picture of {width}x{height} it counts boxes from {_listed((x, y))} to "
            f"{_listed((x + wide, y + high))}. Give another {what}, or another "
            f"--resize-mode."
        )
    return cut


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _numbers(place: Any, counts: tuple[int, ...] = (2, 4)) -> list[float]:
    """A box or a point as so many finite numbers. PromptError for anything else."""
    values = []
    with suppress(TypeError, ValueError, OverflowError):
        values = [math.nan if isinstance(v, str) else float(v) for v in place]
    if len(values) in counts and all(map(math.isfinite, values)):
        return values
    what = "point" if counts == (2,) else "box"
    said = " ".join(str(place).split())[:60]
    raise PromptError(
        f"A {what} is {said}, but a box must be four numbers, x1,y1,x2,y2 in pixels of "
        f"the picture, and a point two, x,y."
    )


def _inside(pixels: Sequence[float], width: int, height: int) -> list[float]:
    """Corners in order and within the picture."""
    values = _numbers(pixels)
    if len(values) == 2:
        x, y = values
        if not (0 <= x <= width and 0 <= y <= height):
            raise PromptError(
                f"The point {_listed(values)} lies outside of the picture of "
                f"{width}x{height}. Give it in pixels from the left and the top."
            )
        return values
    (left, right), (top, bottom) = sorted(values[::2]), sorted(values[1::2])
    if left == right or top == bottom:
        raise PromptError(
            f"The box {_listed(values)} has no area. Give two corners, x1,y1,x2,y2, or "
            f"a point, x,y."
        )
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise PromptError(
            f"The box {_listed(values)} lies outside of the picture of "
            f"{width}x{height}. Give its corners in pixels, x1,y1,x2,y2."
        )
    return [max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)]


def _spell(parts: Sequence[float], boxes: BoxFormat) -> str:
    """Parts of the frame's sides in a model's format."""
    scale = boxes.scale
    assert scale is not None
    if boxes.style == "llava":
        digits = len(str(scale - 1))
        counts = [math.floor(part * scale + 0.5) / scale for part in parts]
        return "[" + ", ".join(f"{count:.{digits}f}" for count in counts) + "]"
    # Rounded down, as the training data of Ferret and Qwen-VL is.
    words = [str(min(math.floor(part * scale), scale - 1)) for part in parts]
    if boxes.style == "mm1":
        return "<" + ",".join(words) + ">"
    if boxes.style == "ferret":
        return "[" + ", ".join(words) + "]"
    pairs = [f"({x},{y})" for x, y in zip(words[::2], words[1::2], strict=True)]
    mark = "box" if len(pairs) == 2 else "point"
    return f"<{mark}>{','.join(pairs)}</{mark}>"


def with_boxes(
    prompt: str,
    processor: Any,
    images: Sequence[Any],
    boxes: Sequence[Sequence[float]] = (),
    points: Sequence[Sequence[float]] = (),
    *,
    form: BoxFormat | None = None,
    max_pixels: int | None = None,
) -> str:
    """A prompt with boxes and points in the places of its <box> and <point>.

        with_boxes("What is in <box>?", processor, ["a.png"], [(10, 20, 60, 80)])

    images: those of the prompt. boxes, points: in pixels, in the order of their places.
    A place belongs to the picture whose <image> stands last before it; where pictures
    have no places they come first, so to the last one. form: how the model writes
    boxes, where its folder does not say. max_pixels: of a picture, as in load_image.
    MM1Warning for a box of which a part lies outside of the picture, or of the frame
    that the model counts in.
    PromptError where counts differ, for what is no box, and where nobody knows how
    this model writes them.
    """
    left = {
        BOX_SLOT: [_numbers(box, (4,)) for box in boxes],
        POINT_SLOT: [_numbers(point, (2,)) for point in points],
    }
    for slot, given in left.items():
        _check_slots(prompt, slot, len(given))
    if not any(left.values()):
        return prompt
    form = form or processor.config.box_config
    if form is None:
        raise PromptError(
            f"The model's folder does not say how it writes boxes. Name a style "
            f"(--box-format {', '.join(STYLES)}; form=BoxFormat(style=...)), or write "
            f"the numbers yourself."
        )
    if not images:
        raise PromptError("The prompt has boxes or points, but no picture was given.")
    if processor.image_settings is None:
        raise PromptError("This model reads text only: there is no picture for a box.")
    mode = processor.image_settings.resize_mode
    sizes = [size_of(image, max_pixels) for image in images]
    out, picture = [], 0 if IMAGE_TOKEN in prompt else len(sizes)
    for piece in re.split(f"({IMAGE_TOKEN}|{BOX_SLOT}|{POINT_SLOT})", prompt):
        if piece == IMAGE_TOKEN:
            picture += 1
        elif left.get(piece):
            size = sizes[min(max(picture, 1), len(sizes)) - 1]
            pixels = left[piece].pop(0)
            piece = from_pixels(pixels, *size, form, resize_mode=mode)
            _warn_if_cut(pixels, *size, frame_of(form, mode))
        out.append(piece)
    return "".join(out)


def _warn_if_cut(pixels: Sequence[float], width: int, height: int, frame: str) -> None:
    shown = _shown(pixels, width, height, frame)
    if sorted(shown) == sorted(map(float, pixels)):
        return
    whole = shown == _inside(pixels, width, height)
    reason = f"the picture is {width}x{height}"
    if not whole:
        reason += " and the model counts boxes in a part of it (--resize-mode)"
    warnings.warn(
        f"The box {_listed(pixels)} is cut to {_listed(shown)}: {reason}.",
        MM1Warning,
        stacklevel=3,
    )


def size_of(image: Any, max_pixels: int | None = None) -> Size:
    """Width and height of a picture, of one over the usual limit if that is allowed."""
    if max_pixels is None:
        return image_size(image)
    return load_image(image, max_pixels=max_pixels).size


def _check_slots(prompt: str, slot: str, count: int) -> None:
    slots = prompt.count(slot)
    if count == slots or not count:  # without one, a prompt may write of <box>
        return
    name = slot.strip("<>")
    many = plural(count, name, "boxes" if slot == BOX_SLOT else None)
    raise PromptError(
        f"{many} came with the prompt, but it has {slots} {slot}. Write {slot} once "
        f"for each, where it belongs in the text."
    )
