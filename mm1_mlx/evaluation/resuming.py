"""What of an earlier run's answers can be used: whole batches, of the same prompts."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.few_shot import Question
from mm1_mlx.evaluation.journal import Journal, Record, as_kept
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.inputs.tokenizer import Tokenizer


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


# Every kind of character that tokenizers cut in their own ways.
_PROBE = "Café 1234567890, l'ÉTÉ <image> 数字 \n\n  a_b-c\t🙂 user: ASSISTANT"


def fingerprint_of_reading(processor: Any) -> dict[str, str]:
    """What tells whether a processor reads as it did: how it writes a conversation,
    reads pictures and cuts text, each as a digest."""
    reading = ("image_settings", "resolution", "max_tiles")
    parts = {
        "chat_template": getattr(processor, "chat_template", None),
        "images": [getattr(processor, name, None) for name in reading],
        "tokenizer": _cuts(getattr(processor, "tokenizer", None)),
    }
    return {
        name: hashlib.sha256(repr(value).encode()).hexdigest()[:16]
        for name, value in parts.items()
    }


def _cuts(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, Tokenizer):
        return None
    ids = tokenizer.encode(_PROBE if tokenizer.reads_text else "1 2 3")
    return tokenizer.vocab_size, sorted(tokenizer.marks.items()), ids


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
