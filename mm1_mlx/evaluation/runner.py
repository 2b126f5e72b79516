"""One task, asked and scored: batches, what fails, what is kept to go on with."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx._version import __version__
from mm1_mlx.checkpoint.disk import locked
from mm1_mlx.errors import ContextError, DatasetError, MM1Error
from mm1_mlx.evaluation.choosing import (
    choose_samples,
    source_of,
    with_wrong_images,
)
from mm1_mlx.evaluation.few_shot import Asked, Shots, ask, usual_form
from mm1_mlx.evaluation.journal import Journal, Record, as_kept
from mm1_mlx.evaluation.references import reference
from mm1_mlx.evaluation.results import (
    BATCH,
    How,
    Progress,
    Result,
    Watch,
    check_count,
)
from mm1_mlx.evaluation.said_boxes import form_in_words, in_form_of
from mm1_mlx.evaluation.samples import Answered, Sample, Score, Source, Task
from mm1_mlx.evaluation.table import find_task
from mm1_mlx.inference.generation import batch_generate
from mm1_mlx.inference.identity import fingerprint
from mm1_mlx.inference.reuse import Reuse, store_of
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inputs.images import is_decoded
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, plural
from mm1_mlx.models.mm1 import MM1

_WINDOW = 32  # batches among which questions are sorted by their length
_SPARING = 20  # a running score takes a twentieth of the time at most


def evaluate(
    model: MM1,
    processor: Any,
    task: str | Task,
    *,
    data: str | Path | None = None,
    shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    form: str | None = None,
    same_shots: bool = True,
    wrong_images: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    watch: Watch | None = None,
    reuse: Reuse | bool | None = None,
    **settings: Any,
) -> Result:
    """Ask a task's questions and score the answers.

    task: a name of evaluation.tasks, or a Task. data: its folder or hub id; None takes
    the task's own on the hub. shots: answered examples before each question, of the
    training split, drawn with the seed; the same ones for all questions, or with
    same_shots=False new ones for each. limit: so many samples, drawn with the seed.
    form: "chat" or "pretrain" (see few_shot.ask); None is the model's own.
    wrong_images: ask each question about another one's pictures. output: a folder that
    keeps the answers; the same call goes on there where it was ended; force starts
    anew. watch: is called with a Progress after each batch. settings: as generate's
    (temp, max_tokens, kv_bits, ...).

    Raises DatasetError for data that cannot be used, for an output of other settings,
    and where not one sample could be asked.
    """
    if isinstance(task, str):
        task = find_task(task)
    form = form or usual_form(processor)
    how = How(shots, seed, batch_size, form, same_shots, wrong_images)
    if limit is not None:
        check_count("limit", limit, 1)
    where = source_of(task, data)
    task = in_form_of(task, processor)
    given = _generation(task, how, settings)
    run = _Run(model, processor, task, how, given, store_of(model, reuse), watch)
    header = _header(model, processor, task, where, how, given)
    asked = _questions(task, where, limit, how, processor)
    if output is None:
        return run.all(asked, header, None, None)
    folder = _made(Path(output).expanduser())
    with locked(folder):
        journal = Journal(folder / how.file(task.name, ".jsonl"), header, force)
        try:
            return run.all(asked, header, folder, journal)
        finally:
            journal.close()


def _made(folder: Path) -> Path:
    """The folder of an output, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DatasetError(
            f"--output {folder} is a file, or lies in one: give a folder."
        ) from None
    return folder


def _generation(task: Task, how: How, settings: dict[str, Any]) -> dict[str, Any]:
    """batch_generate's settings: the task's own, and what the caller wants instead."""
    given: dict[str, Any] = {"max_tokens": task.max_tokens, "seed": how.seed}
    stops = task.stop
    if how.form == "pretrain":
        given["use_template"] = False
        if task.shot_stop is not None:
            stops = task.shot_stop
        stops = (*stops, "\n")  # there the next shot would begin
    if stops:
        given["stop"] = list(dict.fromkeys(stops))
    given |= task.settings
    given |= settings
    Settings.of(given)  # wrong ones are told before anything is read
    return given


def _questions(
    task: Task, where: Source, limit: int | None, how: How, processor: Any
) -> list[Asked]:
    examples = Shots(task, where, how.shots, how.seed, how.same_shots)
    samples = choose_samples(task, where, limit, how.seed)
    if how.wrong_images:
        samples = with_wrong_images(samples)
    return [ask(task, s, examples.of(s), how.form, processor) for s in samples]


def _header(
    model: MM1,
    processor: Any,
    task: Task,
    where: Source,
    how: How,
    given: dict[str, Any],
) -> dict[str, Any]:
    """What decides the answers. Not the limit: a larger one goes on with a smaller.

    The batch size does: in 16 bits rounding depends on who is in a batch.
    """
    boxes = {"boxes": form_in_words(processor)} if task.boxes else {}
    return {
        **boxes,
        "task": task.name,
        "split": task.split,
        "data": str(where) if task.needs_data else None,
        **asdict(how),
        "generation": {k: v for k, v in sorted(given.items()) if k != "seed"},
        "model": fingerprint(model),
        "mm1_mlx": __version__,
    }


@dataclass
class _Run:
    """One task's run, and what it counts."""

    model: MM1
    processor: Any
    task: Task
    how: How
    given: dict[str, Any]
    store: Reuse | None
    watch: Watch | None
    answered: int = 0
    tokens: int = 0
    known: int = 0
    _start: float = 0.0
    _scored: float = 0.0
    _cost: float = 0.0
    _score: float | None = None

    def all(
        self,
        asked: list[Asked],
        header: dict[str, Any],
        folder: Path | None,
        journal: Journal | None,
    ) -> Result:
        """Ask what is not known yet, and score everything."""
        mx.reset_peak_memory()
        self._start = time.perf_counter()
        records: dict[str, Record] = {}
        plan = list(batches(asked, self.how.batch_size))
        if journal is not None:
            _check_prompts(journal, asked)
            records = _usable(journal, plan)
            self.known = sum(one.sample.id in records for one in asked)
        left = [[a for a in some if a.sample.id not in records] for some in plan]
        left = [some for some in left if some]
        self._tell(asked, records)
        with ThreadPoolExecutor(1) as ahead:
            for place, some in enumerate(left):
                if place + 1 < len(left):
                    ahead.submit(self._warm, left[place + 1])
                new = self._records(some, folder)
                if journal is not None:
                    journal.add(new)
                records |= {record["id"]: record for record in new}
                self._tell(asked, records)
        result = self._result(asked, records, header)
        if journal is not None:
            journal.finish(result.records)
        return result

    # --- a batch ---------------------------------------------------------------------

    def _warm(self, some: Sequence[Asked]) -> None:
        """Read a batch's picture files ahead, into what is kept of pictures.

        What is wrong with one of them is told when it is asked about.
        """
        if self.store is None or not isinstance(self.processor, Processor):
            return
        reading = Settings.of(self.given).reading() | {
            "use_template": False,
            "system": None,
        }
        for one in some:
            images = one.images  # all at once: how one is read may hang on their number
            if not images or all(map(is_decoded, images)):
                continue
            marks = IMAGE_TOKEN * len(images)
            with suppress(MM1Error):
                self.processor(marks, images, known=self.store.pixels, **reading)

    def _records(self, some: Sequence[Asked], folder: Path | None) -> list[Record]:
        self.answered += len(some)
        found = []
        for one, response in zip(some, self._answers(some), strict=True):
            record: Record = {
                "id": one.sample.id,
                "images": [reference(i, folder) for i in one.sample.images],
                "prompt": one.prompt,
                **self._told_of(one.sample),
            }
            if stamps := _stamps(one.sample):
                record["files"] = stamps
            if isinstance(response, MM1Error):
                record |= {"answer": "", "error": self._why(response)}
            else:
                self.tokens += response.generation_tokens
                record |= {
                    "answer": response.text,
                    "finish_reason": response.finish_reason,
                    "prompt_tokens": response.prompt_tokens,
                    "tokens": response.generation_tokens,
                }
            found.append(record)
        return found

    def _told_of(self, sample: Sample) -> Record:
        """What the dataset says of a sample besides its question."""
        expected = list(sample.answers)
        if self.task.boxes and not expected:
            expected = [self.task.target(sample)]
        told: Record = {"expected": expected}
        if "where" in sample.fields:
            told["where"] = str(sample.fields["where"])
        return told

    def _why(self, error: MM1Error) -> str:
        if isinstance(error, ContextError) and (shots := self.how.shots):
            return f"{error} Or take --shots {shots - 1} or fewer."
        return str(error)

    def _answers(self, some: Sequence[Asked]) -> list[Any]:
        """A response for each question, or the error that keeps it from one.

        A batch that fails is halved until the culprit is alone, whatever is wrong: a
        broken picture, a prompt beyond the context, or too little memory for all.
        """
        try:
            return list(
                batch_generate(
                    self.model,
                    self.processor,
                    [one.prompt for one in some],
                    [one.images or None for one in some],
                    reuse=False if self.store is None else self.store,
                    **self.given,
                )
            )
        except MM1Error as error:
            if len(some) == 1:
                return [error]
        middle = len(some) // 2
        return self._answers(some[:middle]) + self._answers(some[middle:])

    # --- scores ----------------------------------------------------------------------

    def _scored_by(self, asked: Sequence[Asked], records: dict[str, Record]) -> Score:
        return self.task.metric(
            [self._value(one.sample, records[one.sample.id]) for one in asked]
        )

    def _value(self, sample: Sample, record: Record) -> Answered:
        if "error" in record:  # what a rule makes of "" may be right
            return Answered(sample, "", None)
        text, clean = record["answer"], self.task.clean
        if self.how.form == "pretrain" and self.task.shot_clean is not None:
            clean = self.task.shot_clean
        return Answered(sample, text, clean(text, sample))

    def _tell(self, asked: Sequence[Asked], records: dict[str, Record]) -> None:
        """Show how far it is; the score now and then, for it costs time."""
        if self.watch is None:
            return
        done = [one for one in asked if one.sample.id in records]
        now = time.perf_counter()
        if done and now - self._scored >= _SPARING * self._cost:
            with suppress(
                Exception
            ):  # a running score is an extra; the last one is not
                self._score = self._scored_by(done, records).total
            self._scored = time.perf_counter()
            self._cost = self._scored - now
        progress = Progress(
            self.task.name,
            self.how.name,
            len(done),
            len(asked),
            self.known,
            time.perf_counter() - self._start,
            self._score,
        )
        self.watch(progress)

    def _result(
        self, asked: list[Asked], records: dict[str, Record], header: dict[str, Any]
    ) -> Result:
        chosen = [records[one.sample.id] for one in asked]
        if all("error" in record for record in chosen):
            raise DatasetError(
                f"{self.task.name}: not one of {plural(len(chosen), 'sample')} could "
                f"be asked. The first, {chosen[0]['id']}: {chosen[0]['error']}"
            )
        seconds = time.perf_counter() - self._start
        score = self._scored_by(asked, records)
        scored = []
        for one, record, each in zip(asked, chosen, score.each, strict=True):
            value = self._value(one.sample, record).value
            told = self._told_of(one.sample)
            scored.append(record | told | {"value": value, "score": each})
        return Result(
            task=self.task,
            how=self.how,
            score=score,
            records=scored,
            samples=[one.sample for one in asked],
            settings=header,
            answered=self.answered,
            seconds=seconds,
            tokens=self.tokens,
            peak_memory=mx.get_peak_memory() / 1e9,
        )


def batches(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Questions of about one length together, so that little is padded.

    Sorted only among some of them: what is asked together also lies together.
    """
    step = size * _WINDOW
    for start in range(0, len(asked), step):
        window = asked[start : start + step]
        order = sorted(
            range(len(window)),
            key=lambda i: (len(window[i].images), len(str(window[i].prompt)), i),
        )
        for first in range(0, len(order), size):
            yield [window[i] for i in order[first : first + size]]


def _usable(journal: Journal, plan: Sequence[Sequence[Asked]]) -> dict[str, Record]:
    """What is known of each sample, without the batch that the file ends in.

    That one is asked again as a whole, so that a run that was cut off gives what one
    in a piece does: in 16 bits rounding depends on who is in a batch. So are those of
    samples that could not be asked: what was wrong may have been mended.
    """
    records = dict(journal.records)
    failed = {name for name, record in records.items() if "error" in record}
    for some in plan:
        names = {one.sample.id for one in some}
        if names & failed:
            records = {k: v for k, v in records.items() if k not in names}
    last = journal.last()
    for some in plan:
        names = [one.sample.id for one in some]
        if last in names and not all(name in records for name in names):
            return {k: v for k, v in records.items() if k not in names}
    return records


def _stamps(sample: Sample) -> list[list[int]]:
    """Size and time of change of a sample's picture files; [] where one is no file."""
    if not all(isinstance(image, (str, os.PathLike)) for image in sample.images):
        return []
    try:
        found = [os.stat(image) for image in sample.images]
    except (OSError, ValueError):  # an address
        return []
    return [[one.st_size, one.st_mtime_ns] for one in found]


def _check_prompts(journal: Journal, asked: Sequence[Asked]) -> None:
    """DatasetError where the file's answers are to other prompts than today's, or to
    other pictures."""
    for one in asked:
        record = journal.records.get(one.sample.id)
        if record is None or "error" in record:
            continue
        other = None
        if record.get("prompt") != as_kept(one.prompt):
            other = "prompt of"
        elif record.get("files", []) != _stamps(one.sample):
            other = "picture file of"
        if other is not None:
            raise DatasetError(
                f"{journal.path}: the {other} sample {one.sample.id} was another one "
                f"when this was begun: the task or its data have changed. Give another "
                f"--output; --force starts it anew."
            )
