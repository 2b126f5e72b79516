"""A sheet of failures to look at: picture, question, expected and found, as a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mm1_mlx.checkpoint.folder import replacing_file
from mm1_mlx.errors import MM1Error
from mm1_mlx.inputs.images import load_image

_COLUMNS, _WIDTH, _HEIGHT, _GAP = 3, 340, 240, 20  # pixels
_SIZE, _LINE = 15, 19  # of the letters, and from line to line
_LINES = {"asked": 4, "expected": 2, "found": 3}  # at most
_LABEL = 76  # pixels in front of an answer
_BLACK, _GREY, _RED, _PALE = "#111827", "#6b7280", "#b91c1c", "#f1f5f9"
_FRAME, _BLUE = "#cbd5e1", "#1d4ed8"
_SHOWN = 2  # pictures side by side


@dataclass(frozen=True)
class Failure:
    """One question that was answered wrong."""

    id: str
    images: tuple[Any, ...]
    question: str
    expected: str
    found: str
    # Boxes to draw into the first picture, as parts of its sides.
    expected_box: tuple[float, ...] | None = None
    found_box: tuple[float, ...] | None = None


def draw_sheet(failures: Sequence[Failure], path: Path, title: str) -> None:
    """Write the failures as one picture, three side by side."""
    font = ImageFont.load_default(_SIZE)
    cells = [_text_of(failure, font) for failure in failures]
    rows = [cells[i : i + _COLUMNS] for i in range(0, len(cells), _COLUMNS)]
    heights = [
        _HEIGHT + _GAP // 2 + _LINE * max(len(cell) for cell in row) for row in rows
    ]
    width = _COLUMNS * (_WIDTH + _GAP) + _GAP
    top = 2 * _GAP + _LINE
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill=_BLACK, font=font)
    for place, failure in enumerate(failures):
        row, column = divmod(place, _COLUMNS)
        left = _GAP + column * (_WIDTH + _GAP)
        y = top + sum(heights[:row]) + row * _GAP
        size = _paste(sheet, draw, failure.images, left, y, font)
        for box, colour in ((failure.expected_box, _BLUE), (failure.found_box, _RED)):
            if size is not None and box is not None:
                _outline(draw, box, (left, y), size, colour)
        y += _HEIGHT + _GAP // 2
        for label, text, colour in cells[place]:
            draw.text((left, y), label or "", fill=_GREY, font=font)
            start = left if label is None else left + _LABEL
            draw.text((start, y), text, fill=colour, font=font)
            y += _LINE
    with replacing_file(path) as new:
        sheet.save(new, "PNG")


Line = tuple[str | None, str, str]  # a label or None, the text, its colour


def _text_of(failure: Failure, font: Any) -> list[Line]:
    lines: list[Line] = [
        (None, line, _BLACK)
        for line in wrapped(failure.question, font, _WIDTH, _LINES["asked"])
    ]
    for label, text, colour in (
        ("expected", failure.expected, _BLACK),
        ("found", failure.found or "(nothing)", _RED),
    ):
        room = _WIDTH - _LABEL
        for number, line in enumerate(wrapped(text, font, room, _LINES[label])):
            lines.append(("" if number else label, line, colour))
    return lines


def wrapped(text: str, font: Any, width: int, most: int) -> list[str]:
    """A text in lines of so many pixels; what does not fit ends in dots."""
    lines, line = [], ""
    for word in _words(text, font, width):
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last}..."]


def _words(text: str, font: Any, width: int) -> list[str]:
    """Its words; one that is wider than a line is cut, as languages without spaces
    need."""
    found = []
    for word in text.split():
        part = ""
        for letter in word:
            if part and font.getlength(part + letter) > width:
                found.append(part)
                part = ""
            part += letter
        found.append(part)
    return found


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    images: Sequence[Any],
    left: int,
    top: int,
    font: Any,
) -> tuple[int, int] | None:
    """The first picture and the last, which is mostly asked about, side by side, or a
    field that says why there is none.

    The size of the first one on the sheet, None where it is not there.
    """
    first = None
    shown = [*images[: _SHOWN - 1], *images[_SHOWN - 1 :][-1:]]
    if not shown:
        _field(draw, "text only", left, top, _WIDTH, font)
        return None
    room = (_WIDTH - _GAP // 2 * (len(shown) - 1)) // len(shown)
    for place, source in enumerate(shown):
        start = left + place * (room + _GAP // 2)
        try:
            picture = load_image(source)
        except MM1Error:
            _field(draw, "cannot be read", start, top, room, font)
            continue
        scale = min(room / picture.width, _HEIGHT / picture.height)
        size = [max(1, round(side * scale)) for side in picture.size]
        kind = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
        first = (size[0], size[1]) if place == 0 else first
        sheet.paste(picture.resize((size[0], size[1]), kind), (start, top))
        draw.rectangle(
            (start, top, start + size[0] - 1, top + size[1] - 1), outline=_FRAME
        )
    if more := len(images) - len(shown):
        text = f"and {more} more"
        right = left + _WIDTH - font.getlength(text)
        draw.text((right, top + _HEIGHT - _LINE), text, fill=_RED, font=font)
    return first


def _outline(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    start: tuple[int, int],
    size: tuple[int, int],
    colour: str,
) -> None:
    """A box of a picture that lies at `start` of the sheet."""
    corners = [start[i % 2] + part * (size[i % 2] - 1) for i, part in enumerate(box)]
    (left, right), (top, bottom) = sorted(corners[::2]), sorted(corners[1::2])
    draw.rectangle((left, top, right, bottom), outline=colour, width=2)


def _field(
    draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, font: Any
) -> None:
    draw.rectangle((left, top, left + width, top + _HEIGHT), fill=_PALE)
    start = left + (width - font.getlength(text)) / 2
    draw.text((start, top + _HEIGHT // 2), text, fill=_GREY, font=font)
