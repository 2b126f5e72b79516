"""Test questions at the edge of what mm1-tiny learned: what its card calls weak.

Smaller things than the other tasks ask about, pictures with nothing in them, words with
a doubled letter, outlines, overlapping things, more than four things, and questions in
capitals. All randomness comes from the generator that is passed in.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

from examples.mm1_tiny import asking, drawing, glyphs, pictures
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.examples import Example
from examples.mm1_tiny.words import TEST_WORDS

# Diameters as shares of the picture's longer side. The other tasks begin at 0.18
# (scenes.SMALLEST), training at 0.08 (scenes.SMALLEST_TRAINED).
DIAMETERS = ((0.08, 0.10), (0.10, 0.12), (0.12, 0.14), (0.14, 0.16), (0.16, 0.18))
ASKED = ("count", "count_colour", "colour", "shape", "existence", "position", "caption")


def _smaller(task: str, rng: random.Random) -> Example:
    """A question about one to four things, all of them small."""
    least, most = rng.choice(DIAMETERS)
    while True:
        chosen = s.sample_pairs(rng, rng.randint(1, 4))
        scene = s.arrange(chosen, rng, smallest=least / 2, largest=most / 2)
        question = asking.ASKERS[task](scene, rng, "training", None)
        if question:
            break
    return Example(
        [drawing.draw(scene, rng)],
        question.question,
        question.answer,
        f"smaller_{task}",
        groups={"diameter": f"{least:.2f} to {most:.2f}"},
    )


def _empty(rng: random.Random) -> Example:
    """A question about a picture with nothing in it."""
    scene = s.Scene((), *s.sample_canvas(rng))
    question = rng.choice(asking.ask_of_nothing(scene, rng))
    image = drawing.draw(scene, rng)
    groups = {"question": question.task}
    return Example([image], question.question, question.answer, "empty", groups=groups)


def _scene(
    task: str, made: Callable[[random.Random], tuple[s.Scene, Any]], rng: random.Random
) -> Example:
    """One of ASKED about a scene of its own kind."""
    while True:
        (scene, image), asked = made(rng), rng.choice(ASKED)
        if question := asking.ASKERS[asked](scene, rng, "training", None):
            groups = {"question": question.task}
            text, answer = question.question, question.answer
            return Example([image], text, answer, task, groups=groups)


def _crowd(rng: random.Random) -> tuple[s.Scene, Any]:
    """Five or six things; the other tasks have at most four."""
    scene = s.sample_scene(rng, min_things=5, max_things=6)
    return scene, drawing.draw(scene, rng)


def _capitals(rng: random.Random) -> Example:
    """A question of the other tasks, in capitals."""

    def plain(rng: random.Random) -> tuple[s.Scene, Any]:
        scene = s.sample_scene(rng)
        return scene, drawing.draw(scene, rng)

    example = _scene("capitals", plain, rng)
    return replace(example, prompt=example.prompt.upper())


@cache
def doubled_words() -> tuple[str, ...]:
    """Words of the test split with the same letter twice in a row."""
    return tuple(w for w in TEST_WORDS if any(a == b for a, b in pairwise(w)))


def _doubled(rng: random.Random) -> Example:
    while True:
        found, asked = glyphs.sample_word(rng, "test"), glyphs.word_questions(rng)
        if found.text.lower() in doubled_words():
            return Example([found.image], asked, found.text, "doubled")


TASKS = {
    "smaller_count": partial(_smaller, "count"),
    "smaller_colour": partial(_smaller, "colour"),
    "smaller_caption": partial(_smaller, "caption"),
    "empty": _empty,
    "doubled": _doubled,
    "outlines": partial(_scene, "outlines", pictures.outlined),
    "overlapping": partial(_scene, "overlapping", pictures.overlapping),
    "crowded": partial(_scene, "crowded", _crowd),
    "capitals": _capitals,
}
