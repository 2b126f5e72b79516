"""The prompt of a question: its form, and the answered examples in front of it.

Which examples stand there and how they are put together is that of
inference.few_shot; here they are a task's, written as the task writes its questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from mm1_mlx.errors import DatasetError, ImageError, MM1Error, PromptError
from mm1_mlx.evaluation.datasets.rows import Fault, choices
from mm1_mlx.evaluation.how import How, name_of
from mm1_mlx.evaluation.own_pictures import OwnPictures
from mm1_mlx.evaluation.samples import Sample, Source, Task
from mm1_mlx.inference.asked import Asked
from mm1_mlx.inference.few_shot import FewShot
from mm1_mlx.inference.shot_template import with_reasoning
from mm1_mlx.inputs.examples import Example, read_examples
from mm1_mlx.inputs.prompts import (
    IMAGE_TOKEN,
    builtin_name,
    guard,
    plural,
)

# Shots are drawn among so many samples of their split, as OpenFlamingo's query set has
# (open_flamingo/eval/evaluate.py, --query_set_size): a training split may be large.
POOL = 2048
_LINE = "{image}{prompt} {answer}"  # of the pretraining form
_SHORT = "Short answer:"  # reasoning is none


@dataclass(frozen=True)
class Question:
    """A sample as the model is asked it, or why it cannot be."""

    sample: Sample
    asked: Asked
    error: MM1Error | None = None


# --- which shots ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """What the shots of a task are chosen from.

    samples: what the task writes, in the order of the file or split. examples: the same
    as FewShot knows them, not written yet. from_file: whether they are a user's own.
    """

    samples: list[Sample]
    examples: list[Example]
    from_file: bool


def pool_of(task: Task, where: Source, how: How) -> Pool:
    """The samples that a task's shots are chosen from: of a file, or its own split.

    Raises DatasetError where there are too few, or a task has no split for them or it
    is not there; of a file it names the line.
    """
    if how.shots_from is not None:
        return _of_file(task, how)
    if task.shot_split is None:
        raise DatasetError(
            f"{task.name} has no few-shot form: it has no split to draw {how.shots} "
            f"shots from. Give the shots with --shots-from FILE, or take --shots 0."
        )
    try:
        samples = list(islice(task.read(where, task.shot_split), POOL))
    except DatasetError as error:
        raise DatasetError(
            f"{task.name}: its shots are drawn from the split '{task.shot_split}', "
            f"which cannot be read: {error} Give the shots with --shots-from FILE, or "
            f"a folder that has the split with --data, or take --shots 0."
        ) from error
    if how.shot_choice == "nearest":
        samples = [sample for sample in samples if sample.images]
    if len(samples) <= how.shots:
        raise DatasetError(
            f"{task.name}: the split '{task.shot_split}' that shots are drawn from "
            f"has {plural(len(samples), 'sample')}, but {how.shots} shots and one to "
            f"spare are needed. Take fewer with --shots."
        )
    examples = []
    for number, sample in enumerate(samples, 1):
        place = sample.fields.get("where", f"sample {sample.id} of {task.shot_split}")
        answer = task.target(sample) if how.balance_shots else ""
        examples.append(
            Example(sample.images, answer, "", None, number, f"{task.name}, {place}")
        )
    return Pool(samples, examples, False)


def _of_file(task: Task, how: How) -> Pool:
    examples = read_examples(how.shots_from)
    if len(examples) < how.shots:
        raise DatasetError(
            f"{how.shots} shots were asked for, but {name_of(how.shots_from)} has "
            f"{len(examples)}. Add some, or take --shots {len(examples)}."
        )
    return Pool([_sample_of(one, task) for one in examples], examples, True)


def _sample_of(example: Example, task: Task) -> Sample:
    """A line of a file as a sample of the task: its prompt is the question.

    DatasetError where the task's own rule reads no answer in what it shows.
    """
    fields = {k: v for k, v in example.fields.items() if v is not None}
    try:
        options = choices(fields, "choices") if "choices" in fields else ()
    except Fault as fault:
        raise DatasetError(f"{example.where}: {fault}.") from None
    found = Sample(
        id=f"line {example.number}",
        images=example.images,
        question=example.prompt or "",
        answers=(example.answer,),
        choices=options,
        fields={k: v for k, v in fields.items() if k != "choices"},
    )
    try:
        shown = _target(task, found)
        value = task.clean(shown, found)
    except KeyError:  # a rule that needs more than a line has
        return found
    except ImageError as error:
        raise DatasetError(f"{example.where}: {error}") from error
    if value is None:
        raise DatasetError(
            f"{example.where}: {task.name} reads no answer in {shown[:40]!r}. Write it "
            f"as the task's questions are answered."
        )
    return found


def _target(task: Task, sample: Sample) -> str:
    """The answer that a shot shows; of a file's line without what the task makes it
    from (a box), as it stands there."""
    try:
        return task.target(sample)
    except KeyError:
        return sample.answers[0]


class TaskShots(FewShot):
    """k answered samples of a task for each question; `how` says which.

    Chosen with a seed, so that every model sees the same; of more shots the fewer are
    the first ones. The same ones for all questions, whose keys and values are then
    computed once, unless how.same_shots is off or the nearest are chosen. A question
    is never among its own shots: of the task's split by its id, of a file by its
    pictures.
    """

    def __init__(
        self, task: Task, pool: Pool, how: How, processor: Any, features: Any = None
    ):
        reasoned = pool.examples[0].reasoning is not None
        if how.shot_reasoning is not None:
            reasoned = how.shot_reasoning
        template = None
        if how.form == "pretrain":
            template = with_reasoning(_LINE, how.answer_mark) if reasoned else _LINE
        super().__init__(
            pool.examples,
            how.shots,
            choice=how.shot_choice,
            seed=how.seed,
            balanced=how.balance_shots,
            template=template,
            reasoning=how.shot_reasoning,
            answer_mark=how.answer_mark,
            high_resolution_shots=how.high_resolution_shots,
            features=features,
        )
        self.how, self.pool, self._task, self.processor = how, pool, task, processor
        self._samples = {
            example.number: sample
            for example, sample in zip(pool.examples, pool.samples, strict=True)
        }
        self._by_id = {sample.id: number for number, sample in self._samples.items()}
        self._own = OwnPictures(pool.examples) if pool.from_file else None
        self._done: dict[int, Example] = {}

    def form(self, flat: list[dict], processor: Any, use_template: bool) -> str | None:
        """Of the task, not of the processor."""
        return self.template

    def choose(self, *args: Any, **limits: Any) -> list[Example]:
        """As the task writes them."""
        return [self._written(one) for one in super().choose(*args, **limits)]

    def _written(self, example: Example) -> Example:
        if example.number not in self._done:
            self._done[example.number] = self._write(example)
        return self._done[example.number]

    def _write(self, example: Example) -> Example:
        sample = self._samples[example.number]
        answer, reasoning = _target(self._task, sample), example.reasoning
        prompt = example.prompt
        try:
            if prompt is not None:
                prompt = written(
                    self._task, sample, self.how.form, self.processor, self.reasoned
                )
        except KeyError as missing:
            raise DatasetError(
                f"{example.where}: {self._task.name} cannot write this question "
                f"without {missing}. Add it to the line."
            ) from None
        if self.how.form == "pretrain":
            answer = _inert(answer, self.processor)
            if reasoning is not None:  # a line break ends a shot
                reasoning = _inert(" ".join(reasoning.split()), self.processor)
        return replace(example, prompt=prompt, answer=answer, reasoning=reasoning)

    def left_out(self, sample: Sample) -> set[int]:
        """Numbers of the examples that are the question itself."""
        if self._own is not None:
            return self._own.numbers(sample)
        if self._task.split != self._task.shot_split:  # whose ids mean other samples
            return set()
        number = self._by_id.get(sample.id)
        return set() if number is None else {number}

    def before(self, sample: Sample, model: Any = None, **reading: Any) -> Asked:
        """A question behind its shots. reading: resolution, and limits of FewShot.ask.

        Raises PromptError and ImageError for what is wrong with the question,
        DatasetError for what is wrong with the shots.
        """
        shots = self
        if not self.how.same_shots:
            shots = self.changed(seed=f"{self.seed}/{sample.id}")
        left = self.left_out(sample)
        if len(self.examples) - len(left) < self.how.shots:
            raise DatasetError(
                f"{plural(len(left), 'shot')} of {name_of(self.how.shots_from)} "
                f"{'has' if len(left) == 1 else 'have'} the pictures of the question "
                f"{sample.id}, and without, {len(self.examples) - len(left)} are left, "
                f"but {self.how.shots} are needed. Add others, or take fewer with "
                f"--shots."
            )
        asked = shots.ask(
            _question(self._task, sample, self.how.form, self.processor, self.reasoned),
            list(sample.images),
            model=model,
            processor=self.processor,
            leave_out=left,
            **reading,
        )
        return replace(asked, flag="--shots {0} (shots={0})")

    def told(self) -> dict[str, Any]:
        """For the journal and the report: which shots, where they are the same for
        all, and what a user's file held."""
        found: dict[str, Any] = {}
        if self.how.same_shots and self.choice != "nearest":
            found["shots_shown"] = [self.label(one.number) for one in self.choose()]
        if self._own is not None:
            found["shots_held"] = self._own.digest()
        return found

    def label(self, number: int) -> int | str:
        """A shot in a record: its line in a file, the sample's id of a split."""
        return number if self.pool.from_file else self._samples[number].id


# --- how they are written ------------------------------------------------------------


def usual_form(processor: Any) -> str:
    """ "chat" for a model with a chat template, "pretrain" for one without."""
    name = builtin_name(getattr(processor, "chat_template", None))
    return "pretrain" if name == "plain" else "chat"


def ask_alone(task: Task, sample: Sample, form: str, processor: Any) -> Asked:
    """A question without shots."""
    prompt = _question(task, sample, form, processor, reasoned=False)
    return Asked(prompt, list(sample.images))


def _question(
    task: Task, sample: Sample, form: str, processor: Any, reasoned: bool
) -> Any:
    """The question itself, text or messages."""
    if form == "chat":
        return task.prompt(sample)
    return written(task, sample, form, processor, reasoned)


def written(
    task: Task, sample: Sample, form: str, processor: Any, reasoned: bool
) -> str:
    """A sample's question as text with a mark for each picture.

    "pretrain": a line up to its answer (MM1's few-shot form, for models that know no
    chat template). "chat": a turn of a user.
    """
    if form == "chat":
        return _text(task, task.prompt, sample)
    text = _text(task, task.shot_prompt or task.prompt, sample)
    if reasoned:
        text = text.removesuffix(_SHORT).rstrip()
    return _inert(text, processor)


def _inert(text: str, processor: Any) -> str:
    """Without the vocabulary's marks: no template stands around it."""
    return guard(text, getattr(processor.tokenizer, "marks", ()))


def _text(task: Task, write: Callable[[Sample], Any], sample: Sample) -> str:
    found = write(sample)
    if not isinstance(found, str):
        raise DatasetError(
            f"{task.name}: sample {sample.id} is a conversation, which cannot be "
            f"written as one text. Take --prompt-form chat and --shots 0."
        )
    if IMAGE_TOKEN in found:
        return found
    return IMAGE_TOKEN * len(sample.images) + found


# --- all questions -------------------------------------------------------------------


def ask_all(
    task: Task,
    samples: Sequence[Sample],
    shots: TaskShots | None,
    how: How,
    processor: Any,
    model: Any = None,
    **reading: Any,
) -> list[Question]:
    """Every sample as it is asked; one that cannot be has its error.

    shots: None asks without. reading: as of TaskShots.before.
    """
    found = []
    for sample in samples:
        if shots is None:
            asked = ask_alone(task, sample, how.form, processor)
            found.append(Question(sample, asked))
            continue
        try:
            found.append(Question(sample, shots.before(sample, model, **reading)))
        except (ImageError, PromptError) as error:
            alone = ask_alone(task, sample, how.form, processor)
            found.append(Question(sample, alone, error))
    return found


def look(
    shots: TaskShots,
    samples: Sequence[Sample],
    model: Any,
    progress: Callable[[int, int], None] | None = None,
    **limits: Any,
) -> TaskShots:
    """The shots with the features of all pictures known, theirs and the questions'.

    Raises DatasetError where a question has no picture.
    """
    bare = [sample for sample in samples if not sample.images]
    if bare:
        raise DatasetError(
            f"{plural(len(bare), 'question')} of {len(samples)} "
            f"{'has' if len(bare) == 1 else 'have'} no picture (the first: "
            f"{bare[0].id}), so nothing tells which shots are near. Take --shot-choice "
            f"random."
        )
    theirs = sum(len(example.images) for example in shots.examples)
    images = [image for sample in samples for image in sample.images]
    total = theirs + len(images)

    def told(before: int) -> Callable[[int, int], None] | None:
        tell = progress
        return None if tell is None else lambda done, _: tell(before + done, total)

    processor = shots.processor
    held = shots.looked(model, processor, progress=told(0), **limits)
    failed: dict[int, ImageError] = {}  # told when the question is asked
    held.features.of(
        model, processor, images, progress=told(theirs), failed=failed, **limits
    )
    return held
