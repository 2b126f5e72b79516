"""VQAv2, OK-VQA, TextVQA and VizWiz: questions with ten answers of ten people.

Sources: visualqa.org/vqa_v2_teaser and okvqa.allenai.org (the VQA API's two files);
TextVQA_0.5.1_val.json; vizwiz.org's val.json; lmms-eval for the hub's columns.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mm1_mlx.evaluation.datasets.pictures import Pictures
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.rows import (
    Broken,
    Fault,
    Row,
    entries,
    kept,
    merged,
    name,
    read_json,
    samples_of,
    text,
    texts,
)
from mm1_mlx.evaluation.datasets.tables import SPLIT, is_secret, picture, reader
from mm1_mlx.evaluation.samples import Sample

# Splits of the VQA API -> folders of COCO; these of test have no public answers.
_COCO = {
    "train": ("train2014",),
    "val": ("val2014",),
    "testdev": ("test-dev2015", "test2015"),
    "test": ("test2015",),
}
_FIELDS = ("image_id", "question_type", "answer_type", "multiple_choice_answer")


def _sample(values: dict[str, Any], image: Any, answered: bool = True) -> Sample:
    """A question with its answers; without them where a split keeps these secret."""
    has = values.get("answers") or answered
    fields = kept(values, *_FIELDS)
    fields = {key: value for key, value in fields.items() if value != ""}
    if "answer_type" in fields:
        fields["category"] = fields["answer_type"]
    key, question = name(values, "question_id"), text(values, "question").strip()
    answers = texts(values, "answers") if has else ()
    if raw := _raw(values.get("answers")):
        answers, fields["stems"] = raw, answers
    return Sample(
        id=key,
        images=(image,),
        question=question,
        answers=answers,
        fields=fields,
    )


def _raw(answers: Any) -> tuple[str, ...]:
    """OK-VQA's answers as people gave them, of its own files; `answer` is a stem there.
    The hub's answers are those of people."""
    if not isinstance(answers, list) or not answers:
        return ()
    found = [a.get("raw_answer") if isinstance(a, dict) else None for a in answers]
    return tuple(found) if all(isinstance(a, str) for a in found) else ()  # type: ignore


def _vqa_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/VQAv2, OK-VQA, textvqa and VizWiz-VQA."""
    (image,) = picture(values, "image")
    yield _sample(values, image, not is_secret(values[SPLIT]))


def _coco_vqa(questions: str, annotations: str) -> Callable:
    """The VQA API's files of questions and of annotations, which share question_id."""

    def published(place: Place, split: str) -> Iterator[Sample]:
        """The questions of a split with their answers; without, where it is secret."""
        if split not in _COCO:
            raise place.missing(f"split {split!r} (it has {', '.join(_COCO)})")
        named, folder = _COCO[split][0], _COCO[split][-1]
        path = place.need(questions.format(named))
        asked = entries(path, read_json(path), "questions")
        secret = is_secret(split)
        notes = None
        if not secret:
            notes = place.need(annotations.format(named))
        told = entries(notes, read_json(notes), "annotations") if notes else list
        pictures = Pictures(place.folder)
        folders = (folder, f"images/{folder}", "images", "")

        def rows() -> Iterator[Row]:
            found: dict[str, dict[str, Any]] = {}
            for where, note in told():
                try:
                    found[name(note, "question_id")] = note
                except Fault as fault:
                    yield where, Broken(str(fault))
            for where, question in asked():
                yield where, merged(question, notes=found)

        def make(values: dict[str, Any]) -> Iterable[Sample]:
            number = name(values, "question_id")
            note = values["notes"].get(number, {})
            if not note and not secret:
                raise Fault(f"question {number} has no annotation in {notes}")
            file = _coco_name(folder, name(values, "image_id"))
            image = pictures.find(file, *folders)
            yield _sample({**note, **values}, image, not secret)

        return samples_of(rows, make, str(path))

    return published


def _coco_name(folder: str, image: str) -> str:
    """COCO_val2014_000000000042.jpg"""
    if not (image.isascii() and image.isdigit()):
        raise Fault(f"'image_id' is {image!r}, but must be a number of COCO")
    return f"COCO_{folder}_{int(image):012d}.jpg"


def _textvqa(place: Place, split: str) -> Iterator[Sample]:
    """TextVQA_0.5.1_val.json; the pictures of train and val lie in train_images."""
    path = place.need(f"TextVQA_*_{split}.json")
    pictures = Pictures(place.folder)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        file = name(values, "image_id") + ".jpg"
        folder = "test_images" if split == "test" else "train_images"
        image = pictures.find(file, folder, "images", "")
        yield _sample(values, image, not is_secret(split))

    return samples_of(entries(path, read_json(path), "data"), make, str(path))


def _vizwiz(place: Place, split: str) -> Iterator[Sample]:
    """Annotations/val.json: a list; the picture's name is the question's, too."""
    path = place.need(f"Annotations/{split}.json", f"{split}.json")
    pictures = Pictures(place.folder)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        file = text(values, "image")
        image = pictures.find(file, split, f"images/{split}", "images", "")
        known = {"question_id": file.rpartition(".")[0], "image_id": file}
        yield _sample({**values, **known}, image, not is_secret(split))

    return samples_of(entries(path, read_json(path)), make, str(path))


read_vqav2 = reader(
    _vqa_row,
    _coco_vqa("v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"),
)
read_okvqa = reader(
    _vqa_row,
    _coco_vqa("OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json"),
)
read_textvqa = reader(_vqa_row, _textvqa)
read_vizwiz = reader(_vqa_row, _vizwiz)
