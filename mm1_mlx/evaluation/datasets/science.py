"""ScienceQA, MMMU, MathVista and AI2D: school and college questions.

Sources: lupantech/ScienceQA (problems.json, pid_splits.json), MMMU/MMMU and
AI4Math/MathVista on the hub, AI2D's folder as AllenAI gives it, lmms-eval for
lmms-lab-encoder's columns.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets.pictures import Pictures, relative
from mm1_mlx.evaluation.datasets.places import Place
from mm1_mlx.evaluation.datasets.rows import (
    Fault,
    Row,
    choices,
    entries,
    first,
    is_number,
    kept,
    letter,
    merged,
    name,
    read_json,
    samples_of,
    shown,
    text,
)
from mm1_mlx.evaluation.datasets.tables import SPLIT, Read, is_secret, picture, reader
from mm1_mlx.evaluation.samples import Sample

# --- ScienceQA -----------------------------------------------------------------------

_SQA = ("hint", "task", "grade", "subject", "topic", "skill")


def _sqa_sample(values: dict[str, Any], key: str, image: Any) -> Sample:
    options = choices(values, "choices")
    hint = "" if values.get("hint") is None else text(values, "hint", empty=True)
    hint = hint.strip()
    context = "image" if image is not None else "text" if hint else "none"
    fields = kept(values, *_SQA) | {"hint": hint, "context": context}
    return Sample(
        id=key,
        images=() if image is None else (image,),
        question=text(values, "question"),
        choices=options,
        answers=(letter(values, "answer", len(options)),),
        fields=fields | {"category": fields.get("subject", "")},
    )


def _sqa_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder and derek-thomas/ScienceQA: no ids, so the row's number."""
    yield _sqa_sample(values, values["#"], values.get("image"))


def _sqa(place: Place, split: str) -> Iterator[Sample]:
    """problems.json with pid_splits.json, pictures as test/ID/image.png."""
    problems = place.need("problems.json")
    splits = place.need("pid_splits.json")
    found, parts = read_json(problems), read_json(splits)
    if not isinstance(found, dict) or not isinstance(parts, dict):
        raise place.missing("problems.json and pid_splits.json that hold objects")
    if not isinstance(parts.get(split), list):
        raise place.missing(f"split {split!r} in pid_splits.json ({', '.join(parts)})")
    pictures = Pictures(place.folder)

    def rows() -> Iterator[Row]:
        for number in map(str, parts[split]):
            problem = found.get(number)
            value = problem if isinstance(problem, dict) else {}
            yield f"{problems}, problem {number}", merged(value, pid=number)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        file, number, image = values.get("image"), values["pid"], None
        if file:
            folder = relative(f"{values.get('split') or split}/{number}")
            image = pictures.find(file, f"images/{folder}", folder, f"data/{folder}")
        yield _sqa_sample(values, number, image)

    return samples_of(rows, make, str(problems))


def _only_pictures(read: Read) -> Read:
    return lambda source, split: (s for s in read(source, split) if s.images)


read_scienceqa = reader(_sqa_row, _sqa, "ScienceQA-FULL")
read_scienceqa_img = _only_pictures(reader(_sqa_row, _sqa, "ScienceQA-IMG"))

# --- MMMU ----------------------------------------------------------------------------

_IMAGE = re.compile(r"<image (\d+)>")


def _mmmu_row(values: dict[str, Any]) -> Iterable[Sample]:
    """MMMU/MMMU and lmms-lab-encoder/MMMU: up to seven pictures, named in the text.

    A picture stands where the text names it (as `<image>`), each time that it does;
    one that is not named comes first.
    """
    key = name(values, "id")
    options = _literal(values, "options")
    whole = [text(values, "question"), *options]
    named = [int(number) for part in whole for number in _IMAGE.findall(part)]
    for number in named:
        if values.get(f"image_{number}") is None:
            raise Fault(f"names <image {number}>, but 'image_{number}' is empty")
    there = [n for n in range(1, 8) if values.get(f"image_{n}") is not None]
    order = [n for n in there if n not in named]
    marks = "<image>\n" * len(order)
    question, *options = (_IMAGE.sub("<image>", part) for part in whole)
    kind = values.get("question_type") or "multiple-choice"
    if kind == "multiple-choice" and len(options) >= 2:
        secret = values.get("answer") in ("?", "", None)  # of the test split
        answers = () if secret else (letter(values, "answer", len(options)),)
    else:
        kind, options = "open", []
        answers = tuple(_literal(values, "answer"))
    subject = key.split("_", 1)[-1].rpartition("_")[0].replace("_", " ")
    fields = kept(values, "topic_difficulty", "subfield", "img_type")
    yield Sample(
        id=key,
        images=tuple(values[f"image_{n}"] for n in [*order, *named]),
        question=marks + question,
        choices=tuple(options),
        answers=answers,
        fields=fields | {"kind": kind, "question_type": kind, "category": subject},
    )


def _literal(values: dict[str, Any], key: str) -> list[str]:
    """A list that is written as Python writes it, "['a', 'b']"; a text is a list of
    one."""
    found = first(values, key)
    if isinstance(found, str) and found.strip().startswith("["):
        try:
            found = ast.literal_eval(found.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise Fault(f"{key!r} is {shown(found)}, but must be a list") from None
    listed = list(found) if isinstance(found, (list, tuple)) else [found]
    return [str(part) for part in listed]


def _mmmu(place: Place, split: str) -> Iterator[Sample]:
    raise place.missing(f"parquet files of the split {split!r}, as MMMU/MMMU has them")


read_mmmu = reader(_mmmu_row, _mmmu, "*")

# --- MathVista -----------------------------------------------------------------------

_MATH = ("question_type", "answer_type", "precision", "unit", "query")
_MATH_METADATA = (
    "category",
    "context",
    "grade",
    "source",
    "task",
    "skills",
    "language",
)


def _precision(values: dict[str, Any]) -> int:
    """Decimals of a number."""
    found = first(values, "precision")
    if not is_number(found) or found != int(found) or not 0 <= found <= 15:
        raise Fault(f"'precision' is {shown(found)}, but must be a number of decimals")
    return int(found)


def _math_sample(values: dict[str, Any], image: Any, secret: bool) -> Sample:
    answer = values.get("answer")
    options = choices(values, "choices") if values.get("choices") else ()
    metadata = values.get("metadata")
    fields = kept(metadata if isinstance(metadata, dict) else {}, *_MATH_METADATA)
    fields |= kept(values, *_MATH)
    if "query" in fields:
        text(fields, "query")
    if "precision" in fields or fields.get("answer_type") == "float":
        fields["precision"] = _precision(fields)
    if answer in (None, "") and not secret:
        raise Fault("has no 'answer'")
    return Sample(
        id=name(values, "pid"),
        images=(image,),
        question=text(values, "question"),
        choices=options,
        answers=() if answer in (None, "") else (str(answer),),
        fields=fields,
    )


def _math_row(values: dict[str, Any]) -> Iterable[Sample]:
    """AI4Math/MathVista: `image` is a name there, `decoded_image` the picture."""
    (image,) = picture(values, "decoded_image")
    yield _math_sample(values, image, is_secret(values[SPLIT]))


def _math(place: Place, split: str) -> Iterator[Sample]:
    """testmini.json: an object of problems by number, pictures as images/1.jpg."""
    path = place.need(f"{split}.json")
    found = read_json(path)
    if isinstance(found, dict):
        listed = [
            (f"{path}, problem {pid}", merged(value, pid=pid))
            if isinstance(value, dict)
            else (f"{path}, problem {pid}", {})
            for pid, value in found.items()
        ]
    else:
        listed = entries(path, found)()
    pictures = Pictures(place.folder)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        image = pictures.find(text(values, "image"), "", "images")
        yield _math_sample(values, image, is_secret(split))

    return samples_of(lambda: listed, make, str(path))


read_mathvista = reader(_math_row, _math)

# --- AI2D ----------------------------------------------------------------------------


def _ai2d_row(values: dict[str, Any]) -> Iterable[Sample]:
    """lmms-lab-encoder/ai2d: no ids, so the row's number."""
    (image,) = picture(values, "image")
    yield _ai2d_sample(values, values["#"], text(values, "question"), image, "options")


def _ai2d_sample(
    values: dict[str, Any], key: str, question: str, image: Any, options: str
) -> Sample:
    found = choices(values, options)
    right = "answer" if options == "options" else "correctAnswer"
    return Sample(
        id=key,
        images=(image,),
        question=question,
        choices=found,
        answers=(letter(values, right, len(found)),),
    )


def _ai2d(place: Place, split: str) -> Iterator[Sample]:
    """questions/0.png.json with images/0.png; ai2d_test_ids.csv names the test part."""
    path = place.need("ai2d_test_ids.csv")
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {shown(str(error))}.") from error
    test = {line.strip().strip(",").removesuffix(".png") for line in ids}
    files = [
        place.folder / found
        for found in place.names
        if "/questions/" in f"/{found}" and found.endswith(".json")
    ]
    if not files:
        raise place.missing("questions/*.json")
    wanted = [
        f for f in files if (f.name.partition(".")[0] in test) == (split == "test")
    ]
    pictures = Pictures(files[0].parent.parent)

    def rows() -> Iterator[Row]:
        for path in sorted(wanted, key=_by_number):
            found = read_json(path)
            asked = found.get("questions") if isinstance(found, dict) else None
            if not isinstance(asked, dict):
                yield str(path), {}
                continue
            for question, values in asked.items():
                own = values if isinstance(values, dict) else {}
                more = {"imageName": found.get("imageName"), "question": question}
                yield f"{path}, {shown(question)}", merged(own, **more)

    def make(values: dict[str, Any]) -> Iterable[Sample]:
        # Questions about letters belong to pictures whose words became letters.
        folders = ("abc_images", "images") if values.get("abcLabel") else ("images",)
        image = pictures.find(text(values, "imageName"), *folders)
        key, question = name(values, "questionId"), text(values, "question")
        yield _ai2d_sample(values, key, question, image, "answerTexts")

    return samples_of(rows, make, str(files[0].parent))


def _by_number(path: Any) -> tuple[int, str]:
    number = path.name.partition(".")[0]
    return (int(number) if number.isdigit() else 0, path.name)


read_ai2d = reader(_ai2d_row, _ai2d)
