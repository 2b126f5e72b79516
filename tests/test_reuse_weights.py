"""Whose what is kept is: of which weights, for how long, within which memory."""

import copy
import gc
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
from small import SmallProcessor, small_model
from test_reuse import ASKED, SHORT, SHOTS, plain, work

from mm1_mlx import Reuse
from mm1_mlx.errors import MM1Error
from mm1_mlx.inference.generation import generate, stream_generate
from mm1_mlx.inference.reuse import store_of

assert work  # a fixture

# --- weights -------------------------------------------------------------------------


def test_other_weights_never_meet_what_is_kept():
    model, processor = small_model(), SmallProcessor()
    store = Reuse()
    found = []
    for seed in (0, 1, 0):
        model.update(small_model(seed=seed).parameters())
        answer = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        assert answer.reused_tokens == 0
        expected = plain(model, processor, SHOTS, [1, 2], **SHORT)
        assert answer.token_ids == expected.token_ids
        found.append(answer.token_ids)
    assert found[0] == found[2] != found[1]


def test_the_same_arrays_with_other_settings_never_meet_what_is_kept():
    """Models that share their weights, but turn by another theta."""
    model, processor, store = small_model(), SmallProcessor(), Reuse()
    other = small_model(replace(model.config.text_config, rope_theta=100.0))
    other.update(model.parameters())
    found = []
    for each in (model, other, model):
        answer = generate(each, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        expected = plain(each, processor, SHOTS, [1, 2], **SHORT)
        assert answer.token_ids == expected.token_ids
        found.append(answer.reused_tokens)
    assert found == [0, 0, 23]


def test_what_weights_that_are_gone_left_is_let_go():
    model, processor, store = small_model(), SmallProcessor(), Reuse()
    generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
    held = store.nbytes
    model.update(small_model(seed=1).parameters())
    gc.collect()
    generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
    assert store.nbytes == held


def test_two_models_may_share_one():
    one, two, processor = small_model(), small_model(seed=5), SmallProcessor()
    store = Reuse()
    for model in (one, two, one, two):
        answer = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        expected = plain(model, processor, SHOTS, [1, 2], **SHORT)
        assert answer.token_ids == expected.token_ids
    assert answer.reused_tokens == 23


def test_weights_changed_in_the_midst_of_an_answer_keep_nothing():
    model, processor = small_model(), SmallProcessor()
    stream = stream_generate(model, processor, SHOTS, [1, 2], **SHORT)
    next(stream)
    model.update(small_model(seed=1).parameters())
    stream.close()
    assert model.reuse._prompts.nbytes == 0


def test_clear_is_for_what_is_written_in_place():
    model, processor = small_model(), SmallProcessor()
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    stream = stream_generate(model, processor, f"{SHOTS} 5", [1, 2], **SHORT)
    next(stream)
    model.decoder.layers[0].attn.o_proj.weight[:] = 0.1
    model.reuse.clear()
    stream.close()  # what was begun before is not kept
    assert model.reuse.nbytes == 0
    found = generate(model, processor, SHOTS, [1, 2], **SHORT)
    assert found.reused_tokens == 0


def test_in_training_nothing_is_kept():
    model, processor = small_model(), SmallProcessor()
    model.train()
    generate(model, processor, SHOTS, [1, 2], max_tokens=2)
    assert model.reuse is None


# --- what holds it -------------------------------------------------------------------


def test_who_holds_it():
    model, processor = small_model(), SmallProcessor()
    generate(model, processor, SHOTS, [1, 2], reuse=False, **SHORT)
    assert model.reuse is None
    model.reuse = False
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    assert model.reuse is False and store_of(model, None) is None
    mine = Reuse(limit=1000)
    model.reuse = mine
    assert store_of(model, None) is mine and store_of(model, True) is mine
    assert copy.deepcopy(mine).limit == 1000
    with pytest.raises(MM1Error, match="reuse is of the type int, but must be a Reuse"):
        generate(model, processor, "5", reuse=7)
    with pytest.raises(MM1Error, match="limit is -1, but must be a whole number of by"):
        Reuse(limit=-1)
    with pytest.raises(MM1Error, match=r"folder_limit is 0\.5, but must be a whole"):
        Reuse(folder_limit=0.5)  # type: ignore[arg-type]


def test_it_goes_with_the_model():
    model, processor = small_model(), SmallProcessor()
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    del model
    gc.collect()
    before = mx.get_active_memory()
    model = small_model()
    mx.eval(model.parameters())
    alone = mx.get_active_memory() - before
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    del model
    gc.collect()
    assert mx.get_active_memory() - before < alone / 2


def test_memory_is_bounded_and_what_it_says():
    model, processor = small_model(), SmallProcessor()
    each = 3 * 2 * 2 * 8 * 4  # bytes of a token: layers, k and v, heads, width, float32
    store = Reuse(limit=200 * each)
    for number in range(12):
        prompt = f"{10 + number} {SHOTS}"
        found = generate(model, processor, prompt, [1, 2], reuse=store, **SHORT)
        expected = plain(model, processor, prompt, [1, 2], **SHORT)
        assert found.token_ids == expected.token_ids
        assert store.nbytes <= store.limit
    assert store._prompts.nbytes > 100 * each
    # The last ones are there, the first ones are not.
    for number, reused in ((11, 24), (0, 0)):
        prompt = f"{10 + number} {SHOTS}"
        found = generate(model, processor, prompt, [1, 2], reuse=store, **SHORT)
        assert found.reused_tokens == reused
    none = Reuse(limit=0)
    for _ in range(2):
        found = generate(model, processor, SHOTS, [1, 2], reuse=none, **SHORT)
        assert found.reused_tokens == 0 == none.nbytes


def test_answers_that_were_broken_off_are_within_the_limit(work):
    """They, and what goes to make room for them, oldest first."""
    model, processor = small_model(), SmallProcessor()
    each = 3 * 2 * 2 * 8 * 4
    step = model.make_cache()[0].step  # columns that a short answer's cache has
    store = Reuse(limit=4 * step * each)  # three of them go to prompts

    def ask(number, stop):
        prompt = f"{10 + number} {SHOTS}"
        pieces = stream_generate(model, processor, prompt, [1, 2], reuse=store, **SHORT)
        first = next(pieces)
        if not stop:
            list(pieces)
        return first.reused_tokens, pieces

    for number in range(20):
        ask(number, stop=False)
        assert store.nbytes <= store.limit
    assert store._prompts.nbytes > 2 * step * each * 0.9
    open_ones = [ask(30 + number, stop=True)[1] for number in range(5)]
    for stream in open_ones:
        stream.close()
        assert len(store._left) <= 3 and store.nbytes <= store.limit
    assert store._left_bytes() == 3 * step * each and store._prompts.nbytes == 0
    # The last three are kept when the next prompt comes, the first two are lost.
    found = [ask(30 + number, stop=False)[0] for number in (4, 3, 2, 1, 0)]
    assert found == [24, 24, 24, 0, 0]
    assert store.nbytes <= store.limit
    tiny = Reuse(limit=step * each)
    stream = stream_generate(model, processor, SHOTS, [1, 2], reuse=tiny, **SHORT)
    next(stream)
    stream.close()
    assert tiny._left_bytes() == 0


def test_of_what_does_not_fit_the_beginning_is_kept():
    model, processor = small_model(), SmallProcessor()
    each = 3 * 2 * 2 * 8 * 4
    store = Reuse(limit=16 * each)  # three quarters of it are for prompts
    generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
    found = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
    assert found.reused_tokens == 12
    assert found.token_ids == plain(model, processor, SHOTS, [1, 2], **SHORT).token_ids


def test_threads_share_it():
    model = small_model()
    prompts = [f"{SHOTS} {asked}" for asked in (*ASKED, "50 51 77", "61", "62 70")]
    expected = [
        plain(model, SmallProcessor(), p, [1, 2], max_tokens=20).token_ids
        for p in prompts
    ]
    store = Reuse(limit=60_000)  # some of it goes all the time
    found: dict = {}

    def ask(i):
        for _ in range(3):
            answer = generate(
                model, SmallProcessor(), prompts[i], [1, 2], reuse=store, max_tokens=20
            )
            found.setdefault(i, set()).add(answer.token_ids)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(prompts))] == [{e} for e in expected]
    assert store.nbytes <= store.limit


def test_a_processor_of_unknown_counts_reuses_nothing():
    class Odd(SmallProcessor):
        def __call__(self, prompt, images=None, *, system=None):
            made = super().__call__(prompt, images, system=system)
            return replace(made, input_ids=made.input_ids[:, :-1])

    model, processor = small_model(), Odd()
    prompt = "5 17 33 8 20 41 7 12 9 10 <image> <image>"
    expected = plain(model, processor, prompt, [1, 2], **SHORT)
    for _ in range(2):
        found = generate(model, processor, prompt, [1, 2], **SHORT)
        assert (found.token_ids, found.reused_tokens) == (expected.token_ids, 0)
