"""What `generate` says of memory: --plan, and no before the weights are read."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm1_mlx.cli.boxes import fill_prompt


def add_plan(group: Any) -> None:
    """--plan, beside the other flags about memory."""
    group.add_argument(
        "--plan",
        action="store_true",
        help="tell what memory the answer would take, and end",
    )


def add_memory_check(group: Any) -> None:
    """--no-memory-check."""
    group.add_argument(
        "--no-memory-check",
        dest="check_memory",
        action="store_false",
        help="try it, even where it cannot fit",
    )


def check_folders(
    args: argparse.Namespace, settings: dict[str, Any], folder: Path
) -> None:
    """MemoryPlanError where the config and the files' headers say that it cannot fit.

    Nothing of the weights is read, nor the prompt: what it adds is checked later.
    """
    if args.check_memory:
        _plan(args, settings, folder).check()


def print_plan(
    args: argparse.Namespace,
    settings: dict[str, Any],
    prompt: Any,
    images: list,
    name: str,
    prepare: Callable[[Any, argparse.Namespace], None],
) -> int:
    """Read the prompt and the pictures, but no weights, and tell what it would take.

    prepare: has the processor read pictures as the flags ask. MemoryPlanError, behind
    the plan, where it cannot fit; a warning where it may not.
    """
    from mm1_mlx.adapters.about import config_of, read_as_trained, reading_of
    from mm1_mlx.checkpoint.folder import read_config
    from mm1_mlx.inference.asking import asked_of, read
    from mm1_mlx.inference.pictures import largest_side, pictures_of
    from mm1_mlx.inference.settings import Settings
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.processes import is_first

    if not is_first():  # it has the pictures
        return 0
    folder = _find(name)
    config = read_config(folder)
    processor = Processor.from_folder(folder, config)
    prepare(processor, args)
    if args.adapter_path is not None:
        read_as_trained(processor, reading_of(config_of(Path(args.adapter_path))))
    prompt = fill_prompt(prompt, args, processor, images)
    chosen = Settings.of(settings)
    asked = asked_of(None, processor, prompt, images, chosen)
    context = config.text_config.max_position_embeddings
    inputs, _ = read(processor, asked, chosen, context)
    length = inputs.input_ids.shape[1]
    found = pictures_of(inputs, 0)
    vision = config.vision_config
    seen = {
        "pictures": [picture.pixels.shape[0] for picture in found],
        "side": largest_side(found, vision.image_size) if vision else None,
    }
    plan = _plan(args, settings, folder, config, prompt=length, **seen)
    values = {"plan": {"model": name, **plan.to_dict()}}
    print(json.dumps(values) if args.json else plan.table(), flush=True)
    if args.check_memory:
        plan.check()
        plan.warn()
    return 0


def _find(name: str) -> Path:
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.loading import find_model

    return find_model(name, **conversion_progress())


def _plan(
    args: argparse.Namespace,
    settings: dict[str, Any],
    folder: Path,
    config: Any = None,
    **found: Any,
) -> Any:
    from mm1_mlx.checkpoint.folder import read_config
    from mm1_mlx.inference.memory_plan import plan_folder
    from mm1_mlx.inference.settings import Settings
    from mm1_mlx.processes import world

    draft = None
    if args.draft_model is not None:
        its_folder = _find(args.draft_model)
        draft = its_folder, read_config(its_folder)
    return plan_folder(
        folder,
        config or read_config(folder),
        Settings.of(settings),
        draft=draft,
        adapter=args.adapter_path,
        processes=world().size(),
        **found,
    )
