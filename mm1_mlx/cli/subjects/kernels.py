"""`benchmark kernels`: each Metal kernel beside its definition on this Mac's GPU."""

import argparse
import sys

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.subjects import add_runs, show, subject_parser, tell


def parser() -> Parser:
    """The flags of this subject."""
    p = subject_parser(
        "kernels",
        "Each Metal kernel beside its definition on this Mac's GPU: error, time and "
        "gain, for the sizes of MM1 and others. The JSON is fit for an issue.",
    )
    add_runs(p, 20, "chains of calls of each kernel and definition")
    p.add_argument(
        "--apply",
        action="store_true",
        help="switch kernels on in your settings where they are right and faster, off "
        "where not",
    )
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from mm1_mlx.benchmarks import kernels

    kernels.require_metal()
    from mm1_mlx.kernels.cases import all_cases

    def progress(done: int, total: int) -> None:
        print(f"\rcase {done} of {total}", end="", file=sys.stderr, flush=True)

    shown = sys.stderr.isatty()
    rows = kernels.measure_kernels(
        all_cases(), args.runs, progress=progress if shown else None
    )
    if shown:
        print(file=sys.stderr)
    if args.json:
        show(kernels.as_object(rows, args.runs))
    else:
        print(kernels.as_table(rows, args.runs))
    if args.apply:
        tell(kernels.apply_choices(rows))
