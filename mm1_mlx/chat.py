"""python -m mm1_mlx.chat: talk with a model about pictures."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("chat")

import argparse
import sys

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
    settings_of,
)
from mm1_mlx.cli.chat_commands import COMMANDS, table
from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.progress import encoder_bar
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import UsageError

_EPILOG = f"""in the chat:
{table()}
  A picture's path, typed or dragged into the terminal, is the same as /image, alone
  or before or behind a question; within a question it is the picture in that place.
  \"\"\" begins and ends an input of several lines; so does a backslash at the
  end of each line but the last. Ctrl-C stops an answer, Ctrl-D leaves. Videos, and
  boxes in questions, are asked about with generate.

through a pipe each line is a turn, and only answers are printed; the exit code is 1
where something failed:
  printf '/image a.png\\nWhat is this?\\nWhat colour is it?\\n' | python -m mm1_mlx.chat
"""


def parser() -> Parser:
    """The flags of this door: those of generate that a chat has a use for."""
    parser = Parser(
        prog="mm1_mlx chat",
        description="Talk with a model about pictures. Earlier turns and pictures are "
        "remembered, and not computed again.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="pictures for the first question",
    )
    parser.add_argument(
        "--load",
        metavar="FILE",
        help="go on with a conversation: /save wrote it, or it is as for --messages",
    )
    add_talk(parser)
    add_answer(parser)
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--stats", action="store_true", help="statistics after each answer")
    add(
        "--no-history",
        action="store_true",
        help="do not keep what is typed for the next session",
    )
    add_output(group, "no greeting, no notes")
    parser.add_debug(group)
    return parser


def run(args: argparse.Namespace) -> int:
    """Load, and talk until the input ends."""
    from mm1_mlx.cli.chat_lines import Lines
    from mm1_mlx.cli.chat_session import Session
    from mm1_mlx.convert.cache import cache_folder
    from mm1_mlx.inference.conversation import Conversation
    from mm1_mlx.processes import world

    if world().size() > 1:
        raise UsageError("a chat runs in one process: use generate with mlx.launch")
    check_memory(args)
    history = None if args.no_history else cache_folder() / "chat_history"
    lines = Lines(history, [f"/{name}" for name in COMMANDS])
    settings = settings_of(args)
    reuse = folder_reuse(args)
    model, processor = load_model(args, settings)
    with encoder_bar(not args.quiet) as bar:
        settings["on_images"] = bar
        talk = Conversation(model, processor, reuse=reuse, **settings)
        session = Session(talk, processor, lines, args, bar)
        session.start()
        if lines.interactive and not args.quiet:
            if args.model is None:
                print(ABOUT_TINY, file=sys.stderr)
            name = args.model or DEFAULT_MODEL
            print(
                f"{name}. /help shows the commands, Ctrl-D leaves.",
                file=sys.stderr,
                flush=True,
            )
        return session.run()


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
