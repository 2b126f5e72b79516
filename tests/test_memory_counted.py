"""What a plan of an answer counts, where it refuses, and where it only warns."""

import gc
import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SmallProcessor, small_config, small_model
from test_adapter_switch import PLANS
from test_memory_generate import EYES, MB, WIDE

from helpers import assert_fails, need_tiny, run_cli
from mm1_mlx import Reuse
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.targets import adapt
from mm1_mlx.checkpoint.folder import write_folder
from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import MemoryPlanError, MM1Warning
from mm1_mlx.grids import Layout
from mm1_mlx.inference import memory_plan, reuse
from mm1_mlx.inference.generation import generate, stream_generate
from mm1_mlx.inference.memory_plan import (
    Work,
    plan_answers,
    plan_folder,
    plan_generation,
)
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.speculative import SpeculativeDecoding
from mm1_mlx.inference.steps import encode_images
from mm1_mlx.loading import load_adapter, load_model
from mm1_mlx.memory import working_set


class Peak:
    """What MLX holds at most, beside what is held now; see test_memory_generate."""

    def __enter__(self) -> "Peak":
        gc.collect()
        mx.clear_cache()
        self._before, self._limit = mx.get_active_memory(), mx.set_memory_limit(0)
        mx.reset_peak_memory()
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = mx.get_peak_memory() - self._before
        mx.set_memory_limit(self._limit)


# --- Counted -------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 4])
def test_the_tiles_of_a_picture_go_together(side):
    """Sixteen and an overview are more than the eight pictures that go at a time."""
    tiling = TilingConfig(type="anyres", grids=[[side, side]])
    model = small_model(WIDE, vision_config=EYES, tiling_config=tiling)
    mx.eval(model.parameters())
    layout = Layout(side, side, 96 * side, 96 * side)
    pixels = mx.zeros((layout.tiles, 96, 96, 3))
    mx.eval(pixels)
    with Peak() as peak:
        encode_images(model, pixels, [layout])
    work = Work(prompt=9, answer=1, pictures=layout.tiles, tiles=layout.tiles, number=4)
    predicted = plan_generation(model.config, work, weights=0).pictures
    assert 0.85 * peak.bytes <= predicted <= 2 * peak.bytes


def test_the_logits_of_all_guesses():
    text = replace(DENSE, vocab_size=20_000)
    model = small_model(text)
    mx.eval(model.parameters())

    class Drafter:
        def guess(self, answer, count, choose):
            return mx.array([7] * count, mx.uint32)

    decoding = SpeculativeDecoding(
        model, mx.array([[5, 6, 7]]), max_tokens=40, drafter=Drafter(),
        num_draft_tokens=15,
    )  # fmt: skip
    decoding.step()
    with Peak() as peak:
        decoding.step()
    work = Work(prompt=3, answer=40, number=4)
    one, many = (
        plan_generation(model.config, replace(work, guesses=n), weights=0)
        for n in (0, 15)
    )
    assert one.peak < peak.bytes
    assert 0.85 * peak.bytes <= many.peak <= 2 * peak.bytes


def test_a_draft_reads_the_pictures_too():
    blind = small_config(WIDE, vision_config=None, connector_config=None,
                         image_token_id=None)  # fmt: skip
    work = Work(prompt=40, answer=4, pictures=8, number=4)
    plans = [
        plan_generation(small_config(DENSE, vision_config=EYES), work, weights=0,
                        draft=draft)
        for draft in (blind, small_config(WIDE, vision_config=EYES))
    ]  # fmt: skip
    assert plans[0].draft < plans[1].pictures <= plans[1].draft
    # It reads when the prompt is read: not with what that takes, but with its keys.
    for plan in plans:
        answer = plan.cache + plan.answer + plan.draft
        assert plan.peak == max(plan.pictures, plan.prompt, answer)
        assert plan.least <= plan.read + max(plan.draft, plan.pictures)


def test_what_settings_and_pictures_are_counted_as(model):
    def work(pictures=(), **settings):
        return plan_answers(model, Settings(**settings), [[5]], pictures, 9).work

    assert (work().pictures, work().tiles, work().guesses) == (0, 1, 0)
    found = work([1, 5, 3], lookup=2)
    assert (found.pictures, found.tiles, found.guesses) == (9, 5, 3)
    assert work(draft_model=model, num_draft_tokens=7).guesses == 7
    assert work(num_draft_tokens=7).guesses == 0


def test_a_cache_that_is_not_quantized_yet():
    """Until it is, all of it lies unpacked."""
    config = small_config(WIDE)
    work = Work(prompt=100, answer=900, kv_bits=4)
    caches = [
        plan_generation(config, replace(work, quantized_kv_start=n), weights=0).cache
        for n in (0, 768, 999, 1000)
    ]
    whole = plan_generation(config, replace(work, kv_bits=None), weights=0).cache
    assert caches[0] < caches[1] < caches[2] == caches[3] == whole
    assert caches[1] == whole * 3 // 4  # 768 of the 1024 that it has room for
    reads = [
        plan_generation(
            config, replace(work, prompt=1000, quantized_kv_start=n), weights=0
        )
        for n in (0, 768, 1000)
    ]
    assert reads[0].read < reads[1].read == whole * 3 // 4 < reads[2].read == whole


def test_weights_that_are_not_read_yet_count(tmp_path, monkeypatch):
    config = small_config(WIDE)
    weights = dict(tree_flatten(small_model(WIDE).parameters()))
    write_folder(tmp_path / "m", config, weights)
    size = sum(array.nbytes for array in weights.values())
    del weights
    model = load_model(tmp_path / "m", lazy=True)
    gc.collect()
    held = mx.get_active_memory()
    assert held < size  # else it shows nothing
    for draft in (None, model):  # one that is its own draft is there once
        plan = plan_answers(model, Settings(draft_model=draft), [[5]], [], 9)
        assert plan.weights == size
    other = small_model(DENSE)
    plan = plan_answers(model, Settings(draft_model=other), [[5]], [], 9)
    assert plan.weights > size
    assert mx.get_active_memory() - held < MB // 100
    monkeypatch.setattr(memory_plan, "working_set", lambda: size)
    with pytest.raises(MemoryPlanError, match="would take"):
        generate(model, SmallProcessor(), "5 6", max_tokens=4)


@pytest.mark.parametrize("name", PLANS)
def test_an_adapter_in_a_folder(tmp_path, name):
    """What it adds to the model; whole weights come in the place of others."""
    model, config = small_model(), small_config()
    write_folder(tmp_path / "m", config, dict(tree_flatten(model.parameters())))
    adapt(model, PLANS[name], seed=0)
    write_adapter(
        tmp_path / "a", adapter_weights(model), adapter_config(PLANS[name], "x")
    )
    sizes = []
    for adapter in (None, tmp_path / "a"):
        loaded = load_model(tmp_path / "m")
        if adapter is not None:
            load_adapter(loaded, adapter)
        sizes.append(sum(a.nbytes for _, a in tree_flatten(loaded.parameters())))
    plans = [
        plan_folder(tmp_path / "m", config, Settings(), adapter=adapter).weights
        for adapter in (None, tmp_path / "a")
    ]
    assert plans[0] == sizes[0]
    assert plans[1] - plans[0] == sizes[1] - sizes[0]


# --- What is kept needs no room ------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "broken off", "quantized"])
def test_without_room_for_a_copy_nothing_is_kept(monkeypatch, how):
    model, processor, store = small_model(), SmallProcessor(), Reuse()
    settings = {"max_tokens": 4, "reuse": store}
    if how == "quantized":
        settings["kv_bits"] = 8
    for room in (0, 10 * MB):
        limit = mx.get_active_memory() + room
        monkeypatch.setattr(reuse, "working_set", lambda limit=limit: limit)
        stream = stream_generate(model, processor, "5 6 7 8 9 10 11 12 13", **settings)
        if how == "broken off":
            next(stream)
            stream.close()
        else:
            list(stream)
        monkeypatch.undo()
        again = generate(model, processor, "5 6 7 8 9 10 11 12 13", **settings)
        assert again.reused_tokens == (9 if room else 0)
        store.clear()


# --- Warned of -----------------------------------------------------------------------


def test_what_may_not_fit_is_tried_with_a_warning(model, processor, monkeypatch):
    expected = generate(model, processor, "5 6 7", max_tokens=9, reuse=False)
    gc.collect()
    plan = plan_answers(model, Settings(), [[5, 6, 7]], [], 9)
    between = (plan.least + plan.peak) // 2
    monkeypatch.setattr(memory_plan, "working_set", lambda: between)
    settings = {"max_tokens": 9, "reuse": False}
    said = (
        r"may take up to .* of memory, but there are .*: weights .*keys and values "
        r".*answer .*check_memory=False, --no-memory-check, leaves out this warning"
    )
    with pytest.warns(MM1Warning, match=said):
        found = generate(model, processor, "5 6 7", **settings)
    assert found.token_ids == expected.token_ids
    generate(model, processor, "5 6 7", check_memory=False, **settings)  # pytest: error


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """mm1-tiny with a context that no machine could fill."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(need_tiny(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2**30
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_plan_ends_with_the_refusal(endless):
    ask = ("-p", "What?", "--model", endless, "--plan", "-m", 10**9)
    for more in ((), ("--json",)):
        done = run_cli("mm1_mlx.generate", *ask, *more)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: This would take ")
        assert "max_tokens=" in lines[0] and "(--max-tokens " in lines[0]
    assert not json.loads(done.stdout)["plan"]["fits"]
    refused = run_cli("mm1_mlx.generate", *ask[:4], "-m", 10**9)
    assert_fails(refused, "This would take ")


def test_a_plan_that_may_not_fit_warns(endless):
    ask = ("-p", "What?", "--model", endless, "--plan", "-m")
    done = run_cli("mm1_mlx.generate", *ask, 10**6, "--json")
    plan = json.loads(done.stdout)["plan"]
    many = int(10**6 * 0.95 * working_set() / plan["cache"])
    done = run_cli("mm1_mlx.generate", *ask, many)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith(": may not fit")
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: This may take up to ")
