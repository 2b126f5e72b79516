"""A photo to the encoder's pixels, by the arithmetic of Pillow's 8-bit bicubic filter.

That arithmetic is whole numbers: weights in units of 2^-22, and 8 bits between the
horizontal pass, which comes first, and the vertical one. So the kernel, the definition
and Pillow (its libImaging/Resample.c) give the same pixels, to the last bit.

Gain: 2 launches for 465, from 4032 x 3024 pixels to 378 x 378: as MLX operations, each
of the 75 places that the filter reads is a pass of its own. The photo is read once, and
9% of its bytes are written between the passes. Beside Pillow, it takes the resize and
the normalisation off the host: more than half of what a photo costs there.

Pixels stay (N, H, W, 3), the encoder's contract, so cutting them into patches is left
to it: one copy of 2 MB in some hundred launches. With `tile` the patch's side, a kernel
that a caller asks for patches gives these instead.
"""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mm1_mlx.kernels.metal import MetalKernel, chosen

# Above it the weights' rounding, half a unit each, might change a padding's colour:
# 255 * 16384 / 2 < 2^21, half a grey level.
MAX_SIDE = 16_384
_BITS = 22
_ONE = 1 << _BITS
_HALF = _ONE >> 1


@dataclass(frozen=True, eq=False)
class Axis:
    """What each place along one side of the result is made of.

    start, stop: of the picture's places, these are read; the rest need not be given.
    spans: (OUT, 3) int32: first place, counted from start, how many, and the weight of
    the padding. weights: (TAPS, OUT) int32. Weights are in units of 2^-22.
    """

    start: int
    stop: int
    spans: mx.array
    weights: mx.array

    @property
    def size(self) -> int:
        """Places of the result."""
        return self.spans.shape[0]


@lru_cache(maxsize=32)
def axis(
    size: int,
    out: int,
    *,
    padded: int | None = None,
    left: int = 0,
    start: int = 0,
    count: int | None = None,
) -> Axis:
    """The weights that resize `size` places to `out`, at most 1 MB.

    padded, left: the picture stands at `left` in a line of `padded` places, and it is
    the line that becomes `out`. start, count: only these of the `out` places; what is
    before and after them (start < 0) is padding.
    """
    places = np.arange(start, start + (out if count is None else count))
    beyond = (places < 0) | (places >= out)
    first, weights = _weights(size if padded is None else padded, out, places)
    low = np.clip(first, left, left + size)
    high = np.clip(first + weights.shape[1], left, left + size)
    high[beyond] = low[beyond]
    counts = high - low
    taps = np.arange(counts.max())
    at = np.clip((low - first)[:, None] + taps, 0, weights.shape[1] - 1)
    kept = np.take_along_axis(weights, at, axis=1)
    kept[taps >= counts[:, None]] = 0
    outside = np.where(beyond, _ONE, weights.sum(axis=1) - kept.sum(axis=1))
    begin = int(low[counts > 0].min())
    spans = np.stack([np.where(counts > 0, low - begin, 0), counts, outside], axis=1)
    return Axis(
        start=begin - left,
        stop=int(high[counts > 0].max()) - left,
        spans=mx.array(spans.astype(np.int32)),
        weights=mx.array(np.ascontiguousarray(kept.T.astype(np.int32))),
    )


def _weights(size: int, out: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First place read and whole-number weights (places, TAPS) of some of `out` places.

    As precompute_coeffs and normalize_coeffs_8bpc of Pillow, operation by operation.
    """
    scale = size / out
    stretch = max(scale, 1.0)
    centre = (places + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), size)
    taps = np.arange(max(int((last - first).max()), 1))
    at = taps + first[:, None]
    x = np.abs((at - centre[:, None] + 0.5) * (1 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    values = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    values[at >= last[:, None]] = 0
    total = np.zeros(len(places))
    for column in values.T:  # in this order: NumPy's own sums are pairwise
        total += column
    values /= np.where(total == 0, 1, total)[:, None]
    return first, (values * _ONE + np.copysign(0.5, values)).astype(np.int64)


def photo_reference(
    picture: mx.array,
    across: Axis,
    down: Axis,
    colour: mx.array,
    levels: mx.array,
    tile: int,
) -> mx.array:
    """A picture resized, padded, normalised and cut into square tiles.

    colour: of the padding. levels: what each 8-bit value of a channel becomes. tile:
    the side of a tile, which divides the result's; tiles are in reading order.

    Shapes:
        picture: (H, W, 3) uint8, the part that the axes read
        colour: (3,) int32; levels: (256, 3), any type
        returns: (tiles, tile, tile, 3), of the type of levels
    """
    _check(picture, across, down, tile)
    values = down_reference(across_reference(picture, across, colour), down, colour)
    pixels = levels[values, mx.arange(3)]
    rows, columns = down.size // tile, across.size // tile
    pixels = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    return pixels.reshape(rows * columns, tile, tile, 3)


def across_reference(picture: mx.array, across: Axis, colour: mx.array) -> mx.array:
    """The horizontal pass. (H, W, 3) -> (H, OUT, 3) uint8."""
    return down_reference(picture.swapaxes(0, 1), across, colour).swapaxes(0, 1)


def down_reference(picture: mx.array, down: Axis, colour: mx.array) -> mx.array:
    """The vertical pass. (H, W, 3) -> (OUT, W, 3) uint8."""
    first, _, outside = down.spans.T[..., None, None]
    total = _HALF + outside * colour  # (OUT, 1, 3)
    for tap, weights in enumerate(down.weights):
        row = mx.minimum(first[:, 0, 0] + tap, picture.shape[0] - 1)
        total = total + picture[row].astype(mx.int32) * weights[:, None, None]
    return mx.clip(total >> _BITS, 0, 255).astype(mx.uint8)


# A thread makes a pixel: its three channels share the weights. The threads of a row
# read neighbouring weights. (Nobody asks whether a thread is within the grid: it is.)
_ACROSS = MetalKernel(
    "mm1_photo_across",
    inputs=["picture", "spans", "weights", "colour"],
    outputs=["rows"],
    source="""
    uint x = thread_position_in_grid.x;
    uint y = thread_position_in_grid.y;
    uint width = uint(spans_shape[0]);
    int first = spans[3 * x];
    int count = spans[3 * x + 1];
    int outside = spans[3 * x + 2];
    int red = (1 << 21) + outside * colour[0];
    int green = (1 << 21) + outside * colour[1];
    int blue = (1 << 21) + outside * colour[2];
    auto pixel = picture + (size_t(y) * uint(picture_shape[1]) + uint(first)) * 3;
    for (int i = 0; i < count; ++i) {
        int weight = weights[uint(i) * width + x];
        red += int(pixel[3 * i]) * weight;
        green += int(pixel[3 * i + 1]) * weight;
        blue += int(pixel[3 * i + 2]) * weight;
    }
    size_t at = (size_t(y) * width + x) * 3;
    rows[at] = static_cast<uint8_t>(metal::clamp(red >> 22, 0, 255));
    rows[at + 1] = static_cast<uint8_t>(metal::clamp(green >> 22, 0, 255));
    rows[at + 2] = static_cast<uint8_t>(metal::clamp(blue >> 22, 0, 255));
""",
)

# A thread makes one channel of a pixel: so neighbours read neighbouring bytes.
_DOWN = MetalKernel(
    "mm1_photo_down",
    inputs=["rows", "spans", "weights", "colour", "levels"],
    outputs=["pixels"],
    source="""
    uint place = thread_position_in_grid.x;
    uint y = thread_position_in_grid.y;
    uint width = uint(rows_shape[1]);
    uint height = uint(spans_shape[0]);
    uint x = place / 3;
    uint channel = place % 3;
    int first = spans[3 * y];
    int count = spans[3 * y + 1];
    int total = (1 << 21) + spans[3 * y + 2] * colour[channel];
    auto value = rows + size_t(first) * width * 3 + place;
    for (int i = 0; i < count; ++i) {
        total += int(value[size_t(i) * width * 3]) * weights[uint(i) * height + y];
    }
    int level = metal::clamp(total >> 22, 0, 255);
    uint cut = (y / TILE) * (width / TILE) + x / TILE;
    size_t row = size_t(cut) * TILE + y % TILE;
    size_t at = (row * TILE + x % TILE) * 3 + channel;
    pixels[at] = static_cast<T>(levels[3 * level + int(channel)]);
""",
)


def photo_metal(
    picture: mx.array,
    across: Axis,
    down: Axis,
    colour: mx.array,
    levels: mx.array,
    tile: int,
) -> mx.array:
    """Same contract as photo_reference."""
    _check(picture, across, down, tile)
    rows = across_metal(picture, across, colour)
    return down_metal(rows, down, colour, levels, tile)


def across_metal(picture: mx.array, across: Axis, colour: mx.array) -> mx.array:
    """Same contract as across_reference; any number of rows, so in strips too."""
    height = picture.shape[0]
    return _ACROSS(
        [picture, across.spans, across.weights, colour],
        shapes=[(height, across.size, 3)],
        dtypes=[mx.uint8],
        grid=(across.size, height, 1),
        threadgroup=(32, 8, 1),
    )[0]


def down_metal(
    rows: mx.array, down: Axis, colour: mx.array, levels: mx.array, tile: int
) -> mx.array:
    """What is left to do with the rows of the horizontal pass.

    Shapes:
        rows: (H, W, 3) uint8
        returns: as photo_reference
    """
    width = rows.shape[1]
    return _DOWN(
        [rows, down.spans, down.weights, colour, levels],
        shapes=[(down.size * width // tile**2, tile, tile, 3)],
        dtypes=[levels.dtype],
        grid=(width * 3, down.size, 1),
        threadgroup=(64, 4, 1),
        template=[("T", levels.dtype), ("TILE", tile)],
    )[0]


def fits(width: int, height: int) -> bool:
    """Whether the kernel can make a picture of this size."""
    return max(width, height) <= MAX_SIDE


def photo(
    picture: mx.array,
    across: Axis,
    down: Axis,
    colour: mx.array,
    levels: mx.array,
    tile: int,
) -> mx.array:
    """As photo_reference, by the kernel where it applies."""
    height, width, _ = picture.shape
    by = photo_metal if chosen("photo") and fits(width, height) else photo_reference
    return by(picture, across, down, colour, levels, tile)


def _check(picture: mx.array, across: Axis, down: Axis, tile: int) -> None:
    read = (down.stop - down.start, across.stop - across.start, 3)
    assert picture.shape == read and picture.dtype == mx.uint8
    assert across.size % tile == 0 and down.size % tile == 0
