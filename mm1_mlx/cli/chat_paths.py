"""Pictures that are dropped into a terminal: the paths in a line that was typed.

A terminal pastes the path of a dragged file quoted, with backslashes, or as a file://
URL, with a space behind it; of several files one after the other.
"""

import re
import shlex
from pathlib import Path

from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.sources import pasted_path

_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".mpo", ".webp", ".gif", ".bmp", ".ico"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif"),
)
# What a full path begins with, as people and terminals write it.
_FULL = re.compile(r"['\"]?(?:/|~|\.\.?/|file://)")
# Only these part words: names of screenshots have other spaces inside.
_GAP = re.compile(r"[ \t]+")
_MOST = 40  # words of a line's beginning and end that are looked at


def split_paths(line: str) -> tuple[list[str], str]:
    """The pictures that a line begins or ends with, and the text that is left.

    Only files that are there count, and names that can be nothing else: a line that is
    a path of its own may name a picture that is missing.
    """
    if (alone := _whole_line(line)) is not None:
        return [alone], ""
    first, line = _take_first(line.strip())
    last: list[str] = []
    while (taken := _take_last(line)) is not None:
        last.insert(0, taken[0])
        line = taken[1]
    return first + last, line


def paths_in(text: str) -> list[str]:
    """All the paths of a text that has nothing else, there or not."""
    if (path := _file(text)) is not None:
        return [str(path)]
    found, rest = _take_first(text)
    return [*found, *_words(rest)]


def is_path(line: str) -> bool:
    """Whether a whole line is the path of a picture, or of a file by its full path."""
    return _whole_line(line) is not None


def _whole_line(line: str) -> str | None:
    text = line.strip()
    if not text or "\n" in text:
        return None
    full = _FULL.match(text) is not None
    if (path := _file(text)) is not None:
        return str(path) if full or path.suffix.lower() in _SUFFIXES else None
    words = _words(text)
    if full and len(words) == 1 and words[0].lower().endswith(_SUFFIXES):
        return text  # that it is missing is said by what reads it
    return None


def _take_first(line: str) -> tuple[list[str], str]:
    """The pictures that a line begins with, and what is behind them."""
    found: list[str] = []
    while line:
        ends = [match.start() for match in _GAP.finditer(line)][:_MOST]
        for end in [*ends, len(line)]:
            if (path := _picture(line[:end])) is not None:
                found.append(path)
                line = line[end:].strip()
                break
        else:
            break
    return found, line


def _take_last(line: str) -> tuple[str, str] | None:
    """The picture that a line ends with, and what is before it."""
    for match in [*_GAP.finditer(line)][: -_MOST - 1 : -1]:
        if (path := _picture(line[match.end() :])) is not None:
            return path, line[: match.start()]
    return None


def _picture(text: str) -> str | None:
    path = _file(text)
    return str(path) if path and path.suffix.lower() in _SUFFIXES else None


def _file(text: str) -> Path | None:
    """The file that is meant by a path, as terminals paste it, if it is there."""
    if not text.strip():
        return None
    try:
        path = pasted_path(text)
        if not path.is_file():
            words = _words(text)  # such as 'it'\''s.png'
            path = Path(words[0]).expanduser() if len(words) == 1 else path
        return path if path.is_file() else None
    except (ImageError, ValueError, OSError, RuntimeError):
        return None


def _words(text: str) -> list[str]:
    """A text's words as a shell parts them; by its gaps where quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError:
        return _GAP.split(text.strip())
