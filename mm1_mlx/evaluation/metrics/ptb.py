"""Words of captions as COCO's evaluation counts them: Penn Treebank tokens, no marks.

The reference runs Stanford's PTBTokenizer in Java and drops punctuation
(pycocoevalcap, ptbtokenizer.py). This is the same in Python; how far both agree is
measured in tests/fixtures/metrics/README.md.
"""

import re
from collections.abc import Iterator, Sequence

from mm1_mlx.evaluation.metrics.ptb_rules import ABBREVIATIONS, Form, forms

# What the reference drops. It compares after lower case, so that brackets stay, as
# "-lrb-"; so do runs as "!!".
_DROPPED = {
    *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
    *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
}
# The reference puts one caption on a line; these would break one in two.
_BREAKS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")
# Spaces; nothing else begins with a plain one.
_SPACES = re.compile(r"(?=[ \t])[ \t\u00a0\u2000-\u200a\u3000]+")
# What most of a caption is, so that the table is asked for the rest alone: a word
# before a space, a word that ends the line, a mark before a space.
_PLAIN = re.compile(r"[A-Za-z]+(?=[,;:]?[ \n])|[,;:](?=[ \n])")
_LAST = re.compile(r"([A-Za-z]{2,})[.?!](?=\n|\Z)")
_PARTED = re.compile("(?i:cannot|gonna|gotta|lemme|gimme|wanna)")


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The words of each caption, in lower case.

    As in the reference, captions are read one after another: in a few cases ("the
    letter A." before a caption that begins with "The") the next one has a say.
    """
    text = "\n".join(_BREAKS.sub(" ", caption) for caption in captions)
    lines: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == "\n":
            lines.append([])
        elif token not in _DROPPED:
            lines[-1] += token.split()  # a hard space within a token parts words, too
    return lines[: len(captions)]


def _tokens(text: str) -> Iterator[str]:
    """The tokens of a text in lower case, and its line ends."""
    table = forms()
    place = 0
    while place < len(text):
        if text[place] == "\n":
            place += 1
            yield "\n"
            continue
        skipped = _SPACES.match(text, place)
        if skipped:
            place = skipped.end()
            continue
        plain = _PLAIN.match(text, place)
        if plain and not _PARTED.fullmatch(plain.group()):
            place = plain.end()
            yield plain.group().lower()
            continue
        last = _LAST.match(text, place)
        if last and not (
            ABBREVIATIONS.fullmatch(last[1]) or _PARTED.fullmatch(last[1])
        ):
            place = last.end()
            yield last[1].lower()
            continue
        token, place = _longest(table, text, place)
        if token:
            yield token.lower()


def _longest(table: list[Form], text: str, place: int) -> tuple[str, int]:
    """The token at a place and where it ends; "" for a character that is none."""
    best, reach = None, place
    for form in table:
        match = form.pattern.match(text, place)
        if match and match.end() > reach:
            best, reach = (form, match), match.end()
    if best is None:
        return "", place + 1
    form, match = best
    end = match.end("t") - form.give_back
    token = text[place:end]
    return (form.change(token) if form.change else token), end
