"""What a model answers to held-out samples: how many are right, and a few to look at.

Answers are greedy and the model is put back as it was, so that asking changes nothing
of a run: no weight, no random number.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.checkpoint.folder import replacing_file
from mm1_mlx.errors import DatasetError, MM1Error
from mm1_mlx.inference.generation import batch_generate
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, flatten_messages
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.processes import sums, together, world
from mm1_mlx.training.conversations import lesson_of
from mm1_mlx.training.mixtures import Mixture
from mm1_mlx.training.samples import Sample, Samples
from mm1_mlx.training.tuning import TuneStage

EXAMPLES = "answers.json"
SHOWN = 64  # tokens of an answer that is looked at
_BEYOND = 8  # tokens over the expected answer's: an answer of more is wrong anyway


@dataclass(frozen=True)
class Question:
    """A held-out sample without its last answer, which is expected.

    number, where: of the sample, in its file. messages: all before that answer.
    images: those of the messages, in reading order.
    """

    number: int
    where: str
    messages: list[dict[str, Any]]
    images: list[Any]
    expected: str

    @property
    def text(self) -> str:
        """What is asked: the last message of the user, without marks of pictures."""
        asked = [m["content"] for m in self.messages if m["role"] == "user"]
        return asked[-1].replace(IMAGE_TOKEN, " ").strip() if asked else ""


@dataclass(frozen=True)
class Example:
    """A question with the answers before and after a run; number: of the sample."""

    number: int
    question: str
    expected: str
    before: str
    after: str | None = None


def question_of(sample: Sample, number: int = 0) -> Question:
    """The question of a sample; DatasetError where it has no answer."""
    try:
        flat, held = flatten_messages(sample.messages)
    except MM1Error as error:
        raise DatasetError(f"{sample.where}: {error}") from error
    answers = [i for i, m in enumerate(flat) if m["role"] == "assistant"]
    if not answers:
        raise DatasetError(f"{sample.where}: the sample has no answer to expect.")
    last = answers[-1]
    images = held or list(sample.images)
    later = sum(m["content"].count(IMAGE_TOKEN) for m in flat[last:])
    images = images[: len(images) - later]
    return Question(number, sample.where, flat[:last], images, flat[last]["content"])


def normalised(answer: str) -> str:
    """An answer as it is compared: case, spacing and a full stop at the end do not
    count."""
    return " ".join(answer.split()).casefold().removesuffix(".").rstrip()


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one; see normalised."""
    return normalised(answer) == normalised(expected)


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread: files may be sorted."""
    most = min(count, most)
    return [place * count // most for place in range(most)]


@contextmanager
def answering(model: MM1) -> Iterator[None]:
    """The model as it answers, without dropout; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        mx.clear_cache()  # rows of many lengths leave many buffers


def ask(
    model: MM1, processor: Processor, questions: Sequence[Question], max_tokens: int
) -> list[str]:
    """The model's greedy answers to questions, made together."""
    prompts = [question.messages for question in questions]
    images = [question.images for question in questions]
    found = batch_generate(
        model, processor, prompts, images, max_tokens=max_tokens, reuse=False
    )
    return [answer.text.strip() for answer in found]


def task_accuracy(
    stage: TuneStage, samples: Samples | Mixture, most: int
) -> tuple[int, int]:
    """How many of `most` samples get the expected answer, and how many were asked.

    Several processes share the samples. DatasetError names a sample that cannot be
    read, or is too long where such ones are refused.
    """
    counts = [0, 0]
    with together():
        mine = spread(len(samples), most)[world().rank() :: world().size()]
        questions = []
        for number in mine:
            sample = samples[number]
            if stage.fits(lesson_of(sample, stage.processor), sample.where):
                questions.append(question_of(sample, number))
        counts = [_right(stage, questions), len(questions)]
    right, asked = sums(counts)
    return right, asked


def _right(stage: TuneStage, questions: list[Question]) -> int:
    """How many get the expected answer; as many at a time as in training."""
    s, right = stage.settings, 0
    some = max(s.batch // s.accumulate // world().size(), 1)
    model: Any = stage.module
    with answering(model):
        for start in range(0, len(questions), some):
            part = questions[start : start + some]
            encode = stage.processor.tokenizer.encode
            longest = max(len(encode(q.expected)) for q in part)
            answers = ask(model, stage.processor, part, longest + _BEYOND)
            pairs = zip(answers, part, strict=True)
            right += sum(is_right(answer, q.expected) for answer, q in pairs)
    return right


def choose_examples(
    stage: TuneStage, samples: Samples | Mixture, count: int
) -> list[Question]:
    """A few samples to look at, with pictures where there are such; broken ones and
    ones that are too long are passed over."""
    found = []
    first, more = spread(len(samples), count), spread(len(samples), 4 * count)
    for number in [*first, *(place for place in more if place not in first)]:
        try:
            sample = samples[number]
            if stage.fits(lesson_of(sample, stage.processor), sample.where):
                found.append(question_of(sample, number))
        except MM1Error:
            continue  # an evaluation says what is wrong with it
        if sum(bool(question.images) for question in found) == count:
            break
    best = sorted(found, key=lambda question: not question.images)[:count]
    return sorted(best, key=lambda question: question.number)


def read_examples(folder: Path) -> list[Example]:
    """The examples in answers.json, none where it is missing or damaged."""
    try:
        values = json.loads((folder / EXAMPLES).read_text(encoding="utf-8"))
        return [Example(**value) for value in values["examples"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write answers.json, whole or not at all."""
    values = {"examples": [asdict(example) for example in examples]}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with replacing_file(folder / EXAMPLES) as path:
        path.write_text(text, encoding="utf-8")
