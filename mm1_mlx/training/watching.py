"""What a run measures and leaves for those who watch it, beside its weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import DatasetError, MM1Error
from mm1_mlx.processes import together
from mm1_mlx.training.answers import (
    EXAMPLES,
    SHOWN,
    Example,
    Question,
    answering,
    ask,
    choose_examples,
    question_of,
    read_examples,
    task_accuracy,
    write_examples,
)
from mm1_mlx.training.meter import MetricsLog
from mm1_mlx.training.mixtures import Mixture
from mm1_mlx.training.samples import Samples
from mm1_mlx.training.trainer import Progress
from mm1_mlx.training.tuning import TuneStage


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is measured, beside losses.

    answer_every: steps between measurements of the task accuracy, None for none;
    answer_samples: held-out samples that it asks. examples: held-out samples whose
    answers before and after the run are written into answers.json. load_every: steps
    between the experts' loads in metrics.jsonl. notes: more facts for run.json.
    begun: called in the first process when the folder is there.
    """

    answer_every: int | None = None
    answer_samples: int = 32
    examples: int = 0
    load_every: int = 10
    notes: dict[str, Any] | None = None
    begun: Callable[[], None] = lambda: None


class Watcher:
    """Measures before, during and after a run, and writes metrics.jsonl.

    samples: held out, or None. out: the run's folder. In several processes all of them
    call its methods, and the first one writes.
    """

    def __init__(
        self,
        stage: TuneStage,
        samples: Samples | Mixture | None,
        watch: Watch,
        out: Path,
        tell: Callable[[str], None],
    ):
        self._stage, self._samples, self._watch = stage, samples, watch
        self._out, self._tell = out, tell
        self._first: dict[str, float] = {}
        self._examples: list[Example] = []
        self._writes = mx.distributed.init().rank() == 0
        self._log = MetricsLog(None, watch.load_every)
        if watch.answer_every is not None and samples is None:
            raise DatasetError(
                "The task accuracy is of held-out samples, but there are none: the "
                "data needs a valid.jsonl."
            )

    @property
    def notes(self) -> dict[str, Any]:
        """What run.json keeps for those who watch."""
        return self._watch.notes or {}

    def before(self, resume: bool) -> None:
        """Ask the model that nothing has been trained of yet.

        What an earlier part of the run has asked is not asked again.
        """
        if self._watch.answer_every is not None and not resume:
            self._first = self._measure()
            right, asked = self._first["task_right"], self._first["task_samples"]
            self._tell(f"before training: {right} of {asked} answers right")
        with together():
            if self._samples is None or not self._watch.examples or not self._writes:
                return
            known = read_examples(self._out) if resume else []
            self._examples = known if _are_of(known, self._samples) else []
            if not self._examples:
                self._examples = self._ask_examples(self._samples)

    def begin(self, metrics: Path) -> None:
        """Write down what `before` has found. metrics: the file of every step."""
        with together():
            if not self._writes:
                return
            self._log = MetricsLog(metrics, self._watch.load_every)
            self._log.note(0, self._first)
            if self._examples:
                write_examples(self._out, self._examples)
            else:
                (self._out / EXAMPLES).unlink(missing_ok=True)
            self._watch.begun()

    def step(self, now: Progress) -> None:
        """Measure the task accuracy into a step's metrics, where it is time to, and
        write them down."""
        now.metrics.update(self.due(now.step))
        with together():
            self._log.take(now)

    def due(self, step: int) -> dict[str, float]:
        """The task accuracy, where it is time to measure it after a step; else {}."""
        every, last = self._watch.answer_every, step == self._stage.settings.steps
        if every is None or (step % every and not last):
            return {}
        return self._measure()

    def note(self, step: int, values: dict[str, float]) -> None:
        """Write down what was measured beside the steps."""
        self._log.note(step, values)

    def after(self, ended: bool) -> None:
        """Ask a model that was trained to the end about the examples."""
        if not ended or not self._examples or self._samples is None:
            return
        try:
            questions = [
                question_of(self._samples[example.number], example.number)
                for example in self._examples
            ]
            answers = self._answers(questions)
        except (MM1Error, IndexError) as error:
            self._tell(f"no answers to look at: {error}")
            return
        self._examples = [
            Example(e.number, e.question, e.expected, e.before, answer)
            for e, answer in zip(self._examples, answers, strict=True)
        ]
        write_examples(self._out, self._examples)

    def _measure(self) -> dict[str, float]:
        assert self._samples is not None
        right, asked = task_accuracy(
            self._stage, self._samples, self._watch.answer_samples
        )
        accuracy = right / max(asked, 1)
        return {"task_accuracy": accuracy, "task_right": right, "task_samples": asked}

    def _ask_examples(self, samples: Samples | Mixture) -> list[Example]:
        questions = choose_examples(self._stage, samples, self._watch.examples)
        if questions:  # a large model takes its time
            self._tell(f"asking {len(questions)} held-out samples, as at the end again")
        try:
            answers = self._answers(questions)
        except MM1Error as error:  # an extra: the run goes on without it
            self._tell(f"no answers to look at: {error}")
            return []
        return [
            Example(q.number, q.text, q.expected, answer)
            for q, answer in zip(questions, answers, strict=True)
        ]

    def _answers(self, questions: Sequence[Question]) -> list[str]:
        model: Any = self._stage.module
        with answering(model):  # one at a time: they may be long, and pictures large
            return [
                answer
                for question in questions
                for answer in ask(model, self._stage.processor, [question], SHOWN)
            ]


def _are_of(examples: Sequence[Example], samples: Samples | Mixture) -> bool:
    """Whether examples are these samples still: the file may be another one now."""
    try:
        questions = [question_of(samples[e.number]) for e in examples]
    except (MM1Error, IndexError):
        return False
    pairs = zip(questions, examples, strict=True)
    return all((q.text, q.expected) == (e.question, e.expected) for q, e in pairs)
