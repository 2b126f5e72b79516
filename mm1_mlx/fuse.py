"""python -m mm1_mlx.fuse: an adapter taken into the weights of its model."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("fuse")

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door

_CLOSE = 0.98  # positions with the same likeliest token: fewer are worth a word


def parser() -> Parser:
    """The flags of this command; the names are mlx-lm's."""
    p = Parser(
        prog="mm1_mlx fuse",
        description="Write a model folder that answers as a model with its adapter "
        "does, and compare the two.",
    )
    add = p.add_argument
    add("--model", required=True, metavar="NAME", help="name, folder or hub id")
    add(
        "--adapter-path",
        type=Path,
        default=Path("adapters"),
        metavar="FOLDER",
        help="of lora (%(default)s)",
    )
    add(
        "--save-path",
        type=Path,
        default=Path("fused_model"),
        metavar="FOLDER",
        help="where to write; must not exist yet (%(default)s)",
    )
    packed = p.add_mutually_exclusive_group().add_argument
    packed(
        "--q-bits",
        type=int,
        choices=[4, 5, 6, 8],
        metavar="N",
        help="of quantized weights that had an adapter (their own; 8 keeps more of "
        "what was learned): %(choices)s",
    )
    packed(
        "--dequantize",
        action="store_true",
        help="leave these in 16 bits, instead of rounding them again",
    )
    add("--overwrite", action="store_true", help="replace a model folder")
    add("--json", action="store_true", help="print one JSON object")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> None:
    """Fuse, write, and say how far the answers are from the adapter's."""
    from mm1_mlx.adapters.fuse import fuse_adapter
    from mm1_mlx.checkpoint.folder import check_target
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.convert.output import CARD, card, check_apart
    from mm1_mlx.loading import find_model, load, save
    from mm1_mlx.quantization.damage import compare, record, table

    check_target(args.save_path, args.overwrite)
    check_apart(args.save_path, [find_model(args.model), args.adapter_path])
    model, processor = load(args.model, adapter_path=args.adapter_path)
    before = record(model, processor)  # in the type that the fused one answers in
    count = fuse_adapter(model, dequantize=args.dequantize, bits=args.q_bits)
    if (kept := _kept(args)) is not None:
        model.set_dtype(kept)
    model.config = _with_provenance(model, args)
    model.config = _reading_as_trained(model.config, processor)
    model_is_packed = model.config.quantization is not None
    save(model, processor, args.save_path, overwrite=args.overwrite)
    (args.save_path / CARD).write_text(card(model.config), encoding="utf-8")
    del model
    fused, _ = load(args.save_path, **conversion_progress())
    report = compare(before, record(fused, processor))
    if args.json:
        values = {"folder": str(args.save_path), "layers": count, "damage": report}
        print(json.dumps(values))
        return
    print(f"{args.save_path}: {count} adapted layers fused")
    print(table(report))
    rounded = model_is_packed and not args.dequantize and (args.q_bits or 0) < 8
    if rounded and report["top1"] < _CLOSE:
        print(
            "The weights were rounded again, which lost part of what was learned: "
            "--q-bits 8 or --dequantize keeps more."
        )


def _reading_as_trained(config: Any, processor: Any) -> Any:
    """The config whose default is the resolution that the adapter was trained with; a
    note where a config cannot say it."""
    from mm1_mlx.inputs.resolution import with_default

    resolution, tiles = processor.resolution, processor.max_tiles
    if resolution is None and tiles is None:
        return config
    made = with_default(config, processor.image_settings.size, resolution, tiles)
    if made is None:
        print(
            f"note: the adapter was trained with --resolution {resolution}, which the "
            f"fused model's config cannot say: give it to generate",
            file=sys.stderr,
        )
    return made or config


def _kept(args: argparse.Namespace) -> Any:
    """The stored type of the model, so that the fused one has the same; None where
    nothing says it."""
    import mlx.core as mx

    from mm1_mlx.checkpoint.folder import weight_files
    from mm1_mlx.loading import find_model

    files = weight_files(find_model(args.model))
    kinds = [info.dtype for infos in files.values() for info in infos.values()]
    names = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
    floats = [names[kind] for kind in kinds if kind in names]
    return max(set(floats), key=floats.count) if floats else None


def _with_provenance(model: Any, args: argparse.Namespace) -> Any:
    """The config of the fused model: what was done, and no packing where none is."""
    from mlx.utils import tree_flatten

    from mm1_mlx.convert.output import public_command, public_name, with_extra

    packed = any(n.endswith("scales") for n, _ in tree_flatten(model.parameters()))
    config = model.config if packed else replace(model.config, quantization=None)
    made = {"adapter": public_name(args.adapter_path), "model": public_name(args.model)}
    return with_extra(config, "fused", made | {"command": public_command(args.invoked)})


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
