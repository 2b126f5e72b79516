"""From steps to what is told of them: means over tokens, speed, the experts' load."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mm1_mlx.training.trainer import Progress

# Metrics that are counted, so that a step's are the sum of its micro-batches'.
COUNTS = ("tokens", "row_tokens", "expert_tokens")
# Means over the learned tokens, so that their own mean is weighted by "tokens".
_PER_TOKEN = ("text", "accuracy")
# What holds until it changes: the last one is told.
_LAST = ("rate",)


@dataclass(frozen=True)
class Summary:
    """Several steps together.

    metrics: means. tokens_per_second: of the rows, pictures and questions included;
    learned_per_second: of the answers; None where the stage does not count them.
    expert_load: for each layer with experts the share of tokens that each expert got,
    or None. peak_memory: GB (10^9 bytes) that MLX used at most, in this process.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    learned_per_second: float | None = None
    expert_load: list[list[float]] | None = None
    peak_memory: float = 0.0


class Meter:
    """Takes in steps; `take` gives what they were together, and begins anew."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._seconds = 0.0
        self._counted: dict[str, float] = dict.fromkeys(COUNTS, 0.0)
        self._experts: list[list[float]] | None = None

    def add(self, now: "Progress") -> None:
        """Take in a step."""
        for name, value in now.metrics.items():
            weight = now.metrics.get("tokens", 1.0) if name in _PER_TOKEN else 1.0
            total, weights = self._sums.get(name, (0.0, 0.0))
            if name in _LAST:
                total, weights = 0.0, 0.0
            self._sums[name] = total + value * weight, weights + weight
            if name in COUNTS:
                self._counted[name] += value
        self._seconds += now.step_seconds
        if (new := now.arrays.get("expert_tokens")) is not None:
            old = self._experts or [[0.0] * len(layer) for layer in new]
            self._experts = [
                [a + b for a, b in zip(*layers, strict=True)]
                for layers in zip(old, new, strict=True)
            ]

    def take(self) -> Summary:
        """The steps since the last time."""
        found = Summary(
            metrics={n: t / w if w else 0.0 for n, (t, w) in self._sums.items()},
            tokens_per_second=self._speed("row_tokens"),
            learned_per_second=self._speed("tokens"),
            expert_load=self._experts and [_shares(x) for x in self._experts],
            peak_memory=mx.get_peak_memory() / 1e9,
        )
        self._begin()
        return found

    def _speed(self, name: str) -> float | None:
        counted = self._counted[name]
        return counted / self._seconds if counted and self._seconds else None


def _shares(counts: list[float]) -> list[float]:
    total = sum(counts) or 1.0
    return [round(count / total, 4) for count in counts]


class MetricsLog:
    """metrics.jsonl: a JSON object for every step.

    file: where to write, or None to write nothing. every: steps between the experts'
    loads, each over all steps since the one before.
    """

    def __init__(self, file: Path | None, every: int):
        self._file, self._every = file, every
        self._meter = Meter()

    def note(self, step: int, values: dict) -> None:
        """Write a line about a step."""
        if self._file is None or not values:
            return
        with self._file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")

    def take(self, now: "Progress") -> None:
        """Write a step's line: its metrics, seconds, tokens per second, peak memory
        in GB, and now and then the experts' load."""
        self._meter.add(now)
        line: dict = {**now.metrics, "seconds": round(now.step_seconds, 4)}
        if "row_tokens" in now.metrics:
            tokens = now.metrics["row_tokens"]
            line["tokens_per_second"] = round(tokens / max(now.step_seconds, 1e-9), 1)
        line["peak_memory"] = round(mx.get_peak_memory() / 1e9, 4)
        if now.step % self._every == 0 or now.step == now.steps:
            load = self._meter.take().expert_load
            line |= {"expert_load": load} if load else {}
        self.note(now.step, line)
