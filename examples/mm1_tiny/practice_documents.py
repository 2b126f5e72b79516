"""Documents of what a round of everything learns too slowly: boxes, steps, talk.

recipe_9.json reads this module. What is asked of a tenth of the pictures takes as many
rounds as what is new takes documents (LAB.md); here it is most of what there is.
"""

import random

from examples.mm1_tiny import asking, documents, drawing, reasoning
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.pictures import (
    IMAGE_MARK,
    Picture,
    choose,
    difficulty,
    scene_regions,
)
from examples.mm1_tiny.questions import Question, caption_of
from mm1_mlx.training.documents import Document, Text

CAPTION = {"boxes": 0.5, "steps": 0.35, "ordinary": 0.15}
INTERLEAVED = {"talk": 0.7, "ordinary": 0.3}
TEXT = {"steps": 0.4, "ordinary": 0.6}
BOXES = ("box", "box", "box", "box", "at", "at", "point", "grounded")
_USER, _ASSISTANT = "<user>", "<assistant>"


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    if kind == "caption":
        style = choose(CAPTION, rng)
        if style == "boxes":
            return _asked(_boxes(rng, progress))
        if style == "steps":
            return _asked(_steps(rng, progress))
    if kind == "interleaved" and choose(INTERLEAVED, rng) == "talk":
        return documents.talk(rng, progress)
    if kind == "text" and choose(TEXT, rng) == "steps":
        return _told(rng)
    return documents.document(rng, kind, progress)


def _asked(picture: Picture) -> Document:
    return documents.of_picture(picture, f"{_USER}{IMAGE_MARK}", picture.questions)


def _boxes(rng: random.Random, progress: float) -> Picture:
    scene = s.sample_scene(rng, **difficulty(progress))
    found: dict[str, Question] = {}
    for task in rng.choices(BOXES, k=8):
        if question := asking.ASKERS[task](scene, rng, "training", None):
            found[question.question] = question
    image = drawing.draw(scene, rng)
    return Picture(image, scene_regions(scene, rng), list(found.values()))


def _steps(rng: random.Random, progress: float) -> Picture:
    scene = s.sample_scene(rng, min_things=2, **difficulty(progress))
    found = {}
    for _ in range(4):
        worth = reasoning.two_steps(scene, rng)
        question = f"{worth.question} {reasoning.STEP_BY_STEP}"
        found[question] = Question("worth_steps", question, worth.reasoned)
    image = drawing.draw(scene, rng)
    return Picture(image, scene_regions(scene, rng), list(found.values()))


def _told(rng: random.Random) -> Document:
    """A scene in words, and questions in two steps about it."""
    scene = s.sample_scene(rng, min_things=2)
    asked = [reasoning.two_steps(scene, rng) for _ in range(3)]
    branches = [
        [
            Text(f" {worth.question} {reasoning.STEP_BY_STEP}{_ASSISTANT}"),
            Text(worth.reasoned, True),
        ]
        for worth in asked
    ]
    context = [Text(f"{_USER}{caption_of(scene)}.")]
    return Document("text", [], context, branches, ["steps_told"] * len(branches))
