"""A large picture as tiles, each as large as the encoder's input.

`layout_of` says how they lie, `tiles` gives their pixels, `expansion` what stands for
them in the text.
"""

from dataclasses import replace

import numpy as np
from PIL import Image

from mm1_mlx.config import TilingConfig
from mm1_mlx.grids import Layout, choose_grid, dynamic_grid, fitted_size
from mm1_mlx.inputs.images import fit, normalised, resize
from mm1_mlx.inputs.settings import ImageSettings


def tiles(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[np.ndarray, Layout]:
    """Normalised pixels of the tiles (n, H, W, 3) float32, and how they lie.

    The overview is the first tile of "anyres", else the last one.
    """
    pictures, layout = cut(image, settings, config)
    return np.stack([normalised(picture, settings) for picture in pictures]), layout


def cut(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[list[Image.Image], Layout]:
    """The tiles as pictures, each settings.size square, and how they lie."""
    return _CUTS[config.type](image, settings, config)


def layout_of(width: int, height: int, size: int, config: TilingConfig) -> Layout:
    """How the tiles of a picture of width x height pixels will lie.

    size: the side of a tile.
    """
    if config.type == "anyres":
        rows, columns = choose_grid(width, height, config.grids, size)
    elif config.type == "dynamic":
        rows, columns = dynamic_grid(width, height, config.least, config.most, size)
        if rows == columns == 1:  # the picture itself: no overview beside it
            rows = columns = 0
    else:
        ((rows, columns),) = config.grids
    return Layout(rows, columns, width, height)


def whole(width: int, height: int) -> Layout:
    """The layout of a picture that is read as one tile."""
    return Layout(0, 0, width, height)


def expansion(
    layout: Layout, image_number: int, config: TilingConfig
) -> list[str | None]:
    """What stands in a text for one picture: pieces of text, and None for the Q image
    tokens of a tile, in the order of `tiles`.

    image_number: of the picture in its prompt, from 0. The words are MM1.5's (section
    3.5): "(k,i,j)" with row and column from 1, and 0,0 for the overview, each before
    its tile; or "," between columns, "<n>" between rows and ":" before the overview.
    How they become tokens is ours, and so is that a picture of one tile has no text.
    For "anyres" and "crops" the picture's tokens are one run: [None].
    """
    if config.arranges or layout.tiles == 1:
        return [None]
    places = [(i + 1, j + 1) for i in range(layout.rows) for j in range(layout.columns)]
    if config.indicator == "none":
        return [None] * (len(places) + 1)
    found: list[str | None] = []
    for i, j in [*places, (0, 0)]:
        if config.indicator == "index":
            found.append(f"({image_number},{i},{j})")
        elif found:
            found.append(":" if i == 0 else "<n>" if j == 1 else ",")
        found.append(None)
    return found


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
    colour = tuple(config.pad_color)
    canvas = _padded(image, columns * size, rows * size, colour)
    overview = resize(image, size, size)
    if config.overview == "fit":
        overview = _padded(image, size, size, colour)
    parts = [overview, *_cut(canvas, rows, columns, size)]
    return parts, layout


def _padded(
    image: Image.Image, across: int, down: int, colour: tuple[int, ...]
) -> Image.Image:
    """The whole picture in the middle of a canvas."""
    width, height = fitted_size(*image.size, across, down)
    canvas = Image.new("RGB", (across, down), colour)
    place = (across - width) // 2, (down - height) // 2
    canvas.paste(resize(image, width, height), place)
    return canvas


def _crops(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[list[Image.Image], Layout]:
    """360VL: padded to a square, the tiles cut from it, the overview made from it."""
    ((rows, columns),) = config.grids
    size = settings.size
    large = fit(image, replace(settings, size=size * rows))
    parts = [*_cut(large, rows, columns, size), resize(large, size, size)]
    return parts, Layout(rows, columns, *image.size)


def _dynamic(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[list[Image.Image], Layout]:
    """MM1.5: the picture on the canvas of the grid that suits it, then an overview.

    The picture is in the middle of the canvas, and the overview is what the model
    reads of a whole picture: MM1.5 says neither.
    """
    size = settings.size
    layout = layout_of(*image.size, size, config)
    overview = fit(image, settings)
    if layout.tiles == 1:
        return [overview], layout
    rows, columns = layout.rows, layout.columns
    canvas = _padded(image, columns * size, rows * size, settings.pad_color)
    return [*_cut(canvas, rows, columns, size), overview], layout


def _sub_images(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[list[Image.Image], Layout]:
    """MM1: the picture as a larger square, in tiles, then as the usual one."""
    layout = layout_of(*image.size, settings.size, config)
    large = fit(image, replace(settings, size=settings.size * layout.rows))
    parts = _cut(large, layout.rows, layout.columns, settings.size)
    return [*parts, fit(image, settings)], layout


def _cut(image: Image.Image, rows: int, columns: int, size: int) -> list[Image.Image]:
    """The tiles of a picture, row by row."""
    return [
        image.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(rows)
        for x in range(columns)
    ]


_CUTS = {
    "anyres": _anyres,
    "crops": _crops,
    "dynamic": _dynamic,
    "sub_images": _sub_images,
}
