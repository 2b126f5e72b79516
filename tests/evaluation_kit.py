"""A small dataset of drawn pictures and its tasks, as a user's own module has them.

`--tasks-from tests/evaluation_kit.py`. A folder holds val.jsonl and train.jsonl, each
line {"id", "image", "question", "answer"}, and the pictures.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.samples import Answered, Sample, Score, Source, Task

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")


def write_dataset(folder: Path, number: int = 12, shots: int = 4) -> Path:
    """A folder with pictures of one circle, whose colour is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("val", number), ("train", shots)):
        lines = []
        for i in range(count):
            colour = COLOURS[i % len(COLOURS)]
            image = Image.new("RGB", (60 + i, 64), "white")
            ImageDraw.Draw(image).ellipse((12 + i, 14, 48 + i, 50), fill=colour)
            name = f"{split}{i}.png"
            image.save(folder / name)
            question = f"What colour is the circle?{' ' * (i % 3)}"
            values = {"id": f"{split}-{i}", "image": name, "question": question}
            lines.append(json.dumps(values | {"answer": colour}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass(frozen=True)
class Slow:
    """A picture that takes its time, where EVALUATION_KIT_SLOW has seconds."""

    path: Path

    def read(self, size: int = -1) -> bytes:
        """The file's bytes."""
        time.sleep(float(os.environ.get("EVALUATION_KIT_SLOW", "0")))
        return self.path.read_bytes()


def read(where: Source, split: str) -> Iterator[Sample]:
    """The samples of a folder."""
    path = Path(where) / f"{split}.jsonl"
    if not path.exists():
        raise DatasetError(f"{where} has no {path.name}.")
    slow = "EVALUATION_KIT_SLOW" in os.environ
    for number, line in enumerate(path.read_text().splitlines(), 1):
        values = json.loads(line)
        image = path.parent / values["image"]
        yield Sample(
            id=values["id"],
            images=(Slow(image) if slow else image,),
            question=values["question"],
            answers=(values["answer"],),
            fields={"where": f"{path.name}:{number}", "category": values["answer"]},
        )


def exact(answered: Sequence[Answered]) -> Score:
    """The share of exact answers in percent."""
    each = [float(one.value in one.sample.answers) for one in answered]
    total = 100 * sum(each) / len(each)
    return Score(total, [*each], max(total - 10, 0), min(total + 10, 100))


COLOUR = Task(
    name="colour",
    summary="the colour of a circle",
    read=read,
    split="val",
    shot_split="train",
    prompt=lambda sample: sample.question.strip(),
    shot_prompt=lambda sample: f"<image>Question: {sample.question.strip()} Answer:",
    target=lambda sample: sample.answers[0],
    max_tokens=8,
    clean=lambda text, sample: text.strip().lower(),
    metric=exact,
)
TASKS = [COLOUR, replace(COLOUR, name="no_shots", shot_split=None)]
