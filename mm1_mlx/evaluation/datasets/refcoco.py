"""RefCOCO, RefCOCO+ and RefCOCOg: phrases, and the box of what they mean.

Sources: lichengunc/refer (refs(unc).p, instances.json); lmms-eval for the hub's
columns. The pickle is never executed, see plain_pickle.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.errors import MM1Error
from mm1_mlx.evaluation.datasets.pictures import Pictures
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.plain_pickle import read_plain
from mm1_mlx.evaluation.datasets.rows import (
    Broken,
    Fault,
    Row,
    entries,
    first,
    is_number,
    merged,
    name,
    read_json,
    samples_of,
    shown,
    text,
    texts,
)
from mm1_mlx.evaluation.datasets.tables import Read, picture, reader
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.inputs.images import image_size

_PHOTOS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")


def _pixels(values: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of COCO's left, top, width and height."""
    found = first(values, "bbox")
    good = isinstance(found, list) and len(found) == 4
    if not good or not all(map(is_number, found)):
        raise Fault(f"'bbox' is {shown(found)}, but must be left, top, width, height")
    left, top, width, height = map(float, found)
    if not (width > 0 and height > 0):
        raise Fault(f"'bbox' is {shown(found)}, a box without area")
    return left, top, left + width, top + height


def _row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/RefCOCO, RefCOCOplus and RefCOCOg: several phrases in a row."""
    key, box = name(values, "question_id"), _pixels(values)
    (image,) = picture(values, "image")
    for number, phrase in enumerate(texts(values, "answer")):
        yield Sample(
            id=f"{key}-{number}", images=(image,), question=phrase, fields={"box": box}
        )


def _published(folder: str, owner: str) -> Callable[[Place, str], Iterator[Sample]]:
    """refs(unc).p, of whoever made the splits, and instances.json beside it."""

    def published(place: Place, split: str) -> Iterator[Sample]:
        """A sample for each phrase of the split, with its box."""
        wanted = f"refs({owner}).p"
        path = place.find(f"{folder}/{wanted}") or place.find(wanted)
        if path is None or (path.parent.name != folder and _another(path, folder)):
            raise place.missing(f"{folder}/{wanted} (as published)")
        instances = path.parent / "instances.json"
        notes = read_json(instances)
        pictures = Pictures(place.folder)
        refs = entries(path, read_plain(path))

        def rows() -> Iterator[Row]:
            boxes, images = {}, {}
            for key, held in (("annotations", boxes), ("images", images)):
                for where, note in entries(instances, notes, key)():
                    try:
                        held[name(note, "id")] = note
                    except Fault as fault:
                        yield where, Broken(str(fault))
            for where, ref in refs():
                yield where, merged(ref, boxes=boxes, images=images)

        def make(values: dict[str, Any]) -> Iterable[Sample]:
            if text(values, "split") == split:
                yield from _phrases(values, pictures, instances)

        return samples_of(rows, make, f"{path}, split {split!r}")

    return published


def _another(path: Path, folder: str) -> bool:
    """Whether a file lies in the folder of another of the three."""
    return path.parent.name in {"refcoco", "refcoco+", "refcocog"} - {folder}


def _phrases(
    values: dict[str, Any], pictures: Pictures, instances: Path
) -> Iterator[Sample]:
    key, number = name(values, "ann_id"), name(values, "image_id")
    if key not in values["boxes"]:
        raise Fault(f"annotation {key} is not in {instances}")
    if number not in values["images"]:
        raise Fault(f"image {number} is not in {instances}")
    about = values["images"][number]
    image = pictures.find(text(about, "file_name"), *_PHOTOS, "")
    size = (first(about, "width"), first(about, "height"))
    if not all(is_number(side) and side > 0 for side in size):
        raise Fault(f"image {number} has the size {shown(size)}, but must have pixels")
    fields = {"box": _pixels(values["boxes"][key]), "size": size, "image_id": number}
    sentences = first(values, "sentences")
    if not isinstance(sentences, list):
        raise Fault("'sentences' must be a list")
    for sentence in sentences:
        if not isinstance(sentence, dict):
            raise Fault(f"a sentence is {shown(sentence)}, but must be an object")
        phrase = text(sentence, "sent", "raw")
        key = name(sentence, "sent_id")
        yield Sample(id=key, images=(image,), question=phrase, fields=fields)


def _reader(folder: str, owner: str) -> Read:
    inner = reader(_row, _published(folder, owner))
    return lambda source, split: map(_as_parts, inner(source, split))


def _as_parts(sample: Sample) -> Sample:
    """Its box as parts of the picture's sides, 0 to 1. The picture's header is read
    where the dataset does not say how large it is; None where that is broken: then the
    sample cannot be asked either."""
    box, size = sample.fields["box"], sample.fields.get("size")
    if size is None:
        try:
            size = image_size(sample.images[0].read())
        except MM1Error:
            return replace(sample, fields={**sample.fields, "box": None})
    width, height = size
    sides = (width, height, width, height)
    parts = tuple(value / side for value, side in zip(box, sides, strict=True))
    return replace(sample, fields={**sample.fields, "box": parts, "size": size})


read_refcoco = _reader("refcoco", "unc")
read_refcoco_plus = _reader("refcoco+", "unc")
read_refcocog = _reader("refcocog", "umd")
