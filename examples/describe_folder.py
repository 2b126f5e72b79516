"""Describe a folder of photos into a CSV file: path, description, tokens, seconds.

    python -m examples.describe_folder examples described.csv
    python -m examples.describe_folder PHOTOS out.csv --model llava-hf/llava-1.5-7b-hf

A run that was interrupted goes on when the same command is given again: rows that are
there stay as they are. A picture that cannot be read is one line on stderr, no row, and
exit code 1 at the end; the next run tries it again. seconds: of a batch, divided by its
pictures.
"""

import argparse
import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import progress_bar
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import ImageError, MM1Error
from mm1_mlx.inputs.prompts import with_image_slots

COLUMNS = ["path", "description", "tokens", "seconds"]
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
_NAMES = "surrogateescape"  # names of files may have bytes that are no UTF-8


def find_pictures(folder: Path, *, inside: bool = False) -> list[str]:
    """Paths of the pictures of a folder, relative to it, by name; inside: and of the
    folders in it. Hidden files are left out. MM1Error where there are none."""
    if not folder.is_dir():
        raise MM1Error(f"{folder} is not a folder: give one with pictures in it.")
    found = []
    for path in folder.rglob("*") if inside else folder.iterdir():
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            found.append(name)
    if not found:
        more = "" if inside else " (--inside also looks into the folders in it)"
        raise MM1Error(f"{folder} has no pictures{more}.")
    return sorted(found)


def read_earlier(place: Path) -> str:
    """What an earlier run has written; "" where it is the first. MM1Error."""
    if not place.parent.is_dir():
        raise MM1Error(f"{place} cannot be written: there is no {place.parent}.")
    try:
        return place.read_text(encoding="utf-8", errors=_NAMES)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise MM1Error(f"{place} cannot be read: {error}.") from error


def write_whole(place: Path, text: str) -> None:
    """Put a text in place of what a file has: all of it, or nothing."""
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8", errors=_NAMES, newline="")
    os.replace(draft, place)


def read_rows(place: Path) -> list[list[str]]:
    """The rows of an earlier run, without one that was cut off; [] where none was."""
    text = read_earlier(place)
    if not text:
        return []
    rows = list(csv.reader(io.StringIO(text)))
    if rows[0] != COLUMNS:
        raise MM1Error(
            f"{place} is there already, and was not written by this command: its first "
            f"line is not {','.join(COLUMNS)}. Give another name."
        )
    whole = rows[1:] if text.endswith("\n") else rows[1:-1]
    return [row for row in whole if len(row) == len(COLUMNS)]


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def load_those_that_can_be(
    folder: Path, names: Sequence[str]
) -> tuple[list[str], list[Any]]:
    """The names of the pictures that can be read, and these; a line for each other."""
    from mm1_mlx.inputs.images import load_image

    good, pictures = [], []
    for name in names:
        try:
            pictures.append(load_image(folder / name))
            good.append(name)
        except ImageError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
    return good, pictures


def pictures_left(
    folder: Path, left: Sequence[str], out: Path, what: str, size: int = 1
) -> Iterator[tuple[list[str], list[Any], Callable[[str], Any]]]:
    """Names and pictures, `size` at a time, and what adds text to `out`; with a bar.

    Those that cannot be read are told and left out. What was added is in the file when
    the next ones are taken.
    """
    bar = progress_bar(len(left), what)
    with open(out, "a", encoding="utf-8", errors=_NAMES, newline="") as file:
        for start in range(0, len(left), size):
            some = left[start : start + size]
            good, pictures = load_those_that_can_be(folder, some)
            if good:
                yield good, pictures, file.write
                file.flush()
            bar.update(len(some))
    bar.close()


def run(args: argparse.Namespace) -> int:
    """Describe what has no row yet; 1 where something cannot be read."""
    from mm1_mlx import batch_generate, load

    with_image_slots(args.prompt, 1)  # fails before anything is loaded or written
    names = find_pictures(args.folder, inside=args.inside)
    rows = read_rows(args.out)
    done = {row[0] for row in rows}
    left = [name for name in names if name not in done]
    written = 0
    if left:
        model, processor = load(args.model)
        # Whole again, where the last run was cut off in the midst of a row.
        write_whole(args.out, as_csv([COLUMNS, *rows]))
    work = pictures_left(args.folder, left, args.out, "describe", args.batch_size)
    for good, pictures, write in work:
        started = time.perf_counter()
        prompts = [args.prompt] * len(good)
        answers = batch_generate(
            model, processor, prompts, pictures, max_tokens=args.max_tokens
        )
        seconds = f"{(time.perf_counter() - started) / len(good):.3f}"
        rows = [
            [name, answer.text.strip(), str(answer.generation_tokens), seconds]
            for name, answer in zip(good, answers, strict=True)
        ]
        write(as_csv(rows))
        written += len(good)
    print(
        f"{args.out}: {written} described, {len(left) - written} skipped, "
        f"{len(names) - len(left)} were there"
    )
    return int(written < len(left))


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.describe_folder", description=__doc__ or "")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    p.add_argument("out", type=Path, metavar="OUT.csv")
    p.add_argument("--model", default="mm1-tiny", metavar="NAME")
    p.add_argument("--prompt", default="Describe the picture.", metavar="TEXT")
    p.add_argument("-m", "--max-tokens", type=whole_number(1), default=100, metavar="N")
    p.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=4,
        metavar="N",
        help="pictures at a time: more are faster, and take more memory (%(default)s)",
    )
    p.add_argument(
        "--inside", action="store_true", help="also the folders inside the folder"
    )
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
