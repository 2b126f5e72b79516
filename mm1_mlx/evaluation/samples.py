"""What a benchmark is made of: a sample, its answer, a score, and the task itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where a dataset lies: a local folder (a Path), or a hub id ("org/name", a str).
Source = Path | str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question of a benchmark, with all that its metric needs."""

    id: str  # unique within a task
    # Whatever inputs.images.load_image takes: path, URL, bytes, PIL image.
    images: tuple[Any, ...] = ()
    # As the dataset has it; "" for captions; may hold <image> marks.
    question: str = ""
    # The references: ten of VQA, captions, one letter, ...
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # multiple choice: texts in order A, B, C, ...
    # Category, box, hint, unit, ...: what metrics and groups need. Two names are for
    # the run: "pair" (samples that a limit must not part, as MME's) and "where" (file
    # and line that the sample was read from, for messages about it).
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """A sample with what the model said to it."""

    sample: Sample
    text: str  # what the model said
    value: Any  # after the task's post-processing; None if it could not be asked


@dataclass(frozen=True)
class Score:
    """What a metric gives.

    total is the published figure on the scale of the papers (0..100, CIDEr x 100,
    the sums of MME). each holds one number in 0..1 per sample, None where only the
    whole has one. low and high are the 95% interval of total, None where it makes
    no sense. groups is total again for each category.
    """

    total: float
    each: list[float | None]
    low: float | None = None
    high: float | None = None
    groups: dict[str, float] = field(default_factory=dict)


Metric = Callable[[Sequence[Answered]], Score]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark: where it is read, how it is asked, stopped, cleaned and scored."""

    name: str
    summary: str  # one line for --help and --list
    # (where, split) -> samples, in the dataset's order.
    read: Callable[[Source, str], Iterator[Sample]]
    split: str  # what is evaluated, "val"
    # Where shots come from, "train". None: the task has no few-shot form.
    shot_split: str | None
    # The question as the model reads it, <image> marks included: zero-shot, the form
    # for models that were tuned on instructions. Text, or messages.
    prompt: Callable[[Sample], Any]
    # The pretraining form, "{image}Question: ... Short answer:", <image> marks
    # included. Shots and query are written in it; None: `prompt` for both.
    shot_prompt: Callable[[Sample], str] | None
    target: Callable[[Sample], str]  # the answer that a shot shows
    stop: tuple[str, ...] = ()
    # The same for the pretraining form, which ends its answers otherwise; None: `stop`.
    shot_stop: tuple[str, ...] | None = None
    max_tokens: int = 32
    clean: Callable[[str, Sample], Any]
    shot_clean: Callable[[str, Sample], Any] | None = None  # None: `clean`
    metric: Metric
    shot_metric: Metric | None = None  # of the pretraining form; None: `metric`
    # Whose rule reads and compares the answers, for the report; "ours: ..." where it is
    # no published one. shot_rule: of the pretraining form; "": `rule`.
    rule: str = ""
    shot_rule: str = ""
    hub: str | None = None  # the default dataset on the hub
    hub_shots: bool = True  # whether that has the split of the shots
    source: str = ""  # where prompt, split and metric come from
    needs_data: bool = True  # False: `read` makes its samples, and needs no folder
    shuffled: bool = False  # the dataset has no order: a limit takes its first
    # generate's settings that belong to the task, such as a resolution.
    settings: Mapping[str, Any] = field(default_factory=dict)
    # True: values and fields["box"] are boxes, as parts of the picture's sides, which
    # the run has read and shown as the model's folder says (said_boxes.in_form_of).
    boxes: bool = False

    def reading(self, form: str) -> tuple[Callable[[str, Sample], Any], Metric, str]:
        """How answers of a form of prompts are read and scored, and by whose rule."""
        if form != "pretrain":
            return self.clean, self.metric, self.rule
        return (
            self.shot_clean or self.clean,
            self.shot_metric or self.metric,
            self.shot_rule or self.rule,
        )
