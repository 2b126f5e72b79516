"""The prompt of a question: its form, and the answered examples in front of it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.samples import Sample, Source, Task
from mm1_mlx.inputs.prompts import (
    IMAGE_TOKEN,
    builtin_name,
    guard,
    image_separator,
    is_conversation,
    plural,
)

FORMS = ("chat", "pretrain")
# Shots are drawn among so many samples of their split, as OpenFlamingo's query set has
# (open_flamingo/eval/evaluate.py, --query_set_size): a training split may be large.
POOL = 2048


@dataclass(frozen=True)
class Asked:
    """A sample as the model is asked it: prompt, and pictures in their order."""

    sample: Sample
    prompt: Any  # text, or messages
    images: list[Any]


class Shots:
    """k answered samples of a task's training split, for each question.

    Drawn with a seed, so that every model sees the same. Of more shots the fewer are
    the first ones. same: the same ones for all questions, whose keys and values are
    then computed once; else each question draws its own. A question is never among
    its own shots.

    Raises DatasetError where the task has no split for them, or one with too few.
    """

    def __init__(self, task: Task, where: Source, k: int, seed: int, same: bool = True):
        self._k, self._seed, self._same = k, seed, same
        self._pool: list[Sample] = []
        if k == 0:
            return
        check_shots(task, k)
        assert task.shot_split is not None
        self._pool = list(islice(task.read(where, task.shot_split), POOL))
        if len(self._pool) <= k:
            raise DatasetError(
                f"{task.name}: the split '{task.shot_split}' that shots are drawn from "
                f"has {plural(len(self._pool), 'sample')}, but {k} shots and one to "
                f"spare are needed. Take fewer with --shots."
            )
        self._common = self._draw("shots")

    def _draw(self, name: str) -> list[Sample]:
        """One more than is needed: a question may be among them."""
        rng = random.Random(f"{name}/{self._seed}")
        places = list(range(len(self._pool)))
        rng.shuffle(places)
        return [self._pool[place] for place in places[: self._k + 1]]

    def of(self, sample: Sample) -> list[Sample]:
        """The shots of a question."""
        if self._k == 0:
            return []
        drawn = self._common if self._same else self._draw(f"shots of {sample.id}")
        return [shot for shot in drawn if shot.id != sample.id][: self._k]


def check_shots(task: Task, k: int) -> None:
    """DatasetError for shots of a task that has none."""
    if k and task.shot_split is None:
        raise DatasetError(
            f"{task.name} has no few-shot form: it has no split to draw {k} shots "
            f"from. Take --shots 0."
        )


def usual_form(processor: Any) -> str:
    """ "chat" for a model with a chat template, "pretrain" for one without."""
    name = builtin_name(getattr(processor, "chat_template", None))
    return "pretrain" if name == "plain" else "chat"


def ask(
    task: Task, sample: Sample, shots: Sequence[Sample], form: str, processor: Any
) -> Asked:
    """A question after its shots.

    "pretrain": one text, a line for each shot, the question last and open (MM1's
    few-shot form, for models that know no chat template). "chat": each shot is an
    earlier turn with its answer.
    """
    images = [image for one in [*shots, sample] for image in one.images]
    if form == "pretrain":
        write = task.shot_prompt or task.prompt
        lines = [f"{_text(task, write, s)} {task.target(s)}\n" for s in shots]
        text = "".join(lines) + _text(task, write, sample)
        marks = getattr(processor.tokenizer, "marks", ())  # inert in what is only text
        return Asked(sample, guard(text, marks), images)
    asked = task.prompt(sample)
    if not shots:
        return Asked(sample, asked, images)
    separator = image_separator(getattr(processor, "chat_template", None))
    messages: list[dict[str, Any]] = []
    for shot in shots:
        text = _text(task, task.prompt, shot, separator)
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": task.target(shot)})
    if is_conversation(asked):
        return Asked(sample, [*messages, *asked], images)
    text = _with_marks(asked, len(sample.images), separator)
    return Asked(sample, [*messages, {"role": "user", "content": text}], images)


def _text(
    task: Task, write: Callable[[Sample], Any], sample: Sample, separator: str = ""
) -> str:
    found = write(sample)
    if not isinstance(found, str):
        raise DatasetError(
            f"{task.name}: sample {sample.id} is a conversation, which cannot be "
            f"written as one text. Take --prompt-form chat and --shots 0."
        )
    return _with_marks(found, len(sample.images), separator)


def _with_marks(text: str, count: int, separator: str) -> str:
    """The text with a mark for each picture; without any, they come first."""
    return text if IMAGE_TOKEN in text else (IMAGE_TOKEN + separator) * count + text
