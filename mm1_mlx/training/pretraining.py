"""MM1's pretraining in small: an encoder stage, then everything together.

The recipe is a dictionary (a JSON file, see examples/mm1_tiny/recipe.json). Every batch
is a function of (seed, stage, step, rank) alone, so a run that was interrupted goes on
exactly as it would have.
"""

import importlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.inputs.images import pixels
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.moe import expert_load, load_balance_loss, router_z_loss
from mm1_mlx.training import encoder_stage as first
from mm1_mlx.training.packing import (
    DocumentEncoder,
    DocumentMixer,
    Marks,
    collate,
    may_see,
)
from mm1_mlx.training.schedules import mm1_learning_rate, warmup_cosine
from mm1_mlx.training.state import load_state, save_state


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of a run.

    learning_rate: the peak, or "mm1" for the paper's law.
    batch: pictures (encoder stage) or rows (joint stage) per step, over all processes.
    """

    steps: int
    batch: int
    learning_rate: float | str = "mm1"
    warmup: int = 200
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    objective: str = "regions"  # encoder stage: regions, global or reconstruction
    row_length: int = 128  # joint stage
    images_per_row: float = 2.0  # joint stage: room for pictures, on average
    targets_per_row: int = 24  # joint stage: room for supervised tokens
    mix: dict = field(
        default_factory=lambda: {"caption": 0.45, "interleaved": 0.45, "text": 0.10}
    )
    vision_rate: float = 1.0  # the encoder's learning rate, relative

    @classmethod
    def from_dict(cls, values: dict, name: str) -> "StageSettings":
        known = sorted(f.name for f in fields(cls))
        if unknown := sorted(values.keys() - set(known)):
            raise ConfigError(f"{name}: unknown keys {unknown}. Known keys: {known}.")
        if values.get("objective", "regions") not in first.OBJECTIVES:
            raise ConfigError(
                f"{name}.objective is {values['objective']!r}, but must be one of "
                f"{', '.join(first.OBJECTIVES)}."
            )
        return cls(**values)


@dataclass
class Progress:
    """What a run tells while it works."""

    stage: str
    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float
    examples: int


def data_source(name: str) -> Any:
    """The module that makes documents, by its import name."""
    try:
        source = importlib.import_module(name)
    except ImportError as error:
        raise DatasetError(
            f"The data module {name!r} cannot be imported ({error}). Give an "
            f"importable module with document(rng, kind, progress), for example "
            f"examples.mm1_tiny.documents in a clone of the repository."
        ) from error
    if not hasattr(source, "document"):
        raise DatasetError(
            f"The data module {name!r} has no document(rng, kind, progress)."
        )
    return source


def initialize(module: nn.Module, seed: int, keep: str = "") -> None:
    """Fresh weights: truncated normals, residual outputs small, embeddings of std 0.5.

    Image tokens leave the connector with unit scale (norm_output); text embeddings of
    std 0.5 are near that scale, which decided success in small runs. Biases are zero.
    All is decided by the seed, so several processes start from the same weights.

    keep: parameters whose names start with it stay as they are.
    """
    key = mx.random.key(seed)
    new = []
    for name, value in tree_flatten(module.parameters()):
        if keep and name.startswith(keep):
            continue
        if name.endswith("bias"):
            new.append((name, mx.zeros_like(value)))
        if value.ndim < 2:
            continue
        key, own = mx.random.split(key)
        fan_in = value.shape[-1] if value.ndim < 4 else value[0].size
        std = fan_in**-0.5
        if name.endswith("embed_tokens.weight"):
            std = 0.5
        elif name.endswith("position_embedding"):
            std = 0.3
        elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            std = 0.02
        noise = mx.random.truncated_normal(-2, 2, value.shape, key=own)
        new.append((name, std * noise))
    module.load_weights(new, strict=False)


def batch_rng(seed: int, stage: str, step: int, rank: int) -> random.Random:
    """The generator of one batch; nothing else decides what is in it."""
    return random.Random(f"{seed}/{stage}/{step}/{rank}")


class JointStage:
    """Encoder, connector and decoder together, next token on text (MM1 section 4)."""

    name = "joint"

    def __init__(self, model: MM1, settings: StageSettings, source, encoder, images):
        self.module = model
        self.settings = settings
        self._mixer = DocumentMixer(source.document, settings.mix)
        self._encoder = encoder
        self._images: ImageSettings = images

    def host_batch(self, rng: random.Random, count: int, progress: float):
        """Arrays of a step, as NumPy; made beside the previous step's work."""
        s = self.settings
        room = round(count * s.images_per_row)
        rows = self._mixer.rows(
            rng, count, s.row_length, self._encoder, progress, max_images=room
        )
        targets = count * s.targets_per_row
        batch = collate(rows, s.row_length, self._encoder.marks.pad, targets)
        shots = _pixel_array(batch.images, self._images, room)
        arrays = (
            batch.ids, batch.document, batch.branch, batch.position, shots,
            batch.source, batch.target, batch.weight,
        )  # fmt: skip
        return arrays, batch.documents

    def loss(self, ids, document, branch, position, shots, source, target, weight):
        """The whole loss and what is reported. Shapes as in training.packing.Batch."""
        model: MM1 = self.module
        routed: list = []
        hidden = model.decoder.hidden(
            None,
            None,
            model.embed(ids, shots),
            mask=may_see(document, branch, mx),
            positions=position,
            router_outputs=routed,
        )
        states = hidden.reshape(-1, hidden.shape[-1])[source]
        logits = model.decoder.head(states)
        losses = nn.losses.cross_entropy(logits, target)
        total = mx.maximum(weight.sum(), 1e-6)
        text_loss = (losses * weight).sum() / total
        right = ((mx.argmax(logits, axis=-1) == target) * (weight > 0)).sum()
        metrics = {
            "text": text_loss,
            "accuracy": right / mx.maximum((weight > 0).sum(), 1),
        }
        loss = text_loss
        moe = model.config.text_config.moe_config
        if routed and moe is not None:
            tokens = document.reshape(-1) >= 0
            layers = len(routed)
            balance = sum(load_balance_loss(x, tokens) for x, _ in routed) / layers
            z = sum(router_z_loss(x, tokens) for x, _ in routed) / layers
            loss = loss + layers * moe.router_aux_loss_coef * balance
            loss = loss + layers * moe.router_z_loss_coef * z
            load = mx.stack(
                [expert_load(e, moe.num_local_experts, tokens) for _, e in routed]
            )
            metrics |= {"balance": balance, "z": z, "max_load": load.max()}
        return loss, metrics


class EncoderStage:
    """The encoder before it is connected: contrast with text, or reconstruction."""

    name = "encoder"
    per_picture, max_texts, text_length = 6, 64, 8

    def __init__(self, model: MM1, settings: StageSettings, source, encoder, images):
        self.settings = settings
        self._source, self._images = source, images
        self._encode = encoder._encode
        self._grid = model.config.vision_config.grid
        if settings.objective == "reconstruction":
            self.module: nn.Module = first.Reconstruction(model.vision)
        else:
            vocabulary = model.config.text_config.vocab_size
            self.module = first.RegionContrast(model.vision, vocabulary)

    def host_batch(self, rng: random.Random, count: int, progress: float):
        made = [self._source.region_picture(rng, progress) for _ in range(count)]
        shots = _pixel_array([image for image, _ in made], self._images, count)
        if self.settings.objective == "reconstruction":
            patches = self._grid**2
            prefix = [rng.randint(1, patches // 2) for _ in made]
            return (shots, np.array(prefix, np.int32)), count
        arrays = first.contrast_arrays(
            [(image.size, regions) for image, regions in made],
            self._encode,
            self._grid,
            self.per_picture,
            self.max_texts if self.settings.objective == "regions" else count,
            self.text_length if self.settings.objective == "regions" else 32,
            whole=self.settings.objective == "global",
        )
        return (shots, *arrays), count

    def loss(self, *arrays):
        loss, accuracy = self.module(*arrays)
        return loss, {"loss": loss, "accuracy": accuracy}


def _pixel_array(images: list, settings: ImageSettings, room: int):
    """Pixels of the pictures, padded with blank ones to `room`."""
    shots = np.zeros((room, settings.size, settings.size, 3), np.float32)
    for i, image in enumerate(images):
        shots[i] = pixels(image, settings)
    return shots


class Trainer:
    """Runs one stage: batches made ahead, compiled steps, checkpoints.

    With several processes (mlx.launch) each makes its own share of a batch and the
    gradients are averaged.
    """

    def __init__(self, stage, folder: Path, seed: int, facts: dict):
        self.stage = stage
        self.seed = seed
        self.step = 0
        self._facts = facts
        self._file = folder / f"{stage.name}.safetensors"
        self._world = mx.distributed.init()
        self.module: nn.Module = stage.module
        self._optimizer = self._make_optimizer()
        self._grad = mx.compile(mx.value_and_grad(self._loss))

    def _make_optimizer(self):
        s: StageSettings = self.stage.settings

        def adamw():
            return optim.AdamW(
                learning_rate=1e-3,
                betas=list(s.betas),
                eps=1e-8,
                weight_decay=s.weight_decay,
                bias_correction=True,
            )

        if s.vision_rate == 1.0:
            return optim.MultiOptimizer([adamw()])
        return optim.MultiOptimizer(
            [adamw(), adamw()], [lambda name, _: name.startswith("vision.")]
        )

    def _loss(self, parameters, *arrays):
        self.module.update(parameters)
        loss, metrics = self.stage.loss(*arrays)
        return loss, metrics

    def peak_rate(self) -> float:
        rate = self.stage.settings.learning_rate
        if rate != "mm1":
            return float(rate)
        parameters = tree_flatten(self.module.parameters())
        count = sum(
            value.size
            for name, value in parameters
            if name.startswith(("decoder.layers", "vision.layers"))
            and name.startswith("decoder" if "decoder" in self.module else "vision")
        )
        return mm1_learning_rate(count)

    def resume(self) -> bool:
        """Go on from the stage's checkpoint, if there is one."""
        if not self._file.exists():
            return False
        trees, facts = load_state(self._file)
        if facts["recipe"] != self._facts["recipe"]:
            raise ConfigError(
                f"{self._file} was made with another recipe. Use the same recipe to go "
                f"on, or another --out folder to start anew."
            )
        self.module.update(trees["parameters"])
        self._optimizer.init(self.module.trainable_parameters())
        self._optimizer.state = trees["optimizer"]
        self.step = facts["step"]
        return True

    def save(self) -> None:
        if self._world.rank() == 0:
            trees = {
                "parameters": self.module.parameters(),
                "optimizer": self._optimizer.state,
            }
            save_state(self._file, trees, {**self._facts, "step": self.step})

    def _host(self, step: int):
        s: StageSettings = self.stage.settings
        size, rank = self._world.size(), self._world.rank()
        share = s.batch // size + (rank < s.batch % size)
        rng = batch_rng(self.seed, self.stage.name, step, rank)
        return self.stage.host_batch(rng, share, step / s.steps)

    def run(
        self, save_every: int = 500, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Progress]:
        """Train to the end; yields after every step. `stop` ends it at a checkpoint."""
        s: StageSettings = self.stage.settings
        peak = self.peak_rate()
        self.module.train()
        parameters = self.module.trainable_parameters()
        update = self._make_update()
        start = time.perf_counter()
        seen = 0
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._host, self.step)
            while self.step < s.steps:
                arrays, count = pending.result()
                if self.step + 1 < s.steps:
                    pending = ahead.submit(self._host, self.step + 1)
                inputs = [mx.array(a) for a in arrays]
                (_, metrics), grads = self._grad(parameters, *inputs)
                if self._world.size() > 1:
                    grads = nn.utils.average_gradients(grads)
                rate = warmup_cosine(self.step, s.steps, peak, s.warmup, s.floor)
                self._set_rates(rate)
                parameters, norm = update(grads, parameters)
                mx.eval(parameters, self._optimizer.state, norm, metrics)
                self.module.update(parameters)
                # In the module's own order: two optimizers give theirs back through a
                # set, whose order differs between processes, and average_gradients
                # goes by place, so gradients of other weights would be mixed.
                parameters = self.module.trainable_parameters()
                self.step += 1
                seen += count * self._world.size()
                told = {name: value.item() for name, value in metrics.items()}
                told |= {"norm": norm.item(), "rate": rate}
                stopping = stop()
                if self.step % save_every == 0 or self.step == s.steps or stopping:
                    self.save()
                seconds = time.perf_counter() - start
                yield Progress(self.stage.name, self.step, s.steps, told, seconds, seen)
                if stopping:
                    return

    def _set_rates(self, rate: float) -> None:
        optimizers = self._optimizer.optimizers
        for i, optimizer in enumerate(optimizers):
            slow = len(optimizers) > 1 and i == 0
            scale = self.stage.settings.vision_rate if slow else 1.0
            optimizer.learning_rate = mx.array(rate * scale)

    def _make_update(self):
        s: StageSettings = self.stage.settings
        if not self._optimizer.state.get("states"):
            self._optimizer.init(self.module.trainable_parameters())

        def update(grads, parameters):
            grads, norm = optim.clip_grad_norm(grads, s.clip)
            return self._optimizer.apply_gradients(grads, parameters), norm

        return update


@dataclass
class Recipe:
    """A whole pretraining run, as read from its JSON file."""

    model: MM1Config
    images: ImageSettings
    data: str
    stages: dict[str, StageSettings]
    seed: int = 0
    source: dict = field(default_factory=dict)  # as written, for the checkpoint

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        known = {"model", "images", "data", "stages", "seed"}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"recipe: unknown keys {unknown}. Known: {sorted(known)}."
            )
        if missing := sorted({"model", "images", "data", "stages"} - values.keys()):
            raise ConfigError(f"recipe: missing keys {missing}.")
        stages = {
            name: StageSettings.from_dict(stage, f"stages.{name}")
            for name, stage in values["stages"].items()
        }
        if unknown := sorted(stages.keys() - {"encoder", "joint"}):
            raise ConfigError(f"recipe: unknown stages {unknown}. Use encoder, joint.")
        return cls(
            model=MM1Config.from_dict(values["model"]),
            images=ImageSettings.from_dict(values["images"]),
            data=values["data"],
            stages=stages,
            seed=values.get("seed", 0),
            source=values,
        )


STAGES = {"encoder": EncoderStage, "joint": JointStage}


def document_encoder(config: MM1Config, encode: Callable) -> DocumentEncoder:
    """The encoder of documents for a model's special tokens."""
    eos = config.eos_token_ids
    if config.bos_token_id is None or not eos or config.pad_token_id is None:
        raise ConfigError("Pretraining needs bos_token_id, eos_token_id, pad_token_id.")
    marks = Marks(
        bos=config.bos_token_id,
        eos=eos[0],
        pad=config.pad_token_id,
        image=config.image_token_id,
        tokens_per_image=config.tokens_per_image,
    )
    return DocumentEncoder(encode, marks)


def make_trainer(
    recipe: Recipe, stage: str, model: MM1, encode: Callable, folder: Path
) -> Trainer:
    """The trainer of one stage of a recipe."""
    source = data_source(recipe.data)
    encoder = document_encoder(recipe.model, encode)
    work = STAGES[stage](model, recipe.stages[stage], source, encoder, recipe.images)
    if work.module is not model:  # what a stage has beside the encoder
        initialize(work.module, recipe.seed + 1, keep="vision.")
    facts = {"recipe": {**recipe.source, "stages": recipe.source["stages"][stage]}}
    return Trainer(work, folder, recipe.seed, facts)


def float16_weights(model: MM1) -> dict[str, mx.array]:
    """The weights as they are shipped."""
    cast = tree_map(lambda x: x.astype(mx.float16), model.parameters())
    return dict(tree_flatten(cast))
