"""What a fine-tuning run shows and leaves: lines, wandb, pictures, its flags."""

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mm1_mlx.cli.config_file import yaml_text
from mm1_mlx.cli.training import Reporter, is_first_process
from mm1_mlx.cli.tuning import saved_config, watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.training.trainer import Progress

CONFIG_FILE = "config.yaml"
_EXAMPLES = 6  # held-out samples in answers.png
_SPARING = 20  # between evaluations pictures take a twentieth of the time at most


class RunView:
    """Shows a run to those who watch it, in the first process.

    samples: held out, or None.
    """

    def __init__(self, args: argparse.Namespace, samples: Any):
        self._args, self._samples = args, samples
        self._folder: Path = args.adapter_path
        self.reporter = Reporter(args.steps_per_report)
        self.last: Progress | None = None
        self._wandb = self._make_wandb()
        self._plots = args.plot and find_spec("matplotlib") is not None
        self._drawn, self._cost = 0.0, 0.0

    def watch(self) -> Any:
        """What `tune` measures for this view."""
        notes = self._notes()
        if self._wandb is not None:
            notes = {"wandb": self._wandb.notes}
        examples = _EXAMPLES if self._plots else 0
        return watch(self._args, examples=examples, notes=notes, begun=self.begun)

    def _notes(self) -> dict[str, Any]:
        """What an earlier part of the run has left in run.json for this view."""
        if not self._args.resume:
            return {}
        try:
            text = (self._folder / "run.json").read_text(encoding="utf-8")
            known = json.loads(text)["wandb"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {"wandb": known}

    def _make_wandb(self) -> Any:
        if self._args.wandb is None:
            return None
        from mm1_mlx.cli.wandb_log import WandbLog

        notes, every = self._notes().get("wandb"), self._args.steps_per_report
        return WandbLog(self._args.wandb, every, notes, self.reporter.line)

    def begun(self) -> None:
        """The folder is there: leave the configuration, and open what logs."""
        from mm1_mlx.checkpoint.folder import replacing_file

        config, file = saved_config(self._args), self._folder / CONFIG_FILE
        heading = f"python -m mm1_mlx.lora --config {file} --resume goes on"
        with replacing_file(file) as path:
            path.write_text(yaml_text(config, heading), encoding="utf-8")
        if self._wandb is not None:
            self._wandb.begin(self._folder, config)
        if self._args.plot and not self._plots:
            self.reporter.line(
                "no curves.png: it needs matplotlib, pip install 'mm1_mlx[train]' "
                "(--no-plot: without this line)"
            )

    def step(self, now: "Progress") -> None:
        """Show a step; after an evaluation draw the curves anew."""
        self.last = now
        self.reporter.step(now)
        if self._wandb is not None:
            self._wandb.step(now)
        evaluated = "valid" in now.metrics or "task_accuracy" in now.metrics
        waited = time.monotonic() - self._drawn >= _SPARING * self._cost
        if evaluated and now.step != now.steps and (waited or not self._drawn):
            self._draw()

    def close(self, done: bool) -> None:
        """The run has ended; done: at its last step. Raises nothing of its own."""
        self.reporter.close()
        if self._wandb is not None:
            self._wandb.close(failed=sys.exc_info()[0] is not None)
        if is_first_process() and (done or self.last is not None):
            self._draw(answers=done)

    def _draw(self, answers: bool = False) -> None:
        """Pictures are an extra: what goes wrong with them is a line."""
        if not self._plots:
            return
        begun = time.monotonic()
        try:
            from mm1_mlx.training.plots import plot_answers, plot_curves

            plot_curves(self._folder)
            if answers and self._samples is not None:
                plot_answers(self._folder, self._samples)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.reporter.line(f"no curves.png: {reason}")
        self._drawn = time.monotonic()
        self._cost = self._drawn - begun
