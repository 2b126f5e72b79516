"""A whole pretraining run in small: it learns, stops, goes on, and hands over."""

import random
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from training_kit import encode, recipe_with, uncompiled

from helpers import assert_equal
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models import router
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.pretraining import initialize, make_trainer
from mm1_mlx.training.pretraining_run import pretrain
from mm1_mlx.training.recipe import Recipe
from mm1_mlx.training.schedules import mm1_learning_rate
from mm1_mlx.training.state import load_model_state
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


def test_a_picture_counts_as_no_fewer_tokens_than_it_takes():
    from mm1_mlx.training.pretraining import document_encoder

    model = Recipe.from_dict(recipe_with()).model
    Q = model.tokens_per_image
    assert document_encoder(model, encode, Q + 3).marks.counts_as == Q + 3
    message = rf"image_counts_as is {Q - 1}, but a picture takes {Q} tokens"
    with pytest.raises(ConfigError, match=message):
        document_encoder(model, encode, Q - 1)


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


def test_a_frozen_encoder_is_that_of_the_checkpoint(tmp_path):
    """A run that goes on elsewhere began with other random weights."""
    values = recipe_with()
    values["stages"]["joint"] |= {"vision_rate": 0, "contrast": 0}
    source = type("Source", (), {"document": staticmethod(stub_document)})
    recipe, made = Recipe.from_dict(values), []
    for there in (False, True):
        trainer = make_joint(recipe, source, tmp_path)
        assert trainer.resume() == there
        if not there:
            made.append(trainer.stage.host_batch(random.Random(0), 3, 0.0)[0][4])
            initialize(trainer.module, 99)
            trainer.stage.resumed()
        made.append(trainer.stage.host_batch(random.Random(0), 3, 0.0)[0][4])
        trainer.save()
    assert_equal(made[1], made[2])
    assert np.abs(made[0] - made[1]).max() > 0.1


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
