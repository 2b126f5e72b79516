"""The encoder alone: boxes on patches, the region contrast, AIM's reconstruction."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small import VISION, random_array

from helpers import assert_close
from mm1_mlx.inputs.images import fit
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.training.documents import Region
from mm1_mlx.training.encoder_stage import (
    Reconstruction,
    RegionContrast,
    box_weights,
    contrast_arrays,
)

WHOLE = (0.0, 0.0, 1.0, 1.0)


# --- boxes on patches ----------------------------------------------------------------


@pytest.mark.parametrize(
    "box, expected",
    [
        (WHOLE, [[0.25, 0.25], [0.25, 0.25]]),
        ((0.0, 0.0, 0.5, 1.0), [[0.5, 0], [0.5, 0]]),
        ((0.5, 0.5, 1.0, 1.0), [[0, 0], [0, 1]]),
        # Three quarters of the width: 2/3 of it left of the middle, 1/3 right.
        ((0.0, 0.0, 0.75, 0.5), [[2 / 3, 1 / 3], [0, 0]]),
    ],
)
def test_box_weights_on_a_square_picture(box, expected):
    weights = box_weights(box, 50, 50, grid=2)
    assert weights.shape == (4,) and weights.dtype == np.float32
    assert_close(weights.reshape(2, 2), np.array(expected), atol=1e-6)


def test_box_weights_follow_the_padding_to_a_square():
    # 200 x 100 lies in the middle two of four rows, 100 x 200 in the middle columns.
    wide = box_weights(WHOLE, 200, 100, grid=4).reshape(4, 4)
    rows = [[0.0] * 4, [0.125] * 4, [0.125] * 4, [0.0] * 4]
    assert_close(wide, np.array(rows), atol=1e-6)
    tall = box_weights(WHOLE, 100, 200, grid=4).reshape(4, 4)
    assert_close(tall, np.array(rows).T, atol=1e-6)
    corner = box_weights((0.5, 0.0, 1.0, 0.5), 200, 100, grid=4).reshape(4, 4)
    expected = np.zeros((4, 4))
    expected[1, 2:] = 0.5
    assert_close(corner, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(60, 60), (80, 40), (30, 64)])
@pytest.mark.parametrize("box", [(0.1, 0.2, 0.5, 0.9), (0.0, 0.5, 1.0, 1.0)])
def test_box_weights_are_where_the_pixels_go(size, box):
    """A white box on black, through the library's own padding, pooled to patches."""
    width, height = size
    picture = Image.new("RGB", size)
    corners = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    left, top, right, bottom = map(round, corners)
    picture.paste((255, 255, 255), (left, top, right, bottom))
    side = max(size)
    settings = ImageSettings(size=side, resize_mode="pad", pad_color=(0, 0, 0))
    square = np.array(fit(picture, settings), np.float64)[..., 0]
    grid, patch = 2, side // 2
    pooled = square.reshape(grid, patch, grid, patch).mean(axis=(1, 3)).reshape(-1)
    exact = (left / width, top / height, right / width, bottom / height)
    weights = box_weights(exact, width, height, grid)
    assert_close(weights, pooled / pooled.sum(), atol=1e-6)


# --- arrays of a batch ---------------------------------------------------------------


def letters(text: str) -> list[int]:
    return [ord(letter) - 96 for letter in text if letter != " "]


def test_contrast_arrays_by_hand():
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    pictures = [
        ((10, 10), [Region(left, "ab"), Region(right, "c")]),
        ((10, 10), [Region(WHOLE, "c"), Region(left, "de"), Region(right, "f")]),
        ((10, 10), []),
    ]
    boxes, label, tokens = contrast_arrays(
        pictures, letters, 2, per_picture=2, max_texts=4, text_length=3
    )
    assert label.tolist() == [[0, 1], [1, 2], [-1, -1]]  # the third region: no room
    assert tokens.tolist() == [[1, 2, -1], [3, -1, -1], [4, 5, -1], [-1] * 3]
    assert_close(boxes[0, 1].reshape(2, 2), np.array([[0, 0.5], [0, 0.5]]), atol=1e-6)
    assert boxes[2].tolist() == [[0.0] * 4] * 2


def test_texts_without_room_or_tokens_are_left_out():
    regions = [Region(WHOLE, text) for text in ("a", " ", "b", "a", "c")]
    boxes, label, tokens = contrast_arrays(
        [((4, 4), regions)], letters, 2, per_picture=5, max_texts=2, text_length=2
    )
    assert label.tolist() == [[0, -1, 1, 0, -1]]
    assert tokens.tolist() == [[1, -1], [2, -1]]
    assert not boxes[0, 1].any() and not boxes[0, 4].any()


def test_the_global_form_joins_the_texts_of_a_picture():
    regions = [Region((0, 0, 0.5, 1), "b"), Region((0.5, 0, 1, 1), "a")]
    known = {}

    def encode(text):
        return [known.setdefault(text, len(known) + 1)]

    boxes, label, tokens = contrast_arrays(
        [((4, 4), regions), ((4, 4), regions[::-1])], encode, 2, 3, 4, 5, whole=True
    )
    assert list(known) == ["a; b"]
    assert label.tolist() == [[0, -1, -1]] * 2
    assert boxes[0, 0].tolist() == [0.25] * 4
    assert tokens[:, 0].tolist() == [1, -1, -1, -1]


# --- the contrast --------------------------------------------------------------------


def contrast(seed: int = 0) -> RegionContrast:
    mx.random.seed(seed)
    return RegionContrast(VisionEncoder(VISION), vocab_size=20, dims=8)


def contrast_by_loops(scores, label, texts):
    """CLIP's symmetric loss, spelt out. scores (R, U); texts: which columns count."""

    def log_sum_exp(values):
        top = max(values)
        return top + np.log(sum(np.exp(v - top) for v in values))

    regions = [r for r, u in enumerate(label) if u >= 0]
    to_text = [
        log_sum_exp([scores[r, u] for u in texts]) - scores[r, label[r]]
        for r in regions
    ]
    to_region = []
    for u in sorted({label[r] for r in regions}):
        total = log_sum_exp([scores[r, u] for r in regions])
        own = [total - scores[r, u] for r in regions if label[r] == u]
        to_region.append(sum(own) / len(own))
    hits = [label[r] == max(texts, key=lambda u: (scores[r, u], -u)) for r in regions]
    loss = (np.mean(to_text) + np.mean(to_region)) / 2
    return loss, np.mean(hits)


def test_the_contrast_is_the_loss_by_loops():
    module = contrast()
    pixels = random_array(3, 16, 16, 3)
    boxes = np.random.default_rng(1).random((3, 4, 16)).astype(np.float32)
    boxes /= boxes.sum(-1, keepdims=True)
    label = np.array([[0, 1, 2, -1], [1, 1, -1, -1], [3, 0, 2, 2]], np.int32)
    tokens = np.full((6, 3), -1, np.int32)
    tokens[:4] = [[1, 2, -1], [3, -1, -1], [4, 5, 6], [7, 1, -1]]

    loss, accuracy = module(pixels, *map(mx.array, (boxes, label, tokens)))

    features = np.array(module.norm(module.vision(pixels)), np.float64)
    regions = np.einsum("nrp,npd->nrd", boxes, features)
    regions = regions @ np.array(module.image_proj.weight, np.float64).T
    regions = regions.reshape(-1, 8)
    embed = np.array(module.embed.weight, np.float64)
    up = np.array(module.text_mlp.up_proj.weight, np.float64)
    down = np.array(module.text_mlp.down_proj.weight, np.float64)
    texts = []
    for row in tokens[:4]:
        bag = np.mean([embed[i] for i in row if i >= 0], axis=0)
        texts.append(bag + down @ np.maximum(up @ bag, 0) ** 2)
    texts = np.array(texts)
    regions /= np.linalg.norm(regions, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    scores = np.exp(module.log_scale.item()) * regions @ texts.T
    expected, hits = contrast_by_loops(scores, label.reshape(-1), range(4))
    # float32 encoder against float64 loops; scores reach 13
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert accuracy.item() == pytest.approx(hits)


def test_the_contrast_has_finite_gradients_even_without_regions():
    module = contrast()
    module.train()
    pixels = random_array(2, 16, 16, 3)
    boxes = mx.full((2, 2, 16), 1 / 16)
    tokens = mx.array([[1, 2], [3, -1], [-1, -1]])
    for label in ([[0, 1], [1, -1]], [[-1, -1], [-1, -1]]):
        loss, gradients = mx.value_and_grad(
            lambda p, label=label: (
                module.update(p),
                module(pixels, boxes, mx.array(label), tokens)[0],
            )[1]
        )(module.trainable_parameters())
        assert mx.isfinite(loss).item()
        for name, gradient in tree_flatten(gradients):
            assert mx.isfinite(gradient).all().item(), name


# --- reconstruction ------------------------------------------------------------------


def reconstruction(class_token: bool) -> Reconstruction:
    mx.random.seed(0)
    config = replace(VISION, class_token=class_token, num_hidden_layers=3)
    return Reconstruction(VisionEncoder(config))


def with_new_patch(pixels: mx.array, patch: int) -> mx.array:
    """The picture with one of its 16 patches changed."""
    changed = np.array(pixels)
    row, column = divmod(patch, 4)
    changed[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return mx.array(changed)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("prefix", [1, 5, 9])
def test_a_guess_sees_the_prefix_and_what_came_before_and_no_more(class_token, prefix):
    module = reconstruction(class_token)
    pixels = random_array(1, 16, 16, 3)
    lengths = mx.array([prefix])
    before = module.guesses(pixels, lengths)
    assert before.shape == (1, 16, 48)
    for patch in range(16):
        after = module.guesses(with_new_patch(pixels, patch), lengths)
        moved = np.array(mx.abs(after - before).max(axis=-1))[0] > 1e-6
        first = 0 if patch < prefix else patch  # guess i is about patch i + 1
        assert moved.tolist() == [i >= first for i in range(16)], patch


def test_the_loss_is_that_of_the_patches_outside_the_prefix():
    module = reconstruction(class_token=False)
    pixels = random_array(2, 16, 16, 3)
    prefix = mx.array([3, 14])
    loss, _ = module(pixels, prefix)

    guesses = np.array(module.guesses(pixels, prefix), np.float64)
    errors = []
    for n, start in enumerate(prefix.tolist()):
        for patch in range(start, 16):
            row, column = divmod(patch, 4)
            image = np.array(pixels[n], np.float64)
            own = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
            target = (own - own.mean()) / np.sqrt(own.var() + 1e-4)
            errors.append(np.mean((guesses[n, patch - 1] - target) ** 2))
    assert len(errors) == 13 + 2
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_reconstruction_has_finite_gradients_everywhere():
    module = reconstruction(class_token=True)
    module.train()
    flat = mx.zeros((2, 16, 16, 3))  # no variance at all

    def loss(parameters, pixels):
        module.update(parameters)
        return module(pixels, mx.array([1, 15]))[0]

    start = module.trainable_parameters()
    for pixels in (random_array(2, 16, 16, 3), flat):
        value, gradients = mx.value_and_grad(loss)(start, pixels)
        assert mx.isfinite(value).item()
        for name, gradient in tree_flatten(gradients):
            assert mx.isfinite(gradient).all().item(), name
