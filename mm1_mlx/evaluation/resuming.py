"""What of an earlier run's answers can be used: whole batches, of the same prompts."""

import os
from collections.abc import Sequence

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.few_shot import Question
from mm1_mlx.evaluation.journal import Journal, Record, as_kept
from mm1_mlx.evaluation.samples import Sample


def usable(journal: Journal, plan: Sequence[Sequence[Question]]) -> dict[str, Record]:
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


def stamps(sample: Sample) -> list[list[int]]:
    """Size and time of change of a sample's picture files; [] where one is no file."""
    if not all(isinstance(image, (str, os.PathLike)) for image in sample.images):
        return []
    try:
        found = [os.stat(image) for image in sample.images]
    except (OSError, ValueError):  # an address
        return []
    return [[one.st_size, one.st_mtime_ns] for one in found]


def check_prompts(journal: Journal, asked: Sequence[Question]) -> None:
    """DatasetError where the file's answers are to other prompts than today's, or to
    other pictures."""
    for one in asked:
        record = journal.records.get(one.sample.id)
        if record is None or "error" in record:
            continue
        other = None
        if record.get("prompt") != as_kept(one.asked.prompt):
            other = "prompt of"
        elif record.get("files", []) != stamps(one.sample):
            other = "picture file of"
        if other is not None:
            raise DatasetError(
                f"{journal.path}: the {other} sample {one.sample.id} was another one "
                f"when this was begun: the task or its data have changed. Give another "
                f"--output; --force starts it anew."
            )
