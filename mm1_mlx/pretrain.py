"""python -m mm1_mlx.pretrain: train a small MM1 from scratch, by a recipe file."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("pretrain")

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import duration, progress_bar, shows
from mm1_mlx.cli.run import INTERRUPTED, run_door

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.training.trainer import Progress

_EXAMPLES = """examples:
  python -m examples.mm1_tiny.vocabulary --out runs/tiny/tokenizer.model
  python -m mm1_mlx.pretrain examples/mm1_tiny/recipe.json --out runs/tiny \\
      --tokenizer runs/tiny/tokenizer.model
  mlx.launch -n 2 -- python -m mm1_mlx.pretrain ...     (two processes share the work)

The run can be stopped at any moment; the same command goes on from its last checkpoint.
The finished model is in the folder `model` inside --out. The keys of a recipe, and how
to train on your own files: mm1_mlx/training/README.md.
"""


def parser() -> Parser:
    """The flags of this command."""
    parser = Parser(
        prog="mm1_mlx pretrain",
        description="Train a small MM1 from scratch: an encoder stage, then everything "
        "together.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("recipe", type=Path, help="a JSON recipe, e.g. examples/mm1_tiny/recipe.json")
    add("--out", type=Path, required=True, help="folder of the run; made if missing")
    add("--tokenizer", type=Path, required=True, help="a sentencepiece .model file")
    add(
        "--stage",
        choices=("encoder", "joint", "all"),
        default="all",
        help="which stages to run; default: %(default)s",
    )
    count, seed = whole_number(1), whole_number(0)
    add("--steps", type=count, help="of each stage that runs, instead of the recipe's")
    add("--until", type=count, metavar="STEP", help="stop there, and save")
    add("--seed", type=seed, help="instead of the recipe's")
    add(
        "--init",
        type=Path,
        metavar="FOLDER",
        help="what the first stage starts from: another run's folder (encoder stage), "
        "a model folder (joint stage)",
    )
    add(
        "--save-every",
        type=count,
        default=250,
        metavar="STEPS",
        help="default: %(default)s",
    )
    add(
        "--report-every",
        type=count,
        default=50,
        metavar="STEPS",
        help="a line this often, where there is no terminal; default: %(default)s",
    )
    parser.add_debug()
    return parser


class _StopOnSignal:
    """`asked()` is true after Ctrl-C or a termination; a second one ends at once."""

    def __init__(self):
        self._asked = threading.Event()

    def asked(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> "_StopOnSignal":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._old = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def _ask(self, number, frame) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class _Reporter:
    """Shows the state of a run: a bar on a terminal, else a line now and then."""

    def __init__(self, every: int):
        self._every = every
        self._stage = ""
        self._bar: Any = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def step(self, now: "Progress") -> None:
        """Take in a step's metrics; show their means since the last time shown."""
        if now.stage != self._stage:
            self.close()
            self._stage, self._first = now.stage, now.step - 1
            self._bar = progress_bar(
                now.steps, now.stage, initial=self._first, unit="step"
            )
        for name, value in now.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._bar.update(1)
        visible = shows(self._bar)
        if now.step % (10 if visible else self._every) and now.step != now.steps:
            return
        told = " ".join(f"{k} {v / self._count:.4g}" for k, v in self._sums.items())
        self._sums, self._count = {}, 0
        if visible:
            self._bar.set_postfix_str(f"{told}, {_gigabytes()}")
        else:
            self.line(f"{now.stage} {now.step}/{now.steps} {told} | {self._pace(now)}")

    def _pace(self, now: "Progress") -> str:
        done = max(now.step - self._first, 1)
        left = now.seconds / done * (now.steps - now.step)
        rate = now.examples / max(now.seconds, 1e-9)
        return (
            f"{duration(now.seconds)}, {duration(left)} left, {rate:.1f} examples/s, "
            f"{_gigabytes()}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._sums, self._count = {}, 0


def _gigabytes() -> str:
    import mlx.core as mx

    return f"{mx.get_peak_memory() / 1e9:.2f} GB"


def run(args: argparse.Namespace) -> int:
    """Both stages in order, then the model folder."""
    from mm1_mlx.training.pretraining_run import pretrain

    started = time.time()
    reporter = _Reporter(args.report_every)
    with _StopOnSignal() as signals:
        try:
            folder = pretrain(
                args.recipe,
                args.out,
                args.tokenizer,
                stage=args.stage,
                steps=args.steps,
                until=args.until,
                seed=args.seed,
                init=args.init,
                save_every=args.save_every,
                tell=reporter.line,
                report=reporter.step,
                stop=signals.asked,
            )
        finally:
            reporter.close()
        reached = args.until is not None and not signals.asked()
    first = _is_first_process()
    if folder is None:
        if first:
            done = f"saved at step {args.until}" if reached else "stopped and saved"
            without = " without --until" if reached else ""
            reporter.line(f"{done}; the same command{without} goes on from here")
        return 0 if reached else INTERRUPTED
    if first:
        print(f"{folder} after {duration(time.time() - started)}")
    return 0


def _is_first_process() -> bool:
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


def main(argv: list[str] | None = None) -> int:
    return run_door(parser(), run, argv)
