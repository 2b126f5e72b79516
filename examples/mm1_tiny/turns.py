"""Conversations in which a question needs the turn before it."""

import random

from examples.mm1_tiny import boxes
from examples.mm1_tiny import questions as q
from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.questions import Question
from examples.mm1_tiny.scenes import COLOURS, SHAPES, Scene, Thing

_IT = {
    "colour": ("What colour is it?", "And its colour?", "Which colour does it have?"),
    "shape": ("What shape is it?", "And its shape?", "Which shape does it have?"),
    "position": ("Where is it?", "And where is it?", "In which part is it?"),
    "box": ("Give its box.", "What is its box?", "Find it."),
}
_ABOUT = ("What about the {what}?", "And the {what}?", "And of the {what}?")
_COUNTS = ("And {things}?", "How about {things}?", "And how many {things}?")


def _about(scene: Scene, thing: Thing, kind: str) -> str | None:
    """What there is to say of a thing; None where its place is not clear."""
    if kind == "position":
        return q.place_of(scene, thing)
    if kind == "box":
        return boxes.box_text(scene, thing)
    return thing.colour if kind == "colour" else thing.shape


def _start(scene: Scene, rng: random.Random) -> tuple[Thing, str, str, Question] | None:
    """A thing, its name, what was asked of it first, and that question."""
    things = [(t, q.references(scene, t)) for t in scene.things]
    things = [(t, ways) for t, ways in things if ways]
    if not things:
        return None
    thing, ways = rng.choice(things)
    colour, shape = rng.choice(ways)
    word = shape or w.noun(rng, shape=False)
    what = f"{colour} {word}" if colour else word
    known = {"colour": colour, "shape": shape}
    kinds = [kind for kind in _IT if known.get(kind) is None]
    kind = rng.choice([k for k in kinds if _about(scene, thing, k)])
    templates = {
        "colour": w.COLOUR,
        "shape": w.SHAPE,
        "position": w.POSITION,
        "box": boxes.BOX,
    }[kind]
    text = w.fill(templates, rng, what=what)
    found = _about(scene, thing, kind)
    assert found is not None
    return thing, what, kind, Question(kind, text, found)


def talk(scene: Scene, rng: random.Random) -> list[Question]:
    """Two to four turns: each after the first says "it" or leaves out what is meant.

    An empty list where nothing in the scene can be named alone.
    """
    if rng.random() < 0.3:
        return _counting(scene, rng)
    if (start := _start(scene, rng)) is None:
        return []
    thing, what, kind, first = start
    turns = [first]
    asked = {kind}
    for _ in range(rng.randint(1, 3)):
        others = [t for t in scene.things if t is not thing]
        next_one = _next_thing(scene, others, kind, what, rng) if others else None
        if next_one and rng.random() < 0.45:
            thing, what, question = next_one
            turns.append(question)
            asked = {kind}
            continue
        kinds = [k for k in _IT if k not in asked and k not in _named(what)]
        kinds = [k for k in kinds if _about(scene, thing, k)]
        if not kinds:
            break
        kind = rng.choice(kinds)
        asked.add(kind)
        answer = _about(scene, thing, kind)
        assert answer is not None
        turns.append(Question(kind, w.voiced(rng.choice(_IT[kind]), rng), answer))
    return turns if len(turns) > 1 else []


def _named(what: str) -> set[str]:
    """What a phrase itself says."""
    words = what.split()
    found = {"colour"} if any(word in COLOURS for word in words) else set()
    return found | ({"shape"} if any(word in SHAPES for word in words) else set())


def _next_thing(
    scene: Scene, others: list[Thing], kind: str, what: str, rng: random.Random
) -> tuple[Thing, str, Question] | None:
    """The same question of another thing: "And the star?"."""
    thing = rng.choice(others)
    ways = q.references(scene, thing)
    if kind in ("colour", "shape"):  # the phrase must not answer
        ways = [way for way in ways if way[kind == "shape"] is None]
    answer = _about(scene, thing, kind)
    if not ways or not answer:
        return None
    colour, shape = rng.choice(ways)
    word = shape or w.noun(rng, shape=False)
    what = f"{colour} {word}" if colour else word
    text = w.voiced(rng.choice(_ABOUT).format(what=what), rng)
    return thing, what, Question(kind, text, answer)


def _counting(scene: Scene, rng: random.Random) -> list[Question]:
    """ "How many red things are there?" "And blue ones?"."""
    colours = rng.random() < 0.5
    names = COLOURS if colours else SHAPES
    there = [n for n in names if _count(scene, n, colours)]
    number = rng.randint(2, 4)
    chosen = [
        rng.choice(there if rng.random() < 0.65 else names) for _ in range(number)
    ]
    chosen = list(dict.fromkeys(chosen))
    if len(chosen) < 2:
        return []
    first = f"{chosen[0]} {w.noun(rng)}s" if colours else chosen[0] + "s"
    turns = [w.fill(w.COUNT, rng, things=first)]
    for name in chosen[1:]:
        things = f"{name} ones" if colours else name + "s"
        turns.append(w.voiced(rng.choice(_COUNTS).format(things=things), rng))
    return [
        Question("count", text, str(_count(scene, name, colours)))
        for text, name in zip(turns, chosen, strict=True)
    ]


def _count(scene: Scene, name: str, colours: bool) -> int:
    return scene.count(name) if colours else scene.count(None, name)
