"""Runs one after the other, or some beside each other, each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.ablations.plan import Run, Size
from examples.ablations.work import result_of
from mm1_mlx.cli.progress import duration, progress_bar, shows
from mm1_mlx.errors import MM1Error

DONE = "done "  # a worker's lines: this and a share
LINE_EVERY = 60.0  # seconds between lines, where there is no terminal


@dataclass
class _Worker:
    """A process that works on a run, and what it last told."""

    run: Run
    process: subprocess.Popen
    share: float = 0.0
    said: list[str] = field(default_factory=list)
    asked: bool = False  # to end

    def listen(self) -> None:
        """Read its lines until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(DONE):
                self.share = float(line[len(DONE) :])
            elif line.strip():
                self.said.append(line.strip())


class Pool:
    """Works a list of runs off.

    Time left is reckoned with what runs are expected to take. tell: receives a line
    now and then. stop: asked often; True lets the running ones save and end.
    """

    def __init__(
        self,
        folder: Path,
        runs: Sequence[Run],
        size: Size,
        *,
        flags: Sequence[str],
        workers: int,
        tell: Callable[[str], None],
        stop: Callable[[], bool],
    ):
        self._folder, self._size, self._flags = folder, size, list(flags)
        self._workers, self._tell, self._stop = workers, tell, stop
        self._all = list(runs)
        self._done = {run for run in runs if result_of(folder, run, size)}
        self._waiting = [run for run in runs if run not in self._done]
        self._busy: list[_Worker] = []
        self._began = time.monotonic()
        self._worked = 0.0  # cost of what this call has finished
        self._told = 0.0

    def work(self) -> bool:
        """Whether all runs are done; False where it was stopped. MM1Error where a run
        failed: the others that were running are let save first."""
        total = sum(run.cost for run in self._all)
        bar = progress_bar(round(60 * total), "ablations", unit="s")
        if before := len(self._done):
            self._tell(f"{before} of {len(self._all)} runs are there")
        shown = 0
        try:
            while self._busy or (self._waiting and not self._stop()):
                if not self._stop():
                    self._start_some()
                time.sleep(0.2)
                for worker in [w for w in self._busy if w.process.poll() is not None]:
                    bar.clear()
                    self._ended(worker)
                if shows(bar):
                    now = round(60 * (total - self._left()))
                    bar.update(now - shown)
                    shown = now
                self._say_now_and_then(bar)
                if self._stop():
                    self._end_all()
        finally:
            bar.close()
            self._end_all()
            for worker in self._busy:
                worker.process.wait()
        return not self._waiting

    def _start_some(self) -> None:
        """Give free workers the first runs whose parts are there."""
        for run in list(self._waiting):
            if len(self._busy) >= self._workers:
                return
            if all(part in self._done for part in run.needs):
                self._waiting.remove(run)
                self._busy.append(self._start(run))

    def _start(self, run: Run) -> _Worker:
        command = [sys.executable, "-m", "examples.ablations", "one", run.name]
        command += ["--out", str(self._folder), *self._flags]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Two processes with as many threads as cores each would fight for them.
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # Ctrl-C comes from here, as a termination
        )
        worker = _Worker(run, process)
        threading.Thread(target=worker.listen, daemon=True).start()
        return worker

    def _ended(self, worker: _Worker) -> None:
        self._busy.remove(worker)
        run = worker.run
        found = result_of(self._folder, run, self._size)
        if found is None:
            self._waiting.insert(0, run)
            if self._stop():
                return
            last = worker.said[-1] if worker.said else "it said nothing"
            code = worker.process.returncode
            raise MM1Error(f"{run.name} ended with {code}: {last}")
        self._done.add(run)
        self._worked += run.cost
        spent = duration(found["seconds"]["wall"])
        self._tell(
            f"[{len(self._done)}/{len(self._all)}] {run.name}: {summary(found)}, "
            f"{spent}{self._time_left()}"
        )
        self._told = time.monotonic()

    def _left(self) -> float:
        """Cost of what is not done."""
        busy = sum(w.run.cost * (1 - w.share) for w in self._busy)
        return sum(run.cost for run in self._waiting) + busy

    def _time_left(self) -> str:
        busy = sum(w.run.cost * w.share for w in self._busy)
        if (worked := self._worked + busy) <= 0 or not (left := self._left()):
            return ""
        return f"; {duration((time.monotonic() - self._began) * left / worked)} left"

    def _say_now_and_then(self, bar: Any) -> None:
        if shows(bar) or not self._busy or time.monotonic() - self._told < LINE_EVERY:
            return
        self._told = time.monotonic()
        now = ", ".join(f"{w.run.name} {100 * w.share:.0f}%" for w in self._busy)
        self._tell(f"{now}{self._time_left()}")

    def _end_all(self) -> None:
        """Ask those that run to save and end, once."""
        for worker in self._busy:
            if worker.process.poll() is None and not worker.asked:
                worker.process.send_signal(signal.SIGTERM)
                worker.asked = True


def summary(found: dict[str, Any]) -> str:
    """A run's result in a few words."""
    if found["kind"] != "joint":
        return f"loss {found['curve'][-1][1]:.3f}"
    from examples.ablations.measure import MEASURES, share

    shares = (
        f"{name} {100 * share(found, key):.0f}%" for key, name in MEASURES.items()
    )
    return ", ".join(shares)
