"""Sort pictures into your own classes, by showing a model a few of each: no training.

    python -m examples.classify pictures --draw
    python -m examples.classify pictures out --shots 8

The first line draws a folder to try it with: shapes whose names mean nothing, in any
colour. pictures/dax/1.png, pictures/dax/2.png, pictures/wug/1.png, ... are pictures of
the classes "dax" and "wug" (a "_" in a name is a space). Of each class some are
examples (--examples), the others are asked about. out gets shots.jsonl, the examples as
`generate --shots` takes them, and answers.csv; printed is a table of what was right.
Capitals and a full stop do not count. Beside it stands what the nearest example alone
would say, by the encoder's features: a model that learns from its shots should know at
least as much. A picture that cannot be read is one line on stderr, and the exit code is
1.
"""

import argparse
import csv
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.describe_folder import as_csv, write_whole
from examples.labels import find_pictures
from examples.mm1_tiny.drawing import draw
from examples.mm1_tiny.scenes import COLOURS, arrange
from examples.mm1_tiny.scoring import wilson
from mm1_mlx.cli.parser import Parser, some_text, whole_number
from mm1_mlx.cli.progress import progress_bar
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import DatasetError, ImageError, UsageError
from mm1_mlx.inputs.images import load_image
from mm1_mlx.inputs.prompts import plural

COLUMNS = ["picture", "class", "answer", "right", "nearest example"]
DRAWN = {"dax": "circle", "wug": "star", "tib": "heart"}  # name and shape
AT_ONCE = 8  # questions in a batch


@dataclass
class Outcome:
    """What was said of a picture, and what its nearest example is."""

    picture: Path
    label: str
    answer: str
    nearest: str

    @property
    def right(self) -> bool:
        """Whether the answer is the label."""
        return plain(self.answer) == plain(self.label)


def plain(text: str) -> str:
    """A name without what does not count: capitals, a full stop."""
    return " ".join(text.split()).rstrip(". ").casefold()


def draw_pictures(folder: Path, count: int, seed: int) -> None:
    """Draw `count` pictures of each of DRAWN into a folder of its own."""
    if folder.exists():
        raise DatasetError(f"{folder} is there already: name a new folder.")
    rng = random.Random(f"classify/{seed}")
    for name, shape in DRAWN.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            scene = arrange([(rng.choice(COLOURS), shape)], rng, smallest=0.25)
            draw(scene, rng).save(folder / name / f"{i}.png")
    print(f"{folder}: {count} pictures each of {', '.join(DRAWN)}")


def readable(pictures: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], int]:
    """Those that can be read, and how many cannot: a line on stderr for each."""
    good: dict[str, list[Path]] = {label: [] for label in pictures}
    for label, files in pictures.items():
        for file in files:
            try:
                load_image(file)
                good[label].append(file)
            except ImageError as error:
                print(f"skipped: {error}", file=sys.stderr, flush=True)
    bad = sum(len(files) - len(good[label]) for label, files in pictures.items())
    return good, bad


def divide(
    pictures: dict[str, list[Path]], examples: int, rng: random.Random
) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """(picture, label): `examples` of each class, and those that are asked about."""
    shown, asked = [], []
    for label, files in pictures.items():
        if len(files) <= examples:
            fewer = f", or --examples {len(files) - 1}" if len(files) > 1 else ""
            raise DatasetError(
                f"{label!r} has {plural(len(files), 'picture')} that can be read, and "
                f"{plural(examples, 'example')} of each class leave none to ask about: "
                f"add some{fewer}."
            )
        files = rng.sample(files, len(files))
        shown += [(file, label) for file in files[:examples]]
        asked += [(file, label) for file in files[examples:]]
    return shown, asked


def check_out(folder: Path) -> None:
    """Only what an earlier run has left there is written over. DatasetError."""
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder} is a file, but OUT is a folder: name another.")
    answers = folder / "answers.csv"
    try:
        with answers.open(
            encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            made_here = next(csv.reader(file), None) == COLUMNS
    except (OSError, ValueError, csv.Error):
        made_here = False
    for file in (answers, folder / "shots.jsonl"):
        if file.exists() and not made_here:
            raise DatasetError(
                f"{file} is there already, and was not written by this command: name "
                f"another folder than {folder}."
            )


def write_shots(
    file: Path, shown: Sequence[tuple[Path, str]], question: str | None
) -> None:
    """The examples as FewShot reads them; paths start from the file."""
    with file.open("w", encoding="utf-8") as out:
        for picture, label in shown:
            values = {"image": os.path.relpath(picture, file.parent), "answer": label}
            if question:
                values["prompt"] = question
            out.write(json.dumps(values) + "\n")  # any name, as ASCII


def classify(
    args: argparse.Namespace, asked: Sequence[tuple[Path, str]], shots: int
) -> Iterator[list]:
    """Ask about every picture, some at a time, after so many examples: all outcomes so
    far, whenever there are more."""
    from mm1_mlx import FewShot, batch_generate, load
    from mm1_mlx.inference.features import Features

    model, processor = load(args.model)
    features = Features()
    choice = {"choice": args.choice, "seed": args.seed, "balanced": True}
    file = args.out / "shots.jsonl"
    before = FewShot(file, shots, features=features, **choice)
    nearest = FewShot(file, 1, choice="nearest", features=features)
    bar, outcomes = progress_bar(len(asked), "pictures"), []
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        answers = batch_generate(
            model,
            processor,
            [args.question or ""] * len(part),
            [picture for picture, _ in part],
            shots=before,
            max_tokens=args.max_tokens,
        )
        for (picture, label), answer in zip(part, answers, strict=True):
            (near,) = nearest.choose(model, processor, [picture])
            outcomes.append(Outcome(picture, label, answer.answer, near.answer))
        bar.update(len(part))
        yield outcomes
    bar.close()


def write_answers(file: Path, outcomes: Sequence[Outcome]) -> None:
    """One line for each picture that was asked about."""
    rows = [
        [str(o.picture), o.label, o.answer, str(int(o.right)), o.nearest]
        for o in outcomes
    ]
    write_whole(file, as_csv([COLUMNS, *rows]))


def table(outcomes: Sequence[Outcome]) -> str:
    """Shares that were right, by class, with 95% intervals (Wilson)."""
    labels = sorted({o.label for o in outcomes})
    lines = [f"{'class':<16}{'right':>12}{'95% interval':>18}{'nearest alone':>16}"]
    for name in [*labels, None]:  # None: all of them
        some = [o for o in outcomes if name in (o.label, None)]
        right = sum(o.right for o in some)
        near = sum(o.nearest == o.label for o in some)
        low, high = wilson(right, len(some))
        interval = f"{low:.0%} to {high:.0%}"
        share = f"{right} of {len(some)}"
        lines.append(
            f"{name or 'all':<16}{share:>12}{interval:>18}{near / len(some):>16.0%}"
        )
    names = {plain(label) for label in labels}
    other = sum(plain(o.answer) not in names for o in outcomes)
    lines.append(f"{other} of {len(outcomes)} answers name no class")
    return "\n".join(lines)


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.classify", description=__doc__ or "")
    add = p.add_argument
    add("pictures", type=Path, metavar="PICTURES")
    add("out", type=Path, nargs="?", metavar="OUT")
    add("--draw", action="store_true", help="draw PICTURES, and end")
    add("--count", type=whole_number(2), default=12, metavar="N", help="draw: of each")
    add("--model", default="mm1-tiny", metavar="NAME")
    add(
        "--shots",
        type=whole_number(1),
        default=6,
        metavar="K",
        help="or all (%(default)s)",
    )
    add(
        "--examples",
        type=whole_number(1),
        default=4,
        metavar="N",
        help="of each class, from which shots are chosen (%(default)s)",
    )
    add(
        "--choice",
        choices=("random", "nearest"),
        default="random",
        help="of shots; random ones are read once for all (%(default)s)",
    )
    add(
        "--question",
        type=some_text,
        metavar="TEXT",
        help="asked of each; without one, pictures are followed by their names alone",
    )
    add("--max-tokens", type=whole_number(1), default=16, metavar="N")
    add("--seed", type=whole_number(0), default=0, metavar="N")
    p.add_debug()
    return p


def run(args: argparse.Namespace) -> int:
    """Draw a folder of pictures, or sort one; 1 where some cannot be read."""
    if args.draw:
        draw_pictures(args.pictures, args.count, args.seed)
        return 0
    if args.out is None:
        raise UsageError("two folders are needed: PICTURES and OUT")
    check_out(args.out)
    rng = random.Random(args.seed)
    pictures, bad = readable(find_pictures(args.pictures))
    shown, asked = divide(pictures, args.examples, rng)
    args.out.mkdir(parents=True, exist_ok=True)
    answers = args.out / "answers.csv"
    if not answers.exists():
        write_answers(answers, [])  # says whose folder it is
    write_shots(args.out / "shots.jsonl", shown, args.question)
    outcomes: list[Outcome] = []
    for outcomes in classify(args, asked, min(args.shots, len(shown))):
        write_answers(answers, outcomes)
    print(table(outcomes))
    print(f"{answers}: every answer", file=sys.stderr)
    return int(bad > 0)


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
