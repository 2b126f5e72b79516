"""Training runs that are stopped and gone on with, or start from another's files."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_pretraining import losses, make_joint, stub_document
from training_kit import arrays_of, assert_same_state, recipe_with, uncompiled

from helpers import assert_close, assert_equal
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models.vision import resize_grid
from mm1_mlx.training.pretraining_run import pretrain
from mm1_mlx.training.recipe import Recipe
from mm1_mlx.training.state import load_model_state, load_state, save_state

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)

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


def test_a_later_round_goes_on_with_the_region_texts(stub, tmp_path):
    """Of the run whose model it starts from; a model that stands alone has none."""
    still = {"steps": 1, "learning_rate": 1e-12, "contrast": 0.3}
    recipe, out, tokenizer = stub(joint=still)
    model = pretrain(recipe, out, tokenizer)
    before, told = arrays_of(out / "joint.safetensors"), []
    shutil.copytree(model, tmp_path / "alone" / "model")
    for name, init in (("next", model), ("other", tmp_path / "alone" / "model")):
        again = tmp_path / name
        files = (recipe, again, tokenizer)
        pretrain(*files, stage="joint", init=init, tell=told.append)
    after = arrays_of(tmp_path / "next" / "joint.safetensors")
    for name in before:
        if name.startswith("parameters.contrast."):
            assert mx.allclose(after[name], before[name], atol=1e-6), name
    about = [line for line in told if "region texts" in line]
    assert about[0] == f"joint: region texts from {out / 'joint.safetensors'}"
    assert about[1].endswith("so they start fresh")


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
