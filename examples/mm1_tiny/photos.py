"""Pictures that mm1-tiny must decline: photographs, textures, charts, pages.

The photographs lie inside the wheels of scikit-image, scikit-learn and matplotlib (the
extra `train`); none is downloaded and none of the packages is imported. They are split
by photograph, and the test split is plain crops of its photographs. Training has few
photographs, so it also mixes them and adds textures from `textures.py`.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

from examples.mm1_tiny.glyph_sources import package_folder
from examples.mm1_tiny.textures import POOL_SIDE, POOL_SIZE, may_be_cut, texture
from mm1_mlx.errors import DatasetError

UNKNOWN_ANSWER = "I do not know this kind of picture."


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package.

    middle: the share of it that is used. least: the smallest crop, as part of its side.
    weight: how often it is taken, against the others.
    """

    package: str
    path: str
    middle: float = 1.0
    least: float = 0.2
    weight: float = 1.0


# Left out on purpose: pictures that look like our scenes, whole or in part (horse,
# phantom, logo, chessboard, coins, cell, microaneurysms), and pages that could be read.
TRAIN_PHOTOS = (
    Photo("sklearn", "datasets/images/flower.jpg", weight=3),
    Photo("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", weight=4),
    Photo("skimage", "data/motorcycle_left.png", weight=3),
    Photo("skimage", "data/motorcycle_right.png", weight=3),
    Photo("skimage", "data/hubble_deep_field.jpg", weight=1.5),
    Photo("skimage", "data/ihc.png", weight=1.5),
    Photo("skimage", "data/retina.jpg", middle=0.6),  # its rim is a circle on black
    Photo("skimage", "data/moon.png", least=0.5),  # a crater alone is a grey circle
    Photo("skimage", "data/brick.png"),
    Photo("skimage", "data/grass.png"),
    Photo("skimage", "data/gravel.png"),
)
TEST_PHOTOS = (
    Photo("skimage", "data/astronaut.png", least=0.4),
    Photo("skimage", "data/chelsea.png", least=0.4),
    Photo("skimage", "data/coffee.png", least=0.4),
    Photo("skimage", "data/rocket.jpg", least=0.4),
    Photo("skimage", "data/camera.png", least=0.4),
    Photo("sklearn", "datasets/images/china.jpg", least=0.4),
)
_FACES = "data/lfw_subset.npy"  # 100 grey faces, then 100 other crops, 25x25
_PHOTO_SIDE = 288  # the longer side of a decoded photograph, pixels
_LEAST_SPREAD = 7.0  # grey levels; a flatter crop shows nothing


def sample_unknown(rng: random.Random, split: str = "train") -> Image.Image:
    """A picture of another kind than scenes, numbers and words: RGB, 24 to 288 px."""
    if split == "test":
        return _crop(rng, *rng.choice(photos("test")))
    if split != "train":
        raise DatasetError(f"split is {split!r}. Use 'train' or 'test'.")
    while True:
        image = _train_picture(rng)
        if _spread(image) >= _LEAST_SPREAD:
            return image


@cache
def photos(split: str) -> tuple[tuple[Photo, Image.Image], ...]:
    """The photographs of a split with their pictures: RGB, at most 288 px.

    Those of matplotlib are left out without it; the others are required (DatasetError).
    """
    found = []
    for photo in TRAIN_PHOTOS if split == "train" else TEST_PHOTOS:
        folder = package_folder(photo.package)
        if folder is None and photo.package == "matplotlib":
            continue
        if folder is None or not (folder / photo.path).is_file():
            raise DatasetError(
                f"The photograph {photo.path} of {photo.package} is missing. "
                "Install the extra 'train': pip install 'mm1_mlx[train]'."
            )
        image = Image.open(folder / photo.path).convert("RGB")
        if photo.middle < 1:
            image = ImageOps.crop(image, min(image.size) * (1 - photo.middle) / 2)
        image.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE), Image.Resampling.LANCZOS)
        found.append((photo, image))
    return tuple(found)


@cache
def _weights() -> tuple[float, ...]:
    return tuple(photo.weight for photo, _ in photos("train"))


@cache
def _faces() -> tuple[Image.Image, ...]:
    """Small grey photographs of scikit-image, for training only."""
    folder = package_folder("skimage")
    if folder is None or not (folder / _FACES).is_file():
        return ()
    pixels = np.load(folder / _FACES)[:100]
    pixels = np.clip(pixels / max(1e-6, pixels.max()) * 255, 0, 255).astype(np.uint8)
    return tuple(Image.fromarray(p).convert("RGB") for p in pixels)


def _spread(image: Image.Image) -> float:
    """The standard deviation of the grey values of a small copy."""
    small = image.convert("L").resize((16, 16), Image.Resampling.BOX)
    return ImageStat.Stat(small).stddev[0]


def _crop(rng: random.Random, photo: Photo, whole: Image.Image) -> Image.Image:
    """A part of a photograph that shows something, perhaps mirrored."""
    for _ in range(20):
        width = round(whole.width * rng.uniform(photo.least, 1.0))
        part = width / whole.width * rng.uniform(0.75, 1.33)
        height = round(whole.height * min(1.0, max(photo.least, part)))
        x = rng.randint(0, whole.width - width)
        y = rng.randint(0, whole.height - height)
        image = whole.crop((x, y, x + width, y + height))
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
    photo, whole = rng.choices(photos("train"), _weights())[0]
    image = _crop(rng, photo, whole)
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
