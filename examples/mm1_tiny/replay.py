"""Questions that mm1-tiny answers already, to train on beside new ones.

They come from the training splits, so the tests in tasks.py stay new to it, and need
no package but Pillow and NumPy. What a model is not shown again, it forgets first where
it is close to what is new.
"""

import random

from examples.mm1_tiny import drawing, glyphs
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.comparisons import compare
from examples.mm1_tiny.pictures import BARE_TASKS, bare_prompt, bare_shot, scene_with
from examples.mm1_tiny.tasks import SCENE_TASKS, Example

COUNTS = ("count", "count_colour", "count_shape", "count_pair")
KINDS = (
    *SCENE_TASKS, "colour_many", "shape_many", "colour_absent", "words", "compare",
    "few_shot",
)  # fmt: skip


def old_question(kind: str, rng: random.Random) -> Example:
    """A question of one of KINDS with its pictures and answer."""
    if kind == "words":
        found = glyphs.sample_word(rng, "train")
        return Example([found.image], glyphs.word_questions(rng), found.text, kind)
    if kind == "compare":
        both = s.sample_two_scenes(rng)
        asked = rng.choice(compare(*both, rng))
        images = [drawing.draw(scene, rng) for scene in both]
        return Example(images, asked.question, asked.answer, kind)
    if kind == "few_shot":
        named = rng.choice(BARE_TASKS[:4])
        shots = [bare_shot(named, rng, 1.0) for _ in range(3)]
        answers = [shot.questions[0].answer for shot in shots]
        images = [shot.image for shot in shots]
        return Example(images, bare_prompt(answers[:-1]), answers[-1], kind)
    scene, asked = scene_with(kind, rng)
    return Example([drawing.draw(scene, rng)], asked.question, asked.answer, kind)
