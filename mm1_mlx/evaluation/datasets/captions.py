"""COCO, NoCaps and TextCaps: pictures with several captions each.

Sources: the COCO API's format; Karpathy's dataset_coco.json; nocaps.org/download;
TextCaps_0.1_val.json; the task files of lmms-eval for the hub's columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm1_mlx.evaluation.datasets.pictures import Pictures, relative
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.rows import (
    Broken,
    Fault,
    Row,
    entries,
    first,
    merged,
    name,
    read_json,
    samples_of,
    shown,
    text,
    texts,
)
from mm1_mlx.evaluation.datasets.tables import picture, reader
from mm1_mlx.evaluation.samples import Sample

_KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def _sample(
    image_id: str, image: Any, captions: tuple[str, ...], **fields: str
) -> Sample:
    fields = {"image_id": image_id, **fields}
    return Sample(id=image_id, images=(image,), answers=captions, fields=fields)


# --- COCO ----------------------------------------------------------------------------


def _coco_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/COCO-Caption; yerevann/coco-karpathy, which has addresses."""
    (image,) = picture(values, "image", "url")
    found = name(values, "cocoid", "question_id", "id")
    captions = texts(values, "answer", "sentences_raw", "sentences", "captions")
    yield _sample(_coco_number(found), image, captions)


def _coco_number(found: str) -> str:
    """COCO_val2014_000000391895.jpg -> 391895."""
    digits = found.rpartition("_")[2].removesuffix(".jpg")
    return str(int(digits)) if digits.isdigit() else found


def _karpathy(place: Place, split: str) -> Iterator[Sample]:
    """dataset_coco.json, with the folders train2014 and val2014."""
    path = place.need("dataset_coco.json")
    pictures = Pictures(place.folder)
    if split not in _KARPATHY:
        raise place.missing(f"split {split!r} of Karpathy (train, val, test)")
    wanted = _KARPATHY[split]

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        """The picture of an entry with its captions; none of another split."""
        if values.get("split") not in wanted:
            if "split" not in values:
                raise Fault("has no 'split'")
            return
        folder = relative(text(values, "filepath"))
        image = pictures.find(
            text(values, "filename"), folder, f"images/{folder}", "images", ""
        )
        sentences = first(values, "sentences")
        if not isinstance(sentences, list):
            raise Fault("'sentences' must be a list")
        captions = tuple(text(_object(s), "raw") for s in sentences)
        if not captions:
            raise Fault("'sentences' is empty")
        yield _sample(name(values, "cocoid", "imgid"), image, captions)

    return samples_of(entries(path, read_json(path), "images"), make, str(path))


def _object(sentence: Any) -> dict[str, Any]:
    if not isinstance(sentence, dict):
        raise Fault(f"a sentence is {shown(sentence)}, but must be an object")
    return sentence


def _captions_json(
    path: Path, pictures: Pictures, folders: tuple[str, ...]
) -> Iterator[Sample]:
    """The COCO API's form: "images", and "annotations" with one caption each."""
    values = read_json(path)
    images = entries(path, values, "images")
    annotations = entries(path, values, "annotations")

    def rows() -> Iterator[Row]:
        captions: dict[str, list[str]] = {}
        for where, note in annotations():
            try:
                image, caption = name(note, "image_id"), text(note, "caption")
                captions.setdefault(image, []).append(caption)
            except Fault as fault:
                yield where, Broken(str(fault))
        for where, image in images():
            yield where, merged(image, captions=captions)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        image_id = name(values, "id")
        if image_id not in values["captions"]:
            raise Fault(f"the image {image_id} has no caption among 'annotations'")
        image = pictures.find(text(values, "file_name"), *folders)
        captions = tuple(values["captions"][image_id])
        yield _sample(image_id, image, captions, **_domain(values.get("domain")))

    return samples_of(rows, make, str(path))


def _coco_json(
    place: Place, split: str, years: Sequence[str] = ("2014", "2017")
) -> Iterator[Sample]:
    """captions_val2014.json or captions_val2017.json with its folder of pictures."""
    path = place.need(*(f"captions_{split}{year}.json" for year in years))
    folder = path.stem.removeprefix("captions_")
    folders = (folder, f"images/{folder}", "images", "")
    return _captions_json(path, Pictures(place.folder), folders)


read_karpathy = reader(_coco_row, _karpathy)
read_coco2014 = reader(_coco_row, partial(_coco_json, years=("2014",)))
read_coco2017 = reader(_coco_row, partial(_coco_json, years=("2017",)))


# --- NoCaps --------------------------------------------------------------------------


def _domain(domain: object) -> dict[str, str]:
    """Where a picture's objects are known from: "in-domain", "near-domain", ..."""
    if not isinstance(domain, str) or not domain:
        return {}
    domain = domain if domain.endswith("-domain") else f"{domain}-domain"
    return {"domain": domain, "category": domain}


def _nocaps_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/NoCaps."""
    captions = texts(values, "annotations_captions")
    domain = _domain(values.get("image_domain"))
    (image,) = picture(values, "image")
    yield _sample(name(values, "image_id"), image, captions, **domain)


def _nocaps(place: Place, split: str) -> Iterator[Sample]:
    """nocaps_val_4500_captions.json, with the pictures of Open Images. There is no
    train split: shots are those of COCO, of whose captions the objects are new."""
    if split == "train":
        karpathy = place.find("dataset_coco.json") is not None
        return (_karpathy if karpathy else _coco_json)(place, split)
    path = place.need(f"nocaps_{split}_*captions.json")
    folders = ("validation", split, "images", f"images/{split}", "")
    return _captions_json(path, Pictures(place.folder), folders)


read_nocaps = reader(_nocaps_row, _nocaps)


# --- TextCaps ------------------------------------------------------------------------


def _textcaps_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/TextCaps: a row for each picture."""
    (image,) = picture(values, "image")
    captions = texts(values, "caption_str", "reference_strs")
    yield _sample(name(values, "image_id"), image, captions)


def _textcaps(place: Place, split: str) -> Iterator[Sample]:
    """TextCaps_0.1_val.json: a row for each caption, so several for a picture."""
    path = place.need(f"TextCaps_*_{split}.json")
    pictures = Pictures(place.folder)
    notes = entries(path, read_json(path), "data")

    def rows() -> Iterator[Row]:
        found: dict[str, Row] = {}
        captions: dict[str, list[str]] = {}
        for where, note in notes():
            try:
                image, caption = name(note, "image_id"), text(note, "caption_str")
                captions.setdefault(image, []).append(caption)
                found.setdefault(image, (where, note))
            except Fault as fault:
                yield where, Broken(str(fault))
        for image, (where, note) in found.items():
            yield where, merged(note, captions=captions[image])

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        image_id = name(values, "image_id")
        folders = ("train_images", "test_images", "images", "")
        image = pictures.find(f"{image_id}.jpg", *folders)
        yield _sample(image_id, image, tuple(values["captions"]))

    return samples_of(rows, make, str(path))


read_textcaps = reader(_textcaps_row, _textcaps)
