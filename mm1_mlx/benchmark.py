"""python -m mm1_mlx.benchmark: measure this machine, and say what was measured."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("benchmark")

import argparse
import sys

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.run import run_door


def parser() -> Parser:
    """The flags of this door."""
    parser = Parser(
        prog="mm1_mlx benchmark",
        description="Measure this machine. Results go to stdout, progress to stderr.",
        epilog="subjects:\n"
        "  start  import, --help and a whole cold answer of mm1-tiny, as seconds and\n"
        "         as ratios to a Python that imports mlx, numpy, PIL and tokenizers",
    )
    parser.add_argument(
        "subject", choices=("start",), metavar="SUBJECT", help="what to measure"
    )
    parser.add_argument(
        "-n",
        "--runs",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="fresh processes per command (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_debug()
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from mm1_mlx.benchmarks.start import as_object, as_table, measure_start

    def progress(done: int, total: int) -> None:
        print(f"\rround {done} of {total}", end="", file=sys.stderr, flush=True)

    shown = sys.stderr.isatty()
    timings = measure_start(args.runs, progress=progress if shown else None)
    if shown:
        print(file=sys.stderr)
    if args.json:
        import json

        print(json.dumps(as_object(timings, args.runs), indent=2))
    else:
        print(as_table(timings, args.runs))


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
