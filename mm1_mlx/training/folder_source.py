"""A plain folder as pretraining data: train.jsonl and the pictures that it names.

    {"text": "<image> A red circle.", "images": ["pictures/1.png"]}
    {"text": "First <image> then <image> again.", "images": ["a.png", "b.png"]}
    {"text": "Only text."}

One document a line. Every text token is learned; `<image>` stands where a picture
belongs (without any, the pictures come first). Lines may have a "kind" (caption,
interleaved, text; else it follows from the number of pictures) and, for the encoder
stage, "regions": for each picture a list of {"box": [left, top, right, bottom] as
fractions, "text": "red circle"}.
"""

import json
import random
from array import array
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError, ImageError
from mm1_mlx.inputs.images import load_image
from mm1_mlx.training.documents import KINDS, Document, Region, Text

FILE = "train.jsonl"
IMAGE_MARK = "<image>"
_KEYS = {"text", "images", "kind", "regions"}


class FolderSource:
    """Documents of a folder, drawn at random with replacement.

    Only where each line starts is kept in memory: texts and pictures are read when they
    are drawn. All lines are checked when the source is made, the pictures when they are
    used; a DatasetError names the line.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = folder / FILE
        self._starts = {kind: array("Q") for kind in KINDS}
        self._pictures = array("Q")  # lines with at least one picture
        if not self._file.is_file():
            raise DatasetError(f"{folder} has no {FILE}: one JSON object a line.")
        with self._file.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    values = _parse(line, f"{self._file}, line {number}")
                    self._starts[values["kind"]].append(start)
                    if values["images"]:
                        self._pictures.append(start)
                start += len(line)
        if not any(map(len, self._starts.values())):
            raise DatasetError(f"{self._file} is empty: one JSON object a line.")

    @property
    def counts(self) -> dict[str, int]:
        """How many documents there are of each kind."""
        return {kind: len(starts) for kind, starts in self._starts.items()}

    def document(
        self, rng: random.Random, kind: str, progress: float = 1.0
    ) -> Document:
        """A random document of a kind; `progress` changes nothing."""
        starts = self._starts[kind]
        if not starts:
            there = {k: n for k, n in self.counts.items() if n}
            raise DatasetError(
                f"{self._file} has no documents of the kind {kind!r}, but the stage's "
                f"mix asks for them. There are {there}: give weights to these only."
            )
        values, where = self._read(starts[rng.randrange(len(starts))])
        pieces = _pieces(values["text"], len(values["images"]))
        return Document(
            kind=kind,
            images=[self._image(name, where) for name in values["images"]],
            context=pieces[:-1],
            branches=[pieces[-1:]],
            tasks=[kind],
            regions=_regions(values),
        )

    def region_picture(
        self, rng: random.Random, progress: float = 1.0
    ) -> tuple[Any, list[Region]]:
        """A random picture, and what stands where in it.

        Without "regions" it is the whole picture with the text of its line.
        """
        if not self._pictures:
            raise DatasetError(
                f"{self._file} has no pictures, but the encoder stage learns from them."
            )
        start = self._pictures[rng.randrange(len(self._pictures))]
        values, where = self._read(start)
        which = rng.randrange(len(values["images"]))
        regions = _regions(values)[which] if values["regions"] else []
        if not regions:
            text = " ".join(values["text"].replace(IMAGE_MARK, " ").split())
            regions = [Region((0.0, 0.0, 1.0, 1.0), text)]
        return self._image(values["images"][which], where), regions

    def _read(self, start: int) -> tuple[dict, str]:
        with self._file.open("rb") as file:
            file.seek(start)
            line = file.readline()
        where = f"{self._file}, the line at byte {start}"
        return _parse(line, where), where

    def _image(self, name: str, where: str) -> Any:
        try:
            return load_image(self._folder / Path(name).expanduser())
        except ImageError as error:
            raise DatasetError(f"{where}: {error}") from error


def _parse(line: bytes, where: str) -> dict:
    """The values of a line, all keys there; DatasetError says what is wrong."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(values, dict):
        raise DatasetError(f"{where}: not a JSON object but {str(values)[:40]!r}.")
    if unknown := sorted(values.keys() - _KEYS):
        raise DatasetError(
            f"{where}: unknown keys {unknown}. Known keys: {sorted(_KEYS)}."
        )
    text, images = values.get("text"), values.get("images", [])
    if not isinstance(text, str) or not text.replace(IMAGE_MARK, "").strip():
        raise DatasetError(f"{where}: 'text' is {text!r}, but must be a text.")
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise DatasetError(
            f"{where}: 'images' is {images!r}, but must be a list of file names."
        )
    marks = text.count(IMAGE_MARK)
    if marks and marks != len(images):
        raise DatasetError(
            f"{where}: the text has {marks} {IMAGE_MARK} but there are {len(images)} "
            f"images. Write {IMAGE_MARK} once for each, or not at all."
        )
    usual = "text" if not images else "caption" if len(images) == 1 else "interleaved"
    kind = values.get("kind", usual)
    if kind not in KINDS:
        raise DatasetError(
            f"{where}: 'kind' is {kind!r}, but must be one of {', '.join(KINDS)}."
        )
    if (kind == "text") == bool(images):
        raise DatasetError(
            f"{where}: the kind {kind!r} does not go with {len(images)} images: text "
            f"has none, caption and interleaved have at least one."
        )
    regions = values.get("regions", [])
    _check_regions(regions, len(images), where)
    return {"text": text, "images": images, "kind": kind, "regions": regions}


def _check_regions(regions: Any, images: int, where: str) -> None:
    good = isinstance(regions, list) and len(regions) in (0, images)
    for part in regions if good else []:
        good = good and isinstance(part, list)
        for region in part if good else []:
            good = good and _is_region(region)
    if not good:
        raise DatasetError(
            f"{where}: 'regions' must hold for each of the {images} images a list of "
            '{"box": [left, top, right, bottom], "text": ...}, boxes as fractions from '
            "0 to 1."
        )


def _is_region(region: Any) -> bool:
    if not isinstance(region, dict) or region.keys() != {"box", "text"}:
        return False
    box, text = region["box"], region["text"]
    if not isinstance(box, list) or len(box) != 4 or not isinstance(text, str):
        return False
    if not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in box):
        return False
    return box[0] < box[2] and box[1] < box[3] and bool(text.strip())


def _regions(values: dict) -> list[list[Region]]:
    if not values["regions"]:
        return [[] for _ in values["images"]]
    return [
        [Region(tuple(region["box"]), region["text"]) for region in part]
        for part in values["regions"]
    ]


def _pieces(text: str, images: int) -> list[Text]:
    """The text cut at its pictures; the last piece is text, "" after a last picture."""
    if IMAGE_MARK not in text:
        text = IMAGE_MARK * images + text
    first, *rest = text.split(IMAGE_MARK)
    pieces = [Text(first, True)] if first or not rest else []
    for part in rest:
        pieces.append(Text(IMAGE_MARK))
        if part:
            pieces.append(Text(part, True))
    if pieces[-1].text == IMAGE_MARK:
        pieces.append(Text("", True))
    return pieces
