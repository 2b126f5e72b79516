"""From a generated source to a loaded kernel, and the compiler's findings."""

import ctypes
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import toolchain, unit
from .findings import Finding
from .generated import Generated

_ERROR = re.compile(
    r"^(?P<file>[^\s:][^:\n]*):(?P<line>\d+):\d+: "
    r"(?P<what>error|warning): (?P<text>.*)$",
    re.MULTILINE,
)
_SYNTAX = ["-fsyntax-only", "-ferror-limit=20"]
# What the names of the shim and of clang are called in MSL.
_WORDS = {
    "__attribute__((address_space(1)))": "device",
    "__attribute__((address_space(2)))": "constant",
    "__attribute__((address_space(3)))": "threadgroup",
    "MSL_has_no_double": "double",
    "_Float16": "half",
    "__bf16": "bfloat",
}


@dataclass
class Built:
    """A kernel's library: entry is the address of msl_entry."""

    path: Path
    library: ctypes.CDLL
    entry: int
    seconds: float


def compile_kernel(generated: Generated, checked: bool) -> Built | list[Finding]:
    """The kernel, loaded, or why it does not compile."""
    mode = "checked" if checked else "fast"
    source = unit.checked_unit(generated)
    flags = _flags(mode, unit.included(generated.code))
    start = time.perf_counter()

    def make(path: Path) -> None:
        linked = [*flags, *toolchain.linker_flags(), "-lm", "-o", str(path)]
        toolchain.compile_cpp(source, linked)

    try:
        file = toolchain.store(f"kernel_{toolchain.digest(source, *flags)}.so", make)
    except toolchain.BuildError as error:
        return compiler_findings(generated, str(error), "compile")
    seconds = time.perf_counter() - start
    library = ctypes.CDLL(str(file))
    entry = ctypes.cast(library.msl_entry, ctypes.c_void_p).value
    assert entry is not None
    return Built(file, library, entry, seconds)


def lint_spaces(generated: Generated) -> list[Finding]:
    """Lost or mixed address spaces and variables that are never set, found by clang."""
    source = unit.space_unit(generated)
    flags = [*_flags("spaces", unit.included(generated.code)), *_SYNTAX]

    def make(path: Path) -> None:
        try:
            said = toolchain.compile_cpp(source, flags)
        except toolchain.BuildError as error:
            said = str(error)
        path.write_text(said, encoding="utf-8")

    file = toolchain.store(f"spaces_{toolchain.digest(source, *flags)}.txt", make)
    return compiler_findings(generated, file.read_text("utf-8"), "address-space")


@cache
def _flags(mode: str, headers: tuple[str, ...]) -> list[str]:
    """clang's, with the precompiled prelude: its name depends on all that is in it."""
    include = toolchain.include_folder(unit.mlx_headers(headers))
    prelude = ["-include-pch", str(toolchain.prelude(mode, include))]
    return [*toolchain.mode_flags(mode), *toolchain.include_flags(include), *prelude]


def compiler_findings(generated: Generated, errors: str, kind: str) -> list[Finding]:
    """A compiler's messages as findings, in MSL's words."""
    found = []
    for match in _ERROR.finditer(errors):
        text = match["text"]
        if match["what"] == "warning":
            if "uninitialized" not in text:
                continue
            what = "uninitialised"
        else:
            what = kind
        for word, msl in _WORDS.items():
            text = text.replace(word, msl)
        text = re.sub(r"\s*\[-W[^\]]*\]", "", text)
        place = None
        if match["file"] == "kernel.metal":
            place = generated.place(int(match["line"]))
        found.append(Finding(what, text, place))
    if not found and kind == "compile":
        found.append(Finding(kind, errors.strip().splitlines()[-1]))
    return found


def without_repeats(spaces: list[Finding], compiled: list[Finding]) -> list[Finding]:
    """Without what the space lint says of lines that do not compile at all."""
    lines = {finding.place for finding in compiled}
    return [finding for finding in spaces if finding.place not in lines]


@cache
def _symbolizer() -> list[str] | None:
    clang = toolchain.find_clang()
    beside = clang.replace("clang++", "llvm-symbolizer")
    for name in (beside, "llvm-symbolizer", "addr2line"):
        if path := shutil.which(name):
            return [path]
    return None


@cache
def source_line(library: Path, offset: int) -> int | None:
    """The line of the generated source that an offset of its library comes from.

    The innermost call that stands in the kernel: functions of the shim are inlined.
    """
    if sys.platform == "darwin":
        command = ["atos", "-i", "-o", str(library), "-offset", hex(offset - 1)]
    elif (symbolizer := _symbolizer()) is None:
        return None
    else:
        command = [*symbolizer, "-i", "-e", str(library), hex(offset - 1)]
    try:
        environment = toolchain.clean_environment()
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"kernel\.metal:(\d+)", done.stdout)
    return int(match.group(1)) if match else None
