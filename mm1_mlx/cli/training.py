"""What the commands that train share: stopping, telling, and staying awake."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mm1_mlx.cli.progress import duration, progress_bar, shows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.training.trainer import Progress


class StopOnSignal:
    """`asked()` is true after Ctrl-C or a termination; a second one ends at once."""

    def __init__(self):
        self._asked = threading.Event()

    def asked(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> "StopOnSignal":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._old = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def _ask(self, number, frame) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Reporter:
    """Shows the state of a run: a bar on a terminal, else a line now and then."""

    def __init__(self, every: int):
        self._every = every
        self._stage = ""
        self._bar: Any = None
        self._seen: dict[str, list[float]] = {}

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def step(self, now: "Progress") -> None:
        """Take in a step's metrics; show their means since the last time shown."""
        if now.stage != self._stage:
            self.close()
            self._stage, self._first = now.stage, now.step - 1
            self._bar = progress_bar(
                now.steps, now.stage, initial=self._first, unit="step"
            )
        for name, value in now.metrics.items():
            self._seen.setdefault(name, []).append(value)
        self._bar.update(1)
        visible = shows(self._bar)
        if now.step % (10 if visible else self._every) and now.step != now.steps:
            return
        told = " ".join(
            f"{name} {sum(values) / len(values):.4g}"
            for name, values in self._seen.items()
        )
        self._seen = {}
        if visible:
            self._bar.set_postfix_str(f"{told}, {_gigabytes()}")
        else:
            self.line(f"{now.stage} {now.step}/{now.steps} {told} | {self._pace(now)}")

    def _pace(self, now: "Progress") -> str:
        done = max(now.step - self._first, 1)
        left = now.seconds / done * (now.steps - now.step)
        rate = now.examples / max(now.seconds, 1e-9)
        return (
            f"{duration(now.seconds)}, {duration(left)} left, {rate:.1f} examples/s, "
            f"{_gigabytes()}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._seen = {}


def _gigabytes() -> str:
    import mlx.core as mx

    return f"{mx.get_peak_memory() / 1e9:.2f} GB"


def is_first_process() -> bool:
    """Whether this process is the one that writes and tells."""
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


@contextmanager
def awake() -> Iterator[None]:
    """A Mac does not fall asleep meanwhile, lid open or on power (caffeinate)."""
    command = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if command is None:
        yield
        return
    with subprocess.Popen([command, "-i", "-m", "-w", str(os.getpid())]) as helper:
        try:
            yield
        finally:
            helper.terminate()
