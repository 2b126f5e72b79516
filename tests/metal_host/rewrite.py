"""Metal source -> C++ that clang accepts: the little that macros cannot express.

Line numbers stay as they are, because findings are reported by them.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from .structure import split_at_commas
from .tokens import Token, next_solid, tokenize

_SCALARS = "char uchar short ushort int uint long ulong half float bool bfloat"
_VECTORS = {f"{scalar}{n}" for scalar in _SCALARS.split() for n in (2, 3, 4)}
_HALF = re.compile(r"(\d[\d.]*(?:[eE][+-]?\d+)?)[hH]$")
_BFLOAT = re.compile(r"(\d[\d.]*(?:[eE][+-]?\d+)?)(?:bf|BF)$")
_FUNCTION_CONSTANT = re.compile(
    r"constant (\w+) (\w+) \[\[function_constant\(\d+\)\]\];"
)


@lru_cache(maxsize=256)  # each schedule asks again
def rewrite(source: str, *, spaces: bool = False) -> str:
    """C++ for a piece of Metal source. spaces: for the address-space lint.

    - attributes `[[...]]` are dropped;
    - `float4(a, b)` and `vec<T, 4>(a, b)` become calls of msl_make;
    - half and bfloat literals become casts;
    - threadgroup variables become references to memory that the runtime hands out
      (declarations without one for the lint);
    - function constants, which metal_kernel cannot set, become false or zero.
    """
    source = _FUNCTION_CONSTANT.sub(r"static const \1 \2 = {};", source)
    tokens = tokenize(source)
    out: list[str] = []
    before = ""  # the last token written that is not blank
    i = 0
    while i < len(tokens):
        text, i = _rewrite_one(tokens, i, before, spaces)
        out.append(text)
        if text.strip() and not tokens[i - 1].blank:
            before = text.strip()[-1] if not text.strip().isidentifier() else text
    return "".join(out)


def threadgroup_variables(tokens: list[Token]) -> list[tuple[int, str]]:
    """The line and name of each variable in threadgroup memory that is declared."""
    found, before = [], ""
    for i, token in enumerate(tokens):
        if token.text == "threadgroup" and before in ("", ";", "{", "}"):
            declared = _declaration(tokens, i)
            if declared is not None:
                found += [(token.line, name) for name, _ in declared.names]
        before = token.text
    return found


def _rewrite_one(
    tokens: list[Token], i: int, before: str, spaces: bool
) -> tuple[str, int]:
    """What stands for the token at i (and maybe some after it), and where to go on."""
    token = tokens[i]
    if token.text == "[[":
        return _attribute(tokens, i)
    if token.kind == "number":
        return _literal(token.text), i + 1
    if token.text in _VECTORS and before not in (".", ">", "operator"):
        following = next_solid(tokens, i + 1)
        if following < len(tokens) and tokens[following].text == "(":
            return f"msl_make<{token.text}>", i + 1
    if token.text == "vec" and (end := _template_end(tokens, i + 1)) is not None:
        following = next_solid(tokens, end)
        if following < len(tokens) and tokens[following].text == "(":
            return f"msl_make<{_join(tokens[i:end])}>", end
    if token.text == "threadgroup" and before in ("", ";", "{", "}"):
        declared = _declaration(tokens, i)
        if declared is not None:
            return _either(declared, spaces), declared.end
    return token.text, i + 1


def _either(declared: "_Declaration", spaces: bool) -> str:
    return declared.declaration() if spaces else declared.reference()


def _join(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def _spaced(tokens: list[Token]) -> str:
    """Tokens on one line, with spaces only where two words would become one."""
    text = ""
    for token in tokens:
        words = text[-1:].isalnum() or text[-1:] == "_"
        text += (" " if words and token.kind in ("name", "number") else "") + token.text
    return text


def _line_breaks(text: str) -> str:
    """The line ends of a text, with the backslashes that continue a macro."""
    return "".join(re.findall(r"\\?\n", text))


def _attribute(tokens: list[Token], i: int) -> tuple[str, int]:
    end = i
    while end < len(tokens) and tokens[end].text != "]]":
        end += 1
    return _line_breaks(_join(tokens[i : end + 1])), end + 1


def _literal(text: str) -> str:
    for pattern, name in ((_HALF, "half"), (_BFLOAT, "bfloat")):
        match = pattern.match(text)
        if match and not text.lower().startswith("0x"):
            digits = match.group(1)
            return f"{name}({digits}{'' if digits.isdigit() else 'f'})"
    return text


def _template_end(tokens: list[Token], i: int) -> int | None:
    """The index after the `<...>` that starts here, if there is one."""
    i = next_solid(tokens, i)
    if i >= len(tokens) or tokens[i].text != "<":
        return None
    depth = 0
    for j in range(i, len(tokens)):
        text = tokens[j].text
        if text in (";", "{"):
            return None
        depth += (text in "<(") - (text in ">)")
        if depth == 0:
            return j + 1
    return None


@dataclass
class _Declaration:
    """`threadgroup TYPE name[dims], ...;`"""

    type: str
    names: list[tuple[str, str]]  # and their [dims]
    breaks: str  # the line ends inside
    end: int  # index of the token after the semicolon

    def declaration(self) -> str:
        """Only declared: an object in an address space would need constructors."""
        names = ", ".join(name + dims for name, dims in self.names)
        return f"extern threadgroup {self.type} {names};{self.breaks}"

    def reference(self) -> str:
        parts = []
        for name, dims in self.names:
            kind = f"msl_type_{name}"
            parts.append(
                f"typedef {self.type} {kind}{dims}; {kind}& {name} = *({kind}*)"
                f'msl_threadgroup_memory(sizeof({kind}), "{name}", __LINE__);'
            )
        return " ".join(parts) + self.breaks


def _declaration(tokens: list[Token], i: int) -> _Declaration | None:
    """The threadgroup variables declared from here; None for a pointer or reference."""
    end, depth = i + 1, 0
    while end < len(tokens) and not (tokens[end].text == ";" and depth == 0):
        text = tokens[end].text
        if depth == 0 and text in ("*", "&", "=", "{", "("):
            return None
        depth += (text in ("[", "<", "(")) - (text in ("]", ">", ")"))
        if depth < 0:
            return None
        end += 1
    if end >= len(tokens):
        return None
    inside = [t for t in tokens[i + 1 : end] if not t.blank]
    breaks = _line_breaks(_join(tokens[i:end]))
    pieces = split_at_commas(inside)
    first = pieces[0]
    # The first piece is the type and the first name: the name stands before its [.
    at = next((k for k, t in enumerate(first) if t.text == "["), len(first)) - 1
    if at < 1:
        return None
    kind = _spaced(first[:at])
    names = [(first[at].text, _spaced(first[at + 1 :]))]
    names += [(piece[0].text, _spaced(piece[1:])) for piece in pieces[1:]]
    return _Declaration(kind, names, breaks, end + 1)
