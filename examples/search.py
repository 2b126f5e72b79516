"""Find the pictures that look like one, by the features of a model's own encoder.

    python -m examples.search pictures --draw
    python -m examples.search pictures --query pictures/black_heart_10.png \\
        --sheet found.png

The first line draws a folder to try it with: shapes in all colours. All pictures of a
folder and of the folders in it are looked at. Printed are the nearest ones with their
cosine; found.png shows them beside the query (an earlier sheet is written over, any
other file is not). --index FILE keeps the features: the next
search looks only at pictures that are new or changed. A picture that cannot be read is
one line on stderr, and the exit code is 1.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from examples.mm1_tiny.drawing import draw
from examples.mm1_tiny.scenes import COLOURS, SHAPES, arrange
from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import counting
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import DatasetError, ImageError, UsageError
from mm1_mlx.inputs.images import load_image
from mm1_mlx.inputs.video import ENDINGS, natural_order

SIDE, GAP, ACROSS = 160, 8, 5  # of the contact sheet; pixels, pictures in a row
MADE_BY = "python -m examples.search"  # what a sheet says in its file


def draw_pictures(folder: Path, count: int, seed: int) -> None:
    """Draw `count` pictures of one thing each."""
    if folder.exists():
        raise DatasetError(f"{folder} is there already: name a new folder.")
    folder.mkdir(parents=True)
    rng = random.Random(f"search/{seed}")
    for i in range(count):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        scene = arrange([(colour, shape)], rng, smallest=0.3)
        draw(scene, rng).save(folder / f"{colour}_{shape}_{i}.png")
    print(f"{folder}: {count} pictures")


def find_pictures(folder: Path, sheet: Path | None = None) -> list[Path]:
    """Every picture in a folder and its folders, in natural order, without hidden
    ones and an earlier sheet."""
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.")
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in ENDINGS
        and path.is_file()
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
        and not (sheet is not None and sheet.exists() and path.samefile(sheet))
    ]
    if not found:
        raise DatasetError(f"{folder} has no pictures.")
    return sorted(found, key=natural_order)


def nearest(
    args: argparse.Namespace, pictures: Sequence[Path]
) -> tuple[list[tuple[float, Path]], list[ImageError]]:
    """(cosine, picture), the most alike first, the query itself left out; and what is
    wrong with the pictures that cannot be read."""
    from mm1_mlx import load
    from mm1_mlx.inference.features import Features

    model, processor = load(args.model)
    features = Features(args.index)
    (wanted,) = features.of(model, processor, [args.query])
    failed: dict[int, ImageError] = {}
    with counting("pictures") as progress:
        rows = features.of(model, processor, pictures, progress=progress, failed=failed)
    found = [
        (float(row @ wanted), path)
        for i, (row, path) in enumerate(zip(rows, pictures, strict=True))
        if i not in failed and not (args.query.exists() and path.samefile(args.query))
    ]
    found = sorted(found, key=lambda pair: -pair[0])[: args.top]
    return found, list(failed.values())


def sheet(query: Path, found: Sequence[tuple[float, Path]]) -> Image.Image:
    """The query, framed, and what was found, each with its cosine and name."""
    cells = [("query", query), *((f"{value:.3f}", path) for value, path in found)]
    rows = -(-len(cells) // ACROSS)
    step = SIDE + GAP
    size = (GAP + min(len(cells), ACROSS) * step, GAP + rows * (step + 14))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for i, (text, path) in enumerate(cells):
        x, y = GAP + i % ACROSS * step, GAP + i // ACROSS * (step + 14)
        picture = load_image(path)
        picture.thumbnail((SIDE, SIDE))
        left, top = (SIDE - picture.width) // 2, (SIDE - picture.height) // 2
        page.paste(picture, (x + left, y + top))
        if i == 0:
            pen.rectangle((x - 3, y - 3, x + SIDE + 2, y + SIDE + 2), outline="red")
        pen.text((x, y + SIDE + 2), f"{text} {path.name}"[:26], fill="black")
    return page


def check_sheet(place: Path) -> None:
    """Nothing but an earlier sheet is written over. UsageError, DatasetError."""
    if place.suffix.lower() != ".png":
        raise UsageError(f"--sheet {place} must end with .png")
    if not place.exists():
        return
    try:
        with Image.open(place) as earlier:
            made_here = earlier.info.get("Software") == MADE_BY
    except OSError:  # a folder, or no picture
        made_here = False
    if not made_here:
        raise DatasetError(
            f"--sheet {place} is there already, and no sheet of this command: give "
            f"another name."
        )


def write_sheet(place: Path, query: Path, found: Sequence[tuple[float, Path]]) -> None:
    """The sheet as a PNG that says what made it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text("Software", MADE_BY)
    sheet(query, found).save(place, format="PNG", pnginfo=mark)
    print(place, file=sys.stderr)


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.search", description=__doc__ or "")
    add = p.add_argument
    add("pictures", type=Path, metavar="PICTURES")
    add("--query", type=Path, metavar="FILE", help="a picture")
    add("--top", type=whole_number(1), default=9, metavar="N", help="(%(default)s)")
    add("--sheet", type=Path, metavar="FILE", help="write a contact sheet (PNG)")
    add("--index", type=Path, metavar="FILE", help="keep the features in this file")
    add("--model", default="mm1-tiny", metavar="NAME")
    add("--draw", action="store_true", help="draw PICTURES, and end")
    add("--count", type=whole_number(2), default=60, metavar="N", help="draw: how many")
    add("--seed", type=whole_number(0), default=0, metavar="N")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> int:
    """Draw a folder of pictures, or search in one; 1 where some cannot be read."""
    if args.draw:
        draw_pictures(args.pictures, args.count, args.seed)
        return 0
    if args.query is None:
        raise UsageError("the following arguments are required: --query")
    if args.sheet is not None:
        check_sheet(args.sheet)
    found, failed = nearest(args, find_pictures(args.pictures, args.sheet))
    for error in failed:
        print(f"skipped: {error}", file=sys.stderr)
    for value, path in found:
        print(f"{value:.4f} {path}")
    if args.sheet is not None:
        write_sheet(args.sheet, args.query, found)
    return int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
