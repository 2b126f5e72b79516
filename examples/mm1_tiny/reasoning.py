"""Questions that take two steps, answered at once or step by step (chain of thought).

"A red thing is worth 3 and a star 2. What is the picture worth?": things are counted,
each count is multiplied, the products are added. What is worth what is new in every
question, so it cannot be learned by heart; and a decoder of four layers has few steps
for an answer at once.
"""

import random
from dataclasses import dataclass

from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.questions import Question
from examples.mm1_tiny.scenes import COLOURS, SHAPES, Scene

STEP_BY_STEP = "Think step by step."
ANSWER = "Answer:"  # stands before the last words of an answer in steps
_WORTH = (
    "{a} is worth {x} and {b} is worth {y}. What is {picture} worth?",
    "{a} is worth {x}, {b} is worth {y}. How much is {picture} worth?",
    "{a} counts {x} and {b} counts {y}. How many points does {picture} have?",
    "{a} gives {x} points, {b} gives {y} points. How many points are there{place}?",
)


@dataclass(frozen=True)
class TwoSteps:
    """A question, the steps to its answer, and the answer."""

    question: str
    steps: str
    answer: str

    @property
    def reasoned(self) -> str:
        """ "2 red: 2 x 3 = 6. ... Answer: 8"."""
        return f"{self.steps} {ANSWER} {self.answer}"


def _kinds(scene: Scene, rng: random.Random) -> list[tuple[str | None, str | None]]:
    """Two colours or two shapes, mostly ones that are there."""
    colours = rng.random() < 0.5
    names = COLOURS if colours else SHAPES
    there = sorted({t.colour if colours else t.shape for t in scene.things})
    pool = there if len(there) > 1 else [*there, *rng.sample(names, 2)]
    if rng.random() < 0.15:
        pool = list(names)
    found = rng.sample(sorted(set(pool)), 2)
    return [(name, None) if colours else (None, name) for name in found]


def two_steps(scene: Scene, rng: random.Random) -> TwoSteps:
    """A question about what a picture is worth."""
    kinds = _kinds(scene, rng)
    worth = rng.sample(range(1, 6), 2)
    named, steps, products = [], [], []
    for (colour, shape), each in zip(kinds, worth, strict=True):
        word = shape or w.noun(rng, shape=False)
        named.append(w.with_article(f"{colour} {word}" if colour else word))
        count = scene.count(colour, shape)
        products.append(count * each)
        steps.append(f"{count} {colour or shape}: {count} x {each} = {products[-1]}.")
    total = str(sum(products))
    steps.append(f"{products[0]} + {products[1]} = {total}.")
    values = {"a": named[0], "b": named[1], "x": str(worth[0]), "y": str(worth[1])}
    return TwoSteps(w.fill(_WORTH, rng, **values), " ".join(steps), total)


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Four: the last is answered at once, the others step by step, as
    each of them says."""
    found: list[Question] = []
    for _ in range(3):
        asked = two_steps(scene, rng)
        text = f"{asked.question} {STEP_BY_STEP}"
        found.append(Question("worth_steps", text, asked.reasoned))
    once = two_steps(scene, rng)
    return [*found, Question("worth", once.question, once.answer)]


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """What the steps need, as text: a product or a sum."""
    if rng.random() < 0.5:
        a, b = rng.randint(0, 6), rng.randint(1, 6)
        return rng.choice((f"{a} x {b} =", f"What is {a} x {b}?")), str(a * b)
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return rng.choice((f"{a} + {b} =", f"What is {a} + {b}?")), str(a + b)
