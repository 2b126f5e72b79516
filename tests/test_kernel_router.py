"""The router's kernels: the definition by hand and by NumPy, then kernel against it."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_inputs import tied_logits
from kernel_kit import BOUND, FLOATS, share

from helpers import assert_close, assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.benchmarks.launches import count_launches
from mm1_mlx.kernels.fused import replaced
from mm1_mlx.kernels.metal import forced, has_metal, watched
from mm1_mlx.kernels.router import (
    MAX_TOKENS,
    fits,
    fits_tokens,
    logits_of,
    route,
    route_metal,
    route_reference,
    route_tokens,
    tokens_metal,
    tokens_reference,
)
from mm1_mlx.models.router import Router

renormalised = pytest.mark.parametrize("renormalise", [True, False])


def reference(*given) -> tuple:
    """The definition as a GPU has it, in chains, which must agree with the CPU's."""
    plain = route_reference(*given)
    with replaced(lambda chain, arrays: chain(*arrays)):
        chains = route_reference(*given)
    assert_equal(chains[1], plain[1])
    assert_close(chains[0], plain[0], atol=1e-6)  # exp in another order
    return chains


# --- the definition ---


@pytest.mark.parametrize("T", [1, 2, MAX_TOKENS, MAX_TOKENS + 1])
def test_logits_of_a_few_tokens_one_by_one(T):
    """As on a GPU: the same numbers, and one launch."""
    x, weight = mx.random.normal((T, 200)), mx.random.normal((5, 200))
    with replaced(lambda chain, arrays: chain(*arrays)):
        found = logits_of(x, weight)
    assert_close(found, x @ weight.T, atol=1e-4)  # sums of 200 products of 1
    x, weight = mx.random.normal((T, 3072)), mx.random.normal((64, 3072))
    mx.eval(x, weight)
    count = count_launches(lambda x: logits_of(x, weight), x)
    assert (count.launches, count.merges) == (1, int(T > MAX_TOKENS))


def test_the_definition_by_hand():
    logits = mx.array([[0.0, 3.0, 3.0, 1.0], [-0.0, -9.0, 0.0, -9.0]])
    weights, experts = reference(logits, 2, True)[:2]
    assert experts.tolist() == [[1, 2], [0, 2]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    weights = reference(mx.zeros((1, 4)), 2, False)[0]
    assert_close(weights, [[0.25, 0.25]], atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 8])
@renormalised
def test_the_definition_against_numpy(k, renormalise):
    logits = tied_logits(50, 33)
    weights, experts = reference(logits, k, renormalise)[:2]
    values = np.array(logits, np.float64)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    exp = np.exp(values - values.max(axis=-1, keepdims=True))
    chosen = np.take_along_axis(exp, order, axis=-1)
    whole = chosen if renormalise else exp
    assert_equal(experts, order)
    # float32, a sum of at most 33 numbers
    assert_close(weights, chosen / whole.sum(axis=-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 8])
@renormalised
def test_the_models_own_router_gives_the_same(k, renormalise):
    from dataclasses import replace

    from small import MOE

    changes = {"num_local_experts": 16, "num_experts_per_tok": k}
    config = replace(MOE, **changes, norm_topk_prob=renormalise)
    router = Router(12, config)
    x = mx.random.normal((7, 12))
    expected = router(x)
    found = route_tokens(x, router.weight, k, renormalise)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-6)


# --- kernel against definition ---


@needs_host
@pytest.mark.parametrize(
    "E, k, T, dtype",
    [
        (2, 1, 1, mx.float32),  # 2 logits are in constant memory
        (2, 2, 7, mx.float32),
        (8, 2, 7, mx.float16),
        (33, 8, 7, mx.bfloat16),
        (60, 4, 1, mx.float32),
        (64, 2, 257, mx.float32),
        (128, 8, 7, mx.float32),
        (512, 16, 2, mx.float32),
    ],
    ids=str,
)
def test_tail(E, k, T, dtype):
    logits = tied_logits(T, E, dtype)
    renormalise = E not in (33, 64)
    with host_kernels():
        weights, experts = route_metal(logits, k, renormalise)[:2]
    expected, chosen = reference(logits, k, renormalise)[:2]
    assert_equal(experts, chosen)
    assert experts.dtype == mx.uint32 and weights.dtype == mx.float32
    assert_close(weights, expected, atol=1e-6)  # float32: exp, and sums of at most 64


@needs_host
@renormalised
def test_numbers_that_are_none(renormalise):
    """NaN has the definition's place, and spoils the same weights."""
    nan, inf = float("nan"), float("inf")
    rows = [
        [0.0, nan, 1.0, 2.0],
        [nan, inf, nan, 0.0],
        [inf, 0.0, 1.0, 2.0],
        [-inf, -inf, -inf, -inf],
        [-inf, 3.0, -inf, -inf],
        [3e38, -3e38, 1e-40, -0.0],
    ]
    logits = mx.array(rows)
    with host_kernels():
        weights, experts = route_metal(logits, 2, renormalise)[:2]
    expected, chosen = reference(logits, 2, renormalise)[:2]
    assert_equal(experts, chosen)
    assert_close(weights, expected, atol=1e-6)
    # The other NaN, with its sign bit set: whatever its place, each expert is one.
    minus = mx.array([0xFFC00000, 0, 0xFF800000, 0xFFFFFFFF], mx.uint32)
    with host_kernels():
        experts = route_metal(minus.view(mx.float32)[None], 4, True)[1]
    assert experts[0, :2].tolist() == [1, 2]
    assert sorted(experts.tolist()[0]) == [0, 1, 2, 3]


@needs_host
@pytest.mark.parametrize(
    "T, D, E, k, types",
    [
        (1, 1, 2, 1, (mx.float32, mx.float32)),
        (2, 31, 8, 2, (mx.float16, mx.float16)),
        (1, 64, 33, 4, (mx.bfloat16, mx.bfloat16)),
        (8, 100, 60, 8, (mx.float16, mx.float32)),
        (1, 4096, 64, 2, (mx.float32, mx.bfloat16)),
        (3, 64, 128, 2, (mx.float32, mx.float32)),
    ],
    ids=str,
)
def test_matvec(T, D, E, k, types):
    x = mx.random.normal((T, D)).astype(types[0])
    weight = mx.random.normal((E, D)).astype(types[1])
    with host_kernels():
        weights, experts, logits = tokens_metal(x, weight, k, True)
    expected = tokens_reference(x, weight, k, True)
    # float32 sums of up to 4096 products, in another order
    assert share(logits, expected[2]) < BOUND[mx.float32]
    # Of the kernel's own logits: those that are nearly tied may change places.
    own, chosen = reference(logits, k, True)[:2]
    assert_equal(experts, chosen)
    assert_close(weights, own, atol=1e-6)


# --- gradients ---


@needs_host
@renormalised
def test_gradient_of_the_tail(renormalise):
    logits = mx.random.normal((5, 8))
    by = mx.random.normal((5, 3))

    def loss(logits):
        return (route(logits, 3, renormalise, trainable=True)[0] * by).sum()

    with forced("router"), host_kernels(), watched() as names:
        found = mx.grad(loss)(logits)
    assert names == ["mm1_router"]
    with forced():
        expected = mx.grad(loss)(logits)
    assert mx.abs(expected).max().item() > 0.05
    assert_close(found, expected, atol=1e-6)  # float32


@needs_host
@renormalised
def test_gradient_with_the_matmul(renormalise):
    """Of all that the results are used for: weights, and logits (the router's losses).

    x in 16 bits: its gradient comes back in them.
    """
    x = mx.random.normal((4, 12)).astype(mx.float16)
    weight = mx.random.normal((8, 12))
    by = mx.random.normal((4, 2))

    def loss(x, weight):
        found = route_tokens(x, weight, 2, renormalise, trainable=True)
        return (found[0] * by).sum() + mx.square(mx.logsumexp(found[2], axis=-1)).mean()

    gradient = mx.grad(loss, argnums=(0, 1))
    with forced("router_matvec"), host_kernels(), watched() as names:
        found = gradient(x, weight)
    assert names == ["mm1_router_matvec"]
    with forced():
        expected = gradient(x, weight)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert share(a, b) < (1e-5 if b.dtype == mx.float32 else 2**-10)


# --- choosers ---


@pytest.mark.parametrize(
    "logits, k",
    [
        (mx.zeros((2, 513)), 2),
        (mx.zeros((2, 64)), 17),
        (mx.zeros((0, 8)), 2),
        (mx.zeros((2, 3, 8)), 2),
        (mx.zeros((2, 8), mx.int32), 2),
    ],
    ids=["many experts", "many chosen", "no tokens", "three axes", "whole numbers"],
)
def test_what_the_tail_declines(logits, k):
    assert not fits(logits, k)
    with forced("router"), watched() as names:
        if logits.ndim == 2:
            found = route(logits, k, True)[:2]
            expected = reference(logits, k, True)[:2]
            for a, b in zip(found, expected, strict=True):
                assert_equal(a, b)
    assert names == []


def test_what_the_matvec_declines():
    x, weight = mx.random.normal((9, 16)), mx.random.normal((8, 16))
    assert fits_tokens(x[:8], weight, 2)
    assert not fits_tokens(x, weight, 2)
    assert not fits_tokens(x[:8], weight, 17)
    assert not fits_tokens(x[:8, :15], weight, 2)
    assert not fits_tokens(x[:8], weight.astype(mx.int32), 2)
    with forced("router_matvec"), watched() as names:
        found = route_tokens(x, weight, 2, True)
    assert names == []
    for a, b in zip(found, tokens_reference(x, weight, 2, True), strict=True):
        assert_equal(a, b)


@needs_host
def test_choosers_take_the_kernels_that_are_on():
    x, weight = mx.random.normal((1, 64)), mx.random.normal((64, 64))
    for kernels, expected in [
        (("router", "router_matvec"), ["mm1_router_matvec"]),
        (("router",), ["mm1_router"]),
        ((), []),
    ]:
        with forced(*kernels), host_kernels(), watched() as names:
            mx.eval(route_tokens(x, weight, 2, True))
        assert names == expected


@pytest.mark.metal
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", [1, 7, 257])
@pytest.mark.parametrize("E, k", [(2, 1), (8, 2), (33, 8), (60, 4), (64, 2), (128, 8)])
def test_on_a_mac(E, k, T, dtype):
    assert has_metal()
    logits = tied_logits(T, E, dtype)
    for renormalise in (True, False):
        weights, experts = route_metal(logits, k, renormalise)[:2]
        expected, chosen = reference(logits, k, renormalise)[:2]
        assert_equal(experts, chosen)
        assert_close(weights, expected, atol=2e-6)  # Metal's own exp in the definition
    x, weight = logits[:8, : E // 2], mx.random.normal((E, E // 2)).astype(dtype)
    found = tokens_metal(x, weight, k, True)
    assert share(found[2], tokens_reference(x, weight, k, True)[2]) < 1e-5
    own, chosen = reference(found[2], k, True)[:2]
    assert_equal(found[1], chosen)
    assert_close(found[0], own, atol=2e-6)
