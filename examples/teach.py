"""Teach a model new questions, and see what it still knows of the old ones.

    python -m examples.corners data DATA       # or labels, sentences: draws DATA
    python -m examples.teach DATA OUT
    python -m examples.teach DATA OUT4 --quantized

DATA has train.jsonl (new questions, and old ones among them), valid.jsonl and
test.jsonl, whose lines name their "task". The commands that it runs are printed, to be
repeated by hand: `quantize` where wanted, `lora`, `fuse`. Every question of test.jsonl
is asked before, after, and of the fused model. The table says what was learned, what
was lost, and whether the fused model gives the same answers; OUT/answers.jsonl has all
answers.

What stands behind `--` goes to `lora` in place of RECIPE.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from examples.mm1_tiny.evaluate import Asked, answerer, answers_to, make_questions
from examples.mm1_tiny.replay import COUNTS, KINDS, old_question
from mm1_mlx.cli.parser import Parser, whole_number
from mm1_mlx.cli.progress import duration, progress_bar
from mm1_mlx.cli.run import run_door
from mm1_mlx.errors import DatasetError, MM1Error

# Chosen on test questions of another seed than those that the README's figures are of.
RECIPE = ("--iters", "150", "--batch-size", "16", "--learning-rate", "1e-3")
# Groups of 32 keep mm1-tiny better than 64: its rows have 128 numbers.
BITS = ("--q-bits", "4", "--q-group-size", "32")
# How an adapter is fused, by the name of what comes out. In 4 bits again much of what
# it has added would be rounded off.
FUSED: dict[str, tuple[str, ...]] = {"fused": ()}
FUSED4 = {"fused8": ("--q-bits", "8"), "fused16": ("--dequantize",)}
NEW = "new"  # the task of a line that names none
TESTED = (
    *KINDS[:10], "words", "compare", "held_out", "of_two", "absent", "many", "few_shot",
    "digits", "unknown",
)  # fmt: skip

Sample = Callable[[Random], tuple[Any, str, str]]


@dataclass(frozen=True)
class NewTask:
    """What is taught. sample: a picture, a question and its answer. close: the old
    kinds of question that it may displace; half of the old ones are of them."""

    name: str
    sample: Sample
    close: tuple[str, ...] = COUNTS


# --- data ----------------------------------------------------------------------------


@dataclass
class Writer:
    """Saves the pictures of a split into a folder of their own; keeps its lines."""

    folder: Path
    place: str  # of the pictures, from `folder`
    lines: list[dict] = field(default_factory=list)

    def add(self, images: Iterable[Any], question: str, answer: str, task: str) -> None:
        """A question about pictures, which are saved."""
        (self.folder / self.place).mkdir(parents=True, exist_ok=True)
        names = []
        for number, image in enumerate(images):
            names.append(f"{self.place}/{len(self.lines):04}_{number}.png")
            image.save(self.folder / names[-1])
        line = {"task": task, "question": question, "answer": answer, "images": names}
        self.lines.append(line)


def write_lines(file: Path, lines: list[dict]) -> None:
    """Write a .jsonl file, and say how many lines it has."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {len(lines)} questions")


def add_old(writer: Writer, count: int, close: tuple[str, ...], rng: Random) -> None:
    """Old questions of mm1-tiny: every second one of the close kinds."""
    for i in range(count):
        kind = rng.choice(close if i % 2 and close else KINDS)
        old = old_question(kind, rng)
        writer.add(old.images, old.prompt, old.answer, f"old {kind}")


def write_data(
    folder: Path, task: NewTask, *, new: int, old: int, test: int, seed: int
) -> None:
    """Draw a data folder: `new` and `old` questions to train on, a quarter as many to
    validate, and `test` of every task to test."""
    for split, share in (("train", 1.0), ("valid", 0.25), ("test", 0.0)):
        rng, writer = Random(f"{split}/{seed}/{task.name}"), Writer(folder, split)
        for _ in range(round(share * new) if share else test):
            image, question, answer = task.sample(rng)
            writer.add([image], question, answer, task.name)
        if share:
            add_old(writer, round(share * old), task.close, rng)
            rng.shuffle(writer.lines)  # lora validates on the first ones
        else:
            add_tests(writer, test, seed)
        write_lines(folder / f"{split}.jsonl", writer.lines)


def add_tests(writer: Writer, count: int, seed: int) -> None:
    """Test questions of mm1-tiny's own tasks, which its training never saw."""
    for task in TESTED:
        try:
            asked = _tests(task, count, 1000 + seed)
        except DatasetError as error:  # needs packages of the extra "train"
            print(f"without {task}: {error}", file=sys.stderr)
            continue
        for item in asked:
            writer.add(item.images, item.prompt, item.answer, task)


def _tests(task: str, count: int, seed: int) -> list[Asked]:
    if task != "few_shot":
        return make_questions(task, count, seed)
    from examples.mm1_tiny.evaluate import few_shot_questions

    return few_shot_questions(count, seed)[2]


def data_main(task: NewTask, doc: str, argv: list[str] | None = None) -> int:
    """The command of a module that has a task: `data` and `score`."""
    p = Parser(prog=f"python -m examples.{task.name}", description=doc)
    add = p.add_argument
    add("verb", choices=["data", "score"])
    add("folder", type=Path, metavar="DATA")
    for name, default, what in (
        ("--new", 400, "data: new questions to train on"),
        ("--old", 800, "data: old ones among them"),
        ("--test", 200, "data: test questions of each task"),
        ("--seed", 0, "data: decides all of them"),
    ):
        least = 0 if name in ("--old", "--seed") else 4
        text = f"{what} (%(default)s)"
        add(name, type=whole_number(least), default=default, metavar="N", help=text)
    add("--model", default="mm1-tiny", metavar="NAME", help="score: (%(default)s)")
    add("--adapter-path", type=Path, metavar="FOLDER", help="score: with an adapter")
    p.add_debug()

    def run(args: Any) -> None:
        if args.verb == "score":
            return score(args.folder, args.model, args.adapter_path)
        counts = {"new": args.new, "old": args.old, "test": args.test}
        return write_data(args.folder, task, **counts, seed=args.seed)

    return run_door(p, run, argv)


# --- score ---------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    if not file.is_file():
        raise DatasetError(f"There is no {file}: expected questions, one a line.")
    lines = file.read_text(encoding="utf-8").split("\n")  # texts have other ends, too
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DatasetError(f"{file}: a line is not a JSON object ({error}).") from error


def read_questions(file: Path) -> list[Asked]:
    """The questions of a .jsonl file; their group "task" is what the line says."""
    found = []
    for number, line in enumerate(read_lines(file), 1):
        if "question" not in line or "answer" not in line:
            raise DatasetError(
                f"{file}, line {number}: has the keys {sorted(line)}, but must have "
                f"'question' and 'answer' to be asked."
            )
        found.append(question_of(line, file.parent))
    return found


def question_of(line: dict, folder: Path) -> Asked:
    """A line's question, with the paths of its pictures."""
    names = line.get("images", line.get("image", []))
    images = [folder / name for name in ([names] if type(names) is str else names)]
    groups = {"task": line.get("task", NEW)}
    return Asked(line["question"], line.get("answer", ""), images, groups)


def ask(asked: list[Asked], model: str | Path, adapter: Path | None) -> list[str]:
    """The answers of a model to questions."""
    from mm1_mlx import load

    loaded = load(model, adapter_path=adapter)
    bar = progress_bar(len(asked), "questions", unit="q")
    images = [item.images for item in asked]
    answers = answers_to(answerer(*loaded), asked, images, 50, bar.update)
    bar.close()
    return answers


def shares(asked: list[Asked], answers: list[str]) -> dict[str, float]:
    """By task: the share of right answers."""
    right: dict[str, list[bool]] = {}
    for item, answer in zip(asked, answers, strict=True):
        right.setdefault(item.groups["task"], []).append(answer == item.answer)
    return {task: sum(flags) / len(flags) for task, flags in right.items()}


def score(folder: Path, model: str, adapter: Path | None) -> None:
    """Ask the questions of test.jsonl; print the share of right answers by task."""
    asked = read_questions(folder / "test.jsonl")
    print(table([("right", shares(asked, ask(asked, model, adapter)))]))


def table(columns: list[tuple[str, dict[str, float]]]) -> str:
    """Tasks by columns, and what was lost of the old ones since the first column."""
    first = columns[0][1]
    widths = [max(len(name) + 3, 9) for name, _ in columns]
    heads = "".join(f"{n:>{w}}" for (n, _), w in zip(columns, widths, strict=True))
    lines = [f"{'task':<14}{heads}"]
    for task in first:
        cells = [f"{100 * values[task]:.1f}%" for _, values in columns]
        line = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        lines.append(f"{task:<14}{line}")
    old = list(first)[1:]
    for name, values in columns[1:] if old else ():
        lost = {task: 100 * (first[task] - values[task]) for task in old}
        worst = max(lost, key=lambda task: lost[task])
        lines.append(
            f"{name}: old tasks lose {sum(lost.values()) / len(old):.1f} points on "
            f"average, {worst} the most ({lost[worst]:.1f})"
        )
    return "\n".join(lines)


# --- all of it -----------------------------------------------------------------------


def command(*words: Any) -> None:
    """Run a command of the library, and print it so that it can be repeated."""
    text = [str(word) for word in words]
    print("\n$ python -m mm1_mlx." + shlex.join(text), flush=True)
    verb, *rest = text
    done = subprocess.run([sys.executable, "-m", f"mm1_mlx.{verb}", *rest])
    if done.returncode:
        raise MM1Error(f"The command {verb} ended with {done.returncode}.")


def same(one: list[str], other: list[str]) -> str:
    """How many answers are the same, as text."""
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    return f"{equal} of {len(one)}"


def run(args: Any, recipe: list[str]) -> None:
    """Quantize where wanted, ask, train, ask, fuse, ask, and print the table."""
    started, out, model = time.time(), args.out, args.model
    asked = read_questions(args.folder / "test.jsonl")
    if args.quantized:
        model = out / "model"
        base = ("--model", args.model, "--mlx-path", model)
        command("quantize", *base, *BITS, "--no-report")
    results = {"before": ask(asked, model, None)}
    adapter = out / "adapter"
    place = ("--model", model, "--adapter-path", adapter)
    command("lora", *place, "--data", args.folder, *recipe)
    results["adapter"] = ask(asked, model, adapter)
    ways = FUSED4 if args.quantized else FUSED
    for name, flags in ways.items():
        command("fuse", *place, "--save-path", out / name, *flags)
        results[name] = ask(asked, out / name, None)
    told = [
        {"task": item.groups["task"], "question": item.prompt, "answer": item.answer}
        | {name: answers[i] for name, answers in results.items()}
        for i, item in enumerate(asked)
    ]
    write_lines(out / "answers.jsonl", told)
    found = {name: shares(asked, answers) for name, answers in results.items()}
    print("\n" + table(list(found.items())))
    for name in ways:
        agree = same(results["adapter"], results[name])
        print(f"{name}: {agree} answers are those of the adapter")
    print(f"all of it took {duration(time.time() - started)}")


def parser() -> Parser:
    """The flags of this command."""
    p = Parser(prog="python -m examples.teach", description=__doc__)
    p.add_argument("folder", type=Path, metavar="DATA")
    p.add_argument("out", type=Path, metavar="OUT", help="where all that is made goes")
    p.add_argument("--model", default="mm1-tiny", metavar="NAME")
    p.add_argument("--quantized", action="store_true", help="train on 4 bits (QLoRA)")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    """The command's exit code."""
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)

    def with_recipe(args: Any) -> None:
        run(args, words[end + 1 :] or list(RECIPE))

    return run_door(parser(), with_recipe, words[:end])


if __name__ == "__main__":
    sys.exit(main())
