"""Training attention on the CPU: its exp, and equality with the definition."""

import mlx.core as mx
import numpy as np
import pytest

from helpers import assert_close, peak_bytes
from mm1_mlx.kernels import cpu_attention
from mm1_mlx.kernels.cpu_attention import (
    attention_cpu,
    attention_reference,
    fast_exp,
    fits,
    training_attention,
)


@pytest.fixture(autouse=True)
def on_cpu():
    """Wherever the tests run: this is the CPU's version."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_fast_exp_over_its_whole_range():
    x = np.concatenate(
        [np.linspace(-60, 88, 200_001), np.linspace(-1, 1, 20_001), [0.0]]
    ).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    relative = np.abs(np.array(fast_exp(mx.array(x)), np.float64) / expected - 1)
    # Near the ends y = x / ln 2 has an error of 4e-6 in float32, which shows as
    # relative error; for the small arguments of a softmax only the polynomial counts.
    assert relative.max() < 8e-6
    assert relative[np.abs(x) < 2].max() < 4e-7
    assert fast_exp(mx.array([0.0])).item() == 1.0


def test_fast_exp_is_zero_below_its_range_and_stays_finite_above():
    assert fast_exp(mx.array([-60.1, -87.0, -1e30, -mx.inf])).tolist() == [0.0] * 4
    most = fast_exp(mx.array([88.0, 200.0, 1e30])).tolist()
    assert most == pytest.approx([np.exp(88.0)] * 3, rel=1e-5)


def test_what_is_masked_weighs_nothing_at_all():
    """Not 1e-38: times a gradient that is a denormal number, which costs 100 cycles."""
    L = 16
    q, k, v = (normal(1, 1, L, 4, seed=s) for s in range(3))
    mask = mx.array(np.tril(np.ones((L, L), bool)))
    loss = lambda v: attention_cpu(q, k, v, 0.5, mask)[0, 0, 3].sum()  # noqa: E731
    gradient = np.array(mx.grad(loss)(v))[0, 0]
    assert (gradient[:4] > 1e-8).all() and (gradient[4:] == 0).all()


def test_the_gradient_of_fast_exp_is_itself():
    x = mx.array([-20.0, -1.0, 0.0, 0.5, 10.0])
    gradient = mx.grad(lambda x: (mx.array([1.0, 2, 3, 4, 5]) * fast_exp(x)).sum())(x)
    assert_close(gradient, mx.array([1.0, 2, 3, 4, 5]) * fast_exp(x), atol=0)


def masks(B, H, L):
    random = np.random.default_rng(1).random((B, 1, L, L)) < 0.4
    own = np.eye(L, dtype=bool)
    return {
        "none": None,
        "causal": mx.array(np.tril(np.ones((L, L), bool))),
        "per row": mx.array(random | own),
        "per head": mx.array(np.random.default_rng(2).random((B, H, L, L)) < 0.5) | own,
        "one key": mx.array(np.broadcast_to(own, (B, 1, L, L))),
    }


@pytest.mark.parametrize("kind", ["none", "causal", "per row", "per head", "one key"])
def test_values_and_gradients_are_those_of_the_definition(kind):
    B, H, L, hd = 2, 3, 17, 8
    mask = masks(B, H, L)[kind]
    qkv = [3 * normal(B, H, L, hd, seed=s) for s in range(3)]
    into = normal(B, H, L, hd, seed=9)

    def both(attention):
        def loss(q, k, v):
            return (attention(q, k, v, hd**-0.5, mask) * into).sum()

        out = attention(*qkv, hd**-0.5, mask)
        return out, mx.grad(loss, argnums=(0, 1, 2))(*qkv)

    actual, gradients = both(attention_cpu)
    expected, wanted = both(attention_reference)
    # float32; scores reach 100, so exp turns their rounding into 1e-5
    assert_close(actual, expected, atol=2e-5)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert_close(mine, theirs, atol=2e-4)


@pytest.mark.parametrize("numbers", [1, 100, 17 * 17, 2 * 17 * 17, 4 * 17 * 17])
@pytest.mark.parametrize("causal", [False, True], ids=["", "later keys left out"])
@pytest.mark.parametrize("kind", ["none", "causal", "per row", "per head"])
def test_blocks_change_nothing(kind, causal, numbers, monkeypatch):
    """Blocks of single rows, some rows, a head, two heads, and all heads of a row."""
    B, H, L, hd = 3, 4, 17, 8
    mask = masks(B, H, L)[kind]
    if causal:
        seen = mx.array(np.tril(np.ones((L, L), bool)))
        mask = seen if mask is None else mask & seen
    qkv = [normal(B, H, L, hd, seed=s) for s in range(3)]
    into = normal(B, H, L, hd, seed=9)

    def both(causal):
        def attention(q, k, v):
            return attention_cpu(q, k, v, hd**-0.5, mask, causal)

        def loss(q, k, v):
            return (attention(q, k, v) * into).sum()

        return attention(*qkv), *mx.grad(loss, argnums=(0, 1, 2))(*qkv)

    expected = both(False)
    monkeypatch.setattr(cpu_attention, "_NUMBERS", numbers)
    monkeypatch.setattr(cpu_attention, "_ROWS", 2)
    for mine, theirs in zip(both(causal), expected, strict=True):
        assert_close(mine, theirs, atol=2e-6)  # float32, sums in another order


def test_scores_are_not_kept_for_the_gradient():
    """24 layers of 4 heads with 256 x 256 scores: 24 MB, which the definition keeps."""
    q = normal(1, 4, 256, 16)

    def gradient(attention):
        def loss(q):
            for _ in range(24):
                q = attention(q, q, q, 0.25, None)
            return q.sum()

        return mx.grad(loss)

    kept = peak_bytes(gradient(attention_reference), q)
    assert peak_bytes(gradient(attention_cpu), q) < 0.5 * kept


def test_a_row_that_sees_nothing_is_finite():
    mask = mx.zeros((1, 1, 16, 16), mx.bool_)
    q, k, v = (normal(1, 1, 16, 4, seed=s) for s in range(3))
    out, gradient = mx.value_and_grad(
        lambda q: attention_cpu(q, k, v, 0.5, mask).sum()
    )(q)
    assert mx.isfinite(out).item() and mx.isfinite(gradient).all().item()


def test_what_fits():
    q = normal(1, 4, 16, 8)
    assert fits(q, q, None)
    assert fits(q, q, mx.ones((16, 16), mx.bool_))


@pytest.mark.parametrize(
    "why, q, k, mask",
    [
        ("16 bit", (1, 4, 16, 8, mx.float16), (1, 4, 16, 8), None),
        ("few rows", (1, 4, 15, 8, mx.float32), (1, 4, 15, 8), None),
        ("grouped keys", (1, 4, 16, 8, mx.float32), (1, 2, 16, 8), None),
        ("a name", (1, 4, 16, 8, mx.float32), (1, 4, 16, 8), "causal"),
        ("additive", (1, 4, 16, 8, mx.float32), (1, 4, 16, 8), mx.zeros((16, 16))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_goes_to_the_definition(why, q, k, mask, monkeypatch):
    *shape, dtype = q
    q, k = normal(*shape).astype(dtype), normal(*k, seed=1).astype(dtype)
    assert not fits(q, k, mask)
    expected = attention_reference(q, k, k, 0.3, mask)
    monkeypatch.setattr(cpu_attention, "attention_cpu", None)  # must not be called
    assert_close(training_attention(q, k, k, 0.3, mask), expected, atol=0)


def test_a_gpu_gets_the_definition(monkeypatch):
    class Gpu:
        type = mx.gpu

    monkeypatch.setattr(cpu_attention.mx, "default_device", Gpu)
    q = normal(1, 4, 16, 8)
    fitted = fits(q, q, None)
    monkeypatch.undo()
    assert not fitted
