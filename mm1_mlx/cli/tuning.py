"""What the flags of `lora` say in the library's terms."""

import argparse
from pathlib import Path
from typing import Any

from mm1_mlx.cli.tuning_flags import MOST_RANK, parser
from mm1_mlx.errors import UsageError


def memory_wish(args: argparse.Namespace) -> Any:
    """What memory the flags give, and what they leave open."""
    from mm1_mlx.training.memory_plan import MemoryWish

    left = {
        "accumulate": args.grad_accumulation_steps,
        "chunk": args.vocabulary_chunk,
        "recompute": args.grad_checkpoint,
    }
    return MemoryWish(
        limit=None if args.memory_limit is None else round(args.memory_limit * 1e9),
        auto=tuple(name for name, value in left.items() if value == "auto"),
        only_tell=args.plan,
    )


def sources(args: argparse.Namespace) -> list[Any]:
    """Where the flags say that data is."""
    from mm1_mlx.training.mixtures import Source

    images = args.image_folder or [None]
    images = images * len(args.data) if len(images) == 1 else images
    if len(images) != len(args.data):
        raise UsageError(
            f"there are {len(args.data)} --data and {len(images)} --image-folder: give "
            f"one for all, or one for each"
        )
    for folder in images:
        if folder is not None and not folder.expanduser().is_dir():
            raise UsageError(f"--image-folder is '{folder}', but there is no folder")
    return [
        Source(*_weighted(text), folder and folder.expanduser())
        for text, folder in zip(args.data, images, strict=True)
    ]


def _weighted(text: str) -> tuple[str, float]:
    """A name and its weight: "A=0.45"; a folder may itself have such a name."""
    name, equals, value = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(value)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf") or not name:
        raise UsageError(
            f"--data is '{text}', but the weight after '=' must be a number above 0"
        )
    return name, weight


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


def _is_rank(word: str) -> bool:
    digits = word.isascii() and word.isdigit() and len(word) <= len(str(MOST_RANK))
    return digits and 0 < int(word) <= MOST_RANK


def _pairs(args: argparse.Namespace, how: str, wanted: str) -> Any:
    from mm1_mlx.adapters.layers import PairSettings

    kind, rank = args.fine_tune_type, args.rank
    for word in how.split(":") if how else []:
        if word in ("lora", "dora", "full"):
            kind = word
        elif _is_rank(word):
            rank = int(word)
            kind = "lora" if kind == "full" else kind
        else:
            raise UsageError(
                f"--train is '{wanted}', but must be PART or PART=HOW, where HOW is a "
                f"rank up to {MOST_RANK}, lora, dora, lora:RANK, dora:RANK or full"
            )
    if kind == "full":
        return None
    if args.scale is not None and args.rslora:
        raise UsageError("give --scale or --rslora, not both")
    scale = args.scale or args.alpha / (rank**0.5 if args.rslora else rank)
    return PairSettings(
        rank=rank, scale=scale, dropout=args.dropout, dora=kind == "dora"
    )


def _number(value: int | str, auto: int) -> int:
    return auto if isinstance(value, str) else value


def settings(args: argparse.Namespace) -> Any:
    """How the flags train."""
    from mm1_mlx.training.tuning import TuneSettings

    if args.force and not args.resume:
        raise UsageError("--force is for going on: give --resume, too")

    return TuneSettings(
        steps=args.iters,
        batch=args.batch_size,
        accumulate=_number(args.grad_accumulation_steps, 1),
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
        window=args.length_window,
        chunk=_number(args.vocabulary_chunk, 8192),
        router_losses=args.router_losses,
        recompute=args.grad_checkpoint == "on",
        resolution=args.resolution,
        max_tiles=args.max_tiles,
    )


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask of a run beside how it learns: fields of Asked."""
    return {
        "base": args.model,
        "valid_every": args.steps_per_eval,
        "valid_samples": args.val_samples,
        "save_every": args.save_every,
        "seed": args.seed,
        "resume": args.resume,
        "force": args.force,
        "until": args.until,
        "memory": memory_wish(args),
    }


# Flags of one call, which the config.yaml of a run leaves out.
_OF_A_CALL = ("resume", "force", "check", "plan", "until", "json")


def saved_config(args: argparse.Namespace) -> dict[str, Any]:
    """What the config.yaml of a run holds: the flags, and the file's that it took."""
    from mm1_mlx.cli.config_file import merged

    return merged(parser(), args, _OF_A_CALL)


def watch(args: argparse.Namespace, **more: Any) -> Any:
    """What the flags have measured. more: of Watch."""
    from mm1_mlx.training.watching import Watch

    return Watch(
        answer_every=args.task_accuracy,
        answer_samples=args.task_samples,
        load_every=args.steps_per_report,
        **more,
    )
