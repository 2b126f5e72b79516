"""How a picture is cut into tiles, and how many tokens they become: arithmetic only.

Sources: LLaVA-NeXT (haotian-liu/LLaVA: llava/mm_utils.py, llava_arch.py; transformers:
models/llava_next), HyperCLOVAX-SEED-Vision (the same with a C-Abstractor per tile),
360VL (four crops and an overview), and MM1.5 (arXiv 2409.20566, section 3.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil


@dataclass(frozen=True)
class Layout:
    """The tiles of one picture: a grid of them, and one overview of the whole.

    rows, columns: of the grid; 0 and 0 where the picture is not cut, and is one tile.
    width, height: of the picture in pixels.
    """

    rows: int
    columns: int
    width: int
    height: int

    @property
    def tiles(self) -> int:
        """How many, with the overview."""
        return self.rows * self.columns + 1


def choose_grid(
    width: int, height: int, grids: Sequence[Sequence[int]], tile: int
) -> tuple[int, int]:
    """The grid (rows, columns) that keeps most of a picture's pixels.

    Among equals the one that wastes least, then the first. tile: the side in pixels.
    """
    best, most, least = (1, 1), -1, 0
    for rows, columns in grids:
        across, down = columns * tile, rows * tile
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (rows, columns), kept, wasted
    return best


@lru_cache(maxsize=64)
def all_grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Every (rows, columns) of `least` to `most` tiles: fewest first, then low ones."""
    grids = [
        (rows, tiles // rows)
        for tiles in range(least, most + 1)
        for rows in range(1, tiles + 1)
        if tiles % rows == 0
    ]
    return tuple(grids)


def dynamic_grid(
    width: int, height: int, least: int, most: int, tile: int
) -> tuple[int, int]:
    """The grid (rows, columns) that MM1.5 cuts a picture by (its equation 1).

    On the canvas of a grid the picture is as large as its shape allows. Of the grids
    that hold it without making it smaller, the one with the least padding; if none
    does, the one that keeps most pixels. Ties, which MM1.5 leaves open: fewest tiles,
    then rows <= columns. Exact: a tie is one, whatever the sizes.

    least, most: tiles. tile: the side in pixels.
    """

    def rank(grid: tuple[int, int]) -> tuple[bool, int]:
        rows, columns = grid
        across, down = columns * tile, rows * tile
        narrow = across * height <= down * width  # the width decides
        holds = across >= width if narrow else down >= height
        # Areas times width * height are whole numbers: of the picture, of the canvas.
        covered = (across * height if narrow else down * width) ** 2
        return (
            not holds,
            across * down * width * height - covered if holds else -covered,
        )

    return min(all_grids(least, most), key=rank)  # the first of equals


def fitted_size(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """The picture's size on a canvas of across x down pixels, its shape kept."""
    if across / width < down / height:
        return across, min(ceil(height * (across / width)), down)
    return min(ceil(width * (down / height)), across), down


def without_padding(layout: Layout, side: int) -> tuple[slice, slice]:
    """Rows and columns of the map of all tiles' tokens that hold the picture.

    side: tokens per side of one tile.
    """
    down, across = layout.rows * side, layout.columns * side
    if layout.width / layout.height > across / down:
        kept = int(round(layout.height * (across / layout.width), 7))
        pad = (down - kept) // 2
        return slice(pad, down - pad), slice(0, across)
    kept = int(round(layout.width * (down / layout.height), 7))
    pad = (across - kept) // 2
    return slice(0, down), slice(pad, across - pad)


def map_size(layout: Layout, side: int, unpad: bool) -> tuple[int, int]:
    """Rows and columns of the map that is kept of all tiles' tokens."""
    if not unpad:
        return layout.rows * side, layout.columns * side
    rows, columns = without_padding(layout, side)
    return rows.stop - rows.start, columns.stop - columns.start
