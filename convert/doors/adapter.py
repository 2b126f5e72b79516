"""python -m mm1_mlx.convert adapter: adapters of PEFT and mlx-lm, to ours and back."""

import argparse
import json
import sys
from pathlib import Path

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import UsageError

from ..output import public_command


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx convert adapter",
        description="Write an adapter (LoRA, DoRA) in another form. Whose form it has "
        "is found out.",
    )
    add = p.add_argument
    add("adapter", type=Path, metavar="IN", help="folder of an adapter")
    add("out", type=Path, metavar="OUT", help="where to write; must not exist yet")
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="name, folder or hub id of the model that it was trained on",
    )
    add(
        "--to",
        choices=["mm1", "peft", "mlx-lm"],
        default="mm1",
        help="the form to write (%(default)s)",
    )
    add(
        "--source",
        metavar="NAME",
        help="whose names its modules have elsewhere, where the model does not tell; "
        "one of a decoder for an adapter of the decoder alone (convert --list-sources)",
    )
    add(
        "--transformers",
        type=int,
        choices=[4, 5],
        metavar="N",
        help="with --to peft, write names as transformers 4 or 5 has them (5): in 4 "
        "each expert is a module, in 5 all are one array",
    )
    add("--overwrite", action="store_true", help="replace an adapter at OUT")
    add("--json", action="store_true", help="print one JSON object")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Convert an adapter, and say what it has."""
    if args.transformers is not None and args.to != "peft":
        raise UsageError("--transformers says how PEFT's names are written: --to peft")
    from ..adapters.interchange import convert_adapter

    done = convert_adapter(
        args.adapter,
        args.out,
        args.model,
        args.to,
        source=args.source,
        transformers=args.transformers or 5,
        overwrite=args.overwrite,
        provenance={"command": public_command(args.invoked)},
        tell=lambda line: print(f"note: {line}", file=sys.stderr),
    )
    if args.json:
        print(json.dumps({"folder": str(args.out)} | done))
        return
    whole = f", {done['whole']} whole weights" if done["whole"] else ""
    print(
        f"{args.out}: {done['pairs']} pairs{whole}, from {done['from']} to "
        f"{done['to']} (names of {done['source']})"
    )


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
