"""A tokenizer for MSL: enough to rewrite and to lint it."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
      (?P<comment> //[^\n]* | /\*.*?\*/ )
    | (?P<string> "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' )
    | (?P<name> [A-Za-z_]\w* )
    | (?P<number> \.?\d(?:[eEpP][+-]|[\w.])* )
    | (?P<space> \s+ )
    | (?P<sign> \[\[ | \]\] | :: | -> | \+\+ | -- | && | \|\| | [=!<>]= | . )
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """A piece of text: kind is a group of the pattern above, line counts from 1."""

    kind: str
    text: str
    line: int

    @property
    def blank(self) -> bool:
        """Whether it means nothing to a compiler."""
        return self.kind in ("space", "comment")


def tokenize(source: str) -> list[Token]:
    """All tokens, blanks too: their texts joined are the source again.

    `]]` is one token only where it closes `[[`: elsewhere it is two, as in a[b[0]].
    """
    tokens, line, attributes = [], 1, 0
    position = 0
    while position < len(source):
        match = _TOKEN.match(source, position)
        assert match and match.lastgroup, f"no token at {position}"
        text, kind = match.group(), match.lastgroup
        if text == "[[":
            attributes += 1
        elif text == "]]":
            if attributes:
                attributes -= 1
            else:
                text = "]"
        tokens.append(Token(kind, text, line))
        line += text.count("\n")
        position += len(text)
    return tokens


def next_solid(tokens: list[Token], index: int) -> int:
    """The index of the first token from here on that is not blank, or len(tokens)."""
    while index < len(tokens) and tokens[index].blank:
        index += 1
    return index


def solid(tokens: list[Token]) -> list[Token]:
    """The tokens that a compiler sees."""
    return [token for token in tokens if not token.blank]
