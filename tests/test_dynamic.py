"""Pictures cut to suit their shape (MM1.5) or into four (MM1): grids, pixels, text."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from PIL import Image
from small import small_config

from helpers import assert_equal
from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.grids import Layout, all_grids, dynamic_grid
from mm1_mlx.inputs.images import ImageSettings, fit, resize
from mm1_mlx.inputs.tiling import expansion, layout_of, tiles

DYNAMIC = TilingConfig(type="dynamic", min_tiles=1, max_tiles=9)
SUB_IMAGES = TilingConfig(type="sub_images")
PLAIN = {"image_mean": (0.0,) * 3, "image_std": (1 / 255,) * 3}  # pixels stay bytes


def test_all_grids_in_order():
    assert all_grids(3, 6) == (
        (1, 3), (3, 1), (1, 4), (2, 2), (4, 1), (1, 5), (5, 1),
        (1, 6), (2, 3), (3, 2), (6, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "size, limits, grid",
    [
        # A square pads nothing on 1 x 1, 2 x 2, 3 x 3: fewest tiles that hold it.
        ((100, 100), (1, 9), (1, 1)),
        ((100, 100), (4, 9), (2, 2)),
        ((101, 101), (1, 9), (2, 2)),  # 1 x 1 would make it smaller
        ((200, 200), (4, 9), (2, 2)),
        ((201, 201), (4, 9), (3, 3)),
        ((1000, 1000), (4, 9), (3, 3)),  # none holds it: 3 x 3 keeps 300 x 300
        ((1000, 1000), (4, 8), (2, 2)),  # 2 x 2, 2 x 3, 2 x 4: 200 x 200 in each
        # Panoramas.
        ((400, 100), (4, 9), (1, 4)),
        ((100, 400), (4, 9), (4, 1)),
        ((800, 100), (1, 9), (1, 8)),
        ((1800, 200), (1, 9), (1, 9)),  # too large: 900 x 100 of it
        ((200, 1800), (1, 9), (9, 1)),
        ((300, 200), (1, 9), (2, 3)),
        ((200, 300), (1, 9), (3, 2)),
        # Tiny ones are made larger: by the shape alone.
        ((1, 1), (4, 9), (2, 2)),
        ((3, 1), (4, 9), (1, 4)),  # 300 of 400: 1 x 4 pads 10,000, 2 x 4 wastes more
        ((2, 1), (4, 9), (2, 4)),  # exact, 1 x 4 pads half
        ((2, 1), (1, 9), (1, 2)),
        ((50, 50), (2, 3), (1, 2)),  # both ways as bad: rows <= columns
        ((7, 7), (5, 5), (1, 5)),
    ],
    ids=str,
)
def test_grids_by_hand(size, limits, grid):
    assert dynamic_grid(*size, *limits, 100) == grid


def by_definition(width, height, least, most, tile):
    """Equation 1 over every pair of numbers, in fractions."""
    found = []
    for rows, columns in product(range(1, most + 1), repeat=2):
        if least <= rows * columns <= most:
            across, down = columns * tile, rows * tile
            scale = min(Fraction(across, width), Fraction(down, height))
            resized = width * scale, height * scale
            area = resized[0] * resized[1]
            loss = -area if scale < 1 else across * down - area
            found.append((scale < 1, loss, rows * columns, rows, columns))
    return min(found)[3:]


@pytest.mark.parametrize("limits", [(1, 9), (4, 9), (4, 16), (1, 1), (5, 7)], ids=str)
def test_grids_are_those_of_the_equation(limits):
    rng = np.random.default_rng(0)
    sizes = [*product((1, 99, 100, 101, 250, 700), repeat=2)]
    sizes += [tuple(pair) for pair in rng.integers(1, 1500, (60, 2)).tolist()]
    for size in sizes:
        assert dynamic_grid(*size, *limits, 100) == by_definition(*size, *limits, 100)


def picture(width: int, height: int) -> Image.Image:
    """No two pixels near each other are alike."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 7 % 256, y * 11 % 256, (x + y) * 5 % 256], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def as_bytes(tile: np.ndarray) -> np.ndarray:
    return np.rint(tile).astype(np.uint8)


def test_tiles_of_a_picture_that_needs_no_resize():
    """24 x 16 pixels, tiles of 8: two rows of three, each pixel where it was."""
    image, settings = picture(24, 16), ImageSettings(size=8, **PLAIN)
    found, layout = tiles(image, settings, DYNAMIC)
    values = np.asarray(image)
    assert layout == Layout(2, 3, 24, 16) and found.shape == (7, 8, 8, 3)
    for n, (i, j) in enumerate(product(range(2), range(3))):
        part = values[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        assert_equal(as_bytes(found[n]), part)
    assert_equal(as_bytes(found[6]), np.asarray(resize(image, 8, 8)))


def test_padding_is_on_both_sides_in_the_colour_of_whole_pictures():
    """30 x 8 on 1 x 4 tiles of 8: one column is left on either side."""
    settings = ImageSettings(size=8, pad_color=(9, 8, 7), **PLAIN)
    image = picture(30, 8)
    found, layout = tiles(image, settings, DYNAMIC)
    assert (layout.rows, layout.columns) == (1, 4)
    row = np.concatenate([as_bytes(tile) for tile in found[:4]], axis=1)
    assert_equal(row[:, 1:31], np.asarray(image))
    assert row[:, 0].tolist() == row[:, 31].tolist() == [[9, 8, 7]] * 8


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_the_overview_is_the_whole_picture_as_the_model_reads_it(mode):
    settings = ImageSettings(size=8, resize_mode=mode, **PLAIN)
    image = picture(40, 17)
    for config in (DYNAMIC, SUB_IMAGES):
        found, _ = tiles(image, settings, config)
        assert_equal(as_bytes(found[-1]), np.asarray(fit(image, settings)))


def test_a_picture_of_one_tile_is_read_whole():
    settings = ImageSettings(size=8, resize_mode="pad", **PLAIN)
    image = picture(5, 7)
    found, layout = tiles(image, settings, DYNAMIC)
    assert layout == Layout(0, 0, 5, 7) and layout.tiles == len(found) == 1
    assert_equal(as_bytes(found[0]), np.asarray(fit(image, settings)))


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_sub_images_are_quarters_of_a_square_twice_as_large(mode):
    settings = ImageSettings(size=8, resize_mode=mode, **PLAIN)
    image = picture(40, 17)
    found, layout = tiles(image, settings, SUB_IMAGES)
    large = ImageSettings(size=16, resize_mode=mode, **PLAIN)
    values = np.asarray(fit(image, large))
    assert layout == Layout(2, 2, 40, 17) and len(found) == 5
    top = np.concatenate([as_bytes(tile) for tile in found[:2]], axis=1)
    low = np.concatenate([as_bytes(tile) for tile in found[2:4]], axis=1)
    assert_equal(np.concatenate([top, low]), values)


def test_the_text_between_tiles():
    layout = Layout(2, 2, 9, 9)
    words = ["(3,1,1)", "(3,1,2)", "(3,2,1)", "(3,2,2)", "(3,0,0)"]
    assert expansion(layout, 3, DYNAMIC) == [x for w in words for x in (w, None)]
    seps = TilingConfig(type="dynamic", indicator="separators")
    expected = [None, ",", None, "<n>", None, ",", None, ":", None]
    assert expansion(layout, 3, seps) == expected
    column = [None, "<n>", None, ":", None]
    assert expansion(Layout(2, 1, 9, 9), 0, seps) == column
    none = TilingConfig(type="dynamic", indicator="none")
    assert expansion(layout, 0, none) == [None] * 5
    assert expansion(layout, 0, SUB_IMAGES) == [None] * 5
    assert expansion(Layout(0, 0, 9, 9), 1, DYNAMIC) == [None]
    joined = TilingConfig(type="anyres", grids=[[2, 2]])
    assert expansion(layout, 0, joined) == [None]


def test_layouts_without_pixels():
    assert layout_of(30, 20, 10, DYNAMIC) == Layout(2, 3, 30, 20)
    assert layout_of(10, 9, 10, DYNAMIC) == Layout(0, 0, 10, 9)
    assert layout_of(30, 20, 10, SUB_IMAGES) == Layout(2, 2, 30, 20)


def test_what_mm1_5_says_is_the_default():
    config = TilingConfig(type="dynamic")
    assert (config.least, config.most, config.max_images) == (4, 9, 2)
    assert (config.indicator, config.default) == ("index", "tiles")
    assert TilingConfig.from_dict(config.to_dict()) == config
    assert SUB_IMAGES.grids == [[2, 2]] and SUB_IMAGES.indicator == "none"


def test_an_older_config_reads_as_ever():
    config = TilingConfig.from_dict({"type": "anyres", "grids": [[1, 2]]})
    assert config.arranges and config.default == "tiles"
    assert config.pad_color == [0, 0, 0] and config.indicator == "none"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"min_tiles": 5, "max_tiles": 4}, r"min_tiles is 5, but must be at most max"),
        ({"min_tiles": 0}, r"min_tiles is 0"),
        ({"max_tiles": 257}, r"max_tiles is 257, but must be at most 256"),
        ({"grids": [[2, 2]]}, r"grids is \[\[2, 2\]\], but must be \[\] for 'dynamic'"),
        ({"indicator": "rows"}, r"indicator is 'rows'"),
        ({"default": "dynamic"}, r"default is 'dynamic'"),
        ({"max_images": 0}, r"max_images is 0"),
        ({"type": "sub_images", "max_tiles": 4}, r"max_tiles is 4, but must be null"),
        ({"type": "sub_images", "grids": [[2, 3]]}, r"as many rows as columns"),
        ({"type": "crops", "grids": [[2, 3]]}, r"as many rows as columns"),
        (
            {"type": "sub_images", "grids": [[2, 2], [3, 3]]},
            r"one \[rows, columns\] for 'sub_images'",
        ),
        (
            {"type": "crops", "grids": [[2, 2]], "default": "native"},
            r"default is 'native', but must be 'tiles' for 'crops'",
        ),
        (
            {"type": "crops", "grids": [[2, 2]], "indicator": "index"},
            r"indicator is 'index', but must be null for 'crops'",
        ),
    ],
)
def test_configs_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        TilingConfig(**({"type": "dynamic"} | values))


def test_tokens_of_tiles_are_those_of_as_many_pictures():
    config = small_config(tiling_config=DYNAMIC)
    assert config.image_tokens(Layout(2, 3, 30, 20)) == 7 * config.tokens_per_image
    assert config.image_tokens(Layout(0, 0, 5, 5)) == config.tokens_per_image
