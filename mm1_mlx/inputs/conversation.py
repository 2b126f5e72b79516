"""Conversations in files: messages, and where their pictures are.

    [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                  {"type": "text", "text": "What is this?"}]}]

One JSON list as above, an object {"messages": [...], "images": [...]}, or one message
in every line. Paths start from the file's folder.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from mm1_mlx.errors import PromptError
from mm1_mlx.inputs.prompts import flatten_messages
from mm1_mlx.inputs.sources import shown

_PATHS = ("image", "url", "path", "image_url", "video")


def read_conversation(file: str | os.PathLike) -> tuple[list[dict[str, Any]], list]:
    """Messages whose content is text with <image> marks, and the pictures, in order.

    PromptError for what is no conversation, with the line's number.
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
    messages, images = _messages(text, name)
    folder = path.parent
    messages = [_with_paths(message, folder) for message in messages]
    try:
        flat, held = flatten_messages(messages)
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from error
    if held and images:
        raise PromptError(
            f'{name}: the messages hold pictures, and "images" has more. Give them in '
            f"one place only."
        )
    return flat, held or [_located(image, folder) for image in images]


def _messages(text: str, name: str) -> tuple[list, list]:
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if text.lstrip()[:1] == "{" and (len(lines) > 1 or '"role"' in text):
        try:
            whole = json.loads(text)
        except ValueError:
            return [_line(line, f"{name}, line {i}") for i, line in lines], []
    else:
        whole = _line(text, name)
    if isinstance(whole, dict) and "messages" in whole:
        images = whole.get("images") or []
        whole = whole["messages"]
    else:
        images = []
        whole = [whole] if isinstance(whole, dict) else whole
    if not isinstance(whole, list) or not isinstance(images, list):
        raise PromptError(
            f"{name} is no conversation: expected a JSON list of messages, an object "
            f'with "messages" (and "images"), or a message in every line.'
        )
    return whole, images


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
    if not isinstance(value, str) or re.match(r"data:|[a-zA-Z]+://", value):
        return value
    return str(folder / Path(value).expanduser())
