"""From a folder of your own pictures to data: each in a folder named by its answer.

    python -m examples.labels data PICTURES DATA --question "What is this?" --old OLD
    python -m examples.teach DATA OUT --model MODEL

PICTURES/cat/1.jpg, PICTURES/cat/2.jpg, PICTURES/dog/1.jpg, ... make questions with the
answers "cat" and "dog" (a "_" in a name is a space). A fifth of each label's pictures
is kept to test with, a tenth to validate.

What a model is not shown again, it forgets. OLD is where old questions come from: a
data folder whose train.jsonl (and valid.jsonl, test.jsonl) holds what the model should
keep, or the word mm1-tiny, whose old questions are drawn. As many are taken as there
are new ones. Where there are none, --ask "Describe this picture." takes the model's own
answers to questions of yours, about your pictures.

    python -m examples.labels draw PICTURES

draws a folder to try it with: shapes that mm1-tiny has seen but has no names for.
"""

import copy
import os
import re
import sys
from pathlib import Path
from random import Random
from typing import Any

from examples.mm1_tiny.drawing import draw
from examples.mm1_tiny.scenes import COLOURS, arrange
from examples.teach import (
    Writer,
    add_old,
    add_tests,
    ask,
    question_of,
    read_lines,
    write_lines,
)
from mm1_mlx.cli.parser import Parser, some_text, whole_number
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import DatasetError, UsageError
from mm1_mlx.inputs.video import ENDINGS

SPLITS = ("train", "valid", "test")
NAMES = ("arrow", "bar", "cross", "half", "hexagon", "tee")


def find_pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each label, in the order of their names; hidden ones are none."""
    if not folder.is_dir():
        raise DatasetError(
            f"There is no folder {folder}: expected PICTURES/LABEL/*.jpg."
        )
    found = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [
            path
            for path in place.iterdir()
            if path.suffix.lower().lstrip(".") in ENDINGS and path.name[0] != "."
        ]
        if files and place.name[0] != ".":
            found[place.name.replace("_", " ")] = sorted(files)
    if len(found) < 2:
        raise DatasetError(
            f"{folder} has {len(found)} folders with pictures, but must have one for "
            f"each of two or more answers: {folder}/cat/1.jpg, {folder}/dog/1.jpg."
        )
    return found


def divide(pictures: dict[str, list[Path]], rng: Random) -> dict[str, list]:
    """By split: (picture, label). A fifth of each label to test, a tenth to validate,
    at least one of each; the others to train."""
    splits: dict[str, list] = {split: [] for split in SPLITS}
    for label, files in pictures.items():
        if len(files) < 3:
            raise DatasetError(
                f"{label!r} has {len(files)} pictures, but must have 3 or more: one to "
                f"train, one to validate, one to test."
            )
        files = rng.sample(files, len(files))
        test, valid = max(1, len(files) // 5), max(1, len(files) // 10)
        splits["test"] += [(file, label) for file in files[:test]]
        splits["valid"] += [(file, label) for file in files[test : test + valid]]
        splits["train"] += [(file, label) for file in files[test + valid :]]
    return splits


def moved(line: dict, source: Path, target: Path) -> dict:
    """A line of one data folder for another: its pictures stay where they are."""

    def path(image: Any) -> Any:
        if isinstance(image, dict):
            return {k: path(v) if k in ("path", "url") else v for k, v in image.items()}
        if not isinstance(image, str) or re.match(r"data:|[a-zA-Z]+://", image):
            return image
        return os.path.relpath(source / image, target)

    line = copy.deepcopy(line)
    for key in ("image", "images"):
        if key in line:
            images = line[key]
            several = isinstance(images, list)
            line[key] = [path(i) for i in images] if several else path(images)
    for message in line.get("messages", ()):
        for part in message["content"] if isinstance(message["content"], list) else ():
            for key in ("image", "image_url"):
                if key in part:
                    part[key] = path(part[key])
    return line


def old_lines(old: str, split: str, count: int, data: Path, rng: Random) -> list[dict]:
    """`count` old questions of a split, or all that there are; all of them to test."""
    if old == "mm1-tiny":
        writer = Writer(data, f"old_{split}")
        if split == "test":
            add_tests(writer, 200, 0)
        else:
            add_old(writer, count, ("colour", "shape"), rng)
        return writer.lines
    file = Path(old) / f"{split}.jsonl"
    if not file.is_file() and split != "train":
        return []
    lines = [moved(line, file.parent, data) for line in read_lines(file)]
    return lines if split == "test" else rng.sample(lines, min(count, len(lines)))


def own_answers(lines: list[dict], data: Path, args: Any, rng: Random) -> list[dict]:
    """A question of --ask about the picture of each line, as the model answers it."""
    rows = [
        {"task": "own", "question": rng.choice(args.ask), "images": line["images"]}
        for line in lines
    ]
    answers = ask([question_of(row, data) for row in rows], args.model, None)
    pairs = zip(rows, answers, strict=True)
    return [row | {"answer": answer} for row, answer in pairs if answer]


def write_data(args: Any) -> None:
    """Write the splits of DATA: questions about the labels, and old ones among them."""
    rng, data = Random(args.seed), args.data
    if there := [split for split in SPLITS if (data / f"{split}.jsonl").exists()]:
        raise DatasetError(
            f"{data / there[0]}.jsonl is there already: name a new folder."
        )
    splits = divide(find_pictures(args.pictures), rng)
    data.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        lines: list[dict] = [
            {
                "task": "labels",
                "question": args.question,
                "answer": label,
                "images": [os.path.relpath(picture, data)],
            }
            for picture, label in pairs
        ]
        old: list[dict] = []
        if args.old:
            old += old_lines(args.old, split, len(lines), data, rng)
        if args.ask and split != "test":
            old += own_answers(lines, data, args, rng)
        if split != "test":
            lines = rng.sample(lines + old, len(lines) + len(old))
            old = []
        write_lines(data / f"{split}.jsonl", lines + old)


def draw_pictures(folder: Path, count: int, seed: int) -> None:
    """Draw `count` pictures of each of NAMES into a folder of its own."""
    for name in NAMES:
        if (folder / name).exists():
            raise DatasetError(f"{folder / name} is there already: name a new folder.")
    rng = Random(f"labels/{seed}")
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            scene = arrange([(rng.choice(COLOURS), name)], rng, smallest=0.15)
            draw(scene, rng).save(folder / name / f"{i:03}.png")
    print(f"{folder}: {count} pictures each of {', '.join(NAMES)}")


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.labels", description=__doc__ or "")
    add = p.add_argument
    add("verb", choices=["data", "draw"])
    add("pictures", type=Path, metavar="PICTURES")
    add("data", type=Path, nargs="?", metavar="DATA")
    add("--question", type=some_text, default="What is this?", metavar="TEXT")
    add("--old", metavar="FOLDER", help="data with old questions, or mm1-tiny")
    add("--ask", type=some_text, action="append", default=[], metavar="TEXT")
    add("--model", default="mm1-tiny", metavar="NAME", help="that answers --ask")
    add("--count", type=whole_number(3), default=100, metavar="N", help="draw: of each")
    add("--seed", type=whole_number(0), default=0, metavar="N")
    p.add_debug()
    return p


def run(args: Any) -> None:
    """Draw a folder of pictures, or make data of one."""
    if args.verb == "draw":
        return draw_pictures(args.pictures, args.count, args.seed)
    if args.data is None:
        raise UsageError("data needs two folders: PICTURES and DATA")
    if not args.old and not args.ask:
        print(
            "no old questions (--old, --ask): others will be forgotten", file=sys.stderr
        )
    return write_data(args)


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
