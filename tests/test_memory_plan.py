"""The memory of a step: predicted as measured, bounded piece by piece, or refused."""

import gc
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE
from test_tuning import data, parts  # noqa: F401  (a fixture)
from training_kit import planned_once  # noqa: F401  (a fixture)

from helpers import assert_equal
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.errors import ConfigError, MM1Error
from mm1_mlx.memory import bytes_text
from mm1_mlx.training import memory_plan, pieces, step_memory
from mm1_mlx.training.conversations import open_train
from mm1_mlx.training.memory_plan import MemoryWish, plan_memory, probe
from mm1_mlx.training.step_memory import StepShape, measure
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage
from mm1_mlx.training.tuning_run import tune

WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
PAIRS = Target(pairs=PairSettings(rank=8, scale=2.0))
PLANS = {
    "pairs": {"attention": PAIRS, "mlp": PAIRS},
    "experts": {"attention": PAIRS, "experts": PAIRS},
    "encoder": {"encoder": PAIRS, "connector": Target()},
    "full": {name: Target() for name in ("connector", "attention", "mlp", "head")},
}


def stage_of(data, text, plan: str, **settings) -> TuneStage:  # noqa: F811
    model, processor = parts(data, text)
    adapt(model, Plan(parts=PLANS[plan]))
    usual = {"steps": 4, "batch": 4, "warmup": 0, "learning_rate": 1e-2}
    chosen = TuneSettings(**(usual | settings))
    return TuneStage(model, processor, open_train(data), chosen, 0)


def wide(text):
    sizes = {k: v for k, v in WIDE.items() if hasattr(text, k)}
    return replace(text, **sizes)


# --- Predicted against measured ------------------------------------------------------

# Up to four times what is measured to predict them: 2048 tokens from 512.
SHAPES = [
    StepShape(4, 256, 4, 256),
    StepShape(2, 1024, 1, 128),
    StepShape(1, 512, 8, 64),
]


def measured_peak(trainer, stage, shape: StepShape) -> int:
    """The most that a step takes: the order of a graph's work varies a little.

    By a few percent of a small step, of one of 2048 tokens by less than a thousandth.
    """
    found: list[int] = []
    wanted = 2 if shape.rows * shape.length <= 1024 else 1
    while len(found) < wanted:
        found.append(max(p for p, _ in trainer.peaks([probe(stage, shape)])))
        if len(found) == 2 and min(found) < 0.99 * max(found):
            wanted = 3
    return max(found)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("plan", ["pairs", "experts", "encoder", "full"])
def test_the_peak_is_predicted_within_15_percent(data, plan, recompute):  # noqa: F811
    """In one process, whatever was there before: bytes in use at most in a step."""
    text = wide(SPARSE if plan == "experts" else DENSE)
    stage = stage_of(data, text, plan, recompute=recompute)
    mx.eval(stage.module.parameters())
    trainer = Trainer(stage, data / "none", 0, {})
    any_, much = StepShape(1, 32, 0, 64), 1 << 40
    memory = measure(trainer, partial(probe, stage), 1, any_, much)
    gc.collect()  # models of other tests
    base = mx.get_active_memory()
    for shape in SHAPES:
        measured = measured_peak(trainer, stage, shape)
        predicted = base + memory.needed(shape)
        told = f"{shape}: {bytes_text(predicted)}, measured {bytes_text(measured)}"
        assert abs(predicted - measured) <= 0.15 * measured, told


def test_measuring_changes_nothing(data, tmp_path):  # noqa: F811
    stage = stage_of(data, SPARSE, "experts")
    trainer = Trainer(stage, tmp_path, 0, {})
    mx.eval(stage.module.parameters())
    before = [(k, mx.array(v)) for k, v in tree_flatten(stage.module.parameters())]
    trainer.peaks([probe(stage, StepShape(1, 64, 1, 64))])
    for (name, old), (_, new) in zip(
        before, tree_flatten(stage.module.parameters()), strict=True
    ):
        assert_equal(new, old, name)


# --- Recomputing ---------------------------------------------------------------------


@pytest.mark.parametrize("plan", list(PLANS))
def test_recomputed_layers_give_the_same_gradients(data, tmp_path, plan):  # noqa: F811
    """Every kind of layer: encoder, connector, dense and sparse blocks; with router
    losses, whose router must get its gradients through the recomputed layer, too."""
    text = SPARSE if plan == "experts" else DENSE
    found = []
    for recompute in (False, True):
        stage = stage_of(data, text, plan, recompute=recompute, router_losses=True)
        trainer = Trainer(stage, tmp_path, 0, {})
        batches, _ = stage.host_step(0, 0, 1)
        stage.module.train()
        grads, metrics = trainer._gradients(
            stage.module.trainable_parameters(), batches
        )
        found.append((dict(tree_flatten(grads)), metrics))
    (kept, one), (again, two) = found
    assert kept.keys() == again.keys()
    for name in kept:
        assert mx.abs(kept[name]).max() > 0 or name.endswith("lora_a"), name
        assert_equal(again[name], kept[name], name)
    assert_equal(two["text"], one["text"])


def test_dropout_is_the_same_when_recomputed(data, tmp_path):  # noqa: F811
    pairs = Target(pairs=PairSettings(rank=4, scale=2.0, dropout=0.5))
    found = []
    for recompute in (False, True):
        stage = stage_of(data, DENSE, "pairs", recompute=recompute)
        model, processor = parts(data, DENSE)
        adapt(model, Plan(parts={"attention": pairs, "mlp": pairs}))
        for path, module in model.named_modules():
            if path.rpartition(".pairs.")[1]:  # with B zero, A would learn nothing
                module.lora_b = mx.ones_like(module.lora_b) * 0.1
        stage = TuneStage(model, processor, open_train(data), stage.settings, 0)
        model.train()
        trainer = Trainer(stage, tmp_path, 0, {})
        batches, _ = stage.host_step(0, 0, 1)
        grads, _ = trainer._gradients(model.trainable_parameters(), batches)
        found.append(dict(tree_flatten(grads)))
    for name in found[0]:
        assert_equal(found[1][name], found[0][name], name)


def test_recomputing_takes_less_memory(data):  # noqa: F811
    """Of a model with many layers, of which one at a time is made again."""
    deep = replace(wide(DENSE), num_hidden_layers=20)
    shape, peaks = StepShape(2, 256, 2, 64), []
    for recompute in (False, True):
        stage = stage_of(data, deep, "pairs", recompute=recompute)
        mx.eval(stage.module.parameters())
        trainer = Trainer(stage, data / "none", 0, {})
        trainer.peaks([probe(stage, shape)])
        base = mx.get_active_memory()
        peaks.append(max(p for p, _ in trainer.peaks([probe(stage, shape)])) - base)
    assert peaks[1] < 0.7 * peaks[0], peaks


# --- Bounded work --------------------------------------------------------------------


def count_operations(arrays) -> int:
    """How many operations MLX's graph has for these arrays that are not done yet."""
    flat = [array for _, array in tree_flatten(arrays)]
    text = io.StringIO()
    mx.export_to_dot(text, *flat)
    return text.getvalue().count("shape=rectangle")


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("text", "plan"), [(DENSE, "full"), (SPARSE, "experts")], ids=["dense", "sparse"]
)
def test_the_work_between_evaluations_is_bounded(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    text,
    plan,
    recompute,
):
    """However many layers a model has: each evaluation is one layer's, or a part of
    the loss, and what it makes is bounded, too."""
    counted, made = [], []
    evaluate = mx.eval

    def counting(*arrays):
        counted.append(count_operations(list(arrays)))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        evaluate(*arrays)
        made.append(mx.get_peak_memory() - before)

    for layers in (3, 12):
        stage = stage_of(
            data, replace(text, num_hidden_layers=layers), plan, recompute=recompute
        )
        evaluate(stage.module.parameters())
        trainer = Trainer(stage, tmp_path, 0, {})
        batches, _ = stage.host_step(0, 0, 1)
        monkeypatch.setattr(pieces.mx, "eval", counting)
        trained, update = stage.module.trainable_parameters(), trainer._make_update()
        trainer._optimizer.set_rate(1e-3)
        trainer._update(trained, batches, update)
        monkeypatch.setattr(pieces.mx, "eval", evaluate)
    assert len(counted) > 2 * (3 + 12)
    assert max(counted) <= pieces.OPERATIONS
    assert max(made) <= pieces.BYTES


# --- Plans ---------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    """Smaller probes: what is chosen is tested here, not how well it is predicted."""
    small = [(b, n // 2, i, m) for b, n, i, m in step_memory._PROBES]
    monkeypatch.setattr(step_memory, "_PROBES", small)


@pytest.mark.usefixtures("quickly", "planned_once")
def test_auto_takes_what_costs_least_and_fits(data):  # noqa: F811
    """First smaller micro-batches, then recomputing; with room neither."""
    deep = replace(wide(DENSE), num_hidden_layers=8)
    stage = stage_of(data, deep, "pairs")
    whole = plan_memory(stage, MemoryWish(auto=("accumulate", "recompute")))
    assert (whole.settings.accumulate, whole.settings.recompute) == (1, False)

    def plan_for(limit: float | None, **settings):
        stage = stage_of(data, deep, "pairs", **settings)
        auto = () if settings else ("accumulate", "recompute")
        plan = plan_memory(stage, MemoryWish(limit and round(limit), auto))
        assert plan.fits and stage.settings == plan.settings
        return plan

    half = plan_for(None, accumulate=2)
    chosen = plan_for((whole.peak + half.peak) / 2).settings
    assert (chosen.accumulate, chosen.recompute) == (2, False)
    kept = plan_for(None, accumulate=4)
    least = plan_for(None, accumulate=4, recompute=True)
    assert plan_for((kept.peak + least.peak) / 2).settings.recompute


@pytest.mark.usefixtures("quickly", "planned_once")
def test_auto_bounds_what_is_made_at_once(data, monkeypatch):  # noqa: F811
    """Though all fits; where nothing is left to choose it is told."""
    stage = stage_of(data, wide(DENSE), "pairs")
    whole = plan_memory(stage, MemoryWish())
    assert whole.bounded and "at once" not in whole.line()
    monkeypatch.setattr(memory_plan, "BYTES", round(0.7 * whole.piece))
    told = plan_memory(stage_of(data, wide(DENSE), "pairs"), MemoryWish())
    assert not told.bounded and "made at once" in told.line()
    wish = MemoryWish(auto=("recompute",))  # which does not help enough here
    monkeypatch.setattr(memory_plan, "BYTES", 1000)
    told = plan_memory(stage_of(data, wide(DENSE), "pairs"), wish)
    assert told.fits and not told.bounded and not told.settings.recompute
    monkeypatch.setattr(memory_plan, "BYTES", round(0.7 * whole.piece))
    chosen = plan_memory(
        stage_of(data, wide(DENSE), "pairs"), MemoryWish(auto=("accumulate",))
    )
    assert chosen.bounded and chosen.settings.accumulate > 1


@pytest.mark.usefixtures("quickly", "planned_once")
def test_what_cannot_fit_is_refused_with_numbers(data):  # noqa: F811
    stage = stage_of(data, wide(DENSE), "pairs")
    weights = sum(a.nbytes for _, a in tree_flatten(stage.module.parameters()))
    with pytest.raises(MM1Error, match=r"weights alone take .* but there are"):
        plan_memory(stage, MemoryWish(limit=weights // 2))
    with pytest.raises(MM1Error, match=r"more than .* adamw's states .* gradients"):
        plan_memory(stage, MemoryWish(limit=weights + 1000, only_tell=True))
    plan = plan_memory(stage, MemoryWish())
    limit = round(plan.peak - plan.step / 4)
    with pytest.raises(MM1Error, match=r"would take .*--grad-checkpoint on"):
        plan_memory(stage, MemoryWish(limit=limit))
    plan = plan_memory(stage, MemoryWish(limit=limit, only_tell=True))
    assert not plan.fits and "does not fit" in plan.table()
    json.dumps(plan.to_dict())


@pytest.mark.usefixtures("quickly")
def test_where_already_a_small_step_is_too_large_that_is_told(data):  # noqa: F811
    """Each time anew (without planned_once): it is found while steps are measured."""
    stage = stage_of(data, wide(DENSE), "pairs")
    plan = plan_memory(stage, MemoryWish())
    least = plan.weights + plan.trained + plan.optimizer
    limit = least + trained_bytes(stage) + 1000
    with pytest.raises(MM1Error, match=r"Already a step of 1 x \d+ .* but there are"):
        plan_memory(stage, MemoryWish(limit=limit, auto=("recompute",)))


def trained_bytes(stage) -> int:
    flat = tree_flatten(stage.module.trainable_parameters())
    return sum(array.nbytes for _, array in flat)


def test_nothing_is_tried_that_is_known_not_to_fit(data, monkeypatch):  # noqa: F811
    """The largest of the small steps might end the program; the others tell of it."""
    tried = []
    peaks = Trainer.peaks

    def counting(self, batches):
        tried.append(batches[0][0].shape)
        return peaks(self, batches)

    monkeypatch.setattr(Trainer, "peaks", counting)
    stage = stage_of(data, wide(DENSE), "pairs")
    whole = plan_memory(stage, MemoryWish())
    assert (1, 512) in tried
    trainer = Trainer(stage, Path(), 0, {})
    args = (trainer, partial(probe, stage), 1, whole.shape)
    known = measure(*args, limit=whole.limit)
    large = StepShape(1, 512, 1, 192)
    kept = whole.weights + whole.trained + whole.optimizer
    tried.clear()
    part = measure(*args, limit=kept + round(0.5 * known.needed(large)))
    assert (1, 512) not in tried
    shape = StepShape(2, 128, 2, 128)
    assert part.needed(shape) == pytest.approx(known.needed(shape), rel=0.25)


def test_a_batch_that_cannot_be_divided(data):  # noqa: F811
    with pytest.raises(ConfigError, match=r"a multiple of accumulate \(4\)"):
        stage_of(data, DENSE, "pairs", batch=2, accumulate=4)


@pytest.mark.usefixtures("quickly")
def test_the_smallest_machine_decides(data, monkeypatch):  # noqa: F811
    """Two processes, of which the other has half of the memory."""
    monkeypatch.setattr(memory_plan, "world", Two)
    monkeypatch.setattr(memory_plan, "sums", lambda own: [own[0], own[0] // 2])
    assert memory_plan._of_smallest(64 << 20) == 32 << 20


class Two:
    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


@pytest.mark.usefixtures("quickly")
def test_a_larger_batch_than_planned_is_refused_and_nothing_is_lost(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """The one long sample is not among those that were looked at."""
    monkeypatch.setattr(memory_plan, "_SEEN", 4)
    folder = tmp_path / "data"
    folder.mkdir()
    line = {"question": "What colour is it?", "answer": "red"}
    long = line | {"question": "How many?" * 150}
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps(x) for x in [line] * 29 + [long])
    )
    model, processor = parts(data, wide(DENSE))
    samples = open_train(folder)
    settings = TuneSettings(steps=30, batch=1, warmup=0)
    plan = Plan(parts=PLANS["pairs"])
    trial = stage_of(data, wide(DENSE), "pairs", batch=1)
    limit = plan_memory(trial, MemoryWish()).peak + (2 << 20)
    out, wish = tmp_path / "out", MemoryWish(limit=limit)
    with pytest.raises(MM1Error, match="larger than what was planned for"):
        tune(model, processor, samples, out, plan, settings, memory=wish)
    assert (out / "tune.safetensors").exists()


@pytest.mark.usefixtures("quickly", "planned_once")
def test_a_resumed_run_keeps_what_auto_chose(data, tmp_path):  # noqa: F811
    """Even where there is more memory by now. The limit lies between what whole and
    half batches are known to take: each run knows the same (planned_once)."""
    whole, half = (
        plan_memory(stage_of(data, wide(DENSE), "pairs", accumulate=n), MemoryWish())
        for n in (1, 2)
    )
    assert half.peak < whole.peak
    limit = (whole.peak + half.peak) // 2
    model, processor = parts(data, wide(DENSE))
    plan, samples = Plan(parts=PLANS["pairs"]), open_train(data)
    settings = TuneSettings(steps=4, batch=4, warmup=0)
    auto = ("accumulate", "chunk", "recompute")
    wish = MemoryWish(limit=limit, auto=auto)
    assert not tune(
        model, processor, samples, tmp_path, plan, settings, memory=wish, until=2
    )
    kept = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert kept["accumulate"] == 2
    model, processor = parts(data, wide(DENSE))
    wish = MemoryWish(auto=auto)
    assert tune(
        model, processor, samples, tmp_path, plan, settings, memory=wish, resume=True
    )
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == kept
