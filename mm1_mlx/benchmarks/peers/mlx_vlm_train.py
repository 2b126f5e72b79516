"""mlx-vlm's side of `benchmark train --against mlx-vlm`; its own Python runs this file.

Nothing of mm1_mlx is imported. argv: a JSON object with the keys of train_side.Task.
The last line of stdout is a JSON object with the keys of train_side.Side.
"""

import json
import math
import sys
import time
from importlib.metadata import version
from typing import Any

from side_kit import process_memory, tell


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Train as `python -m mlx_vlm.train` does; what was measured."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_vlm import load
    from mlx_vlm.train import _configure_model, parse_args
    from mlx_vlm.trainer.api import Trainer
    from mlx_vlm.trainer.datasets.loading import load as load_rows

    micro = task["accumulate"]
    flags = ["--model", task["model"], "--data", task["data"]]
    flags += ["--lora-rank", str(task["rank"]), "--lora-alpha", str(task["alpha"])]
    flags += ["--batch-size", "1", "--gradient-accumulation-steps", str(micro)]
    flags += ["--iters", str(micro * task["updates"]), "--train-on-completions"]
    flags += ["--learning-rate", str(task["rate"]), "--steps-per-report", "1"]
    flags += ["--output-path", task["out"], "--steps-per-save", str(10**6)]
    flags += ["--grad-checkpoint"] if task["recompute"] else []
    args, settings = parse_args(flags)
    mx.random.seed(args.seed)
    model, processor = load(args.model)
    model = _configure_model(model, args)
    optimizer = optim.AdamW(learning_rate=args.learning_rate, weight_decay=0.0)
    mx.eval(model.parameters())
    clock = Clock(micro)
    trainer = Trainer(
        model,
        settings,
        optimizer=optimizer,
        train_dataset=load_rows(args.data)["train"],
        processing_class=processor,
        seed=args.seed,
        training_callback=clock,
    )
    found = _before(trainer) if task["evidence"] else {}
    mx.clear_cache()
    loaded = mx.get_active_memory()
    mx.reset_peak_memory()
    clock.start()
    trainer.train()
    return found | {
        "seconds": clock.seconds,
        "cpu": clock.cpu,
        "losses": clock.losses,
        "loaded": loaded,
        "peak": mx.get_peak_memory(),
        "process": process_memory(),
        "trained": _count(model.trainable_parameters()),
        "versions": {name: version(name) for name in ("mlx-vlm", "mlx")},
    }


class Clock:
    """What the trainer calls after every micro-batch."""

    def __init__(self, micro: int):
        self._micro, self._calls, self._sum = micro, 0, 0.0
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def start(self) -> None:
        """The first step begins."""
        self._wall, self._work = time.perf_counter(), time.process_time()

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """A micro-batch is done; the last of a step ends it."""
        self._calls += 1
        self._sum += info["train_loss"] / self._micro
        if self._calls % self._micro:
            return
        wall, work = time.perf_counter(), time.process_time()
        self.seconds.append(wall - self._wall)
        self.cpu.append(work - self._work)
        self.losses.append(self._sum)
        self._wall, self._work, self._sum = wall, work, 0.0

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """There is no validation."""


def _before(trainer: Any) -> dict[str, Any]:
    """Ids and loss of every sample before training; and the loss with a causal mask.

    mlx-vlm 0.7.10 adds its padding mask (B, L), ones where there is text, to the scores
    of a LLaVA and then leaves out the causal mask, so a token sees those after it.
    """
    model = trainer.model
    data = trainer.train_dataset
    batches = list(trainer.task.batches(data, train=False))
    rows = [[int(i) for i in data[n]["input_ids"].tolist()] for n in range(len(data))]
    masks = [data[n]["completion_mask"].tolist() for n in range(len(data))]
    learned = [sum(mask[1:]) for mask in masks]
    plain = [trainer.task.loss(model, batch)[0].item() for batch in batches]
    kind = type(model.language_model)
    call = kind.__call__

    def causal(self: Any, inputs: Any, mask: Any = None, **rest: Any) -> Any:
        return call(self, inputs, mask="causal", **rest)

    kind.__call__ = causal
    try:
        fixed = [trainer.task.loss(model, batch)[0].item() for batch in batches]
    finally:
        kind.__call__ = call
    return {
        "ids": rows,
        "learned": learned,
        "before": _mean(plain),
        "before_causal": _mean(fixed),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _count(tree: Any) -> int:
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(tree)
    return sum(array.size for _, array in flat)


if __name__ == "__main__":
    tell(main(json.loads(sys.argv[1])))
