"""Reuse with what else answers are made with: guesses, and the memory plan."""

import gc
import warnings
from dataclasses import replace

import mlx.core as mx
import pytest
from small import DENSE, SmallProcessor, small_model
from test_reuse import SHORT, SHOTS, plain

from mm1_mlx import Reuse
from mm1_mlx.errors import MemoryPlanError, MM1Warning
from mm1_mlx.inference import generation, memory_plan
from mm1_mlx.inference.asking import asked_of
from mm1_mlx.inference.generation import batch_generate, generate, stream_generate
from mm1_mlx.inference.reuse import store_of
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.turns import Turn


@pytest.mark.parametrize(
    "settings",
    [{"lookup": 3}, {"draft_model": 1}, {"lookup": 2, "kv_bits": 8}],
    ids=str,
)
def test_guesses_change_nothing(settings):
    model, processor = small_model(), SmallProcessor()
    if "draft_model" in settings:
        settings = settings | {"draft_model": small_model(seed=1)}
    said = ""
    for asked in ("50", "60", "50", "50 51 52"):
        prompt = f"{SHOTS} {said} {asked}"
        found = generate(model, processor, prompt, [1, 2], **SHORT, **settings)
        expected = plain(model, processor, prompt, [1, 2], **SHORT)
        if "kv_bits" not in settings:
            assert found.token_ids == expected.token_ids
        same = plain(model, processor, prompt, [1, 2], **SHORT, **settings)
        assert found.token_ids == same.token_ids
        said = f"{said} {asked} {' '.join(map(str, found.token_ids))}"
    assert found.reused_tokens > 40


def test_guesses_that_were_broken_off():
    """The cache may hold more tokens than were given."""
    model, processor = small_model(), SmallProcessor()
    for pieces in (1, 2, 3, 4):
        stream = stream_generate(model, processor, SHOTS, [1, 2], lookup=2, **SHORT)
        told = [next(stream).token_id for _ in range(pieces)]
        stream.close()
        talk = f"{SHOTS} {' '.join(map(str, told))} 80 81"
        found = generate(model, processor, talk, [1, 2], **SHORT)
        expected = plain(model, processor, talk, [1, 2], **SHORT)
        assert found.token_ids == expected.token_ids
        assert found.reused_tokens >= 24


@pytest.mark.parametrize("batch", [False, True])
def test_what_is_kept_goes_before_an_answer_is_refused(monkeypatch, batch):
    """And before it may not fit, where that helps; else it stays."""
    model, processor, store = small_model(), SmallProcessor(), Reuse()
    asked = (SHOTS, [1, 2])

    def answer(limit):
        """What is kept after the plan; limit: from the plan."""
        store.clear()
        generate(model, processor, *asked, reuse=store, check_memory=False, **SHORT)
        kept = []

        def plan(*args):
            if not kept:
                bytes_there = limit(plan_answers(*args))
                monkeypatch.setattr(memory_plan, "working_set", lambda: bytes_there)
            kept.append(store.nbytes)
            return plan_answers(*args)

        monkeypatch.setattr(generation, "plan_answers", plan)
        if batch:
            prompts, images = ([one] for one in asked)
            batch_generate(model, processor, prompts, images, reuse=store, **SHORT)
        else:
            generate(model, processor, *asked, reuse=store, **SHORT)
        return kept

    plan_answers = memory_plan.plan_answers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = answer(lambda plan: plan.peak - 10)
        assert first > 10 and second == 0
    with pytest.warns(MM1Warning, match="may take up to"):
        first, second = answer(lambda plan: plan.least - 10)
        assert first > 10 and second == 0
    with pytest.warns(MM1Warning, match="may take up to"):
        (kept,) = answer(lambda plan: plan.least)
        assert kept > 10
    with pytest.raises(MemoryPlanError, match="would take"):
        answer(lambda plan: plan.least // 2)
    assert store.nbytes > 0  # to clear it would not have helped


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_kept_goes_straight_into_a_cache(rows):
    """Beside the kept it takes the cache, and no copies; joined first, 1.25 of it."""
    text = replace(DENSE, head_dim=64, num_hidden_layers=8, max_position_embeddings=999)
    model, processor, settings = small_model(text), SmallProcessor(), Settings()
    begin = " ".join(str(5 + i % 80) for i in range(700))
    prompts = [f"{begin} {7 + row}" for row in range(rows)]
    for prompt in prompts:
        for more in ("12 13 14", "12 9 9"):  # the kept is in several pieces
            generate(model, processor, f"{prompt} {more}", max_tokens=2)
    store = store_of(model, None)
    requests = [
        generation._read(model, processor, asked, settings, store)
        for asked in (
            asked_of(model, processor, f"{prompt} 12 9 9", None, settings)
            for prompt in prompts
        )
    ]
    turn = Turn(model, store, requests, settings)
    gc.collect()
    mx.clear_cache()
    before, limit = mx.get_active_memory(), mx.set_memory_limit(0)
    mx.reset_peak_memory()
    try:
        known = turn.start()
        mx.eval([entry.state for entry in known["cache"]])
    finally:
        mx.set_memory_limit(limit)
    assert known["reused"] > 700
    size = sum(entry.nbytes for entry in known["cache"])
    assert mx.get_peak_memory() - before <= 1.02 * size
