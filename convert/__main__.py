"""python -m mm1_mlx.convert: a public checkpoint to a model folder, and back."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("convert")

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.quantization import add_quantization, is_wanted, recipe
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import UsageError
from mm1_mlx.memory import bytes_text

# first word, a module of convert.doors: what it does; each has its own --help
COMMANDS = {
    "export": "write a model in the hub's layout",
    "assemble": "build a model from an encoder and a decoder",
    "upcycle": "turn a dense decoder into experts",
    "verify": "compare a model with its original, block by block",
    "adapter": "adapters of PEFT and mlx-lm, to ours and back",
}

_MORE = "other commands:\n" + "\n".join(
    f"  convert {name:<9} {what}" for name, what in COMMANDS.items()
)


def parser() -> Parser:
    """The flags of this command; the names and defaults are mlx-lm's."""
    p = Parser(
        prog="mm1_mlx convert",
        description="Convert a public checkpoint, in a folder or on the hub, to a "
        "model folder.\nNo code of a checkpoint is ever run, and torch is not needed.",
        epilog=_MORE,
    )
    add = p.add_argument
    add("--hf-path", "--model", metavar="PATH", help="folder or hub id to convert")
    add(
        "--mlx-path",
        type=Path,
        default=Path("mlx_model"),
        metavar="FOLDER",
        help="where to write; must not exist yet (%(default)s)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit on the hub")
    add(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of the weights; default: what config.json says, else the stored one",
    )
    add("-q", "--quantize", action="store_true", help="quantize the decoder")
    add("-d", "--dequantize", action="store_true", help="write 16 bit weights again")
    add_quantization(p)
    group = p.add_argument_group("the checkpoint")
    group.add_argument(
        "--source",
        metavar="NAME",
        help="what it is, if that cannot be found out (see --list-sources)",
    )
    group.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder or hub id of the encoder that an original LLaVA only names",
    )
    group.add_argument(
        "--list-sources", action="store_true", help="what can be converted"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show what becomes of every weight, and write nothing",
    )
    group = p.add_argument_group("output")
    group.add_argument(
        "--overwrite", action="store_true", help="replace a model folder at --mlx-path"
    )
    group.add_argument("--upload-repo", metavar="ID", help="send it to this hub id")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    # Taken because users of mlx-lm give it; there is no code to trust.
    group.add_argument(
        "--trust-remote-code", action="store_true", help=argparse.SUPPRESS
    )
    p.add_debug()
    return p


def _recipe(args: argparse.Namespace) -> Any:
    """The quantization that the flags ask for, or None."""
    if args.quantize and args.dequantize:
        raise UsageError("give either -q or -d, not both")
    if args.quantize:
        return recipe(args)
    if is_wanted(args):
        raise UsageError(
            "flags of quantization were given without -q: add -q, or leave them out"
        )
    return None


def run(args: argparse.Namespace) -> None:
    """Convert, list the sources, or show what would become of each weight."""
    from .source import sources

    if args.list_sources:
        known = {source.name: source.what for source in sources().values()}
        lines = [f"{name:<21}{what}" for name, what in known.items()]
        print(json.dumps(known) if args.json else "\n".join(lines))
        return
    if args.hf_path is None:
        raise UsageError("nothing to convert: give --hf-path, a folder or a hub id")
    from .conversion import find_origin, open_checkpoint

    folder = find_origin(args.hf_path, args.revision)
    if args.dry_run:
        opened = open_checkpoint(
            folder, source=args.source, tower=args.vision_tower, locate=find_origin
        )
        _show(opened, args.json)
        return
    _convert(args, folder)


def _show(opened: Any, as_json: bool) -> None:
    """What becomes of each weight."""
    from .pipeline import prepare

    plan = prepare(opened.origin, opened.source, opened.config, "F32")
    made = {w.name: list(w.job.names) if w.job else [] for w in plan.weights}
    if as_json:
        print(json.dumps({"weights": made, "dropped": plan.dropped}))
        return
    for name, names in made.items():
        shown = "(computed)" if not names else names[0]
        if len(names) > 1:
            shown += f" and {len(names) - 1} more"
        print(f"{name} <- {shown}")
    for name, why in plan.dropped.items():
        print(f"(dropped) {name}: {why}")


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    from .output import public_command

    return {"command": public_command(args.invoked)}


def _convert(args: argparse.Namespace, folder: Path) -> None:
    from mm1_mlx.cli.progress import conversion_progress

    from .conversion import convert, find_origin
    from .upload import check_upload, upload

    if args.upload_repo:
        check_upload(args.upload_repo)
    found = convert(
        folder,
        args.mlx_path,
        source=args.source,
        dtype=args.dtype,
        tower=args.vision_tower,
        quantize=_recipe(args),
        dequantize=args.dequantize,
        provenance=_provenance(args),
        overwrite=args.overwrite,
        locate=find_origin,
        **conversion_progress(),
    )
    values = {
        "folder": str(args.mlx_path),
        "bytes": found.nbytes,
        "bits_per_weight": found.bits_per_weight,
    }
    if not args.json:
        print(
            f"{args.mlx_path}: {bytes_text(found.nbytes)} of weights, "
            f"{found.bits_per_weight:.2f} bits per weight"
        )
    if args.upload_repo:
        values["uploaded"] = upload(args.mlx_path, args.upload_repo)
    if args.json:
        print(json.dumps(values | {"dropped": found.dropped}))
    elif args.upload_repo:
        print(values["uploaded"])


def main(argv: list[str] | None = None) -> int:
    """Give the rest of the arguments to the command that the first word names."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return import_module(f".doors.{argv[0]}", __package__).main(argv[1:])
    return run_door(parser(), run, argv)
