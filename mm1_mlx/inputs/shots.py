"""What the encoder is given of a picture: by the photo kernel, or on the host.

The same numbers both ways, to the last bit. Training reads its pictures on the host
(images.pixels, tiling.tiles): the GPU is busy there, and the host is not.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from mm1_mlx.config import TilingConfig
from mm1_mlx.grids import Layout, fitted_size
from mm1_mlx.inputs import images
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tiling import layout_of, tiles, whole
from mm1_mlx.kernels.metal import chosen
from mm1_mlx.kernels.photo import (
    Axis,
    across_metal,
    axis,
    down_metal,
    fits,
    photo_metal,
)


class _Plan(NamedTuple):
    across: Axis
    down: Axis


def shot(image: Image.Image, settings: ImageSettings) -> mx.array | np.ndarray:
    """Normalised pixels of an RGB picture as one tile. (1, H, W, 3) float32."""
    if not _applies(image, settings.size, settings.resize_mode):
        return images.pixels(image, settings)[None]
    (made,) = _made(image, [_fitted(*image.size, settings)], settings)
    return made


def shots_of(
    image: Image.Image, settings: ImageSettings, config: TilingConfig | None
) -> tuple[mx.array | np.ndarray, Layout]:
    """Whole or in tiles, as config says. (n, H, W, 3) float32, and how they lie."""
    if config is None:
        return shot(image, settings), whole(*image.size)
    return tiled_shots(image, settings, config)


def tiled_shots(
    image: Image.Image, settings: ImageSettings, config: TilingConfig
) -> tuple[mx.array | np.ndarray, Layout]:
    """As tiling.tiles gives them. (n, H, W, 3) float32, and how they lie."""
    size = settings.size
    layout = layout_of(*image.size, size, config)
    if layout.tiles == 1:
        return shot(image, settings), layout
    rows, columns = layout.rows, layout.columns
    mode = settings.resize_mode if config.type != "anyres" else "squash"
    if not _applies(image, size * max(rows, columns), mode):
        return tiles(image, settings, config)
    if config.type == "anyres":
        return _anyres(image, settings, config, layout), layout
    if config.type == "crops":
        return _crops(image, settings, rows), layout
    return _apart(image, settings, config, layout), layout


def together(shots: Sequence[mx.array | np.ndarray]) -> mx.array | tuple:
    """All tiles of all pictures, on their way: they may be read in another thread.

    (N, H, W, 3), or where pictures differ in size a tuple of such, one for each.
    """
    found = [mx.array(each) for each in shots]
    if len({each.shape[1:] for each in found}) > 1:
        mx.async_eval(found)
        return tuple(found)
    joined = found[0] if len(found) == 1 else mx.concatenate(found)
    mx.async_eval(joined)
    return joined


def _applies(image: Image.Image, size: int, mode: str) -> bool:
    """Whether the kernel is wanted, and the picture not one for Pillow.

    Slivers are: some are refused (images.resize), others cropped in another way.
    """
    short, long = sorted(image.size)
    largest = max(long, size * long // short if mode == "crop" else size)
    small = fits(*image.size) and largest * max(long, size) <= images.MAX_STEP
    return image.mode == "RGB" and small and chosen("photo")


def _fitted(width: int, height: int, settings: ImageSettings) -> _Plan:
    """As images.fit."""
    size, mode = settings.size, settings.resize_mode
    if mode == "squash":
        return _Plan(axis(width, size), axis(height, size))
    if mode == "pad":
        side = max(width, height)
        return _Plan(*(_padded(each, side, size) for each in (width, height)))
    short = min(width, height)
    return _Plan(*(_cropped(each, short, size) for each in (width, height)))


def _padded(length: int, side: int, size: int) -> Axis:
    return axis(length, size, padded=side, left=(side - length) // 2)


def _cropped(length: int, short: int, size: int) -> Axis:
    out = size * length // short
    return axis(length, out, start=(out - size) // 2, count=size)


def _placed(width: int, height: int, across: int, down: int) -> _Plan:
    """The whole picture in the middle of a canvas, as tiling does."""
    new = fitted_size(width, height, across, down)
    return _Plan(
        axis(width, new[0], start=-((across - new[0]) // 2), count=across),
        axis(height, new[1], start=-((down - new[1]) // 2), count=down),
    )


def _anyres(
    image: Image.Image, settings: ImageSettings, config: TilingConfig, layout: Layout
) -> mx.array:
    """As tiling does: the overview, then the tiles."""
    (width, height), size = image.size, settings.size
    canvas = _placed(width, height, layout.columns * size, layout.rows * size)
    if config.overview == "fit":
        overview = _placed(width, height, size, size)
    else:
        overview = _Plan(axis(width, size), axis(height, size))
    colour = tuple(config.pad_color)
    return mx.concatenate(_made(image, [overview, canvas], settings, colour))


def _apart(
    image: Image.Image, settings: ImageSettings, config: TilingConfig, layout: Layout
) -> mx.array:
    """ "dynamic" and "sub_images" as tiling does: the tiles, then the whole picture."""
    (width, height), size = image.size, settings.size
    if config.type == "dynamic":
        canvas = _placed(width, height, layout.columns * size, layout.rows * size)
    else:
        large = replace(settings, size=size * layout.rows)
        canvas = _fitted(width, height, large)
    plans = [canvas, _fitted(width, height, settings)]
    read = {(x.across.start, x.across.stop, x.down.start, x.down.stop) for x in plans}
    if len(read) == 1:
        return mx.concatenate(_made(image, plans, settings))
    # Of a picture that is cropped, they read different parts.
    return mx.concatenate([_made(image, [plan], settings)[0] for plan in plans])


def _crops(image: Image.Image, settings: ImageSettings, rows: int) -> mx.array:
    """As tiling does: the overview is made from the large square."""
    size = settings.size
    side = size * rows
    large = ImageSettings(
        size=side, resize_mode=settings.resize_mode, pad_color=settings.pad_color
    )
    same = mx.repeat(mx.arange(256, dtype=mx.uint8), 3).reshape(256, 3)
    ((whole,),) = _made(image, [_fitted(*image.size, large)], large, levels=same)
    colour, levels = mx.array([0, 0, 0]), mx.array(images.levels(settings))
    keep, less = axis(side, side), axis(side, size)
    parts = down_metal(whole, keep, colour, levels, size)
    overview = photo_metal(whole, less, less, colour, levels, size)
    return mx.concatenate([parts, overview])


def _made(
    image: Image.Image,
    plans: Sequence[_Plan],
    settings: ImageSettings,
    colour: tuple[int, ...] | None = None,
    levels: mx.array | None = None,
) -> list[mx.array]:
    """The picture by each plan, in tiles of settings.size. (n, H, W, 3) each.

    Strip by strip: beside Pillow's, there is no copy of a large photo. Of a picture
    that is cropped, only what is seen is copied.
    """
    padding = mx.array(settings.pad_color if colour is None else colour)
    if levels is None:
        levels = mx.array(images.levels(settings))
    read = plans[0].across.start, plans[0].across.stop
    start, stop = plans[0].down.start, plans[0].down.stop
    assert all((p.across.start, p.across.stop) == read for p in plans)
    assert all((p.down.start, p.down.stop) == (start, stop) for p in plans)
    rows: list[list[mx.array]] = [[] for _ in plans]
    step = max(images.STRIP // (read[1] - read[0]), 1)
    for top in range(start, stop, step):
        box = (read[0], top, read[1], min(top + step, stop))
        part = image if box == (0, 0, *image.size) else image.crop(box)
        strip = mx.array(np.asarray(part))
        for plan, found in zip(plans, rows, strict=True):
            found.append(across_metal(strip, plan.across, padding))
        mx.async_eval(rows)  # then the strip is let go
    return [
        down_metal(_joined(found), plan.down, padding, levels, settings.size)
        for plan, found in zip(plans, rows, strict=True)
    ]


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
