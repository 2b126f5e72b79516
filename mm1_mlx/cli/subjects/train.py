"""`benchmark train`: what a step of fine-tuning takes."""

import argparse
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
        "train",
        "Time and memory of a step of fine-tuning a random LLaVA of 207M parameters, "
        "as ratios: beside mlx-vlm's trainer, or of our own ways.",
    )
    add_runs(p, 3, "fresh processes of each")
    add_folder(p, "2 GB")
    add_peer(p, ["mlx-vlm"])
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from mm1_mlx.benchmarks import train

    check_peer(args)
    evidence = None
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.against is None:
            rows = train.measure_alternatives(folder, args.runs, tell=tell)
        else:
            rows, evidence = train.measure_against_peer(
                folder, args.peer_python, args.runs, tell=tell
            )
    if args.json:
        show(train.as_object(rows, evidence, args.runs))
    else:
        print(train.as_table(rows, evidence, args.runs))
