"""python -m mm1_mlx.benchmark: measure this machine, and say what was measured."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("benchmark")

import argparse
import sys
from importlib import import_module
from typing import Any

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door
from mm1_mlx.cli.subjects import SUBJECTS
from mm1_mlx.errors import UsageError

_EPILOG = "subjects, each with its own --help:\n" + "\n".join(
    f"  {name:<9} {what}" for name, what in SUBJECTS.items()
)


def parser() -> Parser:
    """The flags where no subject is given."""
    parser = Parser(
        prog="mm1_mlx benchmark",
        description="Measure this machine. Results go to stdout, progress to stderr. "
        "Without a SUBJECT: how\nmm1-tiny starts and answers, in less than a minute.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "subject",
        nargs="?",
        choices=tuple(SUBJECTS),
        metavar="SUBJECT",
        help="what to measure, the first word",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_debug()
    return parser


def run(args: argparse.Namespace) -> None:
    """The start and the answer of mm1-tiny."""
    if args.subject is not None:
        raise UsageError(f"{args.subject} must be the first word, before its flags")
    from mm1_mlx.benchmarks.start import as_object, as_table, measure_start

    runs = 3
    starts = measure_start(runs)
    if not args.json:
        print(as_table(starts, runs))
    flags = ["--model", "mm1-tiny", "--runs", str(runs)]
    flags += ["--json"] if args.json else []
    generate: Any = import_module("mm1_mlx.cli.subjects.generate")
    answers = generate.measure(generate.parser().parse_args(flags), head=False)
    if args.json:
        from mm1_mlx.cli.subjects import show

        show({"start": as_object(starts, runs), "generate": answers})


def main(argv: list[str] | None = None) -> int:
    """Give the rest of the arguments to the subject that the first word names."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SUBJECTS:
        subject: Any = import_module(f"mm1_mlx.cli.subjects.{argv[0]}")
        return run_door(subject.parser(), subject.run, argv[1:])
    return run_door(parser(), run, argv)
