"""`benchmark start`: how long a user waits for the first token."""

import argparse
import sys
import tempfile
from pathlib import Path

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.subjects import (
    add_folder,
    add_peer,
    add_runs,
    check_peer,
    show,
    subject_parser,
    tell,
)


def parser() -> Parser:
    """The flags of this subject."""
    p = subject_parser(
        "start",
        "Seconds of whole processes: import, --help and a cold answer of mm1-tiny, and "
        "their ratios to a Python that imports mlx, numpy and PIL. Beside mlx-vlm: an "
        "answer of one token, of two LLaVAs of random weights.",
    )
    add_runs(p, 5, "fresh processes of each command")
    add_folder(p, "2 GB with --against")
    add_peer(p, ["mlx-vlm"])
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    check_peer(args)
    if args.against is not None:
        _against(args)
        return
    from mm1_mlx.benchmarks.start import as_object, as_table, measure_start

    def progress(done: int, total: int) -> None:
        print(f"\rround {done} of {total}", end="", file=sys.stderr, flush=True)

    shown = sys.stderr.isatty()
    timings = measure_start(args.runs, progress=progress if shown else None)
    if shown:
        print(file=sys.stderr)
    if args.json:
        show(as_object(timings, args.runs))
    else:
        print(as_table(timings, args.runs))


def _against(args: argparse.Namespace) -> None:
    from mm1_mlx.benchmarks.cold_start import as_object, as_table, measure_cold_start
    from mm1_mlx.benchmarks.sides import peer_version

    version = peer_version(args.peer_python, args.against)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        starts = measure_cold_start(Path(name), args.peer_python, args.runs, tell=tell)
    if args.json:
        show(as_object(starts, args.runs, version))
    else:
        print(as_table(starts, args.runs, version))
