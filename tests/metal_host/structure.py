"""The rough structure of a Metal source: directives, functions, types, declarations.

By brackets and keywords only: macros are not expanded and names not resolved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .tokens import Token, solid, tokenize

_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}


@dataclass(frozen=True)
class Directive:
    """A line of the preprocessor: name "include", text what follows."""

    name: str
    text: str
    line: int


@dataclass(frozen=True)
class Function:
    """head: what stands before the body. body: without its braces."""

    name: str
    head: tuple[Token, ...]
    body: tuple[Token, ...]
    owner: str = ""  # the struct that it is a member of

    @property
    def parameters(self) -> list[list[Token]]:
        """The tokens of each parameter."""
        start = _parenthesis(self.head)
        end = _closing(self.head, start)
        return split_at_commas(self.head[start + 1 : end])

    @property
    def qualifiers(self) -> list[str]:
        """What stands between the parameters and the body."""
        end = _closing(self.head, _parenthesis(self.head))
        return [token.text for token in self.head[end + 1 :]]


@dataclass
class Source:
    """A header or a body, taken apart."""

    directives: list[Directive] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)  # without directives and blanks
    functions: list[Function] = field(default_factory=list)
    # Declarations that are no functions, at program scope and in structs.
    globals: list[tuple[Token, ...]] = field(default_factory=list)
    members: list[tuple[Token, ...]] = field(default_factory=list)


def read_header(text: str) -> Source:
    """What stands before a kernel: functions, types, constants."""
    source = _without_directives(text)
    _read_scope(source, tuple(source.tokens), owner="")
    return source


def read_body(text: str) -> Source:
    """A kernel's body: one function, and the types that are declared in it."""
    source = _without_directives(text)
    tokens = tuple(source.tokens)
    source.functions.append(Function("kernel", (), tokens))
    for i, token in enumerate(tokens[:-2]):
        if token.text in ("struct", "class") and tokens[i + 2].text == "{":
            end = _closing(tokens, i + 2)
            _read_scope(source, tokens[i + 3 : end], owner=tokens[i + 1].text)
    return source


def statements(tokens: Sequence[Token]) -> Iterator[tuple[Token, ...]]:
    """The pieces of a function between ; { and }, without them."""
    piece: list[Token] = []
    depth = 0  # a for has semicolons in parentheses
    for token in tokens:
        depth += (token.text == "(") - (token.text == ")")
        if token.text in ("{", "}") or (token.text == ";" and depth == 0):
            if piece:
                yield tuple(piece)
            piece = []
        else:
            piece.append(token)
    if piece:
        yield tuple(piece)


def split_at_commas(tokens: Sequence[Token]) -> list[list[Token]]:
    """The pieces between commas that stand in no bracket, angle brackets included."""
    pieces: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.text in ("[", "<", "(", "{")) - (
            token.text in ("]", ">", ")", "}")
        )
        if token.text == "," and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def without_template_head(tokens: Sequence[Token]) -> tuple[Token, ...]:
    """A declaration without the `template <...>` before it."""
    tokens = tuple(tokens)
    while tokens and tokens[0].text == "template":
        depth = 0
        for i, token in enumerate(tokens[1:], 1):
            depth += (token.text in "<(") - (token.text in ">)")
            if depth == 0:
                tokens = tokens[i + 1 :]
                break
        else:
            return ()
    return tokens


def _without_directives(text: str) -> Source:
    source = Source()
    lines = text.split("\n")
    kept, i = [], 0
    while i < len(lines):
        if not lines[i].lstrip().startswith("#"):
            kept.append(lines[i])
            i += 1
            continue
        start, whole = i, lines[i]
        while whole.endswith("\\") and i + 1 < len(lines):
            i += 1
            whole = whole[:-1] + " " + lines[i]
        kept += [""] * (i - start + 1)
        i += 1
        name, _, rest = whole.lstrip()[1:].strip().partition(" ")
        source.directives.append(Directive(name, rest.strip(), start + 1))
    source.tokens = solid(tokenize("\n".join(kept)))
    return source


def _parenthesis(head: Sequence[Token]) -> int:
    """Where a function's parameters start; operator() has a pair of its own."""
    depth = 0
    for i, token in enumerate(head):
        depth += (token.text == "<") - (token.text == ">")
        called = i >= 1 and head[i - 1].text == "operator"
        if token.text == "(" and depth <= 0 and not called:
            return i
    return len(head)


def _closing(tokens: Sequence[Token], start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i].text in _OPEN) - (tokens[i].text in _CLOSE)
        if depth == 0:
            return i
    return len(tokens)


def _read_scope(source: Source, tokens: tuple[Token, ...], owner: str) -> None:
    """Take a namespace or a struct apart."""
    head: list[Token] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token.text == ";":
            _add_declaration(source, head, owner)
            head, i = [], i + 1
        elif token.text == "{":
            end = _closing(tokens, i)
            if _add_block(source, head, tokens[i + 1 : end], owner):
                head = []
            i = end + 1
        elif token.text in ("(", "["):
            end = _closing(tokens, i)
            head += tokens[i : end + 1]
            i = end + 1
        elif token.text == ":" and head and head[-1].text in _ACCESS:
            head, i = [], i + 1
        else:
            head.append(token)
            i += 1


_ACCESS = {"public", "private", "protected"}


def _add_block(
    source: Source, head: list[Token], body: tuple[Token, ...], owner: str
) -> bool:
    """What `head { body }` is. False where the declaration goes on after it."""
    plain = without_template_head(head)
    words = [token.text for token in plain]
    if not words or words[0] in ("enum", "union"):
        return False
    if words[0] in ("namespace", "extern"):
        _read_scope(source, body, owner)
        return True
    if words[0] in ("struct", "class"):
        _read_scope(source, body, owner=words[1] if len(words) > 1 else "struct")
        return False
    start = _parenthesis(plain)
    if start == len(plain) or "=" in words[:start]:
        return False  # an initialiser
    name = plain[start - 1].text if start else ""
    source.functions.append(Function(name, plain, body, owner))
    return True


def _add_declaration(source: Source, head: list[Token], owner: str) -> None:
    plain = without_template_head(head)
    if plain:
        (source.members if owner else source.globals).append(plain)
