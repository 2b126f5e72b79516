"""How a task is asked: its form, its shots, its batches."""

import os
from dataclasses import dataclass
from typing import Any

from mm1_mlx.errors import MM1Error
from mm1_mlx.inference.few_shot import CHOICES

BATCH = 16
FORMS = ("chat", "pretrain")
# Keywords of `evaluate` that say which shots, beside their number.
SHOT_NAMES = (
    "shots_from",
    "shot_choice",
    "balance_shots",
    "shot_features",
    "shot_reasoning",
    "answer_mark",
    "high_resolution_shots",
)


@dataclass(frozen=True)
class How:
    """How a task is asked; `evaluate` explains the first ones. MM1Error for a value out
    of range.

    shots_from: the shots, as FewShot takes them: a file with a JSON object in every
    line, or a list; None draws them from the task's training split. shot_choice:
    "random" with the seed, "nearest" to each question's picture by the encoder's
    features, or "first". balance_shots: as many of each answer as can be.
    shot_features: a file that keeps features for "nearest", or a Features.
    shot_reasoning: whether their reasoning is shown; None is where they have one.
    answer_mark: stands between reasoning and answer. high_resolution_shots: the last
    ones, read as the question; see FewShot.
    """

    shots: int = 0
    seed: int = 0
    batch_size: int = BATCH
    form: str = "chat"
    same_shots: bool = True
    wrong_images: bool = False
    shots_from: Any = None
    shot_choice: str = "random"
    balance_shots: bool = False
    shot_features: Any = None
    shot_reasoning: bool | None = None
    answer_mark: str = "Answer:"
    high_resolution_shots: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise MM1Error(f"form is {self.form!r}, but must be {' or '.join(FORMS)}.")
        check_count("batch_size", self.batch_size, 1)
        check_count("shots", self.shots, 0)
        if self.shot_choice not in CHOICES:
            raise MM1Error(
                f"shot_choice is {self.shot_choice!r}, but must be one of "
                f"{', '.join(CHOICES)}."
            )
        if not self.same_shots and self.shot_choice != "random":
            raise MM1Error(
                f"same_shots=False draws other shots for each question, but "
                f"shot_choice {self.shot_choice!r} draws none: leave one of them out."
            )

    @property
    def name(self) -> str:
        """What a task asked so is called: "4-shot", "8-shot, nearest, reasoning"."""
        parts = [f"{self.shots}-shot"]
        if self.shots:
            parts += [self.shot_choice] if self.shot_choice != "random" else []
            parts += ["reasoning"] if self.shot_reasoning else []
        return ", ".join([*parts, *(["wrong pictures"] if self.wrong_images else [])])

    def file(self, task: str, ending: str) -> str:
        """The name of a file about a task asked so."""
        wrong = "-wrong" if self.wrong_images else ""
        return f"{task}-{self.shots}shot{wrong}{ending}"

    def settings(self) -> dict[str, Any]:
        """What decides the prompts; of shots only where there are some."""
        names = ["shots", "seed", "batch_size", "form", "same_shots", "wrong_images"]
        if self.shots:
            names += [name for name in SHOT_NAMES if name != "shot_features"]
        found = {name: getattr(self, name) for name in names}
        if found.get("shots_from") is not None:
            found["shots_from"] = name_of(self.shots_from)
        return found


def name_of(source: Any) -> str:
    """What the place of shots is called: a file's path, or "a list"."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "a list"


def check_count(name: str, value: Any, least: int) -> None:
    """MM1Error unless a value is a whole number of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MM1Error(
            f"{name} is {value!r}, but must be a whole number of {least} or more."
        )
