"""python -m mm1_mlx.convert verify: a model against its original, block by block."""

import argparse
import json

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.run import run_door

from ..verify import table, verify


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx convert verify",
        description="Compare a model folder with the checkpoint that it was made from, "
        "stage by stage.\nNeeds torch and transformers for the original.",
    )
    add = p.add_argument
    add(
        "--source", required=True, metavar="PATH", help="the original: folder or hub id"
    )
    add("--model", required=True, metavar="PATH", help="the model folder made from it")
    add("--image", nargs="+", action="extend", default=[], metavar="FILE")
    add(
        "-p", "--prompt", default="Describe this.", metavar="TEXT", help="(%(default)s)"
    )
    add("--tokens", type=whole_number(1), default=32, metavar="N", help="greedy (32)")
    add("--vision-tower", metavar="PATH", help="of an original LLaVA: its encoder")
    add("--json", action="store_true", help="print one JSON object")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> int:
    """Verify; the exit code is 1 where something differs."""
    result = verify(
        args.source,
        args.model,
        args.prompt,
        args.image,
        tokens=args.tokens,
        tower=args.vision_tower,
    )
    print(json.dumps(result.to_dict()) if args.json else table(result))
    return 0 if result.passed else 1


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
