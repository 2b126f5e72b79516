"""What a command asks: the prompt, its pictures, films and conversation, from flags."""

import argparse
import glob
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.resolution import picture_limits
from mm1_mlx.errors import ContextError, ImageError, PromptError, UsageError


def add_prompt(parser: Parser) -> None:
    """--image, --video, --frames, --messages and --prompt."""
    add = parser.add_argument
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="one or more pictures, in the order of their places; may be repeated. A "
        "quoted pattern ('a*.png') is every file that fits, a2 before a10",
    )
    add(
        "--video",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="a film, a GIF, WebP or PNG animation, or a folder of frames; its place "
        "in the prompt is <video>",
    )
    add(
        "--frames",
        type=whole_number(1, 4096),  # MOST_FRAMES of inputs/video.py
        metavar="N",
        help="frames of each video, from the middle of N equal parts (24)",
    )
    add(
        "--messages",
        metavar="FILE",
        help="a conversation: a JSON list of messages, or one in every line; --prompt "
        "goes on with it",
    )
    add(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="with <image> where each picture belongs (else they come first); "
        "'-' reads stdin",
    )


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


def check_asking(args: argparse.Namespace, processes: int) -> None:
    """UsageError for flags that do not go together."""
    if args.prompt is None and args.messages is None and args.shots is None:
        raise UsageError("the following arguments are required: -p/--prompt")
    if args.frames is not None and not args.video:
        raise UsageError("--frames goes with --video FILE")
    if args.messages is not None and args.ignore_chat_template:
        raise UsageError("--messages needs the chat template: leave one of them out")
    if args.messages is not None and (args.box or args.point):
        raise UsageError("--box and --point go with --prompt, not with --messages")
    if processes == 1:
        return
    if args.prompt == "-":
        raise UsageError("-p - cannot be read by several processes: give the text")
    for name in ("video", "messages", "shots"):  # the others have no such files
        if getattr(args, name):
            raise UsageError(f"--{name} cannot be read by several processes yet")


def read_asked(args: argparse.Namespace) -> tuple[Any, list]:
    """The prompt as text or messages, and all pictures in the order of their places."""
    from mm1_mlx.inputs.conversation import read_conversation
    from mm1_mlx.inputs.prompts import (
        IMAGE_TOKEN,
        VIDEO_TOKEN,
        place_images,
        with_image_slots,
    )
    from mm1_mlx.inputs.video import FRAMES, place_videos, video_frames

    text = None if args.prompt is None else read_prompt(args.prompt)
    limits = picture_limits(args)
    count = args.frames or FRAMES
    images = _expanded(args.image)
    if args.messages is None:
        videos = [video_frames(video, count, **limits) for video in args.video]
        return place_videos(text or "", images, videos)
    messages, held = read_conversation(args.messages, **limits)
    said = [m["content"] for m in messages if m["role"] == "user"]
    if args.video and any(VIDEO_TOKEN in content for content in said):
        raise PromptError(
            f"The conversation in {args.messages} has {VIDEO_TOKEN} in its text, which "
            f'--video does not fill: write a part {{"type": "video", "video": FILE}}.'
        )
    if text is None and messages and messages[-1].get("role") == "assistant":
        raise PromptError(
            f"The conversation in {args.messages} ends with an answer: ask something "
            f"with -p."
        )
    videos = [video_frames(video, count, **limits) for video in args.video]
    if text is None:
        if held and (images or videos):
            raise PromptError(
                f"The conversation in {args.messages} holds its pictures: give no "
                f"others, or a question about them with -p."
            )
        return messages, held or [*images, *(f for frames in videos for f in frames)]
    if held:
        messages = place_images(messages, len(held))
    else:  # the first pictures are those of the conversation's marks
        marks = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
        held, images = images[:marks], images[marks:]
        if len(held) < marks:  # which says how many are missing
            place_images([*messages, {"role": "user", "content": text}], len(held))
    text, images = place_videos(text, images, videos)
    text = with_image_slots(text, len(images))
    return [*messages, {"role": "user", "content": text}], [*held, *images]


def _expanded(names: list[str]) -> list[str]:
    """Patterns that no shell has replaced, as the files that fit."""
    from mm1_mlx.inputs.sources import pasted_path, shown
    from mm1_mlx.inputs.video import natural_order

    found: list[str] = []
    for name in names:
        fits: list[str] = []
        if glob.has_magic(name) and "://" not in name and not os.path.lexists(name):
            pattern = os.path.expanduser(name)
            fits = sorted(glob.glob(pattern), key=natural_order)
            if not fits and not os.path.lexists(pasted_path(name)):
                raise ImageError(
                    f"No file fits the pattern {shown(name)}. Check the folder and the "
                    f"ending."
                )
        found += fits or [name]
    return found


@contextmanager
def naming_frames(args: argparse.Namespace, images: list) -> Iterator[None]:
    """A prompt that is too long for its videos: say how many frames would fit."""
    from mm1_mlx.inputs.video import is_frame

    try:
        yield
    except ContextError as error:
        frames = [place for place, image in enumerate(images) if is_frame(image)]
        own = error.image_ids[len(error.image_ids) - len(images) :]  # not of shots
        if not args.video or args.messages or not frames or len(own) < len(images):
            raise
        fewer = -(-error.too_many // min(own[place] for place in frames))
        count = (len(frames) - fewer) // len(args.video)
        if count < 1:
            raise
        raise ContextError(
            f"{error} Or take fewer frames: --frames {count}."
        ) from error
