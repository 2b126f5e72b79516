"""Mixture of experts: routing, the two ways to run experts, capacity, losses."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import SPARSE, random_array, small_decoder

from helpers import assert_close, assert_equal
from mm1_mlx.models import moe as moe_module
from mm1_mlx.models.moe import MoE
from mm1_mlx.models.router import Router, top_k
from mm1_mlx.models.router_losses import (
    expert_capacity,
    expert_load,
    limit_capacity,
    load_balance_loss,
    router_z_loss,
)

# --- Top-k -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_go_to_the_lower_index(k):
    logits = mx.array(
        [[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-1.0, -5.0, -1.0, -0.5]]
    )
    expected = [[1, 2, 3], [0, 1, 2], [3, 0, 2]]
    assert top_k(logits, k).tolist() == [row[:k] for row in expected]


def test_signs_zeros_and_infinities_are_in_order():
    logits = mx.array([[-0.0, 0.0, -mx.inf, mx.inf, -1e-30, 1e-30, -1e30, 1e30]])
    assert top_k(logits, 8).tolist() == [[3, 7, 5, 0, 1, 4, 6, 2]]


def test_top_k_equals_a_stable_sort():
    values = np.random.default_rng(0).integers(-3, 4, (500, 16)).astype(np.float32)
    expected = np.argsort(-values, axis=-1, kind="stable")[:, :5]
    assert_equal(top_k(mx.array(values), 5), expected)


# --- Router ----------------------------------------------------------------------


def test_router_weights_by_hand():
    moe = SPARSE.moe_config
    router = Router(2, moe)
    router.weight = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    x = mx.array([[1.0, 2.0]])  # logits 1, 2, 3, -1
    weights, experts, logits = router(x)
    assert logits.tolist() == [[1, 2, 3, -1]]
    assert experts.tolist() == [[2, 1]]
    e = np.exp([3.0, 2.0])
    assert_close(weights, [e / e.sum()], atol=1e-6)

    plain = Router(2, replace(moe, norm_topk_prob=False))
    plain.weight = router.weight
    weights, _, _ = plain(x)
    assert_close(weights, [e / np.exp([1.0, 2.0, 3.0, -1.0]).sum()], atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_router_computes_in_float32(dtype):
    """16-bit logits tie far more often, and then route elsewhere."""
    router = Router(64, SPARSE.moe_config)
    router.weight = router.weight.astype(dtype)
    x = random_array(50, 64).astype(dtype)
    weights, experts, logits = router(x)
    assert weights.dtype == logits.dtype == mx.float32
    exact = (
        np.array(x.astype(mx.float32), np.float64)
        @ np.array(router.weight.astype(mx.float32), np.float64).T
    )
    assert_close(logits, exact, atol=1e-5)
    assert_equal(experts, np.argsort(-exact, kind="stable")[:, :2])


def test_a_kept_float32_weight_is_that_of_the_weight_there_is():
    """One in its place is noticed; what is written into it, when eval is called."""
    router = Router(64, SPARSE.moe_config)
    router.weight = router.weight.astype(mx.bfloat16)
    router.eval()
    kept = router._weight()
    assert router._weight() is kept
    assert_equal(kept, router.weight.astype(mx.float32))
    router.weight[1] = 3.0
    router.eval()
    assert_equal(router._weight(), router.weight.astype(mx.float32))
    assert router._weight()[1, 5].item() == 3.0
    router.weight = router.weight * 2
    assert router._weight()[1, 5].item() == 6.0


def test_a_packed_routers_scales_are_noticed_alone():
    """A model's set_dtype casts them, and leaves the packed numbers."""
    router = Router(64, SPARSE.moe_config)
    router.quantize({"group_size": 32, "bits": 8, "mode": "affine"})
    router.eval()
    kept = np.array(router._weight())
    router.set_dtype(mx.bfloat16)
    assert_equal(router._weight(), router._whole())
    assert (kept != np.array(router._weight())).any()


# --- Experts ---------------------------------------------------------------------


def make_moe(seed: int = 0, **settings) -> MoE:
    names = ("num_local_experts", "num_experts_per_tok", "capacity_factor")
    names += ("shared_expert_intermediate_size", "norm_topk_prob")
    moe = {name: settings.pop(name) for name in names if name in settings}
    mx.random.seed(seed)
    config = replace(SPARSE, moe_config=replace(SPARSE.moe_config, **moe), **settings)
    layer = MoE(config)
    layer.eval()
    return layer


def by_loop(layer: MoE, x: mx.array) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    weights, experts, _ = layer.router(x)
    weights, experts = np.array(weights, np.float64), np.array(experts)
    e = layer.experts
    up = np.array(e.gate_up_proj if e._gated else e.up_proj, np.float64)
    down = np.array(e.down_proj, np.float64)
    tokens = np.array(x, np.float64)
    out = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        for weight, i in zip(weights[t], experts[t], strict=True):
            hidden = up[i] @ token
            if e._gated:
                gate, hidden = np.split(hidden, 2)
                hidden = gate / (1 + np.exp(-gate)) * hidden
            else:
                hidden = hidden / (1 + np.exp(-hidden))
            out[t] += weight * (down[i] @ hidden)
    return out


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("experts, k", [(4, 2), (8, 2), (3, 1), (16, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_routed_and_dense_equal_a_loop(gated, experts, k, tokens):
    layer = make_moe(num_local_experts=experts, num_experts_per_tok=k, gated_mlp=gated)
    x = random_array(tokens, 32)
    expected = by_loop(layer, x)
    chosen = layer.router(x)[:2]
    assert_close(layer.experts.routed(x, *chosen), expected, atol=2e-6)
    assert_close(layer.experts.dense(x, *chosen), expected, atol=2e-6)
    assert_close(layer(x), expected, atol=2e-6)
    assert_close(layer(x[None]), expected[None], atol=2e-6)


def test_sorting_the_rows_changes_nothing(monkeypatch):
    """Rows are sorted by expert from ROWS_PER_EXPERT_TO_SORT rows per expert on."""
    layer = make_moe()
    x = random_array(50, 32)
    chosen = layer.router(x)[:2]
    seen = []
    gather_mm = mx.gather_mm

    def watched(*args, **settings):
        seen.append(settings["sorted_indices"])
        return gather_mm(*args, **settings)

    monkeypatch.setattr(mx, "gather_mm", watched)
    as_is = layer.experts.routed(x, *chosen)
    monkeypatch.setattr(moe_module, "ROWS_PER_EXPERT_TO_SORT", 10**9)
    unsorted = layer.experts.routed(x, *chosen)
    assert seen == [True, True, False, False]
    assert_close(as_is, unsorted, atol=1e-6)


@pytest.mark.parametrize("tokens, is_sorted", [(7, False), (8, True)])
def test_sorting_starts_at_four_rows_per_expert(monkeypatch, tokens, is_sorted):
    seen = []
    gather_mm = mx.gather_mm

    def watched(*args, **settings):
        seen.append(settings["sorted_indices"])
        return gather_mm(*args, **settings)

    monkeypatch.setattr(mx, "gather_mm", watched)
    layer = make_moe()  # 4 experts, 2 a token: 8 tokens are 4 rows per expert
    x = random_array(tokens, 32)
    layer.experts.routed(x, *layer.router(x)[:2])
    assert seen == [is_sorted] * 2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_16_bit_experts_are_cast_where_the_back_end_needs_it(dtype, tokens):
    """MLX's CPU gather_mm is float32 only; refusing would make such models unusable."""
    layer = make_moe()
    layer.set_dtype(dtype)
    x = random_array(tokens, 32).astype(dtype)
    found = layer(x)
    assert found.dtype == dtype
    exact = make_moe()
    exact.update(layer.parameters())
    exact.set_dtype(mx.float32)
    expected = exact(x.astype(mx.float32))
    # One rounding of the result, and of the routing weights' products.
    assert_close(found, expected, atol=2e-3 if dtype == mx.float16 else 2e-2)


def test_shared_expert_is_added_behind_its_gate():
    layer = make_moe(shared_expert_intermediate_size=20)
    x = random_array(6, 32)
    gate = mx.sigmoid(x @ layer.shared_expert_gate.weight.T)
    expected = by_loop(layer, x) + np.array(gate * layer.shared_expert(x))
    assert_close(layer(x), expected, atol=2e-6)


def test_router_outputs_are_given_to_who_asks():
    layer = make_moe()
    x = random_array(2, 5, 32)
    outputs: list = []
    layer(x, outputs)
    (logits, experts) = outputs[0]
    assert logits.shape == (10, 4)
    assert_equal(experts, top_k(logits, 2))


# --- Capacity --------------------------------------------------------------------


def capacity_by_loop(weights, experts, E, factor):
    """axlearn's rule, written out: all first choices in token order, then the second
    ones; an expert that is full gives nothing; nothing is scaled up again."""
    T, K = experts.shape
    capacity = max(1, int(T * factor / E))
    while capacity > 1 and capacity % 4:
        capacity += 1
    used = [0] * E
    out = np.zeros_like(weights)
    for k in range(K):
        for t in range(T):
            e = experts[t, k]
            if used[e] < capacity:
                out[t, k] = weights[t, k]
            used[e] += 1
    return out


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("E, K", [(4, 2), (8, 2), (3, 3)])
def test_capacity_equals_axlearns_rule(factor, E, K):
    rng = np.random.default_rng(E)
    # Uneven on purpose: the first experts are popular.
    scores = rng.standard_normal((30, E)) - np.arange(E) * 0.7
    experts = np.argsort(-scores, axis=-1)[:, :K].astype(np.uint32)
    weights = rng.random((30, K)).astype(np.float32)
    found = limit_capacity(mx.array(weights), mx.array(experts), E, factor)
    assert_equal(found, capacity_by_loop(weights, experts, E, factor))


def test_capacity_by_hand():
    """One place each: token 0 takes expert 1, so token 2's first choice is lost; the
    second choices come after all first ones."""
    experts = mx.array([[1, 0], [0, 1], [1, 2]])
    weights = mx.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    found = limit_capacity(weights, experts, 3, 1.0)
    assert_close(found, [[0.7, 0.0], [0.6, 0.0], [0.0, 0.1]], atol=1e-7)


@pytest.mark.parametrize(
    "tokens, capacity",
    [(0, 1), (1, 1), (3, 1), (4, 4), (8, 4), (9, 4), (10, 8), (16, 8), (18, 12)],
)
def test_places_by_hand(tokens, capacity):
    """4 experts, factor 2: half the tokens, up to a multiple of 4, but at least 1."""
    assert expert_capacity(mx.array(tokens), 4, 2.0).item() == capacity


def test_few_tokens_keep_their_experts():
    """int(2 * 0.5 / 4) is 0: no expert would take a token, and all weights were 0."""
    experts = mx.array([[1, 0], [1, 3]])
    weights = mx.array([[0.7, 0.3], [0.6, 0.4]])
    found = limit_capacity(weights, experts, 4, 0.5)
    assert_close(found, [[0.7, 0.3], [0.0, 0.4]], atol=1e-7)


def test_padding_takes_no_place_by_hand():
    """One place each for two tokens; with padding counted, all went to padding."""
    experts = mx.array([[0, 1], [0, 1], [0, 1], [1, 0], [0, 1]])
    weights = mx.array([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4], [0.8, 0.2], [0.5, 0.5]])
    is_token = mx.array([False, False, True, True, False])
    found = limit_capacity(weights, experts, 2, 1.0, is_token)
    assert_close(found, [[0, 0], [0, 0], [0.6, 0], [0.8, 0], [0, 0]], atol=1e-7)


def test_padding_changes_nothing_for_the_tokens():
    rng = np.random.default_rng(3)
    experts = np.argsort(-rng.standard_normal((60, 6)) + np.arange(6), -1)[:, :2]
    weights = rng.random((60, 2)).astype(np.float32)
    is_token = rng.random(60) < 0.6
    alone = limit_capacity(
        mx.array(weights[is_token]), mx.array(experts[is_token]), 6, 1.1
    )
    padded = np.array(
        limit_capacity(mx.array(weights), mx.array(experts), 6, 1.1, mx.array(is_token))
    )
    assert (np.array(alone) == 0).any() and (np.array(alone) > 0).any()
    assert_equal(padded[is_token], alone)
    assert (padded[~is_token] == 0).all()


def test_the_decoder_hands_padding_down():
    """A row gives what it gives alone, whatever the rest of the batch is padded to."""
    moe = replace(SPARSE.moe_config, capacity_factor=0.7)
    decoder = small_decoder(replace(SPARSE, moe_config=moe))
    decoder.train()
    ids = mx.array(np.random.default_rng(0).integers(4, 90, (2, 20)))
    is_token = mx.arange(20) < mx.array([[20], [0]])
    alone = decoder.hidden(ids[:1])
    # exp of the training kernels is right to 4e-7, and blocks differ in their order.
    assert_close(decoder.hidden(ids, is_token=is_token)[:1], alone, atol=5e-6)
    assert np.abs(np.array(decoder.hidden(ids)[:1] - alone)).max() > 1e-3


def test_capacity_counts_in_training_only():
    layer = make_moe(capacity_factor=0.5)
    dropless = make_moe()
    x = random_array(40, 32)
    assert_equal(layer(x), dropless(x))
    layer.train()
    assert np.abs(np.array(layer(x) - dropless(x))).max() > 1e-3
    weights = layer.router(x)[0]
    assert (weights == 0).any()


def test_plenty_of_capacity_is_dropless():
    layer = make_moe(capacity_factor=4.0)
    layer.train()
    x = random_array(40, 32)
    # Training's softmax and the other one add in another order.
    assert_close(layer(x), make_moe()(x), atol=1e-7)


# --- Losses ----------------------------------------------------------------------


def test_load_balance_loss_by_hand():
    even = 20 * mx.eye(4)
    assert load_balance_loss(even).item() == pytest.approx(1.0, abs=1e-5)
    one = mx.broadcast_to(mx.array([20.0, 0, 0, 0]), (8, 4))
    assert load_balance_loss(one).item() == pytest.approx(4.0, abs=1e-5)
    # Two tokens prefer expert 0, one expert 1; gates are e / (e + 1) and the rest.
    logits = mx.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    g = np.e / (np.e + 1)
    expected = 2 * (2 / 3 * (2 * g + 1 - g) / 3 + 1 / 3 * (2 * (1 - g) + g) / 3)
    assert load_balance_loss(logits).item() == pytest.approx(expected, abs=1e-6)


def test_load_balance_loss_as_axlearn_writes_it():
    """E^2 times the mean over experts of share of first choices x mean gate."""
    logits = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    share = np.bincount(logits.argmax(-1), minlength=6) / 50
    expected = 36 * np.mean(share * gates.mean(0))
    found = load_balance_loss(mx.array(logits)).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_z_loss_by_hand():
    logits = mx.array([[0.0, 0.0], [np.log(3.0), 0.0]])
    expected = (np.log(2) ** 2 + np.log(4) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", [load_balance_loss, router_z_loss])
def test_padding_counts_in_no_loss(loss):
    logits = random_array(12, 4)
    is_token = mx.arange(12) < 7
    found = loss(logits, is_token)
    assert_close(found, loss(logits[:7]), atol=1e-6)
    assert not np.isclose(found.item(), loss(logits).item())
    assert loss(logits, mx.zeros(12, mx.bool_)).item() == 0


def test_expert_load_sums_to_one():
    experts = mx.array([[0, 1], [0, 2], [0, 1]])
    assert_close(expert_load(experts, 4), [3 / 6, 2 / 6, 1 / 6, 0], atol=1e-7)
    tokens = mx.array([True, False, True])
    assert_close(expert_load(experts, 4, tokens), [0.5, 0.5, 0, 0], atol=1e-7)


# --- Gradients -------------------------------------------------------------------


def gradients(layer: MoE, x: mx.array) -> dict[str, mx.array]:
    def loss(layer):
        return mx.square(layer(x)).sum()

    return dict(tree_flatten(nn.value_and_grad(layer, loss)(layer)[1]))


@pytest.mark.parametrize("way", ["routed", "sorted", "dense"])
def test_gradient_reaches_router_and_experts(way, monkeypatch):
    """All ways give the gradient of the loop, checked along random directions."""
    layer = make_moe()
    x = random_array(20 if way == "sorted" else 6, 32)
    experts = type(layer.experts)
    ways = {"routed": experts.routed, "sorted": experts.routed, "dense": experts.dense}
    chosen = ways[way]
    monkeypatch.setattr(
        experts, "__call__", lambda self, x, *routes: chosen(self, x, *routes[:2])
    )
    found = gradients(layer, x)
    assert set(found) == {
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    for name, gradient in found.items():
        assert mx.abs(gradient).max().item() > 1e-4, name
        parent, leaf = name.split(".")
        weight = layer[parent][leaf]
        direction = random_array(*weight.shape, seed=3)
        step, sides = 1e-4, []
        for sign in (1, -1):
            layer[parent][leaf] = weight + sign * step * direction
            sides.append(np.square(by_loop(layer, x)).sum())
        layer[parent][leaf] = weight
        slope = (sides[0] - sides[1]) / (2 * step)
        along = (gradient * direction).sum().item()
        # float32 weights stepped by 1e-4: the difference quotient is that coarse.
        assert along == pytest.approx(slope, rel=2e-2, abs=2e-2), name


def test_losses_train_the_router():
    logits = random_array(10, 4)
    for loss in (load_balance_loss, router_z_loss):
        assert mx.abs(mx.grad(loss)(logits)).max().item() > 1e-4
