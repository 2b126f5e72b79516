"""The tokens of a picture that is read in tiles, as the decoder reads them."""

import math
from collections.abc import Sequence

import mlx.core as mx

from mm1_mlx.config import TilingConfig
from mm1_mlx.grids import Layout, without_padding


def tile_map(tiles: mx.array, rows: int, columns: int) -> mx.array:
    """The tokens of a grid of tiles as one map.

    Shapes:
        tiles: (rows * columns, S*S, D), row by row
        returns: (rows * S, columns * S, D)
    """
    _, tokens, D = tiles.shape
    S = math.isqrt(tokens)
    grid = tiles.reshape(rows, columns, S, S, D).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * S, columns * S, D)


def arrange(
    tokens: mx.array, layout: Layout, newline: mx.array, config: TilingConfig
) -> mx.array:
    """One picture's tokens: the overview's, then the map of its tiles row by row.

    (LLaVA-NeXT: llava/model/llava_arch.py, prepare_inputs_labels_for_multimodal.)

    Shapes:
        tokens: (tiles, Q, D), the overview first
        newline: (D,)
        returns: (T, D), T as MM1Config.image_tokens says
    """
    newline = newline.astype(tokens.dtype)
    if layout.tiles == 1:
        return mx.concatenate([tokens[0], newline[None]])
    grid = tile_map(tokens[1:], layout.rows, layout.columns)
    if config.unpad:
        rows, columns = without_padding(layout, math.isqrt(tokens.shape[1]))
        grid = grid[rows, columns]
        ends = mx.broadcast_to(newline, (grid.shape[0], 1, grid.shape[2]))
        grid = mx.concatenate([grid, ends], axis=1)
    return mx.concatenate([tokens[0], grid.reshape(-1, grid.shape[-1])])


def split_tiles(tokens: mx.array, layouts: Sequence[Layout]) -> list[mx.array]:
    """The tiles of each picture. (all tiles, ...) -> one (tiles, ...) per layout."""
    parts, start = [], 0
    for layout in layouts:
        parts.append(tokens[start : start + layout.tiles])
        start += layout.tiles
    return parts
