"""Flags of few-shot prompting, for generate and for evaluate: which examples stand in
front, and how they are read."""

import argparse
from collections.abc import Callable
from typing import Any

from mm1_mlx.cli.parser import Parser, some_text, whole_number
from mm1_mlx.cli.resolution import picture_limits
from mm1_mlx.errors import PromptError, UsageError


def _template(text: str) -> str:
    """A shell passes a line break as two letters."""
    return some_text(text).replace("\\n", "\n").replace("\\t", "\t")


def add_shots(parser: Parser) -> None:
    """--shots and how they are chosen and written."""
    group = parser.add_argument_group("examples before the prompt (few-shot)")
    add = group.add_argument
    add(
        "--shots",
        metavar="FILE",
        help='in every line {"image": FILE, "prompt": TEXT, "answer": TEXT}, also with '
        '"images": [FILE, ...], "reasoning": TEXT, or without a prompt',
    )
    add(
        "--num-shots",
        type=whole_number(1),
        metavar="K",
        help="how many are shown (all)",
    )
    _add_choice(add, "random; all are shown in the file's order")
    add(
        "--shot-seed",
        type=whole_number(0, 2**64 - 1),
        metavar="N",
        help="the same seed chooses the same ones (0)",
    )
    _add_features(add)
    _add_form(add)
    _add_reasoning(add)
    _add_resolution(add)


def add_task_shots(group: Any) -> None:
    """The same for evaluate, whose tasks write them."""
    add = group.add_argument
    add(
        "--shots-from",
        metavar="FILE",
        help="take them from here, one file for all --task, not from each task's "
        "training split: in every line "
        '{"image": FILE, "prompt": QUESTION, "answer": TEXT}, as generate --shots has '
        'it, also with "reasoning"',
    )
    _add_choice(add, "random, by --seed")
    _add_features(add)
    _add_reasoning(add)
    _add_resolution(add)


def _add_choice(add: Callable, usual: str) -> None:
    add(
        "--shot-choice",
        choices=("first", "random", "nearest"),
        help="nearest: to the question's picture, by the encoder's features, the "
        f"nearest last ({usual})",
    )


def _add_features(add: Callable) -> None:
    add(
        "--balance-shots",
        action="store_true",
        help="as many of each answer as can be",
    )
    add(
        "--shot-features",
        metavar="FILE",
        help="keep features for nearest here: the next run reads them",
    )


def _add_form(add: Callable) -> None:
    """How they are written."""
    add(
        "--shot-template",
        type=_template,
        metavar="TEXT",
        help="write them as text, as '{image} Question: {prompt} Short answer: "
        "{answer}', and not as turns of the chat; without prompts '{image} {answer}'",
    )
    add(
        "--shot-separator",
        type=_template,
        metavar="TEXT",
        help=r"stands between them, and ends an answer, with --shot-template (\n)",
    )


def _add_reasoning(add: Callable) -> None:
    """Whether they think aloud."""
    add(
        "--no-shot-reasoning",
        action="store_true",
        help="leave out what they have as reasoning",
    )
    add(
        "--answer-mark",
        type=some_text,
        metavar="TEXT",
        help="stands between their reasoning and their answer (Answer:)",
    )


def _add_resolution(add: Callable) -> None:
    """How large they are read."""
    add(
        "--high-resolution-shots",
        type=whole_number(0),
        metavar="N",
        help="read the last N in --resolution, as the question is, and those before "
        "in the encoder's own, which takes fewer tokens (all as the question; many "
        "pictures are then not cut into dynamic tiles)",
    )


def few_shot(args: argparse.Namespace) -> Any:
    """The FewShot of the flags, or None. Raises UsageError and DatasetError."""
    given = {
        "num_shots": args.num_shots,
        "choice": args.shot_choice,
        "seed": args.shot_seed,
        "balanced": args.balance_shots or None,
        "template": args.shot_template,
        "separator": args.shot_separator,
        "reasoning": False if args.no_shot_reasoning else None,
        "answer_mark": args.answer_mark,
        "features": args.shot_features,
        "high_resolution_shots": args.high_resolution_shots,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.shots is not None:
        if args.shot_features is not None and args.shot_choice != "nearest":
            raise UsageError("--shot-features goes with --shot-choice nearest")
        from mm1_mlx.inference.few_shot import FewShot

        shots = FewShot(args.shots, **given)
        _check_used(args, shots)
        return shots
    flags = {
        "num_shots": "--num-shots",
        "balanced": "--balance-shots",
        "reasoning": "--no-shot-reasoning",
        "answer_mark": "--answer-mark",
        "high_resolution_shots": "--high-resolution-shots",
    }
    for name in given:
        raise UsageError(f"{flags.get(name, f'--shot-{name}')} goes with --shots FILE")
    return None


def _check_used(args: argparse.Namespace, shots: Any) -> None:
    """UsageError for flags that would change nothing."""
    if args.shot_seed is not None and shots.choice != "random":
        raise UsageError("--shot-seed goes with --shot-choice random")
    for flag, given in (
        ("--no-shot-reasoning", args.no_shot_reasoning),
        ("--answer-mark", args.answer_mark is not None),
    ):
        if given and args.shot_template is not None:
            raise UsageError(
                f"{flag}: --shot-template says what is shown, leave it out"
            )
        if given and shots.examples[0].reasoning is None:
            raise UsageError(f'{flag} goes with shots that have "reasoning"')
    if args.no_shot_reasoning and args.answer_mark is not None:
        raise UsageError(
            "--answer-mark goes with reasoning: --no-shot-reasoning hides it"
        )


def told_of_shots(whole: Any, args: argparse.Namespace) -> dict[str, Any]:
    """For --json: the lines of the examples, and reasoning and answer apart."""
    told: dict[str, Any] = {"shots": list(whole.shots)} if args.shots else {}
    if whole.answer_mark is not None:
        told |= {"reasoning": whole.reasoning, "answer": whole.answer}
    return told


def check_task_shots(args: argparse.Namespace) -> None:
    """UsageError for flags about shots of evaluate that do not go together."""
    flags = {
        "--shots-from": args.shots_from,
        "--shot-choice": args.shot_choice,
        "--new-shots": args.new_shots,
        "--balance-shots": args.balance_shots,
        "--shot-features": args.shot_features,
        "--no-shot-reasoning": args.no_shot_reasoning,
        "--answer-mark": args.answer_mark,
        "--high-resolution-shots": args.high_resolution_shots,
    }
    for flag, value in flags.items():
        if value is not None and value is not False and not max(args.shots):
            raise UsageError(f"{flag} goes with --shots K")
    for flag in ("--no-shot-reasoning", "--answer-mark"):
        if flags[flag] and args.shots_from is None:
            raise UsageError(f"{flag} goes with --shots-from FILE")
    choice = args.shot_choice or "random"
    if args.shot_features is not None and choice != "nearest":
        raise UsageError("--shot-features goes with --shot-choice nearest")
    if args.new_shots and choice != "random":
        raise UsageError(
            f"--new-shots draws at random for each question: leave it or --shot-choice "
            f"{choice} out"
        )


def task_shots(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `evaluate` about shots, beside their number."""
    given = {
        "shots_from": args.shots_from,
        "shot_choice": args.shot_choice,
        "balance_shots": args.balance_shots or None,
        "shot_features": args.shot_features,
        "shot_reasoning": False if args.no_shot_reasoning else None,
        "answer_mark": args.answer_mark,
        "high_resolution_shots": args.high_resolution_shots,
    }
    return {name: value for name, value in given.items() if value is not None}


def look(args: argparse.Namespace, shots: Any, model: Any, processor: Any) -> None:
    """Features of all examples, where the nearest are wanted: with a bar, it may take
    long. UsageError for --high-resolution-shots that changes nothing."""
    if shots is None:
        return
    check_high_resolution(args, processor)
    if shots.choice != "nearest":
        return
    from mm1_mlx.cli.progress import counting

    with counting("features") as progress:
        shots.look(model, processor, progress=progress, **picture_limits(args))


def check_high_resolution(args: argparse.Namespace, processor: Any) -> None:
    """UsageError for --high-resolution-shots where all would be read alike."""
    from mm1_mlx.inference.few_shot import check_resolutions

    try:
        check_resolutions(args.high_resolution_shots, processor, args.resolution)
    except PromptError as error:
        raise UsageError(str(error).removesuffix(".")) from None
