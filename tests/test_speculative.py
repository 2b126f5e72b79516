"""Speculative decoding: guesses change when tokens come, never which."""

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import (
    DENSE,
    SPARSE,
    SmallProcessor,
    small_model,
    step,
)

from helpers import assert_close
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.inference.generation import generate, stream_generate
from mm1_mlx.inference.sampling import make_sampler
from mm1_mlx.inference.speculative import DraftModel, SpeculativeDecoding
from mm1_mlx.inference.steps import Decoding
from mm1_mlx.models.cache import KVCache, QuantizedKVCache
from mm1_mlx.quantization.modules import quantize_model

PROMPT = [1, 5, 17, 33, 8, 5, 17]


def nearly(text=DENSE, seed: int = 0):
    """The model of that seed with noise on its output: right now and then."""
    model = small_model(text, seed)
    head = model.decoder.lm_head
    mx.random.seed(7)
    head.weight = head.weight + 0.15 * mx.random.normal(head.weight.shape)
    mx.eval(head.weight)
    return model


def drafts(text) -> dict:
    """What guesses: always right, sometimes, never, and by lookup."""
    small = replace(DENSE, hidden_size=16, num_hidden_layers=1, head_dim=4)
    return {
        "right": {"draft_model": small_model(text)},
        "sometimes": {"draft_model": nearly(text)},
        "never": {"draft_model": small_model(small, seed=5)},
        "lookup": {"lookup": 3},
    }


def prompts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 90, rng.integers(1, 12)).tolist() for _ in range(count)]
    rows[1] = rows[1] * 4  # something to look up
    return [" ".join(map(str, row)) for row in rows]


class Oracle:
    """Knows the answer, and guesses it right up to the given numbers of tokens."""

    def __init__(self, answer: list[int], right: list[int]):
        self._answer, self._right = answer, list(right)
        self.asked: list[int] = []

    def guess(self, answer, count, choose):
        assert list(answer) == self._answer[: len(answer)]
        self.asked.append(count)
        found = [*self._answer, *[4] * 99][len(answer) :][:count]
        right = self._right.pop(0) if self._right else 0
        found[right:] = [(token + 1) % 90 for token in found[right:]]
        return mx.array(found, mx.uint32)


def answer_of(decoding: Decoding, count: int) -> list[int]:
    return [decoding.step()[0][0] for _ in range(count)]


# --- The same tokens ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["right", "sometimes", "never", "lookup"])
@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
def test_greedy_tokens_are_those_of_plain_decoding(processor, text, kind):
    model, settings = small_model(text), drafts(text)[kind]
    right = guessed = 0
    for i, prompt in enumerate(prompts(6)):
        plain = generate(model, processor, prompt, max_tokens=20)
        for count in (1, 2 + i):
            found = generate(
                model,
                processor,
                prompt,
                max_tokens=20,
                num_draft_tokens=count,
                **settings,
            )
            assert found.token_ids == plain.token_ids
            assert (found.text, found.finish_reason) == (
                plain.text,
                plain.finish_reason,
            )
            right += found.accepted_tokens
            guessed += found.drafted_tokens
    if kind == "never":
        assert right < 0.1 * guessed
    else:
        assert 0 < right <= guessed
    if kind == "sometimes":
        assert right < 0.95 * guessed


@pytest.mark.parametrize("kind", ["right", "sometimes", "never", "lookup"])
def test_a_seed_gives_the_same_answer_with_any_draft(model, processor, kind):
    """The model draws from the same random numbers, which the draft has used too."""
    settings = {"temp": 0.8, "top_p": 0.95, "min_p": 0.01, "max_tokens": 20}
    for seed, prompt in enumerate(prompts(4)):
        plain = generate(model, processor, prompt, seed=seed, **settings)
        found = generate(
            model, processor, prompt, seed=seed, **settings, **drafts(SPARSE)[kind]
        )
        assert found.token_ids == plain.token_ids


def test_a_good_draft_is_often_right_in_samples_too(model, processor):
    """Its guesses come from the model's random numbers: as good as for greedy."""
    found = generate(
        model, processor, "5 6", temp=1.0, seed=3, max_tokens=40, draft_model=model
    )
    assert found.accepted_tokens == found.drafted_tokens > 10


def test_sampled_tokens_have_the_models_probabilities():
    """Against softmax of full forwards, two tokens behind a draft that is wrong."""
    tiny = replace(DENSE, vocab_size=6, hidden_size=16, num_hidden_layers=1, head_dim=4)
    settings = {"vision_config": None, "connector_config": None}
    settings |= {"image_token_id": None, "eos_token_id": None}
    model = small_model(tiny, 1, **settings)
    draft = small_model(tiny, 2, **settings)
    first = mx.softmax(model(mx.array([[1, 2]]))[0, -1])
    after = mx.softmax(model(mx.array([[1, 2, t] for t in range(6)]))[:, -1], axis=-1)
    expected = np.array(first[:, None] * after)  # (6, 6), of both tokens
    runs = 400
    found = np.zeros((6, 6))
    for seed in range(runs):
        drafter = DraftModel(draft, [1, 2])
        decoding = SpeculativeDecoding(
            model,
            mx.array([[1, 2]]),
            drafter=drafter,
            sampler=make_sampler(1.0, seed=seed),
            max_tokens=4,
        )
        one, two = answer_of(decoding, 2)
        found[one, two] += 1 / runs
    assert (first.max() < 0.9) and (expected > 0.02).sum() > 5
    # 36 numbers within four standard deviations
    assert_close(found, expected, atol=4 * (0.25 / runs) ** 0.5 * 0.7)


@pytest.mark.parametrize("kind", ["right", "sometimes", "never", "lookup"])
def test_penalties_see_the_guesses(model, processor, kind):
    settings = {"repetition_penalty": 3.0, "repetition_context_size": 6}
    for more in ({}, {"temp": 0.7, "seed": 2}):
        more |= {"max_tokens": 24, **settings}
        plain = generate(model, processor, "5 17 33", **more)
        found = generate(model, processor, "5 17 33", **more, **drafts(SPARSE)[kind])
        assert found.token_ids == plain.token_ids
        if kind == "right":
            assert found.accepted_tokens == found.drafted_tokens


def test_logits_processors_are_called_with_what_stands_before():
    model = small_model(DENSE)
    plain: list = []
    seen: list = []

    def watch(lengths):
        def forbid(tokens, logits):  # what stands two places before
            lengths.append(tokens.shape[1])
            column = tokens[:, -2:-1]
            return mx.put_along_axis(logits, column, mx.array(-1e9), axis=-1)

        return [forbid]

    ids = mx.array([PROMPT])
    one = Decoding(model, ids, max_tokens=12, logits_processors=watch(plain))
    expected = answer_of(one, 12)
    drafter = Oracle(expected, [3, 1, 0, 2])
    two = SpeculativeDecoding(
        model, ids, drafter=drafter, max_tokens=12, logits_processors=watch(seen)
    )
    assert answer_of(two, 12) == expected
    assert plain == list(range(7, 19))
    assert seen[:5] == [7, 8, 9, 10, 11]  # the first, then one check of three guesses


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("start", [0, 9, 16])
@pytest.mark.parametrize("right", [[9] * 9, [1, 0, 2, 0, 3], [0] * 30])
def test_quantized_caches(bits, start, right):
    """start: quantized from the beginning, in the midst, at a place between guesses."""
    model = small_model(DENSE)
    ids = mx.array([PROMPT])
    settings = {"kv_bits": bits, "quantized_kv_start": start, "max_tokens": 20}
    expected = answer_of(Decoding(model, ids, **settings), 20)
    found = SpeculativeDecoding(
        model, ids, drafter=Oracle(expected, right), num_draft_tokens=4, **settings
    )
    assert answer_of(found, 20) == expected
    assert isinstance(found.cache[0], QuantizedKVCache)


def test_packed_weights(processor):
    """Of 4 bits: MLX's product of one row and of several are other code."""
    model = small_model(DENSE)
    how = {"group_size": 32, "bits": 4, "mode": "affine"}
    fits = ("qkv_proj", "o_proj", "gate_up_proj", "lm_head")
    quantize_model(
        model,
        lambda path: (
            how if path.startswith("decoder") and path.endswith(fits) else None
        ),
    )
    plain = generate(model, processor, "5 17 33", max_tokens=24).token_ids
    for more in ({"draft_model": small_model(DENSE)}, {"draft_model": model}):
        found = generate(model, processor, "5 17 33", max_tokens=24, **more)
        assert found.token_ids == plain


def test_adapters_go_with_a_draft(processor):
    model = small_model(DENSE)
    draft = small_model(DENSE)
    before = generate(model, processor, "5 17 33", max_tokens=16).token_ids
    pairs = Target(pairs=PairSettings(rank=4, scale=2.5))
    adapt(model, Plan(parts={"attention": pairs, "mlp": pairs}))
    step(model)
    model.eval()
    plain = generate(model, processor, "5 17 33", max_tokens=16).token_ids
    assert plain != before
    for more in ({"draft_model": draft}, {"draft_model": model}, {"lookup": 2}):
        found = generate(model, processor, "5 17 33", max_tokens=16, **more)
        assert found.token_ids == plain


@pytest.mark.parametrize("start", [0, 14])
def test_each_step_may_run_in_another_thread(model, processor, start):
    settings = {"max_tokens": 12, "temp": 0.7, "seed": 4, "repetition_penalty": 1.1}
    settings |= {"kv_bits": 8, "quantized_kv_start": start}
    prompt = "5 17 33 <image> 8 20"
    expected = generate(model, processor, prompt, [1], **settings)
    draft = {"draft_model": nearly(SPARSE)}
    generate(draft["draft_model"], processor, "5", max_tokens=1)  # nothing is lazy now
    stream = stream_generate(model, processor, prompt, [1], **settings, **draft)
    found: list = []
    for _ in expected.token_ids:
        thread = threading.Thread(target=lambda: found.extend(next(stream).token_ids))
        thread.start()
        thread.join(60)
    assert tuple(found) == expected.token_ids


# --- How many guesses, and where they end ----------------------------------------


def test_guesses_are_counted_and_checks_are_few():
    model = small_model(DENSE, eos_token_id=None)
    ids = mx.array([PROMPT])
    expected = answer_of(Decoding(model, ids, max_tokens=12), 12)
    oracle = Oracle(expected, [3, 1, 0])
    found = SpeculativeDecoding(
        model, ids, drafter=oracle, num_draft_tokens=3, max_tokens=12
    )
    counts = []
    for token in expected:
        (given,), logprobs = found.step()
        assert (given, logprobs.shape) == (token, (1, 90))
        counts.append((found.drafted, found.accepted))
    # One of the prompt; a check of 3 right guesses and one more token; one of 1; of 0.
    assert counts[:5] == [(0, 0), (3, 1), (3, 2), (3, 3), (3, 3)]
    assert counts[5:8] == [(6, 4), (6, 4), (9, 4)]
    # Guesses leave room for the token behind them.
    assert oracle.asked[:3] == [3, 3, 3]
    assert oracle.asked[-2:] == [2, 1]


def test_an_answer_costs_fewer_runs_of_the_model(model, processor, monkeypatch):
    runs = []
    hidden = type(model.decoder).hidden

    def watched(self, *args, **settings):
        runs.append(self)
        return hidden(self, *args, **settings)

    monkeypatch.setattr(type(model.decoder), "hidden", watched)
    draft = small_model()
    settings = {"max_tokens": 21, "draft_model": draft, "num_draft_tokens": 4}
    found = generate(model, processor, "5 17 33", **settings)
    assert found.generation_tokens == 21
    assert sum(one is model.decoder for one in runs) == 1 + 4  # the prompt, 4 checks


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("kind", ["right", "lookup", "never"])
def test_max_tokens_inside_the_guesses(model, processor, max_tokens, kind):
    settings = {"max_tokens": max_tokens, "num_draft_tokens": 6}
    plain = generate(model, processor, "5 17 5 17 5", max_tokens=max_tokens)
    found = generate(
        model, processor, "5 17 5 17 5", **settings, **drafts(SPARSE)[kind]
    )
    assert found.token_ids == plain.token_ids
    assert found.generation_tokens == max_tokens
    assert found.finish_reason == "length"
    assert found.drafted_tokens <= max(0, (max_tokens - 1) * 6)
    assert found.accepted_tokens < max_tokens


@pytest.mark.parametrize("at", range(1, 8))
def test_the_end_inside_the_guesses(processor, at):
    """An end token among right guesses: what was guessed behind it is not given."""
    tokens = generate(
        small_model(DENSE, eos_token_id=None), processor, "5 17", max_tokens=9
    ).token_ids
    end = tokens[at]
    ended = tokens[: tokens.index(end) + 1]
    model = small_model(DENSE, eos_token_id=end)
    found = generate(
        model,
        processor,
        "5 17",
        max_tokens=30,
        draft_model=small_model(DENSE),
        num_draft_tokens=5,
    )
    assert (found.token_ids, found.finish_reason) == (ended, "stop")
    assert found.text == "".join(f"{token} " for token in ended[:-1])
    assert found.accepted_tokens <= len(ended)


def test_stop_strings_inside_the_guesses(model):
    tokens = generate(model, SmallProcessor(), "5 17", max_tokens=9).token_ids
    processor = SmallProcessor({tokens[3]: "the en", tokens[4]: "d, and on"})
    settings = {"max_tokens": 9, "stop": "end"}
    plain = generate(model, processor, "5 17", **settings)
    found = generate(model, processor, "5 17", draft_model=model, **settings)
    assert found.text == plain.text
    assert found.text.endswith("the ") and found.finish_reason == "stop"


def test_pieces_tell_the_counts_so_far(model, processor):
    pieces = list(
        stream_generate(model, processor, "5 17", max_tokens=9, draft_model=model)
    )
    right = [piece.accepted_tokens for piece in pieces]
    assert right == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert [piece.generation_tokens for piece in pieces] == list(range(1, 10))
    plain = generate(model, processor, "5 17", max_tokens=3)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (None, None)


def test_a_stream_can_be_closed(model, processor):
    stream = stream_generate(
        model, processor, "5 17", max_tokens=100, draft_model=model
    )
    assert next(stream).token_ids and next(stream).token_ids
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


# --- Caches after wrong guesses --------------------------------------------------


@pytest.mark.parametrize("right", [[3] * 9, [1, 0, 2, 0, 3], [0] * 30])
def test_caches_forget_wrong_guesses(right):
    model = small_model(DENSE)
    ids = mx.array([PROMPT])
    expected = answer_of(Decoding(model, ids, max_tokens=14), 14)
    found = SpeculativeDecoding(
        model, ids, drafter=Oracle(expected, right), max_tokens=14
    )
    assert answer_of(found, 14) == expected
    whole = model.make_cache()
    read = found.cache[0].offset
    assert read <= len(PROMPT) + 13  # nothing read the last token
    model.decoder.hidden(mx.array([PROMPT + expected])[:, :read], whole)
    for one, two in zip(found.cache, whole, strict=True):
        assert type(one) is KVCache and one.offset == two.offset
        for actual, wanted in zip(one.state, two.state, strict=True):
            assert_close(actual, wanted, atol=1e-5)  # products of other shapes


def test_a_draft_model_forgets_its_wrong_guesses():
    """Its guesses are those that it would give to the true text."""
    draft, rng = small_model(DENSE, 3), np.random.default_rng(1)
    drafter = DraftModel(draft, PROMPT)

    def choose(logits, before):
        return mx.argmax(logits, axis=-1)

    answer = [7]
    for _ in range(6):
        found = drafter.guess(answer, 4, choose).tolist()
        ids = PROMPT + answer
        for guess in found:
            assert guess == int(mx.argmax(draft(mx.array([ids]))[0, -1]))
            ids.append(guess)
        right = int(rng.integers(0, 5))
        answer += [*found[:right], int(rng.integers(4, 90))]
