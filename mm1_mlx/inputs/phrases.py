"""What a text says of a box before it: a label, and which picture is meant.

Rules of thumb for English; a text that they do not fit gives "" or the last picture.
"""

import re

_LONGEST = 80  # characters of a text that may be a label

_CUT = re.compile(r"[.;!?](?=\s|$)|[,:\n\]>)}]")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
_NAMED = (
    r"(?:(?:image|picture|photo)\s{0,2}#?(\d{1,3})\b"
    rf"|\b({'|'.join(_ORDINALS)})\s{{1,2}}(?:image|picture|photo)\b)"
)
_PICTURE = re.compile(rf"\b{_NAMED}", re.IGNORECASE)
_LEADING = re.compile(
    r"^(?:(?:and|or|but|then|also|yes|it|this|here|there|is|are|was|were"
    r"|left of|right of|above|below|under|behind|beside|next to|near|on|"
    rf"in (?:the )?{_NAMED})\b\s*|[-*\u2022\d.)\s]+)+",
    re.IGNORECASE,
)
_TRAILING = re.compile(
    r"(?:[\s:=\"'\u2013-]+|\b(?:is|are|was|were|has|have|lies|stands|located|found|"
    r"seen|shown|at|in|by|with|bounding\s+box|coordinates?|position|bbox(?:_2d)?|"
    r"point_2d|its|the))+$",
    re.IGNORECASE,
)
_QUOTES = "\"'`*_{[( "

# Phrases that the format itself marks: <ref>a dog</ref>, and JSON's key behind it.
_MARKED = re.compile(
    r"<(?:ref|p|\|object_ref_start\|)>([^<>]{1,80})<(?:/ref|/p|\|object_ref_end\|)>\s*$"
)
_JSON_KEY = re.compile(r"\"(?:bbox|point)(?:_2d)?\"\s*:\s*$")
_JSON_LABEL = re.compile(r"\s*,\s*\"label\"\s*:\s*\"([^\"]{1,80})\"")
_JSON_LABEL_BEFORE = re.compile(r"\"label\"\s*:\s*\"([^\"]{1,80})\"\s*,\s*$")


def label_before(text: str, span: tuple[int, int], start: int) -> str:
    """The phrase before text[span], behind `start`, or "".

    "There is a red circle at <...>" gives "a red circle".
    """
    start = max(start, span[0] - 3 * _LONGEST)
    before = text[start : span[0]]
    if marked := _MARKED.search(before):
        return marked[1].strip()
    if key := _JSON_KEY.search(before):
        if behind := _JSON_LABEL.match(text, span[1]):
            return behind[1]
        earlier = _JSON_LABEL_BEFORE.search(before[: key.start()])
        return earlier[1] if earlier else ""
    phrase = _TRAILING.sub("", before[-2 * _LONGEST :])
    cuts = [match.end() for match in _CUT.finditer(phrase)]
    phrase = phrase[cuts[-1] :] if cuts else phrase
    phrase = _LEADING.sub("", phrase.strip(_QUOTES)).strip(_QUOTES)
    if len(phrase) > _LONGEST:
        phrase = phrase[-_LONGEST:].partition(" ")[2]
    return phrase if any(letter.isalnum() for letter in phrase) else ""


def picture_before(text: str, pictures: int) -> int:
    """Which of so many pictures, from 0, a text names last; else the last of them."""
    named = pictures
    if pictures > 1:
        for match in _PICTURE.finditer(text):
            word = (match[2] or "").lower()
            number = int(match[1]) if match[1] else _ORDINALS.index(word) + 1
            named = number if 1 <= number <= pictures else named
    return max(named, 1) - 1
