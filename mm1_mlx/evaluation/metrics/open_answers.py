"""MMMU's open answers: what an answer may mean, and whether a reference is in it.

The rules are those of MMMU's script (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py,
Apache-2.0).
"""

import re
from collections.abc import Iterable, Sequence

_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
# The script lowers the text first, so that its split at ". " before a capital never
# happens: only lines part an answer.
_BEFORE_ANSWERS = [
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
]


def parse(text: str) -> list[str | float]:
    """All that an answer may mean: its telling ends and the numbers in them, sorted."""
    ends = _ends(text)
    found = [*ends, *(number for end in ends for number in numbers(end))]
    meanings = {meaning for piece in found for meaning in normalized(piece)}
    return sorted(meanings, key=lambda value: (isinstance(value, str), value))


def numbers(text: str) -> list[str]:
    """The numbers in a text: with commas, scientific, then plain ones."""
    return [
        number
        for pattern in (_WITH_COMMAS, _SCIENTIFIC, _PLAIN)
        for number in pattern.findall(text)
    ]


def normalized(text: str) -> list[str | float]:
    """A number with two decimals, or the text in lower case.

    A single letter gets a space on either side, so that it is not found in every
    word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def _ends(text: str) -> list[str]:
    """What stands last in each line that says "is", "answer", "so", ...; else all."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for i, line in enumerate(lines):
        marks = [*_BEFORE_ANSWERS, "="] if i == len(lines) - 1 else _BEFORE_ANSWERS
        ends = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        end = _shortest(ends)
        if end and end not in list(":,.!?;:'"):
            found.append(end)
    return found or [text]


def _shortest(ends: list[str]) -> str:
    """The shortest one; an empty one gives way to whatever comes after it."""
    best = ""
    for end in ends:
        if not best or len(end) < len(best):
            best = end
    return best


def open_match(
    meanings: str | Iterable[str | float], references: Sequence[str]
) -> bool:
    """Whether a reference is a number of the answer, or stands in one of its texts."""
    if isinstance(meanings, str):
        meanings = parse(meanings)
    wanted = [value for reference in references for value in normalized(reference)]
    words = [value for value in wanted if isinstance(value, str)]
    return any(
        any(word in meaning for word in words)
        if isinstance(meaning, str)
        else meaning in wanted
        for meaning in meanings
    )
