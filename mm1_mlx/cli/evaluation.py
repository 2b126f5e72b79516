"""What `evaluate` shows while it runs: a bar, or a line now and then."""

import sys
import time
from typing import Any

from mm1_mlx.cli.progress import duration, progress_bar, shows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.evaluation.results import Progress

_PATIENCE = 20  # seconds without a line


class EvaluationView:
    """Shows how far a task is, its running score, and the memory it takes."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._key: Any = None
        self._shown = 0
        self._told = 0.0

    def __call__(self, now: "Progress") -> None:
        """Take in a batch that is done."""
        if self._key != (now.task, now.how):
            self._begin(now)
        self._bar.update(now.done - self._shown)
        self._shown = now.done
        self._bar.set_postfix_str(_figures(now))
        waited = time.monotonic() - self._told >= _PATIENCE
        if not shows(self._bar) and waited and now.done < now.total:
            self._told = time.monotonic()
            self.line(
                f"{_name(now)}: {now.done} of {now.total}, {duration(now.seconds)}, "
                f"{_left(now)}{_figures(now)}"
            )
        if now.done >= now.total:
            self.close()

    def _begin(self, now: "Progress") -> None:
        self.close()
        self._key = now.task, now.how
        if now.known:
            self.line(f"{_name(now)}: goes on after {now.done} of {now.total}")
        self._bar = progress_bar(now.total, _name(now), initial=now.done, unit="sample")
        self._shown, self._told = now.done, time.monotonic()

    def line(self, text: str) -> None:
        """Print a line of its own."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The task has ended."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _name(now: "Progress") -> str:
    return f"{now.task} {now.how}"


def _left(now: "Progress") -> str:
    done = now.done - now.known
    if not done:
        return ""
    return f"{duration(now.seconds / done * (now.total - now.done))} left, "


def _figures(now: "Progress") -> str:
    import mlx.core as mx

    score = "" if now.score is None else f"score {now.score:.1f}, "
    return f"{score}peak {mx.get_peak_memory() / 1e9:.2f} GB"
