"""Pictures that mm1-tiny must decline: photographs, textures, charts, pages.

The photographs lie inside the wheels of scikit-image, scikit-learn and matplotlib (the
extra `train`); none is downloaded and none of the packages is imported. They are split
by photograph, and the test split is plain crops of its photographs. Training has few
photographs, so it also mixes them and adds textures from `textures.py`.
"""

import importlib.util
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

from examples.mm1_tiny.textures import POOL_SIDE, POOL_SIZE, may_be_cut, texture
from mm1_mlx.errors import DatasetError

UNKNOWN_ANSWER = "I do not know this kind of picture."

# (package, path inside it, share of the middle that is used). Left out on purpose:
# flat figures that look like our scenes (horse, phantom, logo, chessboard) and pages
# that could be read (page, text).
TRAIN_PHOTOS = (
    ("sklearn", "datasets/images/flower.jpg", 1.0),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", 1.0),
    ("skimage", "data/motorcycle_left.png", 1.0),
    ("skimage", "data/motorcycle_right.png", 1.0),
    ("skimage", "data/hubble_deep_field.jpg", 1.0),
    ("skimage", "data/ihc.png", 1.0),
    ("skimage", "data/retina.jpg", 0.6),  # its rim is a circle on black
    ("skimage", "data/moon.png", 1.0),
    ("skimage", "data/coins.png", 1.0),
    ("skimage", "data/brick.png", 1.0),
    ("skimage", "data/grass.png", 1.0),
    ("skimage", "data/gravel.png", 1.0),
    ("skimage", "data/microaneurysms.png", 1.0),
)
TEST_PHOTOS = (
    ("skimage", "data/astronaut.png", 1.0),
    ("skimage", "data/chelsea.png", 1.0),
    ("skimage", "data/coffee.png", 1.0),
    ("skimage", "data/rocket.jpg", 1.0),
    ("skimage", "data/camera.png", 1.0),
    ("sklearn", "datasets/images/china.jpg", 1.0),
)
_FACES = "data/lfw_subset.npy"  # 100 grey faces and 100 other crops, 25x25
_PHOTO_SIDE = 288  # the longer side of a decoded photograph, pixels
_LEAST_SPREAD = 7.0  # grey levels; a flatter crop shows nothing


def sample_unknown(rng: random.Random, split: str = "train") -> Image.Image:
    """A picture of another kind than scenes, numbers, words: RGB, 64 to 192 px."""
    if split == "test":
        return _crop(rng, rng.choice(photos("test")), 0.4)
    if split != "train":
        raise DatasetError(f"split is {split!r}. Use 'train' or 'test'.")
    while True:
        image = _train_picture(rng)
        if _spread(image) >= _LEAST_SPREAD:
            return image


def _package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def photos(split: str) -> tuple[Image.Image, ...]:
    """The photographs of a split, RGB, at most 288 px, those of absent wheels left out.

    Raises DatasetError without scikit-image, which brings most of them.
    """
    found = []
    for package, path, middle in TRAIN_PHOTOS if split == "train" else TEST_PHOTOS:
        folder = _package_folder(package)
        if folder is None and package == "matplotlib":
            continue
        if folder is None or not (folder / path).is_file():
            raise DatasetError(
                f"The photograph {path} of {package} is missing. "
                "Install the extra 'train': pip install 'mm1_mlx[train]'."
            )
        image = Image.open(folder / path).convert("RGB")
        if middle < 1:
            image = ImageOps.crop(image, round(min(image.size) * (1 - middle) / 2))
        image.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE), Image.Resampling.LANCZOS)
        found.append(image)
    return tuple(found)


@cache
def _faces() -> tuple[Image.Image, ...]:
    """Small grey photographs of scikit-image, for training only."""
    folder = _package_folder("skimage")
    if folder is None or not (folder / _FACES).is_file():
        return ()
    pixels = np.load(folder / _FACES)
    pixels = np.clip(pixels / max(1e-6, pixels.max()) * 255, 0, 255).astype(np.uint8)
    return tuple(Image.fromarray(p).convert("RGB") for p in pixels)


def _spread(image: Image.Image) -> float:
    """The standard deviation of the grey values of a small copy."""
    small = image.convert("L").resize((16, 16), Image.Resampling.BOX)
    return ImageStat.Stat(small).stddev[0]


def _crop(rng: random.Random, photo: Image.Image, least: float) -> Image.Image:
    """A part of a photograph (side: `least` to all of it), perhaps mirrored."""
    for _ in range(20):
        part = rng.uniform(least, 1.0)
        stretch = rng.uniform(0.7, 1.4) ** 0.5
        width = round(photo.width * min(1.0, part * stretch))
        height = round(photo.height * min(1.0, part / stretch))
        x = rng.randint(0, photo.width - width)
        y = rng.randint(0, photo.height - height)
        image = photo.crop((x, y, x + width, y + height))
        if _spread(image) >= _LEAST_SPREAD:
            break
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


# --- training ------------------------------------------------------------------------


def _train_picture(rng: random.Random) -> Image.Image:
    kind = rng.random()
    if kind < 0.40:
        image = _changed(rng, _photo_part(rng))
    elif kind < 0.55:  # two photographs, or a photograph and a texture
        first, second = _photo_part(rng), rng.choice((_photo_part, _texture_part))(rng)
        image = _mixed(rng, _changed(rng, first), _changed(rng, second))
    elif kind < 0.90:
        image = _texture_part(rng)
        if rng.random() < 0.3:
            image = _changed(rng, image)
    else:
        image = _mixed(rng, _texture_part(rng), _texture_part(rng))
    return image


def _photo_part(rng: random.Random) -> Image.Image:
    if _faces() and rng.random() < 0.12:
        image = rng.choice(_faces())
        side = rng.randint(64, 128)
        return image.resize((side, side), Image.Resampling.BICUBIC)
    image = _crop(rng, rng.choice(photos("train")), 0.2)
    longer = rng.randint(64, 160)
    scale = longer / max(image.size)
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _texture_part(rng: random.Random) -> Image.Image:
    number = rng.randrange(POOL_SIZE)
    image = texture(number)
    if may_be_cut(number) and rng.random() < 0.6:
        width = rng.randint(POOL_SIDE * 2 // 5, POOL_SIDE)
        height = rng.randint(POOL_SIDE * 2 // 5, POOL_SIDE)
        x, y = rng.randint(0, POOL_SIDE - width), rng.randint(0, POOL_SIDE - height)
        image = image.crop((x, y, x + width, y + height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _changed(rng: random.Random, image: Image.Image) -> Image.Image:
    """Turned, recoloured, blurred: each now and then."""
    if rng.random() < 0.3:
        turn = rng.choice(
            (
                Image.Transpose.ROTATE_90,
                Image.Transpose.ROTATE_180,
                Image.Transpose.ROTATE_270,
                Image.Transpose.FLIP_TOP_BOTTOM,
            )
        )
        image = image.transpose(turn)
    if rng.random() < 0.75:
        image = image.convert("RGB", _colour_matrix(rng))
    if rng.random() < 0.1:
        image = ImageOps.invert(image)
    if rng.random() < 0.15:
        image = image.filter(
            ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0) * max(image.size) / 64)
        )
    return image


def _colour_matrix(rng: random.Random) -> tuple[float, ...]:
    """Channel mixing, contrast and brightness as one 3x4 matrix."""
    mix = rng.choice((0.0, 0.15, 0.15, 0.6))
    contrast = rng.uniform(0.6, 1.5)
    light = rng.uniform(-35, 35)
    matrix: list[float] = []
    for row in range(3):
        weights = [mix * rng.uniform(-0.5, 1.0) for _ in range(3)]
        weights[row] += 1.0
        total = sum(weights) or 1.0
        gain = contrast * rng.uniform(0.85, 1.15) / max(0.4, total)
        matrix += [w * gain for w in weights]
        matrix.append(128 * (1 - contrast) + light)
    return tuple(matrix)


def _mixed(rng: random.Random, one: Image.Image, two: Image.Image) -> Image.Image:
    """Two pictures in one: blended, multiplied, or divided by a soft random mask."""
    two = two.resize(one.size, Image.Resampling.BILINEAR)
    kind = rng.random()
    if kind < 0.4:
        return Image.blend(one, two, rng.uniform(0.25, 0.75))
    if kind < 0.55:
        return ImageChops.multiply(one, two)
    if kind < 0.7:
        return ImageChops.screen(one, two)
    mask = texture(rng.randrange(POOL_SIZE)).convert("L")
    mask = mask.filter(ImageFilter.GaussianBlur(4)).resize(one.size)
    mask = ImageOps.autocontrast(mask).point(_steep())
    return Image.composite(one, two, mask)


@cache
def _steep() -> list[int]:
    """Grey value -> a mask that is mostly one picture or the other."""
    return [max(0, min(255, (v - 128) * 4 + 128)) for v in range(256)]
