"""Pictures of numbers and short words, for reading.

Half of the numbers are handwritten: scikit-learn's 8x8 digits, enlarged. Everything
else is rendered with Pillow's own scalable font and with the fonts inside the
matplotlib wheel (DejaVu, STIX, Computer Modern). Both wheels come with the extra
`train`. Without matplotlib there are fewer fonts; without scikit-learn numbers cannot
be drawn. Neither package is imported: only their data files are read.

The test split uses other handwritten samples, other words and one font family
(`HELD_OUT_FAMILY`) that training never sees.
"""

import io
import math
import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from examples.mm1_tiny.glyph_sources import (
    CAP,
    Glyph,
    fonts,
    handwriting,
    pick_font,
    rendered_glyph,
)
from examples.mm1_tiny.words import TEST_WORDS, TRAIN_WORDS
from mm1_mlx.errors import DatasetError
from mm1_mlx.training.documents import Region

MIN_DIGIT_HEIGHT = 0.26  # of the longer side of the canvas
MIN_CAPITAL_HEIGHT = 0.20
MIN_TALL_HEIGHT = 0.26  # of small letters like b and l; an x is about two thirds of it
MAX_TILT = 8.0  # degrees
MAX_ASPECT = 2.5
CANVAS = (64, 224)  # longer side, pixels
_MARGIN = 0.96  # text stays inside this share of the canvas

_DIGIT_QUESTIONS = (
    "What number is this?",
    "What number is in the picture?",
    "What number do you see?",
    "Which number is shown?",
    "Which digits do you see?",
    "Which digits are in the picture?",
    "What digits are shown?",
    "Read the number.",
    "Read the digits.",
    "Which number is written here?",
    "What is the number?",
    "Please read the number in the picture.",
)
_WORD_QUESTIONS = (
    "What does it say?",
    "What does the picture say?",
    "Read the word.",
    "Read the text.",
    "What is written here?",
    "Which word is this?",
    "What word is in the picture?",
    "What word do you see?",
    "What is the word?",
    "Which word is written here?",
    "What text is in the picture?",
    "Which letters do you see?",
    "Please read the word in the picture.",
)


@dataclass
class Glyphs:
    """A picture of some glyphs, what it says, and where each glyph is.

    image: PIL RGB. text: digits, or CAPITAL letters. regions: one per glyph, in
    reading order. source: "handwritten" or the font, for reports.
    """

    image: Image.Image
    text: str
    regions: list[Region] = field(default_factory=list)
    source: str = ""


def digit_questions(rng: random.Random) -> str:
    """A wording of "which number is this?"."""
    return rng.choice(_DIGIT_QUESTIONS)


def word_questions(rng: random.Random) -> str:
    """A wording of "what does it say?"."""
    return rng.choice(_WORD_QUESTIONS)


def sample_digits(rng: random.Random, split: str = "train") -> Glyphs:
    """A picture of a number of 1 to 3 digits, half of the time handwritten."""
    _check_split(split)
    length = rng.randint(1, 3)
    first = "0123456789" if length == 1 else "123456789"
    text = rng.choice(first) + "".join(rng.choices("0123456789", k=length - 1))
    if rng.random() < 0.5:
        glyphs = _handwritten_line(rng, text, split)
        return _picture(rng, text, glyphs, "digit", MIN_DIGIT_HEIGHT, "handwritten")
    font = pick_font(rng, split)
    glyphs = _rendered_line(rng, text, font)
    return _picture(rng, text, glyphs, "digit", MIN_DIGIT_HEIGHT, fonts()[font].name)


def sample_word(rng: random.Random, split: str = "train") -> Glyphs:
    """A picture of 2 to 5 rendered letters; its text is in capitals."""
    _check_split(split)
    if split == "test":
        word = rng.choice(TEST_WORDS)
    elif rng.random() < 0.5:  # long ones are hard, and few
        word = max(rng.choices(TRAIN_WORDS, k=3), key=len)
    else:
        word = _random_letters(rng)
    drawn, least = word, MIN_TALL_HEIGHT
    if rng.random() < (0.65 if split == "train" else 0.75):
        drawn, least = word.upper(), MIN_CAPITAL_HEIGHT
    font = pick_font(rng, split)
    glyphs = _rendered_line(rng, drawn, font)
    name = fonts()[font].name
    return _picture(rng, drawn, glyphs, "letter", least, name)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise DatasetError(f"split is {split!r}. Use 'train' or 'test'.")


def _random_letters(rng: random.Random) -> str:
    """2 to 5 letters, half of the time pronounceable, never a test word."""
    while True:
        length = rng.choice((2, 3, 4, 4, 5, 5, 5, 5))
        if rng.random() < 0.5:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        else:
            start = rng.randrange(2)
            kinds = ("bcdfghjklmnpqrstvwxyz", "aeiouy")
            word = "".join(rng.choice(kinds[(start + i) % 2]) for i in range(length))
        if rng.random() < 0.3:  # doubled letters were read once
            i = rng.randrange(length - 1)
            word = word[:i] + word[i] + word[i : i + 1] + word[i + 2 :]
        # "ll" in small letters and "II" in capitals look the same.
        if word not in _TEST_WORD_SET and not set(word) <= {"l", "i"}:
            return word


_TEST_WORD_SET = frozenset(TEST_WORDS)


# --- a line of glyphs ----------------------------------------------------------------

_Line = list[tuple[Glyph, float, float, float, float]]  # glyph and box on the line


def _rendered_line(rng: random.Random, text: str, font: int) -> _Line:
    stretch = rng.uniform(0.8, 1.15) if rng.random() < 0.5 else 1.0
    gap = CAP * (rng.uniform(-0.02, 0.3) if rng.random() < 0.6 else 0.0)
    line, x = [], 0.0
    for char in text:
        glyph = rendered_glyph(font, char)
        left = x + glyph.left * stretch
        right = left + glyph.width * stretch
        line.append((glyph, left, glyph.top, right, glyph.top + glyph.height))
        x += glyph.advance * stretch + gap
    return line


def _handwritten_line(rng: random.Random, text: str, split: str) -> _Line:
    samples = handwriting(split)
    gap = CAP * rng.uniform(0.04, 0.35)
    line, x = [], 0.0
    for char in text:
        glyph = rng.choice(samples[int(char)])
        if split == "train" and rng.random() < 0.7:
            glyph = _bent(rng, glyph)
        width = glyph.width * rng.uniform(0.85, 1.15)
        drop = CAP * rng.uniform(-0.06, 0.06)
        line.append((glyph, x, glyph.top + drop, x + width, drop))
        x += width + gap
    return line


def _bent(rng: random.Random, glyph: Glyph) -> Glyph:
    """The same handwriting leaning, turned or tapered: there are only 1438 samples."""
    width, height = glyph.mask.size
    lean, turn = rng.uniform(-0.15, 0.15) * width, rng.uniform(-0.1, 0.1)
    corners: list[float] = []  # in the source: upper left, lower left, lower right, ...
    for x, y in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        dx = lean * y + turn * height / 2 * y + rng.uniform(-0.06, 0.06) * width
        dy = -turn * width / 2 * x + rng.uniform(-0.06, 0.06) * height
        corners.append(width / 2 * (1 + 1.3 * x) + dx)
        corners.append(height / 2 * (1 + 1.3 * y) + dy)
    size = width * 5, height * 5
    mask = glyph.mask.transform(
        size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC
    )
    box = mask.point(_INK_ONLY).getbbox()
    assert box is not None, "handwriting has ink"
    mask = mask.crop(box)
    wide = CAP * mask.width / mask.height
    return Glyph(mask, 0, -CAP, wide, CAP, wide)


_INK_ONLY = [255 * (value >= 40) for value in range(256)]


def _extent(line: _Line) -> tuple[float, float, float, float]:
    return (
        min(item[1] for item in line),
        min(item[2] for item in line),
        max(item[3] for item in line),
        max(item[4] for item in line),
    )


# --- the picture ---------------------------------------------------------------------


def _picture(
    rng: random.Random,
    drawn: str,
    line: _Line,
    kind: str,
    least: float,
    source: str,
) -> Glyphs:
    """Place a line on a canvas: size, tilt, place, colours, noise, all random."""
    tilt = rng.uniform(-MAX_TILT, MAX_TILT) if rng.random() < 0.6 else 0.0
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    size, scale, squeeze = _fit(rng, line, cos, abs(sin), least)
    left, top, right, bottom = _extent(line)
    width, height = (right - left) * scale * squeeze, (bottom - top) * scale
    strip = Image.new("L", (math.ceil(width) + 2, math.ceil(height) + 2))
    enlarge = rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    boxes = []
    for glyph, x0, y0, x1, y1 in line:
        across, down = scale * squeeze, scale
        box = ((x0 - left) * across + 1, (y0 - top) * down + 1)
        box += ((x1 - left) * across + 1, (y1 - top) * down + 1)
        _stamp(strip, glyph.mask, box, enlarge)
        boxes.append(box)
    if source == "handwritten":
        strip = strip.point(_stroke_table(rng.randrange(4)))
    centre = _centre(rng, size, width * cos + height * abs(sin), height, width, sin)
    mask = _tilted(strip, size, centre, cos, sin)
    image = _inked(rng, mask)
    regions = []
    for char, box in zip(drawn, boxes, strict=True):
        box = _tilted_box(box, strip.size, size, centre, cos, sin)
        regions.append(Region(box, f"{kind} {char.lower()}"))
    return Glyphs(image, drawn.upper(), regions, source)


def _fit(
    rng: random.Random, line: _Line, cos: float, sin: float, least: float
) -> tuple[tuple[int, int], float, float]:
    """Canvas size, pixels per line unit, and how far the letters must be squeezed."""
    left, top, right, bottom = _extent(line)
    longer = round(math.exp(rng.uniform(math.log(CANVAS[0]), math.log(CANVAS[1]))))
    squeeze = 1.0
    for attempt in range(40):
        aspect = 1.0 if rng.random() < 0.3 else MAX_ASPECT ** rng.uniform(-1, 1)
        if attempt >= 4:  # too long for what was drawn: a wide canvas, thin letters
            aspect, squeeze = max(aspect, 1 / aspect), squeeze * 0.95
        shorter = math.ceil(longer * min(aspect, 1 / aspect))
        size = (longer, shorter) if aspect >= 1 else (shorter, longer)
        width, height = (right - left) * squeeze, bottom - top
        largest = _MARGIN * min(
            (size[0] - 2) / (width * cos + height * sin),
            (size[1] - 2) / (width * sin + height * cos),
        )
        smallest = least * longer / CAP
        if largest > smallest:
            break
    scale = smallest + max(largest - smallest, 0.0) * rng.random() ** 1.2
    return size, scale, squeeze


def _stamp(
    strip: Image.Image,
    mask: Image.Image,
    box: tuple[float, float, float, float],
    enlarge: Image.Resampling,
) -> None:
    """Add a glyph bitmap to the strip, without erasing its neighbours."""
    x, y = round(box[0]), round(box[1])
    width = max(1, round(box[2] - box[0]))
    height = max(1, round(box[3] - box[1]))
    mask = mask.resize((width, height), enlarge)
    strip.paste(255, (x, y), mask)


@cache
def _stroke_table(number: int) -> list[int]:
    """Grey value -> ink, from as scanned (0) to nearly black and white (3)."""
    if number == 0:
        return list(range(256))
    low, high = ((0, 200), (20, 170), (50, 140))[number - 1]
    return [max(0, min(255, 255 * (v - low) // (high - low))) for v in range(256)]


def _centre(
    rng: random.Random,
    size: tuple[int, int],
    wide: float,
    height: float,
    width: float,
    sin: float,
) -> tuple[float, float]:
    """Where the middle of the line goes: anywhere that keeps it on the canvas."""
    tall = width * abs(sin) + height
    rooms = (max(0.0, size[0] - wide - 2) / 2, max(0.0, size[1] - tall - 2) / 2)
    spread = 0.2 if rng.random() < 0.3 else 1.0
    x = size[0] / 2 + rng.uniform(-1, 1) * spread * rooms[0]
    y = size[1] / 2 + rng.uniform(-1, 1) * spread * rooms[1]
    return x, y


def _tilted(
    strip: Image.Image,
    size: tuple[int, int],
    centre: tuple[float, float],
    cos: float,
    sin: float,
) -> Image.Image:
    """The strip on an empty canvas, turned about its middle."""
    x, y = strip.width / 2, strip.height / 2
    if sin == 0.0:
        mask = Image.new("L", size)
        mask.paste(strip, (round(centre[0] - x), round(centre[1] - y)))
        return mask
    # Pillow wants the way back, from a canvas pixel to a strip pixel.
    back = (cos, sin, x - cos * centre[0] - sin * centre[1])
    back += (-sin, cos, y + sin * centre[0] - cos * centre[1])
    return strip.transform(
        size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
    )


def _tilted_box(
    box: tuple[float, float, float, float],
    strip: tuple[int, int],
    size: tuple[int, int],
    centre: tuple[float, float],
    cos: float,
    sin: float,
) -> tuple[float, float, float, float]:
    """The upright box around a turned box, as fractions of the canvas."""
    xs, ys = [], []
    for x in (box[0] - strip[0] / 2, box[2] - strip[0] / 2):
        for y in (box[1] - strip[1] / 2, box[3] - strip[1] / 2):
            xs.append((centre[0] + cos * x - sin * y) / size[0])
            ys.append((centre[1] + sin * x + cos * y) / size[1])

    def inside(value: float) -> float:
        return min(1.0, max(0.0, value))

    return inside(min(xs)), inside(min(ys)), inside(max(xs)), inside(max(ys))


# --- ink and paper -------------------------------------------------------------------


def _luma(colour: tuple[int, ...]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper with enough contrast to read; either may be the darker one."""

    def colour(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(3))

    kind = rng.random()
    if kind < 0.2:
        return (0, 0, 0), (255, 255, 255)
    if kind < 0.45:
        return colour(0, 90), colour(200, 255)
    if kind < 0.6:
        return colour(190, 255), colour(0, 80)
    while True:
        ink, paper = colour(0, 255), colour(0, 255)
        if abs(_luma(ink) - _luma(paper)) >= 90:
            return ink, paper


@cache
def _noise_tiles() -> tuple[Image.Image, ...]:
    """Noise around 128, larger than any canvas: fine and coarse, grey and coloured."""
    numbers = np.random.default_rng(7)
    side = CANVAS[1] + 64
    tiles = []
    for strength in (5, 9, 14):
        for grain, planes in ((1, 3), (1, 1), (3, 3), (24, 3)):
            small = -(-side // grain)
            noise = numbers.normal(128, strength, (small, small, planes))
            noise = np.repeat(noise, 3 // planes, axis=2)
            tile = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
            if grain > 1:
                tile = tile.resize((side, side), Image.Resampling.BICUBIC)
            tiles.append(tile)
    return tuple(tiles)


def _inked(rng: random.Random, mask: Image.Image) -> Image.Image:
    """Ink through a mask on paper; sometimes noisy, blurred or through jpeg."""
    ink, paper = _colours(rng)
    image = Image.new("RGB", mask.size, paper)
    image.paste(ink, (0, 0), mask)
    if rng.random() < 0.45:
        tile = rng.choice(_noise_tiles())
        x = rng.randint(0, tile.width - mask.width)
        y = rng.randint(0, tile.height - mask.height)
        tile = tile.crop((x, y, x + mask.width, y + mask.height))
        image = ImageChops.add(image, tile, 1, -128)
    if rng.random() < 0.12:
        radius = rng.uniform(0.3, 0.8) * max(mask.size) / 64
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if rng.random() < 0.15:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=rng.randint(40, 95))
        image = Image.open(data).convert("RGB")
    return image
