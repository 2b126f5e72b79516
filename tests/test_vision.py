"""The image encoder: patches, positions on any grid, switches, feature layer."""

import threading
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import VISION, random_array

from helpers import assert_close, assert_equal, need
from mm1_mlx.models import vision
from mm1_mlx.models.vision import (
    VisionEncoder,
    bicubic_matrix,
    patchify,
    resize_grid,
)


def encoder(seed: int = 0, **settings) -> VisionEncoder:
    mx.random.seed(seed)
    model = VisionEncoder(replace(VISION, **settings))
    model.eval()
    return model


# --- Patches ---------------------------------------------------------------------


def test_patchify_by_hand():
    pixels = mx.arange(16).reshape(1, 4, 4, 1)
    assert patchify(pixels, 2)[0].tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7]],
        [[8, 9, 12, 13], [10, 11, 14, 15]],
    ]


@pytest.mark.parametrize("height, width", [(8, 8), (12, 8), (11, 14)])
def test_patchify_and_matmul_equal_a_strided_convolution(height, width):
    """Pixels beyond the last whole patch are dropped by both."""
    pixels, weight = random_array(2, height, width, 3), random_array(5, 4, 4, 3, seed=1)
    found = patchify(pixels, 4) @ weight.reshape(5, -1).T
    expected = mx.conv2d(pixels, weight, stride=4)
    assert_close(found, expected, atol=2e-5)  # 48 products, added in another order


# --- Positions -------------------------------------------------------------------


@pytest.mark.parametrize(
    "size_in, size_out",
    [(24, 32), (24, 48), (27, 48), (16, 7), (7, 16), (5, 5), (4, 1)],
)
def test_bicubic_matrix_equals_torch(size_in, size_out):
    torch = need("torch")
    line = np.random.default_rng(0).standard_normal((1, 1, size_in, 1), np.float32)
    # Both axes are resampled alike, so a line copied into columns shows one of them.
    square = np.repeat(line, size_in, axis=3)
    expected = torch.nn.functional.interpolate(
        torch.tensor(square), size=(size_out, size_in), mode="bicubic", antialias=True
    )
    found = np.array(bicubic_matrix(size_in, size_out)) @ square[0, 0]
    assert_close(found, expected[0, 0], atol=1e-6)


def test_bicubic_weights_sum_to_one():
    assert_close(np.sum(bicubic_matrix(24, 40), axis=1), np.ones(40), atol=1e-12)


@pytest.mark.parametrize("rows, columns", [(8, 8), (3, 9), (10, 5), (6, 6)])
def test_position_grid_is_resampled_as_open_clip_does(rows, columns):
    torch = need("torch")
    table = random_array(36, 5)
    grid = torch.tensor(np.array(table)).reshape(1, 6, 6, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid,
        size=(rows, columns),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    expected = expected.permute(0, 2, 3, 1).reshape(rows * columns, 5)
    assert_close(resize_grid(table, rows, columns), expected, atol=2e-6)


def test_own_grid_is_not_touched():
    table = random_array(36, 5)
    assert resize_grid(table, 6, 6) is table


def test_16_bit_positions_are_resampled_in_float32():
    table = random_array(36, 5).astype(mx.bfloat16)
    found = resize_grid(table, 8, 8)
    assert found.dtype == mx.bfloat16
    exact = resize_grid(table.astype(mx.float32), 8, 8)
    assert_equal(found, exact.astype(mx.bfloat16))


def test_class_token_keeps_its_position_on_another_grid():
    model = encoder()
    grown = encoder()
    table = model.position_embedding
    assert table.shape == (17, 16)
    positions = model._positions(6, 5)
    assert positions.shape == (31, 16)
    assert_equal(positions[0], table[0])
    assert_equal(positions[1:], resize_grid(table[1:], 6, 5))
    assert grown(random_array(1, 24, 20, 3)).shape == (1, 30, 16)


def test_resized_positions_follow_every_change_of_the_table():
    """A result that was kept went stale when the table was written in place."""
    model = encoder()
    first = mx.array(model._positions(6, 6))
    model.position_embedding = model.position_embedding + 1
    assert_close(model._positions(6, 6), first + 1, atol=1e-5)
    model.update({"position_embedding": model.position_embedding + 1})
    assert_close(model._positions(6, 6), first + 2, atol=1e-5)
    model.position_embedding[:] = 5.0
    assert_close(model._positions(6, 6), mx.full((37, 16), 5.0), atol=1e-5)


def test_resampling_matrices_are_made_once(monkeypatch):
    made = []
    plain = vision.bicubic_matrix

    def counted(*sizes):
        made.append(sizes)
        return plain(*sizes)

    monkeypatch.setattr(vision, "bicubic_matrix", counted)
    vision._resampling.cache_clear()
    model = encoder()
    for _ in range(3):
        model(random_array(2, 24, 20, 3))
    assert sorted(made) == [(4, 5), (4, 6)]


def test_a_grid_resampled_in_one_thread_serves_another():
    """MLX cannot finish in one thread what another left lazy; matrices are kept."""
    vision._resampling.cache_clear()
    table = random_array(16, 3)
    found = []

    def work():
        found.append(np.array(resize_grid(table, 6, 6)))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    assert_equal(found[0], found[1])


def test_gradient_reaches_the_positions_of_another_grid():
    model = encoder()
    model.train()

    def loss(model):
        return mx.square(model(random_array(1, 24, 24, 3))).sum()

    gradient = nn.value_and_grad(model, loss)(model)[1]
    assert mx.abs(gradient["position_embedding"]).max().item() > 1e-4
    flat = dict(tree_flatten(gradient))
    used = {n for n in flat if not n.startswith("norm_out")}  # not applied here
    assert {n for n in used if mx.abs(flat[n]).max().item() > 0} >= used - {
        "layers.1.attn.qkv_proj.bias"
    }


# --- The whole encoder -----------------------------------------------------------

STYLES = {
    "clip": {},
    "siglip": {"class_token": False, "norm_in": None, "patch_bias": True},
    "aimv2": {
        "class_token": False,
        "norm_in": "embed",
        "norm_type": "rms_norm",
        "gated_mlp": True,
        "hidden_act": "silu",
        "patch_bias": True,
        "qkv_bias": False,
    },
    "tamm": {"norm_in": "patches", "norm_bias": False},
}


@pytest.mark.parametrize("style", STYLES)
def test_each_picture_is_read_by_itself(style):
    model = encoder(**STYLES[style])
    pixels = random_array(3, 16, 16, 3)
    together = model(pixels)
    assert together.shape == (3, 16, 16)
    for i in range(3):
        assert_close(together[i : i + 1], model(pixels[i : i + 1]), atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_patches_come_row_by_row(style):
    """Change one patch of the picture: its own feature changes most, and the embedding
    before any attention changes there only."""
    model = encoder(**STYLES[style])
    pixels = np.array(random_array(1, 16, 16, 3))
    changed = pixels.copy()
    changed[0, 8:12, 4:8] += 1.0  # row 2, column 1 of a 4 x 4 grid: patch 9
    difference = np.abs(
        np.array(model.embed(mx.array(changed))) - model.embed(mx.array(pixels))
    ).max(-1)[0]
    patches = difference[-16:]
    assert patches.argmax() == 9
    assert (np.delete(patches, 9) == 0).all()


def test_class_token_is_dropped():
    model = encoder()
    pixels = random_array(1, 16, 16, 3)
    assert model.embed(pixels).shape == (1, 17, 16)
    assert model(pixels).shape == (1, 16, 16)


def test_feature_layer_and_norm():
    pixels = random_array(1, 16, 16, 3)
    model = encoder(num_hidden_layers=3)

    def read(**settings):
        other = encoder(num_hidden_layers=3, **settings)
        return other(pixels)

    x = model.embed(pixels)
    states = [x]
    for layer in model.layers:
        states.append(layer(states[-1]))
    assert_close(read(), states[-1][:, 1:], atol=1e-6)
    assert_close(read(feature_layer=-2), states[-2][:, 1:], atol=1e-6)
    assert_close(read(feature_layer=-3), states[-3][:, 1:], atol=1e-6)
    normed = model.norm_out(states[-1])[:, 1:]
    assert_close(read(feature_norm=True), normed, atol=1e-6)
    normed = model.norm_out(states[-2])[:, 1:]
    assert_close(read(feature_layer=-2, feature_norm=True), normed, atol=1e-6)


def test_16_bit_encoder_gives_16_bit_features():
    model = encoder()
    model.set_dtype(mx.bfloat16)
    assert model(random_array(1, 16, 16, 3)).dtype == mx.bfloat16
