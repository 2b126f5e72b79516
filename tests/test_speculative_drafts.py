"""Who guesses: lookup, drafts of other words and eyes, and which are refused."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from small import (
    DENSE,
    EOS,
    IMAGE,
    SmallProcessor,
    small_model,
)

from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.inference.generation import batch_generate, generate, stream_generate
from mm1_mlx.inference.speculative import DraftModel, Lookup

PROMPT = [1, 5, 17, 33, 8, 5, 17]


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
