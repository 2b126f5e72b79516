"""Scenes in which colours or shapes have no name here: the other is asked about.

A model that meets only named pairs of colour and shape can learn the pairs as wholes,
and then fails on the ones that it never met. A star in any colour, and any shape in
red, can only be learned as a star and as red. Nothing here is ever named, and nothing
comes near one of HELD_OUT_PAIRS: no star is greenish, no triangle yellowish.
"""

import colorsys
import random

from examples.mm1_tiny import questions as q
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.questions import Question

# Hues (degrees) around the colour that a shape is held out with, and beyond.
_KEPT_AWAY = {"star": (70, 175), "triangle": (40, 73), "square": (248, 318)}


def any_colour(shape: str, rng: random.Random) -> str:
    """ "#rrggbb", of any hue, also between two names; see _KEPT_AWAY."""
    low, high = _KEPT_AWAY.get(shape, (0, 0))
    while True:
        hue = rng.uniform(0, 360)
        if not low < hue < high:
            break
    saturation, value = rng.uniform(0.25, 1), rng.uniform(0.3, 1)
    parts = colorsys.hsv_to_rgb(hue / 360, saturation, value)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def sample_scene(
    rng: random.Random, colours: bool, max_things: int = 4, smallest: float = s.SMALLEST
) -> s.Scene:
    """A scene whose shapes (or, with `colours`, whose colours) alone have names."""
    pairs = s.sample_pairs(rng, rng.randint(1, max_things))
    if colours:
        pairs = [(colour, rng.choice(s.UNNAMED_SHAPES)) for colour, _ in pairs]
    else:
        pairs = [(any_colour(shape, rng), shape) for _, shape in pairs]
    return s.arrange(pairs, rng, smallest=smallest)


def _existence(scene: s.Scene, rng: random.Random, colours: bool) -> Question:
    names = s.COLOURS if colours else s.SHAPES
    present = {thing.colour if colours else thing.shape for thing in scene.things}
    there = rng.random() < 0.5
    name = rng.choice([name for name in names if (name in present) == there])
    what = q.phrase(name, None, rng) if colours else name
    question = w.fill(w.EXISTENCE, rng, a_what=w.with_article(what), whats=what + "s")
    return Question("existence", question, q.yes(there))


def ask(scene: s.Scene, rng: random.Random, colours: bool) -> list[Question]:
    """Up to eight questions that need no other names than the scene's own."""
    count = q.ask_count_colour if colours else q.ask_count_shape
    # Asked of a place ("the leftmost thing"), for no thing has the other name.
    name = q.ask_colour if colours else q.ask_shape
    askers = [q.ask_count, count, count, name, name]
    askers += [q.ask_position, q.ask_position, q.ask_relation, q.ask_relation]
    found = {}
    for asker in askers:
        question = asker(scene, rng)
        if question:
            found[question.question.lower().rstrip("?. ")] = question
    question = _existence(scene, rng, colours)
    found[question.question] = question
    questions = list(found.values())
    rng.shuffle(questions)
    return questions[:8]
