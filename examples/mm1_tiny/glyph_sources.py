"""Where glyphs come from: font files and handwritten digits inside installed wheels.

Fonts: Pillow's own scalable one, and those in the matplotlib wheel (DejaVu, STIX,
Computer Modern). Handwriting: scikit-learn's 8x8 digits. Both wheels come with the
extra `train`; neither package is imported, only its data files are read.
"""

import csv
import gzip
import importlib.util
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mm1_mlx.errors import DatasetError

HELD_OUT_FAMILY = "DejaVu Serif"
CAP = 64  # height of a capital in the cached bitmaps, pixels

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


@dataclass(frozen=True)
class Font:
    family: str
    name: str
    path: Path | None  # None: Pillow's own


def package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def fonts() -> tuple[Font, ...]:
    """The fonts on this machine that can be used, those of the held-out family too."""
    found = [Font("Pillow", "Pillow default", None)]
    if folder := package_folder("matplotlib"):
        for family, file in _FONT_FILES:
            path = folder / "mpl-data" / "fonts" / "ttf" / file
            if path.is_file():
                found.append(Font(family, path.stem, path))
    return tuple(found)


@cache
def _font_numbers(split: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices into fonts(): those of training, and the held-out ones (test only)."""
    seen = tuple(i for i, f in enumerate(fonts()) if f.family != HELD_OUT_FAMILY)
    held_out = tuple(i for i, f in enumerate(fonts()) if f.family == HELD_OUT_FAMILY)
    return seen, held_out if split == "test" else ()


def pick_font(rng: random.Random, split: str) -> int:
    seen, held_out = _font_numbers(split)
    if held_out and rng.random() < 0.25:
        return rng.choice(held_out)
    return rng.choice(seen)


@dataclass(frozen=True)
class Glyph:
    """A bitmap and its place on the line. Units: a capital is CAP high."""

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
    return at(200 * CAP / (bottom - top))


@cache
def rendered_glyph(number: int, char: str) -> Glyph:
    font = _scaled_font(number)
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    mask = Image.new("L", (right - left, bottom - top))
    draw = ImageDraw.Draw(mask)
    draw.text((-left, -top), char, fill=255, font=font, anchor="ls")
    width, height = mask.size
    return Glyph(mask, left, top, width, height, font.getlength(char))


@cache
def handwriting(split: str) -> tuple[tuple[Glyph, ...], ...]:
    """Handwritten samples per digit 0..9. Every fifth of the file is for the test."""
    folder = package_folder("sklearn")
    path = folder and folder / "datasets" / "data" / "digits.csv.gz"
    if path is None or not path.is_file():
        raise DatasetError(
            "The handwritten digits of scikit-learn are missing. "
            "Install the extra 'train': pip install 'mm1_mlx[train]'."
        )
    digits: list[list[Glyph]] = [[] for _ in range(10)]
    with gzip.open(path, "rt") as file:
        for index, row in enumerate(csv.reader(file)):
            if (index % 5 == 4) != (split == "test"):
                continue
            values = np.array([float(v) for v in row])
            digits[int(values[64])].append(_handwritten_glyph(values[:64]))
    return tuple(tuple(d) for d in digits)


def _handwritten_glyph(values: np.ndarray) -> Glyph:
    """One 8x8 sample (64 values of 0..16), cut to its ink, with a soft border."""
    pixels = values.reshape(8, 8)
    rows = np.flatnonzero(pixels.max(1) >= 4)
    columns = np.flatnonzero(pixels.max(0) >= 4)
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels = np.pad(pixels, 1)
    mask = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
    unit = CAP / (len(rows) + 1)  # half of the soft border counts as ink
    width, height = mask.width * unit, mask.height * unit
    return Glyph(mask, 0, -height, width, height, width)
