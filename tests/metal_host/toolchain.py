"""clang: finding it, and what it builds in a cache of the user's.

MSL_HOST_CLANG names another compiler, MSL_HOST_CACHE another folder.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .findings import HostError
from .unit import HERE, PRELUDE

_CLANGS = [f"clang++-{n}" for n in range(24, 15, -1)]
_CLANGS = ["clang++-19", *(c for c in _CLANGS if c != "clang++-19"), "clang++"]

_KEPT_SECONDS = 30 * 24 * 3600

_COMMON = [
    *("-std=c++17", "-fPIC", "-nostdinc++", "-fno-exceptions", "-fno-rtti"),
    # Metal's arithmetic: half is rounded after each operation, a literal without f is a
    # float, and nothing is fused that the source does not fuse.
    *("-ffp-contract=off", "-Xclang", "-cl-single-precision-constant"),
]
# x86-64 computes _Float16 in float and may round late.
_X86 = ["-Xclang", "-ffloat16-excess-precision=none"]
_LINES = ["-gline-tables-only", "-gdwarf-4"]  # addr2line errs about #line in DWARF 5
_UNDEFINED = "alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow"
_CHECKED = [
    *("-w", "-O1", *_LINES, "-fno-omit-frame-pointer"),
    *("-fsanitize=thread", f"-fsanitize={_UNDEFINED}", "-fno-sanitize-link-runtime"),
    # By itself it leaves out a read that a write to the same address follows.
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    # What nobody wrote is a NaN, not a zero by chance.
    "-ftrivial-auto-var-init=pattern",
    # A frame larger than the stack must meet the guard page, not jump over it.
    "-fstack-clash-protection",
]
_FAST = ["-w", "-O2", *_LINES]
_SPACES = [
    *("-DMSL_LINT", "-Werror=address-of-temporary"),
    *("-Wuninitialized", "-Wsometimes-uninitialized"),
]
_RUNTIME = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-shared"]
MODES = {"checked": _CHECKED, "fast": _FAST, "spaces": _SPACES}

_PROBE = """
typedef float float4 __attribute__((ext_vector_type(4)));
_Float16 half_sum(_Float16 a, _Float16 b) { return a + b; }
__bf16 bfloat_sum(__bf16 a, __bf16 b) { return a + b; }
float line(int l = __builtin_LINE(), int c = __builtin_COLUMN()) { return l + c; }
float4 swizzle(float4 v) { return v.wzyx; }
"""


@dataclass(frozen=True)
class Done:
    """What a compiler said."""

    code: int
    errors: str


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def mode_flags(mode: str) -> list[str]:
    """clang's flags for "checked", "fast" or "spaces"."""
    return [*_COMMON, *(_X86 if _is_x86() else []), *MODES[mode]]


@cache
def cache_folder() -> Path:
    """Where builds are kept: named by their content, so never out of date."""
    given = os.environ.get("MSL_HOST_CACHE")
    if given:
        folder = Path(given)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "metal_host"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "metal_host"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:  # no home to write to
        user = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"metal_host-{user}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def digest(*parts: str) -> str:
    """A name for a content."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def folder_digest(folder: Path) -> str:
    """A name for the content of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(*(f"{p.relative_to(folder)}\0{p.read_text('utf-8')}" for p in files))


def clean_environment() -> dict[str, str]:
    """Without what is loaded into Python, such as a BLAS that starts threads."""
    dropped = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
    return {key: value for key, value in os.environ.items() if key not in dropped}


def run_compiler(arguments: list[str], source: str | None = None) -> Done:
    """Run clang; `source` goes in as C++."""
    command = [find_clang(), *arguments]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, env=clean_environment()
    )
    return Done(done.returncode, done.stderr)


def find_clang() -> str:
    """The compiler's path; HostError where there is none that can do it."""
    path, reason = _search()
    if path is None:
        raise HostError(reason)
    return path


@cache
def _search() -> tuple[str | None, str]:
    """The first compiler that compiles the probe, or why there is none."""
    given = os.environ.get("MSL_HOST_CLANG")
    refused = []
    for name in [given] if given else _CLANGS:
        path = shutil.which(name)
        if path is None:
            continue
        if _compiles_the_probe(path):
            return path, ""
        refused.append(name)
    if refused:
        return None, (
            f"{', '.join(refused)} cannot compute with _Float16 and __bf16: "
            f"install clang 17 or newer (Debian: clang-19)."
        )
    what = f"MSL_HOST_CLANG is {given}, which is not there" if given else "no clang++"
    return None, f"{what}: install clang 17 or newer (Debian: clang-19, macOS: Xcode)."


def _compiles_the_probe(path: str) -> bool:
    stamp = os.stat(path)
    key = digest(_PROBE, path, str(stamp.st_mtime_ns), str(stamp.st_size))
    file = cache_folder() / f"probe_{key}"
    if not file.exists():
        flags = [*mode_flags("fast"), "-fsyntax-only", "-x", "c++", "-"]
        done = subprocess.run(
            [path, *flags], input=_PROBE, capture_output=True, text=True
        )
        file.write_text(str(done.returncode))
    return file.read_text() == "0"


@cache
def compiler_id() -> str:
    """The compiler, for the names of what it builds."""
    stamp = os.stat(find_clang())
    return f"{find_clang()} {stamp.st_mtime_ns} {stamp.st_size}"


class BuildError(Exception):
    """What a compiler printed when it failed."""


def store(name: str, make: Callable[[Path], None]) -> Path:
    """The cached file or folder `name`; make(path) makes it under another name.

    Two processes may make the same: one is kept, and both are right.
    """
    final = cache_folder() / name
    if final.exists():
        return final
    partial = final.with_name(f"{os.getpid()}_{threading.get_ident()}_{name}")
    try:
        make(partial)
        with contextlib.suppress(OSError):  # a folder that another process has made
            os.replace(partial, final)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    return final


def compile_cpp(source: str, arguments: list[str]) -> str:
    """Have clang compile a unit; its warnings. BuildError with its errors."""
    done = run_compiler([*arguments, "-x", "c++", "-"], source)
    if done.code:
        raise BuildError(done.errors)
    return done.errors


def linker_flags() -> list[str]:
    """For a library whose undefined symbols the loaded runtime has."""
    if sys.platform == "darwin":
        return ["-shared", "-undefined", "dynamic_lookup"]
    return ["-shared"]


def runtime_library() -> Path:
    """The runtime, built at first use."""
    folder = HERE / "runtime"
    name = f"runtime_{digest(folder_digest(folder), compiler_id(), *_RUNTIME)}.so"

    def make(path: Path) -> None:
        flags = [*_RUNTIME, "-o", str(path), str(folder / "runtime.cpp")]
        done = run_compiler(flags)
        if done.code:
            raise HostError(f"The runtime does not compile:\n{done.errors}")
        _forget_old_builds()

    return store(name, make)


def _forget_old_builds() -> None:
    """Remove what was built long ago; it would only be built again."""
    oldest = time.time() - _KEPT_SECONDS
    for path in cache_folder().iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def include_folder(headers: dict[str, str]) -> Path:
    """A folder with the shim, the prelude and MLX's rewritten headers.

    A copy, because a precompiled header names the files it was made of: those of a
    checkout may change or go.
    """
    files = {"prelude.h": PRELUDE, **headers}
    files["runtime/kernel_api.h"] = _read(HERE / "runtime" / "kernel_api.h")
    for path in sorted((HERE / "shim").rglob("*")):
        if path.is_file():
            files[path.relative_to(HERE).as_posix()] = _read(path)

    def make(folder: Path) -> None:
        for path, text in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")

    return store(f"include_{digest(*files, *files.values())}", make)


def prelude(mode: str, include: Path) -> Path:
    """The shim and MLX's utils, precompiled: they are half of a kernel's build time."""
    flags = [*mode_flags(mode), *include_flags(include)]
    name = f"prelude_{digest(include.name, compiler_id(), *flags)}.pch"

    def make(path: Path) -> None:
        header = ["-x", "c++-header", str(include / "prelude.h")]
        done = run_compiler([*flags, *header, "-o", str(path)])
        if done.code:
            raise HostError(f"MLX's headers do not compile:\n{done.errors}")

    return store(name, make)


def include_flags(include: Path) -> list[str]:
    """The shim first: it has files that stand for some of MLX's."""
    return ["-I", str(include / "shim"), "-I", str(include)]


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
