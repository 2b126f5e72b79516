"""`benchmark generate`: what an answer takes, part by part."""

import argparse
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, number, whole_number
from mm1_mlx.cli.subjects import (
    add_folder,
    add_peer,
    add_runs,
    check_peer,
    show,
    subject_parser,
    tell,
)
from mm1_mlx.errors import UsageError

_CASES = ("image", "dense", "experts8", "experts64")
_PEERS = ("mlx-vlm", "mlx-lm", "transformers")

_EPILOG = """models of random weights (--case; usual: image and dense, beside mlx-vlm
image, beside mlx-lm and transformers the texts):
  image      a LLaVA of 207M parameters, asked about a picture
  dense      its decoder alone, a Llama of 180M, asked a text
  experts8   like Mixtral, 2 of 8 experts in each of 8 layers
  experts64  like Mixtral, 2 of 64 experts in each of 8 layers

Every run is a fresh process that has loaded its model and answered once; the picture's
encoding is timed in calls of its own, and prefill is what is left of the time to the
first token. Alone it also measures 8 rows together beside
one by one, a second question about a picture, and how near decoding comes to the limit
that the memory's bandwidth sets.
"""


def parser() -> Parser:
    """The flags of this subject."""
    p = subject_parser(
        "generate",
        "Time to first token, prefill, decoding and memory of an answer.",
        epilog=_EPILOG,
    )
    add_runs(p, 5, "rounds, each a fresh process of every side")
    add = p.add_argument
    add("--model", metavar="NAME", help="a name, folder or hub id in place of --case")
    add(
        "--case",
        choices=_CASES,
        action="append",
        metavar="CASE",
        help="a model of random weights, see below; may be repeated",
    )
    add("--bits", type=int, choices=(4, 8), help="pack their decoders (float32)")
    add(
        "--prompt-tokens",
        type=whole_number(32),
        default=256,
        metavar="N",
        help="of a text (%(default)s)",
    )
    add(
        "--tokens",
        type=whole_number(3),
        default=32,
        metavar="N",
        help="of an answer (%(default)s)",
    )
    add(
        "--image-size",
        type=whole_number(28),
        default=336,
        metavar="N",
        help="pixels of the random LLaVA's pictures, a multiple of 14 (%(default)s, "
        "which is 576 tokens)",
    )
    add(
        "--bandwidth",
        type=number(0, above=True),
        metavar="GB",
        help="GB/s of the memory, for the limit of decoding (measured by a copy)",
    )
    add_folder(p, "2 GB")
    add_peer(p, _PEERS)
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    check_peer(args)
    _check(args)
    found = measure(args)
    if args.json:
        show(found)


def _check(args: argparse.Namespace) -> None:
    if args.model is not None and args.case:
        raise UsageError("give --model or --case, not both")
    if args.bits is not None and args.model is not None:
        raise UsageError(
            "--bits packs the models of --case; one of your own is measured as it is"
        )
    if args.bits is not None and args.against == "transformers":
        raise UsageError("transformers cannot read MLX's packed weights: leave --bits")
    if args.image_size % 14:
        raise UsageError(f"--image-size {args.image_size} is not a multiple of 14")
    if args.against == "mlx-lm" and "image" in (args.case or ()):
        raise UsageError("mlx-lm reads no pictures: compare --case image with mlx-vlm")
    if args.against == "mlx-vlm" and set(args.case or ()) - {"image"}:
        raise UsageError("mlx-vlm is compared at --case image, and mlx-lm at the texts")


def measure(args: argparse.Namespace, *, head: bool = True) -> dict[str, Any]:
    """Every case: printed as a table when it is done, unless --json; all as an object.

    args: the flags of this subject. head: print the machine first.
    """
    from dataclasses import asdict

    from mm1_mlx.benchmarks.generate import Against, as_object, measure_work
    from mm1_mlx.benchmarks.generate_table import as_table
    from mm1_mlx.benchmarks.machine import machine, machine_lines
    from mm1_mlx.benchmarks.roofline import measure_bandwidth
    from mm1_mlx.benchmarks.sides import libraries
    from mm1_mlx.benchmarks.works import Settings

    against = Against(args.against, args.peer_python) if args.against else None
    if against is not None:
        tell(f"{against.peer} {against.check()}")
    measured = args.bandwidth is None
    bandwidth = measure_bandwidth() if measured else args.bandwidth * 1e9
    settings = Settings(
        tokens=args.tokens,
        prompt=args.prompt_tokens,
        bits=args.bits,
        image_size=args.image_size,
    )
    if head and not args.json:
        print("\n".join(machine_lines(libraries())))
    results = []
    for name in _names(args):
        with _work(name, args, settings) as work:
            found = measure_work(
                work, args.runs, against, bandwidth, measured=measured, tell=tell
            )
        results.append(as_object(found, args.against))
        if not args.json:
            print(f"\n{as_table(found, args.against)}", flush=True)
    return {
        "machine": machine() | libraries(),
        "settings": asdict(settings) | {"runs": args.runs, "against": args.against},
        "bandwidth": bandwidth,
        "results": results,
    }


def _names(args: argparse.Namespace) -> tuple[str | None, ...]:
    """The cases; None for a model of the user's own."""
    from mm1_mlx.benchmarks.works import usual_cases

    if args.model is not None:
        return (None,)
    return tuple(args.case or usual_cases(args.against))


@contextmanager
def _work(name: str | None, args: argparse.Namespace, settings: Any):
    """A model on the disk, while it is measured."""
    from mm1_mlx.benchmarks.works import own_model, prepare

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if name is None:
            yield own_model(args.model, Path(folder), settings, peer=args.against)
            return
        tell(f"writing a model of random weights: {name}")
        yield prepare(name, Path(folder), settings, peer=args.against is not None)
