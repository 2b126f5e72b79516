"""python -m mm1_mlx.pretrain: train a small MM1 from scratch, by a recipe file."""

import sys
import time
from pathlib import Path

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door


def parser() -> Parser:
    parser = Parser(
        prog="python -m mm1_mlx.pretrain",
        description="Train a small MM1 from scratch: an encoder stage, then everything "
        "together. Stopped runs go on exactly where they were.",
    )
    add = parser.add_argument
    add("recipe", type=Path, help="a JSON recipe, e.g. examples/mm1_tiny/recipe.json")
    add("--out", type=Path, required=True, help="folder of the run; made if missing")
    add("--tokenizer", type=Path, required=True, help="a sentencepiece .model file")
    add("--stage", choices=("encoder", "joint", "all"), default="all")
    add("--steps", type=int, help="steps of the chosen stage, instead of the recipe's")
    add("--seed", type=int, help="instead of the recipe's")
    add("--init", type=Path, help="a model folder whose weights the joint stage takes")
    add("--save-every", type=int, default=250, help="steps; default: %(default)s")
    add("--report-every", type=int, default=50, help="steps; default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_door(parser(), run, argv)


def run(args) -> None:
    """Both stages in order, then the model folder."""
    from mm1_mlx.training.pretraining_run import pretrain

    started = time.time()
    folder = pretrain(
        args.recipe,
        args.out,
        args.tokenizer,
        stage=args.stage,
        steps=args.steps,
        seed=args.seed,
        init=args.init,
        save_every=args.save_every,
        report_every=args.report_every,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    minutes = (time.time() - started) / 60
    print(f"{folder} after {minutes:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
