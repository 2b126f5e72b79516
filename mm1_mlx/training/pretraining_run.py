"""A pretraining run from recipe file to model folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_model
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.vision import resize_grid
from mm1_mlx.training.encoder_stage import RegionText
from mm1_mlx.training.model_folder import make_processor, write_model
from mm1_mlx.training.pretraining import initialize, make_trainer
from mm1_mlx.training.recipe import Recipe, read_recipe
from mm1_mlx.training.state import load_state, set_weights
from mm1_mlx.training.trainer import Progress, Trainer

ENCODER_CHECKPOINT = "encoder.safetensors"
JOINT_CHECKPOINT = "joint.safetensors"
ENCODER_WEIGHTS = "encoder_weights.safetensors"
MODEL_FOLDER = "model"


def pretrain(
    recipe_path: Path,
    out: Path,
    tokenizer: Path,
    *,
    stage: str = "all",
    steps: int | None = None,
    until: int | None = None,
    seed: int | None = None,
    init: Path | None = None,
    save_every: int = 250,
    tell: Callable[[str], None] = lambda line: None,
    report: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Run the stages of a recipe in order; the model folder, or None if it was stopped.

    A stage goes on from its checkpoint in `out`, exactly as if it had never ended.
    Several processes (mlx.launch) share the work; the first one writes and tells.

    stage: "encoder", "joint" or "all". steps, seed: instead of the recipe's. until: a
    stage ends at this step, saved and with the rates of its whole number of steps.
    init: what the first of the stages starts from, at step 0 and with a fresh
    optimizer. For the encoder stage it is the folder of another run, whose
    encoder.safetensors is taken; for the joint stage a model folder, whose encoder
    gives way to that of this run's own encoder stage, where there was one. It may be of
    another picture size: then its position tables are interpolated. A region contrast
    goes on with the texts of the joint stage whose folder the model is in. tell:
    receives a line now and then; report: the state after every step. stop: asked after
    every step; True saves and ends the run.

    Raises ConfigError, DatasetError, CheckpointError.
    """
    recipe = _read_recipe(recipe_path, stage, steps, seed)
    if init is not None and not init.is_dir():
        raise CheckpointError(f"There is no folder {init} to start from.")
    main = mx.distributed.init().rank() == 0
    if not main:
        tell, report = _ignore, _ignore
    processor = make_processor(
        recipe.model, recipe.images, tokenizer, recipe.chat_template
    )
    model = MM1(recipe.model)
    initialize(model, recipe.seed)
    mx.eval(model.parameters())
    for name in recipe.stages:
        begin = init if name == next(iter(recipe.stages)) else None
        if name == "joint":
            _take_weights(model, out, begin, tell)
        trainer = make_trainer(recipe, name, model, processor.tokenizer.encode, out)
        _begin(trainer, name, begin, out, tell)
        if not _run_stage(trainer, until, save_every, report, stop):
            return None
        if name == "encoder" and main:
            weights = {f"vision.{k}": v for k, v in _flat(model.vision).items()}
            mx.save_safetensors(str(out / ENCODER_WEIGHTS), weights)
    if main:
        write_model(out / MODEL_FOLDER, model, processor)
    return out / MODEL_FOLDER


def _read_recipe(path: Path, stage: str, steps: int | None, seed: int | None) -> Recipe:
    recipe = read_recipe(path).only(stage)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    return recipe if steps is None else recipe.with_steps(steps)


def _begin(trainer: Trainer, name: str, init: Path | None, out: Path, tell) -> None:
    """Set a stage up at its checkpoint, or else at what it starts from."""
    if name == "encoder" and init is not None:
        trainer.begin_with(init / ENCODER_CHECKPOINT)
        tell(f"encoder: starts from {init}")
    if name == "joint" and trainer.stage.contrast is not None:
        _take_contrast(trainer.stage.contrast, out, init, tell)
    if trainer.resume():
        tell(f"{name}: going on from step {trainer.step}")


def _run_stage(
    trainer: Trainer,
    until: int | None,
    save_every: int,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> bool:
    """Whether the stage reached its end, rather than `until` or a wish to stop."""
    steps = trainer.stage.settings.steps
    if until is not None and until <= trainer.step < steps:
        return False
    for progress in trainer.run(save_every, _either(stop, trainer, until)):
        report(progress)
    return trainer.step >= steps


def _ignore(_: object) -> None:
    pass


def _either(
    stop: Callable[[], bool], trainer: Trainer, until: int | None
) -> Callable[[], bool]:
    """Whether to stop now: it was asked, or the step is reached."""
    return lambda: stop() or (until is not None and trainer.step >= until)


def _flat(module) -> dict[str, mx.array]:
    return _flat_tree(module.parameters())


def _flat_tree(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def _take_weights(model: MM1, out: Path, init: Path | None, tell) -> None:
    """What the joint stage starts from: a whole model, or the encoder's stage."""
    known = out / ENCODER_WEIGHTS
    if init is not None:
        start = load_model(init, dtype=mx.float32)
        # Other names or shapes than this recipe's are an error.
        set_weights(model, resized_positions(start, model), init)
        tell(f"joint: starts from {init}")
    if known.exists():
        model.load_weights(str(known), strict=False)
        tell(f"joint: encoder from {known}")
    elif init is None:
        tell("joint: no encoder stage in this folder, so the encoder starts fresh")


def resized_positions(start: MM1, model: MM1) -> dict[str, mx.array]:
    """The weights of `start`, its position tables on the grid of `model`'s pictures.

    MM1 (section 3.1) raises the resolution so: the tables are interpolated.
    """
    new, old = model.config.vision_config, start.config.vision_config
    assert new is not None and old is not None
    weights, side, patches = _flat(start), new.grid, old.num_patches
    for name in ("vision.position_embedding", "connector.position_embedding"):
        if name in weights and side**2 != patches:
            table = weights[name]
            rest = table.shape[0] - patches  # the class token's row is kept
            grid = resize_grid(table[rest:], side, side)
            weights[name] = mx.concatenate([table[:rest], grid])
    return weights


def _take_contrast(contrast: RegionText, out: Path, init: Path | None, tell) -> None:
    """What regions are described by: as this run's encoder stage learned it, or else
    the joint stage beside the model that it starts from."""
    places = [(out / ENCODER_CHECKPOINT, "")]
    if init is not None:
        places.append((init.parent / JOINT_CHECKPOINT, "contrast."))
    names = _flat(contrast)
    for file, prefix in places:
        if not file.exists():
            continue
        known = _flat_tree(load_state(file)[0].get("parameters", {}))
        found = {k: known[prefix + k] for k in names if prefix + k in known}
        shapes = {name: array.shape for name, array in found.items()}
        if shapes == {name: array.shape for name, array in names.items()}:
            contrast.load_weights(list(found.items()))
            tell(f"joint: region texts from {file}")
            return
    tell("joint: no region texts in this folder, so they start fresh")
