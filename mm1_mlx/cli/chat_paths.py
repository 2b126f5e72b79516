"""Pictures that are dropped into a terminal: the paths in a line that was typed.

A terminal pastes the path of a dragged file quoted, with backslashes, or as a file://
URL, with a space behind it; of several files one after the other.
"""

import re
from pathlib import Path

from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.sources import pasted_path

_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".mpo", ".webp", ".gif", ".bmp", ".ico"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif"),
)
_WORD = r"(?:'[^']+'|\"[^\"]+\"|(?:\\.|[^\s\\'\"])+)"
_FIRST = re.compile(rf"\s*({_WORD})(?=\s|$)")
_LAST = re.compile(rf"(?:^|(?<=\s))({_WORD})\s*$")


def split_paths(line: str) -> tuple[list[str], str]:
    """The pictures that a line begins or ends with, and the text that is left.

    Only files that are there count, and names that can be nothing else: a line that is
    a path of its own may name a picture that is missing.
    """
    if is_path(line):
        return [line], ""
    first: list[str] = []
    while (match := _FIRST.match(line)) and _is_picture(match[1]):
        first.append(match[1])
        line = line[match.end() :]
    if first and not line.strip():
        return first, ""
    last: list[str] = []
    while (match := _LAST.search(line)) and _is_picture(match[1]):
        last.insert(0, match[1])
        line = line[: match.start()]
    return first + last, line.strip()


def paths_in(text: str) -> list[str]:
    """All the paths of a text that has nothing else, there or not."""
    if _there(text):
        return [text]
    return [match[0] for match in re.finditer(_WORD, text)]


def is_path(line: str) -> bool:
    """Whether a whole line is one path of a picture, or of a file by its full path."""
    text = line.strip()
    if not text or "\n" in text:
        return False
    full = text.startswith(("/", "~", "file://", "'/", '"/', "'~", '"~', "./", "../"))
    if _there(text):
        return full or _suffix(text) in _SUFFIXES
    alone = re.fullmatch(_WORD, text) is not None
    return full and alone and _suffix(text) in _SUFFIXES


def _path(text: str) -> Path | None:
    try:
        return pasted_path(text)
    except (ImageError, ValueError, OSError):
        return None


def _there(text: str) -> bool:
    path = _path(text)
    try:
        return path is not None and path.is_file()
    except (OSError, ValueError):
        return False


def _suffix(text: str) -> str:
    path = _path(text)
    return path.suffix.lower() if path is not None else ""


def _is_picture(text: str) -> bool:
    return _suffix(text) in _SUFFIXES and _there(text)
