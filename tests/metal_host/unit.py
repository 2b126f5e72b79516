"""The C++ translation units made from a generated source."""

import re
from functools import cache
from pathlib import Path

import mlx.core as mx

from .generated import Generated, Parameter
from .rewrite import rewrite

HERE = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(mlx/[^"]+)"', re.MULTILINE)
_PRELUDE_HEADERS = ("mlx/backend/metal/kernels/utils.h",)
_SHIM = HERE / "shim"

# MSL has no double, and says so; after the headers, which are C++.
PRELUDE = "".join(
    [
        "#include <metal_stdlib>\n",
        *(f'#include "{header}"\n' for header in _PRELUDE_HEADERS),
        "#define double MSL_has_no_double\n",
    ]
)


def checked_unit(generated: Generated) -> str:
    """The kernel and `msl_entry(buffers, thread)`, which calls it for one thread."""
    arguments, index = [], 0
    for parameter in generated.parameters:
        if parameter.attribute == "buffer":
            arguments.append(_buffer(parameter, f"buffers[{index}]"))
            index += 1
        else:
            arguments.append(_attribute(parameter))
    call = f"{generated.instance}({', '.join(arguments)});"
    return (
        f'#line 1 "kernel.metal"\n{rewrite(generated.code)}\n#line 1 "launcher"\n'
        'extern "C" __attribute__((no_sanitize("thread"))) '
        f"void msl_entry(void** buffers, const MslThread* t) {{ {call} }}\n"
    )


def space_unit(generated: Generated) -> str:
    """The kernel with address spaces that clang checks; it cannot be run."""
    arguments = []
    for parameter in generated.parameters:
        if parameter.attribute != "buffer":
            arguments.append(_attribute(parameter))
        elif parameter.is_reference:
            arguments.append(f"*(({parameter.type[:-1]}*)0)")
        else:
            arguments.append(f"({parameter.type})0")
    call = f"{generated.instance}({', '.join(arguments)});"
    return (
        f'#line 1 "kernel.metal"\n{rewrite(generated.code, spaces=True)}\n'
        f'#line 1 "launcher"\nvoid msl_entry(const MslThread* t) {{ {call} }}\n'
    )


def _buffer(parameter: Parameter, pointer: str) -> str:
    if parameter.is_reference:
        return f"*({parameter.type[:-1]}*){pointer}"
    return f"({parameter.type}){pointer}"


def _attribute(parameter: Parameter) -> str:
    """An attribute's value in its declared type: uint, uint2, uint3 or ushort..."""
    field, kind = f"t->{parameter.attribute}", parameter.type
    if kind[-1] in "23":
        scalar = kind[:-1]
        parts = ", ".join(f"({scalar}){field}[{d}]" for d in range(int(kind[-1])))
        return f"{kind}{{{parts}}}"
    return f"({kind}){field}"


@cache
def mlx_include() -> Path:
    """Where MLX's own Metal headers stand: every wheel has them."""
    return Path(mx.__file__).resolve().parent / "include"


def included(source: str) -> tuple[str, ...]:
    """The headers of MLX's that a source includes."""
    return tuple(_INCLUDE.findall(source))


def mlx_headers(paths: tuple[str, ...]) -> dict[str, str]:
    """MLX's headers for the prelude and these, with what they include, rewritten."""
    wanted = [*_PRELUDE_HEADERS, *paths]
    found: dict[str, str] = {}
    while wanted:
        path = wanted.pop()
        if path in found or (_SHIM / path).is_file():
            continue
        if (mlx_include() / path).is_file():  # where it is not, clang says it better
            found[path] = _rewritten(path)
            wanted += _INCLUDE.findall(found[path])
    return found


@cache
def _rewritten(path: str) -> str:
    """One of MLX's headers, as clang takes it."""
    text = (mlx_include() / path).read_text(encoding="utf-8")
    return _repaired(path, rewrite(text))


def _repaired(path: str, text: str) -> str:
    """What clang takes only from Apple."""
    if path.endswith("kernels/utils.h"):
        # A parameter that is an array in an address space.
        return re.sub(r"(\w+) (\w+)\[\d\]\)", r"\1* \2)", text)
    if path.endswith("utils/type_traits.h"):
        # Specialisations by address space, which here are all the same type.
        return re.sub(
            r"template <typename T>\n"
            r"struct pointer_element<(device|constant|threadgroup) T\*> \{.*?\n\};\n",
            "",
            text,
            flags=re.DOTALL,
        )
    return text
