"""A fine-tuning run from a model and samples to an adapter."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.adapters.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    adapter_weights,
    check_adapter_target,
    write_adapter,
)
from mm1_mlx.adapters.targets import Plan, adapt, summary, table
from mm1_mlx.checkpoint.disk import locked
from mm1_mlx.checkpoint.folder import replacing_file, write_json
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.inference.identity import fingerprint as fingerprint_of_model
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import plural
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.processes import (
    bytes_from_first,
    from_first,
    is_first,
    sums,
    together,
    total,
    world,
)
from mm1_mlx.training.held_out import check_read, losses_of
from mm1_mlx.training.memory_plan import MemoryWish, plan_memory
from mm1_mlx.training.mixtures import Mixture, fingerprint
from mm1_mlx.training.resuming import check_changes
from mm1_mlx.training.samples import Samples
from mm1_mlx.training.state import load_state
from mm1_mlx.training.trainer import Progress, Trainer, changes
from mm1_mlx.training.tuning import TuneSettings, TuneStage
from mm1_mlx.training.watching import Watch, Watcher

CHECKPOINT = "tune.safetensors"
METRICS = "metrics.jsonl"
RUN_FILE = "run.json"
# Of the adapter's config; how pictures are read stands in a run's settings.
_NOT_OF_PLAN = ("version", "base", "resolution", "max_tiles")


def _silent(*_: Any) -> None:
    """What every process but the first tells."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run is asked for beside how it learns.

    base: what the model is called. valid: held out, measured every valid_every steps;
    valid_samples: of each source. test: measured whole, after the last step.
    save_every: steps between checkpoints. resume: go on from the checkpoint, exactly as
    if the run had never ended; force: also with other settings, data or model, where
    the arrays fit. until: end at this step, saved. memory: plan it first, and refuse
    what does not fit; None: neither. watch: what else is measured.

    tell: receives lines. report: the state after every step, with "valid" where it was
    measured. measured: receives a held-out split's name, its samples done, and all.
    tested: what is measured beside the steps: the losses of `test`. stop: asked after
    every step; True saves and ends the run, or the measuring of `test`.
    """

    base: str = ""
    valid: Samples | Mixture | None = None
    test: Samples | Mixture | None = None
    valid_every: int = 100
    valid_samples: int = 64
    save_every: int = 100
    seed: int = 0
    resume: bool = False
    force: bool = False
    until: int | None = None
    memory: MemoryWish | None = None
    watch: Watch | None = None
    tell: Callable[[str], None] = _silent
    report: Callable[[Progress], None] = _silent
    measured: Callable[[str, int, int], None] = _silent
    tested: Callable[[dict[str, float]], None] = _silent
    stop: Callable[[], bool] = lambda: False


def tune(
    model: MM1,
    processor: Processor,
    samples: Samples | Mixture,
    out: Path,
    plan: Plan,
    settings: TuneSettings,
    **asked: Any,
) -> bool:
    """Train an adapter in place and write it into `out`; False if it was stopped.

    model: is given the plan's adapter, and has it trained at the end. asked: fields of
    Asked. With several processes (mlx.launch) each makes its share of every batch, all
    are given the same, and the first one reads and writes `out` and tells.

    Raises ConfigError, DatasetError, CheckpointError; MM1Error at a loss of NaN, or
    where the memory does not do.
    """
    wishes = Asked(**asked)
    if not is_first():
        silent = ("tell", "report", "measured", "tested")
        wishes = replace(wishes, **dict.fromkeys(silent, _silent))
    with _alone_in(out):
        return _Run(model, processor, samples, out, plan, settings, wishes).go()


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """No other run works in the folder meanwhile. It is made where there is none, and
    goes again where nothing comes into it."""
    with ExitStack() as stack:
        try:
            with together():
                if is_first() and (not out.exists() or out.is_dir()):
                    out.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(out))
            yield
        finally:
            if is_first():
                with suppress(OSError):
                    out.rmdir()  # of an empty folder


class _Run:
    def __init__(
        self,
        model: MM1,
        processor: Processor,
        samples: Samples | Mixture,
        out: Path,
        plan: Plan,
        settings: TuneSettings,
        asked: Asked,
    ):
        self._model, self._out, self._asked = model, out, asked
        given = (settings.resolution, settings.max_tiles) != (None, None)
        reads: Any = settings if given else processor
        self._config = adapter_config(
            plan, asked.base, reads.resolution, reads.max_tiles
        )
        with together():
            resume = is_first() and _check_target(out, asked.resume, asked.tell)
        self._resume = bool(from_first(mx.array(int(resume))).item())
        with together():
            known = fingerprint_of_model(model)
            adapt(model, plan, asked.seed)
        memory = asked.memory
        if memory is not None and self._resume:
            settings, memory = _chosen_before(out / CHECKPOINT, settings, memory)
        with together():
            self._stage = TuneStage(model, processor, samples, settings, asked.seed)
            self._held = check_read(
                self._stage, asked.valid_samples, valid=asked.valid, test=asked.test
            )
            recipe = self._recipe() | {"base": known}
        self._check_same(recipe)
        if memory is not None:
            asked.tell(plan_memory(self._stage, memory, asked.seed).line())
            recipe["settings"] = _as_stored(self._stage.settings.to_dict())
        with together():
            if self._resume and is_first():
                whole = recipe | {"seed": asked.seed}
                check_changes(out / CHECKPOINT, whole, asked.force, asked.tell)
            facts = {"recipe": recipe}
            self._trainer = Trainer(self._stage, out, asked.seed, facts)
            self._watcher = Watcher(
                self._stage,
                self._held.get("valid"),
                asked.watch or Watch(),
                out,
                asked.tell,
            )

    def go(self) -> bool:
        """Train to the end, or to where the run is stopped."""
        a, trainer = self._asked, self._trainer
        self._watcher.before(self._resume)
        self._begin()
        self._watcher.begin(self._out / METRICS)
        self._make_up()

        def finished() -> bool:
            return a.stop() or (a.until is not None and trainer.step >= a.until)

        reached = a.until is not None and trainer.step >= a.until
        for now in () if reached else trainer.run(a.save_every, finished):
            if now.saved:
                self._write()
            if self._validates(now.step):
                now.metrics |= self._losses("valid", a.valid_samples)
            self._watcher.step(now)
            a.report(now)
        tell_dropped(self._stage, a.tell)
        done = trainer.step == self._stage.settings.steps
        if done and "test" in self._held:
            self._test()
        self._model.eval()
        self._watcher.after(done)
        return done

    def _validates(self, step: int) -> bool:
        """Whether the loss of held-out samples is due after a step."""
        last = step == self._stage.settings.steps
        return "valid" in self._held and (step % self._asked.valid_every == 0 or last)

    def _make_up(self) -> None:
        """What was due after the checkpoint's step, where the run was ended before it
        was measured and written down."""
        step, file = self._trainer.step, self._out / METRICS
        if not self._resume or not step:
            return
        known: dict[str, Any] = {}
        with together():
            if is_first() and file.exists():
                known = _by_step(file.read_text(encoding="utf-8")).get(step, {})
        names = ("valid", "task_accuracy")
        flags: Any = from_first(mx.array([int(name in known) for name in names]))
        valid, accuracy = flags.tolist()
        found: dict[str, float] = {}
        if self._validates(step) and not valid:
            found |= self._losses("valid", self._asked.valid_samples)
        if not accuracy:
            found |= self._watcher.due(step)
        if found:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            self._asked.tell(f"after step {step}, made up for: {shown}")
            self._watcher.note(step, found)
            with together():
                if is_first():  # into the step's own line
                    _rewind(file, self._trainer)
            self._asked.tested(found)

    def _losses(self, split: str, most: int | None) -> dict[str, float]:
        a, mixture = self._asked, self._held[split]
        stop = a.stop if most is None else lambda: False

        def measured(done: int, total: int) -> None:
            a.measured(split, done, total)

        return losses_of(self._stage, mixture, split, most, measured, stop)

    def _test(self) -> None:
        """The losses of the test split, told and logged."""
        tell = self._asked.tell
        found = self._losses("test", None)
        if not found:
            tell("the test was stopped; the same command with --resume measures it")
            return
        self._watcher.note(self._trainer.step, found)
        shown = ", ".join(f"{name} loss {loss:.4g}" for name, loss in found.items())
        tell(f"{shown} ({len(self._held['test'])} samples)")
        self._asked.tested(found)

    def _write(self) -> None:
        with together():
            if is_first():
                write_adapter(self._out, adapter_weights(self._model), self._config)

    def _recipe(self) -> dict[str, Any]:
        """What decides the result of a run, beside its seed and the weights."""
        own = self._config["mm1_mlx"]
        return _as_stored(
            {
                "model": own["base"],
                "plan": {k: v for k, v in own.items() if k not in _NOT_OF_PLAN},
                "settings": self._stage.settings.to_dict(),
                "data": fingerprint(self._stage.samples),
            }
        )

    def _check_same(self, recipe: dict[str, Any]) -> None:
        """ConfigError unless every process was asked for the same."""
        if world().size() == 1:
            return
        a = self._asked
        own = recipe | {
            "seed": a.seed,
            "until": a.until,
            "save": a.save_every,
            "valid": [a.valid_every, a.valid_samples],
            "held": {name: fingerprint(x) for name, x in self._held.items()},
        }
        own = _as_stored(own)
        text = json.dumps(own).encode() if is_first() else None
        first = json.loads(bytes_from_first(text))
        with together():
            if found := changes(first, own):
                raise ConfigError(
                    f"this process was not started as the first one "
                    f"({'; '.join(found[:5])}). Give every process the same command "
                    f"and the same files."
                )

    def _begin(self) -> None:
        """Set the trainer up at its first step, or where the last run was saved."""
        trainer, tell, out = self._trainer, self._asked.tell, self._out
        if self._resume:
            trainer.resume(force=True)  # what it was made with is checked already
            tell(f"going on from step {trainer.step} of {trainer.stage.settings.steps}")
            if trainer.began_anew:
                tell("the optimizer has another kind of state now: it begins anew")
            if (before := trainer.processes_before) != (now := world().size()):
                tell(
                    f"begun with {plural(before, 'process', 'processes')}, going on "
                    f"with {now}: each step has the same samples, but sums are rounded "
                    f"otherwise"
                )
        with together():
            if is_first():
                out.mkdir(parents=True, exist_ok=True)
                if not self._resume:  # first of all: a run that is killed now can go on
                    write_json(out / CONFIG_FILE, self._config)
                    (out / METRICS).unlink(missing_ok=True)
                facts = {"seed": trainer.seed, **self._watcher.notes}
                write_json(out / RUN_FILE, trainer.recipe | facts)
                if self._resume:
                    _rewind(out / METRICS, trainer)
                    write_adapter(out, adapter_weights(trainer.module), self._config)
        tell(table(summary(self._model, self._model.config)))
        tell(_supervised(self._stage, trainer.step))


def _as_stored(values: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(values))


def _chosen_before(
    file: Path, settings: TuneSettings, memory: MemoryWish
) -> tuple[TuneSettings, MemoryWish]:
    """What "auto" chose when the run began, so that it goes on the same."""
    text = None
    with together():
        if is_first():
            facts = load_state(file)[1]
            text = json.dumps(facts.get("recipe", {}).get("settings", {})).encode()
    kept = json.loads(bytes_from_first(text))
    chosen = {name: kept[name] for name in memory.auto if name in kept}
    return replace(settings, **chosen), replace(memory, auto=())


def _check_target(out: Path, resume: bool, tell: Callable[[str], None]) -> bool:
    """Whether there is something to go on from; CheckpointError if it is in the way."""
    if resume and not (out / CHECKPOINT).is_file():
        ours = any((out / name).is_file() for name in (RUN_FILE, CONFIG_FILE))
        if out.exists() and not ours and not (out.is_dir() and not any(out.iterdir())):
            raise CheckpointError(
                f"{out} has no {CHECKPOINT} to go on from. Name the folder of the run "
                f"(--adapter-path), or begin one without --resume."
            )
        tell("nothing was saved yet: beginning with the first step")
        resume = False
    empty = not (out / CHECKPOINT).exists() and not (out / WEIGHTS_FILE).exists()
    check_adapter_target(out, overwrite=resume or empty)
    return resume


def tell_dropped(stage: TuneStage, tell: Callable[[str], None]) -> None:
    """Say how many samples were left out, where some were, in any process."""
    dropped = len(stage.dropped)
    if world().size() > 1:  # which may have met the same ones
        mask = np.zeros(len(stage.samples), np.int32)
        mask[list(stage.dropped)] = 1
        dropped = int(np.count_nonzero(np.array(total(mx.array(mask)))))
    if dropped:
        limit = stage.settings.max_tokens
        tell(f"left out, of more than {limit} tokens: {plural(dropped, 'sample')}")


def _rewind(file: Path, trainer: Trainer) -> None:
    """Leave the lines up to the checkpoint's step.

    Steps that are run again go, the test at the end, and a line left half-written; that
    of the checkpoint's own step comes, where the run was killed between the two.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = {k: line for k, line in _by_step(text).items() if k <= trainer.step}
    if trainer.told:
        kept.setdefault(trainer.step, {"step": trainer.step, **trainer.told})
    with replacing_file(file) as path:
        lines = [json.dumps(line) + "\n" for line in kept.values()]
        path.write_text("".join(lines), "utf-8")


def _by_step(text: str) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl but the test's; several of a step become one."""
    found: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if "test" not in values:
            found[step] = found.get(step, {}) | values
    return found


def _supervised(stage: TuneStage, step: int) -> str:
    """What is learned of the next batch, in tokens, and from where its samples are."""
    counts = [0, 0, 0]
    with together():
        batches, counts[2] = stage.host_step(step, world().rank(), world().size())
        counts[0] = sum(int((arrays[7] > 0).sum()) for arrays in batches)
        counts[1] = sum(int((arrays[1] >= 0).sum()) for arrays in batches)
    learned, tokens, count = sums(counts)
    mixture, whence = stage.samples, ""
    if len(mixture.parts) > 1:
        parts = [mixture.part_of(number) for number in stage.numbers(step)]
        rows = enumerate(mixture.names)
        whence = ": " + ", ".join(f"{parts.count(k)} {name}" for k, name in rows)
    return (
        f"supervised {learned} of {tokens} tokens in the first batch "
        f"({count} samples{whence})"
    )
