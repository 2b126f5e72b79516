"""python -m mm1_mlx.benchmark: measure this machine, and say what was measured."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("benchmark")

import argparse
import sys
from pathlib import Path

from mm1_mlx.cli.parser import Parser, number, whole_number
from mm1_mlx.cli.run import run_door


def parser() -> Parser:
    """The flags of this door."""
    parser = Parser(
        prog="mm1_mlx benchmark",
        description="Measure this machine. Results go to stdout, progress to stderr.",
        epilog="subjects:\n"
        "  start    import, --help and a whole cold answer of mm1-tiny, as seconds\n"
        "           and as ratios to a Python that imports mlx, numpy and PIL\n"
        "  convert  memory and time of converting a synthetic checkpoint, beside a\n"
        "           plain copy of its files; needs three times --gb of disk",
    )
    parser.add_argument(
        "subject",
        choices=("start", "convert"),
        metavar="SUBJECT",
        help="what to measure",
    )
    parser.add_argument(
        "-n",
        "--runs",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="start: fresh processes per command (%(default)s)",
    )
    parser.add_argument(
        "--gb",
        type=number(0.6),
        default=12.0,
        metavar="N",
        help="convert: size of the checkpoint (%(default)g)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="FOLDER",
        help="convert: where to work (the system's folder for temporary files)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_debug()
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.subject == "convert":
        _convert(args)
        return
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


def _convert(args: argparse.Namespace) -> None:
    import tempfile

    from mm1_mlx.benchmarks.convert import as_object, as_table, measure_convert

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        jobs = measure_convert(Path(folder), round(args.gb * 1e9), tell=tell)
    if args.json:
        import json

        print(json.dumps(as_object(jobs), indent=2))
    else:
        print(as_table(jobs))


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
