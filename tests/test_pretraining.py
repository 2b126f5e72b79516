"""A whole pretraining run in small: it learns, stops, goes on, and hands over."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from training_kit import arrays_of, assert_same_state, encode, recipe_with, uncompiled

from helpers import assert_close, assert_equal
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models import router
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.vision import resize_grid
from mm1_mlx.training.pretraining import initialize, make_trainer
from mm1_mlx.training.pretraining_run import pretrain
from mm1_mlx.training.recipe import Recipe
from mm1_mlx.training.schedules import mm1_learning_rate
from mm1_mlx.training.state import load_model_state, load_state, save_state
from mm1_mlx.training.trainer import batch_rng

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)


# --- learning ------------------------------------------------------------------------


def losses(files, stage, name, **settings):
    seen = []
    pretrain(*files, stage=stage, report=seen.append, **settings)
    return [progress.metrics[name] for progress in seen]


def test_the_joint_stage_learns_to_name_a_colour(stub):
    found = losses(stub(joint={"steps": 60, "batch": 8}), "joint", "text")
    assert len(found) == 60
    assert np.mean(found[-5:]) < 0.35 * np.mean(found[:3])


@pytest.mark.parametrize(
    "objective, part", [("regions", 0.6), ("global", 0.6), ("reconstruction", 0.97)]
)
def test_each_objective_of_the_encoder_stage_learns(stub, objective, part):
    files = stub(encoder={"steps": 25, "batch": 12, "objective": objective})
    found = losses(files, "encoder", "loss")
    assert all(np.isfinite(found))
    assert np.mean(found[-3:]) < part * np.mean(found[:3])


def test_what_is_reported(stub):
    seen, lines = [], []
    pretrain(*stub(), report=seen.append, tell=lines.append)
    assert [(p.stage, p.step, p.steps) for p in seen] == [
        *(("encoder", i, 4) for i in range(1, 5)),
        *(("joint", i, 6) for i in range(1, 7)),
    ]
    assert [p.metrics["rate"] for p in seen[:2]] == pytest.approx([0.005, 0.01])
    assert {"text", "accuracy", "balance", "z", "max_load", "norm"} <= set(
        seen[-1].metrics
    )
    assert seen[3].examples == 16  # four steps of four pictures
    assert re.search("encoder from .*encoder_weights", lines[0])


def test_the_encoder_learns_at_its_own_rate():
    recipe = Recipe.from_dict(recipe_with(data="json", joint={"vision_rate": 0.0}))
    source = type("Source", (), {"document": staticmethod(stub_document)})
    trainer = make_joint(recipe, source)
    before = dict(tree_flatten(trainer.module.parameters()))
    next(iter(trainer.run(save_every=100)))
    after = dict(tree_flatten(trainer.module.parameters()))
    for name in before:
        moved = bool(mx.any(before[name] != after[name]).item())
        if name.startswith("vision."):
            assert not moved, name
    assert any(
        mx.any(before[name] != after[name]).item()
        for name in before
        if name.startswith("connector.")
    )


def stub_document(rng, kind, progress):
    from PIL import Image

    from mm1_mlx.training.documents import Document, Text

    if kind == "text":
        return Document("text", [], [Text("a")], [[Text("b", True)]])
    image = Image.new("RGB", (16, 16), (rng.randrange(256), 0, 0))
    return Document(kind, [image], [Text("<image>")], [[Text("x", True)]])


def make_joint(recipe, source, folder=Path("/nonexistent")):
    from mm1_mlx.training.pretraining import JointStage, document_encoder
    from mm1_mlx.training.trainer import Trainer

    model = MM1(recipe.model)
    initialize(model, recipe.seed)
    encoder = document_encoder(recipe.model, encode)
    settings = recipe.stages["joint"]
    stage = JointStage(model, settings, source, encoder, recipe.images)
    return Trainer(stage, folder, recipe.seed, {"recipe": {}})


def test_the_router_losses_are_weighed_as_the_paper_does():
    """0.01 for the balance and 0.001 for z, for each sparse layer (MM1 section 4)."""
    recipe = Recipe.from_dict(recipe_with())
    source = type("Source", (), {"document": staticmethod(stub_document)})
    stage = make_joint(recipe, source).stage
    arrays, _ = stage.host_batch(random.Random(0), 3, 0.0)
    loss, metrics = stage.loss(*map(mx.array, arrays))
    values = {name: v.item() for name, v in metrics.items() if not v.ndim}
    assert values["balance"] >= 0.99 and values["z"] > 0
    expected = values["text"] + 0.01 * values["balance"] + 0.001 * values["z"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_chosen_tokens_are_those_of_the_whole_picture():
    """All tokens named one by one are all tokens; a shared picture is encoded once."""
    from PIL import Image

    from mm1_mlx.training.documents import Document, Text

    shared = Image.new("RGB", (16, 16), (200, 0, 0))

    def source_of(kept):
        def document(rng, kind, progress):
            turns = [Text("<image>y<image>")]
            made = Document(kind, [shared] * 2, turns, [[Text("x", True)]])
            made.kept = kept
            return made

        return type("Source", (), {"document": staticmethod(document)})

    recipe = Recipe.from_dict(recipe_with())
    Q = recipe.model.tokens_per_image
    losses = []
    for kept in ([], [list(range(Q))] * 2, [[0], None]):
        stage = make_joint(recipe, source_of(kept)).stage
        arrays, _ = stage.host_batch(random.Random(0), 3, 0.0)
        assert (arrays[4] != 0).any(axis=(1, 2, 3)).sum() == 1
        losses.append(stage.loss(*map(mx.array, arrays))[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_alternate_steps_have_their_own_shape_and_data():
    values = recipe_with()
    own = {"share": 0.5, "batch": 2, "row_length": 40, "mix": {"interleaved": 1.0}}
    values["stages"]["joint"] |= {"alternates": [own], "row_length": 24, "batch": 3}
    settings = Recipe.from_dict(values).stages["joint"]
    shapes = [(settings.at(i).batch, settings.at(i).row_length) for i in range(200)]
    assert set(shapes) == {(3, 24), (2, 40)}
    assert 70 < shapes.count((2, 40)) < 130  # 100 expected, standard deviation 7
    step = shapes.index((2, 40))
    source = type("Source", (), {"document": staticmethod(stub_document)})
    stage = make_joint(Recipe.from_dict(values), source).stage
    arrays, _ = stage.host_batch(random.Random(0), 2, 0.0, settings.at(step))
    assert arrays[0].shape == (2, 40)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"batch": 2}, r"alternates\[0\]\.share is None, but must be above 0"),
        ({"share": 0.5, "steps": 2}, r"alternates\[0\]: unknown keys \['steps'\]"),
        ({"share": 0.5, "batch": 0}, r"alternates\[0\]\.batch is 0"),
        ({"share": 1.5}, "share is 1.5, but must be above 0 and below 1"),
        (3, "alternates is .*a list of objects"),
    ],
)
def test_wrong_alternates_are_named(own, message):
    values = recipe_with()
    values["stages"]["joint"]["alternates"] = [own]
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(values)


def test_a_frozen_encoder_works_ahead_and_stays_as_it_is():
    values = recipe_with()
    source = type("Source", (), {"document": staticmethod(stub_document)})
    plain = make_joint(Recipe.from_dict(values), source).stage
    values["stages"]["joint"] |= {"vision_rate": 0, "contrast": 0}
    frozen = make_joint(Recipe.from_dict(values), source).stage
    losses = []
    for stage in (plain, frozen):
        arrays, _ = stage.host_batch(random.Random(0), 3, 0.0)
        losses.append(stage.loss(*map(mx.array, arrays))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert plain.host_batch(random.Random(0), 3, 0.0)[0][4].ndim == 4
    assert frozen.host_batch(random.Random(0), 3, 0.0)[0][4].ndim == 3


def test_padding_takes_no_experts_place(monkeypatch):
    """A row is rarely full; what fills it must not push tokens out of an expert."""
    values = recipe_with()
    values["model"]["text_config"]["moe_config"]["capacity_factor"] = 1.0
    source = type("Source", (), {"document": staticmethod(stub_document)})
    stage = make_joint(Recipe.from_dict(values), source).stage
    stage.module.train()
    seen, plain = [], router.limit_capacity

    def watched(weights, experts, num_experts, factor, is_token=None):
        seen.append(is_token)
        return plain(weights, experts, num_experts, factor, is_token)

    monkeypatch.setattr(router, "limit_capacity", watched)
    arrays, _ = stage.host_batch(random.Random(0), 3, 0.0)
    stage.loss(*map(mx.array, arrays))
    (is_token,) = seen  # one sparse layer
    document = arrays[1].reshape(-1)
    assert (document < 0).any()
    assert_equal(is_token, document >= 0)


# --- what decides a run --------------------------------------------------------------


def test_all_first_weights_come_from_the_seed(stub):
    """Several processes must start from the same weights; MLX seeds itself by clock."""
    recipe = Recipe.from_dict(recipe_with())

    def first(seed, clock):
        mx.random.seed(clock)
        model = MM1(recipe.model)
        initialize(model, seed)
        stub()
        trainer = make_trainer(recipe, "encoder", model, encode, Path("/nonexistent"))
        return {
            **dict(tree_flatten(model.parameters())),
            **dict(tree_flatten(trainer.module.parameters())),
        }

    one, same, other = first(0, 1), first(0, 2), first(1, 1)
    for name in one:
        assert_equal(one[name], same[name], name)
    parts = [one[f"{name}.weight"] for name in ("image_proj", "vision.patch_embed")]
    assert mx.any(parts[0][:16, :16] != parts[1][:16, :16])  # not the same draws
    assert mx.any(one["decoder.lm_head.weight"] != other["decoder.lm_head.weight"])


def test_fresh_weights_have_the_stated_spread():
    model = MM1(Recipe.from_dict(recipe_with()).model)
    initialize(model, 0)
    found = {name: np.array(v) for name, v in tree_flatten(model.parameters())}
    cut = 0.8796  # the spread of a normal that is cut at 2
    for name, spread in {
        "decoder.embed_tokens.weight": 0.5,
        "vision.position_embedding": 0.3,
        "decoder.layers.0.attn.qkv_proj.weight": 32**-0.5,
        "decoder.layers.0.attn.o_proj.weight": 0.02,
        "decoder.layers.1.moe.experts.down_proj": 0.02,
        "decoder.layers.1.moe.experts.up_proj": 32**-0.5,
    }.items():
        assert found[name].std() == pytest.approx(cut * spread, rel=0.15), name
    for name, value in found.items():
        if name.endswith("bias"):
            assert not value.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name


def test_a_batch_is_decided_by_seed_stage_step_and_rank():
    draws = {
        args: batch_rng(*args).random()
        for args in [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0),
                     (0, "a", 0, 1)]
    }  # fmt: skip
    assert len(set(draws.values())) == 5
    assert batch_rng(0, "a", 0, 0).random() == draws[0, "a", 0, 0]


def test_the_law_counts_the_decoder_without_its_embeddings(stub):
    recipe = Recipe.from_dict(recipe_with(joint={"learning_rate": "mm1"}))
    stub()
    trainer = make_trainer(recipe, "joint", MM1(recipe.model), encode, Path("/x"))
    D, F, E = 32, 32, 2
    attention = 4 * D * D
    layers = 2 * attention + 2 * 2 * D + 2 * D * F + E * 2 * D * F + E * D
    assert trainer.peak_rate() == pytest.approx(mm1_learning_rate(layers))


# --- stop and go on ------------------------------------------------------------------


def stop_after(steps):
    """A stop() that is true when it was asked `steps` times."""
    left = iter(range(steps - 1, -1, -1))
    return lambda: next(left) == 0


def test_a_run_that_is_stopped_goes_on_exactly(stub, tmp_path):
    recipe, out, tokenizer = stub()
    whole = pretrain(recipe, out, tokenizer)
    assert whole == out / "model"
    lines = []
    for steps in (3, 2, 4):  # in the first stage, at its end, in the second
        stopped = pretrain(
            recipe, tmp_path / "parts", tokenizer, stop=stop_after(steps)
        )
        assert stopped is None and not (tmp_path / "parts" / "model").exists()
    end = pretrain(recipe, tmp_path / "parts", tokenizer, tell=lines.append)

    assert "joint: going on from step 5" in lines
    for name in ("encoder.safetensors", "joint.safetensors"):
        assert_same_state(out / name, tmp_path / "parts" / name)
    assert (end / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


def test_with_both_rates_at_zero_only_the_connector_learns():
    joint = {"vision_rate": 0.0, "decoder_rate": 0.0}
    recipe = Recipe.from_dict(recipe_with(data="json", joint=joint))
    source = type("Source", (), {"document": staticmethod(stub_document)})
    trainer = make_joint(recipe, source)
    before = dict(tree_flatten(trainer.module.parameters()))
    next(iter(trainer.run(save_every=100)))
    after = dict(tree_flatten(trainer.module.parameters()))
    moved = {n for n in before if mx.any(before[n] != after[n]).item()}
    assert moved and {name.partition(".")[0] for name in moved} == {"connector"}


def test_a_finished_run_is_only_written_again(stub):
    files = stub()
    pretrain(*files)
    before = (files[1] / "model" / "model.safetensors").read_bytes()
    seen = []
    pretrain(*files, report=seen.append)
    assert seen == []
    assert (files[1] / "model" / "model.safetensors").read_bytes() == before


def test_the_second_stage_takes_the_first_ones_encoder(stub, tmp_path):
    recipe, out, tokenizer = stub(joint={"steps": 1, "vision_rate": 0.0})
    pretrain(recipe, out, tokenizer, stage="encoder")
    trained = arrays_of(out / "encoder.safetensors")
    lines = []
    pretrain(recipe, out, tokenizer, stage="joint", tell=lines.append)
    joint = arrays_of(out / "joint.safetensors")
    for name, array in trained.items():
        if name.startswith("parameters.vision."):
            assert_equal(joint[name], array, name)
    assert "encoder from" in lines[0]
    pretrain(recipe, tmp_path / "fresh", tokenizer, stage="joint", tell=lines.append)
    assert "the encoder starts fresh" in lines[-1]


def test_the_joint_stage_can_start_from_a_model_folder(stub, tmp_path):
    recipe, out, tokenizer = stub(joint={"steps": 1, "learning_rate": 1e-12})
    folder = pretrain(recipe, out, tokenizer)
    again, lines = tmp_path / "again", []
    pretrain(recipe, again, tokenizer, stage="joint", init=folder, tell=lines.append)
    assert lines == [f"joint: starts from {folder}"]
    end, start = (
        arrays_of(again / "joint.safetensors"),
        mx.load(str(folder / "model.safetensors")),
    )
    for name, array in start.items():
        found = end[f"parameters.{name}"]
        assert found.dtype == mx.float32, name  # the folder's 16 bit are for shipping
        assert_equal(found.astype(mx.float16), array, name)
    with pytest.raises(CheckpointError, match="There is no folder"):
        pretrain(recipe, again, tokenizer, stage="joint", init=tmp_path / "absent")


def test_the_joint_stage_can_start_at_another_picture_size(stub, tmp_path):
    recipe, out, tokenizer = stub(joint={"steps": 1, "learning_rate": 1e-12})
    values = json.loads(recipe.read_text(encoding="utf-8"))
    tables = {"type": "c_abstractor", "hidden_size": 8, "depth": 1}
    values["model"]["connector_config"] |= tables
    recipe.write_text(json.dumps(values), encoding="utf-8")
    folder = pretrain(recipe, out, tokenizer)
    vision = values["model"]["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    vision["image_size"] = values["images"]["size"] = (side + 1) * vision["patch_size"]
    larger = tmp_path / "larger.json"
    larger.write_text(json.dumps(values), encoding="utf-8")
    again = tmp_path / "again"
    pretrain(larger, again, tokenizer, stage="joint", init=folder)
    start, end = (
        mx.load(str(folder / "model.safetensors")),
        arrays_of(again / "joint.safetensors"),
    )
    resized = set()
    for name, array in start.items():
        found, array = end[f"parameters.{name}"], array.astype(mx.float32)
        if name.endswith("position_embedding"):
            resized.add(name)
            rest = array.shape[0] - side**2
            grid = resize_grid(array[rest:], side + 1, side + 1)
            array = mx.concatenate([array[:rest], grid])
        assert_close(found, array, atol=1e-6)  # one step at a rate of 1e-12
    assert resized == {"vision.position_embedding", "connector.position_embedding"}
    values["model"]["vision_config"]["hidden_size"] *= 2
    larger.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match="misshaped"):
        pretrain(larger, tmp_path / "no", tokenizer, stage="joint", init=folder)


def test_a_run_ends_at_a_step_and_goes_on_as_if_it_had_not(stub, tmp_path):
    recipe, out, tokenizer = stub()
    assert pretrain(recipe, out, tokenizer, stage="joint", until=2) is None
    assert load_state(out / "joint.safetensors")[1]["step"] == 2
    seen = []
    again = {"stage": "joint", "report": seen.append}
    assert pretrain(recipe, out, tokenizer, until=2, **again) is None
    assert not seen
    assert pretrain(recipe, out, tokenizer, until=6, **again) == out / "model"
    whole = tmp_path / "whole"
    pretrain(recipe, whole, tokenizer, stage="joint")
    assert_same_state(out / "joint.safetensors", whole / "joint.safetensors")


def test_the_encoder_stage_can_start_from_another_run(stub, tmp_path):
    recipe, out, tokenizer = stub(encoder={"learning_rate": 1e-12})
    pretrain(recipe, out, tokenizer, stage="encoder")
    again, lines = tmp_path / "again", []
    settings = {"stage": "encoder", "seed": 9, "tell": lines.append}
    pretrain(recipe, again, tokenizer, init=out, **settings)
    assert lines == [f"encoder: starts from {out}"]
    start, end = (arrays_of(f / "encoder.safetensors") for f in (out, again))
    for name in start:
        if name.startswith("parameters."):
            assert mx.allclose(start[name], end[name], atol=1e-6), name
    with pytest.raises(CheckpointError, match=r"no checkpoint .* to start from"):
        pretrain(recipe, tmp_path / "other", tokenizer, init=tmp_path)


def test_this_runs_encoder_goes_before_that_of_a_model_folder(stub, tmp_path):
    still = {"steps": 1, "learning_rate": 1e-12}
    recipe, out, tokenizer = stub(joint=still)
    folder = pretrain(recipe, out, tokenizer)
    again = tmp_path / "again"
    pretrain(recipe, again, tokenizer, stage="encoder", seed=8)
    pretrain(recipe, again, tokenizer, stage="joint", init=folder)
    end = arrays_of(again / "joint.safetensors")
    encoder = arrays_of(again / "encoder.safetensors")
    old = mx.load(str(folder / "model.safetensors"))
    for name, array in old.items():
        if not name.startswith("vision."):
            found = end[f"parameters.{name}"].astype(mx.float16)
            assert_equal(found, array, name)
        elif f"parameters.{name}" in encoder:
            wanted = encoder[f"parameters.{name}"]
            assert mx.allclose(end[f"parameters.{name}"], wanted, atol=1e-6), name


# --- the region contrast in the joint stage ------------------------------------------


def test_the_joint_stage_can_go_on_with_the_region_contrast(stub, tmp_path):
    still = {"steps": 1, "learning_rate": 1e-12, "contrast": 0.3}
    recipe, out, tokenizer = stub(joint=still)
    pretrain(recipe, out, tokenizer)
    encoder, joint = (arrays_of(out / f"{n}.safetensors") for n in ("encoder", "joint"))
    heads = [name for name in joint if name.startswith("parameters.contrast.")]
    assert len(heads) == 6
    for name in heads:  # taken from the first stage
        before = encoder[name.replace("contrast.", "", 1)]
        assert mx.allclose(joint[name], before, atol=1e-6), name
    weights = mx.load(str(out / "model" / "model.safetensors"))
    assert not [name for name in weights if "contrast" in name]
    recipe = Recipe.from_dict(recipe_with(joint=still))
    model = load_model_state(out / "joint.safetensors", recipe.model)
    for name, array in tree_flatten(model.parameters()):
        assert_equal(array, joint[f"parameters.{name}"], name)


def test_the_contrast_learns_from_the_pictures_of_documents(stub):
    files = stub(joint={"steps": 40, "batch": 8, "contrast": 1.0})
    found = losses(files, "joint", "contrast")
    assert np.mean(found[-3:]) < 0.5 * np.mean(found[:3])


def test_a_checkpoint_of_another_run_is_refused(stub):
    files = stub()
    pretrain(*files, stage="encoder")
    with pytest.raises(ConfigError, match="made with the seed 3, not 4"):
        pretrain(*files, stage="encoder", seed=4)
    stub(encoder={"learning_rate": 0.02})
    with pytest.raises(
        ConfigError, match=r"stages\.learning_rate: 0\.01, now 0\.02.*another folder"
    ):
        pretrain(*files, stage="encoder")
    stub(seed=3, joint={"steps": 9})  # the other stage may change
    pretrain(*files, stage="encoder")


def test_a_checkpoint_without_a_seed_goes_on(stub):
    """As those of the first version are."""
    files = stub()
    pretrain(*files, stage="encoder", stop=stop_after(2))
    path = files[1] / "encoder.safetensors"
    trees, facts = load_state(path)
    del facts["seed"]
    save_state(path, trees, facts)
    lines = []
    pretrain(*files, stage="encoder", tell=lines.append)
    assert lines == ["encoder: going on from step 2"]


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\0" * 100])
def test_a_damaged_checkpoint_is_named(stub, content):
    files = stub()
    files[1].mkdir()
    (files[1] / "encoder.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint of a run, or is da"):
        pretrain(*files, stage="encoder")


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_state(path, {"tree": {"x": mx.array([1.0])}}, {"step": 1})

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm1_mlx.checkpoint.disk.os.fsync", no_space)
    with pytest.raises(CheckpointError, match=r"No space.* before is whole"):
        save_state(path, {"tree": {"x": mx.array([2.0])}}, {"step": 2})
    trees, facts = load_state(path)
    assert trees["tree"]["x"].tolist() == [1.0] and facts == {"step": 1}


def test_a_state_comes_back_as_it_was(tmp_path):
    path = tmp_path / "folder" / "a.safetensors"
    trees = {"one": {"list": [{"x": mx.array([1, 2])}, {"x": mx.zeros((2, 3))}]}}
    save_state(path, trees, {"recipe": {"a": [1, None, "ü"]}})
    back, facts = load_state(path)
    assert facts == {"recipe": {"a": [1, None, "ü"]}}
    assert back["one"]["list"][1]["x"].shape == (2, 3)
    assert back["one"]["list"][0]["x"].tolist() == [1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


# --- what comes out ------------------------------------------------------------------


def test_the_model_folder_answers_as_the_trained_model_does(stub):
    from mm1_mlx import generate, load

    folder = pretrain(*stub(joint={"steps": 60, "batch": 8}))
    model, processor = load(folder)
    import stub_data

    for seed in range(4):
        name, image = stub_data.picture(random.Random(seed))
        answer = generate(
            model, processor, "What colour 0?", images=[image], max_tokens=8
        )
        assert answer.text == name and answer.finish_reason == "stop"
    stored = mx.load(str(folder / "model.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.float16}


def test_the_model_of_a_checkpoint(stub, tmp_path):
    files = stub()
    pretrain(*files)
    config = Recipe.from_dict(recipe_with()).model
    model = load_model_state(files[1] / "joint.safetensors", config)
    stored = mx.load(str(files[1] / "model" / "model.safetensors"))
    for name, array in tree_flatten(model.parameters()):
        assert_equal(array.astype(mx.float16), stored[name], name)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint"):
        load_model_state(tmp_path / "absent", config)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors do not fit"):
        load_model_state(files[1] / "encoder.safetensors", config)
    text = replace(config.text_config, intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"misshaped: decoder\.layers\.0\.mlp"):
        load_model_state(
            files[1] / "joint.safetensors", replace(config, text_config=text)
        )
