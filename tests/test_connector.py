"""Connectors: pools against torch, convolution, shapes, gradients."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import VISION, random_array

from helpers import assert_close, assert_equal, need
from mm1_mlx.config import ConnectorConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import vision
from mm1_mlx.models.connector import (
    GridPool,
    adaptive_bins,
    depthwise_conv3x3,
    make_connector,
    strided_bins,
    to_grid,
)

# --- Pools -----------------------------------------------------------------------

GRIDS = [(24, 12), (27, 12), (7, 7), (5, 2), (3, 5)]


@pytest.mark.parametrize("grid_in, grid_out", GRIDS)
def test_grid_pool_matches_torch(grid_in, grid_out):
    torch = need("torch")
    x = np.random.default_rng(0).standard_normal((2, grid_in, grid_in, 8), np.float32)
    found = GridPool(grid_out)(mx.array(x))
    pool = torch.nn.AdaptiveAvgPool2d(grid_out)
    expected = pool(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(found, expected, atol=1e-6)  # float32, means of a few values


def test_grid_pool_of_a_grid_that_is_not_square():
    torch = need("torch")
    x = np.random.default_rng(0).standard_normal((1, 9, 4, 3), np.float32)
    expected = torch.nn.AdaptiveAvgPool2d(3)(torch.tensor(x).permute(0, 3, 1, 2))
    assert_close(GridPool(3)(mx.array(x)), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_grid_pool_has_no_weights():
    pool = GridPool(12)
    pool(random_array(1, 27, 27, 2))
    assert pool.parameters() == {}


def test_windows_by_hand():
    assert adaptive_bins(5, 2) == [(0, 3), (2, 5)]
    assert adaptive_bins(27, 12)[:3] == [(0, 3), (2, 5), (4, 7)]
    # tamm: stride 27 // 12 = 2, width 27 - 11 * 2 = 5.
    assert strided_bins(27, 12)[:2] == [(0, 5), (2, 7)]
    assert strided_bins(27, 12)[-1] == (22, 27)
    assert strided_bins(24, 12) == adaptive_bins(24, 12)


@pytest.mark.parametrize("grid_in, grid_out", [(24, 12), (27, 12), (7, 7), (5, 2)])
def test_strided_pool_is_a_pool_with_stride(grid_in, grid_out):
    torch = need("torch")
    x = np.random.default_rng(0).standard_normal((1, grid_in, grid_in, 4), np.float32)
    stride = grid_in // grid_out
    width = grid_in - (grid_out - 1) * stride
    expected = torch.nn.functional.avg_pool2d(
        torch.tensor(x).permute(0, 3, 1, 2), width, stride
    )
    found = GridPool(grid_out, "strided")(mx.array(x))
    assert_close(found, expected.permute(0, 2, 3, 1), atol=1e-6)


def test_strided_windows_cannot_be_more_than_the_patches():
    with pytest.raises(ConfigError, match=r"cannot make 3 windows of 2 patches: use"):
        strided_bins(2, 3)
    with pytest.raises(ConfigError, match="cannot make 3 windows of 2 patches"):
        GridPool(3, "strided")(random_array(1, 2, 2, 4))


def test_patches_must_be_a_square():
    assert to_grid(random_array(2, 9, 4)).shape == (2, 3, 3, 4)
    with pytest.raises(ValueError, match="10 patches are not a square grid"):
        to_grid(random_array(2, 10, 4))


# --- Depthwise convolution -------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(6, 6), (3, 7), (1, 1)])
def test_depthwise_fast_path_equals_conv2d(rows, columns):
    x, weight = random_array(2, rows, columns, 5), random_array(5, 3, 3, 1, seed=1)
    expected = mx.conv2d(x, weight, padding=1, groups=5)
    assert_close(depthwise_conv3x3(x, weight), expected, atol=2e-6)


def test_depthwise_fast_path_has_conv2ds_gradient():
    x, weight = random_array(2, 4, 5, 3), random_array(3, 3, 3, 1, seed=1)
    towards = random_array(2, 4, 5, 3, seed=2)

    def ours(x, weight):
        return (depthwise_conv3x3(x, weight) * towards).sum()

    def reference(x, weight):
        return (mx.conv2d(x, weight, padding=1, groups=3) * towards).sum()

    found = mx.grad(ours, argnums=(0, 1))(x, weight)
    expected = mx.grad(reference, argnums=(0, 1))(x, weight)
    assert_close(found[0], expected[0], atol=5e-6)
    assert_close(found[1], expected[1], atol=5e-6)


# --- Whole connectors ------------------------------------------------------------

# 16 patches of width 16 (VISION) to tokens of width 24.
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "depth": 2}
CONFIGS = {
    "average_pool": ConnectorConfig(type="average_pool", num_query_tokens=4, **SMALL),
    "attention_pool": ConnectorConfig(
        type="attention_pool", num_query_tokens=5, **SMALL
    ),
    "c_abstractor": ConnectorConfig(type="c_abstractor", num_query_tokens=4, **SMALL),
    "tamm": ConnectorConfig(
        type="c_abstractor",
        variant="tamm",
        pooling="strided",
        hidden_act="relu",
        norm_bias=False,
        squeeze_bias=False,
        num_query_tokens=9,
        **SMALL,
    ),
    "mlp": ConnectorConfig(type="mlp", num_query_tokens=None, hidden_act="gelu"),
}
TOKENS = {
    "average_pool": 4,
    "attention_pool": 5,
    "c_abstractor": 4,
    "tamm": 9,
    "mlp": 16,
}


def connector(name: str, **settings):
    mx.random.seed(0)
    return make_connector(replace(CONFIGS[name], **settings), VISION, 24)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_one_picture_at_a_time(name):
    model = connector(name)
    x = random_array(3, 16, 16)
    found = model(x)
    assert found.shape == (3, TOKENS[name], 24)
    for i in range(3):
        assert_close(found[i : i + 1], model(x[i : i + 1]), atol=1e-5)


@pytest.mark.parametrize("name", ["average_pool", "attention_pool", "c_abstractor"])
def test_another_grid_gives_the_same_number_of_tokens(name):
    assert connector(name)(random_array(1, 36, 16)).shape == (1, TOKENS[name], 24)


PLACED = ["attention_pool", "c_abstractor"]


@pytest.mark.parametrize("name", PLACED)
def test_positions_of_another_grid_follow_the_table(name, monkeypatch):
    """Also when it is written in place; the matrices are made once, not per call."""
    made = []
    plain = vision.bicubic_matrix

    def counted(*sizes):
        made.append(sizes)
        return plain(*sizes)

    monkeypatch.setattr(vision, "bicubic_matrix", counted)
    vision._resampling.cache_clear()
    model, x = connector(name), random_array(1, 36, 16)
    before = model(x)
    model.position_embedding[:] = random_array(16, 16, seed=5)
    after = model(x)
    assert np.abs(np.array(after - before)).max() > 1e-3
    fresh = connector(name)
    fresh.update({"position_embedding": random_array(16, 16, seed=5)})
    assert_equal(fresh(x), after)
    assert made == [(4, 6)]


@pytest.mark.parametrize("name", PLACED)
def test_gradient_reaches_the_positions_of_another_grid(name):
    model, x = connector(name), random_array(2, 36, 16)
    model(x)  # what an earlier call kept must not cut the gradient
    model.train()
    towards = random_array(2, TOKENS[name], 24, seed=1)
    loss = nn.value_and_grad(model, lambda model: (model(x) * towards).sum())
    gradient = loss(model)[1]["position_embedding"]
    assert mx.abs(gradient).max().item() > 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_reaches_every_weight_and_the_encoder(name):
    model = connector(
        name,
        norm_input=True,
        norm_output=True,
        num_eos_tokens=2,
        hidden_act="silu",  # a ReLU of two units may be off for every picture
    )
    x, towards = random_array(2, 16, 16), random_array(2, TOKENS[name] + 2, 24, seed=1)

    def loss(weights, x):
        model.update(weights)
        return (model(x) * towards).sum()

    weights, to_x = mx.grad(loss, argnums=(0, 1))(model.trainable_parameters(), x)
    assert mx.abs(to_x).max().item() > 1e-5
    for path, gradient in tree_flatten(weights):
        assert mx.abs(gradient).max().item() > 0, path


def test_output_norm_gives_tokens_of_length_one_per_dimension():
    found = connector("c_abstractor", norm_output=True)(random_array(2, 16, 16))
    assert_close(mx.square(found).mean(axis=-1), np.ones((2, 4)), atol=1e-3)


def test_input_norm_makes_the_scale_of_the_encoder_irrelevant():
    model = connector("mlp", norm_input=True)
    x = random_array(1, 16, 16)
    assert_close(model(x), model(50 * x), atol=2e-4)


def test_eos_tokens_stand_behind_each_picture():
    model = connector("mlp", num_eos_tokens=2)
    found = model(random_array(3, 16, 16))
    assert found.shape == (3, 18, 24)
    for i in range(3):
        assert_equal(found[i, 16:], model.eos_tokens)


def test_average_pool_is_pool_then_linear():
    model = connector("average_pool")
    x = random_array(1, 16, 16)
    blocks = x.reshape(1, 2, 2, 2, 2, 16).mean(axis=(2, 4)).reshape(1, 4, 16)
    assert_close(model(x), model.proj(blocks), atol=1e-6)


def test_mlp_is_linear_act_linear():
    model = connector("mlp")
    first, second = model.linear
    x = random_array(1, 16, 16)
    assert_close(model(x), second(nn.gelu(first(x))), atol=1e-6)


def test_attention_pool_does_not_depend_on_the_order_of_patches():
    """Without positions, queries read a set."""
    model = connector("attention_pool", position_embedding=False)
    x = random_array(1, 16, 16)
    order = mx.array(np.random.default_rng(0).permutation(16))
    assert_close(model(x[:, order]), model(x), atol=1e-5)
    placed = connector("attention_pool")
    assert np.abs(np.array(placed(x[:, order]) - placed(x))).max() > 1e-3


def test_c_abstractor_keeps_left_and_right_apart():
    """Tokens are the pooled grid row by row: a change at the top left moves token 0
    most."""
    model = connector("c_abstractor", depth=1)
    x = np.array(random_array(1, 16, 16))
    changed = x.copy()
    changed[0, 0] += 3.0
    difference = np.abs(np.array(model(mx.array(changed)) - model(mx.array(x))))
    assert difference.max(-1)[0].argmax() == 0


def test_16_bit_connectors_stay_16_bit():
    for name in CONFIGS:
        model = connector(name, num_eos_tokens=1, norm_output=True)
        model.set_dtype(mx.bfloat16)
        assert model(random_array(1, 16, 16).astype(mx.bfloat16)).dtype == mx.bfloat16
