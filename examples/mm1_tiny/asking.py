"""All askers by task, and how often each is asked of a scene."""

import random

from examples.mm1_tiny import boxes
from examples.mm1_tiny import questions as q
from examples.mm1_tiny.questions import Asker, Question
from examples.mm1_tiny.scenes import Scene

ASKERS: dict[str, Asker] = {
    "count": q.ask_count,
    "count_colour": q.ask_count_colour,
    "count_shape": q.ask_count_shape,
    "count_pair": q.ask_count_pair,
    "colour": q.ask_colour,
    "shape": q.ask_shape,
    "existence": q.ask_existence,
    "position": q.ask_position,
    "relation": q.ask_relation,
    "caption": q.ask_caption,
    "colour_many": q.ask_colour_many,
    "shape_many": q.ask_shape_many,
    "colour_absent": q.ask_colour_absent,
    "shape_absent": q.ask_shape_absent,
    "position_absent": q.ask_position_absent,
    "box": boxes.ask_box,
    "point": boxes.ask_point,
    "at": boxes.ask_at,
    "grounded": boxes.ask_grounded,
}
# How many times each is asked of a scene, on average.
RATES = {
    "count": 0.6,
    "count_colour": 0.9,
    "count_shape": 0.9,
    "count_pair": 0.9,
    "colour": 0.9,
    "shape": 0.9,
    "existence": 1.1,
    "position": 1.3,
    "relation": 1.3,
    "caption": 1.0,
    "colour_many": 0.4,
    "shape_many": 0.4,
    "colour_absent": 0.25,
    "shape_absent": 0.25,
    "position_absent": 0.25,
    "box": 0.8,
    "point": 0.25,
    "at": 0.6,
    "grounded": 0.25,
}


def ask(
    scene: Scene,
    rng: random.Random,
    *,
    pairs: str = "training",
    which: str | None = None,
) -> list[Question]:
    """Six to ten questions of all tasks about one scene, in random order.

    pairs: which absent pairs may be named: "training", "held_out" or "all".
    which: "first" or "second", where the scene is one of two pictures.
    """
    found: dict[str, Question] = {}
    while len(found) < 6:
        for task, rate in RATES.items():
            times = int(rate) + (rng.random() < rate % 1)
            for _ in range(times):
                question = ASKERS[task](scene, rng, pairs, which)
                if question:
                    found[question.question.lower().rstrip("?. ")] = question
    questions = list(found.values())
    rng.shuffle(questions)
    return questions[:10]


EMPTY_TASKS = (
    "count", "count_colour", "count_shape", "count_pair", "caption", "colour_absent",
    "shape_absent", "position_absent",
)  # fmt: skip


def ask_of_nothing(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions about a picture with nothing in it."""
    found = [ASKERS[task](scene, rng, "training", None) for task in EMPTY_TASKS]
    return rng.sample([x for x in found if x], 5)
