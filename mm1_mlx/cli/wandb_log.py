"""A run's metrics in Weights & Biases, where that package is installed."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm1_mlx.errors import MM1Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.training.trainer import Progress

# What metrics are called there.
_NAMES = {
    "text": "train/loss",
    "valid": "valid/loss",
    "task_accuracy": "valid/task_accuracy",
}
_LEFT_OUT = ("task_right", "task_samples", "max_load")


class WandbLog:
    """Logs a run's means now and then; after an error of wandb's it is silent.

    notes: of an earlier part of the run, whose run in wandb goes on; `notes` is what
    run.json must keep for that. Raises MM1Error where wandb is not installed.
    """

    def __init__(
        self, project: str, every: int, notes: Any, tell: Callable[[str], None]
    ):
        try:
            import wandb
        except ImportError as error:
            raise MM1Error(
                "--wandb needs the package wandb: pip install wandb, or leave --wandb "
                "out (metrics.jsonl and curves.png have the same numbers)."
            ) from error
        self._wandb: Any = wandb
        self._every, self._tell = every, tell
        self._run: Any = None
        known = notes if isinstance(notes, dict) else {}
        if known.get("project") != project or not known.get("id"):
            known = {"project": project, "id": secrets.token_hex(4)}
        self.notes: dict[str, str] = known

    def begin(self, folder: Path, config: dict[str, Any]) -> None:
        """Start the run, or go on with it. MM1Error where wandb does not let it."""
        from mm1_mlx.training.meter import Meter

        self._meter = Meter()
        try:
            self._run = self._wandb.init(
                project=self.notes["project"],
                id=self.notes["id"],
                resume="allow",
                name=folder.resolve().name,
                dir=str(folder),
                config=config,
            )
            # Steps that are run again after a stop are logged again: wandb's own
            # count of steps would refuse them.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise MM1Error(
                f"wandb cannot start ({_one_line(error)}). Run wandb login, set "
                f"WANDB_MODE=offline, or leave --wandb out."
            ) from error

    def step(self, now: "Progress") -> None:
        """Take in a step; log the means since the last time."""
        if self._run is None:
            return
        self._meter.add(now)
        evaluated = "valid" in now.metrics or "task_accuracy" in now.metrics
        if now.step % self._every and now.step != now.steps and not evaluated:
            return
        found = self._meter.take()
        values: dict[str, Any] = {
            _NAMES.get(name, f"train/{name}"): value
            for name, value in found.metrics.items()
            if name not in _LEFT_OUT
        }
        values |= {"step": now.step, "train/peak_memory": found.peak_memory}
        if found.tokens_per_second is not None:
            values["train/tokens_per_second"] = found.tokens_per_second
        for number, layer in enumerate(found.expert_load or [], 1):
            values[f"experts/layer_{number}_most"] = max(layer)
        self._try(lambda run: run.log(values))

    def close(self, failed: bool) -> None:
        """End the run there."""
        self._try(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._tell(f"wandb: {_one_line(error)}; no more is logged there")
            self._run = None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
