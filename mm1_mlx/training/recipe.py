"""What a pretraining run is: its model, its pictures, its data and its stages.

A recipe is a JSON file; mm1_mlx/training/README.md lists its keys.
"""

import importlib
import json
import random
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.inputs.prompts import TEMPLATES
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.training.documents import KINDS

STAGES = ("encoder", "joint")  # in their order
OBJECTIVES = ("regions", "global", "reconstruction")
ALTERNATE_KEYS = ("batch", "row_length", "images_per_row", "targets_per_row", "mix")


def _check(name: str, key: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name}.{key} is {value!r}, but must be {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of a run.

    batch: pictures (encoder stage) or rows (joint stage) per step, over all processes.
    learning_rate: the peak, or "mm1" for the paper's law. floor: the last rate as a
    part of the peak. clip: the largest norm of all gradients together.
    """

    steps: int
    batch: int
    learning_rate: float | str = "mm1"
    warmup: int = 200
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    objective: str = "regions"  # encoder stage: one of OBJECTIVES
    row_length: int = 128  # joint stage: tokens
    images_per_row: float = 2.0  # joint stage: room for pictures, on average
    targets_per_row: int = 24  # joint stage: room for supervised tokens
    # joint stage: tokens that packing counts for a picture, as many as it takes or
    # more; 0 is as many. What is compared with other connectors reads the same rows.
    image_counts_as: int = 0
    mix: dict = field(
        default_factory=lambda: {"caption": 0.45, "interleaved": 0.45, "text": 0.10}
    )
    vision_rate: float = 1.0  # the encoder's learning rate, relative
    decoder_rate: float = 1.0  # the decoder's, likewise
    recompute: bool = False  # gradient checkpointing: less memory, a third slower
    contrast: float = 0.0  # joint stage: weight of the region contrast beside the text
    # joint stage: steps of another shape, for long documents; see `at`
    alternates: list = field(default_factory=list)

    def at(self, step: int) -> "StageSettings":
        """The settings of one step: these, or one of the alternates by its share.

        An alternate is an object of "share" (its part of all steps) and those of
        ALTERNATE_KEYS that differ. Long documents need long rows, but in a long row of
        short ones most of the attention would be masked away.
        """
        place = random.Random(f"alternate/{step}").random()
        for alternate in self.alternates:
            place -= alternate["share"]
            if place < 0:
                own = {k: v for k, v in alternate.items() if k != "share"}
                return replace(self, alternates=[], **own)
        return self

    @classmethod
    def from_dict(cls, values: dict, name: str) -> "StageSettings":
        """The settings of a recipe's stage; ConfigError names what is wrong."""
        if not isinstance(values, dict):
            raise ConfigError(f"{name} is {values!r}, but must be an object.")
        known = sorted(f.name for f in fields(cls))
        if unknown := sorted(values.keys() - set(known)):
            raise ConfigError(f"{name}: unknown keys {unknown}. Known keys: {known}.")
        if missing := sorted({"steps", "batch"} - values.keys()):
            raise ConfigError(f"{name}: missing keys {missing}.")
        settings = cls(**values)
        settings._check_numbers(name)
        settings._check_choices(name)
        settings._check_alternates(name)
        return settings

    def _check_alternates(self, name: str) -> None:
        found: Any = self.alternates
        good = isinstance(found, list) and all(isinstance(a, dict) for a in found)
        _check(name, "alternates", found, good, "a list of objects")
        for i, own in enumerate(found):
            place = f"{name}.alternates[{i}]"
            known = ("share", *ALTERNATE_KEYS)
            if unknown := sorted(own.keys() - set(known)):
                raise ConfigError(
                    f"{place}: unknown keys {unknown}. Known keys: {sorted(known)}."
                )
            share = own.get("share")
            good = _is_number(share) and 0 < share < 1
            _check(place, "share", share, good, "above 0 and below 1")
            rest = {k: v for k, v in own.items() if k != "share"}
            one = replace(self, alternates=[], **rest)
            one._check_numbers(place)
            one._check_choices(place)
        total = sum(own["share"] for own in found)
        _check(name, "alternates", total, total <= 1, "of shares of at most 1 in all")

    def _check_numbers(self, name: str) -> None:
        for key in ("steps", "batch", "row_length", "targets_per_row"):
            value = getattr(self, key)
            good = _is_whole(value) and value > 0
            _check(name, key, value, good, "a whole number of at least 1")
        for key in ("warmup", "image_counts_as"):
            value = getattr(self, key)
            good = _is_whole(value) and value >= 0
            _check(name, key, value, good, "a whole number of at least 0")
        for key in ("clip", "images_per_row"):
            value = getattr(self, key)
            _check(name, key, value, _is_number(value) and value > 0, "above 0")
        for key in ("weight_decay", "vision_rate", "decoder_rate", "contrast"):
            value = getattr(self, key)
            _check(name, key, value, _is_number(value) and value >= 0, "0 or more")
        good = _is_number(self.floor) and 0 <= self.floor <= 1
        _check(name, "floor", self.floor, good, "between 0 and 1")
        rate: Any = self.learning_rate
        good = rate == "mm1" or (_is_number(rate) and rate > 0)
        _check(name, "learning_rate", rate, good, 'above 0, or "mm1"')
        betas = self.betas
        good = isinstance(betas, (list, tuple)) and len(betas) == 2
        good = good and all(_is_number(b) and 0 <= b < 1 for b in betas)
        _check(name, "betas", betas, good, "two numbers from 0 to below 1")

    def _check_choices(self, name: str) -> None:
        good = isinstance(self.recompute, bool)
        _check(name, "recompute", self.recompute, good, "true or false")
        choices = ", ".join(map(repr, OBJECTIVES))
        good = self.objective in OBJECTIVES
        _check(name, "objective", self.objective, good, f"one of {choices}")
        good = isinstance(self.mix, dict) and set(self.mix) <= set(KINDS)
        good = good and all(_is_number(w) and w >= 0 for w in self.mix.values())
        good = good and sum(self.mix.values()) > 0
        kinds = ", ".join(KINDS)
        _check(name, "mix", self.mix, good, f"an object of weights for {kinds}")


@dataclass(frozen=True)
class Recipe:
    """A whole pretraining run, as read from its JSON file.

    data: the import name of a module, or a folder with train.jsonl. source: the values
    as they were written; a checkpoint keeps them.
    """

    model: MM1Config
    images: ImageSettings
    data: str
    stages: dict[str, StageSettings]
    seed: int = 0
    chat_template: str = "mm1-tiny"
    source: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """The recipe of these values; ConfigError names what is wrong."""
        if not isinstance(values, dict):
            raise ConfigError("recipe: must be an object of keys and values.")
        required = {"model", "images", "data", "stages"}
        known = required | {"seed", "chat_template"}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"recipe: unknown keys {unknown}. Known keys: {sorted(known)}."
            )
        if missing := sorted(required - values.keys()):
            raise ConfigError(f"recipe: missing keys {missing}.")
        stages, seed = values["stages"], values.get("seed", 0)
        good = isinstance(stages, dict) and stages and stages.keys() <= set(STAGES)
        found = sorted(stages) if isinstance(stages, dict) else stages
        _check("recipe", "stages", found, bool(good), "an object of encoder, joint")
        _check("recipe", "seed", seed, _is_whole(seed), "a whole number")
        good = isinstance(values["data"], str) and bool(values["data"])
        _check("recipe", "data", values["data"], good, "a module's name or a folder")
        template = values.get("chat_template", "mm1-tiny")
        names = ", ".join(sorted(TEMPLATES))
        good = template in TEMPLATES
        _check("recipe", "chat_template", template, good, f"one of {names}")
        return cls(
            model=MM1Config.from_dict(values["model"]),
            images=ImageSettings.from_dict(values["images"]),
            data=values["data"],
            stages={
                name: StageSettings.from_dict(stages[name], f"stages.{name}")
                for name in STAGES
                if name in stages
            },
            seed=seed,
            chat_template=template,
            source=values,
        )

    def only(self, stage: str) -> "Recipe":
        """This recipe with one of its stages; "all" keeps them."""
        if stage == "all":
            return self
        if stage not in self.stages:
            raise ConfigError(
                f"The recipe has no stage {stage!r}, only {', '.join(self.stages)}."
            )
        return replace(self, stages={stage: self.stages[stage]})

    def with_steps(self, steps: int) -> "Recipe":
        """This recipe with other numbers of steps."""
        stages = {name: replace(s, steps=steps) for name, s in self.stages.items()}
        return replace(self, stages=stages)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a JSON file. ConfigError if there is none, or it makes no sense."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no recipe {path}.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a JSON recipe: {error}.") from error
    return Recipe.from_dict(values)


def data_source(name: str) -> Any:
    """What makes the documents: a module by its import name, or a folder of files.

    It has document(rng, kind, progress), and for the encoder stage
    region_picture(rng, progress). DatasetError says what is missing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        from mm1_mlx.training.folder_source import FolderSource

        return FolderSource(folder)
    if "/" in name or folder.exists():
        raise DatasetError(
            f"The data folder {name} does not exist. Give a folder with train.jsonl, "
            f"or the import name of a module."
        )
    try:
        source = importlib.import_module(name)
    except ImportError as error:
        raise DatasetError(
            f"The data module {name!r} cannot be imported ({error}). Give a folder "
            f"with train.jsonl, or an importable module with document(rng, kind, "
            f"progress), for example examples.mm1_tiny.documents in a clone of the "
            f"repository."
        ) from error
    if not hasattr(source, "document"):
        raise DatasetError(
            f"The data module {name!r} has no document(rng, kind, progress)."
        )
    return source
