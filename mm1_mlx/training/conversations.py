"""Folders of conversations to fine-tune on: their splits, lessons and checks.

A folder has for each split one file, or several with numbers:
    train.jsonl    train.json    train.parquet    train-00000-of-00002.parquet
beside each other, in `data/`, or in a folder of the split's name, as hub datasets have
them. `samples.py` has the forms of a sample.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.errors import (
    DatasetError,
    ImageError,
    MM1Error,
    MM1Warning,
    PromptError,
)
from mm1_mlx.inputs.lessons import Lesson, lesson_layouts, lesson_length, make_lesson
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import plural
from mm1_mlx.training.json_samples import Joined, JsonLines, open_json
from mm1_mlx.training.samples import Sample, Samples

# The splits, and what they are called in file names.
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val"),
    "test": ("test",),
}
FORMATS = ("jsonl", "json", "parquet")
_KIND = rf"\.({'|'.join(FORMATS)})"
_LOOKED_AT = 1000
_SHARD = re.compile(r"-(\d+)-of-(\d+)")


def split_files(names: Sequence[str], split: str) -> list[str]:
    """Of the files of a folder, as "data/train.jsonl", those of a split, in order.

    DatasetError where there are several sets of them, or numbers are missing.
    """
    words = "|".join(SPLITS[split])
    named = re.compile(rf"(data/)?({words})([-._]\d[\w.-]*?)?{_KIND}")
    inside = re.compile(rf"(data/)?({words})()/[^/]+{_KIND}")  # where none is named so
    found: dict[tuple[str | None, ...], list[str]] = {}
    for pattern in (named, inside):
        for name in names if not found else ():
            if match := pattern.fullmatch(name):
                found.setdefault(match.group(1, 2, 4), []).append(name)
    if len(found) > 1:
        shown = " and ".join(sorted(min(files) for files in found.values())[:2])
        raise DatasetError(
            f"There are {shown}: it is not known which is meant as the {split} split. "
            f"Leave one, or name the file itself."
        )
    files = sorted(next(iter(found.values()), []))
    if shards := [match for name in files if (match := _SHARD.search(name))]:
        wanted = max(int(match[2]) for match in shards)
        if len({int(match[1]) for match in shards}) < wanted:
            raise DatasetError(
                f"There are {len(shards)} of the {wanted} files like {files[0]}: get "
                f"the others."
            )
    return files


def open_file(files: Sequence[Path], images: Path) -> Samples:
    """The samples of a file, or of several in turn.

    images: what paths of pictures start from. Raises DatasetError.
    """
    kind = files[0].suffix.lower()
    if kind == ".parquet":
        from mm1_mlx.training.parquet_samples import ParquetRows

        return ParquetRows(files, images)
    make = JsonLines if kind == ".jsonl" else open_json
    parts = [make(file, images) for file in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


def open_split(place: Path, split: str, images: Path | None = None) -> Samples | None:
    """The samples of a split, or None where there are none.

    place: a folder, or a file, which is a train split. images: what paths of pictures
    start from; None for the folder.
    """
    if place.is_file():
        if place.suffix.lower().lstrip(".") not in FORMATS:
            raise DatasetError(
                f"{place} is no data: expected a folder, or a file that ends with "
                f".{', .'.join(FORMATS)}."
            )
        return open_file([place], images or place.parent) if split == "train" else None
    inside = [place, place / "data"]
    inside += [folder / word for folder in list(inside) for word in SPLITS[split]]
    names = [
        path.relative_to(place).as_posix()
        for folder in inside
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file()
    ]
    try:
        files = split_files(names, split)
    except DatasetError as error:
        raise DatasetError(f"{place}: {error}") from error
    if not files:
        return None
    return open_file([place / name for name in files], images or place)


def open_train(place: Path, images: Path | None = None) -> Samples:
    """The samples to train on; DatasetError where there are none."""
    if not place.exists():
        raise DatasetError(
            f"There is no data folder {place}: expected one with train.jsonl."
        )
    found = open_split(place, "train", images)
    if found is None:
        inside = sorted(path.name for path in place.iterdir() if path.is_dir())
        hint = f" Its folders are {', '.join(inside[:5])}: name one." if inside else ""
        raise DatasetError(
            f"{place} has no train.jsonl (nor train.json, train.parquet, nor numbered "
            f"ones).{hint}"
        )
    return found


def too_long(lesson: Lesson, where: str, limit: int) -> str:
    """What is said of a sample that has too many tokens."""
    return (
        f"{where}: the sample has {len(lesson.ids)} tokens "
        f"({sum(lesson.image_tokens)} of images), but max_tokens is {limit}. Raise "
        f"it (--max-seq-length), or leave such samples out (--too-long drop)."
    )


def lesson_of(sample: Sample, processor: Processor) -> Lesson:
    """The lesson of a sample; DatasetError names its line."""
    try:
        return make_lesson(processor, sample.messages, sample.images)
    except (PromptError, ImageError) as error:
        raise DatasetError(f"{sample.where}: {error}") from error


def length_of(sample: Sample, processor: Processor) -> int:
    """The tokens of a sample's lesson, without its pictures; errors as of lesson_of."""
    try:
        return lesson_length(processor, sample.messages, sample.images)
    except (PromptError, ImageError) as error:
        raise DatasetError(f"{sample.where}: {error}") from error


def warn_of_small_pictures(samples: Any, processor: Processor) -> None:
    """MM1Warning where pictures are cut, but none is larger than a tile: their tiles
    cost tokens and show nothing more.

    samples: Samples, or a Mixture. Only headers are read, of _LOOKED_AT samples at
    most, up to a picture that gains.
    """
    seen, side = 0, 0
    for number in range(0, len(samples), -(-len(samples) // _LOOKED_AT) or 1):
        try:
            sample = samples[number]
            layouts = lesson_layouts(processor, sample.messages, sample.images)
        except MM1Error:  # told where the sample is learned from
            continue
        for way, layout in layouts:
            seen, side = seen + 1, way.settings.size
            if layout.tiles > 1 and max(layout.width, layout.height) > side:
                return
    if seen:
        warnings.warn(
            f"Resolution 'dynamic' gains nothing on these data: of the "
            f"{plural(seen, 'picture')} looked at none is larger than a tile "
            f"({side} x {side} pixels) and cut into tiles. Leave it out, or give "
            f"larger pictures.",
            MM1Warning,
            stacklevel=2,
        )


@dataclass
class Checked:
    """What `check_samples` found. longest, learned: tokens; least_learned and
    most_learned: of a sample. dropped: samples that are too long, where these are left
    out; not counted otherwise. problems: one line each."""

    samples: int = 0
    images: int = 0
    tokens: int = 0
    learned: int = 0
    least_learned: int = 0
    most_learned: int = 0
    longest: int = 0
    longest_where: str = ""
    dropped: int = 0
    problems: list[str] | None = None


def check_samples(
    samples: Samples,
    processor: Processor,
    limit: int | None = None,
    *,
    drop: bool = False,
) -> Iterator[Checked]:
    """Read every sample with its pictures; gives what is known after each.

    limit: of tokens; a longer sample is a problem, or with `drop` left out.
    """
    found = Checked(problems=[])
    assert found.problems is not None
    for index in range(len(samples)):
        try:
            sample = samples[index]
            lesson = lesson_of(sample, processor)
        except DatasetError as error:
            found.problems.append(str(error))
            yield found
            continue
        if limit is not None and len(lesson.ids) > limit:
            if drop:
                found.dropped += 1
                yield found
                continue
            found.problems.append(too_long(lesson, sample.where, limit))
        learned = sum(lesson.learned)
        least = min(found.least_learned, learned) if found.samples else learned
        found.least_learned = least
        found.most_learned = max(found.most_learned, learned)
        found.samples += 1
        found.images += len(lesson.image_tokens)
        found.tokens += len(lesson.ids)
        found.learned += learned
        if len(lesson.ids) > found.longest:
            found.longest, found.longest_where = len(lesson.ids), sample.where
        yield found
