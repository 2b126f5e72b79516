"""Guesses and what is reused of earlier calls: neither changes a token."""

import pytest
from small import DENSE, SPARSE, SmallProcessor, small_model
from test_reuse import SHORT, SHOTS, Work
from test_speculative_drafts import same_words

from mm1_mlx.inference.generation import generate
from mm1_mlx.inference.reuse import Reuse


@pytest.mark.parametrize("kind", ["right", "never", "lookup"])
@pytest.mark.parametrize("settings", [{}, {"temp": 0.8, "seed": 3}, {"kv_bits": 8}])
def test_a_conversation_goes_on_with_guesses(kind, settings):
    """The cache that guesses leave behind is that of the tokens that were given."""
    model, processor = small_model(SPARSE), SmallProcessor()
    guesses = {
        "right": {"draft_model": small_model(SPARSE)},
        "never": {"draft_model": small_model(SPARSE, 4)},
        "lookup": {"lookup": 2},
    }[kind]
    store, prompt = Reuse(), "5 17 <image> 33 8 20 41 9 11 12"
    for end in ("7 8", "9", "30 31 32"):
        prompt = f"{prompt} {end}"
        plain = generate(
            model, processor, prompt, [3], reuse=False, max_tokens=9, **settings
        )
        found = generate(
            model, processor, prompt, [3], reuse=store, max_tokens=9,
            num_draft_tokens=4, **settings, **guesses,
        )  # fmt: skip
        assert found.token_ids == plain.token_ids
        prompt += " " + " ".join(map(str, found.token_ids))
    assert found.reused_tokens > 20


@pytest.mark.parametrize("kind", ["reads pictures", "reads text", "a folder"])
def test_a_draft_reads_only_what_is_new_too(kind, monkeypatch, tmp_path):
    model, processor = small_model(SPARSE), same_words(SmallProcessor())
    draft = small_model(DENSE, 4)
    pair = draft if kind == "reads text" else (draft, processor)
    work, found = Work(monkeypatch), []
    for asked in ("50 51", "60"):
        store = Reuse(folder=tmp_path) if kind == "a folder" else None
        answer = generate(
            model, processor, f"{SHOTS} {asked}", [1, 2],
            draft_model=pair, reuse=store, **SHORT,
        )  # fmt: skip
        found.append(work.since())
        plain = generate(
            model, processor, f"{SHOTS} {asked}", [1, 2], reuse=False, **SHORT
        )
        assert answer.token_ids == plain.token_ids
        work.since()
    slots = 8 if kind == "reads text" else 0
    assert found[0] == (2 if slots else 4, 26 + 26 - slots)
    assert found[1] == (0, 1 + 1)
    # Without reuse the draft keeps nothing, either.
    for _ in range(2):
        generate(
            model, processor, SHOTS, [1, 2], draft_model=pair, reuse=False, **SHORT
        )
        assert work.since() == (2 if slots else 4, 24 + 24 - slots)
    assert draft.reuse is None


def test_a_draft_in_training_keeps_nothing(monkeypatch):
    model, draft, processor = small_model(), small_model(seed=4), SmallProcessor()
    draft.train()
    work = Work(monkeypatch)
    for read in (24, 1):
        generate(model, processor, SHOTS, [1, 2], draft_model=draft, **SHORT)
        assert work.since()[1] == read + 24 - 8  # without slots
