"""Boxes and points drawn on pictures, with their labels."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mm1_mlx.inputs.boxes import Region
from mm1_mlx.inputs.images import load_image

__all__ = ["draw_boxes"]

# Apart from each other for the colour-blind, too (Okabe and Ito's); one for each label.
_COLOURS = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
    (230, 159, 0),
)
_DARK, _LIGHT = (0, 0, 0), (255, 255, 255)


def draw_boxes(
    image: Any, regions: Sequence[Region], *, picture: int | None = None, **how: Any
) -> Image.Image:
    """A copy of a picture with boxes, points and labels on it, upright, in its size.

    image: whatever load_image takes; how: its settings. regions: those of boxes_of.
    picture: draw only those of this one, from 0. Regions of the same label have the
    same colour; lines and letters grow with the picture. Raises ImageError.
    """
    canvas = load_image(image, **how).copy()
    if picture is not None:
        regions = [region for region in regions if region.picture == picture]
    names = list(dict.fromkeys(region.label for region in regions))
    pen = _Pen(canvas)
    for region in regions:
        pen.outline(region, _COLOURS[names.index(region.label) % len(_COLOURS)])
    for region in regions:  # above all lines
        pen.label(region, _COLOURS[names.index(region.label) % len(_COLOURS)])
    return canvas


class _Pen:
    """Draws regions on one picture."""

    def __init__(self, canvas: Image.Image):
        self._draw = ImageDraw.Draw(canvas)
        self._size = canvas.size
        # Of the shorter side, so that a panorama has no beams.
        short = min(canvas.size)
        self._line = max(1, round(short / 200))
        self._radius = 3 * self._line + 1  # of a point
        self._font = _font(max(10, round(short / 28)))

    def outline(self, region: Region, colour: tuple[int, int, int]) -> None:
        """The box or the point, with an edge that shows on its own colour."""
        edge, line = max(1, self._line // 2), self._line
        if region.kind == "point":
            x, y = region.to_pixels(*self._size)
            for radius, fill in ((self._radius + edge, _LIGHT), (self._radius, colour)):
                corners = (x - radius, y - radius, x + radius, y + radius)
                self._draw.ellipse(corners, fill=fill)
            return
        left, top, right, bottom = self._corners(region)
        outer = (left - edge, top - edge, right + edge, bottom + edge)
        self._draw.rectangle(outer, outline=_LIGHT, width=line + 2 * edge)
        self._draw.rectangle((left, top, right, bottom), outline=colour, width=line)

    def _corners(self, region: Region) -> tuple[int, int, int, int]:
        """The pixels that its lines go through; at least one, within the picture."""
        width, height = self._size
        left, top, right, bottom = region.to_pixels(width, height)
        x, y = min(int(left), width - 1), min(int(top), height - 1)
        return x, y, max(round(right) - 1, x), max(round(bottom) - 1, y)

    def label(self, region: Region, colour: tuple[int, int, int]) -> None:
        """Its label above it; inside where there is no room above."""
        text = self._fitting(region.label)
        if not text:
            return
        pad = self._line
        away = self._radius if region.kind == "point" else 0
        x, y = (round(v) - away for v in region.to_pixels(*self._size)[:2])
        _, _, right, bottom = self._draw.textbbox((0, 0), text, font=self._font)
        wide, high = right + 2 * pad, bottom + 2 * pad
        x = max(min(x, self._size[0] - int(wide) - 1), 0)
        y = y - int(high) if y >= high else y + 2 * away
        y = max(min(y, self._size[1] - int(high) - 1), 0)
        self._draw.rectangle((x, y, x + wide, y + high), fill=colour)
        red, green, blue = colour
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        ink = _DARK if bright else _LIGHT
        self._draw.text((x + pad, y + pad), text, font=self._font, fill=ink)

    def _fitting(self, text: str) -> str:
        """As much of a label as the picture is wide, in letters that the font has."""
        text = " ".join(text.split())
        if not isinstance(self._font, ImageFont.FreeTypeFont):
            text = text.encode("latin-1", "replace").decode("latin-1")
        room = self._size[0] - 2 * self._line - 2
        if self._draw.textlength(text, font=self._font) <= room:
            return text
        while text and self._draw.textlength(f"{text}..", font=self._font) > room:
            text = text[:-1]
        return f"{text}.." if text else ""


def _font(size: int) -> Any:
    """Pillow's own font in this size; its small fixed one where it has no FreeType."""
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):
        return ImageFont.load_default()
