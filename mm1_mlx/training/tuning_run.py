"""A fine-tuning run from a model and a folder of conversations to an adapter."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.adapters.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    adapter_weights,
    check_adapter_target,
    write_adapter,
)
from mm1_mlx.adapters.targets import Plan, adapt, summary, table
from mm1_mlx.checkpoint.folder import write_json
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.conversations import ConversationFile, lesson_of
from mm1_mlx.training.trainer import Progress, Trainer
from mm1_mlx.training.tuning import TuneSettings, TuneStage

CHECKPOINT = "tune.safetensors"
METRICS = "metrics.jsonl"
RUN_FILE = "run.json"


def tune(
    model: MM1,
    processor: Processor,
    samples: ConversationFile,
    out: Path,
    plan: Plan,
    settings: TuneSettings,
    *,
    base: str = "",
    valid: ConversationFile | None = None,
    valid_every: int = 100,
    valid_samples: int = 64,
    save_every: int = 100,
    seed: int = 0,
    resume: bool = False,
    until: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
    report: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train an adapter in place and write it into `out`; False if it was stopped.

    model: is given the plan's adapter, and has it trained at the end. base: what the
    model is called. resume: go on from the checkpoint in `out`, exactly as if the run
    had never ended. until: end at this step, saved. tell: receives lines; report: the
    state after every step, with "valid" where it was measured. stop: asked after every
    step; True saves and ends the run.

    Raises ConfigError, DatasetError, CheckpointError; MM1Error at a loss of NaN.
    """
    if not (main := mx.distributed.init().rank() == 0):
        tell = report = _silent
    resume = _check_target(out, resume, tell)
    adapt(model, plan, seed)
    stage = TuneStage(model, processor, samples, settings, seed)
    config = adapter_config(plan, base)
    trainer = _begin(stage, samples, out, config, seed, resume, tell)
    tell(table(summary(model, model.config)))
    tell(_supervised(stage, trainer.step))

    def finished(step: int) -> bool:
        return stop() or (until is not None and step >= until)

    steps = trainer.run(save_every, lambda: finished(trainer.step))
    for now in steps if not finished(trainer.step) else ():
        last = now.step == settings.steps
        saved = now.step % save_every == 0 or last or finished(now.step)
        if main and saved:
            write_adapter(out, adapter_weights(model), config)
        if valid is not None and (now.step % valid_every == 0 or last):
            now.metrics["valid"] = valid_loss(stage, valid, valid_samples)
        if main:
            with (out / METRICS).open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": now.step, **now.metrics}) + "\n")
        report(now)
    tell_dropped(stage, tell)
    model.eval()
    return trainer.step == settings.steps


def _silent(_: Any) -> None:
    """What every process but the first tells."""


def _check_target(out: Path, resume: bool, tell: Callable[[str], None]) -> bool:
    """Whether there is something to go on from; CheckpointError if it is in the way."""
    if resume and not (out / CHECKPOINT).is_file():
        if not (out / RUN_FILE).is_file():
            raise CheckpointError(f"{out} has no {CHECKPOINT} to go on from.")
        tell("nothing was saved yet: beginning with the first step")
        resume = False
    empty = not (out / CHECKPOINT).exists() and not (out / WEIGHTS_FILE).exists()
    check_adapter_target(out, overwrite=resume or empty)
    return resume


def tell_dropped(stage: TuneStage, tell: Callable[[str], None]) -> None:
    """Say how many samples were left out, where some were."""
    if stage.dropped:
        limit = stage.settings.max_tokens
        tell(f"{len(stage.dropped)} samples of more than {limit} tokens were left out")


def _begin(
    stage: TuneStage,
    samples: ConversationFile,
    out: Path,
    config: dict[str, Any],
    seed: int,
    resume: bool,
    tell: Callable[[str], None],
) -> Trainer:
    """A trainer at its first step, or where the last run was saved."""
    plan = {k: v for k, v in config["mm1_mlx"].items() if k != "version"}
    recipe = {
        "model": plan["base"],
        "plan": plan,
        "settings": stage.settings.to_dict(),
        "data": fingerprint(samples),
    }
    recipe = json.loads(json.dumps(recipe))  # as a checkpoint gives it back
    trainer = Trainer(stage, out, seed, {"recipe": recipe})
    main = mx.distributed.init().rank() == 0
    if resume:
        trainer.resume()
        tell(f"going on from step {trainer.step} of {stage.settings.steps}")
        if main:
            _forget_after(out / METRICS, trainer.step)
            write_adapter(out, adapter_weights(trainer.module), config)
    elif main:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / CONFIG_FILE, config)
        (out / METRICS).unlink(missing_ok=True)
    if main:
        write_json(out / RUN_FILE, recipe | {"seed": seed})
    return trainer


def _forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that are run again, and one left half-written."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _supervised(stage: TuneStage, step: int) -> str:
    """What is learned of the next batch, in tokens."""
    batches, count = stage.host_step(step, 0, 1)
    learned = sum(int((arrays[7] > 0).sum()) for arrays in batches)
    tokens = sum(int((arrays[1] >= 0).sum()) for arrays in batches)
    return (
        f"supervised {learned} of {tokens} tokens in the first batch ({count} samples)"
    )


def valid_loss(stage: TuneStage, samples: ConversationFile, most: int) -> float:
    """Mean loss of the learned tokens of the first `most` samples, one at a time."""
    model = stage.module
    model.eval()
    total, tokens = 0.0, 0.0
    for number in range(min(len(samples), most)):
        sample = samples[number]
        lesson = lesson_of(sample, stage.processor)
        if not stage.fits(lesson, sample.where):
            continue
        _, metrics = stage.loss(*map(mx.array, stage.arrays([lesson], "valid")))
        count = float(metrics["tokens"])
        total += float(metrics["text"]) * count
        tokens += count
    model.train()
    return total / max(tokens, 1)


def fingerprint(samples: ConversationFile) -> dict[str, Any]:
    """What tells whether a run goes on with the same data."""
    digest = hashlib.sha256()
    with samples.file.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"samples": len(samples), "sha256": digest.hexdigest()[:16]}
