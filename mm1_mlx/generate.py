"""python -m mm1_mlx.generate: answer a prompt about images."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("generate")

import argparse
import os
import sys
from contextlib import suppress
from typing import Any

from mm1_mlx.cli.answering import (
    ABOUT_TINY,
    DEFAULT_MODEL,
    add_answer,
    add_model,
    add_output,
    add_talk,
    check_memory,
    folder_reuse,
    load_model,
    resize_as_asked,
    settings_of,
    tell_problem,
)
from mm1_mlx.cli.asking import add_prompt, check_asking, naming_frames, read_asked
from mm1_mlx.cli.boxes import (
    add_boxes,
    as_objects,
    check_boxes,
    check_drawings,
    draw,
    fetched,
    fill_prompt,
    regions_of,
    wants_objects,
)
from mm1_mlx.cli.drafting import check_drafting
from mm1_mlx.cli.few_shot import add_shots, few_shot, look, told_of_shots
from mm1_mlx.cli.generation_plan import add_plan, print_plan
from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.progress import encoder_bar
from mm1_mlx.cli.run import run_door
from mm1_mlx.cli.verbs import make_callable

make_callable(__name__, "mm1_mlx.inference.generation")

_EXAMPLES = """examples:
  python -m mm1_mlx.generate --image a.png -p "What colour is the star?"
  python -m mm1_mlx.generate --image a.png b.png -p "Which has more circles?"
  python -m mm1_mlx.generate --video clip.mp4 --frames 8 -p "What happens?"
  python -m mm1_mlx.generate --shots shots.jsonl --num-shots 8 --image a.png -p "What?"
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
    add_model(parser)
    add_prompt(parser)
    add_talk(parser)
    add(
        "--ignore-chat-template",
        action="store_true",
        help="take the prompt as it is, without the model's chat template",
    )
    add_plan(add_answer(parser))
    add_boxes(parser)
    add_shots(parser)
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--json", action="store_true", help="one JSON object in place of the text")
    add_output(group, "only the answer")
    parser.add_debug(group)
    return parser


def run(args: argparse.Namespace) -> int | None:
    """Load, answer, print."""
    from mm1_mlx.inference.generation import stream_generate
    from mm1_mlx.inference.wired import wired_limit
    from mm1_mlx.processes import is_first, meet, together, world

    check_asking(args, world().size())
    check_memory(args)
    check_drafting(args, world().size())
    check_boxes(args)
    settings = settings_of(args) | {"use_template": not args.ignore_chat_template}
    settings["shots"] = few_shot(args)
    prompt, images = read_asked(args)
    check_drawings(args, images)
    if args.plan:
        name = args.model or DEFAULT_MODEL
        with naming_frames(args, images):
            return print_plan(args, settings, prompt, images, name, resize_as_asked)
    # For one answer nothing is kept in memory.
    reuse = folder_reuse(args) or False
    model, processor = load_model(args, settings)
    look(args, settings["shots"], model, processor)
    with together():
        images = fetched(_images(images), args)
        prompt = fill_prompt(prompt, args, processor, images)
    told = encoder_bar(is_first() and not args.quiet)
    with wired_limit(), naming_frames(args, images), told as settings["on_images"]:
        pieces = stream_generate(
            model, processor, prompt, images, reuse=reuse, **settings
        )
        if is_first():
            whole = _print_answer(pieces, args)
            regions = regions_of(whole, args, processor, len(images))
            more = told_of_shots(whole, args)
            if args.json and wants_objects(args, processor):
                more["boxes"] = as_objects(regions, images, args)
            _tell(whole, args, **more)
            tell_problem(reuse)
            draw(regions, images, args)
        else:
            list(pieces)
        meet()
    return None


def _images(given: list) -> list[Any]:
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
            print(ABOUT_TINY, file=sys.stderr)
        kept.append(piece)
        if not args.json:
            print(piece.text, end="", flush=True)
    if not args.json:
        print(flush=True)
    return joined(kept)


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
