"""python -m mm1_mlx.lora: fine-tune a model on your own pictures and texts."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("lora")

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, number, whole_number
from mm1_mlx.cli.progress import duration
from mm1_mlx.cli.run import INTERRUPTED, run_door
from mm1_mlx.cli.training import Reporter, StopOnSignal, awake, is_first_process
from mm1_mlx.errors import DatasetError, UsageError

_EXAMPLES = """data: a folder with train.jsonl (and valid.jsonl), a conversation a line:
  {"question": "What is this?", "answer": "A cat.", "image": "cats/1.jpg"}
  {"messages": [{"role": "user", "content": "<image> What is this?"}, ...],
   "images": ["a.jpg"]}
  {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], ...}
  {"image": "a.jpg", "caption": "A cat on a mat."}

examples:
  python -m mm1_mlx.lora --model mm1-tiny --data DATA --check
  python -m mm1_mlx.lora --model mm1-tiny --data DATA --iters 200
  python -m mm1_mlx.lora --model FOLDER --data DATA --train connector=full --iters 500
  python -m mm1_mlx.lora --model FOLDER --data DATA --train attention=16 --train experts

The run can be stopped at any moment; the same command with --resume goes on exactly.
"""


def parser() -> Parser:
    """The flags of this command; where mlx-lm has them, under its names."""
    p = Parser(
        prog="mm1_mlx lora",
        description="Fine-tune a model: low-rank pairs beside frozen weights (LoRA, "
        "DoRA), also on\nquantized models (QLoRA), or whole parts.",
        epilog=_EXAMPLES,
    )
    count = whole_number(1)
    add = p.add_argument
    add("--model", required=True, metavar="NAME", help="name, folder or hub id")
    add("--data", type=Path, required=True, metavar="FOLDER", help="see below")
    add(
        "--adapter-path",
        type=Path,
        default=Path("adapters"),
        metavar="FOLDER",
        help="where to write (%(default)s)",
    )
    add("--iters", type=count, default=1000, metavar="N", help="updates (%(default)s)")
    add(
        "--batch-size", type=count, default=4, metavar="N", help="samples (%(default)s)"
    )
    add(
        "--grad-accumulation-steps",
        type=count,
        default=1,
        metavar="N",
        help="micro-batches that a batch is made in (%(default)s)",
    )
    add("--seed", type=whole_number(0), default=0, metavar="N", help="(%(default)s)")
    add("--resume", action="store_true", help="go on from --adapter-path, exactly")
    add("--check", action="store_true", help="read all data, report, and train nothing")
    add("--json", action="store_true", help="print one JSON object at the end")
    _add_parts(p)
    _add_learning(p)
    _add_rows(p)
    p.add_debug()
    return p


def _add_parts(p: Parser) -> None:
    add = p.add_argument_group("what is trained").add_argument
    add(
        "--train",
        action="append",
        default=[],
        metavar="PART[=HOW]",
        help="a part, and how: a rank, lora, dora, lora:RANK, dora:RANK or full. "
        "Parts: encoder, connector, attention, mlp, experts, embeddings, head, "
        "router, norms (attention, mlp and experts, those that are there)",
    )
    add("--fine-tune-type", choices=["lora", "dora", "full"], default="lora")
    add("--rank", type=whole_number(1), default=8, metavar="R", help="(%(default)s)")
    add(
        "--alpha",
        type=number(0, above=True),
        default=16.0,
        metavar="X",
        help="pairs add alpha / rank times their product (%(default)g)",
    )
    add("--rslora", action="store_true", help="alpha / sqrt(rank) instead")
    add("--dropout", type=number(0, 0.99), default=0.0, metavar="X", help="(0)")
    add(
        "--projections",
        metavar="NAMES",
        help="only these, as q_proj,v_proj (all of a part)",
    )
    add(
        "--num-layers",
        type=int,
        default=-1,
        metavar="N",
        help="of the decoder, from its end (-1: all)",
    )
    add("--first-layers", type=whole_number(1), metavar="N", help="from its start")


def _add_learning(p: Parser) -> None:
    add = p.add_argument_group("learning").add_argument
    add(
        "--learning-rate",
        default="1e-4",
        metavar="X",
        help="the peak, or mm1 for the paper's law (%(default)s)",
    )
    add(
        "--part-rate",
        action="append",
        default=[],
        metavar="PART=X",
        help="a part's rate as a part of the others'",
    )
    add("--warmup", type=whole_number(0), default=10, metavar="N", help="(%(default)s)")
    add(
        "--floor",
        type=number(0, 1),
        default=0.1,
        metavar="X",
        help="the last rate as a part of the peak, by a cosine (%(default)s)",
    )
    add(
        "--optimizer",
        choices=["adamw", "adam", "adafactor", "lion", "sgd"],
        default="adamw",
        help="(%(default)s)",
    )
    add("--weight-decay", type=number(0), default=0.0, metavar="X", help="(0)")
    add("--clip", type=number(0, above=True), default=1.0, metavar="X", help="(1)")
    add(
        "--router-losses",
        action="store_true",
        help="add the experts' load-balance and z-loss",
    )
    add("--save-every", type=whole_number(1), default=100, metavar="N", help="(100)")
    add(
        "--steps-per-eval", type=whole_number(1), default=100, metavar="N", help="(100)"
    )
    add(
        "--val-samples",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="of valid.jsonl that an evaluation reads (%(default)s)",
    )
    add(
        "--steps-per-report", type=whole_number(1), default=10, metavar="N", help="(10)"
    )
    add("--until", type=whole_number(1), metavar="STEP", help="stop there, and save")


def _add_rows(p: Parser) -> None:
    add = p.add_argument_group("rows").add_argument
    add(
        "--max-seq-length",
        type=whole_number(16),
        default=2048,
        metavar="N",
        help="tokens of a sample, images included (%(default)s)",
    )
    add(
        "--too-long",
        choices=["refuse", "drop"],
        default="refuse",
        help="what becomes of a longer one; it is never cut (%(default)s)",
    )
    add(
        "--pack",
        action="store_true",
        help="several samples in a row, which do not see each other",
    )
    add(
        "--vocabulary-chunk",
        type=whole_number(16),
        default=8192,
        metavar="N",
        help="words whose logits are made at a time (%(default)s)",
    )


def _rate(text: str) -> float | str:
    if text == "mm1":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"--learning-rate is '{text}', but must be above 0, or mm1")
    return value


def _rates(texts: list[str]) -> dict[str, float]:
    rates = {}
    for text in texts:
        part, _, value = text.partition("=")
        try:
            rates[part] = float(value)
        except ValueError:
            raise UsageError(f"--part-rate is '{text}', but must be PART=X") from None
        if not 0 <= rates[part] < float("inf"):
            raise UsageError(f"--part-rate is '{text}', but X must be 0 or more")
    return rates


def plan(args: argparse.Namespace, config: Any) -> Any:
    """What the flags train of a model."""
    from mm1_mlx.adapters.targets import Plan, Target

    text = config.text_config
    layers = range(text.num_hidden_layers)
    usual = ["attention"]
    usual += ["mlp"] if not all(map(text.is_sparse, layers)) else []
    usual += ["experts"] if any(map(text.is_sparse, layers)) else []
    parts = {}
    for wanted in args.train or usual:
        part, _, how = wanted.partition("=")
        parts[part] = Target(pairs=_pairs(args, how, wanted))
    if args.num_layers == 0 or args.num_layers < -1:
        raise UsageError("--num-layers must be -1 for all, or 1 and more")
    if args.first_layers and args.num_layers != -1:
        raise UsageError("give --first-layers or --num-layers, not both")
    names = args.projections
    return Plan(
        parts=parts,
        layers=args.first_layers or (None if args.num_layers < 0 else args.num_layers),
        first=bool(args.first_layers),
        projections=tuple(names.split(",")) if names else None,
    )


def _pairs(args: argparse.Namespace, how: str, wanted: str) -> Any:
    from mm1_mlx.adapters.layers import PairSettings

    kind, rank = args.fine_tune_type, args.rank
    for word in how.split(":") if how else []:
        if word in ("lora", "dora", "full"):
            kind = word
        elif word.isascii() and word.isdigit() and int(word) > 0:
            rank = int(word)
            kind = "lora" if kind == "full" else kind
        else:
            raise UsageError(
                f"--train is '{wanted}', but must be PART or PART=HOW, where HOW is a "
                f"rank, lora, dora, lora:RANK, dora:RANK or full"
            )
    if kind == "full":
        return None
    scale = args.alpha / (rank**0.5 if args.rslora else rank)
    return PairSettings(
        rank=rank, scale=scale, dropout=args.dropout, dora=kind == "dora"
    )


def settings(args: argparse.Namespace) -> Any:
    """How the flags train."""
    from mm1_mlx.training.tuning import TuneSettings

    return TuneSettings(
        steps=args.iters,
        batch=args.batch_size,
        accumulate=args.grad_accumulation_steps,
        learning_rate=_rate(args.learning_rate),
        warmup=args.warmup,
        floor=args.floor,
        optimizer=args.optimizer,
        weight_decay=args.weight_decay,
        clip=args.clip,
        rates=_rates(args.part_rate),
        max_tokens=args.max_seq_length,
        too_long=args.too_long,
        pack=args.pack,
        chunk=args.vocabulary_chunk,
        router_losses=args.router_losses,
    )


def _check(args: argparse.Namespace, processor: Any) -> int:
    """Read all data; 1 where something is wrong."""
    from mm1_mlx.cli.progress import progress_bar
    from mm1_mlx.training.conversations import SPLITS, check_samples, open_split

    found: dict[str, Any] = {}
    for split in SPLITS:
        samples = open_split(args.data, split)
        if samples is None:
            continue
        bar = progress_bar(len(samples), split)
        limit = args.max_seq_length if args.too_long == "refuse" else None
        for so_far in check_samples(samples, processor, limit):
            found[split] = so_far
            bar.update(1)
        bar.close()
    if "train" not in found:
        raise DatasetError(f"{args.data} has no train.jsonl: one JSON object a line.")
    problems = [line for checked in found.values() for line in checked.problems]
    if args.json:
        print(json.dumps({name: vars(checked) for name, checked in found.items()}))
        return 1 if problems else 0
    for name, c in found.items():
        print(
            f"{name}: {c.samples} samples, {c.images} images, {c.tokens} tokens, "
            f"{c.learned} of them learned ({c.learned / max(c.samples, 1):.1f} a "
            f"sample); longest {c.longest} tokens ({c.longest_where})"
        )
    for line in problems[:20]:
        print(f"error: {line}", file=sys.stderr)
    if len(problems) > 20:
        print(f"error: {len(problems) - 20} more lines are wrong", file=sys.stderr)
    return 1 if problems else 0


def run(args: argparse.Namespace) -> int:
    """Check the data, or train an adapter."""
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.loading import load
    from mm1_mlx.training.conversations import open_split, open_train
    from mm1_mlx.training.tuning_run import tune

    samples = open_train(args.data)
    model, processor = load(args.model, **conversion_progress())
    if args.check:
        return _check(args, processor)
    started, reporter, last = time.time(), Reporter(args.steps_per_report), None

    def report(now: Any) -> None:
        nonlocal last
        last = now
        reporter.step(now)

    with StopOnSignal() as signals, awake():
        try:
            done = tune(
                model,
                processor,
                samples,
                args.adapter_path,
                plan(args, model.config),
                settings(args),
                base=args.model,
                valid=open_split(args.data, "valid"),
                valid_every=args.steps_per_eval,
                valid_samples=args.val_samples,
                save_every=args.save_every,
                seed=args.seed,
                resume=args.resume,
                until=args.until,
                tell=reporter.line,
                report=report,
                stop=signals.asked,
            )
        finally:
            reporter.close()
        reached = args.until is not None and not signals.asked()
    if not is_first_process():
        return 0 if done or reached else INTERRUPTED
    if not done:
        reporter.line("saved; the same command with --resume goes on from here")
        return 0 if reached else INTERRUPTED
    metrics = last.metrics if last is not None else {}
    if args.json:
        print(json.dumps({"adapter": str(args.adapter_path), "metrics": metrics}))
    else:
        print(
            f"{args.adapter_path} after {duration(time.time() - started)}; ask with "
            f"generate --model {args.model} --adapter-path {args.adapter_path}"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_door(parser(), run, argv)
