"""Questions that are asked or answered with a box or a point (MM1.5: refer and ground).

A box is "<x1,y1,x2,y2>", a point "<x,y>": hundredths of the longer side, from 0 to 99,
in the square that the picture is padded to. MM1.5 does not say how it counts; this is
ours.
"""

import random

from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.questions import Question, references
from examples.mm1_tiny.scenes import Scene, Thing

SCALE = 100
BOX = (
    "Give the box of the {what}.",
    "Give the box of the {what}{place}.",
    "Where exactly is the {what}? Give its box.",
    "What is the box of the {what}{place}?",
    "Find the {what}{place}.",
    "Find the {what} and give its box.",
    "Show me the {what}.",
    "Draw a box around the {what}.",
    "Box of the {what}?",
)
POINT = (
    "Point to the {what}.",
    "Point at the {what}{place}.",
    "Give a point on the {what}.",
    "Where do I click to hit the {what}?",
)
AT = (
    "What is at {where}?",
    "What is in {where}?",
    "What is there at {where}?",
    "What {thing} is at {where}?",
    "Which {thing} is in {where}?",
    "Describe {where}.",
    "Name the {thing} at {where}.",
)
GROUNDED = (
    "Describe {picture} with boxes.",
    "Describe {picture} and give the box of each {thing}.",
    "List the {things}{place} with their boxes.",
    "Find all {things}{place}.",
    "What is shown{place}? Give boxes.",
    "Give the boxes of all {things}{place}.",
)
MOST_GROUNDED = 3  # things: a box takes a dozen tokens


def _hundredths(value: float) -> int:
    return max(0, min(SCALE - 1, int(value * SCALE)))


def padded(scene: Scene, x: float, y: float) -> tuple[int, int]:
    """A place of the scene in the padded square, in hundredths."""
    left, top = (1 - scene.width) / 2, (1 - scene.height) / 2
    return _hundredths(left + x), _hundredths(top + y)


def box_text(scene: Scene, thing: Thing) -> str:
    """ "<12,30,45,62>": left, top, right, bottom."""
    left, top, right, bottom = thing.box()
    corners = *padded(scene, left, top), *padded(scene, right, bottom)
    return f"<{','.join(map(str, corners))}>"


def point_text(scene: Scene, x: float, y: float) -> str:
    """ "<28,46>"."""
    return "<{},{}>".format(*padded(scene, x, y))


def _one(scene: Scene, rng: random.Random) -> tuple[str, Thing] | None:
    """A thing that a phrase names alone, and the phrase."""
    options = [(thing, references(scene, thing)) for thing in scene.things]
    options = [(thing, ways) for thing, ways in options if ways]
    if not options:
        return None
    thing, ways = rng.choice(options)
    colour, shape = rng.choice(ways)
    word = shape or w.noun(rng, shape=False)
    return (f"{colour} {word}" if colour else word), thing


def ask_box(scene, rng, pairs="training", which=None) -> Question | None:
    """The box of a thing."""
    if (found := _one(scene, rng)) is None or which:
        return None
    question = w.fill(BOX, rng, what=found[0])
    return Question("box", question, box_text(scene, found[1]))


def ask_point(scene, rng, pairs="training", which=None) -> Question | None:
    """The middle of a thing."""
    if (found := _one(scene, rng)) is None or which:
        return None
    thing = found[1]
    question = w.fill(POINT, rng, what=found[0])
    return Question("point", question, point_text(scene, thing.x, thing.y))


def ask_at(scene, rng, pairs="training", which=None) -> Question | None:
    """What a box or a point shows."""
    if which or not scene.things:
        return None
    thing = rng.choice(scene.things)
    where = box_text(scene, thing)
    if rng.random() < 0.3 and thing.shape not in ("moon", "ring"):  # else a hole
        reach = 0.3 * thing.radius
        x, y = (c + rng.uniform(-reach, reach) for c in (thing.x, thing.y))
        where = point_text(scene, x, y)
    question = w.fill(AT, rng, where=where)
    return Question("at", question, w.with_article(thing.name))


def ask_grounded(scene, rng, pairs="training", which=None) -> Question | None:
    """All things from left to right, each with its box."""
    if which or not 1 <= len(scene.things) <= MOST_GROUNDED:
        return None
    found = [
        f"{w.with_article(thing.name)} {box_text(scene, thing)}"
        for thing in scene.left_to_right()
    ]
    return Question("grounded", w.fill(GROUNDED, rng), w.listed(found))
