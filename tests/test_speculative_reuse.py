"""Guesses and what is reused of earlier calls: neither changes a token."""

import pytest
from small import SPARSE, SmallProcessor, small_model

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
