"""What `info --image` tells of a picture: its tiles, tokens, memory and time."""

import argparse
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mm1_mlx.cli.resolution import (
    add_picture_limits,
    add_resolution,
    picture_limits,
)
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import MM1Error, PromptError, UsageError
from mm1_mlx.inputs.sources import pasted_path, shown

_ANSWER = 256  # tokens, as generate's --max-tokens


def add_tiles(parser: Any) -> None:
    """The flags about a picture."""
    group = parser.add_argument_group(
        "a picture", "what a model would see of it; --model is mm1-tiny then"
    )
    add = group.add_argument
    add("--image", metavar="FILE", help="tell its tiles, tokens, memory and time")
    add("--tiles", action="store_true", help="draw the tiles over it, too, as a PNG")
    add(
        "--output",
        type=Path,
        metavar="PNG",
        help="where --tiles writes (NAME-tiles.png, in this folder); what is there is "
        "replaced",
    )
    add_resolution(group)
    add_picture_limits(group)


def check_tiles(args: argparse.Namespace) -> None:
    """UsageError where flags do not go together."""
    given = {
        "--tiles": args.tiles,
        "--resolution": args.resolution,
        "--max-tiles": args.max_tiles,
        "--output": args.output,
        "--max-image-pixels": args.max_image_pixels,
        "--allow-url": args.allow_url,
    }
    if args.image is None:
        for flag, value in given.items():
            if value:
                raise UsageError(f"{flag} goes with --image FILE")
    if args.output is not None and not args.tiles:
        raise UsageError("--output is where --tiles draws: give --tiles, too")
    if args.output is not None and args.output.suffix.lower() != ".png":
        raise UsageError(f"--output {args.output} must end with .png: it is a PNG")
    if args.image is not None and args.adapter is not None:
        raise UsageError("give the folder of an adapter or --image, not both")


@dataclass(frozen=True)
class _Seen:
    """The picture as the model reads it."""

    image: Any  # PIL's
    way: Any
    slot: Any
    too_long: str  # or ""

    @property
    def text(self) -> int:
        """Tokens between the tiles."""
        return len(self.slot.ids) - self.slot.tokens


def tell_tiles(
    args: argparse.Namespace, name: str, config: Any, folder: Path | None
) -> None:
    """Print what a model sees of a picture, and draw it where that is asked for."""
    from mm1_mlx.cli.backend import require_mlx

    require_mlx()
    if not isinstance(config, MM1Config) or not config.reads_images:
        raise MM1Error(
            f"{name} reads no pictures: it is "
            f"{'a decoder' if isinstance(config, MM1Config) else 'an encoder'} alone. "
            f"Name a whole model with --model."
        )
    seen = _see(args, config, folder)
    values = _values(config, folder, seen)
    if args.tiles:
        values["drawing"] = str(_draw(args, seen))
    if args.json:
        print(json.dumps({"model": name, "image": args.image, **values}))
    else:
        print(_table(name, args.image, values))


def _see(args: argparse.Namespace, config: MM1Config, folder: Path | None) -> _Seen:
    from mm1_mlx.inputs.images import load_image
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.inputs.settings import ImageSettings
    from mm1_mlx.inputs.tokenizer import number_tokenizer

    if folder is not None:
        processor = Processor.from_folder(folder, config)
    else:  # a preset: of the text between tiles it is not known how long it is
        assert config.vision_config is not None
        words = number_tokenizer(config.text_config.vocab_size)
        settings = ImageSettings(size=config.vision_config.image_size)
        processor = Processor(words, settings, config, chat_template="plain")
    image = load_image(args.image, **picture_limits(args))
    (way,) = processor.ways(1, args.resolution, args.max_tiles)
    (slot,) = processor.slots([way], [way.layout(*image.size)])
    problem = ""
    try:
        processor.check_length(slot.ids, [slot], 0)
    except PromptError as error:
        problem = str(error)
    return _Seen(image, way, slot, problem)


def _values(config: MM1Config, folder: Path | None, seen: _Seen) -> dict[str, Any]:
    from mm1_mlx.benchmarks.first_token import measure_speed, operations

    layout, way, slot = seen.slot.layout, seen.way, seen.slot
    plan = _plan(config, folder, seen)
    side = way.settings.size
    count = operations(config, layout.tiles, side, len(slot.ids))
    assert config.vision_config is not None
    speed = measure_speed(config.vision_config, plan.work.number)
    return {
        "size": [layout.width, layout.height],
        "rows": max(layout.rows, 1),
        "columns": max(layout.columns, 1),
        "overview": layout.tiles > 1,
        "tiles": layout.tiles,
        "tile_size": side,
        "tokens_per_tile": _each(slot),
        "image_tokens": slot.tokens,
        "text_tokens": seen.text,
        "tokens": len(slot.ids),
        "context": config.text_config.max_position_embeddings,
        "too_long": seen.too_long,
        "memory": {
            "peak": plan.peak,
            "weights": plan.weights,
            "pictures": plan.pictures,
            "prompt": plan.prompt,
            "limit": plan.limit,
        },
        "operations": {"pictures": count.pictures, "prompt": count.prompt},
        "operations_per_second": speed,
        "seconds": count.total / speed,
    }


def _each(slot: Any) -> int | None:
    """Tokens of a tile; None where the model puts tiles together."""
    tiling = slot.way.tiling
    joined = tiling is not None and tiling.arranges
    return None if joined else slot.tokens // slot.layout.tiles


def _plan(config: MM1Config, folder: Path | None, seen: _Seen) -> Any:
    import mlx.core as mx

    from mm1_mlx import memory
    from mm1_mlx.inference.memory_plan import Work, plan_folder, plan_generation
    from mm1_mlx.inference.settings import Settings

    assert config.vision_config is not None
    side = seen.way.settings.size
    asked = {
        "prompt": len(seen.slot.ids),
        "side": None if side == config.vision_config.image_size else side,
    }
    tiles = seen.slot.layout.tiles
    if folder is not None:
        return plan_folder(folder, config, Settings(), pictures=[tiles], **asked)
    number = 4 if mx.default_device().type == mx.cpu else 2  # as loading.load
    weights = number * memory.count_parameters(config).all.total
    work = Work(answer=_ANSWER, pictures=tiles, tiles=tiles, number=number, **asked)
    return plan_generation(config, work, weights=weights)


def _draw(args: argparse.Namespace, seen: _Seen) -> Path:
    """Write the PNG: whole, or not at all."""
    from mm1_mlx.inputs.tile_drawing import draw_tiles

    source = _file_of(args.image)
    out = args.output or Path(f"{source.stem}-tiles.png")
    local = not _is_address(args.image)
    if local and out.exists() and source.exists() and out.samefile(source):
        raise MM1Error(f"{out} is the picture itself: name another --output.")
    drawing = draw_tiles(seen.image, seen.way, seen.slot.layout)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        drawing.save(draft, "PNG")
        draft.replace(out)
    except OSError as error:
        reason = error.strerror or error
        raise MM1Error(f"{out} cannot be written: {reason}.") from error
    finally:
        with suppress(OSError):
            draft.unlink()
    return out


def _file_of(image: str) -> Path:
    """The picture's file; of an address its last name, of data: "picture"."""
    if not _is_address(image):
        return pasted_path(image)
    name = "" if image[:5].lower() == "data:" else Path(urlsplit(image).path).name
    return Path(name or "picture")


def _is_address(image: str) -> bool:
    return image.lower().startswith(("data:", "http://", "https://"))


def _table(name: str, image: str, values: dict[str, Any]) -> str:
    from mm1_mlx.memory import bytes_text

    lines = [f"{shown(image)}, as {name} reads it", ""]

    def line(label: str, shown: Any) -> None:
        lines.append(f"  {label:<22}{shown}")

    width, height = values["size"]
    side = values["tile_size"]
    line("picture", f"{width} x {height} pixels")
    if values["overview"]:
        grid = f"{values['rows']} x {values['columns']} tiles (rows x columns)"
        line("grid", f"{grid} and an overview")
        line("tile", f"{side} x {side} pixels")
    else:
        line("grid", f"one tile of {side} x {side} pixels")
    if values["tokens_per_tile"] is not None:
        line("tokens per tile", values["tokens_per_tile"])
    text = f" + {values['text_tokens']} between tiles" if values["text_tokens"] else ""
    line("tokens", f"{values['image_tokens']}{text}, of a context of "
         f"{values['context']}")  # fmt: skip
    needed = {key: bytes_text(value) for key, value in values["memory"].items()}
    parts = f"weights {needed['weights']}, pictures {needed['pictures']}"
    line(
        "predicted memory", f"{needed['peak']} at most ({parts}), of {needed['limit']}"
    )
    work = _rounded(sum(values["operations"].values()))
    speed = _rounded(values["operations_per_second"])
    line("predicted time", f"{_seconds(values['seconds'])} to the first token, an")
    line("", f"estimate: {work} operations at {speed} a second,")
    line("", "measured now on a layer of the encoder; a busy machine is slower")
    if "drawing" in values:
        line("drawing", values["drawing"])
    if values["too_long"]:
        lines += ["", values["too_long"]]
    return "\n".join(lines)


def _rounded(count: float) -> str:
    """ "120 million", "1.5 billion"."""
    return (
        f"{count / 1e9:,.1f} billion" if count >= 1e9 else f"{count / 1e6:,.0f} million"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.0f} s"
