"""The token lint: what Apple's compilers (MSL 3.1 to 4.1) refuse and clang does not.

A line with the comment `lint: allow NAME` is not held to the rule of that name.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from .findings import Finding, Place
from .lint_rules import RULES, Hit
from .structure import read_body, read_header

_ALLOW = re.compile(r"lint:\s*allow\s+([\w-]+)")
_SIMD = re.compile(r"\b(simd|quad|simdgroup|quadgroup)_\w+|_in_simdgroup\b")
_MAX_THREADS = 1024
_SIMD_WIDTH = 32


def lint_source(header: str, body: str) -> list[Finding]:
    """All rules over what stands before the kernel, and over its body."""
    return list(_source_findings(header, body))


@lru_cache(maxsize=256)  # each schedule asks again
def _source_findings(header: str, body: str) -> tuple[Finding, ...]:
    before, inside = read_header(header), read_body(body)
    found: list[Finding] = []
    for name, rule in RULES.items():
        found += _findings(name, rule(before, inside), header, body)
    found.sort(key=lambda f: (f.place.part, f.place.line) if f.place else ())
    return tuple(found)


def _findings(
    rule: str, hits: Iterable[Hit], header: str, body: str
) -> Iterator[Finding]:
    seen = set()
    for hit in hits:
        lines = (header if hit.part == "header" else body).split("\n")
        text = lines[hit.line - 1] if hit.line <= len(lines) else ""
        place = Place(hit.part, hit.line, text)
        if rule in _ALLOW.findall(text) or (place, hit.message) in seen:
            continue
        seen.add((place, hit.message))
        yield Finding("lint", f"{rule}: {hit.message}", place)


def lint_launch(
    source: str, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]
) -> list[Finding]:
    """The size of a launch. source: of the kernel, which may use simdgroups.

    Whole simdgroups are a rule only for such a kernel; to others it is a remark.
    """
    found = []
    asked = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if min(*grid, *threadgroup) < 1:
        message = f"a grid of {grid} in threadgroups of {threadgroup} has no threads"
        return [Finding("limit", message)]
    threads = 1
    for size, whole in zip(threadgroup, grid, strict=True):
        threads *= min(size, whole)
    if asked > _MAX_THREADS:
        message = (
            f"{asked} threads in a threadgroup, but an Apple GPU runs {_MAX_THREADS}"
        )
        found.append(Finding("limit", message))
    if threads % _SIMD_WIDTH:
        kind = "lint" if _SIMD.search(source) else "remark"
        message = (
            f"group-size: {threads} threads are no whole simdgroups of {_SIMD_WIDTH}"
        )
        found.append(Finding(kind, message))
    return found
