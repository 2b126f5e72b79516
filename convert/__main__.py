"""python -m mm1_mlx.convert: known checkpoints, and what becomes of their names."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("convert")

import argparse
import json
from pathlib import Path

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import CheckpointError

from .rules import plan
from .sources import SOURCES, load_source


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx convert",
        description=(
            "Without arguments: the checkpoints whose names are known. With --source "
            "and a folder:\nwhat becomes of each weight of its .safetensors files; "
            "nothing is written."
        ),
    )
    add = p.add_argument
    add("folder", nargs="?", type=Path, help="a folder with .safetensors files")
    add("--source", choices=list(SOURCES), help="whose names the folder has")
    add("--json", action="store_true", help="print one JSON object")
    p.add_debug()
    return p


def weight_names(folder: Path) -> list[str]:
    """The names in a folder's .safetensors files, from their headers alone.

    A file starts with 8 bytes, the length of a JSON header, little-endian.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} has no .safetensors file.")
    names: list[str] = []
    for file in files:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = json.loads(stream.read(length))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read as safetensors: {error}."
            ) from error
        names += [name for name in header if name != "__metadata__"]
    return names


def run(args: argparse.Namespace) -> None:
    """List the sources, or print what becomes of each weight of a folder."""
    if args.folder is None and args.source is None:
        shown = [f"  {name:<14}{what}" for name, what in SOURCES.items()]
        print(json.dumps(SOURCES) if args.json else "\n".join(["sources", *shown]))
        return
    if args.folder is None or args.source is None:
        raise CheckpointError("Give both a folder and --source.")
    found = plan(weight_names(args.folder), load_source(args.source).RULES)
    if args.json:
        weights = {
            job.target: [list(names) for names in job.pieces] for job in found.jobs
        }
        print(json.dumps({"weights": weights, "dropped": found.dropped}))
        return
    for job in found.jobs:
        names = [name for piece in job.pieces for name in piece]
        first = f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]
        print(f"{job.target} <- {first}")
    for name, why in found.dropped.items():
        print(f"(dropped) {name}: {why}")


def main(argv: list[str] | None = None) -> int:
    return run_door(parser(), run, argv, needs_mlx=False)
