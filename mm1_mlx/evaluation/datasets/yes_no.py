"""POPE and MME: questions to say yes or no to.

Sources: AoiDragon/POPE (output/coco); BradyFU's MME_Benchmark_release_version;
lmms-eval for the hub's columns.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets.pictures import ENDINGS, Pictures
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.rows import (
    Broken,
    Fault,
    Row,
    json_lines,
    merged,
    name,
    samples_of,
    shown,
    text,
)
from mm1_mlx.evaluation.datasets.tables import Read, picture, reader
from mm1_mlx.evaluation.samples import Sample, Source


def _yes_or_no(values: dict[str, Any], *keys: str) -> str:
    found = text(values, *keys).strip().lower().rstrip(".")
    if found not in ("yes", "no"):
        raise Fault(f"{keys[0]!r} is {shown(found)}, but must be yes or no")
    return found


# --- POPE ----------------------------------------------------------------------------

POPE_PARTS = ("random", "popular", "adversarial")


def _pope_sample(values: dict[str, Any], part: str, image: Any) -> Sample:
    return Sample(
        id=f"{part}-{name(values, 'question_id')}",
        images=(image,),
        question=text(values, "question", "text").strip(),
        answers=(_yes_or_no(values, "answer", "label"),),
        fields={"category": part},
    )


def _pope_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/POPE, where the three parts are a column."""
    part = text(values, "category")
    if part not in POPE_PARTS:
        raise Fault(f"the category {part!r} is not one of {', '.join(POPE_PARTS)}")
    (image,) = picture(values, "image")
    yield _pope_sample(values, part, image)


def _pope(place: Place, split: str) -> Iterator[Sample]:
    """coco_pope_random.json and its two sisters: a JSON object a line."""
    paths = {part: place.need(f"coco_pope_{part}.json*") for part in POPE_PARTS}
    pictures = Pictures(place.folder)

    def rows() -> Iterator[Row]:
        for part, path in paths.items():
            for where, values in json_lines(path)():
                yield where, merged(values, part=part)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        file = text(values, "image")
        image = pictures.find(file, "val2014", "images/val2014", "images", "")
        yield _pope_sample(values, values["part"], image)

    return samples_of(rows, make, str(paths["random"].parent))


read_pope = reader(_pope_row, _pope)


def read_pope_part(part: str) -> Read:
    """Reads one of the three parts of POPE."""

    def read(source: Source, split: str) -> Iterator[Sample]:
        found = read_pope(source, split)
        return (sample for sample in found if sample.fields["category"] == part)

    return read


# --- MME -----------------------------------------------------------------------------

_MME = "MME_Benchmark_release_version"
_QUESTIONS = "questions_answers_YN"


def _mme_sample(values: dict[str, Any], category: str, pair: str, image: Any) -> Sample:
    question = text(values, "question").strip()
    return Sample(
        id=f"{category}/{pair}/{values.get('number', question)}",
        images=(image,),
        question=question,
        answers=(_yes_or_no(values, "answer"),),
        fields={"category": category, "pair": f"{category}/{pair}"},
    )


def _mme_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/MME: both questions of a picture have the same question_id."""
    (image,) = picture(values, "image")
    category = text(values, "category")
    pair = text(values, "question_id").rpartition("/")[2]
    yield _mme_sample(values, category, pair, image)


def _mme(place: Place, split: str) -> Iterator[Sample]:
    """A folder for each category: pictures, and beside each a text of the same name
    with two lines "question<TAB>Yes". Some have images/ and questions_answers_YN/.
    Today's archive has them in MME_Benchmark, beside its eval_tool."""
    root = place.folder
    for inner in (_MME, "MME_Benchmark"):
        root = root / inner if (root / inner).is_dir() else root
    asked = sorted([*root.glob("*/*.txt"), *root.glob(f"*/{_QUESTIONS}/*.txt")])
    if not asked:
        raise place.missing(f"MME: {_MME} with folders like count/ and their texts")
    pictures = Pictures(root)

    def rows() -> Iterator[Row]:
        for path in asked:
            yield from _mme_lines(path, root)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        path, category = values["path"], values["category"]
        folders = (category, f"{category}/images")
        image = _of_stem(pictures, path.stem, folders)
        yield _mme_sample(values, category, path.stem, image)

    return samples_of(rows, make, str(root))


def _mme_lines(path: Path, root: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {shown(str(error))}.") from error
    category = path.relative_to(root).parts[0]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        question, tab, answer = line.rstrip().rpartition("\t")
        where = f"{path}, line {number}"
        if not tab:
            yield (
                where,
                Broken(f"{shown(line)} must be a question, a tab and Yes or No"),
            )
            continue
        values = {"question": question, "answer": answer, "number": number}
        yield where, {**values, "path": path, "category": category}


def _of_stem(pictures: Pictures, stem: str, folders: tuple[str, ...]) -> Any:
    for ending in (".jpg", ".png", *ENDINGS):
        try:
            return pictures.find(stem + ending, *folders)
        except Fault:
            continue
    raise Fault(f"there is no picture {stem}.jpg or .png in {', '.join(folders)}")


read_mme = reader(_mme_row, _mme)
