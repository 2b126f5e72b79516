"""A pretraining run from recipe file to model folder."""

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.pretraining import (
    Recipe,
    Trainer,
    float16_weights,
    initialize,
    make_trainer,
)

ENCODER_WEIGHTS = "encoder_weights.safetensors"


def read_recipe(path: Path) -> Recipe:
    """The recipe of a JSON file."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"There is no recipe {path}.") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not a JSON recipe: {error}") from error
    return Recipe.from_dict(values)


def sentencepiece_encoder(path: Path) -> Callable[[str], list[int]]:
    """Text to ids by a sentencepiece model; special marks in the text count."""
    import sentencepiece

    if not path.is_file():
        raise CheckpointError(f"There is no sentencepiece model {path}.")
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


class _StopOnSignal:
    """True after Ctrl-C or a termination; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = threading.Event()

    def __enter__(self):
        self._old = {
            number: signal.signal(number, self._ask)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number, frame):
        if self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def pretrain(
    recipe_path: Path,
    out: Path,
    tokenizer: Path,
    *,
    stage: str = "all",
    steps: int | None = None,
    seed: int | None = None,
    init: Path | None = None,
    save_every: int = 250,
    report_every: int = 50,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run the stages of a recipe in order and write the model folder.

    A stage goes on from its checkpoint in `out`, where there is one. Ctrl-C saves and
    raises KeyboardInterrupt after telling how to go on.
    """
    recipe = read_recipe(recipe_path)
    main = mx.distributed.init().rank() == 0  # other processes work in silence
    if not main:
        tell = _silent
    if seed is not None:
        recipe.seed = seed
    encode = sentencepiece_encoder(tokenizer)
    if steps is not None:
        chosen = [stage] if stage != "all" else list(recipe.stages)
        for name in chosen:
            recipe.stages[name] = replace(recipe.stages[name], steps=steps)
    model = MM1(recipe.model)
    initialize(model, recipe.seed)
    mx.eval(model.parameters())
    names = [name for name in ("encoder", "joint") if name in recipe.stages]
    for name in names if stage == "all" else [stage]:
        if name == "joint":
            _take_encoder(model, out, init, tell)
        trainer = make_trainer(recipe, name, model, encode, out)
        if trainer.resume():
            tell(f"{name}: going on from step {trainer.step}")
        _run_stage(trainer, save_every, report_every, tell)
        if name == "encoder":
            encoder = {f"vision.{k}": v for k, v in _flat(model.vision).items()}
            if main:
                mx.save_safetensors(str(out / ENCODER_WEIGHTS), encoder)
    weights = out / "model.safetensors"
    if main:
        mx.save_safetensors(str(weights), float16_weights(model), {"format": "mlx"})
    return out


def _silent(line: str) -> None:
    pass


def _flat(module) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(module.parameters()))


def _take_encoder(model: MM1, out: Path, init: Path | None, tell) -> None:
    known = out / ENCODER_WEIGHTS
    if init is not None:
        model.load_weights(str(init / "model.safetensors"))
        tell(f"joint: starts from {init}")
    elif known.exists():
        model.load_weights(str(known), strict=False)
        tell(f"joint: encoder from {known}")


def _run_stage(trainer: Trainer, save_every: int, report_every: int, tell) -> None:
    averages: dict[str, float] = {}
    with _StopOnSignal() as signals:
        for now in trainer.run(save_every, signals.asked.is_set):
            for name, value in now.metrics.items():
                averages[name] = averages.get(name, 0.0) + value
            if now.step % report_every == 0 or now.step == now.steps:
                told = " ".join(
                    f"{name} {value / report_every:.4g}"
                    for name, value in averages.items()
                )
                rate = now.examples / max(now.seconds, 1e-9)
                peak = mx.get_peak_memory() / 1e9
                tell(
                    f"{now.stage} {now.step}/{now.steps} {told} "
                    f"| {now.seconds:.0f} s, {rate:.1f} examples/s, {peak:.2f} GB"
                )
                averages = {}
        if signals.asked.is_set():
            tell("saved; the same command goes on from here")
            raise KeyboardInterrupt
