"""python -m mm1_mlx.info: a model's parts and memory, an adapter, a picture's tiles."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("info")

import argparse
import json
from pathlib import Path
from typing import Any

from mm1_mlx import memory
from mm1_mlx.cli.backend import require_mlx
from mm1_mlx.cli.parser import Parser, did_you_mean, whole_number
from mm1_mlx.cli.run import run_door
from mm1_mlx.cli.tiles import add_tiles, check_tiles, tell_tiles
from mm1_mlx.config import DecoderConfig, MM1Config, VisionConfig
from mm1_mlx.errors import CheckpointError, UsageError
from mm1_mlx.presets import ENCODERS, MODELS, PRESETS

BITS = (16, 8, 4)

_ASSETS = Path(__file__).parent / "assets"


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx info",
        description="Parts, parameters and memory of a model, what an adapter is, or "
        "how a picture\nis cut into tiles; no weights are loaded.",
    )
    add = p.add_argument
    add("adapter", nargs="?", metavar="FOLDER", help="an adapter, such as lora writes")
    add(
        "--model",
        help="a preset, a model folder, a hub id that was downloaded, or mm1-tiny; "
        "without it: the presets",
    )
    add(
        "--tokens",
        type=whole_number(1),
        default=2048,
        help="tokens in the cache for 'fits'; default: %(default)s",
    )
    add(
        "--images",
        type=whole_number(0),
        default=1,
        help="images encoded at once for 'fits'; default: %(default)s",
    )
    add("--json", action="store_true", help="print one JSON object")
    add_tiles(p)
    p.add_debug()
    return p


def find_config(name: str) -> tuple[MM1Config | VisionConfig, Path | None]:
    """The configuration of a preset, a folder, a built-in model or a hub id that was
    downloaded, and its folder: of a foreign checkpoint the one that generate made.

    A folder wins over a preset of the same name, so that a user's files are never
    hidden.
    """
    from mm1_mlx.checkpoint.hub import is_hub_id, local_snapshot

    for folder in (Path(name).expanduser(), _ASSETS / name):
        if _has_config(folder):
            return _of_folder(folder, name)
    if name in PRESETS:
        return PRESETS[name], None
    if (found := local_snapshot(name)) is not None and _has_config(found):
        return _of_folder(found, name)
    if Path(name).expanduser().is_dir():
        hint = ""
        if (Path(name).expanduser() / "adapter_config.json").is_file():
            hint = f" It holds an adapter: mm1_mlx info {name}."
        raise CheckpointError(f"The folder {name!r} has no config.json.{hint}")
    hint = did_you_mean(name, PRESETS)
    if not hint and is_hub_id(name):
        hint = f", and not downloaded yet, which mm1_mlx generate --model {name} does"
    raise CheckpointError(
        f"There is no model {name!r}: not a preset, not a folder with a config.json"
        f"{hint or '; run mm1_mlx info without --model for the presets'}."
    )


def _has_config(folder: Path) -> bool:
    names = ("config.json", "open_clip_config.json")
    return any((folder / name).is_file() for name in names)


def _of_folder(folder: Path, name: str) -> tuple[MM1Config, Path]:
    """The configuration of a folder, or of what it was converted to, and its folder."""
    file = folder / "config.json"
    kind = _values(file).get("model_type", "mm1") if file.is_file() else "open_clip"
    if kind in ("mm1", "mm1_vision"):
        return MM1Config.from_dict(_values(file)), folder
    require_mlx()
    from mm1_mlx.convert.cache import place_of

    file = place_of(folder, name) / "config.json"
    if file.is_file():
        return MM1Config.from_dict(_values(file)), file.parent
    raise CheckpointError(
        f"{name} is another project's checkpoint ({kind}) and not converted yet. "
        f"mm1_mlx generate --model {name} -p ... does that once; or run mm1_mlx "
        f"convert --model {name} --mlx-path FOLDER, then info --model FOLDER."
    )


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object, so it is no config.")
    return values


def describe(
    config: MM1Config | VisionConfig | DecoderConfig,
    tokens: int = 2048,
    images: int = 1,
) -> dict[str, Any]:
    """Everything the table shows, in parameters and bytes."""
    parts = memory.count_parameters(config)
    rows = [(name, part) for name, part in parts.items() if part.total]
    rows.append(("all", parts.all))
    needed = {b: memory.needed_bytes(config, b, tokens, images) for b in BITS}
    here = memory.estimated_working_set()
    values: dict[str, Any] = {
        "parameters": {
            name: {"total": part.total, "active": part.active} for name, part in rows
        },
        "weight_bytes": {str(b): memory.weight_bytes(parts, b) for b in BITS},
        "needed_bytes": {str(b): n for b, n in needed.items()},
        "macs_gb": {str(b): memory.fitting_macs(n) for b, n in needed.items()},
        "tokens": tokens,
        "images": images,
        "working_set_bytes": here,
        "fits_here": {str(b): n <= here for b, n in needed.items()},
    }
    vision = config.vision_config if isinstance(config, MM1Config) else config
    if isinstance(vision, VisionConfig):
        values["image"] = {
            "size": vision.image_size,
            "patches": vision.num_patches,
            "bytes": memory.image_bytes(vision, max(images, 1)),
        }
    if isinstance(config, MM1Config) and config.reads_images:
        values["image"]["tokens"] = config.tokens_per_image
    text = config.text_config if isinstance(config, MM1Config) else config
    if isinstance(text, DecoderConfig):
        values["context"] = text.max_position_embeddings
        values["kv_bytes_per_1k_tokens"] = memory.kv_bytes(text, 1000)
    return values


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.{3 if name == 'B' else 1}f} {name}"
    return str(number)


def table(name: str, values: dict[str, Any]) -> str:
    """What `describe` gave, for people."""
    lines = [name, "", f"{'parameters':<24}{'total':>12}{'active':>12}"]
    for part, count in values["parameters"].items():
        lines.append(
            f"  {part:<22}{_count(count['total']):>12}{_count(count['active']):>12}"
        )
    lines += ["", f"{'memory':<24}" + "".join(f"{b} bit".rjust(12) for b in BITS)]

    def row(label: str, cells: list[str]) -> None:
        lines.append(f"  {label:<22}" + "".join(c.rjust(12) for c in cells))

    row("weights", [memory.bytes_text(values["weight_bytes"][str(b)]) for b in BITS])
    row("in use", [memory.bytes_text(values["needed_bytes"][str(b)]) for b in BITS])
    macs = [values["macs_gb"][str(b)] for b in BITS]
    row("fits a Mac from", [f"{m[0]} GB" if m else "none" for m in macs])
    row(
        "fits this machine",
        ["yes" if values["fits_here"][str(b)] else "no" for b in BITS],
    )
    lines.append("")
    if "image" in values:
        image = values["image"]
        shown = f"{image['size']}x{image['size']} pixels, {image['patches']} patches"
        if "tokens" in image:
            shown += f", {image['tokens']} tokens"
        lines.append(f"  {'image':<22}{shown}")
    if "context" in values:
        lines.append(f"  {'context':<22}{values['context']} tokens")
        kv = memory.bytes_text(values["kv_bytes_per_1k_tokens"])
        lines.append(f"  {'KV cache':<22}{kv} per 1000 tokens at 16 bit")
    for key, label in (("disk_bytes", "on disk"), ("stored_bits", "stored bits")):
        if key in values:
            shown = (
                memory.bytes_text(values[key]) if key == "disk_bytes" else values[key]
            )
            lines.append(f"  {label:<22}{shown}")
    lines += ["", *_notes(values)]
    return "\n".join(lines)


def _notes(values: dict[str, Any]) -> list[str]:
    notes = [
        "active: without the experts that a token is not sent to.",
        "8 and 4 bit: the decoder in groups of 64; encoder and connector at 16 bit.",
        f"in use: weights, the KV cache of {values['tokens']} tokens, and what the "
        f"encoder ({values['images']}",
        "  image(s) at once) or the prompt needs, whichever is more; an estimate.",
        "A Mac's GPU is counted with 2/3 of its memory, above 36 GB with 3/4.",
    ]
    if values.get("preset"):
        notes.append("Apple did not publish its language model's dimensions: ours.")
    return notes


def adapter_table(name: str, values: dict[str, Any]) -> str:
    """What describe_adapter gave, for people."""
    lines = [name, ""]

    def line(label: str, shown: Any) -> None:
        lines.append(f"  {label:<22}{shown}")

    line("kind", f"{values['kind']}, in the form of {values['form']}")
    line("base", values["base"] or "not said")
    line("parameters", f"{values['parameters']:,} ({', '.join(values['types'])})")
    reading = [("resolution", "resolution"), ("at most", "max_tiles")]
    shown = [f"{label} {values[key]}" for label, key in reading if values[key]]
    if shown:
        line("pictures", ", ".join(shown) + (" tiles" if values["max_tiles"] else ""))
    if values["steps"] is not None:
        planned = values["steps_planned"]
        line("steps", f"{values['steps']}" + (f" of {planned}" if planned else ""))
    line("on disk", memory.bytes_text(values["bytes"]))
    if values["other_bytes"]:
        size = memory.bytes_text(values["other_bytes"])
        line("other files", f"{size}; generate and fuse do not read them")
    lines += ["", f"  {'part':<12}{'how':<11}{'rank':>6}{'scale':>8}{'parameters':>14}"]
    for part in values["parts"]:
        ends = dict.fromkeys(part["ranks"][:1] + part["ranks"][-1:])
        ranks = "-".join(map(str, ends)) or "-"
        scale = "-" if part["scale"] is None else f"{part['scale']:g}"
        lines.append(
            f"  {part['part']:<12}{part['how']:<11}{ranks:>6}{scale:>8}"
            f"{part['parameters']:>14,}"
        )
        if part["projections"]:
            lines += _wrapped(" ".join(part["projections"]) + _layers(part["layers"]))
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    return wrap(text, 78, initial_indent=" " * 4, subsequent_indent=" " * 4)


def _layers(numbers: list[int]) -> str:
    """The decoder's layers, in a few words: ", layers 0-3 and 7"."""
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"; layer{'s' if numbers[1:] else ''} {shown}"


def list_presets() -> str:
    """The presets, one line each."""
    lines = ["models"]
    for name, config in MODELS.items():
        count = memory.count_parameters(config)
        size = f"{_count(count.all.total):>10}"
        if count.experts.total:
            size += f", {_count(count.all.active)} active"
        lines.append(f"  {name:<18}{size}")
    lines.append("encoders")
    for name, config in ENCODERS.items():
        size = _count(memory.count_parameters(config).all.total)
        pixels = f"{config.image_size}x{config.image_size}"
        lines.append(f"  {name:<18}{size:>10}, {pixels}, {config.num_patches} patches")
    lines += ["", "More on one: python -m mm1_mlx.info --model NAME"]
    return "\n".join(lines)


def _print_adapter(args: argparse.Namespace) -> None:
    from mm1_mlx.adapters.about import describe_adapter

    if args.model is not None:
        raise UsageError("give the folder of an adapter or --model, not both")
    folder = Path(args.adapter).expanduser()
    if not folder.exists() and args.adapter in PRESETS:
        raise UsageError(f"{args.adapter} is a model: info --model {args.adapter}")
    values = describe_adapter(folder)
    if args.json:
        print(json.dumps({"adapter": args.adapter, **values}))
    else:
        print(adapter_table(args.adapter, values))


def run(args: argparse.Namespace) -> None:
    """Print the list of presets, the table of a model or adapter, or a picture's."""
    check_tiles(args)
    if args.image is not None:
        name = args.model or "mm1-tiny"
        tell_tiles(args, name, *find_config(name))
        return
    if args.adapter is not None:
        _print_adapter(args)
        return
    if args.model is None:
        print(json.dumps(list(PRESETS)) if args.json else list_presets())
        return
    config, folder = find_config(args.model)
    values = describe(config, args.tokens, args.images)
    if folder is None:
        values["preset"] = isinstance(config, MM1Config)
    else:
        files = folder.glob("*.safetensors")
        values["disk_bytes"] = sum(file.stat().st_size for file in files)
    if isinstance(config, MM1Config) and config.quantization:
        values["stored_bits"] = config.quantization.get("bits")
    if args.json:
        print(json.dumps({"model": args.model, **values}))
    else:
        print(table(args.model, values))


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv, needs_mlx=False)
