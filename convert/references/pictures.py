"""Pictures as the originals read them: transformers' processor, or Pillow alone."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mm1_mlx.config import TilingConfig
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.settings import ImageSettings, read_preprocessor


def pixels(
    picture: Image.Image,
    settings: ImageSettings,
    folder: Path | None,
    tiling: TilingConfig | None = None,
    layout: Layout | None = None,
) -> np.ndarray:
    """Pixels (1, 3, H, W) float32; of every tile (n, 3, H, W) with a tiling.

    layout: the tiles of this picture. folder: with transformers'
    preprocessor_config.json, where the original's pictures
    go through that; None where they do not.
    """
    if folder is not None and read_preprocessor(folder) is not None:
        found = _of_transformers(picture, folder)
        if found is not None:
            return found
    if tiling is None or layout is None:
        return _normalised(_whole(picture, settings, settings.size), settings)
    cut = _anyres if tiling.type == "anyres" else _crops
    tiles = [
        _normalised(tile, settings) for tile in cut(picture, settings, layout, tiling)
    ]
    return np.concatenate(tiles)


def _of_transformers(picture: Image.Image, folder: Path) -> np.ndarray | None:
    from transformers import AutoImageProcessor

    try:  # the one on Pillow: the other needs torchvision and differs by a grey level
        processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception:  # whatever an older transformers does not know
        return None
    found = processor(picture, return_tensors="np")["pixel_values"]
    return np.asarray(found, np.float32).reshape(-1, *found.shape[-3:])


def _whole(picture: Image.Image, settings: ImageSettings, size: int) -> Image.Image:
    """The picture as size x size."""
    width, height = picture.size
    if settings.resize_mode == "pad":
        picture = _on_canvas(picture, (max(picture.size),) * 2, settings.pad_color)
    if settings.resize_mode == "crop":
        short = min(width, height)
        wide, high = width * size // short, height * size // short
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        return picture.crop((left, top, left + size, top + size))
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def _on_canvas(picture: Image.Image, size: tuple, colour: Sequence[int]) -> Image.Image:
    canvas = Image.new("RGB", size, tuple(colour))
    place = [
        (whole - part) // 2 for whole, part in zip(size, picture.size, strict=True)
    ]
    canvas.paste(picture, tuple(place))
    return canvas


def _fitted(picture: Image.Image, size: tuple, colour: Sequence[int]) -> Image.Image:
    """As large as it fits on a canvas: LLaVA's resize_and_pad_image."""
    across, down = size[0] / picture.width, size[1] / picture.height
    if across < down:
        new = size[0], min(ceil(picture.height * across), size[1])
    else:
        new = min(ceil(picture.width * down), size[0]), size[1]
    return _on_canvas(picture.resize(new, Image.Resampling.BICUBIC), size, colour)


def _anyres(
    picture: Image.Image, settings: ImageSettings, layout: Layout, tiling: TilingConfig
) -> list[Image.Image]:
    side, colour = settings.size, tiling.pad_color
    size = layout.columns * side, layout.rows * side
    overview = picture.resize((side, side), Image.Resampling.BICUBIC)
    if tiling.overview == "fit":
        overview = _fitted(picture, (side, side), colour)
    return [overview, *_cut(_fitted(picture, size, colour), side)]


def _crops(
    picture: Image.Image, settings: ImageSettings, layout: Layout, tiling: TilingConfig
) -> list[Image.Image]:
    side = settings.size
    whole = _whole(picture, settings, side * layout.rows)
    overview = whole.resize((side, side), Image.Resampling.BICUBIC)
    return [*_cut(whole, side), overview]


def _cut(picture: Image.Image, side: int) -> list[Image.Image]:
    return [
        picture.crop((left, top, left + side, top + side))
        for top in range(0, picture.height, side)
        for left in range(0, picture.width, side)
    ]


def _normalised(picture: Image.Image, settings: ImageSettings) -> np.ndarray:
    values = np.asarray(picture, np.float64) / 255
    values = (values - np.array(settings.image_mean)) / np.array(settings.image_std)
    return values.astype(np.float32).transpose(2, 0, 1)[None]
