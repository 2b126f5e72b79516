"""Scenes drawn by other means, to test generalisation only: never trained on.

Training pictures come from Pillow with our own shades. Here the same scenes are drawn
by matplotlib (Agg, antialiased), by scikit-image's polygons and by bare NumPy masks
(both without antialiasing), and by Skia; on canvases of 96 to 1024 pixels, with shades
of other palettes, through png or jpeg. matplotlib and scikit-image come with the extra
`train`; `skia-python` is optional. Missing ones are left out, so a report should name
`backends()`.
"""

import importlib.util
import io
import math
import random
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from examples.mm1_tiny.scenes import RING_HOLE, Scene, Thing
from mm1_mlx.errors import DatasetError

Colour = tuple[int, int, int]
CANVAS = (96, 1024)  # longer side, pixels

# Named colours of CSS, matplotlib (tab10, Set1), Material Design, Tailwind, Bootstrap,
# Okabe and Ito, and the flag-like primaries of old palettes.
PALETTES: dict[str, tuple[str, ...]] = {
    "red": ("#ff0000", "#d62728", "#e41a1c", "#dc143c", "#f44336", "#d32f2f",
            "#b22222", "#dc2626", "#dc3545", "#cc0000", "#e53935"),
    "green": ("#008000", "#00ff00", "#2ca02c", "#4daf4a", "#228b22", "#4caf50",
              "#388e3c", "#32cd32", "#16a34a", "#198754", "#006400", "#00cc00"),
    "blue": ("#0000ff", "#1f77b4", "#377eb8", "#4169e1", "#2196f3", "#1976d2",
             "#1e90ff", "#2563eb", "#0d6efd", "#0072b2", "#0000cd", "#0000cc"),
    "yellow": ("#ffff00", "#ffff33", "#ffd700", "#ffeb3b", "#fdd835", "#f0e442",
               "#facc15", "#ffe119", "#ffee00"),
    "purple": ("#800080", "#9467bd", "#984ea3", "#9c27b0", "#7b1fa2", "#8a2be2",
               "#9333ea", "#6f42c1", "#9932cc", "#6a0dad"),
    "orange": ("#ffa500", "#ff7f0e", "#ff7f00", "#ff8c00", "#ff9800", "#f57c00",
               "#f97316", "#fd7e14", "#fb8c00"),
    "black": ("#000000", "#000000", "#111111", "#1a1a1a", "#212121", "#212529"),
    "white": ("#ffffff", "#ffffff", "#fafafa", "#f8f9fa"),
    "grey": ("#808080", "#7f7f7f", "#999999", "#9e9e9e", "#757575", "#6c757d"),
    "pink": ("#ff69b4", "#e377c2", "#f781bf", "#ec4899", "#f06292", "#f472b6"),
    "brown": ("#8b4513", "#8c564b", "#a65628", "#795548", "#6d4c41", "#a0522d",
              "#5d4037", "#92400e"),
}  # fmt: skip
BACKGROUNDS = (
    "#ffffff", "#ffffff", "#ffffff", "#ffffff", "#fafafa", "#f5f5f5", "#eeeeee",
    "#f8f9fa", "#f0f8ff", "#fffff0", "#faebd7", "#f5f5dc", "#e6e6fa", "#e3f2fd",
    "#fce4ec", "#e8f5e9", "#fff3e0", "#fdf6e3", "#d3d3d3", "#dcdcdc", "#eaeaf2",
)  # fmt: skip
# Where a light one would hide something white.
DARK_BACKGROUNDS = (
    "#000000", "#000000", "#212121", "#263238", "#333333", "#37474f", "#1a237e",
    "#004d40", "#1e293b", "#3e2723", "#4a148c", "#2f4f4f",
)  # fmt: skip
_CONTRAST = 90  # RGB distance of every thing to the background


def draw(scene: Scene, rng: random.Random, backend: str | None = None) -> Image.Image:
    """The scene as an RGB picture by a random backend, or by the named one."""
    backend = backend or rng.choice(backends())
    if backend not in _BACKENDS:
        raise DatasetError(f"backend is {backend!r}. Choose from {list(_BACKENDS)}.")
    longer = round(math.exp(rng.uniform(math.log(CANVAS[0]), math.log(CANVAS[1]))))
    size = round(scene.width * longer), round(scene.height * longer)
    colours, background = choose_colours(scene, rng)
    star = rng.choice((0.382, 0.382, 0.4, 0.45, 0.5))  # 0.382: lines of a pentagram
    pixels = _BACKENDS[backend](scene, size, longer, colours, background, star)
    return _through_a_file(Image.fromarray(pixels), rng)


def _through_a_file(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        return image  # png loses nothing
    data = io.BytesIO()
    image.save(data, "JPEG", quality=rng.randint(30, 95))
    return Image.open(data).convert("RGB")


def choose_colours(scene: Scene, rng: random.Random) -> tuple[list[Colour], Colour]:
    """A shade per thing (the same for things of one colour), and the background."""
    names = {thing.colour for thing in scene.things}
    shades = {name: _rgb(rng.choice(PALETTES[name])) for name in sorted(names)}
    colours = [shades[thing.colour] for thing in scene.things]
    groups = [DARK_BACKGROUNDS, BACKGROUNDS]
    if "white" not in names:
        groups.reverse()
    for group in groups:
        clear = [code for code in group if _clearness(code, colours) >= _CONTRAST]
        if clear:
            return colours, _rgb(rng.choice(clear))
    best = max(
        BACKGROUNDS + DARK_BACKGROUNDS, key=lambda code: _clearness(code, colours)
    )
    return colours, _rgb(best)


def _clearness(code: str, colours: list[Colour]) -> float:
    return min(math.dist(_rgb(code), colour) for colour in colours)


def _rgb(code: str) -> Colour:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


# --- backends: (scene, (width, height), longer, colours, background, star) -> pixels --


def _matplotlib(
    scene: Scene,
    size: tuple[int, int],
    longer: int,
    colours: list[Colour],
    background: Colour,
    star: float,
) -> np.ndarray:
    """Paths filled by Agg with antialiasing; no figure, no pyplot."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    renderer = RendererAgg(*size, 100)
    context = renderer.new_gc()
    context.set_antialiased(True)
    context.set_linewidth(0)
    page = Path([(0, 0), (size[0], 0), (size[0], size[1]), (0, size[1]), (0, 0)])
    upright = Affine2D()  # in the renderer's own units: pixels, y from the bottom
    renderer.draw_path(context, page, upright, tuple(v / 255 for v in background))
    turned = Affine2D().scale(longer, -longer).translate(0, size[1])
    for thing, colour in zip(scene.things, colours, strict=True):
        if thing.shape == "circle":
            path = Path.circle((thing.x, thing.y), thing.radius)
        else:
            corners = thing.corners(star)
            path = Path([*corners, corners[0]], closed=True)
        renderer.draw_path(context, path, turned, tuple(v / 255 for v in colour))
    return np.array(renderer.buffer_rgba())[..., :3]


def _skimage(
    scene: Scene,
    size: tuple[int, int],
    longer: int,
    colours: list[Colour],
    background: Colour,
    star: float,
) -> np.ndarray:
    """scikit-image's disk and polygon: every pixel in or out."""
    from skimage.draw import disk, polygon

    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:] = background
    for thing, colour in zip(scene.things, colours, strict=True):
        if thing.shape == "circle":
            centre = thing.y * longer - 0.5, thing.x * longer - 0.5
            rows, columns = disk(centre, thing.radius * longer, shape=pixels.shape[:2])
        else:
            x, y = np.array(thing.corners(star)).T * longer - 0.5
            rows, columns = polygon(y, x, shape=pixels.shape[:2])
        pixels[rows, columns] = colour
    return pixels


def _numpy(
    scene: Scene,
    size: tuple[int, int],
    longer: int,
    colours: list[Colour],
    background: Colour,
    star: float,
) -> np.ndarray:
    """Distances and half-planes at the pixel centres: every pixel in or out."""
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:] = background
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    x, y = (x + 0.5) / longer, (y + 0.5) / longer
    for thing, colour in zip(scene.things, colours, strict=True):
        pixels[_inside(thing, x, y, star)] = colour
    return pixels


def _inside(thing: Thing, x: np.ndarray, y: np.ndarray, star: float) -> np.ndarray:
    """Which points (any shape) lie in the thing: in each half-plane of a sector."""
    dx, dy = x - thing.x, y - thing.y
    distance = np.hypot(dx, dy) / thing.radius
    if thing.shape in ("circle", "ring"):
        hole = RING_HOLE if thing.shape == "ring" else 0.0
        return (distance <= 1) & (distance >= hole)
    if thing.shape in ("heart", "moon"):
        return _in_polygon(thing.corners(), x, y)
    # The angle from "up", clockwise, folded into one sector around a corner.
    angle = np.arctan2(dx, -dy) - math.radians(thing.angle)
    sides = {"triangle": 3, "square": 4, "star": 5}[thing.shape]
    if thing.shape == "square":
        angle = angle - math.pi / 4
    half = math.pi / sides
    folded = np.abs((angle + half) % (2 * half) - half)
    # From the outer corner (1, 0) to the middle of the side, or a star's inner corner.
    reach = star if thing.shape == "star" else math.cos(half)
    end_x, end_y = reach * math.cos(half), reach * math.sin(half)
    along, across = distance * np.cos(folded), distance * np.sin(folded)
    return (along - 1) * end_y + across * (1 - end_x) <= 0


def _in_polygon(
    corners: list[tuple[float, float]], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Which points see an odd number of sides to their right."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return inside


def _skia(
    scene: Scene,
    size: tuple[int, int],
    longer: int,
    colours: list[Colour],
    background: Colour,
    star: float,
) -> np.ndarray:
    """The renderer of Chrome and Android, antialiased."""
    import skia

    pixels = np.empty((size[1], size[0], 4), np.uint8)
    canvas = skia.Canvas(pixels, skia.ColorType.kRGBA_8888_ColorType)
    canvas.clear(skia.Color(*background))
    canvas.scale(longer, longer)
    for thing, colour in zip(scene.things, colours, strict=True):
        paint = skia.Paint(AntiAlias=True, Color=skia.Color(*colour))
        if thing.shape == "circle":
            canvas.drawCircle(thing.x, thing.y, thing.radius, paint)
        else:
            path = skia.Path()
            path.addPoly([skia.Point(*p) for p in thing.corners(star)], True)
            canvas.drawPath(path, paint)
    return pixels[..., :3].copy()


_BACKENDS: dict[str, Callable[..., np.ndarray]] = {
    "numpy": _numpy,
    "matplotlib": _matplotlib,
    "skimage": _skimage,
    "skia": _skia,
}


@cache
def backends() -> tuple[str, ...]:
    """The backends whose packages are installed."""
    return tuple(
        name for name in _BACKENDS if importlib.util.find_spec(name) is not None
    )
