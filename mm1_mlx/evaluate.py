"""python -m mm1_mlx.evaluate: the benchmarks of MM1, and your own."""

if __name__ == "__main__":  # first: it takes Ctrl-C from here on
    from mm1_mlx.__main__ import enter

    enter("evaluate")

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

from mm1_mlx.cli.few_shot import (
    add_task_shots,
    check_high_resolution,
    check_task_shots,
    task_shots,
)
from mm1_mlx.cli.parser import Parser, number, some_text, whole_number
from mm1_mlx.cli.resolution import add_resolution
from mm1_mlx.cli.run import run_door
from mm1_mlx.cli.verbs import make_callable
from mm1_mlx.errors import DatasetError, MM1Error, UsageError

# Task and number of shots -> why such a row cannot be asked.
Refused = dict[tuple[str, int], MM1Error]

make_callable(__name__, "mm1_mlx.evaluation.runner")

_EXAMPLES = """examples:
  python -m mm1_mlx.evaluate --list
  python -m mm1_mlx.evaluate --model mm1-tiny --task tiny_count tiny_words --limit 100
  python -m mm1_mlx.evaluate --model FOLDER --task textvqa --data data/textvqa
  python -m mm1_mlx.evaluate --model FOLDER --task textvqa --shots 0,4,8,16 --limit 500
  python -m mm1_mlx.evaluate --model FOLDER --task mathvista --shots 0,4,8 \\
      --shots-from shots.jsonl --resolution 1344 --high-resolution-shots 3

--output keeps TASK-Kshot.jsonl, result.json, report.md and sheets of failures. The
same command goes on there where it was ended.
"""


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(
        prog="mm1_mlx evaluate",
        description="Ask a model the questions of benchmarks and score its answers.\n"
        "The scores go to stdout, everything else to stderr.",
        epilog=_EXAMPLES,
    )
    add = p.add_argument
    add("--model", metavar="NAME", help="name, folder or hub id")
    add("--adapter-path", metavar="FOLDER", help="an adapter of lora, for the model")
    add(
        "--task",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="one or more of --list; mm1-tiny is all tiny_ ones",
    )
    add("--list", action="store_true", help="print the tasks and end")
    add(
        "--tasks-from",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module with TASKS of your own, by its name or file",
    )
    _add_data(p)
    _add_prompts(p)
    _add_answers(p)
    _add_output(p)
    return p


def _add_data(p: Parser) -> None:
    add = p.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLACE",
        help="the task's folder or hub id (its own on the hub); for several tasks "
        "TASK=PLACE, or a folder that has a folder for each",
    )
    add(
        "--limit",
        type=whole_number(1),
        metavar="N",
        help="so many samples, drawn with --seed (all)",
    )
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        help="draws samples and shots: the same for every model (%(default)s)",
    )


def _add_prompts(p: Parser) -> None:
    _add_shots(p.add_argument_group("answered examples before the question (few-shot)"))
    add = p.add_argument_group("prompts").add_argument
    add(
        "--prompt-form",
        choices=("chat", "pretrain"),
        help="by the chat template, or as one text for models that know none (chat "
        "where the model has a template)",
    )
    add(
        "--wrong-image",
        action="store_true",
        help="also ask each question about another one's pictures: what is right then "
        "is guessed from the text",
    )
    add("--system", metavar="TEXT", help="system prompt")


def _add_shots(group: Any) -> None:
    group.add_argument(
        "--shots",
        type=_shots,
        nargs="+",
        action=_Flat,
        default=[0],
        metavar="K",
        help="so many before each question; several give a row each, as 0,4,8,16 (0)",
    )
    add_task_shots(group)
    group.add_argument(
        "--new-shots",
        action="store_true",
        help="draw other shots for each question; else the same for all, which are "
        "computed once",
    )


def _add_answers(p: Parser) -> None:
    group = p.add_argument_group("answers")
    add = group.add_argument
    add(
        "--batch-size",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="questions at a time (%(default)s)",
    )
    add(
        "-m",
        "--max-tokens",
        type=whole_number(1),
        metavar="N",
        help="tokens at most (as the task has it)",
    )
    add(
        "--temp",
        type=number(0),
        metavar="T",
        help="0 takes the likeliest token, as the published scores do (0)",
    )
    add("--top-p", type=number(0, 1, above=True), metavar="P", help="with --temp")
    add("--kv-bits", type=int, choices=(4, 8), help="store keys and values in few bits")
    add_resolution(group)
    add(
        "--max-image-pixels",
        type=whole_number(1),
        metavar="N",
        help="pictures with more pixels count as failed",
    )
    add("--allow-url", action="store_true", help="let pictures be https addresses")


def _add_output(p: Parser) -> None:
    group = p.add_argument_group("output")
    add = group.add_argument
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where answers and report go (evaluation/ and the model's name)",
    )
    add("--force", action="store_true", help="start anew what is in --output")
    add("--json", action="store_true", help="print one JSON object a line")
    p.add_debug(group)


class _Flat(argparse.Action):
    """ "0,4 8" is [0, 4, 8]."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None):
        found = dict.fromkeys(value for some in values for value in some)
        setattr(namespace, self.dest, list(found))


def _shots(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers of 0 or more, as 0,4,8, not '{text}'"
        )
    return found


def run(args: argparse.Namespace) -> int | None:
    """Find the tasks, load the model, ask, and report each task as it ends."""
    from mm1_mlx.evaluation.own_modules import blaming

    with blaming(args.tasks_from):
        return _run(args)


def _run(args: argparse.Namespace) -> int | None:
    from mm1_mlx.evaluation.table import all_tasks, find_tasks

    if args.list:
        print(_listing(all_tasks(args.tasks_from)))
        return None
    for flag, value in (("--model", args.model), ("--task", args.task)):
        if not value:
            raise UsageError(f"{flag} is missing")
    some_text(args.model)
    check_task_shots(args)
    tasks = find_tasks(args.task, args.tasks_from)
    places = _places(tasks, args.data)
    refused = _check(tasks, places, args)
    return _evaluate(tasks, places, args, refused)


def _check(
    tasks: list[Any], places: dict[str, Any], args: argparse.Namespace
) -> Refused:
    """What can be refused before a model is loaded; the rows without shots to show.

    Where there are others, these are asked. A mistake in --shots-from ends the run.
    """
    from mm1_mlx.evaluation.choosing import choose_samples, source_of

    if args.output is not None and args.output.is_file():
        raise UsageError(f"--output {args.output} is a file: give a folder")
    sources = [source_of(task, places[task.name]) for task in tasks]
    refused: Refused = {}
    for task, where in zip(tasks, sources, strict=True):
        refused |= _without_shots(task, where, args)
        if task.needs_data:  # what is made is good
            choose_samples(task, where, args.limit, args.seed)
    if len(refused) == len(tasks) * len(args.shots):
        raise next(iter(refused.values()))
    return refused


def _without_shots(task: Any, where: Any, args: argparse.Namespace) -> Refused:
    from mm1_mlx.evaluation.few_shot import pool_of
    from mm1_mlx.evaluation.how import How

    refused: Refused = {}
    for shots in sorted(filter(None, args.shots), reverse=True):
        try:
            pool_of(task, where, How(shots, args.seed, **task_shots(args)))
        except DatasetError as error:
            if args.shots_from is not None:
                raise
            refused[task.name, shots] = error
        else:
            break  # fewer are there, too
    return refused


def _evaluate(
    tasks: list[Any],
    places: dict[str, Any],
    args: argparse.Namespace,
    refused: Refused,
) -> int | None:
    """Ask and report row by row; 1 where one could not be, after the others."""
    import json

    from mm1_mlx.cli.evaluation import EvaluationView
    from mm1_mlx.evaluation.report import REPORT
    from mm1_mlx.evaluation.runner import evaluate
    from mm1_mlx.inference.wired import wired_limit

    output = args.output or _usual_output(args)
    model, processor = _loaded(tasks, output, args)
    view = EvaluationView()
    for (name, shots), error in sorted(refused.items()):
        view.line(f"{name}, {shots}-shot: error: {error}")
    rows = list(_rows(tasks, args))
    asked = [row for row in rows if (row[0].name, row[1]) not in refused]
    failed = len(rows) - len(asked)
    with wired_limit():
        try:
            for task, shots, wrong in asked:
                try:
                    result = evaluate(
                        model,
                        processor,
                        task,
                        data=places[task.name],
                        shots=shots,
                        wrong_images=wrong,
                        output=output,
                        watch=view,
                        **_settings(args),
                    )
                except MM1Error as error:
                    if len(rows) == 1 or isinstance(error, UsageError):
                        raise
                    failed += 1
                    view.line(f"{task.name}, {shots}-shot: error: {error}")
                    continue
                line = json.dumps(result.to_dict()) if args.json else str(result)
                print(line, flush=True)
        except KeyboardInterrupt:
            anew = " without --force" if args.force else ""
            view.line(f"stopped; the same command{anew} goes on from {output}")
            raise
        finally:
            view.close()
    if failed < len(rows):
        print(f"{output / REPORT}", file=sys.stderr)
    if failed:
        view.line(f"error: {failed} of {len(rows)} rows could not be asked, see above")
    return 1 if failed else None


def _loaded(tasks: list[Any], output: Path, args: argparse.Namespace) -> Any:
    """Model and processor; what is wrong for all rows is told here, once."""
    from mm1_mlx.cli.progress import conversion_progress
    from mm1_mlx.evaluation.report import Report
    from mm1_mlx.loading import load

    model, processor = load(
        args.model, adapter_path=args.adapter_path, **conversion_progress()
    )
    if not any("resolution" in task.settings for task in tasks):
        check_high_resolution(args, processor)
    Report.of(output, model, processor, args.force)  # refuses another model's
    return model, processor


def _usual_output(args: argparse.Namespace) -> Path:
    name = Path(args.model).name
    if args.adapter_path is not None:
        name += f"-{Path(args.adapter_path).name}"
    return Path("evaluation") / name


def _rows(tasks: list[Any], args: argparse.Namespace) -> Any:
    """What the report has a row for."""
    return product(tasks, args.shots, [False, True][: 1 + args.wrong_image])


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "limit": args.limit,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "form": args.prompt_form,
        "same_shots": not args.new_shots,
        **task_shots(args),
        "force": args.force,
        "max_tokens": args.max_tokens,
        "temp": args.temp,
        "top_p": args.top_p,
        "kv_bits": args.kv_bits,
        "system": args.system,
        "resolution": args.resolution,
        "max_tiles": args.max_tiles,
        "max_pixels": args.max_image_pixels,
        "allow_url": args.allow_url or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _places(tasks: list[Any], given: list[str]) -> dict[str, str | None]:
    """Where each task is read from, None for its own place."""
    reading = [task.name for task in tasks if task.needs_data]
    if given and not reading:
        names = ", ".join(task.name for task in tasks)
        raise UsageError(f"--data: {names} makes its own samples. Leave --data out")
    pairs = [(_task_of(text, reading), text) for text in given]
    named = {name: text.split("=", 1)[1] for name, text in pairs if name is not None}
    plain = [text for name, text in pairs if name is None]
    if len(plain) > 1:
        raise UsageError(
            f"--data names {len(plain)} places without a task; write TASK=PLACE"
        )
    found: dict[str, str | None] = {task.name: named.get(task.name) for task in tasks}
    for name in reading if plain else []:
        if found[name] is not None:
            continue
        alone = len(reading) == 1
        found[name] = plain[0] if alone else str(Path(plain[0], name))
    return found


def _task_of(text: str, reading: list[str]) -> str | None:
    """Of TASK=PLACE the task, by its name or alias; None for a place alone."""
    from mm1_mlx.evaluation.tasks import ALIASES

    name, equals, _ = text.partition("=")
    if not equals:
        return None
    found = name if name in reading else ALIASES.get(name, name)
    if found in reading:
        return found
    if Path(text).expanduser().exists():
        return None
    raise UsageError(
        f"--data {text}: '{name}' is not one of the tasks that are asked here and read "
        f"data ({', '.join(reading)})"
    )


def _listing(tasks: dict[str, Any]) -> str:
    """The tasks, a line each."""
    lines = []
    width = max(map(len, tasks), default=0) + 2
    for name, task in sorted(tasks.items()):
        place = task.hub or ("--data" if task.needs_data else "made here")
        shots = "" if task.shot_split is None else f", shots from {task.shot_split}"
        if shots and task.hub and not task.hub_shots:
            shots += " of the original files"
        lines.append(f"{name:<{width}}{task.summary} ({task.split}{shots}; {place})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command: arguments in, exit code out."""
    return run_door(parser(), run, argv)
