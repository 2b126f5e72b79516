"""Examples to show a model before a question: lines of a file, or dicts.

    {"image": "pictures/1.png", "prompt": "What is this?", "answer": "dog"}
    {"images": ["a.png", "b.png"], "prompt": "Which has more?", "answer": "the second",
     "reasoning": "The first has 2, the second 3."}
    {"image": "pictures/3.png", "answer": "cat"}

Paths start from the file's folder. Other keys may stand beside these.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError, ImageError
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, VIDEO_TOKEN, plural
from mm1_mlx.inputs.sources import pasted_path, shown

KEYS = ("image", "images", "prompt", "answer", "reasoning")
_NO_VIDEO = (
    f"a shot has no video. Save some of its frames as pictures, and give them as "
    f'"images": ["1.png", "2.png", ...], in the prompt an {IMAGE_TOKEN} for each or no '
    f"mark."
)


@dataclass(frozen=True)
class Example:
    """A question with its answer.

    images: what load_image takes. prompt, reasoning: None where there is none. number:
    of its line, or its place in a list, from 1. where: for messages, "shots.jsonl,
    line 3". fields: what else its line has.
    """

    images: tuple[Any, ...]
    answer: str
    prompt: str | None = None
    reasoning: str | None = None
    number: int = 0
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_examples(source: Any) -> list[Example]:
    """The examples of a file with a JSON object in every line, or of a list of dicts.

    That picture files are there is checked, they are not read. Raises DatasetError,
    which names the line.
    """
    if isinstance(source, (str, os.PathLike)):
        found = _read_file(Path(source).expanduser())
        name = str(source)
    elif isinstance(source, Iterable) and not isinstance(source, (bytes, Mapping)):
        found = [_example(one, i, f"shot {i}") for i, one in enumerate(source, 1)]
        name = "The list of shots"
    else:
        raise DatasetError(
            f"The shots are of the type {type(source).__name__}, but a file (JSON "
            f"lines) or a list of dicts was expected."
        )
    if not found:
        raise DatasetError(f"{name} is empty: expected one JSON object a line.")
    for key in ("prompt", "reasoning"):
        _check_alike(found, key)
    return found


def _check_alike(examples: list[Example], key: str) -> None:
    """All have a prompt (or reasoning), or none: some alone would be a mistake."""
    have = [e for e in examples if getattr(e, key) is not None]
    lack = [e for e in examples if getattr(e, key) is None]
    if have and lack:
        raise DatasetError(
            f'{lack[0].where}: it has no "{key}", but {have[0].where} has one. Give '
            f"all of them one, or none."
        )


def _read_file(file: Path) -> list[Example]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DatasetError(
            f"{shown(str(file))} cannot be read: {reason}. Expected a file of shots: "
            f'{{"image": ..., "prompt": ..., "answer": ...}} in every line.'
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{shown(str(file))}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(
                f"{where}: not a JSON object ({error.msg}, character {error.pos + 1})."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where}: not a JSON object ({error}).") from error
        found.append(_example(values, number, where, file.parent))
    return found


def _example(
    values: Any, number: int, where: str, folder: Path | None = None
) -> Example:
    """folder: what paths start from, in a file; None in Python."""
    if isinstance(values, Example):
        return values
    if not isinstance(values, Mapping):
        raise DatasetError(f"{where}: not a JSON object but {str(values)[:40]!r}.")
    _check_keys(values, where)
    images = _images(values, where)
    if folder is not None:
        images = [_file(image, folder, where) for image in images]
    texts = {key: _text(values, key, where) for key in ("prompt", "reasoning")}
    for key in ("answer", "reasoning"):
        if IMAGE_TOKEN in str(values.get(key)):
            raise DatasetError(f'{where}: "{key}" holds {IMAGE_TOKEN}: take it out.')
    answer = _text(values, "answer", where)
    assert answer is not None
    if any(VIDEO_TOKEN in (text or "") for text in (answer, *texts.values())):
        raise DatasetError(f"{where}: {_NO_VIDEO}")
    slots = (texts["prompt"] or "").count(IMAGE_TOKEN)
    if slots not in (0, len(images)):
        raise DatasetError(
            f"{where}: the prompt has {slots} {IMAGE_TOKEN}, but there "
            f"{'is' if len(images) == 1 else 'are'} {plural(len(images), 'image')}."
        )
    more = {key: value for key, value in values.items() if key not in KEYS}
    return Example(
        tuple(images), answer, **texts, number=number, where=where, fields=more
    )


def _check_keys(values: Mapping, where: str) -> None:
    """A misspelt key would be read as none."""
    if "video" in values:
        raise DatasetError(f"{where}: {_NO_VIDEO}")
    for key in values:
        close = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.8)
        if key not in KEYS and close and close[0] not in values:
            raise DatasetError(
                f'{where}: unknown key "{key}"; did you mean "{close[0]}"?'
            )
    if "answer" not in values:
        raise DatasetError(f'{where}: no "answer". It has {_listed(values)}.')
    if "image" in values and "images" in values:
        raise DatasetError(f'{where}: both "image" and "images". Leave one of them.')
    if "image" not in values and "images" not in values:
        raise DatasetError(
            f'{where}: no "image" (nor "images"). It has {_listed(values)}. A shot '
            f'without a picture says "images": [].'
        )


def _listed(values: Mapping) -> str:
    return ", ".join(f'"{key}"' for key in list(values)[:6]) or "no keys"


def _images(values: Mapping, where: str) -> list:
    if "image" not in values:
        images = values["images"]
        if not isinstance(images, (list, tuple)):
            raise DatasetError(f'{where}: "images" must be a list of pictures.')
        return list(images)
    if values["image"] is None or isinstance(values["image"], (list, tuple)):
        raise DatasetError(
            f'{where}: "image" must be one picture. For several take "images": [...].'
        )
    return [values["image"]]


def _file(image: Any, folder: Path, where: str) -> Any:
    """A picture that stands in a file: its path, which must be there, or an address."""
    if not isinstance(image, str) or not image.strip():
        raise DatasetError(f"{where}: {str(image)[:40]!r} is no path of a picture.")
    if re.match(r"data:|https?://", image):
        return image
    try:
        address = image[:7].lower() == "file://"
        path = folder / (pasted_path(image) if address else Path(image).expanduser())
    except ImageError as error:  # of another machine
        raise DatasetError(f"{where}: {error}") from error
    if not path.is_file():
        raise DatasetError(f"{where}: no image file {shown(str(path))}.")
    return path


def _text(values: Mapping, key: str, where: str) -> str | None:
    """A text that is not empty; numbers are written out. None where there is none."""
    value = values.get(key)
    if value is None and key != "answer":
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f'{where}: "{key}" is {value!r}, but must be a text.')
    return value.strip()
