"""Conversations to fine-tune on: a folder of JSON lines and the pictures they name.

A line is one of
    {"messages": [{"role": "user", "content": "<image> What is this?"}, ...],
     "images": ["a.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", ...}],
     "image": "a.jpg"}                                        (LLaVA, ShareGPT)
    {"question": "...", "answer": "...", "image": "a.jpg"}
    {"prompt": "...", "completion": "..."}
    {"image": "a.jpg", "caption": "..."}
Contents may hold pictures as parts, {"type": "image", "image": ...}. A picture is a
path from the folder, a data: URL, or {"bytes": "<base64>"}.
"""

import base64
import binascii
import json
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError, ImageError, PromptError
from mm1_mlx.inputs.lessons import Lesson, make_lesson
from mm1_mlx.inputs.processor import Processor

SPLITS = ("train", "valid", "test")
CAPTION_PROMPT = "Describe this picture."  # ours: a caption answers it

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_IMAGES = ("images", "image")
# The keys that decide what a line is, in the order in which they are looked for.
_KINDS = ("messages", "conversations", "question", "prompt", "caption")


@dataclass(frozen=True)
class Sample:
    """One conversation. images: sources for the processor. where: file and line."""

    messages: list[dict[str, Any]]
    images: list[Any]
    where: str


class ConversationFile:
    """The samples of a .jsonl file; only where each line starts is kept in memory."""

    def __init__(self, file: Path, folder: Path | None = None):
        self.file = file
        self._folder = folder or file.parent
        self._starts, self._numbers = array("Q"), array("Q")
        try:
            with file.open("rb") as lines:
                start = 0
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self._starts.append(start)
                        self._numbers.append(number)
                    start += len(line)
        except OSError as error:
            raise DatasetError(f"{file} cannot be read: {error.strerror}.") from error
        if not self._starts:
            raise DatasetError(f"{file} is empty: one JSON object a line.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        """A sample; DatasetError names the line where it is none."""
        with self.file.open("rb") as lines:
            lines.seek(self._starts[index])
            line = lines.readline()
        where = f"{self.file}, line {self._numbers[index]}"
        return parse_sample(_json(line, where), self._folder, where)


def open_split(folder: Path, split: str) -> ConversationFile | None:
    """The samples of a split, or None where the folder has no such file."""
    path = folder / f"{split}.jsonl"
    return ConversationFile(path) if path.is_file() else None


def open_train(folder: Path) -> ConversationFile:
    """The samples to train on; DatasetError where there are none."""
    if not folder.is_dir():
        raise DatasetError(
            f"There is no data folder {folder}: expected one with train.jsonl."
        )
    found = open_split(folder, "train")
    if found is None:
        raise DatasetError(f"{folder} has no train.jsonl: one JSON object a line.")
    return found


def _json(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(values, dict):
        raise DatasetError(f"{where}: not a JSON object but {str(values)[:40]!r}.")
    return values


def parse_sample(values: dict[str, Any], folder: Path, where: str) -> Sample:
    """The sample of a line's values; DatasetError says what is wrong with it.

    folder: what paths of pictures start from.
    """
    kind = next((key for key in _KINDS if key in values), None)
    if kind is None:
        raise DatasetError(
            f"{where}: has the keys {sorted(values)[:6]}, but a sample has one of "
            f"{', '.join(map(repr, _KINDS))}."
        )
    images = _images(values, where)
    messages = _MESSAGES[kind](values, where)
    messages = [_with_sources(m, folder, where) for m in messages]
    return Sample(messages, [_source(i, folder, where) for i in images], where)


def _images(values: dict, where: str) -> list[Any]:
    given = [values[key] for key in _IMAGES if values.get(key) is not None]
    if len(given) > 1:
        raise DatasetError(f"{where}: has 'image' and 'images': write one of them.")
    found = given[0] if given else []
    return list(found) if isinstance(found, list) else [found]


def _text(values: dict, key: str, where: str) -> str:
    text = values.get(key)
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(
            f"{where}: {key!r} is {str(text)[:40]!r}, but must be a text."
        )
    return text


def _messages(values: dict, where: str) -> list[dict]:
    found = values["messages"]
    good = isinstance(found, list) and found
    if not good or not all(isinstance(m, dict) for m in found):
        raise DatasetError(f"{where}: 'messages' must be a list of messages.")
    for message in found:
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise DatasetError(
                f"{where}: a message has the role {str(role)[:40]!r}, but must have "
                f"system, user or assistant."
            )
    return [{"role": m["role"], "content": m.get("content")} for m in found]


def _conversations(values: dict, where: str) -> list[dict]:
    found = values["conversations"]
    good = isinstance(found, list) and found
    if not good or not all(isinstance(m, dict) for m in found):
        raise DatasetError(f"{where}: 'conversations' must be a list of turns.")
    turns = []
    if values.get("system"):
        turns.append({"role": "system", "content": _text(values, "system", where)})
    for turn in found:
        role = _ROLES.get(str(turn.get("from")), turn.get("from"))
        if role not in ("system", "user", "assistant"):
            raise DatasetError(
                f"{where}: a turn is 'from' {str(role)[:40]!r}, but must be from "
                f"human, gpt or system."
            )
        turns.append({"role": role, "content": _text(turn, "value", where)})
    return turns


def _pair(first: str, second: str):
    def made(values: dict, where: str) -> list[dict]:
        asked, answer = _text(values, first, where), _text(values, second, where)
        return [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]

    return made


def _caption(values: dict, where: str) -> list[dict]:
    return [
        {"role": "user", "content": CAPTION_PROMPT},
        {"role": "assistant", "content": _text(values, "caption", where)},
    ]


_MESSAGES = {
    "messages": _messages,
    "conversations": _conversations,
    "question": _pair("question", "answer"),
    "prompt": _pair("prompt", "completion"),
    "caption": _caption,
}


def _with_sources(message: dict, folder: Path, where: str) -> dict:
    """The message with the pictures in its parts as sources for the processor."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        held = part.get("image") if isinstance(part, dict) else None
        if held is not None:
            part = part | {"image": _source(held, folder, where)}
        address = part.get("image_url") if isinstance(part, dict) else None
        if address is not None:
            if isinstance(address, dict):
                address = address.get("url")
            part = {"type": "image", "image": _source(address, folder, where)}
        parts.append(part)
    return {**message, "content": parts}


def _source(image: Any, folder: Path, where: str) -> Any:
    """What the processor reads: a path, or bytes."""
    if isinstance(image, dict):  # as the hub's datasets hold pictures
        data, path = image.get("bytes"), image.get("path")
        if isinstance(data, str):
            try:
                return base64.b64decode(data, validate=True)
            except (ValueError, binascii.Error) as error:
                raise DatasetError(
                    f"{where}: an image's bytes are no base64."
                ) from error
        image = data if isinstance(data, bytes) else path
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise DatasetError(
            f"{where}: an image is {str(image)[:40]!r}, but must be a path, a data: "
            f'URL or {{"bytes": "<base64>"}}.'
        )
    if image.startswith("data:"):
        return image
    shown = image if len(image) <= 100 else image[:97] + "..."
    if "://" in image:
        raise DatasetError(
            f"{where}: the image {shown} is an address, but must be a file: get it."
        )
    path = folder / image
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        there = False
    if not there:
        raise DatasetError(f"{where}: there is no image {shown} in {folder}.")
    return path


def too_long(lesson: Lesson, where: str, limit: int) -> str:
    """What is said of a sample that has too many tokens."""
    return (
        f"{where}: the sample has {len(lesson.ids)} tokens "
        f"({sum(lesson.image_tokens)} of images), but max_tokens is {limit}. Raise "
        f"it (--max-seq-length), or leave such samples out (--too-long drop)."
    )


def lesson_of(sample: Sample, processor: Processor) -> Lesson:
    """The lesson of a sample; DatasetError names its line."""
    try:
        return make_lesson(processor, sample.messages, sample.images)
    except (PromptError, ImageError) as error:
        raise DatasetError(f"{sample.where}: {error}") from error


class Order:
    """Which sample comes at which place of an endless stream: each epoch shuffled anew.

    A function of the seed and the place alone, so a run that goes on needs no state.
    """

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        self._epoch, self._shuffled = -1, list(range(count))

    def __getitem__(self, place: int) -> int:
        epoch, inside = divmod(place, self._count)
        if epoch != self._epoch:
            self._shuffled = list(range(self._count))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._shuffled)
            self._epoch = epoch
        return self._shuffled[inside]


@dataclass
class Checked:
    """What `check_samples` found. longest, learned: tokens. problems: one line each."""

    samples: int = 0
    images: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    longest_where: str = ""
    problems: list[str] | None = None


def check_samples(
    samples: ConversationFile, processor: Processor, limit: int | None = None
) -> Iterator[Checked]:
    """Read every sample with its pictures; gives what is known after each.

    limit: of tokens, where a longer sample is a problem.
    """
    found = Checked(problems=[])
    assert found.problems is not None
    for index in range(len(samples)):
        try:
            sample = samples[index]
            lesson = lesson_of(sample, processor)
        except DatasetError as error:
            found.problems.append(str(error))
            yield found
            continue
        if limit is not None and len(lesson.ids) > limit:
            found.problems.append(too_long(lesson, sample.where, limit))
        found.samples += 1
        found.images += len(lesson.image_tokens)
        found.tokens += len(lesson.ids)
        found.learned += sum(lesson.learned)
        if len(lesson.ids) > found.longest:
            found.longest, found.longest_where = len(lesson.ids), sample.where
        yield found
