"""SEED-Bench and MMBench: multiple choice, one letter as the answer.

Sources: AILab-CVC/SEED-Bench (SEED-Bench.json); MMBench's tables as VLMEvalKit and
LLaVA read them; lmms-eval for the hub's columns.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mm1_mlx.errors import ImageError
from mm1_mlx.evaluation.datasets.pictures import Pictures, Stored
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.rows import (
    Fault,
    Row,
    entries,
    first,
    letter,
    merged,
    name,
    read_json,
    samples_of,
    text,
)
from mm1_mlx.evaluation.datasets.tables import picture, reader
from mm1_mlx.evaluation.datasets.tsv import row_at, table
from mm1_mlx.evaluation.samples import Sample, Source

# --- SEED-Bench ----------------------------------------------------------------------

# The names of SEED-Bench.json's "question_type"; the hub's rows have the numbers alone.
_SEED = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes"),
    *("Instance Location", "Instances Counting", "Spatial Relation"),
    *("Instance Interaction", "Visual Reasoning", "Text Understanding"),
    *("Action Recognition", "Action Prediction", "Procedure Understanding"),
)
_FRAMES = "SEED-Bench-video-image"  # where LLaVA keeps a frame of each video


def _seed_sample(
    values: dict[str, Any], images: tuple, kinds: dict[int, str]
) -> Sample:
    options = tuple(str(first(values, f"choice_{each}")) for each in "abcd")
    number = values.get("question_type_id")
    kind = kinds.get(number, str(number)) if isinstance(number, int) else str(number)
    return Sample(
        id=name(values, "question_id"),
        images=images,
        question=text(values, "question"),
        choices=options,
        answers=(letter(values, "answer", 4),),
        fields={"category": kind, "data_type": text(values, "data_type")},
    )


def _seed_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/SEED-Bench: a list of pictures, several for a video."""
    images = values.get("image")
    images = images if isinstance(images, list) else [images]
    if not images or images[0] is None:
        raise Fault("has no picture in 'image'")
    yield _seed_sample(values, tuple(images), dict(enumerate(_SEED, 1)))


def _seed(only_images: bool) -> Callable[[Place, str], Iterator[Sample]]:
    """SEED-Bench.json with SEED-Bench-image; of videos a frame each, as LLaVA has."""

    def published(place: Place, split: str) -> Iterator[Sample]:
        """The questions of SEED-Bench.json, of one file for all splits."""
        path = place.need("SEED-Bench.json")
        found = read_json(path)
        asked = entries(path, found, "questions")
        names = found.get("question_type")
        names = names if isinstance(names, dict) else {}
        kinds = {v: k for k, v in names.items() if isinstance(v, int)}
        pictures = Pictures(place.folder)

        def make(values: dict[str, Any]) -> Iterable[Sample]:
            is_image = text(values, "data_type") == "image"
            if only_images and not is_image:
                return
            if is_image:
                image = pictures.find(name(values, "data_id"), "SEED-Bench-image", "")
            else:
                image = pictures.find(f"{name(values, 'question_id')}.png", _FRAMES)
            yield _seed_sample(values, (image,), kinds)

        return samples_of(asked, make, str(path))

    return published


def _seed_image_row(values: dict[str, Any]) -> Iterable[Sample]:
    return (s for s in _seed_row(values) if s.fields["data_type"] == "image")


read_seed = reader(_seed_row, _seed(only_images=False))
read_seed_image = reader(_seed_image_row, _seed(only_images=True))

# --- MMBench -------------------------------------------------------------------------

_ROUNDS = 1_000_000  # question 7 turned once is 1000007, twice 2000007
_SHORT = 64  # an image cell below so many characters is another question's index


def _given(values: dict[str, Any], key: str) -> str:
    """A cell's text; "" where the table has none ("nan", as pandas writes it)."""
    found = values.get(key)
    found = "" if found is None else str(found)
    return "" if found.strip() in ("", "nan") else found


def _mmbench_sample(values: dict[str, Any], image: Any) -> Sample:
    index = name(values, "index")
    if not index.isdigit():
        raise Fault(f"'index' is {index!r}, but must be a number")
    cells = [_given(values, each) for each in "ABCDE"]
    options = tuple(cell for cell in cells if cell)
    if len(options) < 2 or cells[: len(options)] != list(options):
        raise Fault("must have two choices or more in 'A', 'B', ..., without a gap")
    question = str(int(index) % _ROUNDS)
    fields = {"hint": _given(values, "hint"), "category": _given(values, "category")}
    fields["l2_category"] = _given(values, "L2-category") or _given(
        values, "l2-category"
    )
    known = _given(values, "answer")
    return Sample(
        id=index,
        images=(image,),
        question=text(values, "question"),
        choices=options,
        answers=(letter({"answer": known}, "answer", len(options)),) if known else (),
        fields={**fields, "index": int(index), "circle": question, "pair": question},
    )


def _mmbench_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/MMBench, of which the English part is meant."""
    (image,) = picture(values, "image")
    yield _mmbench_sample(values, image)


def _mmbench(place: Place, split: str) -> Iterator[Sample]:
    """mmbench_dev_20230712.tsv, MMBench_DEV_EN.tsv: the pictures are in the table."""
    wanted = re.compile(rf"mmbench_{split}(_en)?(_\d+|_v\d+)?\.tsv", re.IGNORECASE)
    names = [n for n in place.names if wanted.fullmatch(n.rpartition("/")[2])]
    if not names:
        raise place.missing(f"mmbench_{split}_20230712.tsv or MMBench_{split}_EN.tsv")
    path = place.folder / names[0]
    starts = {name(v, "index"): at for at, v in table(path) if v.get("index")}

    def rows() -> Iterator[Row]:
        for at, values in table(path):
            number = values.get("index", "?")
            yield f"{path}, line {values['#']}", merged(values, start=at, number=number)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        start, cell = values["start"], text(values, "image")
        if len(cell) < _SHORT:
            if cell not in starts:
                raise Fault(f"'image' names the question {cell!r}, which is not there")
            start = starts[cell]
        where = f"{path}, question {values['number']}"
        yield _mmbench_sample(
            values, Stored(where, lambda _: _cell(path, start, where))
        )

    return samples_of(rows, make, str(path))


def _cell(path: Path, start: int, where: str) -> bytes:
    """The picture of the row at a place of a table."""
    values = row_at(path, start)
    try:
        return base64.b64decode(values.get("image", ""), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ImageError(f"{where}: the picture is no base64.") from error


read_mmbench = reader(_mmbench_row, _mmbench, "en")


def read_mmbench_once(source: Source, split: str) -> Iterator[Sample]:
    """Each question of MMBench in its first order alone, without the turned ones."""
    found = read_mmbench(source, split)
    return (sample for sample in found if sample.fields["index"] < _ROUNDS)
