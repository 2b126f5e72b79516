"""Speculative decoding: guesses change when tokens come, never which."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from small import (
    DENSE,
    EOS,
    IMAGE,
    SPARSE,
    SmallProcessor,
    small_model,
    step,
)

from helpers import assert_close
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.inference.generation import batch_generate, generate, stream_generate
from mm1_mlx.inference.sampling import make_sampler
from mm1_mlx.inference.speculative import DraftModel, Lookup, SpeculativeDecoding
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


# --- Lookup ----------------------------------------------------------------------


def looked_up(prompt, answer, count, longest=3, unusable=()):
    lookup = Lookup(prompt, longest, lambda token: token not in unusable)
    return lookup.guess(answer, count, None).tolist()


@pytest.mark.parametrize(
    "prompt, answer, expected",
    [
        ([1, 2, 3, 9, 8], [1, 2], [3, 9, 8]),
        ([1, 2, 3, 9, 8], [5], []),
        ([1, 2, 3], [4], []),
        ([5], [5], [5, 5, 5]),  # a round goes on
        ([7, 8], [7, 8, 7], [8, 7, 8]),
        ([1, 2, 3, 7, 2, 4, 7], [2], [4, 7, 2]),  # 7 2 is found, and not 2 alone
        ([2, 3, 1, 2, 4, 1], [2], [4, 1, 2]),
        ([9, 2, 3, 8, 2, 4, 7], [2], [4, 7, 2]),  # the last 2
    ],
)
def test_lookup_by_hand(prompt, answer, expected):
    assert looked_up(prompt, answer, 3) == expected


def test_lookup_takes_the_longest_likeness_up_to_its_number():
    prompt = [1, 2, 3, 50, 9, 3, 60]
    assert looked_up(prompt, [1, 2, 3], 1, longest=1) == [60]
    assert looked_up(prompt, [1, 2, 3], 1, longest=3) == [50]


def test_lookup_never_guesses_an_image_slot():
    prompt = [5, 6, IMAGE, IMAGE, 7]
    assert looked_up(prompt, [5], 4, unusable={IMAGE}) == [6]
    assert looked_up(prompt, [6], 4, unusable={IMAGE}) == []


def test_lookup_follows_the_answer():
    lookup = Lookup([1, 2, 3], 2, lambda token: True)
    assert lookup.guess([9], 2, None).tolist() == []
    assert lookup.guess([9, 4, 1, 2], 2, None).tolist() == [3, 9]
    assert lookup.guess([9, 4, 1, 2, 7, 9], 2, None).tolist() == [4, 1]


# --- Pictures and other vocabularies ---------------------------------------------


def test_a_draft_without_eyes_reads_the_prompt_without_slots(model, processor):
    text_only = small_model(
        DENSE, vision_config=None, connector_config=None, image_token_id=None
    )
    prompt = "5 <image> 9 <image> 7"
    plain = generate(model, processor, prompt, [1, 2], max_tokens=16)
    seen = []
    hidden = type(text_only.decoder).hidden

    class Watched(type(text_only.decoder)):
        def hidden(self, inputs, cache=None, input_embeddings=None, **settings):
            shown = inputs if input_embeddings is None else input_embeddings
            seen.append(shown.shape[1])
            return hidden(self, inputs, cache, input_embeddings, **settings)

    text_only.decoder.__class__ = Watched
    for draft in (text_only, (text_only, processor)):
        found = generate(
            model, same_words(processor), prompt, [1, 2], max_tokens=16,
            draft_model=same_words(draft),
        )  # fmt: skip
        assert found.token_ids == plain.token_ids
        assert seen[0] == 4  # 1 5 9 7
        seen.clear()


def same_words(thing, size: int = 90, marks: tuple[int, ...] = ()):
    """A processor (or a draft's) with a vocabulary to compare."""
    if isinstance(thing, tuple):
        return thing[0], same_words(thing[1], size, marks)
    if not isinstance(thing, SmallProcessor):
        return thing
    copy = SmallProcessor(thing.words)
    copy.seen = thing.seen
    copy.tokenizer = SimpleNamespace(
        eos_token_ids=[EOS],
        reads_text=True,
        vocab_size=size,
        marks={f"<{i}>": i for i in marks},
        piece=lambda i, skip_special=True: b"%d" % i,
    )
    return copy


def test_a_draft_with_eyes_sees_the_pictures_by_its_own_processor(model):
    processor, its = same_words(SmallProcessor()), same_words(SmallProcessor())
    draft = (small_model(), its)
    settings = {"max_tokens": 16, "system": "8 9"}
    plain = generate(model, processor, "5 <image>", [3], **settings)
    found = generate(model, processor, "5 <image>", [3], draft_model=draft, **settings)
    assert found.token_ids == plain.token_ids
    assert found.accepted_tokens == found.drafted_tokens > 8  # it sees what we see
    assert its.seen == [("5 <image>", "8 9")]
    blind = generate(
        model, processor, "5 <image>", [3], draft_model=draft[0], **settings
    )
    assert blind.token_ids == plain.token_ids
    assert blind.accepted_tokens < blind.drafted_tokens


@pytest.mark.parametrize("its_size", [80, 90, 112])
def test_rows_that_no_token_uses_may_differ(model, its_size):
    """Vocabularies are padded to round numbers of rows."""
    processor = same_words(SmallProcessor())
    draft = small_model(replace(DENSE, vocab_size=its_size), seed=0)
    pair = (draft, same_words(SmallProcessor()))
    for settings in ({}, {"temp": 1.0, "seed": 1}):
        for prompt in ("85 86 87", "5 17 88 33"):
            plain = generate(model, processor, prompt, max_tokens=20, **settings)
            found = generate(
                model, processor, prompt, max_tokens=20, draft_model=pair, **settings
            )
            assert found.token_ids == plain.token_ids


def test_an_id_that_a_draft_does_not_have_is_read_as_another():
    """MLX checks no index: a row beyond the embedding is whatever lies there."""
    draft = small_model(DENSE)  # 90 rows

    def guesses(token):
        drafter = DraftModel(draft, PROMPT)
        return drafter.guess([token, 5], 3, lambda x, _: mx.argmax(x, -1)).tolist()

    assert guesses(90) == guesses(10**6) == guesses(0) != guesses(40)


def test_marks_that_only_one_has_are_no_difference(model):
    processor = same_words(SmallProcessor(), 90, marks=(88, 89))
    draft = (small_model(), same_words(SmallProcessor(), 88))
    plain = generate(model, processor, "5 6", max_tokens=5)
    found = generate(model, processor, "5 6", max_tokens=5, draft_model=draft)
    assert found.token_ids == plain.token_ids


def test_a_draft_stops_guessing_where_its_context_ends(processor):
    model = small_model(DENSE, eos_token_id=None)
    draft = small_model(replace(DENSE, max_position_embeddings=12))
    plain = generate(model, processor, "5 17 33", max_tokens=30).token_ids
    found = generate(model, processor, "5 17 33", max_tokens=30, draft_model=draft)
    assert found.token_ids == plain
    assert 0 < found.drafted_tokens <= 9


# --- What is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lookup": 0}, "lookup is 0, but must be a whole number from 1 to 16"),
        ({"lookup": 17}, "lookup is 17, but must be a whole number from 1 to 16"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0, but must be a whole number"),
        ({"num_draft_tokens": 65}, "is 65, but must be a whole number from 1 to 64"),
        ({"num_draft_tokens": None}, "num_draft_tokens is None, but must be a whole"),
        ({"draft_model": "x"}, r"is of the type str, but must be a model, or what l"),
        ({"draft_model": (1, 2, 3)}, "is of the type tuple, but must be a model"),
    ],
)
def test_settings_out_of_range(model, processor, settings, message):
    for verb, prompt in ((stream_generate, "5"), (batch_generate, ["5"])):
        with pytest.raises(MM1Error, match=message):
            verb(model, processor, prompt, **settings)


def test_one_guesser_is_enough(model, processor):
    with pytest.raises(MM1Error, match="draft_model and lookup were both given"):
        stream_generate(model, processor, "5", draft_model=model, lookup=2)


@pytest.mark.parametrize("name", ["draft_model", "lookup"])
def test_batches_do_not_guess(model, processor, name):
    given = {"draft_model": model, "lookup": 2}[name]
    with pytest.raises(MM1Error, match=f"batch_generate takes no {name}: .*Use genera"):
        batch_generate(model, processor, ["5", "6"], **{name: given})


def test_a_draft_of_another_vocabulary(model):
    wide = small_model(replace(DENSE, vocab_size=96))
    mine = same_words(SmallProcessor())
    with pytest.raises(MM1Error, match=r"has 96 tokens, the model 90\. .*load\(\) gav"):
        stream_generate(model, mine, "5", draft_model=wide)
    other = same_words(SmallProcessor(), 96)
    with pytest.raises(MM1Error, match="is not the model's: it has 96 tokens, the mod"):
        stream_generate(model, mine, "5", draft_model=(wide, other))
    other = same_words(SmallProcessor())
    other.tokenizer.piece = lambda i, skip_special=True: b"x" if i == 40 else b"%d" % i
    with pytest.raises(MM1Error, match=r"its token 40 is 'x', the model's '40'\. Take"):
        stream_generate(model, mine, "5", draft_model=(small_model(), other))


@pytest.mark.parametrize("shared", ["model", "draft"])
def test_processes_that_share_a_model_take_no_draft_model(processor, shared):
    model, draft = small_model(DENSE), small_model(DENSE)
    {"model": model, "draft": draft}[shared].decoder.group = object()
    with pytest.raises(MM1Error, match=r"use lookup \(--lookup\), or a single process"):
        stream_generate(model, processor, "5", draft_model=draft)


def test_a_prompt_over_the_drafts_context(model, processor):
    draft = small_model(replace(DENSE, max_position_embeddings=4))
    with pytest.raises(PromptError, match="prompt has 5 tokens for the draft model, w"):
        generate(model, processor, "5 6 7 8", draft_model=draft)
