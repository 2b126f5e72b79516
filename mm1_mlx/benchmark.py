"""python -m mm1_mlx.benchmark: measure this machine, and say what was measured."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("benchmark")

import argparse
import sys
from pathlib import Path

from mm1_mlx.cli.parser import Parser, number, whole_number
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import UsageError


def parser() -> Parser:
    """The flags of this door."""
    parser = Parser(
        prog="mm1_mlx benchmark",
        description="Measure this machine. Results go to stdout, progress to stderr.",
        epilog="subjects:\n"
        "  start    import, --help and a whole cold answer of mm1-tiny, as seconds\n"
        "           and as ratios to a Python that imports mlx, numpy and PIL\n"
        "  convert  memory and time of converting a synthetic checkpoint, beside a\n"
        "           plain copy of its files; needs three times --gb of disk\n"
        "  train    time and memory of a step of fine-tuning a random LLaVA of 200M\n"
        "           parameters, as ratios: beside mlx-vlm's trainer with --against,\n"
        "           else of our own ways; needs 2 GB of disk",
    )
    parser.add_argument(
        "subject",
        choices=("start", "convert", "train"),
        metavar="SUBJECT",
        help="what to measure",
    )
    parser.add_argument(
        "-n",
        "--runs",
        type=whole_number(1),
        metavar="N",
        help="fresh processes of each command (start: 5, train: 3)",
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
        help="convert, train: where to work (the system's folder for temporary files)",
    )
    parser.add_argument(
        "--against",
        choices=("mlx-vlm",),
        metavar="PEER",
        help="train: the program to compare with, mlx-vlm",
    )
    parser.add_argument(
        "--peer-python",
        type=Path,
        metavar="PATH",
        help="train: the Python of an environment where that program is installed",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_debug()
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    if (args.against or args.peer_python) and args.subject != "train":
        raise UsageError("--against and --peer-python are for the subject train")
    if args.subject == "convert":
        _convert(args)
    elif args.subject == "train":
        _train(args)
    else:
        _start(args)


def _start(args: argparse.Namespace) -> None:
    from mm1_mlx.benchmarks.start import as_object, as_table, measure_start

    def progress(done: int, total: int) -> None:
        print(f"\rround {done} of {total}", end="", file=sys.stderr, flush=True)

    shown = sys.stderr.isatty()
    runs = args.runs or 5
    timings = measure_start(runs, progress=progress if shown else None)
    if shown:
        print(file=sys.stderr)
    if args.json:
        import json

        print(json.dumps(as_object(timings, runs), indent=2))
    else:
        print(as_table(timings, runs))


def _convert(args: argparse.Namespace) -> None:
    import tempfile

    from mm1_mlx.benchmarks.convert import as_object, as_table, measure_convert

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        jobs = measure_convert(Path(folder), round(args.gb * 1e9), tell=_tell)
    if args.json:
        import json

        print(json.dumps(as_object(jobs), indent=2))
    else:
        print(as_table(jobs))


def _train(args: argparse.Namespace) -> None:
    import tempfile

    from mm1_mlx.benchmarks import train

    if (args.against is None) != (args.peer_python is None):
        raise UsageError(
            "--against mlx-vlm and --peer-python PATH belong together: mlx-vlm needs "
            "an environment of its own"
        )
    runs, evidence = args.runs or 3, None
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.against is None:
            rows = train.measure_alternatives(folder, runs, tell=_tell)
        else:
            rows, evidence = train.measure_against_peer(
                folder, args.peer_python, runs, tell=_tell
            )
    if args.json:
        import json

        print(json.dumps(train.as_object(rows, evidence, runs), indent=2))
    else:
        print(train.as_table(rows, evidence, runs))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
