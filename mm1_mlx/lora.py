"""python -m mm1_mlx.lora: fine-tune a model on your own pictures and texts."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("lora")

import argparse
import json
import sys
import time
from typing import Any

from mm1_mlx.cli.progress import duration
from mm1_mlx.cli.run import INTERRUPTED, run_door
from mm1_mlx.cli.training import StopOnSignal, awake, is_first_process
from mm1_mlx.cli.tuning import asked, memory_wish, parser, plan, settings, sources
from mm1_mlx.cli.watching import RunView


def _check(args: argparse.Namespace, data: Any, train: Any, processor: Any) -> int:
    """Read all data; 1 where something is wrong."""
    from mm1_mlx.cli.progress import progress_bar
    from mm1_mlx.training.conversations import SPLITS, check_samples

    found: dict[str, dict[str, Any]] = {name: {} for name in data.names}
    several = len(found) > 1
    limit, drop = args.max_seq_length, args.too_long == "drop"
    for split in SPLITS:
        mixture = train if split == "train" else data.split(split)
        rows = zip(mixture.names, mixture.parts, strict=True) if mixture else ()
        for name, samples in rows:
            bar = progress_bar(len(samples), f"{name} {split}" if several else split)
            for so_far in check_samples(samples, processor, limit, drop=drop):
                found[name][split] = so_far
                bar.update(1)
            bar.close()
    lines = [(n, s, c) for n, splits in found.items() for s, c in splits.items()]
    problems = [line for *_, checked in lines for line in checked.problems]
    problems += [
        f"{n}: every sample of the train split is left out: raise --max-seq-length"
        for n, s, c in lines
        if s == "train" and c.dropped and not c.samples
    ]
    if args.json:
        shown = {n: {s: vars(c) for s, c in x.items()} for n, x in found.items()}
        print(json.dumps(shown if several else shown[data.names[0]]))
        return 1 if problems else 0
    for name, split, c in lines:
        print(f"{name + ' ' if several else ''}{split}: {_told(c, limit)}")
    for name, share, samples in zip(
        train.names, train.shares(), train.parts if several else (), strict=several
    ):
        passes = share * args.iters * args.batch_size / len(samples)
        print(f"{name}: {share:.1%} of what is learned from, {passes:.3g} times over")
    for line in problems[:20]:
        print(f"error: {line}", file=sys.stderr)
    if len(problems) > 20:
        print(f"error: {len(problems) - 20} more lines are wrong", file=sys.stderr)
    return 1 if problems else 0


def _told(c: Any, limit: int) -> str:
    """What was found of a split, in a line."""
    from mm1_mlx.inputs.prompts import plural

    left_out = f"; {c.dropped} longer than {limit} are left out" if c.dropped else ""
    if not c.samples:
        return f"no sample to take{left_out}"
    return (
        f"{plural(c.samples, 'sample')}, {plural(c.images, 'image')}, {c.tokens} "
        f"tokens, {c.learned} of them learned ({c.learned / c.samples:.1f} a sample, "
        f"{c.least_learned} to {c.most_learned}); longest {c.longest} tokens "
        f"({c.longest_where}){left_out}"
    )


def _plan(args: argparse.Namespace, model: Any, processor: Any, samples: Any) -> int:
    """Predict what the run needs; 1 where it does not fit."""
    from mm1_mlx.adapters.targets import adapt
    from mm1_mlx.training.memory_plan import plan_memory
    from mm1_mlx.training.tuning import TuneStage

    adapt(model, plan(args, model.config), args.seed)
    stage = TuneStage(model, processor, samples, settings(args), args.seed)
    planned = plan_memory(stage, memory_wish(args), args.seed)
    if is_first_process():
        print(json.dumps(planned.to_dict()) if args.json else planned.table())
    return 0 if planned.fits else 1


def run(args: argparse.Namespace) -> int:
    """Check the data, plan the memory, or train an adapter."""
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.inference.wired import wired_limit
    from mm1_mlx.loading import load
    from mm1_mlx.processes import meet, together
    from mm1_mlx.training.conversations import warn_of_small_pictures
    from mm1_mlx.training.mixtures import Data
    from mm1_mlx.training.tuning_run import tune

    with together():
        data = Data(sources(args))
        samples, valid = data.train(), data.split("valid")
        view = RunView(args, valid)  # before the model: something may be missing
        model, processor = load(args.model, **conversion_progress())
        processor.resolution, processor.max_tiles = args.resolution, args.max_tiles
        if model.config.reads_images:
            processor.ways(1)  # refuses what the model cannot read
        if args.resolution == "dynamic" and is_first_process():
            warn_of_small_pictures(samples, processor)
    if args.check:
        first = is_first_process()
        return _check(args, data, samples, processor) if first else 0
    if args.plan:
        return _plan(args, model, processor, samples)
    started, done, tested = time.time(), False, {}
    with StopOnSignal() as signals, awake(), wired_limit():
        try:
            done = tune(
                model,
                processor,
                samples,
                args.adapter_path,
                plan(args, model.config),
                settings(args),
                **asked(args),
                valid=valid,
                test=data.split("test"),
                watch=view.watch(),
                tell=view.reporter.line,
                report=view.step,
                measured=view.reporter.measured,
                tested=tested.update,
                stop=signals.asked,
            )
        finally:
            view.close(done)
        reached = args.until is not None and not signals.asked()
    if is_first_process() and not done:
        view.reporter.line("saved; the same command with --resume goes on from here")
    elif is_first_process():
        metrics = view.last.metrics if view.last is not None else {}
        _tell_end(args, tested | metrics, time.time() - started)
    meet()
    return 0 if done or reached else INTERRUPTED


def _tell_end(args: argparse.Namespace, metrics: dict, seconds: float) -> None:
    if args.json:
        shown = json.dumps({"adapter": str(args.adapter_path), "metrics": metrics})
    else:
        shown = (
            f"{args.adapter_path} after {duration(seconds)}; ask with generate "
            f"--model {args.model} --adapter-path {args.adapter_path}"
        )
    print(shown, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
