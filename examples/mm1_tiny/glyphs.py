"""Pictures of numbers and short words, for reading.

Half of the numbers are handwritten: scikit-learn's 8x8 digits, enlarged. Everything
else is rendered with Pillow's own scalable font and with the fonts inside the
matplotlib wheel (DejaVu, STIX, Computer Modern). Both wheels come with the extra
`train`. Without matplotlib there are fewer fonts; without scikit-learn numbers cannot
be drawn. Neither package is imported: only their data files are read.

The test split uses other handwritten samples, other words and one font family
(`HELD_OUT_FAMILY`) that training never sees.
"""

import csv
import gzip
import importlib.util
import io
import math
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from mm1_mlx.errors import DatasetError
from mm1_mlx.training.documents import Region

HELD_OUT_FAMILY = "DejaVu Serif"
MIN_DIGIT_HEIGHT = 0.22  # of the longer side of the canvas
MIN_LETTER_HEIGHT = 0.18
MAX_TILT = 8.0  # degrees
MAX_ASPECT = 2.5
CANVAS = (64, 224)  # longer side, pixels
_CAP = 64  # height of a capital in the cached glyph bitmaps, pixels
_MARGIN = 0.96  # text stays inside this share of the canvas

# (family, file) inside matplotlib/mpl-data/fonts/ttf
_FONT_FILES = (
    ("DejaVu Sans", "DejaVuSans.ttf"),
    ("DejaVu Sans", "DejaVuSans-Bold.ttf"),
    ("DejaVu Sans", "DejaVuSans-Oblique.ttf"),
    ("DejaVu Sans Mono", "DejaVuSansMono.ttf"),
    ("DejaVu Sans Mono", "DejaVuSansMono-Bold.ttf"),
    ("DejaVu Serif", "DejaVuSerif.ttf"),
    ("DejaVu Serif", "DejaVuSerif-Bold.ttf"),
    ("STIX", "STIXGeneral.ttf"),
    ("STIX", "STIXGeneralBol.ttf"),
    ("STIX", "STIXGeneralItalic.ttf"),
    ("Computer Modern", "cmr10.ttf"),
    ("Computer Modern", "cmb10.ttf"),
    ("Computer Modern", "cmss10.ttf"),
    ("Computer Modern", "cmtt10.ttf"),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN_WORDS = _words(
    """
    ace act add age ago air all and ant any ape arm art ask bad bag ball bank bark base
    bath bear beat bed bee bell belt best big bike bird bit black blow blue boat body
    bold bone book born box boy bread brick brown bus busy but buy cake call calm camp
    can car care cart case cat chair chin city clay clean clock coal coat coin cold come
    cook corn cow crab cry cup cut dad dark date day deep deer desk dish dog door down
    draw dress drum duck dust each ear early earth east eat edge egg eight end even eye
    face fact fair fall far farm fast fat fence few fig film find fine fire fish five
    flag flat floor fly foam fog food foot fork four fox free frog fruit full fun game
    gate gift girl give glad glass go goat gold good grass green grow gum hair half hand
    hat head hear heat help hen her hide high hill hit home hop horn horse hot hour
    house ice idea in ink iron it jam jar jet job joke jump just keep kid kind king kiss
    knee knife lake lamp land last late law leaf left leg lemon lift lion lip live log
    long look lost love luck lunch make man map mark meat men milk mind mix money moon
    more moth mouse move mud my nail name near neck nest new nice nine no nose not nut
    oak off oil old on open out owl own page pan park part path pay pear pen pet pick
    pie pig pin pink pipe plan play pool pot price pull pure queen quiz rain rat read
    rest rice ride ring river road rock roof rope rose run safe sail salt sand say sea
    seed set shell ship shop show sign six skin sky sleep slow snow sock soft son song
    soup spoon star step stop sugar sun swim table tail tap tea ten test tie time to toe
    top toy tree try two uncle up use van view voice walk wall war wash wax week west
    wet wheel why win wing wise wolf wood word work year yes you zero zone zoo
    """
)
TEST_WORDS = _words(
    """
    able ankle apple arch axe baby bacon band beach bean bolt bow brain brush bug bulb
    cab cage cave chalk cheek child claw cliff cloud club crown cub dance debt dice dive
    do dot dove dream echo elbow elm exit fan feast fin flame flock fur gem ghost glove
    grape hail harp hay he hero hive honey hook hut inch ivy jazz jelly juice kite knot
    lace lane lens lid lock maid mask maze melon mint mole monk navy net ninja north oat
    ocean olive onion oven ox paint palm peach pearl piano plum pony quilt rabbi rake
    reef robe rug ruler salad scarf seal shark shoe silk skate sled so spy stamp storm
    swan tent thumb tiger toast tooth tulip urn us vase vest vine wagon wand we whale
    wheat yacht yolk zebra zip
    """
)

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
    font = _pick_font(rng, split)
    glyphs = _rendered_line(rng, text, font)
    return _picture(rng, text, glyphs, "digit", MIN_DIGIT_HEIGHT, fonts()[font].name)


def sample_word(rng: random.Random, split: str = "train") -> Glyphs:
    """A picture of 2 to 5 rendered letters; its text is in capitals."""
    _check_split(split)
    if split == "test":
        word = rng.choice(TEST_WORDS)
    elif rng.random() < 0.5:
        word = rng.choice(TRAIN_WORDS)
    else:
        word = _random_letters(rng)
    drawn = word.upper() if rng.random() < 0.75 else word
    font = _pick_font(rng, split)
    glyphs = _rendered_line(rng, drawn, font)
    name = fonts()[font].name
    return _picture(rng, drawn, glyphs, "letter", MIN_LETTER_HEIGHT, name)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise DatasetError(f"split is {split!r}. Use 'train' or 'test'.")


def _random_letters(rng: random.Random) -> str:
    """2 to 5 letters, half of the time pronounceable, never a test word."""
    while True:
        length = rng.choice((2, 3, 4, 4, 5, 5))
        if rng.random() < 0.5:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        else:
            start = rng.randrange(2)
            kinds = ("bcdfghjklmnpqrstvwxyz", "aeiouy")
            word = "".join(rng.choice(kinds[(start + i) % 2]) for i in range(length))
        # "ll" in small letters and "II" in capitals look the same.
        if word not in _TEST_WORD_SET and not set(word) <= {"l", "i"}:
            return word


_TEST_WORD_SET = frozenset(TEST_WORDS)


# --- fonts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Font:
    family: str
    name: str
    path: Path | None  # None: Pillow's own


def _package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def fonts() -> tuple[_Font, ...]:
    """The fonts on this machine that can be used, those of the held-out family too."""
    found = [_Font("Pillow", "Pillow default", None)]
    if folder := _package_folder("matplotlib"):
        for family, file in _FONT_FILES:
            path = folder / "mpl-data" / "fonts" / "ttf" / file
            if path.is_file():
                found.append(_Font(family, path.stem, path))
    return tuple(found)


@cache
def _font_numbers(split: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices into fonts(): those of training, and the held-out ones (test only)."""
    seen = tuple(i for i, f in enumerate(fonts()) if f.family != HELD_OUT_FAMILY)
    held_out = tuple(i for i, f in enumerate(fonts()) if f.family == HELD_OUT_FAMILY)
    return seen, held_out if split == "test" else ()


def _pick_font(rng: random.Random, split: str) -> int:
    seen, held_out = _font_numbers(split)
    if held_out and rng.random() < 0.25:
        return rng.choice(held_out)
    return rng.choice(seen)


@dataclass(frozen=True)
class _Glyph:
    """A bitmap and its place on the line. Units: a capital is _CAP high."""

    mask: Image.Image  # L, ink is 255
    left: float
    top: float  # from the base line, down is positive
    width: float
    height: float
    advance: float


@cache
def _scaled_font(number: int) -> ImageFont.FreeTypeFont:
    path = fonts()[number].path

    def at(size: float) -> ImageFont.FreeTypeFont:
        if path is None:
            return ImageFont.load_default(size)
        return ImageFont.truetype(str(path), size)

    top, bottom = at(200).getbbox("H", anchor="ls")[1::2]
    return at(200 * _CAP / (bottom - top))


@cache
def _rendered_glyph(number: int, char: str) -> _Glyph:
    font = _scaled_font(number)
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    mask = Image.new("L", (right - left, bottom - top))
    draw = ImageDraw.Draw(mask)
    draw.text((-left, -top), char, fill=255, font=font, anchor="ls")
    width, height = mask.size
    return _Glyph(mask, left, top, width, height, font.getlength(char))


@cache
def _handwriting(split: str) -> tuple[tuple[_Glyph, ...], ...]:
    """Handwritten samples per digit 0..9. Every fifth of the file is for the test."""
    folder = _package_folder("sklearn")
    path = folder and folder / "datasets" / "data" / "digits.csv.gz"
    if path is None or not path.is_file():
        raise DatasetError(
            "The handwritten digits of scikit-learn are missing. "
            "Install the extra 'train': pip install 'mm1_mlx[train]'."
        )
    digits: list[list[_Glyph]] = [[] for _ in range(10)]
    with gzip.open(path, "rt") as file:
        for index, row in enumerate(csv.reader(file)):
            if (index % 5 == 4) != (split == "test"):
                continue
            values = np.array([float(v) for v in row])
            digits[int(values[64])].append(_handwritten_glyph(values[:64]))
    return tuple(tuple(d) for d in digits)


def _handwritten_glyph(values: np.ndarray) -> _Glyph:
    """One 8x8 sample (64 values of 0..16), cut to its ink, with a soft border."""
    pixels = values.reshape(8, 8)
    rows = np.flatnonzero(pixels.max(1) >= 4)
    columns = np.flatnonzero(pixels.max(0) >= 4)
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels = np.pad(pixels, 1)
    mask = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
    unit = _CAP / (len(rows) + 1)  # half of the soft border counts as ink
    width, height = mask.width * unit, mask.height * unit
    return _Glyph(mask, 0, -height, width, height, width)


# --- a line of glyphs ----------------------------------------------------------------

_Line = list[tuple[_Glyph, float, float, float, float]]  # glyph and box on the line


def _rendered_line(rng: random.Random, text: str, font: int) -> _Line:
    stretch = rng.uniform(0.8, 1.15) if rng.random() < 0.5 else 1.0
    gap = _CAP * (rng.uniform(-0.02, 0.3) if rng.random() < 0.6 else 0.0)
    line, x = [], 0.0
    for char in text:
        glyph = _rendered_glyph(font, char)
        left = x + glyph.left * stretch
        right = left + glyph.width * stretch
        line.append((glyph, left, glyph.top, right, glyph.top + glyph.height))
        x += glyph.advance * stretch + gap
    return line


def _handwritten_line(rng: random.Random, text: str, split: str) -> _Line:
    samples = _handwriting(split)
    gap = _CAP * rng.uniform(-0.05, 0.3)
    line, x = [], 0.0
    for char in text:
        glyph = rng.choice(samples[int(char)])
        width = glyph.width * rng.uniform(0.85, 1.15)
        drop = _CAP * rng.uniform(-0.06, 0.06)
        line.append((glyph, x, glyph.top + drop, x + width, drop))
        x += width + gap
    return line


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
        smallest = least * longer / _CAP
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
