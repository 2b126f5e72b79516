"""Caches: a step that reads a cache gives what reading everything gives."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import DENSE, SPARSE, random_array, small_decoder

from helpers import assert_close, assert_equal, max_difference, need
from mm1_mlx.kernels.quantized_attention import attend_quantized
from mm1_mlx.models.cache import KVCache, QuantizedKVCache, make_cache

IDS = [5, 17, 33, 8, 71, 12, 64, 20, 9, 44, 3, 58]

# float32, three layers: sums are added in another order.
ATOL = 2e-5


def keys_values(length: int, seed: int = 0, rows: int = 2, width: int = 8):
    return (
        random_array(rows, 3, length, width, seed=seed),
        random_array(rows, 3, length, width, seed=seed + 100),
    )


def test_grows_by_256_and_keeps_what_it_has():
    cache = KVCache()
    first, second = keys_values(250), keys_values(10, seed=1)
    cache.update_and_fetch(*first)
    assert cache.keys.shape[2] == 256
    keys, values = cache.update_and_fetch(*second)
    assert cache.keys.shape[2] == 512
    assert cache.offset == cache.size() == 260
    assert_equal(keys, mx.concatenate([first[0], second[0]], axis=2))
    assert_equal(values, mx.concatenate([first[1], second[1]], axis=2))
    assert cache.nbytes == 2 * 2 * 3 * 512 * 8 * 4


def test_trim_forgets_the_last_tokens():
    cache = KVCache()
    keys, values = keys_values(10)
    cache.update_and_fetch(keys, values)
    assert cache.is_trimmable()
    assert cache.trim(4) == 4
    assert cache.offset == 6
    assert_equal(cache.state[0], keys[:, :, :6])
    again = keys_values(2, seed=5)
    found, _ = cache.update_and_fetch(*again)
    assert_equal(found, mx.concatenate([keys[:, :, :6], again[0]], axis=2))
    assert cache.trim(100) == 8
    assert cache.empty()


def test_state_can_be_given_to_another_cache():
    cache, other = KVCache(), KVCache()
    assert cache.state == ()
    cache.update_and_fetch(*keys_values(5))
    other.state = cache.state
    assert other.offset == 5
    more = keys_values(3, seed=1)
    for a, b in zip(
        cache.update_and_fetch(*more), other.update_and_fetch(*more), strict=True
    ):
        assert_equal(a, b)


def test_masks_by_hand():
    cache = KVCache()
    assert cache.make_mask(1) is None
    assert cache.make_mask(3) == "causal"
    cache.update_and_fetch(*keys_values(1))
    assert cache.make_mask(2, return_array=True).tolist() == [
        [True, True, False],
        [True, True, True],
    ]
    assert cache.make_mask(2, window_size=2).tolist() == [
        [True, True, False],
        [False, True, True],
    ]


def test_mask_of_padded_rows_by_hand():
    cache = KVCache(left_padding=[0, 2])
    mask = cache.make_mask(3)
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == np.tri(3, dtype=bool).tolist()
    # Padding sees itself only, a token sees no padding.
    assert mask[1, 0].tolist() == np.eye(3, dtype=bool).tolist()
    cache.update_and_fetch(*keys_values(3))
    assert cache.make_mask(1)[1, 0].tolist() == [[False, False, True, True]]
    assert cache.positions.tolist() == [3, 1]


def test_padding_of_zero_is_no_padding():
    cache = KVCache(left_padding=[0, 0])
    assert cache.left_padding is None
    assert cache.make_mask(4) == "causal"
    assert cache.positions == 0


def test_filter_keeps_rows_and_drops_padding_that_all_share():
    cache = KVCache(left_padding=[0, 3, 2])
    keys, values = keys_values(5, rows=3)
    cache.update_and_fetch(keys, values)
    cache.filter([2, 1])
    assert cache.left_padding == [0, 1]
    assert cache.offset == 3
    assert cache.positions.tolist() == [3, 2]
    assert_equal(cache.state[0], keys[mx.array([2, 1]), :, 2:])
    cache.filter([1])
    assert cache.left_padding is None
    assert cache.positions == 2
    assert_equal(cache.state[1], values[1:2, :, 3:])


def decoders():
    yield pytest.param(DENSE, id="dense")
    yield pytest.param(SPARSE, id="experts")
    yield pytest.param(replace(DENSE, partial_rotary_factor=0.5), id="partial rotary")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    yield pytest.param(replace(DENSE, rope_scaling=scaling), id="llama3")
    yield pytest.param(replace(DENSE, qk_norm="head"), id="qk norm")
    yield pytest.param(replace(DENSE, parallel_block=True), id="parallel")


@pytest.mark.parametrize("config", list(decoders()))
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 4, 3], [11, 1]])
def test_reading_in_pieces_equals_reading_at_once(config, pieces):
    decoder = small_decoder(config)
    ids = mx.array([IDS, IDS[::-1]])
    expected = decoder(ids)
    cache = decoder.make_cache()
    found, start = [], 0
    for length in pieces:
        found.append(decoder(ids[:, start : start + length], cache))
        start += length
    assert_close(mx.concatenate(found, axis=1), expected, atol=ATOL)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("padding", [None, [0, 3]])
@pytest.mark.parametrize("config", list(decoders()))
def test_the_last_position_alone_is_that_of_all(config, padding, bits, monkeypatch):
    decoder = small_decoder(config)
    ids = mx.array([IDS, IDS[::-1]])
    caches = [decoder.make_cache(left_padding=padding) for _ in range(2)]
    for cache in caches:
        decoder.hidden(ids[:, :5], cache)
        if bits is not None:
            cache[:] = [entry.to_quantized(bits=bits) for entry in cache]
    whole = decoder.hidden(ids[:, 5:], caches[0])
    lengths = []
    run = type(decoder.layers[0])._feed_forward

    def watched(self, x, *others):
        lengths.append(x.shape[1])
        return run(self, x, *others)

    monkeypatch.setattr(type(decoder.layers[0]), "_feed_forward", watched)
    alone = decoder.hidden(ids[:, 5:], caches[1], last_only=True)
    assert alone.shape == (2, 1, config.hidden_size)
    assert_close(alone, whole[:, -1:], atol=ATOL)
    assert lengths == [7] * (config.num_hidden_layers - 1) + [1]
    for entries in zip(*caches, strict=True):
        for one, other in zip(*(entry.state for entry in entries), strict=True):
            assert_close(one, other, atol=ATOL)


@pytest.mark.parametrize("config", list(decoders()))
def test_a_padded_row_equals_the_row_alone(config):
    decoder = small_decoder(config)
    rows = [IDS, IDS[:3], IDS[4:10]]
    padding = [0, 9, 6]
    batch = [[0] * pad + row for pad, row in zip(padding, rows, strict=True)]
    cache = decoder.make_cache(left_padding=padding)
    prompt = decoder(mx.array(batch), cache)
    nexts = mx.array([[7], [8], [9]])
    step = decoder(nexts, cache)
    for i, row in enumerate(rows):
        own = decoder.make_cache()
        alone = decoder(mx.array([row]), own)
        assert_close(prompt[i : i + 1, padding[i] :], alone, atol=ATOL)
        assert_close(step[i : i + 1], decoder(nexts[i : i + 1], own), atol=ATOL)
    assert not mx.isnan(prompt).any()


def test_rows_that_stay_after_filter_equal_the_rows_alone():
    decoder = small_decoder()
    padding = [0, 9, 6]
    rows = [IDS, IDS[:3], IDS[4:10]]
    batch = [[0] * pad + row for pad, row in zip(padding, rows, strict=True)]
    cache = decoder.make_cache(left_padding=padding)
    decoder(mx.array(batch), cache)
    for entry in cache:
        entry.filter([2, 1])
    step = decoder(mx.array([[9], [8]]), cache)
    for i, (row, token) in enumerate([(rows[2], 9), (rows[1], 8)]):
        alone = decoder(mx.array([[*row, token]]))[:, -1]
        assert_close(step[i : i + 1, 0], alone, atol=ATOL)


# --- Quantized -------------------------------------------------------------------


def plain_attention(q, k, v, scale, mask):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "rows", "additive"])
@pytest.mark.parametrize("bits, group", [(8, 64), (8, 32), (4, 32)])
def test_quantized_attention_equals_attention_over_the_rounded_values(
    heads, kv, mask, bits, group
):
    """Exact but for the order of sums: both sides read the same rounded numbers."""
    length, columns, width = 3, 7, 64
    q = random_array(2, heads, length, width)
    how = {"group_size": group, "bits": bits}
    keys = mx.quantize(random_array(2, kv, columns, width, seed=1), **how)
    values = mx.quantize(random_array(2, kv, columns, width, seed=2), **how)
    seen = np.tri(length, columns, columns - length, dtype=bool)
    masks = {
        "none": None,
        "causal": "causal",
        "bool": mx.array(seen),
        "rows": mx.array(np.stack([seen, seen & (np.arange(7) > 1)])[:, None]),
        "additive": mx.array(np.where(seen, 0.5, -1e9).astype(np.float32)),
    }
    found = attend_quantized(q, keys, values, 0.125, masks[mask], group, bits)
    k, v = mx.dequantize(*keys, **how), mx.dequantize(*values, **how)
    assert_close(found, plain_attention(q, k, v, 0.125, masks[mask]), atol=3e-6)


@pytest.mark.parametrize("width, group, used", [(64, 64, 64), (32, 64, 32)])
def test_group_size_falls_back_to_what_the_head_allows(width, group, used):
    cache = QuantizedKVCache(group_size=group)
    cache.update_and_fetch(*keys_values(4, width=width))
    assert cache.group_size == used


@pytest.mark.parametrize("width", [8, 40, 80])
def test_any_head_width_can_be_quantized(width):
    cache = QuantizedKVCache()
    k, v = keys_values(9, width=width)
    q = random_array(2, 6, 9, width, seed=7)
    stored = cache.update_and_fetch(k, v)
    found = cache.attend(q, *stored, scale=0.1, mask="causal")
    assert found.shape == q.shape
    # 8 bits: a step is 1/255 of a group's range (about 5), so 0.01 at most per value.
    assert_close(found, plain_attention(q, k, v, 0.1, "causal"), atol=0.03)


@pytest.mark.parametrize("bits, bound", [(8, 0.05), (4, 1.0)])
def test_quantized_cache_in_the_decoder(bits, bound):
    """Logits have a standard deviation of about 1 here; 4 bits are for long contexts,
    not for accuracy."""
    decoder = small_decoder()
    ids = mx.array([IDS])
    expected = decoder(ids)
    cache = decoder.make_cache(kv_bits=bits)
    decoder(ids[:, :8], cache)
    found = decoder(ids[:, 8:], cache)
    assert 0 < max_difference(found, expected[:, 8:]) < bound


def test_plain_cache_becomes_quantized_on_the_way():
    decoder = small_decoder()
    ids = mx.array([IDS])
    plain, whole = decoder.make_cache(), decoder.make_cache(kv_bits=8)
    decoder(ids[:, :8], plain)
    decoder(ids[:, :8], whole)
    turned = [entry.to_quantized(group_size=64, bits=8) for entry in plain]
    assert [entry.offset for entry in turned] == [8, 8, 8]
    assert turned[0].bits == 8
    assert turned[0].trim(2) == 2
    # The first layer's keys do not depend on the cache: the same numbers are stored.
    assert_equal(turned[0].state[0], whole[0].state[0][..., :6, :])
    empty = KVCache(left_padding=[1, 0]).to_quantized(bits=4)
    assert empty.offset == 0
    assert empty.left_padding == [1, 0]


def test_quantized_rows_are_padded_and_filtered_like_plain_ones():
    decoder = small_decoder()
    rows, padding = [IDS, IDS[:3]], [0, 9]
    batch = [[0] * pad + row for pad, row in zip(padding, rows, strict=True)]
    cache = decoder.make_cache(left_padding=padding, kv_bits=8)
    prompt = decoder(mx.array(batch), cache)
    own = decoder.make_cache(kv_bits=8)
    alone = decoder(mx.array([rows[1]]), own)
    assert_close(prompt[1:, 9:], alone, atol=ATOL)
    for entry in cache:
        entry.filter([1])
    assert cache[0].offset == 3
    step = mx.array([[7]])
    assert_close(decoder(step, cache), decoder(step, own), atol=ATOL)


def test_make_cache_gives_one_entry_per_layer():
    plain = make_cache(3, left_padding=[1, 0])
    assert [type(entry) for entry in plain] == [KVCache] * 3
    assert plain[2].left_padding == [1, 0]
    quantized = make_cache(2, kv_bits=4, kv_group_size=32)
    assert [(entry.bits, entry.group_size) for entry in quantized] == [(4, 32)] * 2


# --- mlx-lm ----------------------------------------------------------------------


def greedy_by_full_forward(decoder, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(mx.argmax(decoder(mx.array([ids]))[0, -1])))
    return ids[-n:]


@pytest.mark.parametrize("config", [DENSE, SPARSE])
@pytest.mark.parametrize("prefill_step_size", [4, 2048])
def test_mlx_lm_generates_the_same_tokens_with_our_decoder(config, prefill_step_size):
    generate = need("mlx_lm.generate")
    decoder = small_decoder(config)
    steps = generate.generate_step(
        mx.array(IDS), decoder, max_tokens=12, prefill_step_size=prefill_step_size
    )
    found = [token for token, _ in steps]
    assert found == greedy_by_full_forward(decoder, IDS, 12)


@pytest.mark.parametrize("kind", ["KVCache", "RotatingKVCache", "ConcatenateKVCache"])
def test_mlx_lm_caches_fit_our_decoder(kind):
    caches = need("mlx_lm.models.cache")
    settings = {"max_size": 64, "keep": 4} if kind == "RotatingKVCache" else {}
    decoder = small_decoder()
    cache = [getattr(caches, kind)(**settings) for _ in decoder.layers]
    ids = mx.array([IDS])
    found = [decoder(ids[:, :7], cache)]
    found += [decoder(ids[:, i : i + 1], cache) for i in range(7, 12)]
    assert_close(mx.concatenate(found, axis=1), decoder(ids), atol=ATOL)


def test_mlx_lm_quantized_cache_equals_ours():
    caches = need("mlx_lm.models.cache")
    config = replace(DENSE, head_dim=32)  # the smallest group that mlx-lm takes
    decoder = small_decoder(config)
    ids = mx.array([IDS])
    theirs = [caches.QuantizedKVCache(group_size=32, bits=8) for _ in decoder.layers]
    ours = decoder.make_cache(kv_bits=8, kv_group_size=32)
    assert_close(decoder(ids, theirs), decoder(ids, ours), atol=ATOL)
    step = mx.array([[7]])
    assert_close(decoder(step, theirs), decoder(step, ours), atol=ATOL)


def test_mlx_lm_left_padded_batch_fits_our_decoder():
    caches = need("mlx_lm.models.cache")
    decoder = small_decoder()
    rows, padding = [IDS, IDS[:5]], [0, 7]
    batch = [[0] * pad + row for pad, row in zip(padding, rows, strict=True)]
    cache = [caches.BatchKVCache(padding) for _ in decoder.layers]
    prompt = decoder(mx.array(batch), cache)
    alone = decoder(mx.array([rows[1]]))
    assert_close(prompt[1:, 7:], alone, atol=ATOL)


def test_mlx_lm_turns_our_cache_into_a_quantized_one():
    generate = need("mlx_lm.generate")
    decoder = small_decoder()
    cache = decoder.make_cache()
    steps = generate.generate_step(
        mx.array(IDS),
        decoder,
        max_tokens=8,
        prompt_cache=cache,
        kv_bits=8,
        quantized_kv_start=0,
    )
    found = [token for token, _ in steps]
    assert isinstance(cache[0], QuantizedKVCache)
    assert found == greedy_by_full_forward(decoder, IDS, 8)
