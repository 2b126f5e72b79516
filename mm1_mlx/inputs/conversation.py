"""Conversations in files: messages, and where their pictures are.

    [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                  {"type": "text", "text": "What is this?"}]}]

One JSON list as above, an object {"messages": [...], "images": [...]} (or one "image"),
or one message in every line. Paths start from the file's folder.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm1_mlx.errors import ImageError, PromptError
from mm1_mlx.inputs.prompts import flatten_messages
from mm1_mlx.inputs.sources import pasted_path, read_source, shown

_ADDRESS = r"data:|[a-zA-Z]+://"
_PATHS = ("image", "url", "path", "image_url", "video")


def read_conversation(
    file: str | os.PathLike, **limits: Any
) -> tuple[list[dict[str, Any]], list]:
    """Messages whose content is text with <image> marks, and the pictures, in order.

    limits: max_pixels and allow_url, for videos, which are read now. PromptError for
    what is no conversation, ImageError for a picture that is not there: with the line's
    number, of one JSON value with the message's.
    """
    path = Path(file).expanduser()
    name = shown(str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"{name} cannot be read: {error.strerror or error}. Expected a file of "
            f'messages: {{"role": "user", "content": ...}}.'
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    messages, images, unit = _messages(text, name)
    folder = path.parent
    flat, held = [], []
    if not messages:
        raise PromptError(
            f"{name}: The conversation has no messages: expected a list of "
            f'{{"role": "user", "content": "..."}}.'
        )
    for number, message in messages:
        with _named(f"{name}, {unit} {number}"):
            said, its = flatten_messages([_with_paths(message, folder)], **limits)
            _check_there(its)
        flat += said
        held += its
    if held and images:
        raise PromptError(
            f'{name}: the messages hold pictures, and "images" has more. Give them in '
            f"one place only."
        )
    images = [_located(image, folder) for image in images]
    with _named(f'{name}, "images"'):
        _check_there(images)
    return flat, held or images


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors say where in the file they are."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from error
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error


def _check_there(images: list) -> None:
    """ImageError for the path of a file that is not there."""
    for image in images:
        if not isinstance(image, str) or re.match(_ADDRESS, image):
            continue
        try:
            there = bool(image.strip()) and pasted_path(image).exists()
        except (OSError, ValueError):
            there = False
        if not there:
            read_source(image)  # says why


def _messages(text: str, name: str) -> tuple[list[tuple[int, Any]], list, str]:
    """Messages with their numbers, the pictures beside them, and what is numbered."""
    # Not splitlines: texts may hold other line ends than JSON Lines.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        return [(i, _line(line, f"{name}, line {i}")) for i, line in lines], [], "line"
    whole = _line(text, name)
    if isinstance(whole, dict) and "messages" in whole:
        if whole.get("image") and whole.get("images"):
            raise PromptError(f'{name} has "image" and "images": write one of them.')
        images = whole.get("images") or whole.get("image") or []
        images = [images] if isinstance(images, str) else images
        whole = whole["messages"]
    else:
        images = []
        whole = [whole] if isinstance(whole, dict) else whole
    if not isinstance(whole, list) or not isinstance(images, list):
        raise PromptError(
            f"{name} is no conversation: expected a JSON list of messages, an object "
            f'with "messages" (and "images"), or a message in every line.'
        )
    return list(enumerate(whole, 1)), images, "message"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _line(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}"
        if "\n" not in text.strip():
            place = f"character {error.colno}"
        raise PromptError(f"{where}: not JSON ({error.msg}, {place}).") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error}).") from error


def _with_paths(message: Any, folder: Path) -> Any:
    """The message with the paths of its parts as they are from here."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    found = [
        {k: _located(v, folder) if k in _PATHS else v for k, v in part.items()}
        if isinstance(part, dict)
        else part
        for part in parts
    ]
    return {**message, "content": found}


def _located(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _located(held, folder) for key, held in value.items()}
    if isinstance(value, list):  # the frames of a video
        return [_located(held, folder) for held in value]
    if not isinstance(value, str) or not value or re.match(_ADDRESS, value):
        return value
    return str(folder / Path(value).expanduser())
