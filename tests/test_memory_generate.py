"""Memory of answers: what is predicted, refused, read in pieces, and given back."""

import gc
import importlib
import json
import re
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import (
    DENSE,
    IMAGE,
    SPARSE,
    VISION,
    SmallProcessor,
    small_config,
    small_model,
)

from helpers import ROOT, assert_fails, need_tiny, run_cli
from mm1_mlx import loading
from mm1_mlx.checkpoint.folder import write_folder
from mm1_mlx.config import MoEConfig
from mm1_mlx.errors import MemoryPlanError
from mm1_mlx.inference import memory_plan, steps, wired
from mm1_mlx.inference.generation import batch_generate, generate, stream_generate
from mm1_mlx.inference.memory_plan import Work, plan_folder, plan_generation
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.speculative import DraftModel, SpeculativeDecoding
from mm1_mlx.inference.steps import Decoding, encode_images, prefill_piece
from mm1_mlx.models.moe import MoE
from mm1_mlx.quantization.modules import quantize_model

MB = 10**6
WIDE = replace(
    DENSE,
    hidden_size=256,
    num_attention_heads=4,
    head_dim=64,
    num_key_value_heads=2,
    intermediate_size=512,
    vocab_size=2000,
    max_position_embeddings=8192,
)
EYES = replace(
    VISION, hidden_size=192, num_attention_heads=3, intermediate_size=768,
    image_size=96, patch_size=8,
)  # fmt: skip
PROMPT = "5 17 33 8"


# --- Predicted and measured ----------------------------------------------------------


def measured(model, prompt, answer, rows=1, pictures=0, **settings) -> list[int]:
    """What MLX holds at most beside the weights: encoding, reading, answering.

    With a limit of no memory, so that each operation ends before the next one starts.
    """
    gc.collect()
    mx.eval(model.parameters())
    slots = pictures * model.config.tokens_per_image
    ids = mx.array([[5] * (prompt - slots) + [IMAGE] * slots] * rows)
    side = model.config.vision_config.image_size
    pixels = mx.zeros((pictures, side, side, 3))
    mx.eval(ids, pixels)
    mx.clear_cache()
    before, features, peaks = mx.get_active_memory(), None, []

    def peak() -> None:
        peaks.append(mx.get_peak_memory() - before)
        mx.reset_peak_memory()

    limit = mx.set_memory_limit(0)
    try:
        mx.reset_peak_memory()
        if pictures:
            features = encode_images(model, pixels)
        peak()
        decoding = Decoding(
            model, ids, image_features=features, max_tokens=answer, **settings
        )
        mx.eval(decoding._pending)
        peak()
        for _ in range(answer):
            decoding.step()
        peak()
    finally:
        mx.set_memory_limit(limit)
    return peaks


EXPERTS = MoEConfig(num_local_experts=16, moe_intermediate_size=384)
FEW = replace(EXPERTS, num_local_experts=4)


@pytest.mark.parametrize(
    "text, work",
    [
        ({}, {"prompt": 600}),
        ({}, {"prompt": 254}),  # the cache grows
        ({}, {"prompt": 600, "piece": 128}),
        ({}, {"prompt": 200, "rows": 4}),
        ({}, {"prompt": 600, "kv_bits": 8, "piece": 200}),
        ({}, {"prompt": 510, "kv_bits": 4}),
        ({"intermediate_size": 2048}, {"prompt": 300}),
        ({"moe_config": EXPERTS}, {"prompt": 300}),
        ({"moe_config": FEW}, {"prompt": 300}),
        ({}, {"prompt": 100, "pictures": 3}),
        ({}, {"prompt": 100, "pictures": 10}),
    ],
)
def test_a_plan_is_near_what_mlx_takes(text, work):
    """At least 0.85 of what it takes, and at most twice that: see the module."""
    model = small_model(replace(WIDE, **text), vision_config=EYES)
    work = {"answer": 4, **work}
    settings = {k: v for k, v in work.items() if k != "piece"}
    if "piece" in work:
        settings["prefill_step_size"] = work["piece"]
    encoding, reading, answering = measured(model, **settings)
    plan = plan_generation(model.config, Work(number=4, **work), weights=0)
    for found, predicted in (
        (encoding, plan.pictures),
        (reading, plan.prompt),
        (answering, plan.cache + plan.answer),
    ):
        assert 0.85 * found <= predicted <= 2 * max(found, 1)
    assert plan.least <= max(encoding, reading, answering)


def test_the_cache_of_a_plan_is_that_of_a_model():
    for width in (48, 64, 128):
        model = small_model(replace(DENSE, head_dim=width))
        ids = mx.array([[5] * 300] * 2)
        for bits, size in ((None, 64), (8, 32), (8, 64), (4, 128)):
            settings = {"kv_bits": bits, "kv_group_size": size}
            decoding = Decoding(model, ids, max_tokens=3, **settings)
            held = sum(entry.nbytes for entry in decoding.cache)
            work = Work(prompt=300, answer=3, rows=2, number=4, **settings)
            assert plan_generation(model.config, work, weights=0).cache == held


def test_planning_makes_no_array(monkeypatch):
    held = mx.get_active_memory()
    monkeypatch.setattr(mx, "array", None)
    monkeypatch.setattr(mx, "zeros", None)
    plan = plan_generation(small_config(), Work(prompt=10**6, answer=10), weights=5)
    assert plan.peak > 10**9
    assert mx.get_active_memory() == held


def test_scores_count_where_they_are_stored():
    """On Metal only for heads of odd widths, and where keys are quantized."""
    config = small_config(replace(WIDE, head_dim=64))
    odd = small_config(replace(WIDE, head_dim=44))
    work = Work(prompt=4000, answer=1, number=2)
    on_metal = memory_plan._plan(config, work, 0, 0, 0).prompt
    on_cpu = memory_plan._plan(config, replace(work, on_cpu=True), 0, 0, 0).prompt
    scores = 4 * 4 * 2048 * 4000  # float32, 4 heads
    assert on_metal < scores < on_cpu
    assert memory_plan._plan(odd, work, 0, 0, 0).prompt > scores
    assert memory_plan._plan(config, replace(work, kv_bits=8), 0, 0, 0).prompt > scores


# --- Refused -------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch):
    """Sets the bytes that there are, beside what is held already."""

    def set_to(extra: int) -> None:
        gc.collect()
        limit = mx.get_active_memory() + extra
        monkeypatch.setattr(memory_plan, "working_set", lambda: limit)

    return set_to


def test_what_cannot_fit_is_refused_before_anything_runs(model, processor, room):
    generate(model, processor, "5", max_tokens=1)
    room(MB // 20)
    settings = {"max_tokens": 400}
    message = r"would take .* of memory, but there are .*: weights .*keys and values"
    with pytest.raises(MemoryPlanError, match=message):
        generate(model, processor, PROMPT, **settings)
    with pytest.raises(MemoryPlanError, match=message):
        next(stream_generate(model, processor, PROMPT, **settings))
    with pytest.raises(MemoryPlanError, match=message):
        batch_generate(model, processor, [PROMPT] * 8, max_tokens=200)
    tried = generate(model, processor, PROMPT, check_memory=False, **settings)
    assert tried.token_ids
    room(10 * MB)
    assert generate(model, processor, PROMPT, **settings).token_ids == tried.token_ids


def refused(**work) -> tuple[str, memory_plan.GenerationPlan]:
    """The message of a plan with some room beside the weights, and the plan."""
    room = work.pop("room")
    packed = work.pop("packed", True)
    config = small_config(WIDE, vision_config=EYES)
    plan = plan_generation(
        config, Work(packed=packed, number=2, **work), weights=10 * MB,
        limit=10 * MB + room,
    )  # fmt: skip
    with pytest.raises(MemoryPlanError) as caught:
        plan.check()
    return str(caught.value), plan


def test_the_advice_is_what_fits():
    text, plan = refused(prompt=100, answer=8000, room=5 * MB)
    most = int(re.search(r"max_tokens=(\d+) \(--max-tokens \1\);", text)[1])
    assert plan.changed(answer=most).fits and not plan.changed(answer=most + 1).fits
    bits = int(re.search(r"kv_bits=(\d) \(--kv-bits \1\)", text)[1])
    assert plan.changed(kv_bits=bits).fits and bits == 4
    assert "--prefill-step-size" not in text and "pictures" not in text


def test_a_long_prompt_may_be_read_in_smaller_pieces():
    text, plan = refused(prompt=2000, answer=1, room=9 * MB)
    piece = int(
        re.search(r"prefill_step_size=(\d+) \(--prefill-step-size \1\)", text)[1]
    )
    assert plan.changed(piece=piece).fits and not plan.changed(piece=2 * piece).fits
    assert "--max-tokens" not in text


def test_fewer_pictures_may_fit():
    text, _ = refused(prompt=30, answer=8, pictures=8, room=2 * MB)
    assert "What would fit: fewer pictures" in text


def test_fewer_bits_may_fit():
    text, _ = refused(prompt=30, answer=8, packed=False, room=-5 * MB)
    assert re.search(r"4 bits \(\d\.\d MB of weights\): python -m mm1_mlx\.quan", text)


def test_where_nothing_alone_would_do():
    text, _ = refused(prompt=4000, answer=4000, room=-5 * MB)
    assert "No single change would do: take a smaller or more quantized model" in text


def test_a_draft_counts(model, processor, room):
    generate(model, processor, "5", max_tokens=1)
    settings = {"max_tokens": 400, "draft_model": model}
    room(10 * MB)
    assert generate(model, processor, PROMPT, **settings).drafted_tokens
    room(MB // 20)
    with pytest.raises(MemoryPlanError, match=r", draft \d"):
        generate(model, processor, PROMPT, **settings)


# --- Before the weights are read -----------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_folder_is_planned_by_its_headers(tmp_path, kind):
    config = small_config(SPARSE)
    arrays = tree_flatten(small_model(SPARSE).parameters())
    dtype = getattr(mx, kind)
    write_folder(tmp_path / "m", config, {n: a.astype(dtype) for n, a in arrays})
    model = loading.load_model(tmp_path / "m", dtype=loading._wanted_type(None))
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    plan = plan_folder(tmp_path / "m", config, Settings(), prompt=7)
    assert plan.weights == held
    assert plan.work.number == model.decoder.norm.weight.dtype.size
    assert (plan.work.prompt, plan.work.answer) == (7, 256)


def test_the_command_refuses_before_it_reads_weights(tmp_path):
    """Broken weights behind sound headers: nothing but the headers is looked at."""
    shutil.copytree(need_tiny(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2**30
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    ask = ("-p", "What is it?", "--model", tmp_path / "model", "-m", 10**9)
    done = run_cli("mm1_mlx.generate", *ask, "--image", "absent.png")
    assert_fails(done, r"would take \d+\.\d GB .*--max-tokens \d+\).*--no-memory-ch")
    tried = run_cli("mm1_mlx.generate", *ask, "--no-memory-check", "--quiet")
    assert tried.returncode == 0 and tried.stdout.strip(), tried.stderr


def test_the_command_tells_its_plan():
    need_tiny()
    ask = ("--image", ROOT / "examples" / "shapes.png", "-p", "What is it?", "--plan")
    done = run_cli("mm1_mlx.generate", *ask, "--lookup", "2")
    assert done.returncode == 0, done.stderr
    names = [re.split(r"\s{2,}", line)[0] for line in done.stdout.splitlines()]
    assert names == [
        *("weights", "pictures", "prompt", "keys and values", "answer"),
        "predicted peak",
    ]
    assert done.stdout.splitlines()[-1].endswith(": fits")
    done = run_cli("mm1_mlx.generate", *ask, "--draft-model", "mm1-tiny", "--json")
    values = json.loads(done.stdout)["plan"]
    assert values["fits"] and values["draft"] > 0
    assert values["weights"] > 15 * MB  # both models'
    assert values["work"]["pictures"] == 1 and values["work"]["prompt"] > 64


# --- Reading in pieces ---------------------------------------------------------------


@pytest.mark.parametrize(
    "top_k, rows, step, expected",
    [
        (None, 8, 100_000, 100_000),  # without experts there is no limit
        (2, 1, 2048, 2048),
        (2, 1, 20_000, 16_384),
        (2, 8, 2048, 2048),
        (2, 9, 2048, 1820),
        (8, 64, 2048, 64),
        (8, 10_000, 2048, 1),
    ],
)
def test_expert_rows_of_a_piece(top_k, rows, step, expected):
    text = DENSE
    if top_k is not None:
        moe = MoEConfig(num_local_experts=16, num_experts_per_tok=top_k)
        text = replace(DENSE, moe_config=moe)
    assert prefill_piece(text, rows, step) == expected
    if top_k is not None and expected > 1:
        assert rows * expected * top_k <= steps.EXPERT_ROWS


def test_no_piece_has_more_expert_rows_than_the_limit(monkeypatch):
    sizes = []
    call = MoE.__call__

    def watched(self, x, *args, **settings):
        sizes.append(x.reshape(-1, x.shape[-1]).shape[0])
        return call(self, x, *args, **settings)

    def answers():
        sizes.clear()
        prompts = ["5 17 33 8 9 10 11 12 13 14 15 16", "7 8 9"]
        rows = batch_generate(small_model(), SmallProcessor(), prompts)
        return [row.token_ids for row in rows]

    monkeypatch.setattr(MoE, "__call__", watched)
    whole = answers()
    assert max(sizes) == 26
    monkeypatch.setattr(steps, "EXPERT_ROWS", 20)  # 2 rows of 5 tokens, 2 experts each
    assert answers() == whole
    assert max(sizes) == 10


def test_buffers_are_given_back_after_the_prompt_and_now_and_then(monkeypatch):
    model = small_model(eos_token_id=None)
    calls = []
    decoding = Decoding(model, mx.array([[1, 5, 17]]), max_tokens=300)
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(decoding._steps))
    for _ in range(300):
        decoding.step()
    assert calls == [2, 256]


def test_guesses_give_the_prompts_buffers_back_as_early(monkeypatch):
    model = small_model(eos_token_id=None)
    calls = []
    decoding = SpeculativeDecoding(
        model,
        mx.array([[1, 5, 17]]),
        drafter=DraftModel(small_model(seed=1), [1, 5, 17]),
        max_tokens=300,
    )
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(decoding._steps))
    for _ in range(300):
        decoding.step()
    assert calls[0] == 2 and len(calls) == 2  # and when a check has brought the 256th


# --- Loading -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, mx.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_loading_takes_the_model_and_little_more(tmp_path, monkeypatch, dtype, packed):
    """From 16 bits to 32; MLX alone would read ahead: 1.4 times the model."""
    text = replace(WIDE, num_hidden_layers=12, intermediate_size=1024)
    config, model = small_config(text), small_model(text)
    if packed:
        how = {"group_size": 32, "bits": 8, "mode": "affine"}
        config = replace(config, quantization=how)
        quantize_model(model, lambda path: how if "decoder" in path else None)
    weights = {
        name: array.astype(mx.bfloat16) if array.dtype == mx.float32 else array
        for name, array in tree_flatten(model.parameters())
    }
    write_folder(tmp_path / "m", config, weights)
    del model, weights
    monkeypatch.setattr(loading, "_READ_AT_ONCE", MB)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = loading.load_model(tmp_path / "m", dtype=dtype)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    largest = max(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert size > 10 * MB
    assert mx.get_peak_memory() - before <= size + max(MB, largest) + MB // 2
    assert mx.get_cache_memory() < MB


# --- Wired memory --------------------------------------------------------------------


class Metal:
    """Stands for a Mac: what is wired, by call."""

    def __init__(self, monkeypatch):
        self.limits = [7]
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "set_wired_limit", self.set)
        info = {"max_recommended_working_set_size": 1000}
        monkeypatch.setattr(mx, "device_info", lambda *_: info)

    def set(self, limit):
        self.limits.append(limit)
        return self.limits[-2]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("late", [None, RuntimeError, KeyboardInterrupt])
def test_wired_memory_is_given_back_whatever_happens(monkeypatch, error, late):
    """late: what is raised while the last step is waited for."""
    metal = Metal(monkeypatch)

    def synchronize(*_):
        if late is not None:
            raise late

    monkeypatch.setattr(mx, "synchronize", synchronize)
    raised = late or error
    try:
        with wired.wired_limit():
            assert metal.limits == [7, 1000]
            if error is not None:
                raise error
    except BaseException as met:
        assert type(met) is raised
    else:
        assert raised is None
    assert metal.limits == [7, 1000, 7]


@pytest.mark.parametrize("fails", [False, True])
def test_generate_wires_its_memory(monkeypatch, capsys, fails):
    need_tiny()
    metal, seen = Metal(monkeypatch), []
    step = Decoding.step

    def watched(self):
        seen.append(metal.limits[-1])
        if fails:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Decoding, "step", watched)
    door = importlib.import_module("mm1_mlx.generate")
    code = door.main(["-p", "What is it?", "-m", "2"])
    assert code == (130 if fails else 0)
    assert set(seen) == {1000}
    assert metal.limits == [7, 1000, 7]


def test_every_door_that_runs_a_model_for_long_wires_its_memory():
    running = ("stream_generate(", "batch_generate(", "tune(")
    found = {}
    for path in (ROOT / "mm1_mlx").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "__init__.py" and any(name in text for name in running):
            found[path.stem] = "with" in text and "wired_limit()" in text
    assert found.keys() >= {"generate", "lora"}
    assert all(found.values()), found
