"""Test questions of what MM1 is known for: shots, tiles, boxes, steps, talk, many
pictures. Each as a task of its own, with the task that it is compared with.

All randomness comes from the generator that is passed in. Two tasks that are compared
draw the same questions from the same seed.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from examples.mm1_tiny import asking, drawing, naming, reasoning, small, turns
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.examples import Example
from examples.mm1_tiny.long_documents import about_many

SHOTS = 8
SMALL_TASKS = ("colour", "shape", "caption", "count_pair")
SMALL_SIDE = 288  # pixels: three tiles of 96
SMALL_RADII = 0.02, 0.03  # 4 to 6 of 96 pixels across; 12 to 17 of 288
WORTH_SHOTS = 3


def _single(rng: random.Random, pair: s.Pair | None = None) -> tuple[s.Thing, Any]:
    """A picture of one thing; pair: its colour and shape."""
    scene = s.arrange([pair or rng.choice(s.TRAINING_PAIRS)], rng)
    return scene.things[0], drawing.draw(scene, rng)


# --- shots ---------------------------------------------------------------------------


def naming_shots(labels: str, rng: random.Random) -> Example:
    """Eight pictures named by words that mean nothing, and a ninth to be named.

    What the words stand for is a colour or a shape, and never could it be the other as
    well, by which the ninth picture had another name. The words are of the test split:
    they named nothing in training. labels: "right", "shuffled" among the shots (where
    as many stand right as chance has it), or "none": the ninth picture alone.
    """
    while True:
        place = 0 if rng.random() < 0.5 else 1  # of colour or shape in a pair
        values = rng.sample(s.SHAPES if place else s.COLOURS, rng.randint(2, 4))
        words = naming.names(len(values), rng, "test")
        order = [i % len(values) for i in range(SHOTS)]
        rng.shuffle(order)
        order.append(rng.randrange(len(values)))
        pools = [[p for p in s.TRAINING_PAIRS if p[place] == value] for value in values]
        pairs = [rng.choice(pools[which]) for which in order]
        names = [words[which] for which in order]
        if not another_name([pair[1 - place] for pair in pairs], names):
            break
    shown = [_single(rng, pair)[1] for pair in pairs]
    given = names[:-1]
    if labels == "shuffled":
        rng.shuffle(given)
    if labels == "none":
        given, shown = [], shown[-1:]
    lines = "".join(f"<image> {name}\n" for name in given)
    return Example(shown, lines + "<image>", names[-1], f"naming_{labels}")


def another_name(values: list[str], names: list[str]) -> bool:
    """Whether the last name would be another one, were all names of these values."""
    meant: dict[str, set[str]] = {}
    for value, name in zip(values[:-1], names[:-1], strict=True):
        meant.setdefault(value, set()).add(name)
    one_each = all(len(found) == 1 for found in meant.values())
    return one_each and meant.get(values[-1], {names[-1]}) != {names[-1]}


def _worth(shown: str, rng: random.Random) -> Example:
    """A two-step question after three shots: with their steps, or answered at once."""
    messages: list[dict] = []
    images = []
    for last in (False,) * WORTH_SHOTS + (True,):
        scene = s.sample_scene(rng, min_things=2)
        asked = reasoning.two_steps(scene, rng)
        images.append(drawing.draw(scene, rng))
        question = "<image>" + asked.question
        messages.append({"role": "user", "content": question})
        if last:
            task = f"worth_{shown}"
            return Example(images, messages, asked.answer, task, judge="last")
        answer = asked.reasoned if shown == "steps" else asked.answer
        messages.append({"role": "assistant", "content": answer})
    raise AssertionError("the last turn returns")


# --- tiles ---------------------------------------------------------------------------


def _small(resolution: str, rng: random.Random) -> Example:
    """Things too small for 96 pixels, in a picture of 288."""
    least, most = SMALL_RADII
    while True:
        scene = small.small_scene(rng, smallest=least, largest=most, most=3)
        task = rng.choice(SMALL_TASKS)
        question = asking.ASKERS[task](scene, rng, "training", None)
        if question:
            break
    image = drawing.draw(scene, rng, longer=SMALL_SIDE)
    task = f"small_{resolution}"
    return Example(
        [image], question.question, question.answer, task, resolution=resolution
    )


def _small_text(resolution: str, rng: random.Random) -> Example:
    """A number or a word that takes a quarter of the side of a picture of 288."""
    image, asked = small.small_text(rng, SMALL_SIDE, "test", share=0.25)
    task = f"small_text_{resolution}"
    return Example([image], asked.question, asked.answer, task, resolution=resolution)


# --- boxes ---------------------------------------------------------------------------


def _box(rng: random.Random) -> Example:
    scene, question = _asked("box", rng)
    image = drawing.draw(scene, rng)
    return Example([image], question.question, question.answer, "box", judge="box")


def _at(rng: random.Random) -> Example:
    scene, question = _asked("at", rng)
    return Example([drawing.draw(scene, rng)], question.question, question.answer, "at")


def _asked(task: str, rng: random.Random):
    while True:
        scene = s.sample_scene(rng)
        if question := asking.ASKERS[task](scene, rng, "training", None):
            return scene, question


# --- conversations -------------------------------------------------------------------


def _talk(history: bool, rng: random.Random) -> Example:
    """The last question of a conversation, with the turns before it or without."""
    while True:
        scene = s.sample_scene(rng, min_things=3)
        asked = turns.talk(scene, rng)
        # "And blue ones?" could be answered alone.
        if len(asked) > 1 and asked[-1].task in ("colour", "shape", "position"):
            break
    messages: list[dict] = []
    for turn in asked if history else asked[-1:]:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    messages[0] |= {"content": "<image>" + messages[0]["content"]}
    image = drawing.draw(scene, rng)
    task = "talk" if history else "talk_alone"
    return Example([image], messages[:-1], asked[-1].answer, task)


# --- many pictures -------------------------------------------------------------------


def _of_many(rng: random.Random) -> Example:
    """A question about one or all of 5 to 16 numbered pictures."""
    while True:
        shown = [_single(rng) for _ in range(rng.randint(5, 16))]
        if found := about_many([thing for thing, _ in shown], rng):
            break
    lines = "\n".join(f"Picture {i}: <image>" for i in range(1, len(shown) + 1))
    images = [image for _, image in shown]
    return Example(images, f"{lines}\n{found[0]}", found[1], "of_many")


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "naming_right": partial(naming_shots, "right"),
    "naming_shuffled": partial(naming_shots, "shuffled"),
    "naming_none": partial(naming_shots, "none"),
    "worth_steps": partial(_worth, "steps"),
    "worth_at_once": partial(_worth, "at_once"),
    "small_dynamic": partial(_small, "dynamic"),
    "small_native": partial(_small, "native"),
    "small_text_dynamic": partial(_small_text, "dynamic"),
    "small_text_native": partial(_small_text, "native"),
    "box": _box,
    "at": _at,
    "talk": partial(_talk, True),
    "talk_alone": partial(_talk, False),
    "of_many": _of_many,
}
# Tasks that draw the same questions: the seed is of the first one.
SAME_QUESTIONS = {
    "naming_shuffled": "naming_right",
    "naming_none": "naming_right",
    "worth_at_once": "worth_steps",
    "small_native": "small_dynamic",
    "small_text_native": "small_text_dynamic",
    "talk_alone": "talk",
}
