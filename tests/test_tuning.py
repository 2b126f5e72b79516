"""Fine-tuning: what a batch is, gradients that add up, and runs that lose nothing."""

import json
import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small import DENSE, SPARSE, small_config
from small_tokenizers import write_tiny

from helpers import assert_close, assert_equal
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import CheckpointError, ConfigError, DatasetError, MM1Error
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.loading import load_adapter
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.conversations import open_train
from mm1_mlx.training.memory_plan import MemoryWish
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage
from mm1_mlx.training.tuning_run import tune

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PLAN = Plan(
    parts={
        "attention": Target(pairs=PairSettings(rank=4, scale=2.0)),
        "experts": Target(pairs=PairSettings(rank=4, scale=2.0)),
        "connector": Target(),
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of one colour, and the question for it; texts of several lengths."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    lines = []
    for number in range(24):
        name = rng.choice(sorted(COLOURS))
        Image.new("RGB", (20, 16), COLOURS[name]).save(folder / f"{number}.png")
        line = {"question": "What colour is it?", "answer": name}
        if number % 6 == 5:
            line = {
                "question": "How many?" * (number // 6 + 1),
                "answer": "There are 3.",
            }
        else:
            line["image"] = f"{number}.png"
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "valid.jsonl").write_text("\n".join(lines[:4]) + "\n")
    write_tiny(folder)
    return folder


def parts(data, text=SPARSE):
    """A small model and its processor, with the tiny vocabulary."""
    tokenizer = load_tokenizer(data)
    config = small_config(
        replace(text, vocab_size=tokenizer.vocab_size),
        image_token_id=tokenizer.token_to_id("<image>"),
        eos_token_id=2,
        pad_token_id=3,
    )
    mx.random.seed(7)
    model = MM1(config)
    mx.eval(model.parameters())
    images = ImageSettings(size=config.vision_config.image_size)
    return model, Processor(tokenizer, images, config, chat_template="mm1-tiny")


def stage_of(data, text=SPARSE, plan=PLAN, **settings) -> TuneStage:
    model, processor = parts(data, text)
    adapt(model, plan, 0)
    model.train()
    settings = TuneSettings(**({"steps": 4, "batch": 4} | settings))
    return TuneStage(model, processor, open_train(data), settings, seed=0)


def gradients(stage, folder, step: int = 0) -> tuple[dict, dict]:
    trainer = Trainer(stage, folder, 0, {"recipe": {}})
    batches, _ = stage.host_step(step, 0, 1)
    grads, metrics = trainer._gradients(stage.module.trainable_parameters(), batches)
    return dict(tree_flatten(grads)), metrics


# --- Batches -------------------------------------------------------------------------


def test_rows_are_padded_where_each_shape_is_compiled(data):
    """And nowhere else: padding costs as much as tokens do."""
    stage = stage_of(data)
    stage.compiles = False
    (arrays,), _ = stage.host_step(0, 0, 1)
    document, weight = arrays[1], arrays[8]
    assert (document[:, -1] >= 0).any() and (weight > 0).all()
    stage.compiles = True
    (padded,), _ = stage.host_step(0, 0, 1)
    assert padded[0].shape[1] % 32 == 0 and len(padded[8]) == 64
    length, count = document.shape[1], len(weight)
    assert_equal(padded[0][:, :length], arrays[0])
    assert (padded[1][:, length:] < 0).all()
    assert_equal(padded[8][:count], weight)
    assert not padded[8][count:].any()


def test_a_batch_of_fewer_samples_than_processes(data, monkeypatch):
    """Known before anything is planned."""

    class Two:
        def size(self) -> int:
            return 2

    monkeypatch.setattr("mm1_mlx.training.tuning.world", Two)
    with pytest.raises(ConfigError, match=r"multiple of 2 micro-batches times 2 proce"):
        stage_of(data, batch=2, accumulate=2)
    stage_of(data, batch=4, accumulate=2)


def test_a_batch_learns_answers_and_nothing_else(data):
    stage = stage_of(data)
    (arrays,), count = stage.host_step(0, 0, 1)
    ids, document, _, position, shots, _, source, target, weight, _ = arrays
    assert count == 4 and len(ids) == 4
    tokenizer = stage.processor.tokenizer
    learned = [int(t) for t, w in zip(target, weight, strict=True) if w]
    texts = tokenizer.decode([i for i in learned if i != 2]).strip()
    assert learned.count(2) == 4  # an end for every answer
    assert (
        set(texts.replace("There are 3.", " ").split()) <= set(COLOURS) | {""} or texts
    )
    image = stage.processor.config.image_token_id
    assert image not in learned and 3 not in learned
    flat = ids.reshape(-1)
    for s, t, w in zip(source, target, weight, strict=True):
        if w:
            assert flat[s + 1] == t
    assert (position[document >= 0] >= 0).all()
    assert len(shots) * stage.processor.tokens_per_image == (ids == image).sum()


def test_packed_rows_give_the_same_loss(data, tmp_path):
    """Masks and positions keep the samples of a row apart."""
    apart = stage_of(data, batch=8)
    packed = stage_of(data, batch=8, pack=True, max_tokens=96)
    (one,), _ = apart.host_step(0, 0, 1)
    (two,), _ = packed.host_step(0, 0, 1)
    assert len(two[0]) < len(one[0]) == 8
    for stage in (apart, packed):
        stage.module.eval()
    found, wanted = (
        stage.loss(*map(mx.array, arrays))[1]
        for stage, arrays in ((packed, two), (apart, one))
    )
    assert_close(found["text"], wanted["text"], atol=1e-5)
    assert found["tokens"].item() == wanted["tokens"].item()
    first, _ = gradients(packed, tmp_path / "a")
    second, _ = gradients(apart, tmp_path / "b")
    for name in first:
        assert_close(first[name], second[name], atol=1e-5)


@pytest.mark.parametrize("text", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_micro_batches_give_the_gradients_of_one_batch(data, text, tmp_path):
    """Samples have different numbers of learned tokens: the mean is over tokens."""
    plan = Plan(
        parts={k: v for k, v in PLAN.parts.items() if text is SPARSE or k != "experts"}
    )
    whole, one = gradients(stage_of(data, text, plan, batch=8), tmp_path / "a", 1)
    parts, four = gradients(
        stage_of(data, text, plan, batch=8, accumulate=4), tmp_path / "b", 1
    )
    assert whole.keys() == parts.keys() and one["tokens"] == four["tokens"]
    for name in whole:
        assert_close(parts[name], whole[name], atol=1e-6)
    assert_close(four["text"], one["text"], atol=4e-6)  # a loss of 6, in float32


def test_every_sample_comes_once_an_epoch_whatever_the_processes(data):
    stage = stage_of(data, batch=6, accumulate=3)
    every = [(step, micro) for step in range(4) for micro in range(3)]
    alone = [n for step, m in every for n in stage.places(step, m, 0, 1)]
    assert sorted(alone) == list(range(24))
    two = [
        n
        for step in range(4)
        for m in range(3)
        for rank in (0, 1)
        for n in stage.places(step, m, rank, 2)
    ]
    assert two == alone


def test_samples_that_are_too_long(data):
    message = r"line \d+: the sample has \d+ tokens \(\d+ of images\), but max_t"
    with pytest.raises(DatasetError, match=message):
        stage_of(data, batch=24, max_tokens=20).host_step(0, 0, 1)
    stage = stage_of(data, batch=24, max_tokens=28, too_long="drop")
    (arrays,), count = stage.host_step(0, 0, 1)
    assert 0 < count < 24 and len(arrays[0]) == count


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "magic"}, r"optimizer is 'magic', but must be one of adamw"),
        ({"batch": 4, "accumulate": 3}, r"must be a multiple of accumulate \(3\)"),
        ({"too_long": "cut"}, r"must be 'refuse' or 'drop'"),
        ({"rates": {"brain": 1.0}}, r"no part 'brain' with a learning rate"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        TuneSettings(steps=1, **settings)


# --- Runs ----------------------------------------------------------------------------


def run(data, out, plan=PLAN, resume=False, until=None, stop=None, **changes):
    """A run; its model, and what was told after each step."""
    model, processor = parts(data)
    told, lines = [], []
    settings = TuneSettings(
        **({"steps": 6, "batch": 4, "accumulate": 2, "learning_rate": 3e-3} | changes)
    )
    done = tune(
        model,
        processor,
        open_train(data),
        out,
        plan,
        settings,
        base="small",
        save_every=2,
        resume=resume,
        until=until,
        tell=lines.append,
        report=lambda now: told.append(now),
        stop=stop or (lambda: False),
    )
    return model, told, lines, done


def same_file(one, two) -> bool:
    first, second = (mx.load(str(p)) for p in (one, two))
    return first.keys() == second.keys() and all(
        mx.array_equal(first[name], second[name]) for name in first
    )


def test_a_run_learns_and_leaves_an_adapter(data, tmp_path):
    out = tmp_path / "run"
    whole = ("encoder", "connector", "mlp", "embeddings", "head")
    targets = {part: Target() for part in whole}
    plan = Plan(parts=PLAN.parts | targets)
    model, told, lines, done = run(
        data, out, plan=plan, steps=40, batch=8, learning_rate=1e-2
    )
    assert done and [now.step for now in told] == list(range(1, 41))
    assert told[-1].metrics["text"] < 0.3 * told[0].metrics["text"]
    assert any("LoRA, rank 4" in line for line in lines)
    assert any(line.startswith("supervised ") for line in lines)
    names = {p.name for p in out.iterdir()}
    assert names == {
        *("adapters.safetensors", "adapter_config.json", "tune.safetensors"),
        *("metrics.jsonl", "run.json"),
    }
    metrics = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 40 and metrics[-1]["text"] == told[-1].metrics["text"]
    again, _ = parts(data)
    load_adapter(again, out)
    ids = mx.array([[1, 5, 9, 40]])
    assert_close(again(ids), model(ids), atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "sgd", "adam"])
def test_a_run_goes_on_to_the_last_bit(data, tmp_path, optimizer):
    changes = {"optimizer": optimizer, "rates": {"connector": 0.1}}
    plan = Plan(
        parts={
            "attention": Target(pairs=PairSettings(rank=2, scale=1.0, dropout=0.3)),
            "connector": Target(),
        }
    )
    run(data, tmp_path / "whole", plan=plan, **changes)
    _, told, _, done = run(data, tmp_path / "parts", plan=plan, until=3, **changes)
    assert not done and told[-1].step == 3
    changes |= {"plan": plan, "resume": True}
    _, told, lines, done = run(data, tmp_path / "parts", **changes)
    assert done and told[0].step == 4 and "going on from step 3" in lines[0]
    for name in ("adapters.safetensors", "tune.safetensors"):
        assert same_file(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_a_stop_saves_what_was_learned(data, tmp_path):
    steps = iter([False, False, True])
    _, told, _, done = run(data, tmp_path / "run", stop=lambda: next(steps, True))
    assert not done and (tmp_path / "run" / "adapters.safetensors").exists()
    assert told[-1].step < 6


def test_what_cannot_go_on(data, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(CheckpointError, match=r"has no tune\.safetensors"):
        run(data, tmp_path / "other", resume=True)
    run(data, tmp_path / "run", until=2)
    with pytest.raises(CheckpointError, match=r"holds an adapter already"):
        run(data, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"settings\.learning_rate: 0\.003, now 0\.1"):
        run(data, tmp_path / "run", resume=True, learning_rate=0.1)
    other = Plan(parts={"attention": Target(pairs=PairSettings(rank=8, scale=2.0))})
    with pytest.raises(ConfigError, match=r"plan\.parts\.attention\.rank: 4, now 8"):
        run(data, tmp_path / "run", plan=other, resume=True)


def test_numbers_that_are_none_stop_a_run(data, tmp_path):
    with pytest.raises(MM1Error, match=r"Step \d+ gave .* Its samples: .*Lower"):
        run(data, tmp_path / "run", steps=30, learning_rate=1e30, optimizer="sgd")
    weights = tmp_path / "run" / "adapters.safetensors"
    if weights.exists():
        assert all(
            np.isfinite(np.array(a)).all() for a in mx.load(str(weights)).values()
        )


def test_rates_of_parts(data, tmp_path):
    """With the rate 0 a part stays where it was."""
    plan = Plan(parts={"attention": PLAN.parts["attention"], "connector": Target()})
    model, _ = parts(data)
    before = {n: mx.array(a) for n, a in tree_flatten(model.connector.parameters())}
    trained, *_ = run(data, tmp_path / "run", plan=plan, rates={"connector": 0.0})
    after = dict(tree_flatten(trained.connector.parameters()))
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    pairs = [a for n, a in tree_flatten(trained.parameters()) if n.endswith("lora_b")]
    assert any(mx.abs(pair).max() > 0 for pair in pairs)


@pytest.mark.parametrize("kind", ["anyres", "crops", "dynamic"])
def test_models_of_tiles_are_tuned(data, tmp_path, kind):
    """LLaVA 1.6, 360VL, MM1.5: pictures of several sizes, and a mark that no layer
    has."""
    names = {"wide": (60, 16), "tall": (14, 50), "small": (9, 9)}
    lines = []
    for name, size in names.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        line = {"question": "Which?", "answer": name, "image": f"{name}.png"}
        lines.append(json.dumps(line))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    grids = {"crops": [[2, 2]], "anyres": [[1, 2], [2, 1], [2, 2]], "dynamic": []}
    tiling = TilingConfig(type=kind, grids=grids[kind])
    model, processor = parts(data)
    config = replace(model.config, tiling_config=tiling)
    model = MM1(config)
    processor = Processor(
        processor.tokenizer, processor.image_settings, config, chat_template="mm1-tiny"
    )
    every = {"attention", "experts", "connector", "encoder"}
    plan = Plan(parts=dict.fromkeys(every, PLAN.parts["attention"]))
    losses = []
    assert tune(
        model,
        processor,
        open_train(tmp_path),
        tmp_path / "out",
        plan,
        TuneSettings(steps=30, batch=3, warmup=0, learning_rate=1e-2),
        memory=MemoryWish(),
        valid=open_train(tmp_path),
        valid_every=30,
        report=lambda now: losses.append(now.metrics["text"]),
    )
    assert losses[-1] < 0.75 * losses[0]


def test_the_resolution_of_a_run(data):
    """A run's settings have it, and its samples; the caller's processor keeps its own.
    A checkpoint of before has none, and none is written for the model's own."""
    model, processor = parts(data)
    samples = open_train(data)

    def stage(**how) -> TuneStage:
        settings = TuneSettings(steps=1, batch=2, **how)
        return TuneStage(model, processor, samples, settings, seed=0)

    shots = stage(resolution=24).host_step(0, 0, 1)[0][0][4]
    assert shots.shape[1:] == (24, 24, 3)
    usual = stage()
    size = processor.image_settings.size
    assert usual.host_step(0, 0, 1)[0][0][4].shape[1:] == (size, size, 3)
    assert processor.resolution is None
    assert "resolution" not in usual.settings.to_dict()
    assert stage(resolution=24).settings.to_dict()["resolution"] == 24


@pytest.fixture
def long_answers(tmp_path):
    """Thousands of learned tokens in a batch."""
    line = json.dumps({"question": "How many?", "answer": "3 red things and " * 30})
    (tmp_path / "train.jsonl").write_text(f"{line}\n" * 8)
    return write_tiny(tmp_path)


def test_gradients_in_float16_are_not_too_small_for_it(long_answers, tmp_path):
    """Those of a mean of 3000 tokens lose numbers below 6e-8; those of their sum, which
    is divided in float32, lose none. Else they are right to float16's rounding."""
    plan = Plan(parts={"attention": PLAN.parts["attention"]})

    def made(dtype, **changes) -> np.ndarray:
        model, processor = parts(long_answers, DENSE)
        model.set_dtype(dtype)
        adapt(model, plan, 0)
        model.train()
        settings = TuneSettings(steps=1, batch=8)
        stage = TuneStage(model, processor, open_train(long_answers), settings, 0)
        trainer = Trainer(stage, tmp_path, 0, {"recipe": {}})
        vars(trainer).update(changes)
        batches, _ = stage.host_step(0, 0, 1)
        trained = model.trainable_parameters()
        found = dict(tree_flatten(trainer._gradients(trained, batches)[0]))
        assert {array.dtype for array in found.values()} == {mx.float32}
        return np.concatenate([np.array(array).ravel() for array in found.values()])

    exact = made(mx.float32)

    def error(found) -> float:
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    assert error(made(mx.float16)) < 1.5e-3
    assert error(made(mx.float16)) < 0.6 * error(made(mx.float16, _sums=False))
    assert error(made(mx.bfloat16)) < 1.5e-2
