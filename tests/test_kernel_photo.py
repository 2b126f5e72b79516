"""The photo kernel: by hand, against Pillow, on the host harness, in the processor.

Every comparison is exact: all versions calculate in the same whole numbers, and pixels
are looked up in the same table.
"""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small import CONNECTOR, DENSE, VISION

from helpers import FIXTURES, assert_equal
from metal_host import host_kernels, schedules, under_schedules
from metal_host.pytest_glue import needs_host
from mm1_mlx.config import MM1Config, TilingConfig
from mm1_mlx.errors import ImageError
from mm1_mlx.inputs import images, shots
from mm1_mlx.inputs.images import ImageSettings, fit, load_image, pixels, resize
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.shots import shot, tiled_shots
from mm1_mlx.inputs.tiling import tiles
from mm1_mlx.inputs.tokenizer import number_tokenizer
from mm1_mlx.kernels import photo
from mm1_mlx.kernels.metal import forced, watched
from mm1_mlx.kernels.photo import axis, photo_metal, photo_reference
from mm1_mlx.models.vision import patchify

COLOUR = mx.array([122, 116, 104])
SAME = mx.repeat(mx.arange(256, dtype=mx.uint8), 3).reshape(256, 3)
MODES = images.RESIZE_MODES

# Height and width, before and after: smaller, larger, both, one pixel, long, equal.
SIZES = [
    ((30, 40), (14, 14)),
    ((9, 7), (31, 29)),
    ((60, 5), (7, 28)),
    ((1, 1), (6, 4)),
    ((50, 1), (1, 50)),
    ((3, 200), (16, 16)),
    ((200, 3), (8, 24)),
    ((37, 53), (37, 53)),
    ((64, 64), (1, 1)),
]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Half of it black and white: the filter overshoots, so that clipping is seen."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.where(rng.random(values.shape) < 0.5, values // 128 * 255, values)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(height, width))


# --- the algorithm, apart from both Pillow and the library ---------------------------


def cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def one_pass(values: np.ndarray, out: int) -> np.ndarray:
    """Pillow's 8-bit bicubic filter down the first axis, one place after the other."""
    size = len(values)
    scale = size / out
    stretch = max(scale, 1.0)
    rows = []
    for i in range(out):
        centre = (i + 0.5) * scale
        start = max(int(centre - 2 * stretch + 0.5), 0)
        stop = min(int(centre + 2 * stretch + 0.5), size)
        weights = [
            cubic((j - centre + 0.5) * (1 / stretch)) for j in range(start, stop)
        ]
        total = 0.0
        for weight in weights:  # not sum(), which is exacter from Python 3.12 on
            total += weight
        whole = [
            int(w / total * 2**22 + math.copysign(0.5, w / total)) for w in weights
        ]
        parts = [w * values[start + j].astype(np.int64) for j, w in enumerate(whole)]
        rows.append(np.clip((2**21 + sum(parts)) >> 22, 0, 255))
    return np.stack(rows).astype(np.uint8)


def plain_resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Horizontal first."""
    return one_pass(one_pass(values.swapaxes(0, 1), width).swapaxes(0, 1), height)


@pytest.mark.parametrize("before, after", SIZES, ids=str)
def test_pillow_one_axis_at_a_time_is_the_algorithm(before, after):
    values = noise(*before)
    expected = plain_resize(values, *after)
    assert_equal(resize(Image.fromarray(values), *after[::-1]), expected)


@pytest.mark.parametrize("name", ["portrait", "landscape", "tiny"])
def test_the_algorithm_gives_the_stored_pixels(name):
    """Pillow 13 goes horizontally first where these shrink to 42 x 42."""
    folder = FIXTURES / "preprocessing"
    values = np.asarray(load_image(folder / f"{name}.png"))
    expected = np.load(folder / "expected.npz")[f"{name}/squash/42_uint8"]
    assert_equal(plain_resize(values, 42, 42), expected)
    found = resized(values, (42, 42))
    assert_equal(found, expected)


# --- the definition ------------------------------------------------------------------


def resized(values: np.ndarray, after: tuple[int, int], by=photo_reference) -> mx.array:
    """As 8-bit values; sides that no square divides are cut into pixels."""
    down, across = (axis(n, m) for n, m in zip(values.shape, after, strict=False))
    found = by(mx.array(values), across, down, COLOUR, SAME, math.gcd(*after))
    tile = math.gcd(*after)
    grid = found.reshape(after[0] // tile, after[1] // tile, tile, tile, 3)
    return grid.swapaxes(1, 2).reshape(*after, 3)


def test_halving_by_hand():
    """Both places weigh one half, and one half is rounded up."""
    half = axis(2, 1)
    assert half.spans.tolist() == [[0, 2, 0]]
    assert half.weights.tolist() == [[1 << 21], [1 << 21]]
    row = mx.array([[[10, 0, 255], [21, 1, 255]]], mx.uint8)
    found = photo_reference(row, half, axis(1, 1), COLOUR, SAME, 1)
    assert found.tolist() == [[[[16, 1, 255]]]]


def test_padding_by_hand():
    """One pixel in the middle of three; a window that begins one place before it."""
    middle = axis(1, 3, padded=3, left=1)
    window = axis(1, 1, start=-1, count=3)
    for made in (middle, window):
        assert made.weights.tolist() == [[0, 1 << 22, 0]]
        assert made.spans[:, 2].tolist() == [1 << 22, 0, 1 << 22]
    one = mx.array([[[9, 8, 7]]], mx.uint8)
    found = photo_reference(one, middle, window, COLOUR, SAME, 3)[0].tolist()
    pad = COLOUR.tolist()
    assert found == [[pad] * 3, [pad, [9, 8, 7], pad], [pad] * 3]


def test_tiles_and_levels_by_hand():
    values = mx.arange(8).reshape(2, 4, 1) * mx.array([1, 10, 30])
    levels = mx.arange(256).reshape(256, 1) * mx.array([1.0, -1.0, 0.5])
    across, down = axis(4, 4), axis(2, 2)
    found = photo_reference(
        values.astype(mx.uint8), across, down, COLOUR, levels, tile=2
    )
    assert found.dtype == mx.float32
    assert found[..., 0].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert found[1, 1, 1].tolist() == [7, -70, 105]


@pytest.mark.parametrize("before, after", SIZES, ids=str)
def test_the_definition_is_pillow(before, after):
    values = noise(*before)
    expected = resize(Image.fromarray(values), *after[::-1])
    assert_equal(resized(values, after), expected)


def test_the_definition_is_pillow_on_random_sizes(rng):
    for seed in range(60):
        height, width, *after = rng.integers(1, 60, 4).tolist()
        values = noise(height, width, seed)
        expected = resize(Image.fromarray(values), *after[::-1])
        what = f"{(height, width)} {after}"
        assert_equal(resized(values, tuple(after)), expected, what)


def test_tables_are_kept():
    assert axis(123, 45) is axis(123, 45)


def test_only_what_a_crop_sees_is_read():
    wide = axis(1000, 100, start=40, count=20)
    assert (wide.start, wide.stop) == (385, 615)  # 400..600 and the filter's reach


# --- the kernel ----------------------------------------------------------------------


TYPES = [mx.float32, mx.float16, mx.bfloat16, mx.uint8]


def table(dtype: mx.Dtype) -> mx.array:
    values = images.levels(ImageSettings(size=14))
    return SAME if dtype == mx.uint8 else mx.array(values).astype(dtype)


def cases() -> list[tuple]:
    """Arguments of photo, but for colour and levels. (Each tile is a compilation.)"""
    plain = [(noise(*b), axis(b[1], a[1]), axis(b[0], a[0]), 1) for b, a in SIZES]
    padded = axis(9, 16, padded=30, left=10), axis(30, 16)
    window = axis(30, 40, start=7, count=16), axis(9, 12, start=-2, count=16)
    read = slice(window[0].start, window[0].stop)
    return [*plain, (noise(30, 9), *padded, 8), (noise(9, 30)[:, read], *window, 8)]


@needs_host
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_kernel_is_the_definition(dtype):
    levels = table(dtype)
    every = cases() if dtype == mx.float32 else cases()[-2:]
    for values, across, down, tile in every:
        arguments: Any = (mx.array(values), across, down, COLOUR, levels, tile)
        expected = photo_reference(*arguments)
        with host_kernels():
            found = photo_metal(*arguments)
        assert found.dtype == expected.dtype == dtype
        assert_equal(found, expected, f"{values.shape} to {found.shape}")


@needs_host
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_kernel_in_any_order_of_threads(dtype):
    values, across, down, tile = cases()[-1]
    arguments: Any = (mx.array(values), across, down, COLOUR, table(dtype), tile)
    assert len(schedules(8)) == 8
    for found in under_schedules(lambda: photo_metal(*arguments), 8):
        assert_equal(found, photo_reference(*arguments))


@needs_host
def test_tiles_as_large_as_a_patch_are_patches():
    values = mx.array(noise(30, 40))
    both: Any = (values, axis(40, 16), axis(30, 16), COLOUR, table(mx.float32))
    with host_kernels():
        found = photo_metal(*both, tile=8)
    expected = patchify(photo_reference(*both, tile=16), 8)
    assert_equal(found.reshape(1, 2, 2, -1), expected)


# --- in place of the host's pixels ---------------------------------------------------


def by_kernel(function, *arguments: Any, declines: bool = False) -> Any:
    with host_kernels(), forced("photo"), watched() as names:
        found = function(*arguments)
        mx.eval(found if isinstance(found, mx.array) else found[0])
    assert bool(names) != declines
    return found


@needs_host
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (16, 16), (1, 9), (60, 5)])
def test_a_shot_is_the_hosts_pixels(mode, size):
    settings = ImageSettings(size=16, resize_mode=mode)
    image = picture(*size)
    found = by_kernel(shot, image, settings)
    assert isinstance(found, mx.array) and found.dtype == mx.float32
    assert_equal(found, pixels(image, settings)[None])


@needs_host
@pytest.mark.parametrize("mode", MODES)
def test_a_shot_in_strips(mode, monkeypatch):
    """No more than STRIP pixels are copied at once, whatever the picture's size."""
    given = []

    def spy(part: mx.array, *rest: Any) -> mx.array:
        given.append(part.shape)
        return photo.across_metal(part, *rest)

    settings = ImageSettings(size=16, resize_mode=mode)
    image = picture(70, 50)
    expected = pixels(image, settings)[None]
    monkeypatch.setattr(shots, "across_metal", spy)
    monkeypatch.setattr(images, "STRIP", 1000)
    assert_equal(by_kernel(shot, image, settings), expected)
    assert len(given) >= 3 and max(h * w for h, w, _ in given) <= 1000


GRIDS = [[1, 2], [2, 1], [2, 2], [1, 3]]
TILINGS = {
    "anyres": TilingConfig(type="anyres", grids=GRIDS),
    "fit": TilingConfig(
        type="anyres", grids=GRIDS, overview="fit", pad_color=[127, 1, 254]
    ),
    "crops": TilingConfig(type="crops", grids=[[2, 2]]),
    "dynamic": TilingConfig(type="dynamic", min_tiles=1, max_tiles=6),
    "sub_images": TilingConfig(type="sub_images"),
}


@needs_host
@pytest.mark.parametrize("kind", TILINGS)
@pytest.mark.parametrize("size", [(40, 30), (23, 90), (8, 8)], ids=str)
def test_tiled_shots_are_the_hosts_tiles(kind, size):
    image = picture(*size)
    for mode in ["squash"] if kind in ("anyres", "fit") else MODES:
        settings = ImageSettings(size=16, resize_mode=mode)
        expected, layout = tiles(image, settings, TILINGS[kind])
        found, same = by_kernel(tiled_shots, image, settings, TILINGS[kind])
        assert isinstance(found, mx.array) and same == layout
        assert_equal(found, expected)


@needs_host
def test_what_is_left_to_the_host():
    """Slivers, long sides, and grids of crops that are no square."""
    squash, crop = (ImageSettings(size=16, resize_mode=m) for m in ("squash", "crop"))
    left = [
        (Image.new("RGB", (photo.MAX_SIDE + 1, 1)), squash),
        (Image.new("RGB", (3, 16_000)), ImageSettings(size=200, resize_mode="crop")),
        (Image.new("L", (9, 9)), crop),
    ]
    for image, settings in left:
        found = by_kernel(
            lambda i, s: (mx.array(0), shot(i, s)), image, settings, declines=True
        )
        assert isinstance(found[1], np.ndarray)
        assert_equal(found[1], pixels(image, settings)[None])


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_that_is_too_long_is_refused_as_ever(mode):
    image = Image.new("RGB", (1, 300_000))
    with forced("photo"), pytest.raises(ImageError, match="too long on one side"):
        shot(image, ImageSettings(size=378, resize_mode=mode))


def test_without_the_kernel_nothing_changes():
    image, settings = picture(9, 9), ImageSettings(size=16)
    with forced():
        assert isinstance(shot(image, settings), np.ndarray)


@pytest.mark.metal
@pytest.mark.parametrize("mode", MODES)
def test_a_shot_on_an_apple_gpu(mode):
    image, settings = picture(1500, 900), ImageSettings(size=378, resize_mode=mode)
    with forced("photo"):
        found = shot(image, settings)
    assert isinstance(found, mx.array)
    assert_equal(found, pixels(image, settings)[None])


@needs_host
@pytest.mark.parametrize("tiling", [None, *TILINGS])
def test_the_processor_gives_the_same_pixels(tiling):
    config = MM1Config(
        vision_config=VISION,
        connector_config=CONNECTOR,
        text_config=DENSE,
        image_token_id=3,
        tiling_config=tiling and TILINGS[tiling],
    )
    processor = Processor(
        number_tokenizer(90, 1, 2, 0),
        ImageSettings(size=16, resize_mode="pad"),
        config,
        chat_template="plain",
    )
    pictures = [picture(40, 30), picture(9, 70)]

    def read() -> tuple:
        inputs = processor("7 8 <image> 9 <image>", pictures)
        assert inputs.pixel_values is not None
        return inputs.pixel_values, inputs.input_ids, inputs.layouts

    with forced():
        expected = read()
    found = by_kernel(read)
    assert found[0].dtype == mx.float32
    assert_equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert found[2] == expected[2]
    host = [processor.read_picture(each)[0] for each in pictures]  # for training
    assert_equal(np.concatenate(host), expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_photos_of_the_fixtures(mode):
    folder = FIXTURES / "preprocessing"
    expected = np.load(folder / "expected.npz")
    for name in ("portrait", "landscape", "tiny"):
        image = load_image(folder / f"{name}.png")
        settings = ImageSettings(size=42, resize_mode=mode)
        plan = shots._fitted(*image.size, settings)
        box = plan.across.start, plan.down.start, plan.across.stop, plan.down.stop
        part = mx.array(np.asarray(image.crop(box)))
        colour = mx.array(settings.pad_color)
        found = photo_reference(part, *plan, colour, SAME, 42)[0]
        assert_equal(found, expected[f"{name}/{mode}/42_uint8"])
        assert_equal(found, fit(image, settings))
