"""What is kept between answers: the same tokens, with less work."""

import threading
from contextlib import ExitStack

import mlx.core as mx
import pytest
from small import DENSE, SPARSE, SmallProcessor, small_model

from helpers import assert_close
from mm1_mlx import Reuse
from mm1_mlx.inference.generation import batch_generate, generate, stream_generate
from mm1_mlx.inference.steps import Decoding
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.mm1 import MM1

SHOTS = "5 17 33 <image> 8 20 41 7 12 9 30 31 32 <image> 44 45 46"  # 23 tokens
ASKED = ["50 51", "60 61 62 63", "70"]
SHORT = {"max_tokens": 12}


class Work:
    """How many pictures were encoded, and how many tokens a prompt's pieces had."""

    def __init__(self, monkeypatch):
        self.pictures = self.tokens = 0
        encode, hidden = MM1.encode_images, Decoder.hidden

        def encodes(model, pixels, *args, **settings):
            self.pictures += pixels.shape[0]
            return encode(model, pixels, *args, **settings)

        def reads(decoder, inputs, cache=None, embeddings=None, **settings):
            if embeddings is not None:
                self.tokens += embeddings.shape[0] * embeddings.shape[1]
            return hidden(decoder, inputs, cache, embeddings, **settings)

        monkeypatch.setattr(MM1, "encode_images", encodes)
        monkeypatch.setattr(Decoder, "hidden", reads)

    def since(self) -> tuple[int, int]:
        found, self.pictures, self.tokens = (self.pictures, self.tokens), 0, 0
        return found


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


def plain(model, processor, prompt, images=None, **settings):
    """The answer without reuse."""
    return generate(model, processor, prompt, images, reuse=False, **settings)


# --- the same tokens, with less work -------------------------------------------------


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_bits": 8},
        {"kv_bits": 4, "prefill_step_size": 7},
        {"kv_bits": 4, "quantized_kv_start": 18, "prefill_step_size": 7},
        {"prefill_step_size": 5},
        {"repetition_penalty": 1.5, "repetition_context_size": 40},
        {"temp": 1.0, "seed": 3, "top_k": 20},
    ],
    ids=str,
)
def test_tokens_are_those_of_a_run_without_reuse(text, settings):
    model, processor = small_model(text), SmallProcessor()
    for asked in ASKED:
        prompt = f"{SHOTS} {asked}"
        found = generate(model, processor, prompt, [1, 2], **SHORT, **settings)
        expected = plain(model, processor, prompt, [1, 2], **SHORT, **settings)
        assert found.token_ids == expected.token_ids
        assert found.prompt_tokens == expected.prompt_tokens
        assert expected.reused_tokens == 0
        if asked != ASKED[0]:
            # Read before the cache was first quantized, and not the last of these.
            most = {7: 20 if "quantized_kv_start" in settings else 6}
            size = settings.get("prefill_step_size", 0) * ("kv_bits" in settings)
            worth = min(most.get(size, 24), 24)
            assert found.reused_tokens == (worth if worth >= 8 else 0)


def test_logits_are_those_of_the_whole_prompt():
    model = small_model()
    ids = mx.array([[1, *range(5, 45)]])
    cache = model.make_cache()
    model.decoder.hidden(ids[:, :29], cache)
    whole, rest = Decoding(model, ids), Decoding(model, ids, cache=cache, reused=29)
    for _ in range(5):
        (tokens, expected), (found, actual) = whole.step(), rest.step()
        assert found == tokens
        assert_close(actual, expected, atol=2e-5)  # order of sums


def test_a_second_question_encodes_and_reads_only_what_is_new(work):
    model, processor = small_model(), SmallProcessor()
    generate(model, processor, f"{SHOTS} 50 51", [1, 2], **SHORT)
    assert work.since() == (2, 26)
    second = generate(model, processor, f"{SHOTS} 60", [1, 2], **SHORT)
    assert work.since() == (0, 1)
    assert second.reused_tokens == 24 and second.num_images == 2
    assert second.image_seconds == 0
    # The same pictures in another place: their features are known, their keys are not.
    moved = generate(model, processor, f"9 {SHOTS} 60", [1, 2], **SHORT)
    assert work.since() == (0, 26)
    assert (
        moved.token_ids
        == plain(model, processor, f"9 {SHOTS} 60", [1, 2], **SHORT).token_ids
    )


def test_the_same_question_again_reads_its_last_token(work):
    model, processor = small_model(), SmallProcessor()
    first = generate(model, processor, SHOTS, [1, 2], **SHORT)
    work.since()
    again = generate(model, processor, SHOTS, [1, 2], **SHORT)
    assert work.since() == (0, 1)
    assert again.token_ids == first.token_ids
    assert again.reused_tokens == first.prompt_tokens - 1


def test_another_picture_misses(work):
    model, processor = small_model(), SmallProcessor()
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    work.since()
    found = generate(model, processor, SHOTS, [1, 3], **SHORT)
    assert work.since() == (1, 24 - 17)  # up to the second picture it is the same
    assert found.token_ids == plain(model, processor, SHOTS, [1, 3], **SHORT).token_ids
    swapped = generate(model, processor, SHOTS, [2, 1], **SHORT)
    expected = plain(model, processor, SHOTS, [2, 1], **SHORT)
    assert swapped.token_ids == expected.token_ids
    assert swapped.reused_tokens == 0  # fewer than are worth it


def test_a_conversation_reuses_its_answers(work):
    """The second turn begins with the first, its answer among it."""
    model, processor = small_model(), SmallProcessor()
    first = generate(model, processor, SHOTS, [1, 2], **SHORT)
    answer = " ".join(map(str, first.token_ids))
    talk = f"{SHOTS} {answer} 80 81 82"
    work.since()
    second = generate(model, processor, talk, [1, 2], **SHORT)
    # All but the last token of the answer was read to make it.
    assert work.since() == (0, 4)
    assert second.token_ids == plain(model, processor, talk, [1, 2], **SHORT).token_ids


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_went(pieces, work):
    model, processor = small_model(), SmallProcessor()
    stream = stream_generate(model, processor, SHOTS, [1, 2], **SHORT)
    told = [next(stream).token_id for _ in range(pieces)]
    stream.close()
    work.since()
    talk = f"{SHOTS} {' '.join(map(str, told))} 80 81"
    found = generate(model, processor, talk, [1, 2], **SHORT)
    assert work.since() == (0, 2)
    assert found.token_ids == plain(model, processor, talk, [1, 2], **SHORT).token_ids


def test_a_generator_that_is_collected_waits_for_nothing():
    """Python may end one in the midst of anything, while its thread holds a lock."""
    model, processor, store = small_model(), SmallProcessor(), Reuse()
    stream = stream_generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
    next(stream)
    locks = [store._lock, store._disk, store._wholes._lock, store._eyes._lock]
    locks += [store._features._lock, store.pixels._lock]
    thread = threading.Thread(target=stream.close)
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waits for a lock"
    again = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
    assert again.reused_tokens == 23


def test_answers_that_were_broken_off_are_their_models_own():
    one, two, processor = small_model(), small_model(seed=1), SmallProcessor()
    store = Reuse()
    for model in (one, two):
        stream = stream_generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        next(stream)
        stream.close()
    for model in (one, two):
        found = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        assert found.reused_tokens == 23
        expected = plain(model, processor, SHOTS, [1, 2], **SHORT)
        assert found.token_ids == expected.token_ids


def test_no_memory_for_it_spoils_no_answer(monkeypatch):
    def full(*args):
        raise RuntimeError("[malloc] Unable to allocate 7 bytes.")

    model, processor, store = small_model(), SmallProcessor(), Reuse()
    monkeypatch.setattr(store._prompts, "add", full)
    for _ in range(2):
        found = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        assert found.finish_reason and found.reused_tokens == 0


def test_what_is_kept_is_not_changed_by_answers_that_go_on_from_it():
    model, processor = small_model(), SmallProcessor()
    expected = [
        plain(model, processor, f"{SHOTS} {asked}", [1, 2], **SHORT).token_ids
        for asked in ASKED
    ]
    streams = [
        stream_generate(model, processor, f"{SHOTS} {asked}", [1, 2], **SHORT)
        for asked in ASKED
    ]
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    for _ in range(2):  # begun from the same, then going on by turns
        found = [[] for _ in ASKED]
        for _ in range(12):
            for tokens, stream in zip(found, streams, strict=True):
                tokens += [piece.token_id for piece in [next(stream, None)] if piece]
        assert [tuple(tokens) for tokens in found] == expected
        streams = [
            stream_generate(model, processor, f"{SHOTS} {asked}", [1, 2], **SHORT)
            for asked in ASKED
        ]


# --- batches: examples for many questions --------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_bits": 8}, {"repetition_penalty": 1.5}, {"prefill_step_size": 9}],
    ids=str,
)
def test_rows_read_what_they_share_once(settings, work):
    model, processor = small_model(), SmallProcessor()
    prompts = [f"{SHOTS} {asked}" for asked in [*ASKED, "50 51 52 53 54 55"]]
    images = [[1, 2]] * 4
    given = settings | SHORT
    found = batch_generate(model, processor, prompts, images, **given)
    pictures, tokens = work.since()
    assert pictures == 2
    assert tokens == 24 + 4 * 6  # the examples once, then what the longest row adds
    # The first row has read the examples for all. The rows end together and begin in
    # one column, so shorter ones read some of their examples again.
    assert [row.reused_tokens for row in found] == [0, 22, 19, 24]
    for prompt, row in zip(prompts, found, strict=True):
        alone = plain(model, processor, prompt, [1, 2], **given)
        assert row.token_ids == alone.token_ids
    work.since()
    later = generate(model, processor, f"{SHOTS} 88 89", [1, 2], **given)
    assert work.since() == (0, 2)
    assert later.reused_tokens == 24


def test_rows_of_a_later_batch_begin_with_their_own(work):
    """Different pictures, each asked about before; one row is new in part."""
    model, processor = small_model(), SmallProcessor()
    text = "<image> 10 11 12 13 14 15"
    images = [[1], [2], [3]]
    batch_generate(model, processor, [text] * 3, images, **SHORT)
    work.since()
    prompts = [f"{text} 50", f"{text} 60 61 62", f"{text} 70 71"]
    found = batch_generate(model, processor, prompts, images, **SHORT)
    assert work.since() == (0, 3 * 3)
    assert [row.reused_tokens for row in found] == [9, 11, 10]
    for prompt, image, row in zip(prompts, images, found, strict=True):
        expected = plain(model, processor, prompt, image, **SHORT)
        assert row.token_ids == expected.token_ids


def test_a_row_that_is_new_is_read_whole(work):
    model, processor = small_model(), SmallProcessor()
    generate(model, processor, f"{SHOTS} 50", [1, 2], **SHORT)
    work.since()
    prompts, images = [f"{SHOTS} 60", "<image> 9 8 7"], [[1, 2], [4]]
    found = batch_generate(model, processor, prompts, images, **SHORT)
    assert work.since() == (1, 2 * 7)  # the second row: all but its begin-of-text
    assert [row.reused_tokens for row in found] == [18, 1]
    for prompt, image, row in zip(prompts, images, found, strict=True):
        expected = plain(model, processor, prompt, image, **SHORT)
        assert row.token_ids == expected.token_ids


def test_short_rows_are_kept_without_their_padding(work):
    model, processor = small_model(), SmallProcessor()
    prompts, images = [SHOTS, "9 17 33 <image> 8 20 41"], [[1, 2], [2]]
    batch_generate(model, processor, prompts, images, **SHORT)
    for prompt, pictures in zip(prompts, images, strict=True):
        work.since()
        found = generate(model, processor, f"{prompt} 50", pictures, **SHORT)
        assert work.since() == (0, 1)
        expected = plain(model, processor, f"{prompt} 50", pictures, **SHORT)
        assert found.token_ids == expected.token_ids


def test_penalties_see_the_whole_prompt_of_each_row():
    model, seen = small_model(), []
    rows = mx.array([[1, *range(5, 25)], [0, 0, 0, 1, *range(30, 47)]])

    def look(history, logits):
        seen.append(history.tolist())
        return logits

    cache = model.make_cache(left_padding=[0, 3])
    model.decoder.hidden(rows[:, :12], cache)
    for given in ({"cache": cache, "reused": 12}, {"left_padding": [0, 3]}):
        Decoding(model, rows, logits_processors=[look], **given)
    assert seen[0] == seen[1]
    assert seen[0] == [rows[0].tolist(), [1, 1, 1, 1, *range(30, 47)]]
