"""python -m mm1_mlx.quantize: fewer bits per weight, and what that costs."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("quantize")

import argparse
import json
from pathlib import Path

from mm1_mlx.cli.parser import Parser, number, whole_number
from mm1_mlx.cli.quantization import add_quantization, is_wanted, recipe
from mm1_mlx.cli.run import run_door
from mm1_mlx.cli.verbs import make_callable
from mm1_mlx.errors import UsageError
from mm1_mlx.memory import bytes_text

make_callable(__name__, "mm1_mlx.loading")


def parser() -> Parser:
    """The flags of this command; the names are mlx-lm's."""
    p = Parser(
        prog="mm1_mlx quantize",
        description="Write a model with fewer bits per weight, and report what "
        "changed.\nThe encoder, the connector and routers keep theirs. With --compare: "
        "only report,\nof a quantized model that is there.",
    )
    add = p.add_argument
    add("--model", required=True, metavar="NAME", help="name, folder or hub id")
    place = p.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--mlx-path",
        type=Path,
        metavar="FOLDER",
        help="where to write; must not exist yet",
    )
    place.add_argument(
        "--compare",
        metavar="NAME",
        help="write nothing: report how far this model is from --model",
    )
    add_quantization(p)
    _add_learned(p)
    group = p.add_argument_group("report")
    group.add_argument(
        "--no-report", action="store_true", help="do not compare the two models"
    )
    group.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="pictures to compare on (built-in ones)",
    )
    group.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompts to compare on (built-in ones); may be repeated",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--overwrite", action="store_true", help="replace a model folder")
    p.add_debug()
    return p


def _add_learned(p: Parser) -> None:
    """The flags of the methods that look at data."""
    add = p.add_argument_group("learned (mlx-lm's methods; extra: train)").add_argument
    add(
        "--method",
        default="round",
        choices=["round", "awq", "dwq"],
        help="round: to the nearest; awq: scales chosen on data; dwq: scales trained "
        "until the answers are the original's (%(default)s)",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='texts, .txt (apart by an empty line) or .jsonl ({"text": ..., '
        '"images": [...]}); default: answers of the model itself',
    )
    add(
        "--num-samples",
        type=whole_number(8),
        default=128,
        metavar="N",
        help="texts (%(default)s)",
    )
    add(
        "--max-seq-length",
        type=whole_number(16),
        default=512,
        metavar="N",
        help="tokens of each (%(default)s)",
    )
    add(
        "--learning-rate",
        type=number(0, 1, above=True),
        default=1e-6,
        metavar="X",
        help="of dwq (%(default)s)",
    )
    add("--seed", type=whole_number(0), default=0, metavar="N", help="(%(default)s)")


def _quantize(args: argparse.Namespace, folder: Path) -> dict:
    """Write the folder; what it takes, before and after."""
    from mm1_mlx.cli.progress import conversion_progress, counting
    from mm1_mlx.convert.output import public_command
    from mm1_mlx.loading import quantize

    made = {"command": public_command(args.invoked)}
    if args.method == "round":
        return quantize(
            folder,
            args.mlx_path,
            recipe(args),
            provenance=made,
            overwrite=args.overwrite,
            **conversion_progress(),
        )
    from mm1_mlx.training.learned_quantization import quantize_learned

    with counting("texts") as progress:
        return quantize_learned(
            folder,
            args.mlx_path,
            args.method,
            recipe(args),
            data=args.data,
            samples=args.num_samples,
            length=args.max_seq_length,
            learning_rate=args.learning_rate,
            seed=args.seed,
            provenance=made,
            overwrite=args.overwrite,
            progress=progress,
        )


def _report(args: argparse.Namespace, original: Path, quantized: str | Path) -> dict:
    """The damage report of two models."""
    from mm1_mlx.cli.progress import conversion_progress, counting
    from mm1_mlx.loading import damage_report

    with counting("questions") as progress:
        return damage_report(
            original,
            quantized,
            prompts=args.prompt or None,
            images=args.image or None,
            tell=conversion_progress()["tell"],
            progress=progress,
        )


def _check_questions(args: argparse.Namespace, folder: Path) -> None:
    """Read the pictures and prompts of the report, so that a wrong one is known."""
    from mm1_mlx.checkpoint.folder import read_config
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.quantization.damage import questions

    config = read_config(folder)
    processor = Processor.from_folder(folder, config)
    prompts, images = args.prompt or None, args.image or None
    for prompt, pictures in questions(config, processor, prompts, images):
        processor(prompt, images=pictures)


def run(args: argparse.Namespace) -> None:
    """Quantize, then compare the answers of both."""
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.loading import find_model
    from mm1_mlx.quantization.damage import table

    folder = find_model(args.model, **conversion_progress())
    if args.compare is not None:
        if is_wanted(args) or args.method != "round" or args.no_report:
            raise UsageError("--compare only reports: leave out what says how to write")
        report = _report(args, folder, args.compare)
        print(json.dumps({"damage": report}) if args.json else table(report))
        return
    if args.data is not None and args.method == "round":
        raise UsageError("--data is of --method awq and dwq: rounding looks at none")
    if not args.no_report:
        _check_questions(args, folder)  # before the work
    written = _quantize(args, folder)
    values = {"folder": str(args.mlx_path), **written}
    if not args.no_report:
        values["damage"] = _report(args, folder, args.mlx_path)
    if args.json:
        print(json.dumps(values))
        return
    before, after = (bytes_text(written[key]) for key in ("bytes_before", "bytes"))
    print(
        f"{args.mlx_path}: {after} of weights, {before} before, "
        f"{written['bits_per_weight']:.2f} bits per weight"
    )
    if "damage" in values:
        print(table(values["damage"]))


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
