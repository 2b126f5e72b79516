"""Conversations as files: JSON to go on with, Markdown to read."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mm1_mlx.errors import MM1Error


def write_text(place: Path, text: str) -> None:
    """Write a file whole, or leave what was there. MM1Error."""
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, place)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise MM1Error(f"{place} cannot be written: {error.strerror}.") from error


def as_markdown(messages: Sequence[dict[str, Any]], model: str) -> str:
    """A conversation to read, with its pictures."""
    blocks = [f"# A conversation with {model}"]
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        said = [_said(part) for part in parts]
        name = message["role"].capitalize()
        blocks += [f"**{name}:**", *(text for text in said if text)]
    return "\n\n".join(blocks) + "\n"


def _said(part: dict[str, Any]) -> str:
    if "text" in part:
        return part["text"].strip()
    named = part.get("image") or part["video"]
    names = [named] if isinstance(named, str) else named  # the frames of a video
    return " ".join(f"![]({_link(name)})" for name in names)


def _link(name: str) -> str:
    return name if "://" in name else quote(name)
