"""How far a task is, and what it has given."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mm1_mlx._version import __version__
from mm1_mlx.evaluation.how import How
from mm1_mlx.evaluation.journal import Record
from mm1_mlx.evaluation.samples import Sample, Score, Task
from mm1_mlx.inputs.prompts import plural


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a task has given; `str` is one line of it.

    records: one for each sample, as the file has them. failed: how many could not be
    asked (a broken picture, too long for the context); they count as wrong. answered:
    how many were asked now, in `seconds`; the others were known from before. tokens:
    of these answers. settings: what decides the answers.
    """

    task: Task
    how: How
    score: Score
    records: list[Record]
    samples: list[Sample]
    settings: dict[str, Any]
    answered: int
    seconds: float
    tokens: int
    peak_memory: float

    @property
    def n(self) -> int:
        return len(self.records)

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if "error" in record]

    def __str__(self) -> str:
        low, high = self.score.low, self.score.high
        ends = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
        bad = len(self.failed)
        failed = f", {bad} of them could not be asked" if bad else ""
        return (
            f"{self.task.name} {self.how.name}: {self.score.total:.1f}{ends}, "
            f"{plural(self.n, 'sample')}{failed}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "task": self.task.name,
            "split": self.task.split,
            "shots": self.how.shots,
            "wrong_images": self.how.wrong_images,
            "how": self.how.name,
            "rule": self.task.reading(self.how.form)[2],
            "n": self.n,
            "failed": len(self.failed),
            "total": self.score.total,
            "low": self.score.low,
            "high": self.score.high,
            "groups": dict(self.score.groups),
            "settings": self.settings,
            "versions": versions(),
            "timing": {
                "answered": self.answered,
                "seconds": round(self.seconds, 2),
                "tokens": self.tokens,
                "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 2),
                "peak_memory_gb": round(self.peak_memory, 3),
            },
        }


@dataclass(frozen=True)
class Progress:
    """How far a task is. score: of the answers so far, None while it is not known."""

    task: str
    how: str  # "4-shot"; "features" while those for the nearest shots are computed
    done: int
    total: int
    known: int  # of done, from an earlier run
    seconds: float
    score: float | None


Watch = Callable[[Progress], None]


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "mm1_mlx": __version__,
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
