"""python -m mm1_mlx.convert assemble: an MM1 from an encoder and a decoder."""

import argparse
import json
from pathlib import Path

from mm1_mlx.cli.conversion import add_target
from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import conversion_progress
from mm1_mlx.cli.run import run_door
from mm1_mlx.config import CONNECTORS, ConnectorConfig
from mm1_mlx.errors import CheckpointError, UsageError

from ..assemble import assemble
from ..conversion import find_origin
from ..output import public_command


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx convert assemble",
        description="Build an MM1 from an image encoder and a decoder, with a fresh "
        "connector to be trained, or with a trained one.",
    )
    add = p.add_argument
    add("--vision", required=True, metavar="PATH", help="folder or hub id")
    add("--decoder", required=True, metavar="PATH", help="folder or hub id")
    add(
        "--connector",
        default="c_abstractor",
        metavar="WHAT",
        help=f"a new one ({', '.join(CONNECTORS)}), or the folder or hub id of a "
        "trained one, alone or in a model (%(default)s)",
    )
    add(
        "--num-query-tokens",
        type=whole_number(1),
        metavar="N",
        help="tokens per image (144; mlp: every patch)",
    )
    add(
        "--feature-layer",
        type=int,
        metavar="N",
        help="the encoder block that is read, -1 the last (the encoder's own)",
    )
    add_target(p, "the decoder's", "of a new connector")
    p.add_debug()
    return p


def _new(args: argparse.Namespace) -> ConnectorConfig:
    queries = args.num_query_tokens
    if args.connector != "mlp" and queries is None:
        queries = 144
    return ConnectorConfig(type=args.connector, num_query_tokens=queries)


def _trained(args: argparse.Namespace) -> Path:
    if args.num_query_tokens is not None:
        raise UsageError(
            "--num-query-tokens is of a new connector; a trained one has its own"
        )
    try:
        return find_origin(args.connector)
    except CheckpointError as error:
        if "/" in args.connector:
            raise
        raise CheckpointError(
            f"There is no connector or folder {args.connector!r}. A new connector is "
            f"one of {', '.join(CONNECTORS)}."
        ) from error


def run(args: argparse.Namespace) -> None:
    """Assemble, and say what was made."""
    from mm1_mlx.memory import count_parameters

    fresh = args.connector in CONNECTORS
    config = assemble(
        find_origin(args.vision),
        find_origin(args.decoder),
        args.mlx_path,
        connector=_new(args) if fresh else _trained(args),
        feature_layer=args.feature_layer,
        dtype=args.dtype,
        seed=args.seed,
        provenance={"command": public_command(args.invoked)},
        overwrite=args.overwrite,
        **conversion_progress(),
    )
    parts = count_parameters(config)
    values = {name: part.total for name, part in parts.items() if part.total}
    values |= {"folder": str(args.mlx_path), "image_tokens": config.tokens_per_image}
    if args.json:
        print(json.dumps(values))
        return
    shown = ", ".join(
        f"{name} {part.total / 1e6:.1f}M" for name, part in parts.items() if part.total
    )
    print(f"{args.mlx_path}: {shown}; {config.tokens_per_image} tokens per image")
    if fresh:
        print("The connector is fresh: train it before you ask about pictures.")


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
