"""How an answer is timed; the very same code for our side and for every peer's.

Only the standard library is imported, and nothing of mm1_mlx: other Pythons run it.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, the same for every side.

    model: a folder. ids: the prompt's tokens; where it is empty, prompt and image (a
    file) are asked through the side's own chat template. tokens: of each answer. rows:
    also decode so many rows together, and one by one (ours). again: another picture and
    two questions about it, to time what is reused (ours).
    """

    model: str
    ids: list[int] = field(default_factory=list)
    prompt: str = ""
    image: str = ""
    tokens: int = 16
    rows: int = 0
    again: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Answer:
    """What an answer took, in seconds; and what it was.

    read: prompt and picture, from the file to arrays. encode: encoder and connector,
    timed in calls of their own (the median of three); 0 without a picture. ttft: from
    the question to the first token, all of it included. after: from the first token to
    the last. cpu: seconds of all the process's threads, in ttft and in after. ids,
    tokens: of the prompt and of the answer. logprobs: of these tokens. loaded, peak:
    bytes that MLX held before and at most, or None. process: most bytes of the process,
    the loading included. more: of our own side, see generate_side.
    """

    read: float
    encode: float
    ttft: float
    after: float
    cpu: tuple[float, float]
    ids: list[int]
    tokens: list[int]
    logprobs: list[float]
    loaded: int | None
    peak: int | None
    process: int
    versions: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def prefill(self) -> float:
        """Seconds that the prompt took in the decoder, up to the first token.

        What is left of ttft; NaN where nothing is, as on a machine that is disturbed.
        """
        left = self.ttft - self.read - self.encode
        return left if left > 0 else float("nan")

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, image tokens included."""
        return len(self.ids) / self.prefill

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first; NaN where there is only one."""
        count = len(self.tokens) - 1
        return count / max(self.after, 1e-9) if count else float("nan")

    @property
    def cpu_per_token(self) -> float:
        """CPU seconds of a token after the first; NaN where there is only one."""
        count = len(self.tokens) - 1
        return self.cpu[1] / count if count else float("nan")


class Side(Protocol):
    """A program with its model loaded."""

    versions: dict[str, str]

    def read(self, task: Task) -> Any:
        """Prompt and picture as arrays, whatever the program takes."""
        ...

    def ids(self, inputs: Any) -> list[int]:
        """The tokens of the prompt, one for each place of a picture."""
        ...

    def encode(self, inputs: Any) -> None:
        """Encoder and connector, evaluated."""
        ...

    def stream(self, inputs: Any, tokens: int) -> Iterator[tuple[int, Any]]:
        """The greedy answer of so many tokens; beside each what `logprob` needs."""
        ...

    def logprobs(self, inputs: Any, answer: list[tuple[int, Any]]) -> list[float]:
        """The log-probability of each token of an answer."""
        ...

    def memory(self, *, reset: bool = False) -> tuple[int | None, int | None]:
        """Bytes held now, and most since the last reset."""
        ...

    def settle(self) -> None:
        """Wait for what was begun ahead of an answer's last token."""
        ...


def measure(side: Side, task: Task) -> Answer:
    """Ask once, after an answer of two tokens that is not counted."""
    short = replace(task, ids=task.ids[:16])  # compiles as much as the whole
    inputs = side.read(short)
    encode = 0.0
    if task.image:  # first of all: nothing else is under way
        side.encode(inputs)
        encode = statistics.median(seconds(side.encode, inputs) for _ in range(3))
    list(side.stream(inputs, 2))
    side.settle()
    loaded, _ = side.memory(reset=True)
    start, work = time.perf_counter(), time.process_time()
    inputs = side.read(task)
    read = time.perf_counter() - start
    answer, times, works = [], [], []
    for pair in side.stream(inputs, task.tokens):
        times.append(time.perf_counter())
        works.append(time.process_time())
        answer.append(pair)
    _, peak = side.memory()
    side.settle()
    return Answer(
        read=read,
        encode=encode,
        ttft=times[0] - start,
        after=times[-1] - times[0],
        cpu=(works[0] - work, works[-1] - works[0]),
        ids=side.ids(inputs),
        tokens=[token for token, _ in answer],
        logprobs=side.logprobs(inputs, answer),
        loaded=loaded,
        peak=peak,
        process=process_memory(),
        versions=side.versions,
    )


def seconds(work: Callable[..., Any], *given: Any) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start


class MLXMemory:
    """`memory` and `logprobs` of a side that runs on MLX."""

    def memory(self, *, reset: bool = False) -> tuple[int | None, int | None]:
        """Bytes held now, and most since the last reset."""
        import mlx.core as mx

        if reset:
            mx.clear_cache()
            mx.reset_peak_memory()
        return mx.get_active_memory(), mx.get_peak_memory()

    def logprobs(self, inputs: Any, answer: list[tuple[int, Any]]) -> list[float]:
        """Of each token, from the step's own log-probabilities (V,)."""
        return [float(values[token].item()) for token, values in answer]


def wire_memory() -> None:
    """On Metal, keep the weights resident, as every program's own command does."""
    import mlx.core as mx

    if mx.metal.is_available():
        info: Any = getattr(mx, "device_info", None) or mx.metal.device_info
        mx.set_wired_limit(int(info()["max_recommended_working_set_size"]))


def process_memory() -> int:
    """Most memory that the process ever held, in bytes.

    Linux's getrusage also counts the process that started this one, up to exec; so
    there it is asked for elsewhere.
    """
    with suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main(open_side: Callable[[Task], Side]) -> None:
    """Read the task from argv, measure, and print the answer."""
    task = Task(**json.loads(sys.argv[1]))
    tell(asdict(measure(open_side(task), task)))


def tell(result: dict[str, Any]) -> None:
    """The result as the last line of stdout."""
    sys.stdout.write("\n" + json.dumps(result) + "\n")
