"""A fine-tuning run from a model and a folder of conversations to an adapter."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.adapters.folder import (
    CONFIG_FILE,
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
    check_adapter_target(out, overwrite=resume)
    if resume and not (out / CHECKPOINT).is_file():
        raise CheckpointError(f"{out} has no {CHECKPOINT} to go on from.")
    adapt(model, plan, seed)
    stage = TuneStage(model, processor, samples, settings, seed)
    config = adapter_config(plan, base)
    trainer = _begin(stage, samples, out, config, seed, resume, tell)
    tell(table(summary(model, model.config)))
    tell(_supervised(stage, trainer.step))

    def finished(step: int) -> bool:
        return stop() or (until is not None and step >= until)

    for now in trainer.run(save_every, lambda: finished(trainer.step)):
        last = now.step == settings.steps
        if valid is not None and (now.step % valid_every == 0 or last):
            now.metrics["valid"] = valid_loss(stage, valid, valid_samples)
        saved = now.step % save_every == 0 or last or finished(now.step)
        if main:
            line = json.dumps({"step": now.step, **now.metrics})
            with (out / METRICS).open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            if saved:
                write_adapter(out, adapter_weights(model), config)
        report(now)
    model.eval()
    return trainer.step == settings.steps


def _silent(_: Any) -> None:
    """What every process but the first tells."""


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
    recipe = {
        "model": config["mm1_mlx"]["base"],
        "plan": config["mm1_mlx"],
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
        lesson = lesson_of(samples[number], stage.processor)
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
