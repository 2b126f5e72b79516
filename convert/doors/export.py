"""python -m mm1_mlx.convert export: a model folder in the hub's layout."""

import argparse
import json
from pathlib import Path

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.progress import conversion_progress
from mm1_mlx.cli.run import run_door

from ..export import export
from ..output import public_command


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx convert export",
        description="Write a model folder in the hub's layout, for transformers and "
        "others.",
    )
    add = p.add_argument
    add("--to", choices=["hf"], default="hf", help="the layout (%(default)s)")
    add("--model", required=True, metavar="NAME", help="a model folder of mm1_mlx")
    add("--hf-path", type=Path, required=True, metavar="FOLDER", help="where to write")
    add("--overwrite", action="store_true", help="replace a model folder there")
    add("--json", action="store_true", help="print one JSON object")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Export, and say as what."""
    from mm1_mlx.checkpoint.hub import find_folder

    progress = conversion_progress()["progress"]
    values = export(
        find_folder(args.model),
        args.hf_path,
        provenance={"command": public_command(args.invoked)},
        overwrite=args.overwrite,
        progress=progress,
    )
    if args.json:
        print(json.dumps({"folder": str(args.hf_path), "config": values}))
    else:
        print(f"{args.hf_path}: {values['architectures'][0]}")


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
