"""What the commands that train share: stopping, telling, and staying awake."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mm1_mlx.cli.progress import duration, progress_bar, shows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.training.meter import Summary
    from mm1_mlx.training.trainer import Progress

# What metrics are called where they are shown, in this order.
_NAMES = {"text": "loss", "loss": "loss", "accuracy": "", "valid": "", "rate": ""}
_HELD = {"valid", "task_accuracy", "task_right", "task_samples"}  # of an evaluation
_UNTOLD = {"tokens", "row_tokens", "max_load", *_HELD}
_BARS = "·▁▂▃▄▅▆▇█"  # from almost none to twice the even share and more
_ROOM = 64  # experts that a line has room for
_PATIENCE = 20  # seconds without a line


class StopOnSignal:
    """`asked()` is true after Ctrl-C or a termination; a second one ends at once.

    A lost terminal counts, too: mlx.launch's Ctrl-C comes to other machines so.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._tells = is_first_process()

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked.is_set()

    def __enter__(self) -> "StopOnSignal":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's wish
            numbers.append(signal.SIGHUP)
        self._old = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def _ask(self, number, frame) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        if self._tells:
            with suppress(OSError):  # not print, which may be in the middle of a line
                os.write(2, b"\nstopping after this step, saved; again: at once\n")

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Reporter:
    """Shows the state of a run: a bar on a terminal, else a line now and then."""

    def __init__(self, every: int):
        self._every = every
        self._stage = ""
        self._bar: Any = None
        self._meter: Any = None
        self._held: dict[str, float] = {}
        self._split = ""  # that is being measured
        self._measure: Any = None  # its bar
        self._measured = 0  # samples of it
        self._told = 0.0  # when a line of it was last shown

    def line(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def step(self, now: "Progress") -> None:
        """Take in a step; show what the steps since the last time shown were."""
        if now.stage != self._stage:
            self._begin(now)
        self._meter.add(now)
        self._bar.update(1)
        visible, last = shows(self._bar), now.step == now.steps
        evaluated = last or not _HELD.isdisjoint(now.metrics)
        if now.step % (10 if visible else self._every) and not evaluated:
            return
        found = self._meter.take()
        self._held |= {n: v for n, v in found.metrics.items() if n in _HELD}
        if visible:  # what is measured now and then stays in sight
            words = told(self._held | found.metrics, short=True)
            words = [*words, _pace(found, short=True)]
            self._bar.set_postfix_str(", ".join(words))
        else:
            words = " ".join(told(found.metrics))
            pace = f"{self._eta(now)}, {_pace(found)}"
            self.line(f"{now.stage} {now.step}/{now.steps} {words} | {pace}")
        if found.expert_load and (evaluated or not visible):
            for text in load_lines(found.expert_load, whole=evaluated):
                self.line(text)

    def measured(self, split: str, done: int, total: int) -> None:
        """Samples of a held-out split were measured: a bar, or a line now and then."""
        if split != self._split:
            self._split, self._told, self._measured = split, time.monotonic(), 0
            self._measure = progress_bar(total, split, unit="sample", leave=False)
        self._measure.update(done - self._measured)
        self._measured = done
        hidden = not shows(self._measure)
        if hidden and time.monotonic() - self._told >= _PATIENCE and done < total:
            self._told = time.monotonic()
            self.line(f"{split}: {done} of {total} samples")
        if done >= total:
            self._end_measure()

    def _end_measure(self) -> None:
        if self._measure is not None:
            self._measure.close()
        self._measure, self._split = None, ""

    def _begin(self, now: "Progress") -> None:
        from mm1_mlx.training.meter import Meter

        self.close()
        self._stage, self._first, self._meter = now.stage, now.step - 1, Meter()
        self._held = {}
        self._bar = progress_bar(now.steps, now.stage, initial=self._first, unit="step")

    def _eta(self, now: "Progress") -> str:
        done = max(now.step - self._first, 1)
        left = now.seconds / done * (now.steps - now.step)
        rate = now.examples / max(now.seconds, 1e-9)
        return f"{duration(now.seconds)}, {duration(left)} left, {rate:.1f} examples/s"

    def close(self) -> None:
        """Take the bars away."""
        self._end_measure()
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._stage = ""


def told(m: dict[str, float], *, short: bool = False) -> list[str]:
    """Metrics in words, the most wanted first; short: for a bar."""
    names = [n for n in _NAMES if n in m]
    if not short:
        names += [n for n in m if n not in _NAMES and n not in _UNTOLD]
    form = ".3g" if short else ".4g"
    words = [f"{_NAMES.get(n) or n} {m[n]:{form}}" for n in names]
    if "task_right" in m:
        of = "/" if short else " of "
        words.append(f"right {m['task_right']:.0f}{of}{m['task_samples']:.0f}")
    return words


def _pace(found: "Summary", *, short: bool = False) -> str:
    """Speed and memory: "812 tokens/s (96 learned), peak 2.13 GB"."""
    words, speed = [], found.tokens_per_second
    if speed is not None and short:
        words.append(f"{speed:.0f} tok/s")
    elif speed is not None:
        learned = found.learned_per_second
        more = f" ({learned:.0f} learned)" if learned is not None else ""
        words.append(f"{speed:.0f} tokens/s{more}")
    return ", ".join([*words, f"peak {found.peak_memory:.2f} GB"])


def load_lines(load: list[list[float]], *, whole: bool = True) -> list[str]:
    """How the tokens of each layer with experts fall on them, as bars.

    load: shares, a list for each layer. whole: every layer; else one line, which holds
    all layers where they are few, or the most uneven one.
    """
    most = [max(layer) for layer in load]
    worst = most.index(max(most))
    short = sum(map(len, load)) <= _ROOM
    head = f"experts ({_BARS[4]} even, {_BARS[8]} twice that)"
    if short:
        bars = "  ".join(f"{i} {bar(layer)}" for i, layer in enumerate(load, 1))
        return [f"{head}: {bars}  most {most[worst]:.0%} (layer {worst + 1})"]
    if not whole:
        shown = f"layer {worst + 1} of {len(load)} {bar(load[worst])}"
        return [f"{head}: most {most[worst]:.0%}, {shown}"]
    return [f"{head}:"] + [
        f"  {i:>3} {bar(layer)} {min(layer):.1%} to {max(layer):.1%}"
        for i, layer in enumerate(load, 1)
    ]


def bar(shares: list[float]) -> str:
    """Shares as one character each, of their even share."""
    return "".join(_BARS[min(round(4 * s * len(shares)), 8)] for s in shares)


def is_first_process() -> bool:
    """Whether this process is the one that writes and tells."""
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


@contextmanager
def awake() -> Iterator[None]:
    """A Mac does not fall asleep by itself meanwhile (caffeinate)."""
    command = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if command is None:
        yield
        return
    with subprocess.Popen([command, "-i", "-m", "-w", str(os.getpid())]) as helper:
        try:
            yield
        finally:
            helper.terminate()
            try:
                helper.wait(timeout=5)
            except subprocess.TimeoutExpired:  # no reason not to end
                helper.kill()
