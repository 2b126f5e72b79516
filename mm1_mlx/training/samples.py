"""Samples to fine-tune on: one conversation, in any of the forms that data comes in.

A line of JSON, an entry of a list or a row of a table is one of
    {"messages": [{"role": "user", "content": "<image> What is this?"}, ...],
     "images": ["a.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", ...}],
     "image": "a.jpg"}                                        (LLaVA, ShareGPT)
    {"texts": [{"user": "...", "assistant": "..."}, ...], "images": [...]}
                                                              (The Cauldron)
    {"question": "...", "answer": "...", "image": "a.jpg"}
    {"prompt": "...", "completion": "..."}
    {"image": "a.jpg", "caption": "..."}
Contents may hold pictures as parts, {"type": "image", "image": ...}. Pictures without a
slot (<image>) stand in front of the question; messages and conversations with several
questions need slots. A picture is a path from the folder, a data: URL, or {"bytes":
"<base64>"}; in a table also its bytes.
"""

import base64
import binascii
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mm1_mlx.errors import DatasetError
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, plural

CAPTION_PROMPT = "Describe this picture."  # ours: a caption answers it

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_IMAGES = ("images", "image")
# The keys that decide what a sample is, in the order in which they are looked for.
KINDS = ("messages", "conversations", "texts", "question", "prompt", "caption")
# All that is read of a sample.
KEYS = (*KINDS, *_IMAGES, "system", "answer", "completion")


@dataclass(frozen=True)
class Sample:
    """One conversation. images: sources for the processor. where: file and line."""

    messages: list[dict[str, Any]]
    images: list[Any]
    where: str


class Samples(Protocol):
    """Samples by number, read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """A sample; DatasetError names the place where it is none."""
        ...

    def shuffled(self, rng: random.Random) -> array:
        """Every number once, in an order in which they can be read quickly."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether a run goes on with the same data."""
        ...


def shuffle(count: int, rng: random.Random) -> array:
    """The numbers below `count` in any order, 8 bytes each."""
    numbers = array("Q", range(count))
    rng.shuffle(numbers)  # type: ignore[arg-type]
    return numbers


def parse_sample(values: dict[str, Any], folder: Path, where: str) -> Sample:
    """The sample of these values; DatasetError says what is wrong with it.

    folder: what paths of pictures start from.
    """
    kind = next((key for key in KINDS if key in values), None)
    if kind is None:
        raise DatasetError(
            f"{where}: has the keys {sorted(values)[:6]}, but a sample has one of "
            f"{', '.join(map(repr, KINDS))}."
        )
    images = _images(values, where)
    messages = _MESSAGES[kind](values, where)
    if images and kind in ("messages", "conversations"):
        _check_slots(messages, len(images), where)
    messages = [_with_sources(m, folder, where) for m in messages]
    return Sample(messages, [_source(i, folder, where) for i in images], where)


def _check_slots(messages: list[dict], images: int, where: str) -> None:
    """DatasetError where it cannot be known which question pictures belong to."""
    contents = [m["content"] for m in messages]
    slots = any(isinstance(c, list) or IMAGE_TOKEN in str(c) for c in contents)
    asked = sum(m["role"] == "user" for m in messages)
    if not slots and asked > 1:
        raise DatasetError(
            f"{where}: its {plural(images, 'image')} may belong to any of {asked} "
            f"questions: write {IMAGE_TOKEN} into the text where each one stands."
        )


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


def _texts(values: dict, where: str) -> list[dict]:
    found = values["texts"]
    good = isinstance(found, list) and found
    if not good or not all(isinstance(turn, dict) for turn in found):
        raise DatasetError(
            f'{where}: \'texts\' must be a list of {{"user", "assistant"}}.'
        )
    roles = ("user", "assistant")
    return [{"role": r, "content": _text(t, r, where)} for t in found for r in roles]


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
    "texts": _texts,
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
        raise DatasetError(
            f"{where}: there is no image {shown} in {folder} (--image-folder names "
            f"another place)."
        )
    return path
