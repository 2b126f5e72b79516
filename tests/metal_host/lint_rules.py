"""The rules of the token lint. Each is a function of (header, body) that gives hits.

Where a rule guesses, it guesses for the source: a hit should be worth a look.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .rewrite import threadgroup_variables
from .structure import Function, Source, statements
from .tokens import Token

_SPACES = {"device", "constant", "thread", "threadgroup", "threadgroup_imageblock"}


@dataclass(frozen=True)
class Hit:
    """Where a rule is broken: part "header" or "body", line from 1."""

    part: str
    line: int
    message: str


Rule = Callable[[Source, Source], Iterator[Hit]]
RULES: dict[str, Rule] = {}


def _rule(name: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES[name] = rule
        return rule

    return add


def _parts(header: Source, body: Source) -> list[tuple[str, Source]]:
    return [("header", header), ("body", body)]


_NOT_IN_MSL = {
    "double": "MSL has no double",
    "goto": "MSL has no goto",
    "try": "MSL has no exceptions",
    "catch": "MSL has no exceptions",
    "throw": "MSL has no exceptions",
    "virtual": "MSL has no virtual functions",
    "new": "MSL has no new",
    "delete": "MSL has no delete",
    "typeid": "MSL has no typeid",
    "dynamic_cast": "MSL has no dynamic_cast",
    "thread_local": "MSL has no thread_local",
    "asm": "MSL has no assembly",
    "wchar_t": "MSL has no wchar_t",
    "va_list": "MSL has no variable argument lists",
    "va_start": "MSL has no variable argument lists",
    "malloc": "MSL has no heap",
    "free": "MSL has no heap",
    "printf": "MSL has no printf",
    "assert": "MSL has no assert",
}


@_rule("not-in-msl")
def _not_in_msl(header: Source, body: Source) -> Iterator[Hit]:
    for part, source in _parts(header, body):
        for before, token in _pairs(source.tokens):
            deleted = token.text == "delete" and before == "="
            member = before in (".", "->")
            message = _NOT_IN_MSL.get(token.text)
            if message and not deleted and not member:
                yield Hit(part, token.line, message)


@_rule("std")
def _std(header: Source, body: Source) -> Iterator[Hit]:
    for part, source in _parts(header, body):
        for token, after in zip(source.tokens, source.tokens[1:], strict=False):
            if token.text == "std" and after.text == "::":
                yield Hit(part, token.line, "MSL has metal::, not std::")


@_rule("variadic")
def _variadic(header: Source, body: Source) -> Iterator[Hit]:
    for function in header.functions:
        start = "".join(token.text for token in function.head)
        if re.search(r"[(,]\.\.\.\)", start):
            yield Hit("header", function.head[0].line, "MSL has no variadic functions")


@_rule("lambda")
def _lambda(header: Source, body: Source) -> Iterator[Hit]:
    for part, source in _parts(header, body):
        for before, token in _pairs(source.tokens):
            subscript = before in (")", "]", '"') or (
                before.isidentifier() and before != "return"
            )
            if token.text == "[" and not subscript:
                yield Hit(
                    part,
                    token.line,
                    "MSL has no lambdas before 4.0, and kernels meet 3.1",
                )


@_rule("recursion")
def _recursion(header: Source, body: Source) -> Iterator[Hit]:
    names = [f.name for f in header.functions]
    # Overloads may call one another: by name alone that cannot be told from recursion.
    single = {f.name: f for f in header.functions if names.count(f.name) == 1}
    calls = {name: _called(f.body) & single.keys() for name, f in single.items()}
    for name, function in single.items():
        reached, wanted = set(), set(calls[name])
        while wanted:
            reached |= wanted
            wanted = {c for other in wanted for c in calls[other]} - reached
        if name in reached:
            message = f"{name} calls itself; MSL has no recursion"
            yield Hit("header", function.head[0].line, message)


def _called(tokens: Sequence[Token]) -> set[str]:
    """Names followed by `(`; f<N - 1>() is another function than f<N>()."""
    called = set()
    for i, token in enumerate(tokens[:-1]):
        member = i > 0 and tokens[i - 1].text in (".", "->")
        if token.kind == "name" and tokens[i + 1].text == "(" and not member:
            called.add(token.text)
    return called


_NO_VARIABLE = {"using", "typedef", "struct", "class", "enum", "union", "static_assert"}
_NO_VARIABLE |= {"friend", "extern", "template", "namespace"}


def _is_variable(tokens: Sequence[Token]) -> bool:
    words = [token.text for token in tokens]
    if words[0] in _NO_VARIABLE or len(words) < 2 or "operator" in words:
        return False
    until = words.index("=") if "=" in words else len(words)
    return "(" not in words[:until]


@_rule("program-scope")
def _program_scope(header: Source, body: Source) -> Iterator[Hit]:
    message = "a variable at program scope must be constant"
    for declared in header.globals:
        if _is_variable(declared) and "constant" not in [t.text for t in declared]:
            yield Hit("header", declared[0].line, message)
    for part, source in _parts(header, body):
        for declared in source.members:
            words = [token.text for token in declared]
            loose = words[0] == "static" and "constant" not in words
            if loose and _is_variable(declared):
                yield Hit(part, declared[0].line, "a static member must be constant")


@_rule("static-local")
def _static_local(header: Source, body: Source) -> Iterator[Hit]:
    for part, function in _functions(header, body):
        for statement in statements(function.body):
            words = [token.text for token in statement]
            if words[0] == "static" and "constant" not in words:
                message = "a static variable of a function must be constant"
                yield Hit(part, statement[0].line, message)


@_rule("threadgroup-variable")
def _threadgroup_variable(header: Source, body: Source) -> Iterator[Hit]:
    for line, name in threadgroup_variables(header.tokens):
        message = f"'{name}': only a kernel's body may declare threadgroup variables"
        yield Hit("header", line, message)


_KEYWORDS = _SPACES | {"kernel", "vertex", "fragment", "half", "bfloat", "sampler"}
_KEYWORDS |= {"ray_data", "object_data", "uint", "ushort", "uchar", "ulong"}
_PUBLIC = re.compile(
    r"__(METAL\w*|HAVE_\w+|LINE__|FILE__|attribute__|VA_ARGS__|builtin_\w+)$"
)


@_rule("reserved-name")
def _reserved_name(header: Source, body: Source) -> Iterator[Hit]:
    for part, source in _parts(header, body):
        for token in source.tokens:
            reserved = re.match(r"__|_[A-Z]", token.text) and token.text != "_Pragma"
            if token.kind == "name" and reserved and not _PUBLIC.match(token.text):
                yield Hit(
                    part, token.line, f"{token.text} is reserved for the compiler"
                )
        trios = zip(source.tokens, source.tokens[1:], source.tokens[2:], strict=False)
        for before, token, after in trios:
            declared = before.kind == "name" and before.text not in _SPACES | {"const"}
            if token.text in _KEYWORDS and declared and after.text in ("=", ";", "["):
                yield Hit(part, token.line, f"{token.text} is a word of MSL")
        for directive in source.directives:
            name = directive.text.partition(" ")[0].partition("(")[0]
            changed = name in _KEYWORDS or name.startswith("__")
            if directive.name == "define" and changed:
                message = f"#define {name} changes a word of MSL"
                yield Hit(part, directive.line, message)


_FLOATS = {"bfloat", "bfloat16", "bfloat16_t", "float16", "float16_t", "half"}


@_rule("float-typedef")
def _float_typedef(header: Source, body: Source) -> Iterator[Hit]:
    message = "{} is MLX's or MSL's own name; newer compilers declare it themselves"
    for part, source in _parts(header, body):
        for statement in statements(source.tokens):
            words = [token.text for token in statement]
            new = None
            if words[0] == "typedef":
                new = words[-1]
            elif words[0] == "using" and "=" in words:
                new = words[1]
            if new in _FLOATS:
                yield Hit(part, statement[0].line, message.format(new))
        for directive in source.directives:
            name = directive.text.partition(" ")[0]
            if directive.name == "define" and name in _FLOATS - _KEYWORDS:
                yield Hit(part, directive.line, message.format(name))


_HEADER = re.compile(r'<metal_\w+>|"mlx/backend/metal/kernels/(?!.*nax).*"')


@_rule("include")
def _include(header: Source, body: Source) -> Iterator[Hit]:
    for part, source in _parts(header, body):
        for directive in source.directives:
            if directive.name != "include":
                continue
            text = directive.text
            if "tensor" in text or "Primitives" in text or "nax" in text:
                message = f"{text}: performance primitives broke with macOS 27"
                yield Hit(part, directive.line, message)
            elif not _HEADER.match(text):
                yield Hit(part, directive.line, f"{text} is no header of MSL or MLX")


@_rule("member-thread")
def _member_thread(header: Source, body: Source) -> Iterator[Hit]:
    for part, source in _parts(header, body):
        for function in source.functions:
            words = {token.text for token in function.head}
            if not function.owner or words & {"static", "friend"}:
                continue
            if not _SPACES & set(function.qualifiers):
                message = (
                    f"{function.owner}::{function.name} needs `thread` after its "
                    f"parameters: MSL 4.1 takes `this` as generic without it"
                )
                yield Hit(part, function.head[0].line, message)


@_rule("pointer-space")
def _pointer_space(header: Source, body: Source) -> Iterator[Hit]:
    message = "a pointer or reference must name its address space"
    for part, function in _functions(header, body):
        for parameter in function.parameters if function.head else ():
            words = [token.text for token in _plain(parameter)]
            if {"*", "&"} & set(words) and not _SPACES & set(words):
                yield Hit(part, parameter[0].line, message)
        for statement in statements(function.body):
            if _declares_bare_pointer([t.text for t in _plain(statement)]):
                yield Hit(part, statement[0].line, message)


def _plain(tokens: Sequence[Token]) -> list[Token]:
    """A declaration without what stands in angle brackets and after its `=`."""
    kept, depth = [], 0
    for token in tokens:
        if token.text == "=" and depth == 0:
            break
        depth -= token.text == ">"
        if depth <= 0:
            kept.append(token)
        depth += token.text == "<"
    return kept


def _declares_bare_pointer(words: list[str]) -> bool:
    """`T* p` or `const T& r`, and not a product, which needs something before it."""
    words = [word for word in words if word not in ("const", "constexpr", "<", ">")]
    shape = len(words) == 3 and words[1] in ("*", "&") and words[0] != "auto"
    return shape and words[0].isidentifier() and words[2].isidentifier()


_BARRIERS = {"threadgroup_barrier"}


@_rule("barrier-after-return")
def _barrier_after_return(header: Source, body: Source) -> Iterator[Hit]:
    barriers = set(_BARRIERS)
    for _ in header.functions:  # a function that calls one that has a barrier
        barriers |= {
            f.name for f in header.functions if barriers & {t.text for t in f.body}
        }
    for part, function in _functions(header, body):
        places = [i for i, t in enumerate(function.body) if t.text in barriers]
        if not places:
            continue
        for i, token in enumerate(function.body[: places[-1]]):
            if token.text == "return":
                later = next(k for k in places if k > i)
                line = function.body[later].line
                message = f"who returns here never reaches the barrier in line {line}"
                yield Hit(part, token.line, message)


def _functions(header: Source, body: Source) -> list[tuple[str, Function]]:
    inside = [("header", function) for function in header.functions]
    return [*inside, *(("body", function) for function in body.functions)]


def _pairs(tokens: Sequence[Token]) -> Iterator[tuple[str, Token]]:
    """Each token, and the text before it."""
    before = ""
    for token in tokens:
        yield before, token
        before = token.text
