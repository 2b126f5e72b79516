"""The tiles of a picture drawn over it: what the model sees, for people."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from mm1_mlx.grids import Layout, fitted_size
from mm1_mlx.inputs.images import fit, resize
from mm1_mlx.inputs.resolution import Way

_LONGEST = 1600  # pixels of the drawing, without its foot
_SHORTEST = 320
_LINE, _INK, _PAPER = (255, 64, 32), (24, 24, 24), (255, 255, 255)
_HATCH = (160, 160, 160)
_THUMB = 96


@dataclass(frozen=True)
class Box:
    """Left, top, right and bottom in the pixels of the picture; may lie outside it."""

    left: float
    top: float
    right: float
    bottom: float


def seen_area(way: Way, layout: Layout) -> Box:
    """What the tiles cover of a picture: more where it is padded, less where it is
    cropped."""
    width, height, size = layout.width, layout.height, way.settings.size
    tiling, mode = way.tiling, way.settings.resize_mode
    placed = tiling is not None and tiling.type in ("anyres", "dynamic")
    if placed and layout.tiles > 1:
        across, down = layout.columns * size, layout.rows * size
        new_width, new_height = fitted_size(width, height, across, down)
        left, top = (across - new_width) // 2, (down - new_height) // 2
        x, y = width / new_width, height / new_height
        return Box(-left * x, -top * y, (across - left) * x, (down - top) * y)
    if mode == "squash":
        return Box(0, 0, width, height)
    side = max(width, height) if mode == "pad" else min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def draw_tiles(image: Image.Image, way: Way, layout: Layout) -> Image.Image:
    """An RGB picture with the borders and numbers of its tiles, in reading order.

    Padding is hatched in its colour, what is cropped away is darker, and the overview
    stands below, with its number. layout: of way.layout.
    """
    area = seen_area(way, layout)
    shown = Box(
        min(area.left, 0), min(area.top, 0),
        max(area.right, layout.width), max(area.bottom, layout.height),
    )  # fmt: skip
    width, height = shown.right - shown.left, shown.bottom - shown.top
    longest = max(width, height)
    scale = min(max(longest, _SHORTEST), _LONGEST) / longest
    page = _Page(shown, scale)
    canvas = Image.new("RGB", page.size, _pad_color(way))
    draw = ImageDraw.Draw(canvas)
    _hatch(draw, canvas.size)
    left, top, right, bottom = page.box(Box(0, 0, layout.width, layout.height))
    canvas.paste(resize(image, max(right - left, 1), max(bottom - top, 1)), (left, top))
    _darken(canvas, page.box(area))
    _grid(draw, page.box(area), way, layout)
    return _with_foot(canvas, image, way, layout)


@dataclass(frozen=True)
class _Page:
    """From pixels of the picture to those of the drawing."""

    shown: Box
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        width = (self.shown.right - self.shown.left) * self.scale
        height = (self.shown.bottom - self.shown.top) * self.scale
        return max(round(width), 1), max(round(height), 1)

    def box(self, box: Box) -> tuple[int, int, int, int]:
        x, y = self.shown.left, self.shown.top
        return (
            round((box.left - x) * self.scale),
            round((box.top - y) * self.scale),
            round((box.right - x) * self.scale),
            round((box.bottom - y) * self.scale),
        )


def _pad_color(way: Way) -> tuple[int, ...]:
    tiling = way.tiling
    if tiling is not None and tiling.type == "anyres":
        return tuple(tiling.pad_color)
    return way.settings.pad_color


def _hatch(draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """Lines all over; the picture goes over them, so that only padding shows them."""
    width, height = size
    for x in range(-height, width, 12):
        draw.line([(x, height), (x + height, 0)], fill=_HATCH)


def _darken(canvas: Image.Image, seen: tuple[int, int, int, int]) -> None:
    """What lies outside of what is seen."""
    shade = Image.new("L", canvas.size, 150)
    shade.paste(0, seen)
    canvas.paste((0, 0, 0), (0, 0), shade)


def _grid(
    draw: ImageDraw.ImageDraw,
    seen: tuple[int, int, int, int],
    way: Way,
    layout: Layout,
) -> None:
    left, top, right, bottom = seen
    rows, columns = max(layout.rows, 1), max(layout.columns, 1)
    xs = [left + round((right - left) * j / columns) for j in range(columns + 1)]
    ys = [top + round((bottom - top) * i / rows) for i in range(rows + 1)]
    thick = max(2, (right - left) // 400)
    for i in range(rows):
        for j in range(columns):
            # Of a picture like a thread a row may be less than a pixel.
            end, low = max(xs[j + 1] - 1, xs[j]), max(ys[i + 1] - 1, ys[i])
            box = xs[j], ys[i], end, low
            draw.rectangle(box, outline=_LINE, width=thick)
            size = max(10, min(48, (xs[1] - xs[0]) // 4, (ys[1] - ys[0]) // 4))
            number = i * columns + j + 1 + _first(way, layout)
            _label(draw, (xs[j] + thick + 2, ys[i] + thick + 2), str(number), size)


def _first(way: Way, layout: Layout) -> int:
    """How many tiles the model reads before the grid: the overview, or nothing."""
    overview = way.tiling is not None and way.tiling.type == "anyres"
    return int(overview and layout.tiles > 1)


def _label(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int
) -> None:
    font = ImageFont.load_default(size)
    box = draw.textbbox(place, text, font=font)
    draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=_LINE)
    draw.text(place, text, fill=_PAPER, font=font)


def _with_foot(
    canvas: Image.Image, image: Image.Image, way: Way, layout: Layout
) -> Image.Image:
    """The drawing, and below it what it shows, with the overview where there is one."""
    cut = layout.tiles > 1
    lines = [_what(way, layout)]
    if cut:
        number = 1 if _first(way, layout) else layout.tiles
        lines.append(f"{number}: the overview, the whole picture")
    font = ImageFont.load_default(16)
    text = max(font.getlength(line) for line in lines)
    margin = _THUMB + 20 if cut else 10
    width = max(canvas.width, int(margin + text + 10))
    foot = _THUMB + 20 if cut else 40
    whole = Image.new("RGB", (width, canvas.height + foot), _PAPER)
    whole.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(whole)
    for n, line in enumerate(lines):
        place = margin, canvas.height + 10 + 24 * n
        draw.text(place, line, fill=_INK, font=font)
    if cut:
        small = fit(image, way.settings).resize((_THUMB, _THUMB))
        whole.paste(small, (10, canvas.height + 10))
        corner = 10, canvas.height + 10, 9 + _THUMB, canvas.height + 9 + _THUMB
        draw.rectangle(corner, outline=_LINE, width=2)
    return whole


def _what(way: Way, layout: Layout) -> str:
    size = f"{way.settings.size} x {way.settings.size} pixels"
    if layout.tiles == 1:
        return f"one tile of {size}"
    return f"{layout.rows} x {layout.columns} tiles of {size}, and an overview"
