"""One measured training run of ours, in a process of its own.

`python -m mm1_mlx.benchmarks.train_side TASK`: TASK and the last line of stdout are
JSON objects with the keys of Task and Side.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1_mlx.benchmarks.peers.side_kit import process_memory, tell

if TYPE_CHECKING:
    from mm1_mlx.training.trainer import Progress
    from mm1_mlx.training.tuning import TuneSettings


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and how; the same for every side.

    model, data: folders. out: where the adapter goes. updates: of the optimizer, in
    `accumulate` micro-batches of `batch` samples each. rank, alpha: of pairs beside all
    linear layers of the decoder. rate: of AdamW. recompute: gradient checkpointing.
    evidence: also say what the samples are and what they cost before training.
    settings: more of ours (TuneSettings).
    """

    model: str
    data: str
    out: str
    updates: int
    accumulate: int = 1
    batch: int = 1
    rank: int = 8
    alpha: float = 16.0
    rate: float = 1e-5
    recompute: bool = False
    evidence: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Side:
    """What a run took.

    seconds, cpu, losses: of each update; cpu is that of all threads. loaded, peak:
    bytes that MLX held before the first update, and most ever after. process: most
    bytes of the process, the loading included. trained: parameters. ids, learned,
    before: of each sample, with evidence: its tokens, how many of them are learned,
    and the mean loss of all. before_causal: mlx-vlm's loss with a causal mask.
    """

    seconds: list[float]
    cpu: list[float]
    losses: list[float]
    loaded: int
    peak: int
    process: int
    trained: int
    versions: dict[str, str]
    ids: list[list[int]] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    before: float = 0.0
    before_causal: float = 0.0


class Clock:
    """What an update took, asked after each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self._last = time.perf_counter(), time.process_time()

    def __call__(self, now: "Progress") -> None:
        """What a trainer calls."""
        wall, work = time.perf_counter(), time.process_time()
        self.seconds.append(wall - self._last[0])
        self.cpu.append(work - self._last[1])
        self.losses.append(now.metrics["text"])
        self._last = wall, work


def measure(task: Task) -> Side:
    """Train as `python -m mm1_mlx.lora` does; what was measured."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mm1_mlx._version import __version__
    from mm1_mlx.adapters.layers import PairSettings
    from mm1_mlx.adapters.targets import Plan, Target
    from mm1_mlx.loading import load
    from mm1_mlx.training.conversations import open_train
    from mm1_mlx.training.tuning_run import tune

    model, processor = load(task.model)
    mx.eval(model.parameters())
    settings = _settings(task)
    samples = open_train(Path(task.data))
    found: dict[str, Any] = {}
    if task.evidence:
        found = _before(model, processor, samples, settings)
    mx.clear_cache()
    loaded = mx.get_active_memory()
    mx.reset_peak_memory()
    pairs = Target(pairs=PairSettings(rank=task.rank, scale=task.alpha / task.rank))
    plan = Plan(parts={"attention": pairs, "mlp": pairs})
    clock, out, never = Clock(), Path(task.out), 10**6
    tune(
        model,
        processor,
        samples,
        out,
        plan,
        settings,
        save_every=never,
        report=clock,
    )
    flat: Any = tree_flatten(model.trainable_parameters())
    return Side(
        seconds=clock.seconds,
        cpu=clock.cpu,
        losses=clock.losses,
        loaded=loaded,
        peak=mx.get_peak_memory(),
        process=process_memory(),
        trained=sum(array.size for _, array in flat),
        versions={"mm1_mlx": __version__, "mlx": version("mlx")},
        **found,
    )


def _settings(task: Task) -> "TuneSettings":
    from mm1_mlx.training.tuning import TuneSettings

    return TuneSettings(
        steps=task.updates,
        batch=task.batch * task.accumulate,
        accumulate=task.accumulate,
        learning_rate=task.rate,
        warmup=0,
        floor=1.0,
        recompute=task.recompute,
        **task.settings,
    )


def _before(model: Any, processor: Any, samples: Any, settings: Any) -> dict[str, Any]:
    """Ids and loss of every sample before training."""
    from mm1_mlx.training.conversations import lesson_of
    from mm1_mlx.training.held_out import losses_of
    from mm1_mlx.training.tuning import TuneStage

    lessons = [lesson_of(samples[n], processor) for n in range(len(samples))]
    stage = TuneStage(model, processor, samples, settings, seed=0)
    return {
        "ids": [lesson.ids for lesson in lessons],
        "learned": [sum(lesson.learned) for lesson in lessons],
        "before": losses_of(stage, stage.samples, "all")["all"],
    }


if __name__ == "__main__":
    tell(asdict(measure(Task(**json.loads(sys.argv[1])))))
