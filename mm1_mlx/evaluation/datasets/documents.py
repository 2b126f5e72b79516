"""ChartQA, DocVQA and InfographicVQA: charts and pages that have to be read.

Sources: vis-nlp/ChartQA's folders; the files of the Robust Reading Competition (RRC,
challenge 17); lmms-eval for the hub's columns.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mm1_mlx.evaluation.datasets.pictures import Pictures
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.rows import (
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

# --- ChartQA -------------------------------------------------------------------------

_PARTS = ("human", "augmented")


def _chart(values: dict[str, Any], key: str, kind: str, image: Any) -> Sample:
    if kind not in _PARTS:
        raise Fault(f"the type {kind!r} is not one of {', '.join(_PARTS)}")
    return Sample(
        id=key,
        images=(image,),
        question=text(values, "question", "query"),
        answers=texts(values, "answer", "label"),
        fields={"type": kind, "category": kind},
    )


def _chart_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/ChartQA; HuggingFaceM4/ChartQA. No ids, so the row's number."""
    kind = values.get("type")
    if kind is None:
        number = values.get("human_or_machine")
        kind = _PARTS[number] if number in (0, 1) else number
    (image,) = picture(values, "image")
    yield _chart(values, values["#"], str(kind).removesuffix("_test"), image)


def _charts(place: Place, split: str) -> Iterator[Sample]:
    """test/test_human.json and test/test_augmented.json, pictures in test/png."""
    paths = {part: place.need(f"{split}_{part}.json") for part in _PARTS}
    pictures = Pictures(place.folder)

    def rows() -> Iterator[Row]:
        for part, path in paths.items():
            listed = entries(path, read_json(path))()
            for number, (where, values) in enumerate(listed):
                own = {"part": part, "key": f"{part}-{number}"}
                folder = path.parent.relative_to(place.folder)
                yield where, merged(values, **own, folder=folder)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        file = text(values, "imgname")
        image = pictures.find(file, values["folder"] / "png", values["folder"])
        yield _chart(values, values["key"], values["part"], image)

    return samples_of(rows, make, str(paths["human"].parent))


read_chartqa = reader(_chart_row, _charts)

# --- DocVQA and InfographicVQA -------------------------------------------------------


def _page(values: dict[str, Any], image: Any, answered: bool) -> Sample:
    kinds = values.get("question_types") or values.get("answer_type")
    kinds = kinds if isinstance(kinds, list) else [kinds] if kinds else []
    fields = kept(values, "question_types", "answer_type", "docId")
    if kinds and isinstance(kinds[0], str):
        fields["category"] = kinds[0]
    return Sample(
        id=name(values, "questionId", "question_id"),
        images=(image,),
        question=text(values, "question"),
        answers=texts(values, "answers") if answered or values.get("answers") else (),
        fields=fields,
    )


def _page_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/DocVQA, both configurations."""
    (image,) = picture(values, "image")
    yield _page(values, image, not is_secret(values[SPLIT]))


def _rrc(names: tuple[str, ...], key: str, folders: tuple[str, ...]) -> Callable:
    """The RRC's file of a split, with "data"; key: what names the picture."""

    def published(place: Place, split: str) -> Iterator[Sample]:
        path = place.need(*(each.format(split) for each in names))
        pictures = Pictures(place.folder)

        def make(values: dict[str, Any]) -> Iterable[Sample]:
            file = text(values, key).removeprefix("documents/")
            image = pictures.find(file, *folders)
            yield _page(values, image, answered=not is_secret(split))

        return samples_of(entries(path, read_json(path), "data"), make, str(path))

    return published


read_docvqa = reader(
    _page_row,
    _rrc(
        ("{}_v1.0_withQT.json", "{}_v1.0.json"),
        "image",
        ("documents", "spdocvqa_images", "images", ""),
    ),
    "DocVQA",
)
read_infovqa = reader(
    _page_row,
    _rrc(
        ("infographicsVQA_{}_v1.0_withQT.json", "infographicsVQA_{}_v1.0.json"),
        "image_local_name",
        ("infographicsvqa_images", "images", ""),
    ),
    "InfographicVQA",
)
