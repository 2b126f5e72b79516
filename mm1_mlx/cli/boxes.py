"""Boxes and points on the command line: into the prompt, out of the answer, drawn."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser
from mm1_mlx.config_boxes import STYLES, BoxFormat
from mm1_mlx.errors import ImageError, UsageError
from mm1_mlx.inputs.sources import pasted_path

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def _numbers(count: int, shape: str):
    """A type for add_argument: so many numbers with commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(word) for word in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count or any(v != v or abs(v) > 1e9 for v in values):
            raise argparse.ArgumentTypeError(
                f"must be {shape} in pixels of the picture, not '{text}'"
            )
        return values

    return parse


def add_boxes(parser: Parser) -> None:
    """--box, --point, --box-format and --draw."""
    group = parser.add_argument_group("boxes and points")
    add = group.add_argument
    add(
        "--box",
        type=_numbers(4, "x1,y1,x2,y2"),
        action="append",
        default=[],
        metavar="X1,Y1,X2,Y2",
        help="pixels of the picture, for a <box> of the prompt; once for each",
    )
    add(
        "--point",
        type=_numbers(2, "x,y"),
        action="append",
        default=[],
        metavar="X,Y",
        help="pixels of the picture, for a <point> of the prompt; once for each",
    )
    add(
        "--box-format",
        choices=tuple(STYLES),
        help="how the model writes boxes, where its folder does not say",
    )
    add(
        "--draw",
        metavar="FILE",
        help="draw the answer's boxes and points on the picture (PNG, JPEG, WebP); of "
        "several pictures FILE-1, FILE-2, ... those that have some",
    )


def check_boxes(args: argparse.Namespace) -> None:
    """UsageError for a --draw that could never be written, before anything is read."""
    if args.draw is not None:
        check_place(args.draw, "--draw")


def check_place(name: str, command: str) -> None:
    """UsageError where a drawing cannot have this name; command: what it came with."""
    place = Path(name).expanduser()
    if place.suffix.lower() not in _FORMATS:
        raise UsageError(
            f"{command} {name} must end with {', '.join(_FORMATS)}: that is the format"
        )
    if not place.parent.is_dir():
        raise UsageError(f"{command} {name}: the folder {place.parent} is not there")


def check_drawings(args: argparse.Namespace, images: Sequence[Any]) -> None:
    """UsageError where --draw has no picture, or would write over one of the user's.

    images: the prompt's pictures, as read_asked found them.
    """
    if args.draw is None:
        return
    if not images:
        raise UsageError("--draw goes with --image: there is no picture to draw on")
    given = [x for x in [*images, *args.video] if isinstance(x, (str, os.PathLike))]
    for place in places_of(args.draw, len(images)):
        for image in given:
            if _is_part(place, os.fspath(image)):
                raise UsageError(
                    f"--draw would write over the picture {place}: give another name"
                )


def places_of(name: str, pictures: int) -> list[Path]:
    """Where the drawings of so many pictures may go."""
    return [_place(name, picture, pictures) for picture in range(pictures)]


def _is_part(place: Path, given: str) -> bool:
    """Whether a file is there, and is the one that was given, or a frame in it."""
    try:
        path = pasted_path(given)
        if path.is_dir():
            return place.exists() and place.parent.samefile(path)
        return place.exists() and path.exists() and place.samefile(path)
    except (ImageError, OSError, ValueError):  # an address, or what is no path
        return False


def format_of(args: argparse.Namespace, processor: Any) -> BoxFormat | None:
    """How boxes are written: as the flag says, else as the model's folder does."""
    own = processor.config.box_config
    if args.box_format is None or (own and own.style == args.box_format):
        return own
    return BoxFormat(style=args.box_format)


def fill_prompt(
    prompt: str, args: argparse.Namespace, processor: Any, images: Sequence[Any]
) -> str:
    """The prompt with --box and --point in their places. PromptError, ImageError."""
    _note_unfilled(prompt, args)
    if not args.box and not args.point:
        return prompt
    from mm1_mlx.inputs.boxes import with_boxes

    return with_boxes(
        prompt,
        processor,
        images,
        args.box,
        args.point,
        form=format_of(args, processor),
        max_pixels=args.max_image_pixels,
    )


def _note_unfilled(prompt: str, args: argparse.Namespace) -> None:
    """A model may read <box> as text: that is asked for, or a flag was forgotten."""
    if not isinstance(prompt, str):
        return
    for slot, given in (("<box>", args.box), ("<point>", args.point)):
        flag = slot.replace("<", "--").rstrip(">")
        # Qwen-VL's form of a box stands between such marks.
        if slot in prompt and not given and slot.replace("<", "</") not in prompt:
            _say(f"note: {slot} in the prompt is read as text: {flag} fills it", args)


def fetched(images: Sequence[Any], args: argparse.Namespace) -> list[Any]:
    """The pictures; addresses as bytes where they will be read more than once."""
    needed = args.draw is not None or args.box or args.point or args.json
    if not needed or not args.allow_url:
        return list(images)
    from mm1_mlx.inputs.sources import read_source

    return [
        read_source(image, allow_url=True)[0]
        if isinstance(image, str) and re.match(r"\s*https?://", image, re.IGNORECASE)
        else image
        for image in images
    ]


def regions_of(
    answer: Any, args: argparse.Namespace, processor: Any, pictures: int
) -> list[Any]:
    """The boxes and points of the answer; none without a picture.

    pictures: how many are the prompt's own: boxes are not of examples before it.
    """
    if not pictures:
        return []
    from mm1_mlx.inputs.boxes import boxes_of

    form = format_of(args, processor)
    return boxes_of(answer, processor, pictures=pictures, form=form)


def as_objects(
    regions: Sequence[Any], images: Sequence[Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """For --json: label, kind, place in pixels, and the picture, from 1."""
    from mm1_mlx.inputs.boxes import size_of

    limit = args.max_image_pixels
    sizes = {r.picture: size_of(images[r.picture], limit) for r in regions}
    return [
        {
            "label": region.label,
            "kind": region.kind,
            "pixels": [round(v, 2) for v in region.to_pixels(*sizes[region.picture])],
            "image": region.picture + 1,
            "span": list(region.span),
            "guessed": region.guessed,
        }
        for region in regions
    ]


def wants_objects(args: argparse.Namespace, processor: Any) -> bool:
    """Whether --json tells of boxes: where they are known, or were asked for."""
    asked = args.draw is not None or args.box or args.point
    return bool(asked or format_of(args, processor))


def draw(
    regions: Sequence[Any], images: Sequence[Any], args: argparse.Namespace
) -> None:
    """Write the pictures of --draw, each whole or not at all, and say which."""
    if args.draw is None:
        return
    if not regions:
        _say("note: the answer has no boxes or points, so nothing was drawn", args)
        return
    from mm1_mlx.inputs.drawing import draw_boxes

    limit = {"max_pixels": args.max_image_pixels} if args.max_image_pixels else {}
    for picture in sorted({region.picture for region in regions}):
        drawn = draw_boxes(images[picture], regions, picture=picture, **limit)
        place = _place(args.draw, picture, len(images))
        _write(drawn, place)
        count = sum(region.picture == picture for region in regions)
        guess = ""
        if any(r.guessed for r in regions):
            guess = " (a guess: the model's folder does not say how it writes them)"
        _say(f"drawn: {count} on {place}{guess}", args)


def _place(name: str, picture: int, pictures: int) -> Path:
    """The file for a picture: the name itself where there is only one."""
    place = Path(name).expanduser()
    if pictures == 1:
        return place
    return place.with_name(f"{place.stem}-{picture + 1}{place.suffix}")


def _write(image: Any, place: Path) -> None:
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        image.save(draft, format=_FORMATS[place.suffix.lower()])
        os.replace(draft, place)
    except (OSError, ValueError) as error:  # ValueError: too large for the format
        draft.unlink(missing_ok=True)
        raise ImageError(f"{place} cannot be written: {error}.") from error


def _say(line: str, args: argparse.Namespace) -> None:
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)
