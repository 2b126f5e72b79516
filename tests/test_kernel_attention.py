"""Attention over a quantized cache in one launch: the definition, kernel against it."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_inputs import attention_exactly, attention_inputs, padding
from kernel_kit import BOUND, FLOATS, share

from helpers import assert_close, assert_equal
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.kernels.metal import forced, has_metal, watched
from mm1_mlx.kernels.quantized_attention import (
    attend_quantized,
    attention_metal,
    attention_reference,
    fits,
)
from mm1_mlx.models import cache

# --- the definition ---


@pytest.mark.parametrize("mask", [None, "causal", "bool", "additive"])
def test_the_definition_against_numpy(mask):
    B, H, KV, L, width, columns = 2, 4, 2, 3, 20, 9
    array: Any = mask
    if mask == "bool":
        array = mx.random.uniform(shape=(B, 1, L, columns)) > 0.3
        array[..., 0] = True
    elif mask == "additive":
        array = mx.random.normal((L, columns))
    given = attention_inputs(B, H, KV, L, width, columns, 8, 32, mask=array)
    q, packed = np.array(given[0], np.float64), given[1:3]
    k, v = (
        np.array(mx.dequantize(*each, group_size=32, bits=8), np.float64)[..., :width]
        for each in packed
    )
    k, v = (np.repeat(each, H // KV, axis=1) for each in (k, v))
    scores = q @ k.swapaxes(-1, -2) * width**-0.5
    if mask == "causal":
        scores[:, :, np.triu(np.ones((L, columns)), columns - L + 1) > 0] = -np.inf
    elif mask == "bool":
        scores = np.where(np.array(array), scores, -np.inf)
    elif mask == "additive":
        scores = scores + np.array(array)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ v
    assert_close(attention_reference(*given), expected, atol=1e-5)  # float32


@pytest.mark.parametrize("mask", [None, "causal"])
def test_the_caches_own_attention_gives_the_same(mask):
    given = attention_inputs(2, 4, 2, 3, 80, 9, 4, 32, mask=mask)
    store = cache.QuantizedKVCache(group_size=32, bits=4)
    expected = store.attend(*given[:3], scale=given[3], mask=mask)
    assert_close(attention_reference(*given), expected, atol=1e-6)


# --- kernel against definition ---

CASES = [
    # B, H, KV, L, width, columns, bits, group size, dtype, mask
    (1, 4, 2, 1, 128, 77, 4, 64, mx.float32, None),
    (1, 4, 1, 1, 128, 130, 8, 128, mx.bfloat16, None),
    (2, 4, 2, 1, 80, 33, 4, 32, mx.float16, "padded"),
    (1, 2, 1, 1, 80, 70, 8, 32, mx.float32, None),
    (2, 2, 2, 3, 64, 40, 8, 64, mx.float32, "causal"),
    (1, 2, 1, 8, 64, 8, 4, 64, mx.bfloat16, "causal"),
    (2, 2, 1, 2, 64, 50, 4, 32, mx.float32, "square"),
    (1, 2, 1, 1, 256, 50, 8, 128, mx.float16, None),
    (1, 1, 1, 1, 32, 1, 4, 32, mx.float32, None),
    # Keys that several threadgroups share; one of them sees none that is shown.
    (2, 2, 1, 2, 64, 1030, 4, 64, mx.float16, "half"),
    (1, 2, 1, 3, 80, 513, 8, 32, mx.float32, "causal"),
]


def case(B, H, KV, L, width, columns, bits, group_size, dtype, mask) -> tuple[Any, ...]:
    if mask == "padded":
        mask = padding(columns, *range(0, 3 * B, 3))
    elif mask == "half":
        mask = padding(columns, *[columns // 2] * B)
    elif mask == "square":
        mask = mx.random.uniform(shape=(1, H, L, columns)) > 0.5
    given = (B, H, KV, L, width, columns, bits, group_size, dtype, mask)
    return attention_inputs(*given)


@needs_host
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_kernel(sizes):
    given = case(*sizes)
    assert fits(*given[:3], *given[4:])
    with host_kernels():
        found = attention_metal(*given)
    dtype = sizes[8]
    assert found.dtype == dtype
    assert share(found, attention_exactly(given)) < BOUND[dtype]


@needs_host
def test_large_scores_and_rows_that_see_nothing():
    """exp would overflow without the largest taken off; no key: NaN, in both."""
    given = attention_inputs(2, 2, 1, 2, 64, 520, 4, 32)
    mask = mx.ones((2, 1, 1, 520), mx.bool_)
    mask[1] = False
    given = (given[0] * 1000, *given[1:4], mask, *given[5:])
    with host_kernels():
        found = attention_metal(*given)
    expected = attention_exactly(given)
    assert mx.isnan(found[1]).all() and mx.isnan(expected[1]).all()
    assert share(found[0], expected[0]) < 1e-3  # scores of thousands: 2^-11 apart


@needs_host
def test_a_model_answers_the_same_from_its_quantized_cache():
    """What the cache stores, and how: padded rows, a growing store, two layers."""
    store = cache.QuantizedKVCache([0, 2], group_size=64, bits=8)
    for length in (5, 1):
        k, v = mx.random.normal((2, 2, 2, length, 32))
        keys, values = store.update_and_fetch(k, v)
    q = mx.random.normal((2, 4, 1, 32))
    mask = padding(6, 0, 2)
    given = (q, keys, values, 0.2, mask, store.group_size, store.bits)
    with forced("quantized_attention"), host_kernels(), watched() as names:
        found = attend_quantized(*given)
    assert names == ["mm1_quantized_attention_masked"]
    expected = store.attend(q, keys, values, scale=0.2, mask=mask)
    assert share(found, expected) < BOUND[mx.float32]


# --- the chooser ---


def declined() -> list[Any]:
    usual = attention_inputs(1, 4, 2, 1, 64, 12, 4, 64)
    q, keys, values, scale, _, size, bits = usual
    more = attention_inputs(1, 4, 2, 9, 64, 12, 4, 64)
    additive = (q, keys, values, scale, mx.zeros((1, 12)), size, bits)
    wide_heads = attention_inputs(1, 2, 1, 1, 320, 4, 4, 64)
    prompt = attention_inputs(1, 4, 2, 4, 64, 3, 4, 64)
    return [
        pytest.param(more, id="9 queries"),
        pytest.param(additive, id="an additive mask"),
        pytest.param(wide_heads, id="heads of 320"),
        pytest.param(attention_inputs(1, 2, 1, 1, 64, 5, 3, 64), id="3 bits"),
        pytest.param(prompt, id="more queries than keys"),
        pytest.param(attention_inputs(1, 1, 1, 1, 32, 65537, 4, 32), id="65537 keys"),
    ]


@pytest.mark.parametrize("given", declined())
def test_what_is_declined(given):
    with forced("quantized_attention"), watched() as names:
        found = attend_quantized(*given)
    assert names == []
    assert_equal(found, attention_reference(*given))


def test_what_cannot_be_is_declined():
    q, keys, values, _, _, size, bits = attention_inputs(1, 4, 2, 1, 64, 12, 4, 64)
    assert fits(q, keys, values, None, size, bits)
    assert not fits(q, keys, values, None, 32, bits)
    assert not fits(q[..., :63], keys, values, None, 32, bits)
    assert not fits(q[:, :3], keys, values, None, size, bits)
    assert not fits(q, keys[:2], values[:2], None, size, bits)
    assert not fits(q.astype(mx.int32), keys, values, None, size, bits)
    shorter = tuple(a[:, :, :5] for a in values)
    assert not fits(q, keys, shorter, None, size, bits)


@pytest.mark.metal
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_on_a_mac(sizes, dtype):
    assert has_metal()
    given = case(*sizes[:8], dtype, sizes[9])
    assert share(attention_metal(*given), attention_exactly(given)) < 2 * BOUND[dtype]
    long = attention_inputs(1, 8, 2, 1, 128, 4000, sizes[6], 64, dtype)
    assert share(attention_metal(*long), attention_exactly(long)) < 2 * BOUND[dtype]
