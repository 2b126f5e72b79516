"""A large picture as tiles, each as large as the encoder's input."""

import numpy as np
from PIL import Image

from mm1_mlx.config import TilingConfig
from mm1_mlx.grids import Layout, choose_grid, fitted_size
from mm1_mlx.inputs.images import fit, normalised, resize
from mm1_mlx.inputs.settings import ImageSettings


def tiles(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[np.ndarray, Layout]:
    """Normalised pixels of the tiles (n, H, W, 3) float32, and how they lie.

    The overview is the first tile of "anyres" and the last of "crops".
    """
    cut = _anyres if config.type == "anyres" else _crops
    pictures, layout = cut(image, settings, config)
    return np.stack([normalised(picture, settings) for picture in pictures]), layout


def layout_of(width: int, height: int, size: int, config: TilingConfig) -> Layout:
    """How the tiles of a picture of width x height pixels will lie.

    size: the side of a tile.
    """
    if config.type == "anyres":
        rows, columns = choose_grid(width, height, config.grids, size)
    else:
        ((rows, columns),) = config.grids
    return Layout(rows, columns, width, height)


def _anyres(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[list[Image.Image], Layout]:
    """The picture fitted into the chosen grid, and an overview in front.

    (transformers: LlavaNextImageProcessorPil; the original: llava/mm_utils.py,
    process_anyres_image; HyperCLOVAX: HyperClovaXVisionImageProcessor, whose overview
    is not squashed.)
    """
    size = settings.size
    width, height = image.size
    layout = layout_of(width, height, size, config)
    rows, columns = layout.rows, layout.columns
    canvas = _padded(image, columns * size, rows * size, config)
    overview = resize(image, size, size)
    if config.overview == "fit":
        overview = _padded(image, size, size, config)
    parts = [overview, *_cut(canvas, rows, columns, size)]
    return parts, layout


def _padded(
    image: Image.Image, across: int, down: int, config: TilingConfig
) -> Image.Image:
    """The whole picture in the middle of a canvas."""
    width, height = fitted_size(*image.size, across, down)
    canvas = Image.new("RGB", (across, down), tuple(config.pad_color))
    place = (across - width) // 2, (down - height) // 2
    canvas.paste(resize(image, width, height), place)
    return canvas


def _crops(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[list[Image.Image], Layout]:
    """360VL: padded to a square, the tiles cut from it, the overview made from it."""
    ((rows, columns),) = config.grids
    size = settings.size
    large = ImageSettings(
        size=size * rows,
        resize_mode=settings.resize_mode,
        image_mean=settings.image_mean,
        image_std=settings.image_std,
        pad_color=settings.pad_color,
    )
    whole = fit(image, large)
    parts = [*_cut(whole, rows, columns, size), resize(whole, size, size)]
    return parts, Layout(rows, columns, *image.size)


def _cut(image: Image.Image, rows: int, columns: int, size: int) -> list[Image.Image]:
    """The tiles of a picture, row by row."""
    return [
        image.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(rows)
        for x in range(columns)
    ]
