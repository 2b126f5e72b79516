"""The flags of quantization, which `convert` and `quantize` share; as mlx-lm's."""

import argparse
from typing import Any

from mm1_mlx.cli.parser import Parser, whole_number


def add_quantization(p: Parser) -> None:
    """Add --q-bits and its kind."""
    from mm1_mlx.quantization.recipes import MIXED, PARTS

    add = p.add_argument_group("quantization").add_argument
    add(
        "--q-bits",
        type=int,
        choices=[2, 3, 4, 5, 6, 8],
        metavar="N",
        help="bits per weight: 2 to 6 or 8, what MLX has (4; mxfp8: 8)",
    )
    add(
        "--q-group-size",
        type=whole_number(16, 128),
        metavar="N",
        help="weights that share a scale (64; mxfp4 and mxfp8: 32; nvfp4: 16)",
    )
    add(
        "--q-mode",
        default="affine",
        choices=["affine", "mxfp4", "mxfp8", "nvfp4"],
        help="how numbers are rounded (%(default)s)",
    )
    add("--quant-predicate", choices=list(MIXED), help="a recipe of mixed bits")
    add(
        "--q-part",
        action="append",
        default=[],
        metavar="PART=BITS",
        help=f"other bits for a part, or 16 to keep it: {', '.join(PARTS)}. The "
        f"encoder and the connector are kept unless named",
    )


def is_wanted(args: argparse.Namespace) -> bool:
    """Whether a flag of quantization was given."""
    given = args.q_bits or args.q_group_size or args.quant_predicate or args.q_part
    return bool(given) or args.q_mode != "affine"


def recipe(args: argparse.Namespace) -> Any:
    """The recipe that the flags ask for."""
    from mm1_mlx.quantization.recipes import Recipe, parts_from_text

    return Recipe(
        mode=args.q_mode,
        bits=args.q_bits,
        group_size=args.q_group_size,
        parts=parts_from_text(args.q_part),
        mixed=args.quant_predicate,
    )
