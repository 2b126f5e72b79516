"""`benchmark convert`: what a conversion takes."""

import argparse
import tempfile
from pathlib import Path

from mm1_mlx.cli.parser import Parser, number
from mm1_mlx.cli.subjects import add_folder, show, subject_parser, tell


def parser() -> Parser:
    """The flags of this subject."""
    p = subject_parser(
        "convert",
        "Memory and time of converting a synthetic checkpoint to 16 and to 4 bits, "
        "beside a plain copy of its files.",
    )
    p.add_argument(
        "--gb",
        type=number(0.6),
        default=12.0,
        metavar="N",
        help="size of the checkpoint (%(default)g)",
    )
    add_folder(p, "three times --gb")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from mm1_mlx.benchmarks.convert import as_object, as_table, measure_convert

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        jobs = measure_convert(Path(folder), round(args.gb * 1e9), tell=tell)
    if args.json:
        show(as_object(jobs))
    else:
        print(as_table(jobs))
