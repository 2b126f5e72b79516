"""A progress bar on a terminal, and nothing elsewhere: there a command writes lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_SLOW = 1.0  # seconds: what takes longer is worth a bar


class _NoBar:
    """Takes what a bar takes and shows nothing."""

    def update(self, n: int = 1) -> None:
        """Some steps are done."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands behind the bar."""

    def clear(self) -> None:
        """Make room for a line."""

    def close(self) -> None:
        """The work has ended."""


def progress_bar(
    total: int,
    what: str,
    *,
    initial: int = 0,
    unit: str = "it",
    scale: bool = False,
    leave: bool = True,
    stream: TextIO | None = None,
) -> Any:
    """A tqdm bar on stderr (or `stream`), where that is a terminal and tqdm is there.

    Else something with the same update, set_postfix_str, clear and close that shows
    nothing; `shows(bar)` tells which. scale: show large numbers as k, M, G. leave: it
    stays in sight when it is closed.
    """
    out = stream if stream is not None else sys.stderr
    if not _is_terminal(out):
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(
        total=total,
        desc=what,
        initial=initial,
        unit=unit,
        unit_scale=scale,
        leave=leave,
        file=out,
        dynamic_ncols=True,
        smoothing=0.05,
    )


def _is_terminal(out: TextIO | None) -> bool:
    try:
        return out is not None and out.isatty()  # None: without a console
    except ValueError:  # closed
        return False


def shows(bar: Any) -> bool:
    """Whether this bar can be seen; if not, the command writes lines instead."""
    return not isinstance(bar, _NoBar)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min": as long as it takes to say it well enough."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def conversion_progress() -> dict[str, Any]:
    """`tell` and `progress` for load: lines and a bar on stderr while it converts."""
    bar: Any = None
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal bar, shown
        if bar is None:
            bar = progress_bar(total, "convert", unit="B", scale=True)
        bar.update(done - shown)
        shown = done
        if done >= total:
            bar.close()

    return {"tell": lambda line: print(line, file=sys.stderr), "progress": progress}


class SlowBar:
    """A `progress(done, total)` that shows a bar once the work has taken a while.

    It begins where nothing is done yet, and is gone when all is.
    """

    def __init__(self, what: str, unit: str):
        self._what, self._unit = what, unit
        self._bar: Any = None
        self._began, self._shown = 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        if not done:
            self.close()
            self._began = time.perf_counter()
        elif done >= total:
            self.close()
        elif self._bar is not None:
            self._bar.update(done - self._shown)
            self._shown = done
        elif time.perf_counter() - self._began >= _SLOW:
            how: dict[str, Any] = {"unit": self._unit, "leave": False}
            self._bar = progress_bar(total, self._what, initial=done, **how)
            self._shown = done

    def close(self) -> None:
        """Take the bar away; the work may have failed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def encoder_bar(wanted: bool) -> Iterator[SlowBar | None]:
    """The on_images of generate; None where it is not wanted, or nobody would see."""
    if not wanted or not _is_terminal(sys.stderr):
        yield None
        return
    bar = SlowBar("reading pictures", "layer")
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A `progress(done, total)` that moves a bar on stderr."""
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = progress_bar(total, what)
        bar.update(1)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
