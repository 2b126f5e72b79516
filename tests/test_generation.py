"""Generation: tokens, text, statistics, stopping early."""

import math
from dataclasses import fields

import mlx.core as mx
import pytest
from small import DENSE, EOS, IMAGE, SPARSE, random_array, small_model

from helpers import assert_close, need
from mm1_mlx.errors import PromptError
from mm1_mlx.inference import steps as steps_module
from mm1_mlx.inference.generation import (
    GenerationResponse,
    batch_generate,
    generate,
    generate_step,
    stream_generate,
)
from mm1_mlx.inference.sampling import make_logits_processors
from mm1_mlx.inference.steps import Decoding
from mm1_mlx.inference.wired import wired_limit
from mm1_mlx.models.cache import QuantizedKVCache


def greedy(model, ids, n, images=()):
    """The answer by reading everything again for each token."""
    ids = list(ids)
    pixels = None
    if images:
        pixels = mx.stack([random_array(16, 16, 3, seed=i) for i in images])
    start = len(ids)
    while len(ids) < start + n:
        logits = model(mx.array([ids]), pixels)
        ids.append(int(mx.argmax(logits[0, -1])))
        if ids[-1] == EOS:
            break
    return ids[start:]


# --- Tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
def test_tokens_are_those_of_full_forwards(processor, text):
    model = small_model(text)
    found = generate(model, processor, "5 17 33 8", max_tokens=24)
    assert list(found.token_ids) == greedy(model, [1, 5, 17, 33, 8], 24)


def test_images_are_seen_and_in_their_places(model, processor):
    settings = {"max_tokens": 16}
    found = generate(model, processor, "5 <image> 9 <image> 7", [1, 2], **settings)
    ids = [1, 5, *[IMAGE] * 4, 9, *[IMAGE] * 4, 7]
    assert list(found.token_ids) == greedy(model, ids, 16, [1, 2])
    other = generate(model, processor, "5 <image> 9 <image> 7", [2, 1], **settings)
    assert other.token_ids != found.token_ids


@pytest.mark.parametrize("step", [1, 2, 5, 12, 13])
def test_chunked_prefill_gives_the_same_answer(model, processor, step):
    prompt = "5 17 33 <image> 8 20 41 7"
    whole = generate(model, processor, prompt, [3], max_tokens=12)
    pieces = generate(
        model, processor, prompt, [3], max_tokens=12, prefill_step_size=step
    )
    assert pieces.token_ids == whole.token_ids


def test_logits_are_made_for_the_last_position_only(model, monkeypatch):
    """(B, L, V) logits would be the largest array of the whole run."""
    shapes = []
    head = type(model.decoder).head

    def watched(self, hidden):
        shapes.append(hidden.shape)
        return head(self, hidden)

    monkeypatch.setattr(type(model.decoder), "head", watched)
    list(generate_step(model, mx.arange(4, 44), max_tokens=3, prefill_step_size=16))
    assert set(shapes) == {(1, 32)}
    assert len(shapes) == 3  # not one more than needed


def test_generate_step_gives_log_probabilities(model):
    ids = [1, 5, 17, 33]
    for token, logprobs in generate_step(model, mx.array(ids), max_tokens=5):
        logits = model(mx.array([ids]))[0, -1]
        assert_close(
            logprobs, logits - mx.logsumexp(logits), atol=2e-5
        )  # order of sums
        ids.append(token)


def test_generate_step_goes_on_from_a_cache(model):
    ids = mx.array([[1, 5, 17, 33, 8, 20]])
    whole = [token for token, _ in generate_step(model, ids, max_tokens=8)]
    cache = model.make_cache()
    model.decoder.hidden(ids[:, :4], cache)
    steps = generate_step(model, ids[:, 4:], cache=cache, max_tokens=8)
    assert [token for token, _ in steps] == whole


def test_generate_step_takes_known_image_features(model):
    pixels = random_array(1, 16, 16, 3)
    ids = mx.array([1, *[IMAGE] * 4, 9])
    one = list(generate_step(model, ids, pixel_values=pixels, max_tokens=4))
    features = model.encode_images(pixels)
    two = list(generate_step(model, ids, image_features=features, max_tokens=4))
    assert [token for token, _ in one] == [token for token, _ in two]


def test_prefill_progress_is_told(model):
    told = []
    steps = generate_step(
        model,
        mx.arange(4, 14),
        prefill_step_size=4,
        max_tokens=1,
        on_prefill=lambda done, total: told.append((done, total)),
    )
    list(steps)
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_many_images_are_encoded_a_few_at_a_time(model, monkeypatch):
    sizes = []
    encode = type(model).encode_images

    def watched(self, pixels, **how):
        sizes.append(pixels.shape[0])
        return encode(self, pixels, **how)

    monkeypatch.setattr(type(model), "encode_images", watched)
    pixels = random_array(19, 16, 16, 3)
    found = steps_module.encode_images(model, pixels)
    assert sizes == [8, 8, 3]
    assert_close(found, encode(model, pixels), atol=1e-5)  # matmuls of other sizes


# --- Samplers and penalties ------------------------------------------------------


def test_seed_repeats_an_answer(model, processor):
    def answer(seed):
        settings = {"temp": 1.0, "top_p": 0.9, "max_tokens": 20, "seed": seed}
        return generate(model, processor, "5 6", **settings).token_ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_generation_leaves_the_global_random_state(model, processor):
    before = mx.random.state[0].tolist()
    generate(model, processor, "5 6", temp=1.0, max_tokens=4)
    assert mx.random.state[0].tolist() == before


def test_repetition_penalty_sees_prompt_and_answer(model, processor):
    ids = [1, 5, 17, 33]
    (penalise,) = make_logits_processors(5.0, 6)
    expected = []
    for _ in range(12):
        logits = model(mx.array([ids]))[:, -1]
        ids.append(int(mx.argmax(penalise(mx.array([ids]), logits))))
        expected.append(ids[-1])
        if expected[-1] == EOS:
            break
    found = generate(
        model,
        processor,
        "5 17 33",
        max_tokens=12,
        repetition_penalty=5.0,
        repetition_context_size=6,
    )
    assert list(found.token_ids) == expected
    assert list(found.token_ids) != greedy(model, [1, 5, 17, 33], 12)


def test_same_tokens_as_mlx_lm_with_sampling(model, processor):
    """mlx-lm's loop, sampler and penalty on our decoder, from the same random key."""
    theirs = need("mlx_lm.generate")
    utils = need("mlx_lm.sample_utils")
    mx.random.seed(11)
    steps = theirs.generate_step(
        mx.array([1, 5, 17, 33]),
        model.decoder,
        max_tokens=10,
        sampler=utils.make_sampler(temp=0.8, top_p=0.9, min_p=0.01),
        logits_processors=utils.make_logits_processors(repetition_penalty=1.2),
    )
    expected = [token for token, _ in steps]
    found = generate(
        model,
        processor,
        "5 17 33",
        max_tokens=10,
        temp=0.8,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=11,
    ).token_ids
    assert EOS not in expected, "choose another seed"
    assert list(found) == expected


# --- Quantized cache -------------------------------------------------------------


def test_kv_bits_quantizes_the_cache_on_the_way(model):
    ids = mx.arange(4, 24)[None]
    decoding = Decoding(
        model, ids, kv_bits=8, prefill_step_size=8, quantized_kv_start=18
    )
    assert isinstance(decoding.cache[0], QuantizedKVCache)
    late = Decoding(model, ids, kv_bits=8, quantized_kv_start=22, max_tokens=8)
    assert not isinstance(late.cache[0], QuantizedKVCache)
    for _ in range(4):
        late.step()
    assert isinstance(late.cache[0], QuantizedKVCache)


def test_8_bit_cache_keeps_greedy_tokens(model, processor):
    """Of random weights; mm1-tiny's are in test_tiny_quantized_cache.py."""
    for prompt in ("5 17 33 8", "40 41 42", "9 9 9 9 9"):
        plain = generate(model, processor, prompt, max_tokens=16)
        eight = generate(model, processor, prompt, max_tokens=16, kv_bits=8)
        assert eight.token_ids == plain.token_ids


def test_quantized_kv_start_reaches_the_cache(model, processor, monkeypatch):
    starts = []
    make = Decoding.__init__

    def watched(self, *args, **settings):
        starts.append((settings["kv_bits"], settings["quantized_kv_start"]))
        make(self, *args, **settings)

    monkeypatch.setattr(Decoding, "__init__", watched)
    settings = {"max_tokens": 2, "kv_bits": 4, "quantized_kv_start": 1000}
    late = generate(model, processor, "5 17", **settings)
    batch_generate(model, processor, ["5 17"], **settings)
    generate(model, processor, "5 17", max_tokens=2, kv_bits=4)
    assert starts == [(4, 1000), (4, 1000), (4, 0)]
    assert late.token_ids == generate(model, processor, "5 17", max_tokens=2).token_ids


# --- Text and responses ----------------------------------------------------------


def test_pieces_make_the_whole(model, processor):
    whole = generate(model, processor, "5 17 <image>", [1], max_tokens=9)
    pieces = list(stream_generate(model, processor, "5 17 <image>", [1], max_tokens=9))
    assert "".join(piece.text for piece in pieces) == whole.text == str(whole)
    assert tuple(piece.token_id for piece in pieces) == whole.token_ids
    assert [piece.generation_tokens for piece in pieces] == list(range(1, 10))
    assert [piece.finish_reason for piece in pieces] == [None] * 8 + ["length"]


def test_response_of_a_picture_question(model, processor):
    found = generate(model, processor, "5 <image> 7", [1], max_tokens=5)
    assert found.prompt_tokens == 7
    assert found.generation_tokens == len(found.token_ids) == 5
    assert found.token_id == found.token_ids[-1]
    assert (found.num_images, found.image_tokens) == (1, 4)
    assert found.image_sizes == ((16, 16),)
    assert 0 < found.image_seconds < found.ttft
    assert found.prompt_tps > 0
    assert found.generation_tps > 0
    assert found.peak_memory > 0
    assert found.finish_reason == "length"
    with pytest.raises(AttributeError):
        found.text = "other"


def test_decode_rate_leaves_out_the_first_token(model, processor, monkeypatch):
    """Found in a peer: one token gave 21344 tokens per second."""
    ticks = iter([float(i) for i in range(1000)])
    one = generate(model, processor, "5", max_tokens=1)
    assert math.isnan(one.generation_tps)
    import mm1_mlx.inference.generation as module

    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    pieces = list(stream_generate(model, processor, "5", max_tokens=4))
    # Each step takes as long as the next here, so n - 1 tokens take n - 1 steps.
    rates = [piece.generation_tps for piece in pieces[1:]]
    assert rates == [rates[0]] * 3


def test_text_only_response_has_no_image(model, processor):
    found = generate(model, processor, "5", max_tokens=2)
    assert (found.num_images, found.image_tokens, found.image_seconds) == (0, 0, 0)
    assert found.image_sizes == ()


def test_fields_that_callers_rely_on():
    names = {field.name for field in fields(GenerationResponse)}
    assert names == {
        *("text", "token_id", "token_ids", "prompt_tokens", "prompt_tps"),
        "image_tiles",
        *("generation_tokens", "generation_tps", "ttft", "num_images"),
        *("image_tokens", "image_seconds", "image_sizes", "peak_memory"),
        *(
            "finish_reason",
            "reused_tokens",
            "drafted_tokens",
            "accepted_tokens",
            "shots",
            "shot_images",
            "answer_mark",
        ),
    }


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_end_tokens_of_config_and_tokenizer(model, processor, where):
    tokens = generate(model, processor, "5 17", max_tokens=12).token_ids
    end = tokens[-1]
    ended = tokens[: tokens.index(end) + 1]
    if where == "tokenizer":
        processor.tokenizer.eos_token_ids = [end]
    else:
        model = small_model(eos_token_id=[end, 89])
    found = generate(model, processor, "5 17", max_tokens=30)
    assert found.token_ids == ended
    assert found.finish_reason == "stop"
    assert found.text == "".join(f"{token} " for token in ended[:-1])


def test_system_prompt_goes_to_the_processor(model, processor):
    generate(model, processor, "5", system="8 9", max_tokens=1)
    batch_generate(model, processor, ["6"], system="8", max_tokens=1)
    generate(model, processor, "7", max_tokens=1)
    assert processor.seen == [("5", "8 9"), ("6", "8"), ("7", None)]


def test_one_system_prompt_is_enough(model, processor):
    messages = [{"role": "system", "content": "8"}, {"role": "user", "content": "5"}]
    assert generate(model, processor, messages, max_tokens=1).prompt_tokens == 3
    with pytest.raises(PromptError, match="begin with a system message already"):
        generate(model, processor, messages, system="9", max_tokens=1)


# --- Stopping early, threads -----------------------------------------------------


def test_a_stream_can_be_closed(model, processor):
    stream = stream_generate(model, processor, "5 17", max_tokens=100)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert generate(model, processor, "5 17", max_tokens=3).generation_tokens == 3


def test_keyboard_interrupt_passes_through(model, processor, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    stream = stream_generate(model, processor, "5 17", max_tokens=100)
    first = next(stream)
    monkeypatch.setattr(Decoding, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert first.text


def test_wired_limit_does_nothing_without_metal(model, processor):
    with wired_limit():
        assert generate(model, processor, "5", max_tokens=2).generation_tokens == 2


@pytest.mark.metal
def test_wired_limit_is_restored():
    before = mx.set_wired_limit(0)
    with wired_limit():
        pass
    assert mx.set_wired_limit(before) == 0
