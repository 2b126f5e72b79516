"""Questions of one's own: a file with an object for each.

    {"image": "a.jpg", "question": "What is it?", "answer": "a cat"}
    {"images": ["a.jpg", "b.jpg"], "question": "<image> or <image>?", "answers": ["b"]}
    {"image": "a.jpg", "question": "Which?", "choices": ["cat", "dog"], "answer": "B"}
    {"image": "a.jpg", "answers": ["A cat.", "There is a cat."]}              a caption
    {"image": "a.jpg", "question": "the cat", "box": [0.1, 0.2, 0.5, 0.9]}

As .jsonl (one a line), .json (a list) or .parquet; pictures are paths from the file's
folder, or in a table the pictures themselves. "id" names a question, else its number.
What else there is goes to the sample's fields: "category" groups the figures. Names
that mean something to other benchmarks (_TAKEN) are left out.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets.pictures import ENDINGS, Pictures
from mm1_mlx.evaluation.datasets.places import open_place
from mm1_mlx.evaluation.datasets.rows import (
    Fault,
    Row,
    choices,
    entries,
    first,
    is_number,
    json_lines,
    letter,
    merged,
    name,
    read_json,
    samples_of,
    shown,
    text,
    texts,
)
from mm1_mlx.evaluation.datasets.tables import Table
from mm1_mlx.evaluation.samples import Sample, Source

_KNOWN = (
    "id",
    "image",
    "images",
    "question",
    "answer",
    "answers",
    "choices",
    "box",
    "#",
)
# Fields that drawing samples and reading answers go by.
_TAKEN = ("pair", "where", "wrong_images", "size", "stems", "kind", "circle")
_MARK = "<image>"
# With fewer not even what all say counts as right: one is left out, three must agree.
_VQA_ANSWERS = 4


def read_own(source: Source, split: str, needs: str = "") -> Iterator[Sample]:
    """Questions of a file, or of the test.jsonl, test.json or test.parquet of a folder
    or of a dataset on the hub. The paths of pictures start from the file's folder, of a
    table from the dataset's. A file of its own has one split, which is asked: shots
    from there would be the questions themselves.

    needs: "answers", "choices" or "box", what each question must have; "vqa": answers
    enough for VQA accuracy.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if split != "test":
            raise DatasetError(
                f"{path} is one file, which is asked, and has no '{split}' beside it."
            )
        return _file_samples([path], path.parent, needs)
    place = open_place(source, split, others=lambda names: _wanted(names, split))
    if files := place.parquet(split):
        return _file_samples(files, place.folder, needs)
    file = place.need(f"{split}.jsonl", f"{split}.json")
    return _file_samples([file], file.parent, needs)


def _wanted(names: list[str], split: str) -> list[str]:
    """Of a dataset on the hub the split's JSON file, and its pictures."""
    plain = (f"{split}.jsonl", f"{split}.json")
    files = [name for name in names if name.rpartition("/")[2] in plain]
    return files and files + [n for n in names if n.lower().endswith(ENDINGS)]


def _file_samples(files: list[Path], folder: Path, needs: str) -> Iterator[Sample]:
    what = str(files[0])
    kind = files[0].suffix.lower()
    pictures = Pictures(folder)
    if kind == ".parquet":
        rows: Callable[[], Iterable[Row]] = Table(files, folder).rows
    elif kind == ".jsonl":
        rows = _numbered(json_lines(files[0]))
    elif kind == ".json":
        rows = _numbered(entries(files[0], read_json(files[0])))
    else:
        raise DatasetError(f"{what} is no data: expected .jsonl, .json or .parquet.")

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        """The question of a row; Fault where what it needs is missing."""
        if needs:
            answered = needs in ("answers", "vqa")
            first(values, *(("answers", "answer") if answered else (needs,)))
        sample = _sample(values, pictures)
        if needs == "choices" and not sample.choices:
            raise Fault("'choices' is empty")
        if needs == "vqa" and len(sample.answers) < _VQA_ANSWERS:
            raise Fault(
                f"VQA accuracy compares {_VQA_ANSWERS} answers or more (ten as "
                f"published), not {len(sample.answers)}; own_exact takes one"
            )
        yield sample

    return samples_of(rows, make, what)


def _numbered(rows: Callable[[], Iterable[Row]]) -> Callable[[], Iterator[Row]]:
    def numbered() -> Iterator[Row]:
        for number, (where, values) in enumerate(rows(), 1):
            yield where, merged(values, **{"#": str(number)})

    return numbered


def _sample(values: dict[str, Any], pictures: Pictures) -> Sample:
    key = name(values, "id", "#")
    images = _images(values, pictures)
    question = values.get("question")
    question = "" if question is None else text(values, "question")
    if (marks := question.count(_MARK)) and marks != len(images):
        raise Fault(f"the question has {marks} {_MARK} for {len(images)} images")
    hidden = (*_KNOWN, *_TAKEN)
    fields = {k: v for k, v in values.items() if k not in hidden and v is not None}
    if values.get("box") is not None:
        fields["box"] = _box(values["box"])
    options: tuple[str, ...] = ()
    if values.get("choices"):
        options = choices(values, "choices")
        answers = (_choice(values, options),)
    elif "box" in fields and values.get("answer") is values.get("answers") is None:
        answers = ()
    else:
        answers = texts(values, "answers", "answer")
    return Sample(
        id=key,
        images=images,
        question=question,
        answers=answers,
        choices=options,
        fields=fields,
    )


def _choice(values: dict[str, Any], options: tuple[str, ...]) -> str:
    """The letter of the right choice, given as letter, number or text."""
    given = first(values, "answer", "answers")
    given = given[0] if isinstance(given, list) and given else given
    if given in options:
        given = options.index(given)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise Fault(f"'answer' is {shown(given)}, but must name a choice")
    return letter({"answer": given}, "answer", len(options))


def _images(values: dict[str, Any], pictures: Pictures) -> tuple[Any, ...]:
    found = values.get("images")
    if found is None:
        found = values.get("image")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(pictures.find(i) if isinstance(i, str) else i for i in listed)


def _box(box: Any) -> tuple[float, ...]:
    good = isinstance(box, (list, tuple)) and len(box) == 4
    if not good or not all(is_number(v) and 0 <= v <= 1 for v in box):
        raise Fault(
            f"'box' is {shown(box)}, but must be [left, top, right, bottom] as parts "
            f"of the picture, 0 to 1"
        )
    if box[0] == box[2] or box[1] == box[3]:
        raise Fault(f"'box' is {shown(box)}, a box without area")
    return tuple(map(float, box))
