"""The subjects of `python -m mm1_mlx.benchmark`: a module each, named in this table.

A module has parser() and run(args), and what it measures stands in mm1_mlx.benchmarks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.errors import UsageError

# name, which is the module's: what it measures
SUBJECTS = {
    "generate": "an answer, part by part; or beside mlx-vlm, mlx-lm, transformers",
    "start": "import, --help and a cold answer; or beside mlx-vlm",
    "train": "a step of fine-tuning, of our own ways or beside mlx-vlm's trainer",
    "convert": "memory and time of a conversion, beside a plain copy of the files",
    "launches": "kernel launches and bytes of a layer on Metal, counted without a Mac",
    "kernels": "each Metal kernel beside its definition, on this Mac's GPU",
}


def subject_parser(name: str, description: str, **settings: Any) -> Parser:
    """A parser of a subject, with what all of them have; add_debug is left to do."""
    parser = Parser(
        prog=f"mm1_mlx benchmark {name}", description=description, **settings
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def add_runs(parser: Parser, usual: int, what: str) -> None:
    """The flag --runs."""
    parser.add_argument(
        "-n",
        "--runs",
        type=whole_number(1),
        default=usual,
        metavar="N",
        help=f"{what} (%(default)s)",
    )


def add_folder(parser: Parser, size: str) -> None:
    """The flag --folder."""
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="FOLDER",
        help=f"where to work, {size} (the system's folder for temporary files)",
    )


def add_peer(parser: Parser, peers: Sequence[str]) -> None:
    """The flags --against and --peer-python."""
    group = parser.add_argument_group("beside another program")
    group.add_argument(
        "--against",
        choices=peers,
        metavar="PEER",
        help=f"the program to compare with: {', '.join(peers)}",
    )
    group.add_argument(
        "--peer-python",
        type=Path,
        metavar="PATH",
        help="the Python of an environment where that program is installed",
    )


def check_peer(args: argparse.Namespace) -> None:
    """Both flags of add_peer, or none."""
    if (args.against is None) != (args.peer_python is None):
        peer = args.against or "PEER"
        raise UsageError(
            f"--against {peer} and --peer-python PATH belong together: the program "
            f"needs an environment of its own"
        )


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def show(values: dict[str, Any]) -> None:
    """The results as one JSON object."""
    import json

    print(json.dumps(values, indent=2))
