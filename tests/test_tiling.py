"""Large pictures in tiles: grids, pixels, tokens. Whole models: test_convert.py."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small import DENSE, VISION, random_array

from helpers import assert_close, assert_equal, need
from mm1_mlx.config import ConnectorConfig, MM1Config, TilingConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.grids import Layout, choose_grid, fitted_size, without_padding
from mm1_mlx.inputs.images import resize
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tiling import layout_of, tiles
from mm1_mlx.memory import count_parameters
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.tiles import arrange, tile_map

GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]  # LLaVA-NeXT's
PINPOINTS = [[336 * rows, 336 * columns] for rows, columns in GRIDS]
SIZES = [
    (336, 336), (672, 672), (1, 1), (3, 900), (900, 3), (640, 480), (480, 640),
    (1000, 333), (333, 1000), (671, 673), (2000, 1999), (50, 40), (336, 672),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grids_are_those_of_transformers(size):
    helper = need("transformers.image_processing_utils")
    width, height = size
    wanted = helper.select_best_resolution((height, width), PINPOINTS)
    rows, columns = choose_grid(width, height, GRIDS, 336)
    assert (rows * 336, columns * 336) == tuple(wanted)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((100, 100), (1, 2)),  # all keep every pixel: the least waste, and the first
        ((1000, 100), (1, 3)),
        ((100, 1000), (3, 1)),
        ((672, 336), (1, 2)),  # exactly one grid
    ],
)
def test_grids_by_hand(size, grid):
    assert choose_grid(*size, GRIDS, 336) == grid


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_without_padding_are_those_of_transformers(size):
    model = need("transformers.models.llava_next.modeling_llava_next")
    torch = need("torch")
    width, height = size
    rows, columns = choose_grid(width, height, GRIDS, 336)
    side = 24
    whole = torch.arange(rows * side * columns * side).reshape(1, rows * side, -1)
    wanted = model.unpad_image(whole, (height, width))[0].numpy()
    down, across = without_padding(Layout(rows, columns, width, height), side)
    assert_equal(whole[0].numpy()[down, across], wanted)


def many_sizes() -> list[tuple[int, int]]:
    """From 1 to 4000 pixels, short sides as often as long ones; some are exact ties."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(4000), (400, 2))).astype(int)
    ties = [(s, s) for s in (1, 168, 335, 336, 337, 672, 1008, 4000)]
    return [*map(tuple, sizes.tolist()), *ties, (336, 672), (672, 336), (1008, 336)]


NINE = [[r, c] for r in range(1, 10) for c in range(1, 10) if r * c <= 9]


@pytest.mark.parametrize("grids", [GRIDS, NINE], ids=["llava-next", "up to nine"])
@pytest.mark.parametrize("tile", [336, 384])
def test_many_shapes_are_cut_and_counted_as_by_transformers(grids, tile):
    """The grid, how many tiles, and how many tokens: HF's processor against ours."""
    helper = need("transformers.image_processing_utils")
    model = need("transformers.models.llava_next.modeling_llava_next")
    reader = need("transformers.models.llava_next.processing_llava_next")
    patch = tile // 24
    config = tiled(
        vision_config=replace(VISION, image_size=tile, patch_size=patch),
        tiling_config=TilingConfig(type="anyres", grids=grids),
    )
    pinpoints = [[tile * rows, tile * columns] for rows, columns in grids]
    unpadded = reader.LlavaNextProcessor._get_unpadded_features
    for width, height in many_sizes():
        layout = layout_of(width, height, tile, config.tiling_config)
        wanted = helper.select_best_resolution((height, width), pinpoints)
        assert (layout.rows * tile, layout.columns * tile) == tuple(wanted)
        count = model.image_size_to_num_patches((height, width), pinpoints, tile)
        assert layout.tiles == count
        side = 24, 24, layout.rows, layout.columns
        tokens = 24 * 24 + sum(unpadded(None, height, width, *side))
        assert config.image_tokens(layout) == tokens, (width, height)


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 7 + height).integers(
        0, 256, (height, width, 3)
    )
    return Image.fromarray(values.astype(np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """Nothing in it overshoots when it is resized."""
    y, x = np.mgrid[0:height, 0:width] / 40
    values = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y)], axis=-1)
    return Image.fromarray((128 + 80 * values).astype(np.uint8))


# Pillow 13 resizes tall pictures in the other order (see images.resize), which moves
# a value by up to two grey levels.
OTHER_ORDER = 2.1 / 255 / 0.26


@pytest.mark.parametrize("size", [(101, 135), (300, 80), (64, 64), (57, 200)], ids=str)
def test_pixels_are_those_of_transformers(size):
    module = need("transformers.models.llava_next.image_processing_pil_llava_next")
    tile = 56
    processor = module.LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[[tile * r, tile * c] for r, c in GRIDS],
    )
    image = smooth(*size)
    wanted = processor(image, return_tensors="np")["pixel_values"][0]
    config = TilingConfig(type="anyres", grids=GRIDS)
    found, layout = tiles(image, ImageSettings(size=tile), config)
    assert layout.tiles == len(wanted) == len(found)
    assert (layout.width, layout.height) == size
    atol = OTHER_ORDER if size[1] > 3 * size[0] else 3e-7  # float32 of the same bytes
    assert_close(found.transpose(0, 3, 1, 2), wanted, atol=atol)


def test_a_fitted_overview_and_colour():
    config = TilingConfig(
        type="anyres", grids=[[1, 2]], overview="fit", pad_color=[127, 127, 127]
    )
    settings = ImageSettings(size=8, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    white = Image.new("RGB", (16, 4), (255, 255, 255))
    found, layout = tiles(white, settings, config)
    assert (layout.rows, layout.columns, len(found)) == (1, 2, 3)
    overview = np.round((found[0, :, :, 0] + 1) * 127.5)
    assert overview[:3].tolist() == [[127.0] * 8] * 3  # 2 rows of picture in 8
    assert overview[3:5].tolist() == [[255.0] * 8] * 2
    left = np.round((found[1, :, :, 0] + 1) * 127.5)
    assert left[2:6].tolist() == [[255.0] * 8] * 4 and left[0, 0] == 127


PLAIN = {"image_mean": (0.0,) * 3, "image_std": (1 / 255,) * 3}  # pixels stay bytes


def test_crops_are_cut_from_one_square():
    """360VL: of 16 x 10 pixels that are padded to 16 x 16, each where it was."""
    config = TilingConfig(type="crops", grids=[[2, 2]])
    settings = ImageSettings(size=8, resize_mode="pad", pad_color=(1, 2, 3), **PLAIN)
    image = picture(16, 10)
    found, layout = tiles(image, settings, config)
    assert found.shape == (5, 8, 8, 3)
    assert (layout.rows, layout.columns) == (2, 2)
    square = np.full((16, 16, 3), (1, 2, 3), np.uint8)
    square[3:13] = np.asarray(image)
    cut = [square[:8, :8], square[:8, 8:], square[8:, :8], square[8:, 8:]]
    overview = resize(Image.fromarray(square), 8, 8)
    assert_equal(np.rint(found).astype(np.uint8), np.stack([*cut, overview]))


@pytest.mark.parametrize("size", [(30, 20), (5, 40), (64, 64)], ids=str)
def test_crops_of_other_sizes(size):
    """As 360VL's own code: pad, resize to the large square, cut; the overview from the
    large square."""
    config = TilingConfig(type="crops", grids=[[2, 2]])
    settings = ImageSettings(size=8, resize_mode="pad", pad_color=(1, 2, 3), **PLAIN)
    image = picture(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (1, 2, 3))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    large = resize(square, 16, 16)
    boxes = [(x, y, x + 8, y + 8) for y in (0, 8) for x in (0, 8)]
    wanted = [*(large.crop(box) for box in boxes), resize(large, 8, 8)]
    found, _ = tiles(image, settings, config)
    assert_equal(np.rint(found).astype(np.uint8), np.stack(wanted))


def test_fitted_sizes():
    assert fitted_size(100, 50, 80, 80) == (80, 40)
    assert fitted_size(50, 100, 80, 80) == (40, 80)
    assert fitted_size(3, 1000, 56, 56) == (1, 56)
    assert fitted_size(7, 3, 100, 100) == (100, 43)  # rounded up


def test_the_order_of_tokens_by_hand():
    """Two tiles of 2 x 2 tokens beside each other, then the ends of rows."""
    overview, left, right = ([[10 * t + k] for k in range(4)] for t in range(3))
    tokens = mx.array([overview, left, right], mx.float32)
    layout = Layout(1, 2, 200, 100)
    config = TilingConfig(type="anyres", grids=[[1, 2]])
    found = arrange(tokens, layout, mx.array([-1.0]), config)[:, 0].tolist()
    assert found == [0, 1, 2, 3, 10, 11, 20, 21, -1, 12, 13, 22, 23, -1]
    bare = TilingConfig(type="anyres", grids=[[1, 2]], unpad=False)
    found = arrange(tokens, layout, mx.array([-1.0]), bare)[:, 0].tolist()
    assert found == [0, 1, 2, 3, 10, 11, 20, 21, 12, 13, 22, 23]
    one = arrange(tokens[:1], Layout(0, 0, 5, 5), mx.array([-1.0]), config)
    assert one[:, 0].tolist() == [0, 1, 2, 3, -1]


def test_a_map_of_tiles():
    tokens = random_array(6, 4, 3)
    grid = tile_map(tokens, 2, 3)
    assert grid.shape == (4, 6, 3)
    assert mx.array_equal(grid[2:, 4:].reshape(4, 3), tokens[5])


def tiled(**changes) -> MM1Config:
    values = {
        "vision_config": VISION,
        "connector_config": ConnectorConfig(type="mlp", num_query_tokens=None),
        "text_config": DENSE,
        "image_token_id": 3,
        "tiling_config": TilingConfig(type="anyres", grids=GRIDS),
    }
    return MM1Config(**(values | changes))


@pytest.mark.parametrize("size", [(40, 30), (16, 16), (10, 90), (200, 100)], ids=str)
@pytest.mark.parametrize("unpad", [True, False])
def test_as_many_tokens_as_the_processor_counts(size, unpad):
    tiling = TilingConfig(type="anyres", grids=GRIDS, unpad=unpad)
    model = MM1(tiled(tiling_config=tiling))
    pixels, layout = tiles(picture(*size), ImageSettings(size=16), tiling)
    found = model.encode_images(mx.array(pixels), [layout])
    assert found.shape == (1, model.config.image_tokens(layout), DENSE.hidden_size)


def test_pictures_together_are_each_alone():
    model = MM1(tiled())
    config = model.config.tiling_config
    made = [
        tiles(picture(*s), ImageSettings(size=16), config) for s in [(40, 30), (9, 70)]
    ]
    together = model.encode_images(
        mx.array(np.concatenate([pixels for pixels, _ in made])),
        [layout for _, layout in made],
    )
    alone = [model.encode_images(mx.array(p), [layout])[0] for p, layout in made]
    assert_close(together[0], mx.concatenate(alone), atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"type": "mosaic"}, r"type is 'mosaic', but must be one of 'anyres', 'crops'"),
        ({"grids": []}, r"grids is \[\], but must be a list of \[rows, columns\]"),
        ({"grids": [[1, 0]]}, r"must be a list of \[rows, columns\]"),
        ({"grids": [[1, 2, 3]]}, r"must be a list of \[rows, columns\]"),
        ({"grids": ["1x2"]}, r"must be a list of \[rows, columns\]"),
        ({"type": "crops"}, r"one \[rows, columns\] for 'crops'"),
        ({"pad_color": [1, 2]}, r"three whole numbers from 0 to 255"),
        ({"overview": "crop"}, r"overview is 'crop'"),
    ],
)
def test_configs_that_make_no_sense(change, message):
    with pytest.raises(ConfigError, match=message):
        TilingConfig(**({"type": "anyres", "grids": GRIDS} | change))


@pytest.mark.parametrize("kind", ["anyres", "crops", "dynamic"])
def test_the_parameters_of_models_of_tiles_are_counted(kind):
    """LLaVA-NeXT's mark and 360VL's second connector belong to the connector."""
    grids = {"anyres": GRIDS, "crops": [[2, 2]], "dynamic": []}[kind]
    config = tiled(tiling_config=TilingConfig(type=kind, grids=grids))
    flat = tree_flatten(MM1(config).parameters())
    parts = count_parameters(config)
    assert parts.all.total == sum(array.size for _, array in flat)
    named = ("connector.", "tile_connector.", "image_newline")
    own = sum(array.size for name, array in flat if name.startswith(named))
    assert parts.connector.total == own
