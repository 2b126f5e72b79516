"""One task, asked and scored: batches, what fails, what is kept to go on with."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx._version import __version__
from mm1_mlx.checkpoint.disk import locked
from mm1_mlx.errors import DatasetError, MM1Error
from mm1_mlx.evaluation.choosing import (
    choose_samples,
    source_of,
    with_wrong_images,
)
from mm1_mlx.evaluation.datasets.rows import shown
from mm1_mlx.evaluation.few_shot import (
    Question,
    TaskShots,
    ask_all,
    look,
    pool_of,
    usual_form,
)
from mm1_mlx.evaluation.how import BATCH, SHOT_NAMES, How, check_count
from mm1_mlx.evaluation.journal import Journal, Record
from mm1_mlx.evaluation.references import reference
from mm1_mlx.evaluation.report import Report
from mm1_mlx.evaluation.results import Progress, Result, Watch
from mm1_mlx.evaluation.resuming import (
    check_prompts,
    fingerprint_of_reading,
    stamps,
    usable,
)
from mm1_mlx.evaluation.said_boxes import form_in_words, in_form_of
from mm1_mlx.evaluation.samples import Answered, Sample, Score, Source, Task
from mm1_mlx.evaluation.table import find_task
from mm1_mlx.inference.generation import batch_generate
from mm1_mlx.inference.identity import fingerprint
from mm1_mlx.inference.reuse import Reuse, store_of
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.shot_template import split_answer
from mm1_mlx.inputs.images import is_decoded
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import IMAGE_TOKEN, plural
from mm1_mlx.models.mm1 import MM1

_WINDOW = 32  # batches among which questions are sorted by their length
_SPARING = 20  # a running score takes a twentieth of the time at most
_REASONING = 256  # tokens that an answer with reasoning may have at least
FEATURES = "features.safetensors"  # what nearest shots are found by


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
    form: "chat" or "pretrain" (see few_shot.written); None is the model's own.
    wrong_images: ask each question about another one's pictures. output: a folder that
    keeps the answers, and has result.json, report.md and a sheet of failures of all
    that was asked there; the same call goes on where it was ended; force starts
    anew. watch: is called with a Progress after each batch. settings: as generate's
    (temp, max_tokens, kv_bits, ...), and How's about shots (shots_from, shot_choice,
    high_resolution_shots, ...).

    Raises DatasetError for data that cannot be used, for an output of other settings,
    and where not one sample could be asked.
    """
    if isinstance(task, str):
        task = find_task(task)
    form = form or usual_form(processor)
    chosen = {name: settings.pop(name) for name in SHOT_NAMES if name in settings}
    how = How(shots, seed, batch_size, form, same_shots, wrong_images, **chosen)
    if limit is not None:
        check_count("limit", limit, 1)
    where = source_of(task, data)
    task = in_form_of(task, processor)
    _generation(task, how, settings)  # wrong ones are told before anything is read
    pool = pool_of(task, where, how) if how.shots else None
    samples = _samples(task, where, limit, how)
    with _folder(output) as folder:
        before = None
        if pool is not None:
            before = TaskShots(task, pool, how, processor, _features(how, folder))
            how = replace(how, shot_reasoning=before.reasoned)
        given = _generation(task, how, settings)
        store = store_of(model, reuse)
        run = _Run(model, processor, task, how, given, store, watch, before)
        asked = run.questions(samples)
        return run.all(asked, _header(run, where, limit), folder, force)


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path | None]:
    """The folder of an output, made where it is missing, for this process alone."""
    if output is None:
        yield None
        return
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DatasetError(
            f"--output {folder} is a file, or lies in one: give a folder."
        ) from None
    with locked(folder):
        yield folder


def _features(how: How, folder: Path | None) -> Any:
    """Where features for the nearest shots are kept: a run that goes on has them."""
    if how.shot_features is not None or how.shot_choice != "nearest":
        return how.shot_features
    return None if folder is None else folder / FEATURES


def _generation(task: Task, how: How, settings: dict[str, Any]) -> dict[str, Any]:
    """batch_generate's settings: the task's own, and what the caller wants instead."""
    given: dict[str, Any] = {"max_tokens": task.max_tokens, "seed": how.seed}
    stops = _stops(task, how)
    if _reasons(how):
        stops = ()  # of the answer, not of the reasoning before it
        given["max_tokens"] = max(task.max_tokens, _REASONING)
    if how.form == "pretrain":
        given["use_template"] = False
        stops = (*stops, "\n")  # there the next shot would begin
    if stops:
        given["stop"] = list(dict.fromkeys(stops))
    given |= task.settings
    given |= settings
    Settings.of(given)
    return given


def _stops(task: Task, how: How) -> tuple[str, ...]:
    """Where the task's answers end."""
    if how.form == "pretrain" and task.shot_stop is not None:
        return task.shot_stop
    return task.stop


def _reasons(how: How) -> bool:
    """Whether answers have reasoning, as their shots do."""
    return bool(how.shots and how.shot_reasoning)


def _samples(task: Task, where: Source, limit: int | None, how: How) -> list[Sample]:
    samples = choose_samples(task, where, limit, how.seed)
    return with_wrong_images(samples) if how.wrong_images else samples


def _header(run: "_Run", where: Source, limit: int | None) -> dict[str, Any]:
    """What decides the answers. Not the limit: a larger one goes on with a smaller,
    but where wrong pictures are those of other chosen samples.

    The batch size does: in 16 bits rounding depends on who is in a batch.
    """
    task, how, given = run.task, run.how, run.given
    boxes = {"boxes": form_in_words(run.processor)} if task.boxes else {}
    return {
        **boxes,
        **({"limit": limit} if how.wrong_images else {}),
        "task": task.name,
        "split": task.split,
        "data": str(where) if task.needs_data else None,
        **how.settings(),
        **({} if run.shots is None else run.shots.told()),
        "generation": {k: v for k, v in sorted(given.items()) if k != "seed"},
        "model": fingerprint(run.model),
        "processor": fingerprint_of_reading(run.processor),
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
    shots: TaskShots | None
    answered: int = 0
    tokens: int = 0
    known: int = 0
    _start: float = 0.0
    _scored: float = 0.0
    _cost: float = 0.0
    _score: float | None = None

    def questions(self, samples: list[Sample]) -> list[Question]:
        """The samples behind their shots."""
        settings, shots = Settings.of(self.given), self.shots
        limits = settings.limits()
        if shots is not None and self.how.shot_choice == "nearest":
            shots = look(shots, samples, self.model, self._look(), **limits)
        parts = self.task, samples, shots, self.how, self.processor, self.model
        return ask_all(*parts, resolution=settings.resolution, **limits)

    def _look(self) -> Callable[[int, int], None] | None:
        """Shows how many pictures' features are known."""
        watch, start = self.watch, time.perf_counter()
        if watch is None:
            return None

        def progress(done: int, total: int) -> None:
            seconds = time.perf_counter() - start
            watch(Progress(self.task.name, "features", done, total, 0, seconds, None))

        return progress

    def all(
        self,
        asked: list[Question],
        header: dict[str, Any],
        folder: Path | None,
        force: bool,
    ) -> Result:
        """Ask what is not known yet, and score everything; folder: keeps it."""
        if folder is None:
            return self._all(asked, header, None, None)
        report = Report.of(folder, self.model, self.processor, force)
        path = folder / self.how.file(self.task.name, ".jsonl")
        journal = Journal(path, header, force)
        try:
            result = self._all(asked, header, folder, journal)
        finally:
            journal.close()
        report.add(result)
        return result

    def _all(
        self,
        asked: list[Question],
        header: dict[str, Any],
        folder: Path | None,
        journal: Journal | None,
    ) -> Result:
        mx.reset_peak_memory()
        self._start = time.perf_counter()
        records: dict[str, Record] = {}
        plan = list(batches(asked, self.how.batch_size))
        if journal is not None:
            check_prompts(journal, asked)
            records = usable(journal, plan)
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

    def _warm(self, some: Sequence[Question]) -> None:
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
            images = one.asked.images  # all at once: their number may say how
            if one.error or not images or all(map(is_decoded, images)):
                continue
            if one.asked.resolution is not None:
                reading["resolution"] = one.asked.resolution
            marks = IMAGE_TOKEN * len(images)
            with suppress(MM1Error):
                self.processor(marks, images, known=self.store.pixels, **reading)

    def _records(self, some: Sequence[Question], folder: Path | None) -> list[Record]:
        self.answered += len(some)
        found = []
        for one, response in zip(some, self._answers(some), strict=True):
            record: Record = {
                "id": one.sample.id,
                "images": [reference(i, folder) for i in one.sample.images],
                "prompt": one.asked.prompt,
                **self._told_of(one.sample),
            }
            if self.shots is not None:
                shown = one.asked.shots
                record["shots"] = [self.shots.label(shot.number) for shot in shown]
            if files := stamps(one.sample):
                record["files"] = files
            if isinstance(response, MM1Error):
                record |= {"answer": "", "error": str(response)}
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

    def _answers(self, some: Sequence[Question]) -> list[Any]:
        """A response for each question, or the error that keeps it from one.

        A batch that fails is halved until the culprit is alone, whatever is wrong: a
        broken picture, a prompt beyond the context, or too little memory for all.
        """
        if any(one.error for one in some):
            each = [[one.error] if one.error else self._answers([one]) for one in some]
            return [answer for answers in each for answer in answers]
        try:
            return list(
                batch_generate(
                    self.model,
                    self.processor,
                    [one.asked for one in some],
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

    def _scored_by(
        self, asked: Sequence[Question], records: dict[str, Record]
    ) -> Score:
        _, metric, _ = self.task.reading(self.how.form)
        found = metric(
            [self._value(one.sample, records[one.sample.id]) for one in asked]
        )
        if not isinstance(found, Score):
            raise DatasetError(
                f"{self.task.name}: its metric gave {shown(found)}, but must give a "
                f"score (mm1_mlx.evaluation.samples.Score)."
            )
        if len(found.each) != len(asked):
            raise DatasetError(
                f"{self.task.name}: its metric gave {len(found.each)} values in each, "
                f"but must give one for each of {plural(len(asked), 'sample')}."
            )
        return found

    def _value(self, sample: Sample, record: Record) -> Answered:
        if "error" in record:  # what a rule makes of "" may be right
            return Answered(sample, "", None)
        text = self._said(record["answer"])
        clean, _, _ = self.task.reading(self.how.form)
        return Answered(sample, text, clean(text, sample))

    def _said(self, text: str) -> str:
        """What stands behind the reasoning, up to where the task's answers end."""
        if not _reasons(self.how):
            return text
        reasoning, answer = split_answer(text, self.how.answer_mark.strip())
        if reasoning is None:
            return text
        for stop in _stops(self.task, self.how):
            answer = answer.split(stop, 1)[0]
        return answer

    def _tell(self, asked: Sequence[Question], records: dict[str, Record]) -> None:
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
        self, asked: list[Question], records: dict[str, Record], header: dict[str, Any]
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


def batches(asked: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions of about one length together, so that little is padded.

    Sorted only among some of them: what is asked together also lies together.
    """
    step = size * _WINDOW
    for start in range(0, len(asked), step):
        window = asked[start : start + step]
        order = sorted(
            range(len(window)),
            key=lambda i: (
                len(window[i].asked.images),
                len(str(window[i].asked.prompt)),
                i,
            ),
        )
        for first in range(0, len(order), size):
            yield [window[i] for i in order[first : first + size]]
