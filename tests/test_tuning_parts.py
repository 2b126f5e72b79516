"""Fine-tuning part by part, and what is refused before anything is trained."""

import json
import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_tuning import COLOURS, PLAN, data, parts, run, stage_of
from training_kit import uncompiled

from helpers import assert_equal
from mm1_mlx.adapters.fuse import fuse_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import PARTS, Plan, Target, adapt, part_of_weight
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.loading import load, save
from mm1_mlx.quantization.modules import quantize_model
from mm1_mlx.training.conversations import lesson_of, open_train
from mm1_mlx.training.trainer import Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage
from mm1_mlx.training.tuning_run import tune

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)
assert data  # a fixture


# --- One part at a time --------------------------------------------------------------


def weights_of(model) -> dict[str, mx.array]:
    """Every array under the name that it has without adapters."""
    found = {}
    for name, array in tree_flatten(model.parameters()):
        stack = ".experts." in name and ".pairs." not in name
        name = name.removesuffix(".weight") if stack else name
        found[name.replace(".base.", ".")] = mx.array(array)
    return found


WITH_PAIRS = [part for part in PARTS if part not in ("embeddings", "router", "norms")]
EACH = [(part, "full") for part in PARTS]
EACH += [(part, kind) for part in WITH_PAIRS for kind in ("lora", "dora")]


@pytest.mark.parametrize("part, how", EACH, ids=["-".join(each) for each in EACH])
def test_a_run_moves_the_named_part_and_nothing_else(data, tmp_path, part, how):
    """All others are the same to the last bit, in memory and in the adapter."""
    pairs = PairSettings(rank=2, scale=2.0, dora=how == "dora")
    plan = Plan(parts={part: Target(pairs=None if how == "full" else pairs)})
    before = weights_of(parts(data)[0])
    model, told, _, done = run(data, tmp_path, plan=plan, steps=3, weight_decay=0.1)
    assert done and len(told) == 3
    after = weights_of(model)
    adapter = mx.load(str(tmp_path / "adapters.safetensors"))
    moved = {n for n in before if not mx.array_equal(before[n], after[n])}
    if how != "full":
        assert not moved
        moved = {n for n in after if n.endswith("lora_b") and mx.abs(after[n]).max()}
        owners = {n.partition(".pairs.")[0] + ".weight" for n in moved}
        added = after.keys() - before.keys()
        assert len(adapter) == len(added) and all(".pairs." in n for n in added)
        if how == "dora":
            lengths = {n for n in added if n.endswith(".m")}
            assert len(lengths) == len(added) / 3
    else:
        owners, added = moved, set()
        assert after.keys() == before.keys()
        assert adapter.keys() == {n for n in before if part_of_weight(n) == part}
    assert owners and {part_of_weight(name) for name in owners} == {part}
    # What no answer depends on stays, such as words that no sample has.
    assert len(moved) >= (len(added) // 4 if added else len(adapter) / 2)


def test_what_is_said_to_be_supervised(data, tmp_path):
    """The number of answers' tokens, and of all, in the first batch."""
    _, _, lines, _ = run(data, tmp_path, steps=1, accumulate=1)
    stage = stage_of(data)
    lessons = [
        lesson_of(open_train(data)[number], stage.processor)
        for number in stage.places(0, 0, 0, 1)
    ]
    learned = sum(sum(lesson.learned) for lesson in lessons)
    tokens = sum(len(lesson.ids) for lesson in lessons)
    assert 0 < learned < tokens
    wanted = f"supervised {learned} of {tokens} tokens in the first batch (4 samples)"
    assert wanted in lines


def test_an_answer_of_which_nothing_is_learned(data, monkeypatch):
    """A tokenizer without the answer's letters, and without a mark for its end."""
    _, processor = parts(data)
    whole = Processor.encode_piece

    def encode(self, text, *more, **place):
        answer = text.strip().startswith(tuple(COLOURS))
        return [] if answer else whole(self, text, *more, **place)

    monkeypatch.setattr(Processor, "encode_piece", encode)
    sample = open_train(data)[0]
    assert any(lesson_of(sample, processor).learned)  # its end
    processor.eos_token_ids = []
    message = r"train\.jsonl, line 1: None of the conversation's \d+ tokens would be le"
    with pytest.raises(DatasetError, match=message):
        lesson_of(sample, processor)


def test_a_rate_of_a_part_that_is_not_trained(data, tmp_path):
    message = (
        r"'mlp' has a learning rate of its own \(--part-rate\), but is not trained"
    )
    with pytest.raises(ConfigError, match=message + r"\. Trained are: connector, att"):
        run(data, tmp_path, rates={"mlp": 0.5, "connector": 0.1})


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_papers_law_is_of_the_decoder_alone(data, tmp_path, packed):
    """Neither pairs nor the words that hold packed numbers are counted."""
    model, processor = parts(data)
    flat = tree_flatten(model.parameters())
    count = sum(a.size for name, a in flat if name.startswith("decoder.layers."))
    if packed:
        names = {f"decoder.layers.{i}.attn.qkv_proj" for i in range(3)}
        how = {"group_size": 32, "bits": 4, "mode": "affine"}
        quantize_model(model, lambda p: how if p in names else None)
    adapt(model, PLAN, 0)
    settings = TuneSettings(steps=1, learning_rate="mm1")
    stage = TuneStage(model, processor, open_train(data), settings, seed=0)
    trainer = Trainer(stage, tmp_path, 0, {"recipe": {}})
    wanted = math.exp(-0.4214 * math.log(count) - 0.5535)
    assert trainer.peak_rate() == pytest.approx(wanted, rel=1e-12)


def test_alignment_then_pairs(data, tmp_path):
    """As LLaVA and Honeybee: the connector alone, then pairs on the fused model."""
    model, processor = parts(data)
    first = dict(tree_flatten(model.parameters()))
    samples, settings = open_train(data), TuneSettings(steps=3, learning_rate=1e-2)
    align = Plan(parts={"connector": Target()})
    assert tune(model, processor, samples, tmp_path / "aligned", align, settings)
    fuse_adapter(model)
    save(model, processor, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    aligned = dict(tree_flatten(model.parameters()))
    moved = {
        part_of_weight(n) for n in first if not mx.array_equal(first[n], aligned[n])
    }
    assert moved == {"connector"}
    pairs = Plan(parts={"attention": Target(pairs=PairSettings(rank=4))})
    assert tune(model, processor, samples, tmp_path / "tuned", pairs, settings)
    again, _ = load(tmp_path / "model", adapter_path=tmp_path / "tuned")
    last = dict(tree_flatten(again.connector.parameters()))
    for name, array in last.items():
        assert_equal(array, aligned[f"connector.{name}"])
    known = json.loads((tmp_path / "tuned/adapter_config.json").read_text())
    assert set(known["mm1_mlx"]["parts"]) == {"attention"}
