"""Batches: each row equals its solo run, finished rows leave."""

import mlx.core as mx
import pytest
from small import DENSE, IMAGE, SPARSE, SmallProcessor, random_array, small_model

from helpers import assert_close
from mm1_mlx.inference.generation import batch_generate, generate
from mm1_mlx.inference.steps import Decoding, padded_history

PROMPTS = ["5 17 33 8 20 41 7 12 9", "<image> 40", "6 <image> 7 <image> 8", "9", "9 9"]
IMAGES = [[], [1], [2, 3], None, []]


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_step_size": 4},
        {"repetition_penalty": 1.5, "repetition_context_size": 12},
    ],
    ids=str,
)
def test_rows_of_a_batch_equal_their_solo_runs(processor, text, settings):
    model = small_model(text)
    settings = settings | {"max_tokens": 30}
    batch = batch_generate(model, processor, PROMPTS, IMAGES, **settings)
    for prompt, images, found in zip(PROMPTS, IMAGES, batch, strict=True):
        alone = generate(model, processor, prompt, images, **settings)
        assert found.token_ids == alone.token_ids
        assert (found.text, found.finish_reason) == (alone.text, alone.finish_reason)
        assert found.prompt_tokens == alone.prompt_tokens
        assert found.num_images == alone.num_images == len(images or [])
        assert found.image_tokens == alone.image_tokens == 4 * len(images or [])


def test_penalties_see_no_padding():
    ids = mx.array([[0, 0, 5, 6], [7, 8, 9, 5]])
    assert padded_history(ids, [2, 0]).tolist() == [[5, 5, 5, 6], [7, 8, 9, 5]]
    assert padded_history(ids, None) is ids


def test_logits_of_a_padded_row_equal_the_row_alone(model):
    rows = [[1, 5, 17, 33, 8, 20], [1, 9]]
    batch = mx.array([rows[0], [0] * 4 + rows[1]])
    together = Decoding(model, batch, left_padding=[0, 4], max_tokens=6)
    alone = [Decoding(model, mx.array([row]), max_tokens=6) for row in rows]
    for _ in range(6):
        _, logprobs = together.step()
        for i, decoding in enumerate(alone):
            _, expected = decoding.step()
            assert_close(logprobs[i : i + 1], expected, atol=2e-5)  # order of sums


def with_ends(model, processor, prompts, n=30):
    """Rewrite the model's end token to one that ends these answers at various times."""
    answers = [generate(model, processor, p, max_tokens=n).token_ids for p in prompts]
    for token in sorted({t for answer in answers for t in answer}):
        places = [a.index(token) if token in a else n for a in answers]
        if len(set(places)) >= 3 and min(places) > 0:
            return token, places
    raise AssertionError("no token ends these answers at three different places")


def test_finished_rows_leave_the_batch(processor, monkeypatch):
    model = small_model()
    prompts = ["5 17 33 8 20 41", "9", "40 41", "7 7 7 7"]
    token, _ = with_ends(model, processor, prompts)
    processor.tokenizer.eos_token_ids = [token]
    sizes = []
    step = Decoding.step

    def watched(self):
        tokens, logprobs = step(self)
        sizes.append(len(tokens))
        return tokens, logprobs

    alone = [generate(model, processor, p, max_tokens=30) for p in prompts]
    monkeypatch.setattr(Decoding, "step", watched)
    batch = batch_generate(model, processor, prompts, max_tokens=30)
    assert [r.token_ids for r in batch] == [r.token_ids for r in alone]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4
    assert sizes[-1] < 4
    assert len(sizes) == max(r.generation_tokens for r in alone)
    assert sum(sizes) == sum(r.generation_tokens for r in alone)


def test_finished_rows_leave_with_sampling_and_penalties(processor):
    model = small_model()
    settings = {"temp": 1.0, "seed": 3, "repetition_penalty": 1.1, "max_tokens": 40}
    prompts = ["5 17 33 8 20 41", "9", "40 41", "7 7 7 7"]
    one = batch_generate(model, processor, prompts, **settings)
    two = batch_generate(model, processor, prompts, **settings)
    assert [r.token_ids for r in one] == [r.token_ids for r in two]
    assert all(r.finish_reason in ("stop", "length") for r in one)


def test_batch_of_images_of_two_sizes(model, processor):
    def read(prompt, images=None, *, system=None):
        inputs = SmallProcessor.__call__(processor, prompt, images)
        if images == [7]:  # the encoder's positions fit any grid
            inputs.pixel_values = random_array(1, 24, 24, 3, seed=7)
        return inputs

    class Mixed(SmallProcessor):
        __call__ = staticmethod(read)

    prompts, images = ["<image> 5", "<image> 5"], [[7], [8]]
    batch = batch_generate(model, Mixed(), prompts, images, max_tokens=6)
    for found, prompt, pictures in zip(batch, prompts, images, strict=True):
        alone = generate(model, Mixed(), prompt, pictures, max_tokens=6)
        assert found.token_ids == alone.token_ids
    assert [r.image_sizes for r in batch] == [((24, 24),), ((16, 16),)]


def test_batch_of_none_and_of_one(model, processor):
    assert batch_generate(model, processor, []) == []
    (found,) = batch_generate(model, processor, ["5 6"], max_tokens=4)
    assert found.token_ids == generate(model, processor, "5 6", max_tokens=4).token_ids


def test_padding_is_never_an_image_slot():
    model = small_model(pad_token_id=IMAGE)
    processor = SmallProcessor()
    batch = batch_generate(
        model, processor, ["5 6 7 8", "<image> 9"], [[], [1]], max_tokens=6
    )
    alone = generate(model, processor, "<image> 9", [1], max_tokens=6)
    assert batch[1].token_ids == alone.token_ids
