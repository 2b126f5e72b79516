"""Flags of speculative decoding, and the model that drafts."""

import argparse
from typing import Any

from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.errors import UsageError


def add_drafting(parser: Parser) -> None:
    """--draft-model and --num-draft-tokens, as mlx-lm calls them, and --lookup."""
    group = parser.add_argument_group("guessing ahead (the same answer, in 32 bits)")
    add = group.add_argument
    guesser = group.add_mutually_exclusive_group()
    guesser.add_argument(
        "--draft-model",
        metavar="NAME",
        help="a smaller model of the same vocabulary that guesses the next tokens; it "
        "reads pictures in the --resolution, too, where it can, and one that reads "
        "none gets the prompt without them",
    )
    guesser.add_argument(
        "--lookup",
        type=whole_number(1, 16),
        metavar="N",
        help="guess what followed where the last tokens (N at most) stood before: "
        "needs no model, and suits answers that repeat the prompt",
    )
    add(
        "--num-draft-tokens",
        type=whole_number(1, 64),
        default=3,
        metavar="N",
        help="tokens guessed at a time, 64 at most (%(default)s)",
    )


def load_draft(args: argparse.Namespace, model: Any, processor: Any) -> Any:
    """The model of --draft-model and its processor, or None. It must suit the model."""
    if args.draft_model is None:
        return None
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.inference.settings import Settings
    from mm1_mlx.inference.speculative import check_draft
    from mm1_mlx.loading import load

    draft = load(args.draft_model, **conversion_progress())
    check_draft(Settings(draft_model=draft), model, processor)
    return draft


def check_drafting(args: argparse.Namespace, processes: int) -> None:
    """UsageError where several processes share a model and one more should guess."""
    if processes > 1 and args.draft_model is not None:
        raise UsageError(
            "--draft-model does not go with several processes: use --lookup N"
        )
