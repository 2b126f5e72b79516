"""Questions about a scene, with answers read from the scene itself."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.scenes import (
    COLOURS,
    SHAPES,
    Pair,
    Scene,
    Thing,
    allowed_pairs,
)

POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
BORDER = 0.04  # a centre nearer than this to a border between thirds has no clear place
MARGIN = 0.08  # a relation along an axis needs this much
# A count is asked for by these weights, so that no answer is the usual one.
_COUNT_WEIGHTS = {0: 0.5, 1: 0.6, 2: 1.5, 3: 4.0} | dict.fromkeys((4, 5, 6), 10.0)


@dataclass(frozen=True)
class Question:
    """A question as a user types it and its one right answer."""

    task: str
    question: str
    answer: str


Asker = Callable[[Scene, random.Random, str, str | None], Question | None]


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _weighted(options: list, counts: list[int], rng: random.Random):
    weights = [_COUNT_WEIGHTS[count] for count in counts]
    # Many options with the same count together weigh as much as one.
    weights = [
        weight / counts.count(count)
        for weight, count in zip(weights, counts, strict=True)
    ]
    return rng.choices(options, weights)[0]


def references(scene: Scene, thing: Thing) -> list[tuple[str | None, str | None]]:
    """The (colour, shape) descriptions, None for any, that fit this thing alone."""
    ways = [(thing.colour, thing.shape), (thing.colour, None), (None, thing.shape)]
    known_colours, known_shapes = (*COLOURS, None), (*SHAPES, None)
    return [
        (colour, shape)
        for colour, shape in ways
        if colour in known_colours
        and shape in known_shapes
        and scene.count(colour, shape) == 1
    ]


def phrase(
    colour: str | None, shape: str | None, rng: random.Random, *, plural: bool = False
) -> str:
    """ "red star", "star", "red thing", "stars", ..."""
    word = shape or w.noun(rng, shape=False)
    if plural:
        word += "s"
    return f"{colour} {word}" if colour else word


def _refer(scene: Scene, thing: Thing, rng: random.Random) -> str | None:
    ways = references(scene, thing)
    return phrase(*rng.choice(ways), rng) if ways else None


def recombinations(scene: Scene, pairs: str) -> list[Pair]:
    """Absent pairs whose colour and whose shape are both there, in other things."""
    colours = {thing.colour for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    return [
        pair
        for pair in allowed_pairs(pairs)
        if pair[0] in colours and pair[1] in shapes and not scene.count(*pair)
    ]


def absent_pair(scene: Scene, rng: random.Random, pairs: str) -> Pair:
    """A pair that is not there, mostly one that shares something with what is."""
    pool = recombinations(scene, pairs)
    if pool and rng.random() < 0.7:
        return rng.choice(pool)
    absent = [pair for pair in allowed_pairs(pairs) if not scene.count(*pair)]
    near = [p for p in absent if scene.count(p[0]) or scene.count(None, p[1])]
    return rng.choice(near if near and rng.random() < 0.75 else absent)


# One function per task: (scene, rng, pairs that may be named, "first"/"second"/None).


def ask_count(scene, rng, pairs="training", which=None) -> Question:
    question = w.fill(w.COUNT, rng, which)
    return Question("count", question, str(len(scene.things)))


def ask_count_colour(scene, rng, pairs="training", which=None) -> Question:
    counts = [scene.count(colour) for colour in COLOURS]
    colour = _weighted(list(COLOURS), counts, rng)
    things = f"{colour} {w.noun(rng)}s"
    question = w.fill(w.COUNT, rng, which, things=things)
    return Question("count_colour", question, str(scene.count(colour)))


def ask_count_shape(scene, rng, pairs="training", which=None) -> Question:
    counts = [scene.count(None, shape) for shape in SHAPES]
    shape = _weighted(list(SHAPES), counts, rng)
    question = w.fill(w.COUNT, rng, which, things=shape + "s")
    return Question("count_shape", question, str(scene.count(None, shape)))


def ask_count_pair(scene, rng, pairs="training", which=None) -> Question:
    present = sorted({thing.pair for thing in scene.things})
    options = [absent_pair(scene, rng, pairs), *present]
    pair = _weighted(options, [scene.count(*option) for option in options], rng)
    question = w.fill(w.COUNT, rng, which, things=f"{pair[0]} {pair[1]}s")
    return Question("count_pair", question, str(scene.count(*pair)))


def _outermost(scene: Scene, rng: random.Random) -> tuple[str, Thing] | None:
    """ "leftmost" and the like, where one thing clearly is it."""
    if len(scene.things) < 2:
        return None
    by_x = scene.left_to_right()
    by_y = sorted(scene.things, key=lambda thing: thing.y)
    options = [("leftmost", by_x[0]), ("rightmost", by_x[-1])]
    if by_y[1].y - by_y[0].y >= MARGIN:
        options += [("topmost", by_y[0]), ("highest", by_y[0])]
    if by_y[-1].y - by_y[-2].y >= MARGIN:
        options += [("lowest", by_y[-1]), ("bottommost", by_y[-1])]
    return rng.choice(options)


def _one_and_only(scene: Scene, rng: random.Random) -> tuple[str, Thing] | None:
    """A phrase that names a thing by its place, or as the only one."""
    if len(scene.things) == 1:
        return w.noun(rng, shape=False), scene.things[0]
    named = _outermost(scene, rng)
    return named and (f"{named[0]} {w.noun(rng, shape=False)}", named[1])


def ask_colour(scene, rng, pairs="training", which=None) -> Question | None:
    """The colour of the one thing of a shape, sometimes of one named by place."""
    single = [shape for shape in SHAPES if scene.count(None, shape) == 1]
    named = _one_and_only(scene, rng)
    if named and (rng.random() < 0.15 or not single):
        what, thing = named
        return Question("colour", w.fill(w.COLOUR, rng, which, what=what), thing.colour)
    if not single:
        return None
    shape = rng.choice(single)
    thing = next(thing for thing in scene.things if thing.shape == shape)
    return Question("colour", w.fill(w.COLOUR, rng, which, what=shape), thing.colour)


def ask_shape(scene, rng, pairs="training", which=None) -> Question | None:
    """The shape of the one thing of a colour, sometimes of one named by place."""
    single = [colour for colour in COLOURS if scene.count(colour) == 1]
    named = _one_and_only(scene, rng)
    if named and (rng.random() < 0.15 or not single):
        what, thing = named
        return Question("shape", w.fill(w.SHAPE, rng, which, what=what), thing.shape)
    if not single:
        return None
    colour = rng.choice(single)
    thing = next(thing for thing in scene.things if thing.colour == colour)
    what = phrase(colour, None, rng)
    return Question("shape", w.fill(w.SHAPE, rng, which, what=what), thing.shape)


def ask_colour_many(scene, rng, pairs="training", which=None) -> Question | None:
    several = [shape for shape in SHAPES if scene.count(None, shape) > 1]
    if not several:
        return None
    shape = rng.choice(several)
    found = [thing.colour for thing in scene.left_to_right() if thing.shape == shape]
    question = w.fill(w.COLOURS_OF_MANY, rng, which, what=shape + "s")
    return Question("colour_many", question, w.listed(found))


def ask_shape_many(scene, rng, pairs="training", which=None) -> Question | None:
    several = [colour for colour in COLOURS if scene.count(colour) > 1]
    if not several:
        return None
    colour = rng.choice(several)
    found = [thing.shape for thing in scene.left_to_right() if thing.colour == colour]
    what = phrase(colour, None, rng, plural=True)
    question = w.fill(w.SHAPES_OF_MANY, rng, which, what=what)
    return Question("shape_many", question, w.listed(found))


def ask_colour_absent(scene, rng, pairs="training", which=None) -> Question | None:
    absent = [shape for shape in SHAPES if not scene.count(None, shape)]
    if not absent:
        return None
    shape = rng.choice(absent)
    question = w.fill(w.COLOUR, rng, which, what=shape)
    return Question("colour_absent", question, f"there is no {shape}")


def ask_shape_absent(scene, rng, pairs="training", which=None) -> Question | None:
    colour = rng.choice([c for c in COLOURS if not scene.count(c)])
    what = phrase(colour, None, rng)
    question = w.fill(w.SHAPE, rng, which, what=what)
    return Question("shape_absent", question, f"there is no {colour} thing")


def ask_position_absent(scene, rng, pairs="training", which=None) -> Question:
    what = " ".join(absent_pair(scene, rng, pairs))
    question = w.fill(w.POSITION, rng, which, what=what)
    return Question("position_absent", question, f"there is no {what}")


def ask_existence(scene, rng, pairs="training", which=None) -> Question:
    """Yes and no are equally likely, for pairs, shapes and colours alike."""
    kind, there = rng.random(), rng.random() < 0.5
    colour = shape = None
    if kind < 0.6:
        present = sorted({thing.pair for thing in scene.things})
        colour, shape = rng.choice(present) if there else absent_pair(scene, rng, pairs)
    elif kind < 0.8:
        options = [s for s in SHAPES if bool(scene.count(None, s)) == there]
        shape = rng.choice(options or SHAPES)
    else:
        options = [c for c in COLOURS if bool(scene.count(c)) == there]
        colour = rng.choice(options)
    what = phrase(colour, shape, rng)
    a_what = w.with_article(what)
    if shape is None and rng.random() < 0.4:
        a_what = rng.choice((f"anything {colour}", f"something {colour}"))
    question = w.fill(w.EXISTENCE, rng, which, a_what=a_what, whats=what + "s")
    return Question("existence", question, yes(scene.count(colour, shape) > 0))


def place_of(scene: Scene, thing: Thing) -> str | None:
    """The third of the canvas in both directions; None near a border between two."""
    names = []
    for centre, length in ((thing.y, scene.height), (thing.x, scene.width)):
        if min(abs(centre - length / 3), abs(centre - 2 * length / 3)) < BORDER:
            return None
        names.append(int(3 * centre / length))
    return POSITIONS[names[0]][names[1]]


def ask_position(scene, rng, pairs="training", which=None) -> Question | None:
    """Where a thing is, in nine words; none near a border between two of them."""
    found = []
    for thing in scene.things:
        place = place_of(scene, thing)
        what = _refer(scene, thing, rng)
        if place and what:
            found.append((what, place))
    if not found:
        return None
    what, place = rng.choice(found)
    if len(scene.things) == 1 and rng.random() < 0.15:
        what = w.noun(rng)
    return Question("position", w.fill(w.POSITION, rng, which, what=what), place)


def ask_relation(scene, rng, pairs="training", which=None) -> Question | None:
    """Whether one thing is left of, right of, above or below another: yes or no."""
    named = [(thing, _refer(scene, thing, rng)) for thing in scene.things]
    named = [(thing, what) for thing, what in named if what]
    options = []
    for a, what_a in named:
        for b, what_b in named:
            if a is b or what_a == what_b:
                continue
            if b.x - a.x >= MARGIN:
                options.append((what_a, what_b, "left", "right"))
            if b.y - a.y >= MARGIN:
                options.append((what_a, what_b, "above", "below"))
    if not options:
        return None
    a, b, holds, fails = rng.choice(options)
    if rng.random() < 0.5:  # the same fact, told from the other side
        a, b, holds, fails = b, a, fails, holds
    answer = rng.random() < 0.5
    relation = rng.choice(w.RELATION[holds if answer else fails])
    question = w.fill(w.RELATION_QUESTIONS, rng, which, a=a, b=b, relation=relation)
    return Question("relation", question, yes(answer))


def caption_of(scene: Scene) -> str:
    """ "a red circle", or all things from left to right; "nothing"."""
    if not scene.things:
        return "nothing"
    found = [w.with_article(thing.name) for thing in scene.left_to_right()]
    return (
        w.listed(found) if len(found) == 1 else f"from left to right: {w.listed(found)}"
    )


def ask_caption(scene, rng, pairs="training", which=None) -> Question:
    return Question("caption", w.fill(w.CAPTION, rng, which), caption_of(scene))
