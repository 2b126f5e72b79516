"""Runs one stage of a recipe: batches made ahead, steps, checkpoints, exact resume."""

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.training.optimizers import Optimizers
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


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two trees of settings: "stages.joint.steps: 3, now 4"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [(old.get(k), new.get(k), f"{name}.{k}".lstrip(".")) for k in keys]
        return [line for part in parts for line in _changes(*part)]
    return [] if old == new else [f"{name}: {str(old)[:40]}, now {str(new)[:40]}"]


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
        self._grad = mx.value_and_grad(self._loss)
        if getattr(stage, "compiles", True):
            self._grad = mx.compile(self._grad)

    def _make_optimizer(self) -> Optimizers:
        s = self.stage.settings
        return Optimizers(
            getattr(s, "optimizer", "adamw"),
            self.stage.rate_groups(),
            betas=s.betas,
            weight_decay=s.weight_decay,
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
        if changes := _changes(facts["recipe"], self._facts["recipe"]):
            shown = "; ".join(changes[:5])
            raise ConfigError(
                f"{self._file} was made with another recipe ({shown}). Use the same "
                f"recipe to go on, or another folder to start anew."
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
                "parameters": self.module.trainable_parameters(),
                "optimizer": self._optimizer.state,
            }
            save_state(self._file, trees, {**self._facts, "step": self.step})

    def _host(self, step: int):
        """The step's share of this process, in micro-batches, and its examples."""
        s: Any = self.stage.settings
        size, rank = self._world.size(), self._world.rank()
        if (made := getattr(self.stage, "host_step", None)) is not None:
            return made(step, rank, size)
        share = s.batch // size + (rank < s.batch % size)
        rng = batch_rng(self.seed, self.stage.name, step, rank)
        arrays, count = self.stage.host_batch(rng, share, step / s.steps)
        return [arrays], count

    def run(
        self, save_every: int = 500, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Progress]:
        """Train to the end; yields after every step. `stop` ends it at a checkpoint."""
        s: Any = self.stage.settings
        peak = self.peak_rate()
        self.module.train()
        parameters: Any = self.module.trainable_parameters()
        update = self._make_update()
        start = time.perf_counter()
        seen = 0
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._host, self.step)
            while self.step < s.steps:
                batches, count = self._ready(pending)
                if self.step + 1 < s.steps:
                    pending = ahead.submit(self._host, self.step + 1)
                grads, metrics = self._gradients(parameters, batches)
                rate = warmup_cosine(self.step, s.steps, peak, s.warmup, s.floor)
                self._optimizer.set_rate(rate)
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
                self._check_finite(told)
                stopping = self._agree(stop())
                if self.step % save_every == 0 or self.step == s.steps or stopping:
                    self.save()
                seconds = time.perf_counter() - start
                yield Progress(self.stage.name, self.step, s.steps, told, seconds, seen)
                if stopping:
                    return

    def _ready(self, pending: Future) -> tuple[list, int]:
        """The next step's arrays; where they cannot be made, what was done is saved."""
        try:
            return pending.result()
        except MM1Error:
            if self.step:
                self.save()
            raise

    def _check_finite(self, metrics: dict[str, float]) -> None:
        """MM1Error where the step has gone wrong; what was saved before stays."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not bad:
            return
        kept = "There is no checkpoint yet."
        if self._file.exists():
            _, facts = load_state(self._file)
            kept = f"The checkpoint of step {facts['step']} is whole."
        where = getattr(self.stage, "where", lambda *_: [])(self.step - 1)
        samples = f" Its samples: {'; '.join(where[:4])}." if where else ""
        raise MM1Error(
            f"Step {self.step} gave {bad[0]} = {metrics[bad[0]]}, so the run has "
            f"stopped.{samples} {kept} Lower the learning rate, or the clipping norm."
        )

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all stop after the same step, or one
        would wait for the others' gradients for ever."""
        if self._world.size() == 1:
            return stop
        wishes = mx.distributed.all_sum(mx.array(int(stop)), stream=mx.cpu)
        return bool(wishes.item())

    def _gradients(self, parameters: Any, batches: list) -> tuple[Any, dict]:
        """Gradients and metrics of a step: means over micro-batches and processes,
        each weighted by its "tokens", so that they are those of one large batch."""
        if len(batches) == 1 and self._world.size() == 1:
            (_, metrics), grads = self._grad(parameters, *map(mx.array, batches[0]))
            return grads, metrics
        total, weights, means = None, mx.array(0.0), {}
        for arrays in batches:
            (_, metrics), grads = self._grad(parameters, *map(mx.array, arrays))
            weight = metrics.get("tokens", mx.array(1.0))
            grads = tree_map(lambda g, w=weight: g * w, grads)
            total = grads if total is None else tree_map(mx.add, total, grads)
            weights = weights + weight
            for name, value in metrics.items():
                means[name] = means.get(name, 0.0) + value * weight
            mx.eval(total, weights, means)  # bounded work, and memory of one at a time
        weights = mx.maximum(weights, 1e-9)  # every sample of the step may be dropped
        means = {name: value / weights for name, value in means.items()}
        if "tokens" in means:
            means["tokens"] = weights
        every = weights
        if self._world.size() > 1:
            every = mx.distributed.all_sum(weights, stream=mx.cpu) / self._world.size()
        total = tree_map(lambda g: g / every, total)
        return average_gradients(total) if self._world.size() > 1 else total, means

    def _make_update(self):
        s: Any = self.stage.settings
        if not self._optimizer.state.get("states"):
            self._optimizer.init(self.module.trainable_parameters())

        def update(grads, parameters):
            grads, norm = optim.clip_grad_norm(grads, s.clip)
            return self._optimizer.apply(grads, parameters), norm

        return update
