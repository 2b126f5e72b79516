"""Runs one stage of a recipe: batches made ahead, steps, checkpoints, exact resume."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten

from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.training.recipe import StageSettings
from mm1_mlx.training.schedules import mm1_learning_rate, warmup_cosine
from mm1_mlx.training.state import load_state, save_state, set_weights


@dataclass
class Progress:
    """What a run tells while it works.

    seconds, examples: since this process began; documents or pictures, of all
    processes.
    """

    stage: str
    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float
    examples: int


def batch_rng(seed: int, stage: str, step: int, rank: int) -> random.Random:
    """The generator of one batch; nothing else decides what is in it."""
    return random.Random(f"{seed}/{stage}/{step}/{rank}")


class Trainer:
    """Runs one stage: batches made ahead, compiled steps, checkpoints.

    With several processes (mlx.launch) each makes its own share of a batch and the
    gradients are averaged. The stage has name, settings, module, host_batch, loss and
    law_parameters; see pretraining.JointStage.
    """

    def __init__(self, stage: Any, folder: Path, seed: int, facts: dict):
        self.stage = stage
        self.seed = seed
        self.step = 0
        self._facts = {**facts, "seed": seed}
        self._file = folder / f"{stage.name}.safetensors"
        self._world = mx.distributed.init()
        self.module: nn.Module = stage.module
        if stage.settings.batch < self._world.size():
            raise ConfigError(
                f"stages.{stage.name}.batch is {stage.settings.batch}, but there are "
                f"{self._world.size()} processes: each needs at least one."
            )
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
        """The recipe's rate, or MM1's law for the parameters that it was fitted on."""
        rate = self.stage.settings.learning_rate
        if rate != "mm1":
            return float(rate)
        names: Any = tree_flatten(self.module.parameters())
        return mm1_learning_rate(
            sum(
                v.size
                for name, v in names
                if name.startswith(self.stage.law_parameters)
            )
        )

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
        # Checkpoints from before the seed was kept have none.
        if (seed := facts.get("seed", self.seed)) != self.seed:
            raise ConfigError(
                f"{self._file} was made with the seed {seed}, not {self.seed}. Use the "
                f"same seed to go on, or another --out folder to start anew."
            )
        self.module.update(trees["parameters"])
        self._optimizer.init(self.module.trainable_parameters())
        self._optimizer.state = trees["optimizer"]
        self.step = facts["step"]
        return True

    def begin_with(self, file: Path) -> None:
        """Take the weights of another run's checkpoint of this stage; step 0, no more.

        CheckpointError if there is none, or it is of another model.
        """
        if not file.is_file():
            raise CheckpointError(f"There is no checkpoint {file} to start from.")
        trees, _ = load_state(file)
        weights: Any = dict(tree_flatten(trees.get("parameters", {})))
        set_weights(self.module, weights, file)

    def save(self) -> None:
        """Write the checkpoint; with several processes the first one does."""
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
        parameters: Any = self.module.trainable_parameters()
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
                    grads = average_gradients(grads)
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
                stopping = self._agree(stop())
                if self.step % save_every == 0 or self.step == s.steps or stopping:
                    self.save()
                seconds = time.perf_counter() - start
                yield Progress(self.stage.name, self.step, s.steps, told, seconds, seen)
                if stopping:
                    return

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all stop after the same step, or one
        would wait for the others' gradients for ever."""
        if self._world.size() == 1:
            return stop
        wishes = mx.distributed.all_sum(mx.array(int(stop)), stream=mx.cpu)
        return bool(wishes.item())

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
