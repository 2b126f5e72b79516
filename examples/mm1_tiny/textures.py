"""Procedural pictures that are no scenes: noise, mosaics, landscapes, charts, pages.

They stand for "another kind of picture" where photographs are few. None of them may
look like a plain shape on a calm background. A texture is made from its number when it
is first asked for and then kept, so a pool of 2000 costs about 55 MB at most.
"""

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

POOL_SIZE = 2000
POOL_SIDE = 96  # pixels

_Y, _X = np.mgrid[0:POOL_SIDE, 0:POOL_SIDE].astype(np.float32) / POOL_SIDE


@cache
def texture(number: int) -> Image.Image:
    """Texture `number` of the pool: RGB, 96x96, always the same one. Do not modify."""
    rng = random.Random(f"texture {number}")
    numbers = np.random.default_rng(rng.getrandbits(63))
    make = _KINDS[number % len(_KINDS)]
    image = make(rng, numbers)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return image


def _field(numbers: np.random.Generator, slope: float, planes: int = 1) -> np.ndarray:
    """Noise with amplitude 1/f**slope: (96, 96, planes) float32, mean 0, spread 1."""
    f = np.fft.fftfreq(POOL_SIDE)[:, None], np.fft.rfftfreq(POOL_SIDE)[None, :]
    size = np.hypot(*f)
    size[0, 0] = 1.0
    weight = size**-slope
    weight[0, 0] = 0.0
    noise = numbers.standard_normal((planes, POOL_SIDE, POOL_SIDE))
    noise = np.fft.irfft2(np.fft.rfft2(noise) * weight, s=(POOL_SIDE, POOL_SIDE))
    noise /= noise.std(axis=(1, 2), keepdims=True) + 1e-9
    return noise.transpose(1, 2, 0).astype(np.float32)


def _colour(numbers: np.random.Generator, low: int = 0, high: int = 256) -> np.ndarray:
    return numbers.integers(low, high, 3).astype(np.float32)


def _ramp(numbers: np.random.Generator, values: np.ndarray, stops: int) -> np.ndarray:
    """Values of 0..1, (96, 96), through a random colour ramp: (96, 96, 3)."""
    colours = numbers.uniform(0, 255, (stops, 3))
    places = np.linspace(0, 1, stops)
    planes = [np.interp(values, places, colours[:, c]) for c in range(3)]
    return np.stack(planes, -1).astype(np.float32)


def _noise(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """Colour noise as in nature: large differences on large scales."""
    slope = rng.uniform(0.7, 1.9)
    grey, colour = _field(numbers, slope), _field(numbers, slope, 3)
    share = rng.uniform(0.2, 1.0)
    image = grey * (1 - share) + colour * share
    image /= image.std() + 1e-6
    return _colour(numbers, 60, 196) + image * rng.uniform(35, 70)


def _clouds(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """Soft light over soft blobs of many colours, with some grain."""
    values = _field(numbers, rng.uniform(1.6, 2.4))[..., 0]
    slant = (_X * rng.uniform(-3, 3) + _Y * rng.uniform(-3, 3)) + values
    low, high = slant.min(), slant.max()
    image = _ramp(numbers, (slant - low) / (high - low), rng.randint(3, 7))
    return image + _field(numbers, 0.6) * rng.uniform(4, 14)


def _mosaic(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """Many cells, each with its own colour and shading, under one texture."""
    count = rng.randint(12, 70)
    sites = numbers.random((count, 2), dtype=np.float32) * 1.1 - 0.05
    nearest = np.full(_X.shape, np.inf, np.float32)
    second = nearest.copy()
    cell = np.zeros(_X.shape, np.intp)
    for index, (y, x) in enumerate(sites):
        distance = (_Y - y) ** 2 + (_X - x) ** 2
        closer = distance < nearest
        np.minimum(second, np.maximum(nearest, distance), out=second)
        np.minimum(nearest, distance, out=nearest)
        cell[closer] = index
    spread = rng.uniform(25, 75)
    colours = _colour(numbers, 60, 196) + numbers.normal(0, spread, (count, 3))
    tilt, middle = numbers.normal(0, 150, (count, 2))[cell], sites[cell]
    shade = (_Y - middle[..., 0]) * tilt[..., 0] + (_X - middle[..., 1]) * tilt[..., 1]
    image = colours[cell] + shade[..., None]
    if rng.random() < 0.6:
        width = np.sqrt(second) - np.sqrt(nearest)
        seam = np.clip(1 - width * rng.uniform(25, 70), 0, 1)
        image = image + seam[..., None] * rng.choice((-90, 90))
    return image + _field(numbers, rng.uniform(0.3, 1.2)) * rng.uniform(8, 30)


def _landscape(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """Ridges before ridges before a sky."""
    sky = (_Y * rng.uniform(0.6, 1.4))[..., None]
    image = _colour(numbers) * (1 - sky) + _colour(numbers) * sky
    image = image + _field(numbers, 1.6) * rng.uniform(5, 28)
    ridges = rng.randint(2, 5)
    first, last = _colour(numbers), _colour(numbers)
    for ridge in range(ridges):
        row = _field(numbers, rng.uniform(1.0, 1.8))[rng.randrange(POOL_SIDE), :, 0]
        base = (ridge + rng.uniform(0.6, 1.3)) / (ridges + 0.5)
        line = base + row * rng.uniform(0.02, 0.09)
        below = line < _Y
        part = ridge / max(1, ridges - 1)
        colour = first * (1 - part) + last * part
        ground = colour + _field(numbers, rng.uniform(0.4, 1.3)) * rng.uniform(10, 40)
        image = np.where(below[..., None], ground, image)
    return image


def _window(middle: float, reach: float) -> slice:
    """The rows or columns within reach of a place."""
    first = max(0, int((middle - reach) * POOL_SIDE) - 1)
    return slice(first, int((middle + reach) * POOL_SIDE) + 2)


def _balls(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """A heap of lit, textured balls on a restless ground (never one on a calm one)."""
    image = _noise(rng, numbers)
    light = numbers.normal(0, 1, 2)
    light = light / np.hypot(*light) * 0.6
    grain = _field(numbers, rng.uniform(0.6, 1.4), 3) * rng.uniform(10, 35)
    for _ in range(rng.randint(7, 24)):
        radius = rng.uniform(0.07, 0.25)
        x, y = rng.random(), rng.random()
        part = _window(y, radius), _window(x, radius)
        dx, dy = (_X[part] - x) / radius, (_Y[part] - y) / radius
        height = np.sqrt(np.maximum(0, 1 - dx**2 - dy**2))
        lit = np.clip(0.75 * height + light[0] * dx + light[1] * dy, 0.05, None)
        ball = _colour(numbers, 40, 256) * lit[..., None]
        ball = ball + 160 * (lit[..., None] > 0.97) + grain[part]
        image[part] = np.where((height > 0)[..., None], ball, image[part])
    return image


def _veins(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """Wood or marble: waves bent by noise, through a colour ramp."""
    bend = _field(numbers, rng.uniform(1.2, 2.0))[..., 0] * rng.uniform(0.5, 2.0)
    if rng.random() < 0.5:
        way = np.hypot(_X - rng.uniform(-1, 2), (_Y - rng.uniform(-1, 2)) * 0.5) * 6
    else:
        angle = rng.uniform(0, math.pi)
        way = (_X * math.cos(angle) + _Y * math.sin(angle)) * 3
    waves = np.sin((way + bend) * rng.uniform(3, 8))
    image = _ramp(numbers, (waves + 1) / 2, rng.randint(2, 5))
    return image + _field(numbers, 0.5) * rng.uniform(3, 20)


def _weave(rng: random.Random, numbers: np.random.Generator) -> np.ndarray:
    """Stripes, checks, plaids: many periods, straight or bent, under some grain."""
    angle = rng.uniform(0, math.pi)
    across = _X * math.cos(angle) + _Y * math.sin(angle)
    along = _Y * math.cos(angle) - _X * math.sin(angle)
    bend = _field(numbers, 2.0)[..., 0] * rng.choice((0, 0, 0.02, 0.08))
    periods = rng.uniform(5, 18)
    one = np.sin((across + bend) * periods * 2 * math.pi)
    two = np.sin((along + bend) * periods * rng.choice((1, 1, 0.5)) * 2 * math.pi)
    waves = rng.choice((one, one * two, (one + two) / 2))
    if rng.random() < 0.6:
        waves = np.clip(waves * 6, -1, 1)
    share = ((waves + 1) / 2)[..., None]
    image = _colour(numbers) * share + _colour(numbers) * (1 - share)
    light = _field(numbers, 1.8) * rng.uniform(0, 25)
    return image + light + _field(numbers, 0.3) * rng.uniform(0, 14)


# --- drawn ones ----------------------------------------------------------------------


def _sheet(rng: random.Random, numbers: np.random.Generator) -> Image.Image:
    paper = (
        _colour(numbers, 200, 256) if rng.random() < 0.8 else _colour(numbers, 0, 80)
    )
    image = paper + _field(numbers, 1.2) * rng.uniform(0, 8)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def _any_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _chart(rng: random.Random, numbers: np.random.Generator) -> Image.Image:
    """Bars or curves with axes and ticks."""
    image = _sheet(rng, numbers)
    draw = ImageDraw.Draw(image)
    ink = _any_colour(rng)
    left, bottom = rng.randint(6, 14), POOL_SIDE - rng.randint(6, 14)
    for y in range(bottom, 4, -rng.randint(9, 16)):
        draw.line((left, y, POOL_SIDE, y), fill=(170, 170, 170))
    if rng.random() < 0.5:
        bars = rng.randint(5, 14)
        step = (POOL_SIDE - left - 4) / bars
        colours = [_any_colour(rng) for _ in range(rng.choice((1, 2, 3, bars)))]
        for bar in range(bars):
            x, top = left + 2 + bar * step, rng.randint(8, bottom - 3)
            box = (x, top, x + step * 0.7, bottom)
            draw.rectangle(box, fill=colours[bar % len(colours)])
    else:
        for _ in range(rng.randint(2, 5)):
            row = _field(numbers, rng.uniform(0.5, 1.6))[0, :, 0]
            ys = bottom / 2 + row * rng.uniform(6, 18) + rng.uniform(-15, 15)
            points = [(x, float(ys[x])) for x in range(left, POOL_SIDE, 2)]
            draw.line(points, fill=_any_colour(rng), width=rng.randint(1, 2))
    draw.line((left, 4, left, bottom, POOL_SIDE, bottom), fill=ink)
    for x in range(left, POOL_SIDE, rng.randint(8, 14)):
        draw.line((x, bottom, x, bottom + 3), fill=ink)
    return image


def _scribble(rng: random.Random, numbers: np.random.Generator) -> Image.Image:
    """A tangle of long strokes over the whole sheet, not to be read."""
    image = _sheet(rng, numbers)
    draw = ImageDraw.Draw(image)
    ink = _any_colour(rng)
    for _ in range(rng.randint(4, 10)):
        x, y = rng.uniform(0, POOL_SIDE), rng.uniform(0, POOL_SIDE)
        angle, turn = rng.uniform(0, 2 * math.pi), 0.0
        points = [(x, y)]
        for _ in range(rng.randint(30, 110)):
            turn = 0.8 * turn + rng.gauss(0, 0.25)
            angle += turn
            x, y = x + 2.5 * math.cos(angle), y + 2.5 * math.sin(angle)
            points.append((x, y))
        draw.line(points, fill=ink, width=rng.randint(1, 3))
        if rng.random() < 0.3:
            ink = _any_colour(rng)
    return image


@cache
def _small_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _page(rng: random.Random, numbers: np.random.Generator) -> Image.Image:
    """A page full of small type."""
    image = _sheet(rng, numbers)
    draw = ImageDraw.Draw(image)
    dark = sum(image.getpixel((0, 0))) < 384
    ink = tuple(rng.randint(190, 255) if dark else rng.randint(0, 90) for _ in range(3))
    size = rng.randint(5, 9)
    margin, y = rng.randint(0, 8), rng.randint(-4, 6)
    while y < POOL_SIDE:
        words = []
        for _ in range(60 // size):
            letters = rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(1, 9))
            words.append("".join(letters))
        draw.text((margin, y), " ".join(words), fill=ink, font=_small_font(size))
        y += size + rng.randint(1, 3)
        if rng.random() < 0.1:
            y += size
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
        image = image.crop((12, 12, 84, 84)).resize((POOL_SIDE, POOL_SIDE))
    return image


def _thicket(rng: random.Random, numbers: np.random.Generator) -> Image.Image:
    """Hundreds of overlapping strokes and shards: leaves, hair, rubble."""
    image = Image.fromarray(np.clip(_noise(rng, numbers), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    base, spread = _any_colour(rng), rng.uniform(20, 80)
    leaf, wide = rng.uniform(4, 20), rng.uniform(0.1, 0.5)
    lean, loose = rng.uniform(0, math.pi), rng.uniform(0.2, 3)
    for _ in range(rng.randint(120, 350)):
        x, y = rng.uniform(0, POOL_SIDE), rng.uniform(0, POOL_SIDE)
        angle, size = rng.gauss(lean, loose), leaf * rng.uniform(0.5, 1.5)
        dx, dy = size * math.cos(angle), size * math.sin(angle)
        light = rng.gauss(0, spread)
        fill = tuple(max(0, min(255, int(c + light + rng.gauss(0, 12)))) for c in base)
        ends = [(x - dx, y - dy), (x - dy * wide, y + dx * wide)]
        draw.polygon([*ends, (x + dx, y + dy), (x + dy * wide, y - dx * wide)], fill)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    return image


_KINDS = (
    _noise,
    _clouds,
    _mosaic,
    _landscape,
    _balls,
    _veins,
    _weave,
    _chart,
    _scribble,
    _page,
    _thicket,
    _landscape,
    _mosaic,
    _noise,
    _thicket,
)

# A part of these could be one bar or one ball: nearly a plain shape.
_WHOLE = (_balls, _chart)


def may_be_cut(number: int) -> bool:
    """Whether any part of this texture is still no scene."""
    return _KINDS[number % len(_KINDS)] not in _WHOLE
