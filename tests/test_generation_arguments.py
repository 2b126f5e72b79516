"""What generation accepts: limits, settings, one prompt or many, and the errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import DENSE, SmallProcessor, small_model

from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.inference.generation import batch_generate, generate, stream_generate


def test_the_context_ends_the_answer(processor):
    text = replace(DENSE, max_position_embeddings=10)
    model = small_model(text, eos_token_id=None)
    processor.tokenizer.eos_token_ids = []
    found = generate(model, processor, "5 6 7 8", max_tokens=50)
    assert found.generation_tokens == 5
    assert found.finish_reason == "length"


def test_prompt_over_the_context(processor):
    model = small_model(replace(DENSE, max_position_embeddings=5))
    with pytest.raises(
        PromptError, match="prompt has 5 tokens, but the model's context has 5"
    ):
        generate(model, processor, "5 6 7 8")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be a whole number of 1 or more"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0, but must be"),
        ({"seed": -1}, "seed is -1, but must be a whole number from 0"),
        ({"temp": -1}, "temp is -1, but must be"),
        ({"repetition_penalty": -2}, "repetition_penalty is -2, but must be"),
        ({"max_tokens": None}, "max_tokens is None, but must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True, but must be a whole number"),
        ({"quantized_kv_start": -1}, "quantized_kv_start is -1, but must be"),
        ({"chat_template_config": "x"}, "chat_template_config is 'x', but must be a d"),
        ({"chat_template_config": {1: 2}}, r"is \{1: 2\}, but must be a dict"),
        ({"kv_bits": 3}, "kv_bits is 3, but must be 4, 8 or None"),
        ({"kv_group_size": 48}, "kv_group_size is 48, but must be 32, 64 or 128"),
        ({"stop": ""}, "stop is '', but must be a text of at least one character"),
        ({"on_images": 1}, "on_images is of the type int, but must be a function"),
        ({"stop": ["a", 3]}, r"stop is \['a', 3\], but must be a text"),
    ],
)
def test_settings_out_of_range(model, processor, settings, message):
    """Told when the call is made, not when the first piece is asked for."""
    with pytest.raises(MM1Error, match=message):
        stream_generate(model, processor, "5", **settings)
    with pytest.raises(MM1Error, match=message):
        batch_generate(model, processor, ["5"], **settings)


def test_unknown_settings_are_named(model, processor):
    with pytest.raises(TypeError, match=r"unknown settings \['tempo'\].* temp,"):
        generate(model, processor, "5", tempo=1)


def test_numbers_may_be_numpys(model, processor):
    plain = {"max_tokens": 3, "temp": 1.0, "seed": 5, "top_k": 20, "kv_bits": 8}
    numpys = {
        "max_tokens": np.int64(3),
        "temp": np.float32(1),
        "seed": np.uint32(5),
        "top_k": np.int32(20),
        "kv_bits": np.int64(8),
        "kv_group_size": np.int64(64),
        "prefill_step_size": np.int16(2048),
        "repetition_penalty": np.float32(1),
    }
    expected = generate(model, processor, "5 17", **plain).token_ids
    assert generate(model, processor, "5 17", **numpys).token_ids == expected
    (row,) = batch_generate(model, processor, ["5 17"], **numpys)
    assert row.token_ids == expected


def test_settings_of_the_prompt_reach_the_processor(model):
    seen = []

    class Watched(SmallProcessor):
        def __call__(self, prompt, images=None, **settings):
            seen.append(settings)
            return super().__call__(prompt, images)

    settings = {"use_template": False, "chat_template_config": {"word": "x"}}
    generate(model, Watched(), "5", max_tokens=1, **settings)
    batch_generate(model, Watched(), ["5"], max_tokens=1, **settings)
    generate(model, Watched(), "5", max_tokens=1)
    assert seen == [{"system": None, **settings}] * 2 + [{"system": None}]


# --- One prompt or many ----------------------------------------------------------

TALK = [{"role": "user", "content": "5 6"}]


@pytest.mark.parametrize("verb", [generate, stream_generate])
@pytest.mark.parametrize("prompts", [["5", "6"], ("5",), [], [TALK, TALK], [TALK, "6"]])
def test_a_list_of_prompts_is_for_batch_generate(model, processor, verb, prompts):
    """Only the first one was answered, without a word about the others."""
    with pytest.raises(PromptError, match=r"list of \d .*use batch_generate\."):
        verb(model, processor, prompts, max_tokens=1)
    if prompts:
        with pytest.raises(PromptError, match="For several prompts use"):
            batch_generate(model, processor, ["5", prompts], max_tokens=1)
    assert not [prompt for prompt, _ in processor.seen if prompt != "5"]


@pytest.mark.parametrize("talk", [TALK, tuple(TALK)])
def test_one_conversation_is_one_prompt(model, processor, talk):
    alone = generate(model, processor, "5 6", max_tokens=3).token_ids
    assert generate(model, processor, talk, max_tokens=3).token_ids == alone
    (row,) = batch_generate(model, processor, [talk], max_tokens=3)
    assert row.token_ids == alone


@pytest.mark.parametrize(
    "prompts, images, message",
    [
        ("hi", None, "prompts are one text, but .* Put it into a list, or use gen"),
        (b"hi", None, "prompts are one text"),
        (TALK, None, "prompts are one conversation, but batch_generate takes"),
        (TALK[0], None, "prompts are one conversation"),
        (["5"], "a.png", "images are one str, but batch_generate takes a list with"),
        (["5"], b"abc", "images are one bytes"),
        (["5"], Path("a.png"), r"images are one \w*Path"),
        (["5"], np.zeros((1, 8, 8, 3), np.uint8), "images are one ndarray"),
        (["5", "6"], [[1]], "are 2 prompts but 1 entry of images. Give one entry"),
        (["5"], [[1], []], "are 1 prompt but 2 entries of images"),
    ],
)
def test_a_batch_is_a_list(model, processor, prompts, images, message):
    """A text was taken for as many prompts as it has letters."""
    with pytest.raises(PromptError, match=message) as caught:
        batch_generate(model, processor, prompts, images, max_tokens=1)
    assert "\n" not in str(caught.value)
    assert not processor.seen
