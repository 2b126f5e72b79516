"""What the harness finds wrong with a kernel, and the error that says so."""

from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = {
    "race": "two threads touch a byte, one writes, and no barrier orders them",
    "out-of-bounds": "an access outside every buffer and variable",
    "uninitialised": "a value is read that nobody has written",
    "never-written": "bytes of an output keep what was there before",
    "divergence": "threads that must meet do not",
    "undefined": "undefined behaviour of C++: shift, division, overflow, alignment",
    "address-space": "a pointer or a write that its address space does not allow",
    "compile": "the body is no MSL",
    "lint": "what Apple's compilers refuse, or what a rule of this harness forbids",
    "limit": "more threads, threadgroup memory or stack than an Apple GPU has",
    "deadlock": "a thread waits for one that may never run",
}


@dataclass(frozen=True)
class Place:
    """A line of what the caller wrote: `part` is "body" or "header", lines from 1."""

    part: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        text = f": {self.text.strip()}" if self.text.strip() else ""
        return f"line {self.line} of the {self.part}{text}"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a kind of KINDS, what happened, and where.

    other: the access it conflicts with. example: the thread that met it first.
    """

    kind: str
    message: str
    place: Place | None = None
    other: Place | None = None
    example: str = ""
    count: int = 1

    def __str__(self) -> str:
        text = f"{self.kind}: {self.message}"
        if self.place:
            text += f" ({self.place})"
        if self.other and self.other != self.place:
            text += f" against {self.other}"
        if self.example:
            text += f", first by {self.example}"
        return text


@dataclass
class Run:
    """One launch of a kernel. `remarks` are legal, but worth a look."""

    kernel: str
    seed: int
    checked: bool
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    source: str  # exactly as MLX generates it
    findings: list[Finding] = field(default_factory=list)
    remarks: list[Finding] = field(default_factory=list)
    seconds: float = 0.0  # of the kernel alone
    build_seconds: float = 0.0  # 0 where it came from the cache
    switches: int = 0  # between threads
    barriers: int = 0
    simd_functions: int = 0  # meetings of a simdgroup
    accesses: int = 0  # that were checked


class KernelError(Exception):
    """A kernel is wrong; the message has a line for each finding."""

    def __init__(
        self, kernel: str, findings: Sequence[Finding], seed: int | None = None
    ):
        self.kernel, self.findings, self.seed = kernel, list(findings), seed
        when = "" if seed is None else f" (schedule {seed})"
        lines = [f"kernel '{kernel}'{when}: {finding}" for finding in findings]
        super().__init__("\n".join(lines))

    @property
    def kinds(self) -> set[str]:
        """The kinds of all findings."""
        return {finding.kind for finding in self.findings}


class HostError(Exception):
    """The harness itself cannot do what it was asked for."""
