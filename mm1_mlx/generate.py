"""python -m mm1_mlx.generate: answer a prompt about images."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("generate")

import argparse
import os
import sys
import time
from contextlib import suppress
from typing import Any

from mm1_mlx.cli.boxes import (
    add_boxes,
    as_objects,
    check_boxes,
    draw,
    fetched,
    fill_prompt,
    regions_of,
    wants_objects,
)
from mm1_mlx.cli.drafting import add_drafting, check_drafting, load_draft
from mm1_mlx.cli.generation_plan import add_plan, check_folders, print_plan
from mm1_mlx.cli.parser import Parser, json_object, number, some_text, whole_number
from mm1_mlx.cli.run import run_door
from mm1_mlx.cli.verbs import make_callable
from mm1_mlx.errors import PromptError, UsageError

make_callable(__name__, "mm1_mlx.inference.generation")

DEFAULT_MODEL = "mm1-tiny"

_ABOUT_TINY = (
    "note: mm1-tiny, the built-in model, knows drawn shapes, numbers and short words, "
    "nothing else. Another model: --model NAME_OR_FOLDER (see README.md)."
)

_EXAMPLES = """examples:
  python -m mm1_mlx.generate --image a.png -p "What colour is the star?"
  python -m mm1_mlx.generate --image a.png b.png -p "Which has more circles?"
  cat question.txt | python -m mm1_mlx.generate --image a.png -p - --json

several processes share a model that exceeds one Mac (prompt and pictures are read by
the first; every Mac has the model's folder):
  mlx.launch --hostfile hosts.json -- python -m mm1_mlx.generate --model FOLDER -p "Hi"
"""


def parser() -> Parser:
    """The flags of this door; the names are those of mlx-lm and mlx-vlm."""
    parser = Parser(
        prog="mm1_mlx generate",
        description="Answer a prompt about images. The answer goes to stdout, "
        "everything else to stderr.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"name, folder or hub id ({DEFAULT_MODEL})")
    add("--adapter-path", metavar="FOLDER", help="an adapter of lora, for the model")
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="one or more pictures, in the order of their places; may be repeated",
    )
    add(
        "-p",
        "--prompt",
        required=True,
        metavar="TEXT",
        help="with <image> where each picture belongs (else they come first); "
        "'-' reads stdin",
    )
    add("--system", metavar="TEXT", help="system prompt")
    add(
        "--ignore-chat-template",
        action="store_true",
        help="take the prompt as it is, without the model's chat template",
    )
    add(
        "--chat-template-config",
        type=json_object,
        metavar="JSON",
        help="variables for the chat template: one JSON object",
    )
    _add_length(parser)
    _add_sampling(parser)
    _add_images(parser)
    add_boxes(parser)
    _add_cache(parser)
    add_drafting(parser)
    _add_output(parser)
    return parser


def _add_length(parser: Parser) -> None:
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


def _add_sampling(parser: Parser) -> None:
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


def _add_images(parser: Parser) -> None:
    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add(
        "--resize-mode",
        choices=("squash", "crop", "pad"),
        help="how a picture becomes a square (as the model was trained)",
    )
    add(
        "--max-image-pixels",
        type=whole_number(1),
        metavar="N",
        help="refuse pictures with more pixels than this",
    )
    add(
        "--allow-url",
        action="store_true",
        help="let --image be an https address too",
    )


def _add_cache(parser: Parser) -> None:
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
    add_plan(group)


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--json", action="store_true", help="one JSON object in place of the text")
    how_much = group.add_mutually_exclusive_group()
    how_much.add_argument("--quiet", action="store_true", help="only the answer")
    how_much.add_argument(
        "--verbose", action="store_true", help="also the model, device and load time"
    )
    parser.add_debug(group)


def read_prompt(given: str) -> str:
    """The prompt's text: what was given, or all of stdin for '-'."""
    if given == "-":
        if sys.stdin is None:
            raise PromptError(
                "The prompt should come from stdin (-p -), but stdin is closed."
            )
        try:
            return sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"The prompt on stdin is not UTF-8 text (byte {error.start}). Save it "
                f"as UTF-8."
            ) from error
    if any("\ud800" <= letter <= "\udfff" for letter in given):
        raise PromptError(
            "The prompt is not UTF-8 text. Check the terminal's encoding, or give it "
            "in a file: -p - < FILE."
        )
    return given


def run(args: argparse.Namespace) -> int | None:
    """Load, answer, print."""
    from mm1_mlx.inference.generation import stream_generate
    from mm1_mlx.inference.wired import wired_limit
    from mm1_mlx.processes import is_first, meet, together, world

    if world().size() > 1 and args.prompt == "-":
        raise UsageError("-p - cannot be read by several processes: give the text")
    if args.prefix_cache_size is not None and args.prefix_cache is None:
        raise UsageError("--prefix-cache-size goes with --prefix-cache FOLDER")
    check_drafting(args, world().size())
    check_boxes(args)
    prompt = read_prompt(args.prompt)
    settings = _settings(args)
    if args.plan:
        name = args.model or DEFAULT_MODEL
        return print_plan(args, settings, prompt, name, _resize_as_asked)
    reuse = _reuse(args)
    model, processor = _load(args, settings)
    settings["draft_model"] = load_draft(args, model, processor)
    with together():
        images = fetched(_images(args.image), args)
        prompt = fill_prompt(prompt, args, processor, images)
    with wired_limit():
        pieces = stream_generate(
            model, processor, prompt, images, reuse=reuse, **settings
        )
        if is_first():
            whole = _print_answer(pieces, args)
            regions = regions_of(whole, args, processor)
            more: dict[str, Any] = {}
            if args.json and wants_objects(args, processor):
                more["boxes"] = as_objects(regions, images)
            _tell(whole, args, **more)
            _tell_problem(reuse)
            draw(regions, images, args)
        else:
            list(pieces)
        meet()
    return None


def _reuse(args: argparse.Namespace) -> Any:
    """The folder of --prefix-cache; for one answer nothing is kept in memory."""
    if args.prefix_cache is None:
        return False
    from mm1_mlx.inference.reuse import FOLDER_LIMIT, Reuse
    from mm1_mlx.processes import together

    size, limit = args.prefix_cache_size, FOLDER_LIMIT
    with together():
        return Reuse(
            folder=args.prefix_cache,
            folder_limit=limit if size is None else int(size * 1e9),
        )


def _tell_problem(reuse: Any) -> None:
    if reuse and reuse.problem:
        print(
            f"warning: --prefix-cache: the prompt was not kept: {reuse.problem}",
            file=sys.stderr,
        )


def _load(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.loading import find_model, load
    from mm1_mlx.processes import is_first, together, world

    start = time.perf_counter()
    name = args.model or DEFAULT_MODEL
    with together():
        folder = find_model(name, **conversion_progress())
        check_folders(args, settings, folder)
        model, processor = load(folder, adapter_path=args.adapter_path, group=world())
        _resize_as_asked(processor, args)
    if is_first() and not processor.tokenizer.reads_text:
        print(
            f"warning: {name} has no tokenizer: prompts and answers are token ids, "
            f"like '1 306 4966'",
            file=sys.stderr,
        )
    if is_first() and args.verbose:
        _print_setting(name, time.perf_counter() - start)
    return model, processor


def _images(given: list[str]) -> list[Any]:
    """The pictures: files of the first process, whose bytes the others receive."""
    from mm1_mlx.processes import bytes_from_first, is_first, world

    if world().size() == 1:
        return given
    images: list[Any] = []
    for image in given:
        data = b""
        if is_first() and os.path.isfile(image):
            with suppress(OSError), open(image, "rb") as file:
                data = file.read()
        data = bytes_from_first(data)
        images.append(data if data and not is_first() else image)
    return images


def _tell(whole: Any, args: argparse.Namespace, **more: Any) -> None:
    """What stands behind the answer."""
    from mm1_mlx.cli.statistics import as_json, statistics

    if args.json:
        print(as_json(whole, model=args.model or DEFAULT_MODEL, **more), flush=True)
    if not args.quiet:
        print(statistics(whole), file=sys.stderr, flush=True)


def _print_answer(pieces: Any, args: argparse.Namespace) -> Any:
    """Print the answer as it comes, unless it will be an object; give the whole one."""
    from mm1_mlx.inference.generation import joined

    kept = []
    for piece in pieces:
        # Only now is it known that the prompt and the pictures could be read: an
        # error about them stands alone.
        if not kept and args.model is None and not args.quiet:
            print(_ABOUT_TINY, file=sys.stderr)
        kept.append(piece)
        if not args.json:
            print(piece.text, end="", flush=True)
    if not args.json:
        print(flush=True)
    return joined(kept)


def _resize_as_asked(processor: Any, args: argparse.Namespace) -> None:
    """--resize-mode instead of the model's own."""
    if args.resize_mode is not None:
        from dataclasses import replace

        settings = replace(processor.image_settings, resize_mode=args.resize_mode)
        processor.image_settings = settings


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "system max_tokens temp top_p top_k min_p repetition_penalty "
        "repetition_context_size seed stop kv_bits kv_group_size quantized_kv_start "
        "prefill_step_size allow_url chat_template_config lookup num_draft_tokens "
        "check_memory"
    )
    chosen = {name: getattr(args, name) for name in names.split()}
    return {
        **chosen,
        "max_pixels": args.max_image_pixels,
        "use_template": not args.ignore_chat_template,
    }


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


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
