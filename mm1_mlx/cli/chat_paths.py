"""Pictures that are dropped into a terminal: the paths in a line that was typed.

A terminal pastes the path of a dragged file quoted, with backslashes, or as a file://
URL, with a space behind it; of several files one after the other.
"""

import re
import shlex
from pathlib import Path

from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.prompts import IMAGE_TOKEN
from mm1_mlx.inputs.sources import pasted_path

_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".mpo", ".webp", ".gif", ".bmp", ".ico"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif"),
)
# What a full path begins with, as people and terminals write it.
_FULL = re.compile(r"['\"]?(?:/|~|\.\.?/|file://)")
_INSIDE = re.compile(rf"(?<![^\s(]){_FULL.pattern}")  # in the midst of a text
_SHELL_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|\S)+""")
# Only these part words: names of screenshots have other spaces inside.
_GAP = re.compile(r"[ \t\n]+")
_BEHIND = ".,;:!?) \t\n"  # what a sentence may have behind a path
_WORD = re.compile(r"(?<![^\s(])[^\s(]+")
_MOST = 40  # words of a line's beginning and end that are looked at
_LONGEST = 8  # words of a name within a text


def split_paths(line: str) -> tuple[list[str], str]:
    """The pictures that a line names, and the text that is left.

    Only files that are there count, each by the longest name that is one, and names
    that can be nothing else: a line that is a path of its own may name a picture that
    is missing. With one in the midst of a text, the text has an <image> in the place of
    each picture. Otherwise pictures begin or end the line, and the text is what is
    between.
    """
    if (alone := _whole_line(line)) is not None:
        return [alone], ""
    first, text = _take_first(line.strip())
    last: list[str] = []
    while (taken := _take_last(text)) is not None:
        last.insert(0, taken[0])
        text = taken[1]
    if IMAGE_TOKEN in line:  # it says itself where pictures belong
        return first + last, text
    inside, marked = _take_inside(text)
    if inside:
        text = " ".join(
            [IMAGE_TOKEN] * len(first) + [marked, *[IMAGE_TOKEN] * len(last)]
        )
    return first + inside + last, text


def paths_in(text: str) -> list[str]:
    """All the paths of a text that has nothing else, there or not."""
    if (path := _file(text)) is not None:
        return [str(path)]
    found, rest = _take_first(text)
    return [*found, *_words(rest)]


def is_path(line: str) -> bool:
    """Whether a whole line is the path of a picture, or of a file by its full path."""
    return _whole_line(line) is not None


def no_picture(line: str) -> str | None:
    """The path of a picture that is missing, or of a folder, where a line begins with
    its full path; the full path of a missing picture anywhere; a bare name of one in a
    line of nothing else. None for pictures that are there, a command, and other text.

    A folder with a text behind it counts where a command could stand, else it may be
    meant as text.
    """
    text = line.strip()
    if text and all(map(_has_ending, text.split())) and _beginning(text) is None:
        return _missing_name(text) or text.split()[0]
    if _FULL.match(text) and _beginning(text) is None:
        word = _SHELL_WORD.match(text)[0]  # type: ignore[index]  # never empty
        for name in (word.rstrip(_BEHIND), text):
            if re.search(r"[/.]", word[1:]) and _has_ending(name):
                return name
            if (text[0] == "/" or name == text) and _is_folder(name):
                return name
    starts = [match.start() for match in _INSIDE.finditer(text)][:_MOST]
    names = (
        _missing_name(text[i:]) for i in starts if i and _beginning(text[i:]) is None
    )
    return next((name for name in names if name), None)


def addresses_in(line: str) -> list[str]:
    """The words of a line that has nothing but addresses; none of another."""
    words = line.split()
    return words if all(re.match("(?i)https?://.", word) for word in words) else []


def _missing_name(text: str) -> str | None:
    """The name with a picture's ending that a text begins with; it may have spaces
    behind a folder's name."""
    word = _SHELL_WORD.match(text)[0].rstrip(_BEHIND)  # type: ignore[index]
    if _has_ending(word):
        return word
    if word.count("/") < 2 or _is_folder(word):
        return None
    ends = [match.start() for match in _GAP.finditer(text)][1:_LONGEST]
    names = (text[:end].rstrip(_BEHIND) for end in [*ends, len(text)])
    return next((name for name in names if _has_ending(name)), None)


def _is_folder(name: str) -> bool:
    """Whether a name, not only of slashes and dots, is a folder's."""
    try:
        return bool(name.strip("/.~'\"")) and pasted_path(name).is_dir()
    except (ImageError, ValueError, OSError, RuntimeError):
        return False


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
    while line and (taken := _beginning(line)) is not None:
        if taken[1] and not _GAP.match(taken[1]):
            break
        found.append(taken[0])
        line = taken[1].strip()
    return found, line


def _take_last(line: str) -> tuple[str, str] | None:
    """The picture that a line ends with, and what is before it."""
    starts = [match.end() for match in _GAP.finditer(line)][-_MOST:]
    for start in starts:
        path = _picture(line[start:])
        if path is not None and not _is_cut(line, start):
            return path, line[:start].rstrip()
    return None


def _is_cut(line: str, start: int) -> bool:
    """Whether a name is only the end of a full path, of a file that is not there."""
    if _FULL.match(line, start):
        return False
    before = [match.start() for match in _INSIDE.finditer(line, 0, start)]
    if not before or _beginning(line[before[-1] :]) is not None:
        return False
    words = line[before[-1] : start].split()
    # "yes / no" and "1 /2" name no folder; what has an ending is a path of its own.
    return words[0].count("/") > 1 and not any(map(_has_ending, words))


def _take_inside(text: str) -> tuple[list[str], str]:
    """The pictures that a text names, and the text with <image> for each."""
    found, pieces, done = [], [], 0
    for start in _starts(text):
        if start < done or _is_cut(text, start):
            continue
        if (taken := _beginning(text[start:])) is not None:
            found.append(taken[0])
            pieces += [text[done:start], IMAGE_TOKEN]
            done = len(text) - len(taken[1])
    return found, "".join([*pieces, text[done:]])


def _starts(text: str) -> list[int]:
    """Where pictures' names may begin in a text: full paths, and the words up to one
    with a picture's ending."""
    full = [match.start() for match in _INSIDE.finditer(text)][:_MOST]
    words = [*_WORD.finditer(text)]
    ends = [i for i, word in enumerate(words) if _has_ending(word[0])][:_MOST]
    near = {i for end in ends for i in range(max(end - _LONGEST + 1, 0), end + 1)}
    return sorted({*full, *(words[i].start() for i in near)})


def _has_ending(name: str) -> bool:
    return name.rstrip(_BEHIND + "'\"").lower().endswith(_SUFFIXES)


def _beginning(text: str) -> tuple[str, str] | None:
    """The picture that a text begins with, by its longest name, and what is behind."""
    ends = [match.start() for match in _GAP.finditer(text)][:_MOST]
    for end in [len(text), *reversed(ends)]:
        for name in dict.fromkeys((text[:end], text[:end].rstrip(_BEHIND))):
            if (path := _picture(name)) is not None:
                return path, text[len(name) :]
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
