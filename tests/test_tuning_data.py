"""What a run makes of its data: mixtures, like lengths, test splits, bounded memory."""

import gc
import json
import random
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small_tokenizers import write_tiny
from test_tuning import PLAN, gradients, parts, same_file
from training_kit import measured, uncompiled

from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.training import tuning
from mm1_mlx.training.conversations import lesson_of, open_train
from mm1_mlx.training.mixtures import Data, Mixture, Source
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage
from mm1_mlx.training.tuning_run import losses_of, tune

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)

PAIRS = Plan(parts={"attention": Target(pairs=PairSettings(rank=2, scale=1.0))})


def write(folder, count: int, words: int = 1, split: str = "train", images=True):
    """Samples of several lengths, every second one with a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(folder.name), []
    for number in range(count):
        text = "many " * rng.randint(1, words)
        line = {"question": f"How {text}?", "answer": "three"}
        if images and number % 2:
            Image.new("RGB", (20, 16), "red").save(folder / "red.png")
            line["image"] = "red.png"
        lines.append(json.dumps(line))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_tiny(folder)
    return folder


def stage_of(words, samples, plan=PLAN, **settings) -> TuneStage:
    model, processor = parts(words)
    adapt(model, plan, 0)
    model.train()
    settings = TuneSettings(**({"steps": 4, "batch": 4} | settings))
    return TuneStage(model, processor, samples, settings, seed=0)


def run(words, samples, out, plan=PAIRS, **more):
    """A run; what was told of it: steps, lines, losses of the test split."""
    model, processor = parts(words)
    told, lines, tested = [], [], {}
    settings = {"steps": 4, "batch": 4, "accumulate": 2, "learning_rate": 3e-3}
    for name in list(more):
        if name in TuneSettings.__dataclass_fields__:
            settings[name] = more.pop(name)
    tune(
        model,
        processor,
        samples,
        out,
        plan,
        TuneSettings(**settings),
        save_every=2,
        tell=lines.append,
        report=told.append,
        tested=tested.update,
        **more,
    )
    return told, lines, tested


# --- Mixtures ---


@pytest.fixture
def data(tmp_path):
    """Two sources, three to one."""
    for name, count, length in (("short", 10, 2), ("long", 14, 20)):
        folder = write(tmp_path / name, count, length)
        for split in ("valid", "test"):
            write(folder, 4, length, split)
    sources = [Source(str(tmp_path / "short"), 3.0), Source(str(tmp_path / "long"))]
    return Data(sources)


def test_processes_share_a_mixed_batch(words, data):
    stage = stage_of(words, data.train(), batch=8, accumulate=2)
    mixture = stage.samples
    alone = [n for step in range(4) for n in stage.numbers(step)]
    assert [mixture.part_of(n) for n in alone].count(0) == 24
    two = [
        stage.places(step, micro, rank, 2)
        for step in range(4)
        for micro in (0, 1)
        for rank in (0, 1)
    ]
    assert [n for places in two for n in places] == alone


def test_a_mixed_run_goes_on_to_the_last_bit(words, data, tmp_path):
    splits = {"valid": data.split("valid"), "test": data.split("test")}
    more = {"steps": 6, "valid_every": 2, **splits}
    whole, lines, tested = run(words, data.train(), tmp_path / "whole", **more)
    assert "first batch (4 samples: 3 short, 1 long)" in lines[-2]
    assert [set(now.metrics) & {"valid", "valid short", "valid long"} for now in whole][
        :2
    ] == [set(), {"valid", "valid short", "valid long"}]
    assert set(tested) == {"test", "test short", "test long"}
    assert lines[-1].startswith("test loss ") and lines[-1].endswith("(8 samples)")
    run(words, data.train(), tmp_path / "parts", until=3, **more)
    _, _, again = run(words, data.train(), tmp_path / "parts", resume=True, **more)
    assert again == tested
    for name in ("adapters.safetensors", "tune.safetensors", "metrics.jsonl"):
        one, two = (tmp_path / place / name for place in ("whole", "parts"))
        assert measured(one) == measured(two) if "json" in name else True
        assert same_file(one, two) if "tensors" in name else True
    # A run that is at its end is measured again, and nothing else.
    steps, lines, again = run(
        words, data.train(), tmp_path / "parts", resume=True, **more
    )
    assert not steps and again == tested
    logged = (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in logged] == [1, 2, 3, 4, 5, 6, 6]
    assert json.loads(logged[-1]) == {"step": 6, **tested}


def test_another_mixture_cannot_go_on(words, data, tmp_path):
    run(words, data.train(), tmp_path / "run", until=2)
    mixture = data.train()
    other = Mixture(mixture.parts, mixture.names, [1, 1])
    message = r"data\.long\.share: 0\.25, now 0\.5"
    with pytest.raises(ConfigError, match=message):
        run(words, other, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"data\.long"):
        run(words, mixture.parts[0], tmp_path / "run", resume=True)


def test_pictures_that_changed_cannot_go_on(words, tmp_path):
    folder = write(tmp_path / "data", 6)
    run(words, open_train(folder), tmp_path / "run", until=2)
    Image.new("RGB", (20, 16), "blue").save(folder / "red.png")
    with pytest.raises(ConfigError, match=r"what the data holds"):
        run(words, open_train(folder), tmp_path / "run", resume=True)


def test_the_loss_of_all_is_over_tokens(words, data):
    valid = data.split("valid")
    stage = stage_of(words, data.train())
    found = losses_of(stage, valid, "valid")
    apart = [losses_of(stage, Mixture([part]), "x")["x"] for part in valid.parts]
    assert [found["valid short"], found["valid long"]] == apart
    whole = Mixture([open_train(p) for p in data._places], ["a", "b"])
    few = losses_of(stage, whole, "v", 3)
    more = losses_of(stage, whole, "v")
    assert few != more and min(apart) < found["valid"] < max(apart)
    total, tokens = 0.0, 0
    for part in valid.parts:
        for number in range(len(part)):
            lesson = lesson_of(part[number], stage.processor)
            stage.module.eval()
            _, metrics = stage.loss(*map(mx.array, stage.arrays([lesson], "")))
            total += float(metrics["text"]) * sum(lesson.learned)
            tokens += sum(lesson.learned)
    assert found["valid"] == pytest.approx(total / tokens, rel=1e-6)


def test_held_out_samples_are_counted_and_can_be_stopped(words, data):
    valid = data.split("valid")
    stage, seen = stage_of(words, data.train()), []

    def report(done, total):
        seen.append((done, total))

    whole = losses_of(stage, valid, "valid", report=report)
    total = sum(map(len, valid.parts))
    assert seen[-1] == (total, total) and {all for _, all in seen} == {total}
    assert len(seen) < total  # batches
    later = iter([False, True])
    stopped = losses_of(stage, valid, "valid", stop=lambda: next(later, True))
    assert whole and stopped == {}


def test_what_is_wrong_with_validation_is_found_first(words, data, tmp_path):
    """Nothing is written, and no step is done."""
    path = tmp_path / "long/valid.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = '{"question": "a", "answer": ""}'
    path.write_text("\n".join(lines))
    splits = {"valid": data.split("valid"), "valid_samples": 3}
    with pytest.raises(DatasetError, match=r"long/valid\.jsonl, line 3: 'answer'"):
        run(words, data.train(), tmp_path / "run", **splits)
    assert not (tmp_path / "run").exists()
    splits["valid_samples"] = 2
    run(words, data.train(), tmp_path / "run", **splits)
    lines[2] = json.dumps({"question": "many " * 200, "answer": "b"})
    path.write_text("\n".join(lines))
    splits = {"test": data.split("valid"), "max_tokens": 128}
    with pytest.raises(DatasetError, match=r"line 3: the sample has \d+ tokens"):
        run(words, data.train(), tmp_path / "other", **splits)


def test_a_source_of_which_all_is_too_long(words, data):
    stage = stage_of(words, data.train(), batch=24, max_tokens=24, too_long="drop")
    stage._left[1] = 1  # all but one were met before
    with pytest.raises(DatasetError, match=r"No sample of long has 24 tokens or less"):
        for step in range(4):
            stage.host_step(step, 0, 1)


# --- Steps without samples ---


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_without_samples_moves_nothing(words, tmp_path, optimizer):
    """Momentum and weight decay would, though nothing was learned."""
    folder = tmp_path / "data"
    folder.mkdir()
    long = {"question": "many " * 60, "answer": "b"}
    lines = [{"question": "a?", "answer": "b"}] * 4 + [long] * 4
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    settings = {"max_tokens": 48, "too_long": "drop", "optimizer": optimizer}
    more = {"steps": 2, "learning_rate": 0.1, "warmup": 0, "weight_decay": 0.1}
    stage = stage_of(words, open_train(folder), PAIRS, **settings, **more)
    stage._number_at = lambda place: place  # the second step has none
    trainer = Trainer(stage, tmp_path / "run", 0, {"recipe": {}})
    before = weights(stage)
    steps = trainer.run()
    first, learned = next(steps), weights(stage)
    state = mx.array(dict(tree_flatten(trainer._optimizer.state))["states.0.step"])
    second = next(steps)
    assert any(not np.array_equal(before[n], learned[n]) for n in before)
    assert all(np.array_equal(learned[n], a) for n, a in weights(stage).items())
    after = dict(tree_flatten(trainer._optimizer.state))["states.0.step"]
    assert after.item() == state.item()
    assert first.metrics["tokens"] > 0 and "norm" in first.metrics
    assert set(second.metrics) == {"tokens", "rate"} and not second.metrics["tokens"]
    assert trainer.step == 2


def weights(stage) -> dict[str, np.ndarray]:
    return {
        n: np.array(a) for n, a in tree_flatten(stage.module.trainable_parameters())
    }


# --- Lengths ---


def padding(batches) -> int:
    return sum(int((arrays[1] < 0).sum()) for arrays in batches)


def test_rows_of_like_length_share_a_micro_batch(words, tmp_path):
    """The same gradient as one large batch, and less padding than by chance."""
    folder = write(tmp_path / "data", 32, words=60)
    whole = stage_of(words, open_train(folder), PAIRS, batch=16)
    sorted_ = stage_of(words, open_train(folder), PAIRS, batch=16, accumulate=8)
    batches, count = sorted_.host_step(0, 0, 1)
    assert count == 16 and [len(arrays[0]) for arrays in batches] == [2] * 8
    widths = [arrays[0].shape[1] for arrays in batches]
    assert widths == sorted(widths, reverse=True) and widths[0] > 2 * widths[-1]
    order = [sorted_.samples[n] for n in sorted_.numbers(0)]
    lessons = [lesson_of(sample, sorted_.processor) for sample in order]
    by_chance = [sorted_.arrays(lessons[k : k + 2], "") for k in range(0, 16, 2)]
    assert padding(batches) < 0.6 * padding(by_chance)
    one, metrics = gradients(whole, tmp_path / "a")
    many, other = gradients(sorted_, tmp_path / "b")
    assert metrics["tokens"].item() == other["tokens"].item()
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=1e-5)


def test_a_window_of_steps_is_sorted_by_length(words, tmp_path):
    """Each sample still comes once, in batches that any process makes alike."""
    folder = write(tmp_path / "data", 32, words=60)
    settings = {"batch": 4, "window": 4}
    plain = stage_of(words, open_train(folder), batch=4)
    stage = stage_of(words, open_train(folder), **settings)
    for window in (0, 1):  # the same samples as without, window by window
        steps = range(4 * window, 4 * window + 4)
        mine, usual = ([n for s in steps for n in x.numbers(s)] for x in (stage, plain))
        assert sorted(mine) == sorted(usual) and mine != usual
    waste, usual = (
        sum(padding(x.host_step(step, 0, 1)[0]) for step in range(8))
        for x in (stage, plain)
    )
    assert waste < 0.6 * usual
    widths = [stage.host_step(k, 0, 1)[0][0][0].shape[1] for k in range(4)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    other = stage_of(words, open_train(folder), **settings)
    for step in (6, 1, 7, 0):  # from any step on, in any order, in two processes
        halves = [n for rank in (0, 1) for n in other.numbers(step, rank, 2)]
        assert halves == stage.numbers(step)


def test_a_run_in_windows_goes_on_to_the_last_bit(words, tmp_path):
    samples = open_train(write(tmp_path / "data", 12, words=20))
    more = {"steps": 6, "window": 4}  # the last window is not whole
    run(words, samples, tmp_path / "whole", **more)
    run(words, samples, tmp_path / "parts", until=3, **more)
    run(words, samples, tmp_path / "parts", resume=True, **more)
    one, two = (tmp_path / x / "tune.safetensors" for x in ("whole", "parts"))
    assert same_file(one, two)


def test_packed_rows_are_dealt_to_micro_batches(words, tmp_path):
    """Packing is over the whole step: fewer rows than if each micro-batch packs its
    own; and where there are fewer rows than micro-batches, some are left out."""
    folder = write(tmp_path / "data", 16, words=6)
    stage = stage_of(
        words, open_train(folder), batch=16, accumulate=8, pack=True, max_tokens=160
    )
    batches, count = stage.host_step(0, 0, 1)
    held = sum(int(arrays[1].max()) + 1 for arrays in batches)
    assert count == held == 16 and len(batches) < 8
    alone = stage_of(words, open_train(folder), batch=16)
    (arrays,), _ = alone.host_step(0, 0, 1)
    assert sum((a[8] > 0).sum() for a in batches) == (arrays[8] > 0).sum()


# --- Memory ---


class Lives:
    """Counts how many of the objects that it was shown are alive."""

    def __init__(self):
        self.seen = self.alive = self.most = 0

    def watch(self, thing):
        weakref.finalize(thing, self._ended)
        self.seen += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        return thing

    def _ended(self):
        self.alive -= 1


@pytest.mark.parametrize("count", [24, 240])
def test_what_is_held_does_not_grow_with_the_data(words, tmp_path, monkeypatch, count):
    """Batches are made one step ahead, no more, and nothing outlives its step."""
    folder = write(tmp_path / "data", count)
    settings = {"steps": 12, "batch": 4, "accumulate": 2}
    stage = stage_of(words, open_train(folder), PAIRS, **settings)
    lessons, batches, make = Lives(), Lives(), stage._arrays
    real = tuning.lesson_of
    monkeypatch.setattr(
        tuning, "lesson_of", lambda sample, p: lessons.watch(real(sample, p))
    )

    def arrays(rows, name):
        found = make(rows, name)
        batches.watch(found[0])
        return found

    monkeypatch.setattr(stage, "_arrays", arrays)
    trainer = Trainer(stage, tmp_path / "run", 0, {"recipe": {}})
    for now in trainer.run():
        gc.collect()
        assert lessons.seen <= 4 * (now.step + 1)
    assert lessons.seen == 48 and batches.seen == 24
    assert lessons.most == 4  # of the step that is being made
    assert batches.most == 4  # of two steps: the one that is learned, and the next
