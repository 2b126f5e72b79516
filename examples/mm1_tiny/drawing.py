"""Scenes as pictures: many canvases, shades, backgrounds and defects, drawn fast."""

import colorsys
import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from examples.mm1_tiny.scenes import Scene, Thing

Colour = tuple[int, int, int]

# Shades people use (CSS, matplotlib, common palettes), by the name all would give them.
# Shades between two names (magenta, coral, teal, navy, amber) are left out, and those
# that one palette calls red and another brown.
SHADES: dict[str, tuple[Colour, ...]] = {
    "red": (
        (255, 0, 0), (255, 0, 0), (214, 39, 40), (220, 20, 60), (178, 34, 34),
        (244, 67, 54), (237, 28, 36), (200, 0, 0), (230, 25, 75),
    ),
    "green": (
        (0, 128, 0), (0, 255, 0), (44, 160, 44), (34, 139, 34), (0, 100, 0),
        (76, 175, 80), (50, 205, 50), (34, 177, 76), (60, 180, 75), (0, 200, 0),
    ),
    "blue": (
        (0, 0, 255), (0, 0, 255), (31, 119, 180), (30, 144, 255), (65, 105, 225),
        (33, 150, 243), (0, 0, 200), (63, 72, 204), (0, 0, 205), (67, 99, 216),
    ),
    "yellow": (
        (255, 255, 0), (255, 255, 0), (255, 235, 59), (255, 215, 0), (255, 242, 0),
        (255, 225, 25), (240, 230, 30),
    ),
    "purple": (
        (128, 0, 128), (128, 0, 128), (148, 103, 189), (138, 43, 226), (75, 0, 130),
        (156, 39, 176), (163, 73, 164), (145, 30, 180), (153, 50, 204),
    ),
    "orange": (
        (255, 165, 0), (255, 165, 0), (255, 127, 14), (255, 140, 0), (255, 152, 0),
        (255, 127, 39), (245, 130, 49),
    ),
    "black": ((0, 0, 0), (0, 0, 0), (0, 0, 0), (20, 20, 20), (34, 34, 34)),
    "white": ((255, 255, 255), (255, 255, 255), (250, 250, 250), (245, 245, 245)),
    "grey": (
        (128, 128, 128), (128, 128, 128), (127, 127, 127), (158, 158, 158),
        (105, 105, 105), (117, 117, 117), (136, 136, 136), (153, 153, 153),
    ),
    "pink": (
        (255, 105, 180), (255, 105, 180), (227, 119, 194), (247, 129, 191),
        (236, 72, 153), (240, 98, 146), (231, 84, 128),
    ),
    "brown": (
        (139, 69, 19), (139, 69, 19), (140, 86, 75), (121, 85, 72), (160, 82, 45),
        (150, 75, 0), (101, 67, 33), (166, 86, 40),
    ),
}  # fmt: skip
# Ranges of hue (degrees), saturation and value, with gaps between neighbours.
HSV_RANGES = {
    "red": ((-8, 6), (0.78, 1.0), (0.65, 1.0)),
    "green": ((95, 150), (0.5, 1.0), (0.4, 0.95)),
    "blue": ((207, 243), (0.6, 1.0), (0.6, 1.0)),
    "yellow": ((51, 61), (0.65, 1.0), (0.88, 1.0)),
    "purple": ((268, 300), (0.45, 1.0), (0.45, 0.78)),
    "orange": ((23, 37), (0.82, 1.0), (0.9, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.13)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "grey": ((0, 360), (0.0, 0.06), (0.40, 0.65)),
    "pink": ((322, 342), (0.45, 0.65), (0.9, 1.0)),
    "brown": ((14, 30), (0.5, 0.95), (0.38, 0.62)),
}
PAD = (122, 116, 104)  # what the processor pads with; a background must differ from it
MIN_CONTRAST = 110  # RGB distance of a thing's colour to every background colour
# The last resort, when no background that was drawn is far from every colour.
_PLAIN = (
    (255, 255, 255), (230, 230, 230), (70, 70, 70), (200, 225, 255), (255, 230, 190),
    (40, 50, 90), (20, 70, 70), (90, 30, 60), (190, 240, 200),
)  # fmt: skip


def shade(name: str, rng: random.Random) -> Colour:
    """A colour (r, g, b) that everyone would call by this name; "#rrggbb" is itself."""
    if name.startswith("#"):
        return int(name[1:3], 16), int(name[3:5], 16), int(name[5:7], 16)
    if rng.random() < 0.6:
        colour = rng.choice(SHADES[name])
        spread = 0 if rng.random() < 0.4 else 7
        r, g, b = (min(255, max(0, v + rng.randint(-spread, spread))) for v in colour)
        return r, g, b
    hue, saturation, value = (rng.uniform(*ends) for ends in HSV_RANGES[name])
    return _from_hsv(hue, saturation, value)


def _from_hsv(hue: float, saturation: float, value: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def _background_colour(rng: random.Random) -> Colour:
    kind = rng.random()
    if kind < 0.42:
        return 255, 255, 255
    if kind < 0.56:
        grey = rng.randint(205, 250)
        return grey, grey, grey
    if kind < 0.76:  # light, tinted
        return _from_hsv(
            rng.uniform(0, 360), rng.uniform(0.03, 0.2), rng.uniform(0.85, 1)
        )
    if kind < 0.90:  # middle
        return _from_hsv(
            rng.uniform(0, 360), rng.uniform(0, 0.25), rng.uniform(0.45, 0.85)
        )
    return _from_hsv(rng.uniform(0, 360), rng.uniform(0, 0.35), rng.uniform(0, 0.3))


def _distance(a: Colour, b: Colour) -> float:
    return math.dist(a, b)


def _background(
    colours: list[Colour], square: bool, rng: random.Random
) -> tuple[Colour, Colour]:
    """The two ends of the background (equal when plain), far from every colour."""
    for _ in range(8):
        first = second = _background_colour(rng)
        if rng.random() < 0.15:
            second = _background_colour(rng)
            if _distance(first, second) > 160:  # gentle gradients only
                second = first
        if not square and min(_distance(first, PAD), _distance(second, PAD)) < 60:
            continue
        middle = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))
        if all(
            _distance(colour, end) >= MIN_CONTRAST
            for colour in colours
            for end in (first, second, middle)
        ):
            return first, second
    plain = max(
        _PLAIN, key=lambda one: min(_distance(colour, one) for colour in colours)
    )
    return plain, plain


def draw(
    scene: Scene,
    rng: random.Random,
    longer: int | None = None,
    line: float | None = None,
) -> Image.Image:
    """The scene as an RGB picture.

    longer: its longer side, else 64 to 224 pixels. line: things are drawn as outlines
        without a filling, their lines this part of their radius wide.
    """
    if longer is None:
        longer = rng.randint(96, 160) if rng.random() < 0.75 else rng.randint(64, 224)
    width, height = round(scene.width * longer), round(scene.height * longer)
    colours = [shade(thing.colour, rng) for thing in scene.things]
    if rng.random() < 0.5:  # one shade per name, as in most people's pictures
        named = {
            thing.colour: colour
            for thing, colour in zip(scene.things, colours, strict=True)
        }
        colours = [named[thing.colour] for thing in scene.things]
    ends = _background(colours, width == height, rng)
    image = _canvas(width, height, ends, rng)
    fine = rng.choice((1, 2, 3, 4)) if rng.random() < 0.8 else 1
    outline = rng.random() < 0.12
    for thing, colour in zip(scene.things, colours, strict=True):
        if line:
            _stamp(image, thing, longer, colour, fine, hole=line)
        elif outline and thing.shape in _REACH:
            edge = (0, 0, 0) if rng.random() < 0.7 else tuple(v // 2 for v in colour)
            _stamp(image, thing, longer, edge, fine)
            # A thin star would be all edge, and its colour could not be told.
            share = 0.07 if thing.shape == "star" else 0.14
            inset = min(rng.uniform(0.008, 0.016), share * thing.radius)
            _stamp(image, thing, longer, colour, fine, inset=inset)
        else:
            _stamp(image, thing, longer, colour, fine)
    return _spoil(image, rng)


def _canvas(
    width: int, height: int, ends: tuple[Colour, Colour], rng: random.Random
) -> Image.Image:
    first, second = ends
    if first == second:
        return Image.new("RGB", (width, height), first)
    ramp = Image.linear_gradient("L")
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    ramp = ramp.resize((width, height), Image.Resampling.BILINEAR)
    image = Image.new("RGB", (width, height), first)
    image.paste(second, (0, 0, width, height), ramp)
    return image


def _stamp(
    image: Image.Image,
    thing: Thing,
    longer: int,
    colour: Colour,
    fine: int,
    inset: float = 0.0,
    hole: float = 0.0,
) -> None:
    """Draws one thing onto the image; `fine` > 1 draws it larger and averages.

    inset: how much smaller. hole: leaves only a line, this part of the radius wide.
    """
    radius = (thing.radius - inset) * longer
    x, y = thing.x * longer, thing.y * longer
    left, top = math.floor(x - radius) - 1, math.floor(y - radius) - 1
    size = math.ceil(2 * radius) + 3
    mask = Image.new("L", (size * fine, size * fine))
    pen = ImageDraw.Draw(mask)
    if thing.shape == "circle":
        # Pillow counts the last pixel in; pixel centres lie at halves.
        box = [
            (x - left - radius) * fine - 0.5,
            (y - top - radius) * fine - 0.5,
            (x - left + radius) * fine - 0.5,
            (y - top + radius) * fine - 0.5,
        ]
        pen.ellipse(box, fill=255)
    else:
        points = thing.corners()
        shrink = _inner_scale(thing.shape, inset / thing.radius) if inset else 1.0

        def scaled(shrink: float) -> list[tuple[float, float]]:
            return [
                (
                    ((thing.x + (px - thing.x) * shrink) * longer - left) * fine - 0.5,
                    ((thing.y + (py - thing.y) * shrink) * longer - top) * fine - 0.5,
                )
                for px, py in points
            ]

        pen.polygon(scaled(shrink), fill=255)
        if hole:
            pen.polygon(scaled(_inner_scale(thing.shape, hole)), fill=0)
    if fine > 1:
        mask = mask.reduce(fine)
    image.paste(colour, (left, top), mask)


# The distance of the sides from the centre, as part of the radius, where an outline is
# the shape around itself made smaller.
_REACH = {"circle": 1.0, "square": 0.707, "triangle": 0.5, "star": 0.36}
_HOLLOW_REACH = _REACH | {"heart": 0.6}  # about: its sides are not all as far


def _inner_scale(shape: str, line: float) -> float:
    """How much smaller the inside of an outlined shape is; line as part of radius."""
    return max(0.5, 1 - line / _HOLLOW_REACH[shape])


def _spoil(image: Image.Image, rng: random.Random) -> Image.Image:
    """Noise, blur and jpeg, each on a part of the pictures."""
    kind = rng.random()
    if kind < 0.30:
        image = _noise(image, kind / 0.30, rng)
    if rng.random() < 0.10:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.4, image.width / 100)))
    if rng.random() < 0.22:
        image = jpeg(image, rng.randint(40, 95))
    return image


def _noise(image: Image.Image, kind: float, rng: random.Random) -> Image.Image:
    source = np.random.Generator(np.random.SFC64(rng.getrandbits(64)))
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    if kind < 0.5:  # the sensor's: each pixel and channel by itself, or all channels
        channels = 3 if rng.random() < 0.6 else 1
        added = source.standard_normal((height, width, channels), np.float32)
        added *= rng.uniform(4, 26)
    elif kind < 0.75:  # blocks, as in coarse paper or compressed pictures
        cell = rng.randint(3, max(4, width // 6))
        rows, columns = -(-height // cell), -(-width // cell)
        added = source.standard_normal((rows, columns, 1), np.float32)
        added *= rng.uniform(4, 14)
        added = added.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    else:  # specks
        pixels = pixels.copy()
        specks = int(height * width * rng.uniform(0.003, 0.03))
        rows = source.integers(0, height, specks)
        columns = source.integers(0, width, specks)
        pixels[rows, columns] = source.integers(0, 256, (specks, 1), np.uint8)
        return Image.fromarray(pixels)
    noisy = pixels + added
    return Image.fromarray(np.clip(noisy, 0, 255, out=noisy).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after one round trip through a jpeg file of this quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
