"""The session that is active: its settings, and the record of its runs."""

from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass, field

from .findings import KINDS, Finding, KernelError, Run


@dataclass
class Session:
    """What host_kernels yields. `runs` has every launch, in order."""

    seed: int = 0
    checked: bool = True
    lint: bool = True
    strict: bool = True
    allow: Collection[str] = ()
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.allow) - set(KINDS)):
            raise ValueError(f"allow: unknown kinds {unknown}. Known: {sorted(KINDS)}.")

    @property
    def findings(self) -> list[Finding]:
        """Those of all runs."""
        return [finding for run in self.runs for finding in run.findings]

    @property
    def last(self) -> Run:
        """The last run."""
        if not self.runs:
            raise LookupError("No kernel has run.")
        return self.runs[-1]

    def judge(self, run: Run) -> None:
        """Raise KernelError for what the run has found, unless it is allowed."""
        found = [f for f in run.findings if f.kind not in self.allow]
        if found and self.strict:
            raise KernelError(run.kernel, found, run.seed)


ACTIVE: ContextVar[Session | None] = ContextVar("metal_host", default=None)


def active_session() -> Session | None:
    """The innermost host_kernels that is active, if any."""
    return ACTIVE.get()
