"""Asks a model mm1-tiny's test questions and counts the right answers.

    python -m examples.mm1_tiny.evaluate --model mm1-tiny --wrong-image --json out.json

Greedy, exact match, through the same calls as a user's program: load, the processor,
batch_generate. The questions come from seeds, digits, words and photographs that
training never used. With --wrong-image every question is asked again about the picture
of another one: what is still right there is guessed from the text.
"""

import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from mm1_mlx.cli.parser import Parser, did_you_mean, whole_number
from mm1_mlx.cli.progress import progress_bar
from mm1_mlx.cli.run import INTERRUPTED, run_door
from mm1_mlx.errors import CheckpointError, DatasetError

FEW_SHOT = "few_shot"
SHOTS = (0, 1, 2, 3)
MAX_TOKENS = 64  # the longest caption takes half of it
MISTAKES = 20  # kept per task
READING = ("digits", "words")  # pictures that show no scene


@dataclass
class Asked:
    """A test question, the groups that it counts for, and the pictures to show."""

    prompt: str | list[dict]
    answer: str
    images: list[Any]
    groups: dict[str, str] = field(default_factory=dict)
    judge: str = "exact"

    def is_right(self, found: str) -> bool:
        """Whether this is the answer."""
        from examples.mm1_tiny.examples import is_right

        return is_right(self.answer, found, self.judge)


# --- questions -----------------------------------------------------------------------


def make_questions(task: str, n: int, seed: int) -> list[Asked]:
    """n questions of a task; the same for the same seed, whatever else is asked."""
    return list(islice(questions(task, seed), n))


def questions(task: str, seed: int) -> Iterator[Asked]:
    """The questions of a task or an ability, one after the other, without an end."""
    from examples.mm1_tiny import abilities, edges, tasks

    makers = edges.TASKS | abilities.TASKS | tasks.TASKS
    same = abilities.SAME_QUESTIONS.get(task, task)
    rng = random.Random(f"test/{seed}/{same}")
    for i in count():
        if task == "elsewhere":
            yield _elsewhere(rng, i)
        elif task == "held_out":
            yield _held_out(rng)
        else:
            e = makers[task](rng)
            yield Asked(e.prompt, e.answer, e.images, e.groups, e.judge)


def _elsewhere(rng: random.Random, i: int) -> Asked:
    """As the task itself, with the renderers in turn and both named."""
    from examples.mm1_tiny import elsewhere
    from examples.mm1_tiny.pictures import scene_with
    from examples.mm1_tiny.tasks import SCENE_TASKS

    renderers = elsewhere.backends()
    renderer, task = renderers[i % len(renderers)], rng.choice(SCENE_TASKS)
    scene, question = scene_with(task, rng)
    image = elsewhere.draw(scene, rng, renderer)
    groups = {"renderer": renderer, "question": task}
    return Asked(question.question, question.answer, [image], groups)


def _held_out(rng: random.Random) -> Asked:
    from examples.mm1_tiny import drawing
    from examples.mm1_tiny.tasks import held_out_question

    scene, question = held_out_question(rng)
    image = drawing.draw(scene, rng)
    groups = {"question": question.task}
    return Asked(question.question, question.answer, [image], groups)


def few_shot_questions(n: int, seed: int) -> dict[int, list[Asked]]:
    """The same n last pictures after 0, 1, 2 and 3 answered ones."""
    rounds = list(islice(few_shot_rounds(seed), n))
    return {shots: [asked[shots] for asked in rounds] for shots in SHOTS}


def few_shot_rounds(seed: int) -> Iterator[dict[int, Asked]]:
    """One picture after another, each after 0, 1, 2 and 3 answered ones.

    Only the answered ones tell what is to be named: a colour, a shape, both, a count.
    """
    from examples.mm1_tiny.pictures import BARE_TASKS, bare_prompt, bare_shot

    rng = random.Random(f"test/{seed}/{FEW_SHOT}")
    while True:
        task = rng.choice(BARE_TASKS[:4])
        shown = [bare_shot(task, rng, 1.0) for _ in range(max(SHOTS) + 1)]
        answers = [shot.questions[0].answer for shot in shown]
        asked = {}
        for shots in SHOTS:
            first = len(shown) - 1 - shots
            images = [shot.image for shot in shown[first:]]
            prompt = bare_prompt(answers[first:-1])
            asked[shots] = Asked(prompt, answers[-1], images, {"named": task})
        yield asked


def wrong_pictures(task: str, asked: Sequence[Asked], seed: int) -> list[list[Any]]:
    """For each question the pictures of another one, which say nothing about it.

    Within a task the pictures move on by one: the questions are drawn independently,
    so the next one's pictures are as good as new ones. Every photograph has the same
    answer, so `unknown` is shown scenes instead.
    """
    if task == "unknown":
        return [other.images for other in make_questions("count", len(asked), seed)]
    return [asked[(i + 1) % len(asked)].images for i in range(len(asked))]


# --- answers -------------------------------------------------------------------------

Answer = Callable[[Sequence[str], Sequence[list]], list[str]]


def answerer(model: Any, processor: Any) -> Answer:
    """From prompts and their pictures to answers, by the library's batch_generate."""
    from mm1_mlx import batch_generate

    def answer(prompts: Sequence[str], images: Sequence[list]) -> list[str]:
        responses = batch_generate(
            model, processor, prompts, images, max_tokens=MAX_TOKENS
        )
        return [response.text.strip() for response in responses]

    return answer


def answers_to(
    answer: Answer,
    asked: Sequence[Asked],
    images: Sequence[list],
    batch: int,
    advance: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """The answers in order; inside, questions of one length go together."""

    def size(i: int) -> tuple[int, int, int]:
        return len(images[i]), len(asked[i].answer) // 8, len(asked[i].prompt)

    order = sorted(range(len(asked)), key=size)
    found = [""] * len(asked)
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        given = answer([asked[i].prompt for i in chunk], [images[i] for i in chunk])
        for i, text in zip(chunk, given, strict=True):
            found[i] = text
        advance(len(chunk))
    return found


def score(asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, Any]:
    """The tally of a task, by group too, with its first mistakes."""
    from examples.mm1_tiny.scoring import grouped, tally

    right = [item.is_right(a) for a, item in zip(answers, asked, strict=True)]
    result = tally(right)
    # What one answer to everything would get right.
    commonest = Counter(item.answer for item in asked).most_common(1)[0][1]
    result["commonest_answer"] = round(commonest / len(asked), 4)
    if any(item.groups for item in asked):
        result["groups"] = grouped(right, [item.groups for item in asked])
    result["mistakes"] = [
        {"prompt": item.prompt, "expected": item.answer, "found": text}
        for item, text, good in zip(asked, answers, right, strict=True)
        if not good
    ][:MISTAKES]
    return result


class Evaluation:
    """Runs tasks one after the other; `report` is whole after each of them."""

    def __init__(self, answer: Answer, n: int, seed: int, batch: int):
        from examples.mm1_tiny.scoring import tally

        self._answer, self._batch = answer, batch
        self.n, self.seed = n, seed
        self._scenes: list[bool] = []  # of each scene shown: was it declined?
        self.report: dict[str, Any] = {"n": n, "seed": seed, "tasks": {}}
        self.report["says_unknown"] = tally([])

    def run(
        self, task: str, wrong_image: bool, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Ask one task's questions, with the right pictures and, if wanted, wrong."""
        from examples.mm1_tiny.photos import UNKNOWN_ANSWER
        from examples.mm1_tiny.scoring import tally

        asked = make_questions(task, self.n, self.seed)
        shown = [item.images for item in asked]
        answers = answers_to(self._answer, asked, shown, self._batch, advance)
        result = score(asked, answers)
        if wrong_image:
            shown = wrong_pictures(task, asked, self.seed + 1)
            blind = answers_to(self._answer, asked, shown, self._batch, advance)
            right = [item.is_right(a) for a, item in zip(blind, asked, strict=True)]
            result["wrong_image"] = tally(right)
        unknown = [text == UNKNOWN_ANSWER for text in answers]
        result["says_unknown"] = sum(unknown)
        if task != "unknown" and task not in READING:
            self._scenes += unknown
            self.report["says_unknown"] = tally(self._scenes)
        self.report["tasks"][task] = result
        return result

    def run_few_shot(self, advance: Callable[[int], None]) -> dict[str, Any]:
        """Ask for what the pictures before were named by, after 0 to 3 of them."""
        results = {}
        for shots, asked in few_shot_questions(self.n, self.seed).items():
            shown = [item.images for item in asked]
            answers = answers_to(self._answer, asked, shown, self._batch, advance)
            results[str(shots)] = score(asked, answers)
        self.report[FEW_SHOT] = results
        return results


# --- the command ---------------------------------------------------------------------


def task_names() -> list[str]:
    """All tasks in the order of the tables."""
    from examples.mm1_tiny.tasks import TASKS

    return [name for name in TASKS if name != FEW_SHOT] + [FEW_SHOT]


def parser() -> Parser:
    """The flags of this command."""
    parser = Parser(
        prog="python -m examples.mm1_tiny.evaluate",
        description="Accuracy per task with 95% intervals (Wilson), greedy, exact "
        "match.\nThe tables go to stdout, progress to stderr. Ctrl-C ends it with the "
        "tasks that are done.",
    )
    add = parser.add_argument
    add("--model", default="mm1-tiny", metavar="NAME", help="name, folder or hub id")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a run's checkpoint (joint.safetensors), in place of the model's weights",
    )
    add(
        "-n",
        "--number",
        type=whole_number(2),
        default=500,
        help="questions per task; default: %(default)s",
    )
    add("--tasks", nargs="+", metavar="TASK", help="default: all of tasks.TASKS")
    add("--seed", type=whole_number(0), default=1000, help="default: %(default)s")
    add("--wrong-image", action="store_true", help="also with another one's pictures")
    add("--batch", type=whole_number(1), default=64, help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write everything that was counted")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_debug()
    return parser


def load_for(name: str, weights: Path | None) -> tuple[Any, Any]:
    """The model and processor; `weights` is a checkpoint of a training run."""
    from mm1_mlx import load

    if weights is None:
        return load(name)
    from mm1_mlx.checkpoint.folder import read_config
    from mm1_mlx.checkpoint.hub import find_folder
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.training.state import load_model_state

    folder = find_folder(name)
    config = read_config(folder)
    return load_model_state(weights, config), Processor.from_folder(folder, config)


def _chosen(names: list[str] | None) -> list[str]:
    known = task_names()
    if unknown := [name for name in names or [] if name not in known]:
        close = did_you_mean(unknown[0], known)
        raise DatasetError(
            f"There is no task '{unknown[0]}'{close} The tasks are {', '.join(known)}."
        )
    return [name for name in known if names is None or name in names]


def run(args) -> int:
    """Ask, tell each task's result as it comes, and write the reports."""
    tasks = _chosen(args.tasks)
    for path in (args.json, args.markdown):
        if path is not None and not path.parent.is_dir():
            raise CheckpointError(f"There is no folder {path.parent} for {path.name}.")
    start = time.perf_counter()
    work = Evaluation(
        answerer(*load_for(args.model, args.weights)),
        args.number,
        args.seed,
        args.batch,
    )
    work.report["model"] = str(args.weights or args.model)
    shares = [len(SHOTS) if t == FEW_SHOT else 1 + args.wrong_image for t in tasks]
    bar = progress_bar(args.number * sum(shares), "questions", unit="q")
    code = 0
    try:
        for task in tasks:
            line = _run_task(work, task, args.wrong_image, bar)
            bar.clear()
            print(f"{task}: {line}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        bar.close()
    work.report["seconds"] = round(time.perf_counter() - start, 1)
    work.report["machine"] = _machine()
    return _finish(work.report, args, code)


def _run_task(work: Evaluation, task: str, wrong_image: bool, bar: Any) -> str:
    """One task, and what to say about it."""
    if task == FEW_SHOT:
        results = work.run_few_shot(bar.update)
        return ", ".join(f"{s} shots {_short(r)}" for s, r in results.items())
    result = work.run(task, wrong_image, bar.update)
    line = _short(result)
    if wrong_image:
        line += f", wrong picture {100 * result['wrong_image']['accuracy']:.1f}%"
    return line


def _finish(report: dict[str, Any], args, code: int) -> int:
    """Write and print the report; the exit code."""
    from examples.mm1_tiny.scoring import markdown, missed

    report["complete"] = code == 0
    text = markdown(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")
    print(text, end="")
    lines = missed(report)
    for line in lines:
        print(f"below its goal: {line}", file=sys.stderr)
    return code or int(bool(lines and args.check))


def _short(result: dict[str, Any]) -> str:
    return (
        f"{100 * result['accuracy']:.1f}% "
        f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
    )


def _machine() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
    }


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    return run_door(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
