"""Samplers and logits processors: the same distributions as mlx-lm's."""

import math

import mlx.core as mx
import numpy as np
import pytest
from small import random_array

from helpers import assert_close, assert_equal, need
from mm1_mlx.errors import MM1Error
from mm1_mlx.inference.sampling import (
    filter_logprobs,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_logits_processors,
    make_sampler,
)


def log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def of(*probabilities: float) -> mx.array:
    return mx.log(mx.array([probabilities]))


def support(logprobs: mx.array) -> list[int]:
    return [i for i, value in enumerate(logprobs[0].tolist()) if value > -math.inf]


def test_top_p_by_hand():
    logprobs = of(0.125, 0.5, 0.25, 0.125)
    assert support(keep_top_p(logprobs, 0.4)) == [1]
    assert support(keep_top_p(logprobs, 0.5)) == [1]
    assert support(keep_top_p(logprobs, 0.51)) == [1, 2]
    assert support(keep_top_p(logprobs, 0.8)) == [0, 1, 2, 3]  # ties stay together
    assert keep_top_p(logprobs, 0.51)[0, 1].item() == pytest.approx(math.log(0.5))


def test_min_p_by_hand():
    logprobs = of(0.125, 0.5, 0.25, 0.125)
    assert support(keep_min_p(logprobs, 0.4)) == [1, 2]
    assert support(keep_min_p(logprobs, 0.2)) == [0, 1, 2, 3]
    assert support(keep_min_p(logprobs, 1.0)) == [1]


def test_top_k_by_hand():
    logprobs = of(0.1, 0.5, 0.15, 0.25)
    assert support(keep_top_k(logprobs, 1)) == [1]
    assert support(keep_top_k(logprobs, 2)) == [1, 3]
    assert support(keep_top_k(logprobs, 4)) == [0, 1, 2, 3]
    assert support(keep_top_k(logprobs, 99)) == [0, 1, 2, 3]


FILTERS = [
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 5},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.8, "top_k": 7, "min_p": 0.01},
    {"top_k": 3, "min_p": 0.3},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_same_tokens_and_probabilities_as_mlx_lm(settings, spread):
    theirs = need("mlx_lm.sample_utils")
    logprobs = log_softmax(random_array(6, 50) * spread)
    found = filter_logprobs(logprobs, **settings)

    expected = logprobs
    if "top_p" in settings:
        expected = theirs.apply_top_p(expected, settings["top_p"])
    if "min_p" in settings:
        expected = theirs.apply_min_p(expected, settings["min_p"])
    if "top_k" in settings:
        expected = theirs.apply_top_k(expected, settings["top_k"])
    assert_equal(mx.softmax(found, axis=-1), mx.softmax(expected, axis=-1))
    assert 0 < (found > -mx.inf).sum() < found.size


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_same_draws_as_mlx_lm_from_the_same_random_key(settings):
    """Its order of filters and its temperature are ours too, not only each filter."""
    theirs = need("mlx_lm.sample_utils")
    logprobs = log_softmax(random_array(40, 50) * 2)
    sampler = make_sampler(temp=0.7, seed=5, **settings)
    found = sampler(logprobs)

    mx.random.seed(5)
    expected = theirs.make_sampler(temp=0.7, **settings)(logprobs)
    assert_equal(found, expected)


def test_draws_follow_the_distribution():
    logprobs = mx.repeat(of(0.5, 0.3, 0.2), 20000, axis=0)
    found = np.bincount(np.array(make_sampler(temp=1.0, seed=0)(logprobs)))
    # Three standard deviations of a share of 20000 draws are 0.011.
    assert_close(found / 20000, [0.5, 0.3, 0.2], atol=0.011)
    found = np.bincount(np.array(make_sampler(temp=0.5, seed=0)(logprobs)))
    squares = np.array([0.25, 0.09, 0.04])
    assert_close(found / 20000, squares / squares.sum(), atol=0.011)


def test_temperature_zero_takes_the_likeliest():
    logprobs = log_softmax(random_array(5, 20))
    sampler = make_sampler(temp=0, top_k=2, top_p=0.1)
    assert_equal(sampler(logprobs), mx.argmax(logprobs, axis=-1))


def test_a_seed_repeats_and_the_global_state_is_untouched():
    logprobs = log_softmax(random_array(1, 1000) * 0.1)

    def draws(seed):
        sampler = make_sampler(temp=1.0, seed=seed)
        return [sampler(logprobs).item() for _ in range(6)]

    before = mx.random.state[0].tolist()
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)
    assert len(set(draws(1))) > 1
    assert mx.random.state[0].tolist() == before


def test_repetition_penalty_by_hand():
    (penalise,) = make_logits_processors(2.0, 3)
    logits = mx.array([[1.0, -1.0, 4.0, 6.0], [1.0, -1.0, 4.0, 6.0]])
    tokens = mx.array([[3, 0, 0, 1], [1, 2, 2, 2]])
    # Only the last three tokens count; twice in them counts once.
    assert penalise(tokens, logits).tolist() == [
        [0.5, -2.0, 4.0, 6.0],
        [1.0, -1.0, 2.0, 6.0],
    ]
    assert logits[0].tolist() == [1.0, -1.0, 4.0, 6.0]
    assert penalise(mx.zeros((2, 0), mx.int32), logits).tolist() == logits.tolist()


@pytest.mark.parametrize("odd", [4, 5, 7, 1000, -1, -200])
def test_ids_without_a_logit_change_nothing(odd):
    """Image slots may have an id beyond the vocabulary: MLX would write to whatever
    stands there, in a batch another row's logits."""
    (penalise,) = make_logits_processors(2.0, 3)
    logits = mx.array([[1.0, -1.0, 4.0, 6.0], [1.0, -1.0, 4.0, 6.0]])
    tokens = mx.array([[0, 3, odd, odd], [odd, odd, odd, 1]])
    expected = [[1.0, -1.0, 4.0, 3.0], [1.0, -2.0, 4.0, 6.0]]  # they count as recent
    assert penalise(tokens, logits).tolist() == expected
    for row in range(2):
        alone = penalise(tokens[row : row + 1], logits[row : row + 1])
        assert alone.tolist() == expected[row : row + 1]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_may_be_numpys(kind):
    settings = {"top_p": kind(1), "top_k": np.int32(3), "min_p": kind(0), "seed": 3}
    logprobs = random_array(2, 9) * 3
    plain = make_sampler(2.0, 1.0, 3, 0.0, 3)
    assert make_sampler(kind(2), **settings)(logprobs).tolist() == (
        plain(logprobs).tolist()
    )
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    (ours,) = make_logits_processors(kind(2), np.int64(2))
    (same,) = make_logits_processors(2.0, 2)
    assert_equal(ours(tokens, logprobs), same(tokens, logprobs))
    for value in (True, np.bool_(True), None, 2 + 0j, np.array([1, 2])):
        with pytest.raises(MM1Error, match=r"top_k is .* but must be a whole number"):
            make_sampler(top_k=value)


@pytest.mark.parametrize("penalty, context", [(1.3, 20), (1.3, 4), (0.8, 20)])
def test_repetition_penalty_equals_mlx_lm(penalty, context):
    theirs = need("mlx_lm.sample_utils")
    logits = random_array(1, 30) * 3
    tokens = mx.array([[4, 9, 4, 22, 7, 29, 1, 9]])
    (ours,) = make_logits_processors(penalty, context)
    expected = theirs.make_repetition_penalty(penalty, context)
    found = ours(tokens, logits)
    assert_equal(found, expected(tokens[0], mx.array(logits)))


@pytest.mark.parametrize("penalty", [None, 0, 1, 1.0])
def test_no_penalty_is_no_processor(penalty):
    assert make_logits_processors(penalty) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temp": -1}, r"temp is -1, but must be a number of 0 or more"),
        ({"temp": math.nan}, r"temp is nan, but must be a number of 0 or more"),
        ({"temp": "hot"}, r"temp is 'hot', but must be a number"),
        ({"top_p": 1.5}, r"top_p is 1.5, but must be a number from 0 to 1"),
        ({"top_k": -1}, r"top_k is -1, but must be a whole number of 0 or more"),
        ({"top_k": 2.5}, r"top_k is 2.5, but must be a whole number"),
        ({"min_p": 2}, r"min_p is 2, but must be a number from 0 to 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(MM1Error, match=message):
        make_sampler(**settings)


def test_penalty_out_of_range():
    with pytest.raises(MM1Error, match="repetition_penalty is -1, but must be"):
        make_logits_processors(-1)
    with pytest.raises(MM1Error, match="repetition_context_size is 0, but must be"):
        make_logits_processors(1.5, 0)
