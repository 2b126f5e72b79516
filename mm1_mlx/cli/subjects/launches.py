"""`benchmark launches`: what a decoder's layer launches on Metal, counted anywhere."""

import argparse

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.subjects import show, subject_parser


def parser() -> Parser:
    """The flags of this subject."""
    p = subject_parser(
        "launches",
        "Kernel launches and bytes of a decoder's layer on Metal, for one token, for "
        "one in each\nof 8 rows, and for a prompt of 64; dense and with experts, in 16 "
        "and 4 bits; beside\nmlx-lm's Llama and Mixtral of the same sizes where it is "
        "installed. Counted from MLX's\ngraphs with the rules of its Metal back end, "
        "the copies that it makes among them.",
    )
    p.add_argument(
        "--context",
        type=whole_number(0),
        default=5,
        metavar="N",
        help="tokens that are in the cache already (%(default)s)",
    )
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Count and print."""
    import importlib.util
    import sys

    from mm1_mlx.benchmarks.launches import (
        PROGRAMS,
        as_object,
        as_table,
        measure_launches,
    )

    programs = list(PROGRAMS)
    if importlib.util.find_spec("mlx_lm") is None:
        programs.remove("mlx-lm")
        print(
            "note: counted without mlx-lm, which is not installed: pip install mlx-lm",
            file=sys.stderr,
        )
    rows = measure_launches(programs, args.context)
    if args.json:
        show(as_object(rows, args.context))
    else:
        print(as_table(rows))
