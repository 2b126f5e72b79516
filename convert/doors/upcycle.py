"""python -m mm1_mlx.convert upcycle: experts out of a dense decoder."""

import argparse
import json

from mm1_mlx.cli.conversion import add_target
from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import conversion_progress
from mm1_mlx.cli.run import run_door

from ..conversion import find_origin
from ..output import public_command
from ..upcycle import upcycle


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx convert upcycle",
        description="Turn a dense decoder into one with experts that gives the same "
        "answers, to be trained further.",
    )
    add = p.add_argument
    add("--model", required=True, metavar="PATH", help="folder or hub id, dense")
    add("--num-experts", type=whole_number(2), default=8, metavar="N", help="(8)")
    add("--top-k", type=whole_number(1), default=2, metavar="K", help="per token (2)")
    add("--every", type=whole_number(1), default=2, metavar="N", help="layers (2)")
    add(
        "--first",
        type=whole_number(0),
        metavar="N",
        help="first layer with experts (1)",
    )
    add_target(p, "the parent's", "of the routers")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Upcycle, and say what was made."""
    from mm1_mlx.memory import count_parameters

    config = upcycle(
        find_origin(args.model),
        args.mlx_path,
        num_experts=args.num_experts,
        every=args.every,
        first=args.first,
        top_k=args.top_k,
        dtype=args.dtype,
        seed=args.seed,
        provenance={"command": public_command(args.invoked)},
        overwrite=args.overwrite,
        **conversion_progress(),
    )
    parts = count_parameters(config)
    values = {
        "folder": str(args.mlx_path),
        "parameters": parts.all.total,
        "active": parts.all.active,
    }
    if args.json:
        print(json.dumps(values))
    else:
        print(
            f"{args.mlx_path}: {parts.all.total / 1e6:.1f}M parameters, "
            f"{parts.all.active / 1e6:.1f}M active per token"
        )


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
