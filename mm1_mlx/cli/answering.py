"""Flags and steps that the doors which answer share: generate and chat."""

import argparse
import sys
import time
from typing import Any

from mm1_mlx.cli.drafting import add_drafting, load_draft
from mm1_mlx.cli.generation_plan import add_memory_check, check_folders
from mm1_mlx.cli.parser import Parser, json_object, number, some_text, whole_number
from mm1_mlx.cli.resolution import add_picture_limits, add_resolution
from mm1_mlx.errors import UsageError

DEFAULT_MODEL = "mm1-tiny"

ABOUT_TINY = (
    "note: mm1-tiny, the built-in model, knows drawn shapes, numbers and short words, "
    "nothing else. Another model: --model NAME_OR_FOLDER (see README.md)."
)


def add_model(parser: Parser) -> None:
    """Which model answers."""
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"name, folder or hub id ({DEFAULT_MODEL})")
    add("--adapter-path", metavar="FOLDER", help="an adapter of lora, for the model")


def add_talk(parser: Parser) -> None:
    """What stands around the prompt."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="system prompt")
    add(
        "--chat-template-config",
        type=json_object,
        metavar="JSON",
        help="variables for the chat template: one JSON object",
    )


def add_answer(parser: Parser) -> Any:
    """How an answer is made; the group about memory, for more flags."""
    add_length(parser)
    add_sampling(parser)
    add_pictures(parser)
    memory = add_memory(parser)
    add_drafting(parser)
    return memory


def add_output(group: Any, quiet: str) -> None:
    """How much is said. quiet: what --quiet does."""
    how_much = group.add_mutually_exclusive_group()
    how_much.add_argument("--quiet", action="store_true", help=quiet)
    how_much.add_argument(
        "--verbose", action="store_true", help="also the model, device and load time"
    )


def add_length(parser: Parser) -> None:
    """How long the answer may be."""
    group = parser.add_argument_group("length of the answer")
    add = group.add_argument
    add(
        "-m",
        "--max-tokens",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="tokens at most (%(default)s)",
    )
    add(
        "--stop",
        type=some_text,
        action="append",
        metavar="TEXT",
        help="end before this text; may be repeated",
    )


def add_sampling(parser: Parser) -> None:
    """How tokens are chosen."""
    group = parser.add_argument_group("choosing tokens")
    add = group.add_argument
    add(
        "--temp",
        "--temperature",
        dest="temp",
        type=number(0),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (%(default)s)",
    )
    add(
        "--top-p",
        type=number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="likeliest tokens that reach this probability together (%(default)s)",
    )
    add(
        "--top-k",
        type=whole_number(0),
        default=0,
        metavar="K",
        help="the K likeliest tokens; 0 is all (%(default)s)",
    )
    add(
        "--min-p",
        type=number(0, 1),
        default=0.0,
        metavar="P",
        help="tokens at least P times as likely as the likeliest (%(default)s)",
    )
    add(
        "--repetition-penalty",
        type=number(0, above=True),
        metavar="R",
        help="above 1 makes tokens of the last few less likely (off)",
    )
    add(
        "--repetition-context-size",
        type=whole_number(1),
        default=20,
        metavar="N",
        help="how many are the last few (%(default)s)",
    )
    add(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        metavar="N",
        help="the same seed gives the same answer",
    )


def add_pictures(parser: Parser) -> None:
    """How pictures are read."""
    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add(
        "--resize-mode",
        choices=("squash", "crop", "pad"),
        help="how a picture becomes a square (as the model was trained)",
    )
    add_resolution(group)
    add_picture_limits(group)


def add_memory(parser: Parser) -> Any:
    """What the cache holds; the group, for more flags."""
    group = parser.add_argument_group("memory")
    add = group.add_argument
    add("--kv-bits", type=int, choices=(4, 8), help="store keys and values in few bits")
    add(
        "--kv-group-size",
        type=int,
        choices=(32, 64, 128),
        default=64,
        help="values per scale of --kv-bits (%(default)s)",
    )
    add(
        "--quantized-kv-start",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="tokens from which on --kv-bits holds (%(default)s)",
    )
    add(
        "--prefill-step-size",
        type=whole_number(1),
        default=2048,
        metavar="N",
        help="prompt tokens per step: less memory, more steps (%(default)s)",
    )
    add(
        "--prefix-cache",
        metavar="FOLDER",
        help="keep what was read of prompts and pictures here: the next run that "
        "begins alike starts at once (each run reads all weights once more for it, to "
        "know the model)",
    )
    add(
        "--prefix-cache-size",
        type=number(0, above=True),
        metavar="GB",
        help="what --prefix-cache holds at most; the oldest goes (10)",
    )
    add_memory_check(group)
    return group


def check_memory(args: argparse.Namespace) -> None:
    """UsageError where flags about memory do not go together."""
    if args.prefix_cache_size is not None and args.prefix_cache is None:
        raise UsageError("--prefix-cache-size goes with --prefix-cache FOLDER")


def folder_reuse(args: argparse.Namespace) -> Any:
    """The Reuse with the folder of --prefix-cache, or None."""
    if args.prefix_cache is None:
        return None
    from mm1_mlx.inference.reuse import FOLDER_LIMIT, Reuse
    from mm1_mlx.processes import together

    size, limit = args.prefix_cache_size, FOLDER_LIMIT
    with together():
        return Reuse(
            folder=args.prefix_cache,
            folder_limit=limit if size is None else int(size * 1e9),
        )


def tell_problem(reuse: Any) -> None:
    """Warn where a prompt could not be kept."""
    if reuse and reuse.problem:
        print(
            f"warning: --prefix-cache: the prompt was not kept: {reuse.problem}",
            file=sys.stderr,
        )


def load_model(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """The model and its processor, as the flags ask; notes on stderr.

    settings: of stream_generate; it is given the draft model, which must suit.
    """
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.loading import find_model, load
    from mm1_mlx.processes import is_first, together, world

    start = time.perf_counter()
    name = args.model or DEFAULT_MODEL
    with together():
        folder = find_model(name, **conversion_progress())
        check_folders(args, settings, folder)
        model, processor = load(folder, adapter_path=args.adapter_path, group=world())
        resize_as_asked(processor, args)
    if is_first() and not processor.tokenizer.reads_text:
        print(
            f"warning: {name} has no tokenizer: prompts and answers are token ids, "
            f"like '1 306 4966'",
            file=sys.stderr,
        )
    if is_first() and args.verbose:
        _print_setting(name, time.perf_counter() - start)
    settings["draft_model"] = load_draft(args, model, processor)
    return model, processor


def resize_as_asked(processor: Any, args: argparse.Namespace) -> None:
    """--resize-mode instead of the model's own."""
    if args.resize_mode is not None:
        from dataclasses import replace

        settings = replace(processor.image_settings, resize_mode=args.resize_mode)
        processor.image_settings = settings


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of stream_generate; the draft model is yet to be loaded."""
    names = (
        "system max_tokens temp top_p top_k min_p repetition_penalty "
        "repetition_context_size seed stop kv_bits kv_group_size quantized_kv_start "
        "prefill_step_size resolution max_tiles allow_url chat_template_config lookup "
        "num_draft_tokens check_memory"
    )
    chosen = {name: getattr(args, name) for name in names.split()}
    return {**chosen, "max_pixels": args.max_image_pixels}


def _print_setting(name: str, seconds: float) -> None:
    from importlib.metadata import version

    import mlx.core as mx

    from mm1_mlx.processes import world

    shared = f", shared by {size} processes" if (size := world().size()) > 1 else ""
    print(
        f"Model: {name}{shared}, load {seconds:.2f} s, {mx.default_device()}, "
        f"mlx {version('mlx')}",
        file=sys.stderr,
    )
