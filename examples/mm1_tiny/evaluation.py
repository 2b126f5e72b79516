"""mm1-tiny's test questions as tasks of `python -m mm1_mlx.evaluate`.

    python -m mm1_mlx.evaluate --model mm1-tiny --task mm1-tiny
    python -m mm1_mlx.evaluate --model mm1-tiny --task tiny_count --wrong-image

The questions are those of examples.mm1_tiny.evaluate, whose tables the model's card
has: the same seed, the same exact match; and those of its abilities, by their own
judges.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from examples.mm1_tiny import abilities, edges
from examples.mm1_tiny.evaluate import (
    FEW_SHOT,
    MAX_TOKENS,
    SHOTS,
    Asked,
    few_shot_rounds,
    questions,
)
from examples.mm1_tiny.scoring import MEANINGS, wilson
from examples.mm1_tiny.tasks import TASKS as QUESTIONS
from mm1_mlx.evaluation.samples import Answered, Sample, Score, Source, Task

NUMBER, SEED = 500, 1000  # as examples.mm1_tiny.evaluate has them
ABILITY_TOKENS = 128  # answers in steps are longer
# What each ability's task asks, for readers of the list.
ABILITIES = {
    "naming_right": "a picture named by a new word that 8 shots explain",
    "naming_shuffled": "the same, the words of the shots shuffled",
    "naming_none": "the same without shots",
    "worth_steps": "two-step questions after 3 shots with their steps",
    "worth_at_once": "the same after 3 shots with the answer alone",
    "small_dynamic": "things too small for 96 pixels, in tiles",
    "small_native": "the same without tiles",
    "small_text_dynamic": "text too small for 96 pixels, in tiles",
    "small_text_native": "the same without tiles",
    "box": "the box of a thing, IoU above 0.5",
    "at": "what is in a box or at a point",
    "talk": "the last question of a conversation",
    "talk_alone": "the same without the turns before it",
    "of_many": "one or all of 5 to 16 pictures",
    "smaller_count": "how many things, of 8 to 18% of the picture",
    "smaller_colour": "the colour of a thing of 8 to 18% of the picture",
    "smaller_caption": "all things, of 8 to 18% of the picture",
    "empty": "about a picture with nothing in it",
    "doubled": "a word with a letter twice in a row (nine words)",
    "outlines": "about things without a filling",
    "overlapping": "about things that lie partly over each other",
    "crowded": "about five or six things",
    "capitals": "the question in capitals",
}


def _sample(number: int, asked: Asked, wrong: Sequence = ()) -> Sample:
    text = asked.prompt if isinstance(asked.prompt, str) else ""
    fields = {"asked": asked}
    if asked.groups:
        fields["category"] = ", ".join(asked.groups.values())
    if wrong:
        fields["wrong_images"] = tuple(wrong)
    return Sample(
        id=f"{number:04}",
        images=tuple(asked.images),
        question=text,
        answers=(asked.answer,),
        fields=fields,
    )


def _read(task: str, where: Source, split: str) -> Iterator[Sample]:
    """The questions of a task, made while they are asked for."""
    made = islice(questions(task, SEED), NUMBER)
    if task != "unknown":
        for number, asked in enumerate(made):
            yield _sample(number, asked)
        return
    # Every photograph has the same answer, so another one would be as right.
    scenes = questions("count", SEED + 1)
    for number, (asked, scene) in enumerate(zip(made, scenes, strict=False)):
        yield _sample(number, asked, scene.images)


def _read_few_shot(shots: int, where: Source, split: str) -> Iterator[Sample]:
    for number, asked in enumerate(islice(few_shot_rounds(SEED), NUMBER)):
        yield _sample(number, asked[shots])


def _prompt(sample: Sample):
    """Of a question; the text of a shot from a user's file."""
    asked = sample.fields.get("asked")
    return sample.question if asked is None else asked.prompt


def _clean(text: str, sample: Sample) -> str:
    return text.strip()


def share_right(answered: Sequence[Answered]) -> Score:
    """The share of right answers in percent, with Wilson's interval, and by group."""
    right = [
        one.value is not None and one.sample.fields["asked"].is_right(one.value)
        for one in answered
    ]
    low, high = wilson(sum(right), len(right))
    groups: dict[str, list[bool]] = {}
    for one, good in zip(answered, right, strict=True):
        if "category" in one.sample.fields:
            groups.setdefault(one.sample.fields["category"], []).append(good)
    return Score(
        100 * sum(right) / max(len(right), 1),
        [float(good) for good in right],
        100 * low,
        100 * high,
        {name: 100 * sum(g) / len(g) for name, g in sorted(groups.items())},
    )


def _task(name: str, summary: str, read, **changes) -> Task:
    usual = {"max_tokens": MAX_TOKENS, "settings": {}}
    return Task(
        name=f"tiny_{name}",
        summary=f"mm1-tiny: {summary}",
        read=read,
        split="test",
        shot_split=None,
        prompt=_prompt,
        shot_prompt=None,
        target=lambda sample: sample.answers[0],
        clean=_clean,
        metric=share_right,
        source="examples/mm1_tiny",
        needs_data=False,
        shuffled=True,
        **(usual | changes),
    )


def _ability(name: str) -> Task:
    read, settings = partial(_read, name), {}
    if name.startswith("small_"):  # as its Example has it
        settings["resolution"] = name.rpartition("_")[2]
    summary = ABILITIES.get(name, name.replace("_", " "))
    return _task(name, summary, read, max_tokens=ABILITY_TOKENS, settings=settings)


TASKS = (
    [
        _task(name, MEANINGS.get(name, name.replace("_", " ")), partial(_read, name))
        for name in QUESTIONS
        if name != FEW_SHOT
    ]
    + [
        _task(
            f"{FEW_SHOT}_{shots}",
            f"named as the {shots} pictures before are",
            partial(_read_few_shot, shots),
        )
        for shots in SHOTS
    ]
    + [_ability(name) for name in (*abilities.TASKS, *edges.TASKS)]
)
