"""python -m mm1_mlx.pretrain: train a small MM1 from scratch, by a recipe file."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("pretrain")

import argparse
import time
from pathlib import Path

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import duration
from mm1_mlx.cli.run import INTERRUPTED, run_door
from mm1_mlx.cli.training import Reporter, StopOnSignal, is_first_process

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


def run(args: argparse.Namespace) -> int:
    """Both stages in order, then the model folder."""
    from mm1_mlx.processes import meet
    from mm1_mlx.training.pretraining_run import pretrain

    started = time.time()
    reporter = Reporter(args.report_every)
    with StopOnSignal() as signals:
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
    first = is_first_process()
    if folder is None:
        if first:
            done = f"saved at step {args.until}" if reached else "stopped and saved"
            without = " without --until" if reached else ""
            reporter.line(f"{done}; the same command{without} goes on from here")
        meet()
        return 0 if reached else INTERRUPTED
    if first:
        print(f"{folder} after {duration(time.time() - started)}", flush=True)
    meet()
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
