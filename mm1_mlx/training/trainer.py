"""Runs one stage of a recipe: batches made ahead, steps, checkpoints, exact resume."""

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.processes import (
    agree,
    from_first,
    sums,
    together,
    total,
    tree_from_first,
    world,
)
from mm1_mlx.training.divergence import Divergence
from mm1_mlx.training.meter import COUNTS
from mm1_mlx.training.optimizers import Optimizers
from mm1_mlx.training.pieces import evaluate_arrays, evaluate_step
from mm1_mlx.training.schedules import mm1_learning_rate, warmup_cosine
from mm1_mlx.training.state import check_fit, load_state, save_state, set_weights


@dataclass
class Progress:
    """What a run tells while it works.

    metrics: of all processes. seconds, examples: since this process began; documents
    or pictures, of all processes. saved: whether the step's checkpoint was written.
    arrays: metrics that are no numbers, as lists. step_seconds: of this step alone.
    """

    stage: str
    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float
    examples: int
    saved: bool = False
    arrays: dict[str, list] = field(default_factory=dict)
    step_seconds: float = 0.0


def batch_rng(seed: int, stage: str, step: int, rank: int) -> random.Random:
    """The generator of one batch; nothing else decides what is in it."""
    return random.Random(f"{seed}/{stage}/{step}/{rank}")


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two trees of settings: "stages.joint.steps: 3, now 4"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [(old.get(k), new.get(k), f"{name}.{k}".lstrip(".")) for k in keys]
        return [line for part in parts for line in changes(*part)]
    return [] if old == new else [f"{name}: {str(old)[:40]}, now {str(new)[:40]}"]


class Trainer:
    """Runs one stage: batches made ahead, compiled steps, checkpoints.

    With several processes (mlx.launch) each makes its own share of a batch, gradients
    and metrics are means over all of them, and the first one reads and writes files.
    Where one fails, all end; see processes.agree. The stage has name, settings, module,
    host_batch, loss and law_parameters; see pretraining.JointStage.
    """

    def __init__(self, stage: Any, folder: Path, seed: int, facts: dict):
        self.stage = stage
        self.seed = seed
        self.step = 0
        self._probed = False
        self._file = folder / f"{stage.name}.safetensors"
        self._world: Any = world()
        self._facts = {**facts, "seed": seed, "processes": self._world.size()}
        self.processes_before = self._world.size()  # of the run that is gone on with
        self.module: nn.Module = stage.module
        others = getattr(stage.settings, "alternates", [])
        batches = [a["batch"] for a in others if "batch" in a]
        batch = min(stage.settings.batch, *batches, math.inf)
        if batch < self._world.size():
            raise ConfigError(
                f"stages.{stage.name}: a batch is {batch}, but there are "
                f"{self._world.size()} processes: each needs at least one."
            )
        self._divergence = Divergence(getattr(stage, "words", None))
        self.told: dict[str, float] = {}  # metrics of the last step
        self.began_anew = False  # whether resuming did not fit the optimizer's state
        self._optimizer = self._make_optimizer()
        # In float16 the gradients of a mean of thousands of tokens would be too small
        # for its exponents: those of the sum are made, and divided in float32.
        flat: Any = tree_flatten(self.module.parameters())
        self._sums = any(array.dtype == mx.float16 for _, array in flat)
        self._grad: Any = self._made_gradients
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

    def _made_gradients(self, parameters, *arrays):
        """Gradients, metrics, and the states and their gradients along the way."""
        walk = LayerWalk(getattr(self.stage.settings, "recompute", False))

        def loss_of(parameters, *arrays):
            self.module.update(parameters)
            loss, metrics = self.stage.loss(*arrays, walk=walk)
            return loss * metrics.get("tokens", 1.0) if self._sums else loss, metrics

        (_, metrics), grads = mx.value_and_grad(loss_of)(parameters, *arrays)
        if self._sums:
            count = mx.maximum(metrics.get("tokens", 1.0), 1.0)
            grads = tree_map(lambda grad: grad / count, grads)
        return grads, metrics, walk.ahead, walk.back

    def peak_rate(self) -> float:
        """The recipe's rate, or MM1's law for the parameters that it was fitted on."""
        rate = self.stage.settings.learning_rate
        if rate != "mm1":
            return float(rate)
        if (count := getattr(self.stage, "law_count", None)) is not None:
            return mm1_learning_rate(count)
        names: Any = tree_flatten(self.module.parameters())
        return mm1_learning_rate(
            sum(
                v.size
                for name, v in names
                if name.startswith(self.stage.law_parameters)
            )
        )

    def resume(self, force: bool = False) -> bool:
        """Go on from the stage's checkpoint, if there is one.

        force: whatever it was made with. CheckpointError where its arrays are not those
        that are trained; an optimizer whose own do not fit begins anew. The first
        process reads it and gives it to the others, whose disks need not have it.
        """
        first, size = self._world.rank() == 0, self._world.size()
        found = None
        with together(self._world):
            if first and self._file.exists():
                found = load_state(self._file)
                if not force:
                    self._check_facts(found[1])
                own = self.module.trainable_parameters()
                check_fit(found[0]["parameters"], own, self._file)
        facts = found[1] if found else {}
        numbers = (found is not None, facts.get("step"), facts.get("processes", size))
        known: Any = from_first(mx.array([int(n or 0) for n in numbers]), self._world)
        there, self.step, self.processes_before = map(int, known.tolist())
        if not there:
            return False
        if found:
            self.module.update(found[0]["parameters"])
            self.told = facts.get("told", {})
        self._optimizer.init(self.module.trainable_parameters())
        if found:
            self.began_anew = force and not self._optimizer.fits(found[0]["optimizer"])
            if not self.began_anew:
                self._optimizer.state = found[0]["optimizer"]
        if size > 1:
            parameters = self.module.trainable_parameters()
            self.module.update(tree_from_first(parameters, self._world))
            self._optimizer.state = tree_from_first(self._optimizer.state, self._world)
        if (resumed := getattr(self.stage, "resumed", None)) is not None:
            resumed()
        return True

    @property
    def recipe(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on with."""
        return self._facts["recipe"]

    def _check_facts(self, facts: dict) -> None:
        """ConfigError where a checkpoint is of another recipe or seed than this run."""
        if found := changes(facts["recipe"], self._facts["recipe"]):
            shown = "; ".join(found[:5])
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
            facts = {**self._facts, "step": self.step, "told": self.told}
            save_state(self._file, trees, facts)

    def _host(self, step: int):
        """The step's share of this process, in micro-batches, and its examples."""
        s: Any = self.stage.settings
        size, rank = self._world.size(), self._world.rank()
        if (made := getattr(self.stage, "host_step", None)) is not None:
            return made(step, rank, size)
        s = s.at(step)
        share = s.batch // size + (rank < s.batch % size)
        rng = batch_rng(self.seed, self.stage.name, step, rank)
        arrays, count = self.stage.host_batch(rng, share, step / s.steps, s)
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
        seen, batches = 0, []
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._host, self.step)
            while self.step < s.steps:
                begun = time.perf_counter()
                batches, count = self._ready(pending, batches)
                if self.step + 1 < s.steps:
                    pending = ahead.submit(self._host, self.step + 1)
                rate = warmup_cosine(self.step, s.steps, peak, s.warmup, s.floor)
                told, arrays = {"tokens": 0.0}, {}
                if self._any(count > 0):  # else momentum and decay would still move
                    self._optimizer.set_rate(rate)
                    parameters, told, arrays = self._update(parameters, batches, update)
                told |= {"rate": rate}
                self.step += 1
                seen += count * self._world.size()
                self.told = dict(told)
                took = time.perf_counter() - begun
                stopping = self._agree(stop(), self._gone_wrong(told))
                if saved := self._is_due(save_every) or stopping:
                    with together(self._world):
                        self._check_weights(batches[0])
                        self.save()
                seconds = time.perf_counter() - start
                yield Progress(
                    self.stage.name, self.step, s.steps, told, seconds, seen, saved,
                    arrays=arrays, step_seconds=took,
                )  # fmt: skip
                if stopping:
                    return

    def _is_due(self, save_every: int) -> bool:
        return self.step % save_every == 0 or self.step == self.stage.settings.steps

    def _ready(self, pending: Future, before: list) -> tuple[list, int]:
        """The next step's arrays; where any process cannot make its own, what was done
        is saved and all end. before: the arrays of the step before, if there was one.
        """
        try:
            with together(self._world):
                made = pending.result()
        except MM1Error:
            if before:
                with suppress(MM1Error):  # else the last checkpoint is better
                    with together(self._world):
                        self._check_weights(before[0])
                    self.save()
            raise
        return made

    def _gone_wrong(self, metrics: dict[str, float]) -> MM1Error | None:
        """Says what went wrong where the step has; what was saved before stays."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        wrong = f"gave {bad[0]} = {metrics[bad[0]]}" if bad else ""
        wrong = wrong or self._divergence.said(metrics.get("text"))
        if not wrong:
            return None
        kept = "There is no checkpoint yet."
        if self._file.exists():
            _, facts = load_state(self._file)
            kept = f"The checkpoint of step {facts['step']} is whole."
        where = getattr(self.stage, "where", lambda *_: [])(self.step - 1)
        more = f" and {len(where) - 4} more" if len(where) > 4 else ""
        samples = f" Its samples: {'; '.join(where[:4])}{more}." if where else ""
        return MM1Error(
            f"Step {self.step} {wrong}, so the run has stopped.{samples} {kept} Lower "
            f"the learning rate, or the clipping norm"
            f"{getattr(self.stage, 'goes_on_with', '')}."
        )

    def _check_weights(self, arrays: Any) -> None:
        """MM1Error where the step's own samples show that it has ruined the weights.

        Its loss was of the weights before; what is saved must be good.
        """
        walk = LayerWalk()
        loss, metrics = self.stage.loss(*map(mx.array, arrays), walk=walk)
        evaluate_step(walk.ahead, {}, {}, [loss, metrics])
        told = {"loss": loss.item()}
        if "text" in metrics:
            told["text"] = metrics["text"].item()
        if (error := self._gone_wrong(told)) is not None:
            raise error

    def _agree(self, stop: bool, error: MM1Error | None) -> bool:
        """Whether any process wants to stop: all stop after the same step, or one
        would wait for the others' gradients for ever. An error ends all."""
        stops, errors = sums([int(stop), int(error is not None)], self._world)
        if errors:
            agree(error, self._world)
        return bool(stops)

    def _any(self, flag: bool) -> bool:
        """Whether it is so in any process: all leave a step out, or none."""
        return bool(sums([int(flag)], self._world)[0])

    def _update(
        self, parameters: Any, batches: list, update: Callable
    ) -> tuple[Any, dict[str, float], dict[str, list]]:
        """The parameters after a step, and its metrics: numbers, and arrays."""
        grads, metrics = self._gradients(parameters, batches)
        norm = _norm_of(grads)
        parameters = update(grads, norm, parameters)
        del grads
        evaluate_arrays([parameters, self._optimizer.state])
        self.module.update(parameters)
        arrays: Any = {n: v.tolist() for n, v in metrics.items() if v.ndim}
        told: Any = {n: v.item() for n, v in metrics.items() if not v.ndim}
        # In the module's own order: two optimizers give theirs back through a set,
        # whose order differs between processes, and average_gradients goes by place,
        # so gradients of other weights would be mixed.
        parameters = self.module.trainable_parameters()
        return parameters, told | {"norm": norm.item()}, arrays

    def _gradients(
        self,
        parameters: Any,
        batches: list,
        after: Callable[[], None] = lambda: None,
    ) -> tuple[Any, dict]:
        """Gradients and metrics of a step: means over micro-batches and processes,
        each weighted by its "tokens", so that they are those of one large batch. What
        is counted is added up."""
        alone = len(batches) == 1 and self._world.size() == 1
        summed, weights, means = {}, mx.array(0.0), {}
        for arrays in batches:
            grads, metrics, ahead, back = self._grad(parameters, *map(mx.array, arrays))
            flat: Any = dict(tree_flatten(grads))
            if not alone:
                weight = metrics.get("tokens", mx.array(1.0))
                for name, grad in flat.items():
                    grad = grad * weight
                    flat[name] = summed[name] + grad if summed else grad
                weights = weights + weight
                for name, value in metrics.items():
                    part = value if name in COUNTS else value * weight
                    metrics[name] = means.get(name, 0.0) + part
            summed, means = flat, metrics
            del grads, flat
            evaluate_step(ahead, back, summed, [means, weights], after)
        if alone:
            return tree_unflatten(list(summed.items())), means
        # Every sample of the step may be dropped.
        weights, means = self._of_all(weights, means)
        every = mx.maximum(weights, 1e-9)
        means = {n: v if n in COUNTS else v / every for n, v in means.items()}
        size = self._world.size()
        scaled = [(name, grad / (every / size)) for name, grad in summed.items()]
        found: Any = tree_unflatten(scaled)
        return average_gradients(found) if size > 1 else found, means

    def _of_all(self, weights: mx.array, means: dict) -> tuple[mx.array, dict]:
        """Their sums over the processes, in one exchange."""
        if self._world.size() == 1:
            return weights, means
        flat = mx.concatenate([weights[None], *(v.reshape(-1) for v in means.values())])
        flat, at, found = total(flat, self._world), 1, {}
        for name, value in means.items():
            found[name] = flat[at : at + value.size].reshape(value.shape)
            at += value.size
        return flat[0], found

    def peaks(self, batches: list) -> list[tuple[int, int]]:
        """Bytes of each piece of a step, which changes nothing: in use at most, and
        how many more than before it.

        For a trainer that has not begun, which takes no part in a run: it waits for no
        other process. The last entry is the update's.
        """
        self._world = _Alone()
        found: list[tuple[int, int]] = []
        before = mx.get_active_memory()

        def after() -> None:
            nonlocal before
            peak = mx.get_peak_memory()
            found.append((peak, peak - before))
            before = mx.get_active_memory()
            mx.reset_peak_memory()

        self.module.train()
        parameters: Any = self.module.trainable_parameters()
        update = self._make_update()
        if not self._probed:
            self._optimizer.init(parameters)
            mx.eval(self._optimizer.state)
            self._probed = True
        state = tree_map(lambda x: x, self._optimizer.state)
        mx.reset_peak_memory()
        grads, _ = self._gradients(parameters, batches, after)
        self._optimizer.set_rate(0.0)
        new = update(grads, _norm_of(grads), parameters)
        del grads
        evaluate_arrays([new, self._optimizer.state], after)
        del new
        self._optimizer.state = state
        self.module.update(parameters)
        return found

    def state_bytes(self) -> int:
        """What the optimizer holds."""
        flat: Any = tree_flatten(self._optimizer.state)
        return sum(array.nbytes for _, array in flat)

    def _make_update(self):
        s: Any = self.stage.settings
        if not self._optimizer.state.get("states"):
            self._optimizer.init(self.module.trainable_parameters())

        def update(grads: Any, norm: mx.array, parameters: Any) -> Any:
            shrink = mx.minimum(s.clip / (norm + 1e-6), 1.0)  # as MLX's clip_grad_norm
            grads = tree_map(lambda grad: grad * shrink, grads)
            return self._optimizer.apply(grads, parameters)

        return update


def _norm_of(grads: Any) -> mx.array:
    """The norm of all gradients together, evaluated some at a time."""
    flat: Any = tree_flatten(grads)
    squares = [mx.square(grad).sum() for _, grad in flat]
    evaluate_arrays(squares)
    norm = mx.sqrt(mx.stack(squares).sum())
    evaluate_arrays(norm)
    return norm


class _Alone:
    """A group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1
