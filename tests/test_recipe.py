"""Recipes: what is read from the file, and what is wrong with one."""

import json
import random
import sys
from dataclasses import MISSING, fields

import pytest
from training_kit import STUB, recipe_with

from helpers import ROOT
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.training.recipe import Recipe, StageSettings, data_source, read_recipe


def test_the_recipe_of_mm1_tiny_is_a_recipe():
    recipe = read_recipe(ROOT / "examples" / "mm1_tiny" / "recipe.json")
    assert list(recipe.stages) == ["encoder", "joint"]
    assert recipe.model.tokens_per_image == 16
    assert recipe.stages["joint"].mix == {
        "caption": 0.45, "interleaved": 0.45, "text": 0.10
    }  # fmt: skip


def test_stages_stand_in_their_order_and_can_be_chosen():
    values = recipe_with()
    values["stages"] = dict(reversed(values["stages"].items()))
    recipe = Recipe.from_dict(values)
    assert list(recipe.stages) == ["encoder", "joint"]
    assert list(recipe.only("joint").stages) == ["joint"]
    assert list(recipe.only("all").stages) == ["encoder", "joint"]
    assert {s.steps for s in recipe.with_steps(7).stages.values()} == {7}
    assert recipe.source == values


WRONG = [
    ({"seeed": 1}, r"unknown keys \['seeed'\]"),
    ({"seed": "a"}, r"recipe\.seed is 'a', but must be a whole number"),
    ({"data": 3}, r"recipe\.data is 3, but must be a module"),
    ({"stages": {}}, r"recipe\.stages is \[\], but must be"),
    ({"stages": {"third": {}}}, r"\['third'\], but must be an object of encoder"),
    ({"model": {"a": 1}}, r"config: unknown keys \['a'\]"),
    ({"images": {"size": 0}}, r"preprocessor: size is 0"),
    ({"joint": {"stepps": 3}}, r"stages\.joint: unknown keys \['stepps'\]"),
    ({"joint": {"steps": 0}}, r"joint\.steps is 0, but must be a whole number"),
    ({"joint": {"batch": 1.5}}, r"joint\.batch is 1\.5, but must be a whole"),
    ({"joint": {"warmup": -1}}, r"joint\.warmup is -1"),
    ({"joint": {"clip": 0}}, r"joint\.clip is 0, but must be above 0"),
    ({"joint": {"images_per_row": -2}}, r"joint\.images_per_row is -2"),
    ({"joint": {"image_counts_as": -1}}, r"joint\.image_counts_as is -1"),
    ({"joint": {"weight_decay": "x"}}, r"joint\.weight_decay is 'x'"),
    ({"joint": {"floor": 2}}, r"joint\.floor is 2, but must be between 0 and 1"),
    ({"joint": {"learning_rate": "mm2"}}, r"'mm2', but must be above 0, or \"mm1\""),
    ({"joint": {"betas": [0.9]}}, r"joint\.betas is \[0\.9\]"),
    ({"joint": {"mix": {"captions": 1}}}, r"mix is .* for caption, interleaved, text"),
    ({"joint": {"mix": {"text": 0}}}, r"joint\.mix is"),
    ({"encoder": {"objective": "clip"}}, r"'clip', but must be one of 'regions', "),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[str(c) for c, _ in WRONG])
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(recipe_with(**changes))


def test_missing_keys_are_named():
    values = recipe_with()
    del values["images"], values["data"]
    with pytest.raises(ConfigError, match=r"missing keys \['data', 'images'\]"):
        Recipe.from_dict(values)
    values = recipe_with()
    values["stages"]["joint"] = {"batch": 1}
    with pytest.raises(ConfigError, match=r"stages.joint: missing keys \['steps'\]"):
        Recipe.from_dict(values)
    with pytest.raises(ConfigError, match=r"stages\.joint is 3, but must be an object"):
        Recipe.from_dict(recipe_with(stages={"joint": 3}))
    with pytest.raises(ConfigError, match="must be an object of keys"):
        Recipe.from_dict([])


def test_the_readme_lists_every_key_with_its_default():
    text = (ROOT / "mm1_mlx" / "training" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in text.splitlines() if "` |" in line]
    listed = {row[0].strip(" `"): row[2].strip() for row in rows if len(row) == 3}
    for field in fields(StageSettings):
        assert field.name in listed, f"README.md does not list {field.name}"
        if field.default is MISSING:
            continue
        default = field.default
        told = (
            json.dumps(default) if isinstance(default, (str, tuple)) else str(default)
        )
        told = told if field.name != "objective" else default
        assert listed[field.name].strip("`") == told, field.name
    for key in ("model", "images", "data", "stages", "seed", "chat_template"):
        assert key in listed


def test_a_stage_that_is_not_there():
    values = recipe_with()
    del values["stages"]["encoder"]
    with pytest.raises(ConfigError, match="no stage 'encoder', only joint"):
        Recipe.from_dict(values).only("encoder")


def test_files_that_are_no_recipe(tmp_path):
    path = tmp_path / "recipe.json"
    with pytest.raises(ConfigError, match=r"There is no recipe .*recipe\.json"):
        read_recipe(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not a JSON recipe"):
        read_recipe(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)
    path.write_text(json.dumps(recipe_with()))
    assert read_recipe(path).seed == 3


# --- where the data comes from -------------------------------------------------------


def test_data_is_a_module_or_a_folder(tmp_path, monkeypatch):
    (tmp_path / "stub_module_for_recipe.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    source = data_source("stub_module_for_recipe")
    assert source.document(random.Random(0), "text").kind == "text"
    sys.modules.pop("stub_module_for_recipe")

    (tmp_path / "train.jsonl").write_text('{"text": "hello"}\n')
    source = data_source(str(tmp_path))
    assert source.document(random.Random(0), "text").branches[0][0].text == "hello"


def test_data_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"'no\.such' cannot be imported .*No modul"):
        data_source("no.such")
    with pytest.raises(DatasetError, match=r"folder .*/absent does not exist"):
        data_source(str(tmp_path / "absent"))
    (tmp_path / "empty_module_for_recipe.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DatasetError, match=r"has no document\(rng, kind, progress\)"):
        data_source("empty_module_for_recipe")
