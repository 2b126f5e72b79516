"""Scenes: one to four coloured shapes, placed freely and without overlap.

All lengths are fractions of the longer side of the canvas. The model pads a picture to
a square, so this is its own unit, and no shape is ever distorted.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

COLOURS = (
    "red", "green", "blue", "yellow", "purple", "orange", "black", "white", "grey",
    "pink", "brown",
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "ring")
ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# Never drawn or named in training; each colour and shape is common in other pairs.
HELD_OUT_PAIRS = (("green", "star"), ("yellow", "triangle"), ("purple", "square"))
TRAINING_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)

SMALLEST = 0.09  # radius; 17 of the model's 96 pixels across
SMALLEST_TRAINED = 0.04  # 8 pixels: training goes below what most tests ask
GAP = 0.015  # between bounding circles, and to the edge
MIN_STEP = 0.05  # between the x of any two centres: left to right is always defined
# The largest radius by number of things.
_LARGEST = {0: 0.0, 1: 0.42, 2: 0.30, 3: 0.26, 4: 0.23, 5: 0.19, 6: 0.17}

OUTLINED = ("square", "triangle", "star", "heart")  # what is drawn without a filling
RING_HOLE = 0.55  # radius of a ring's hole over that of the ring

Pair = tuple[str, str]
Points = list[tuple[float, float]]


def _fitted(points: Points) -> Points:
    """Points moved and scaled so that their box is centred and their radius is 1."""
    xs, ys = zip(*points, strict=True)
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    reach = max(math.hypot(px - x, py - y) for px, py in points)
    return [((px - x) / reach, (py - y) / reach) for px, py in points]


def _arc(start: float, stop: float, count: int, radius: float = 1.0) -> Points:
    """Points on a circle around 0; degrees clockwise from the top, both ends in."""
    steps = [start + (stop - start) * i / (count - 1) for i in range(count)]
    return [
        (radius * math.sin(math.radians(a)), -radius * math.cos(math.radians(a)))
        for a in steps
    ]


def _heart() -> Points:
    """Its tip down."""
    turns = [2 * math.pi * i / 32 for i in range(32)]
    return _fitted(
        [
            (
                16 * math.sin(t) ** 3,
                -13 * math.cos(t)
                + 5 * math.cos(2 * t)
                + 2 * math.cos(3 * t)
                + math.cos(4 * t),
            )
            for t in turns
        ]
    )


def _moon() -> Points:
    """A crescent, its horns to the right: a disk less a smaller one beside it."""
    bite, aside = 0.8, 0.45
    horn = math.acos((1 + aside**2 - bite**2) / (2 * aside))  # from the right
    inner = math.atan2(math.sin(horn), math.cos(horn) - aside)
    outside = _arc(90 + math.degrees(horn), 450 - math.degrees(horn), 24)
    hollow = _arc(450 - math.degrees(inner), 90 + math.degrees(inner), 16, bite)
    return _fitted(outside + [(x + aside, y) for x, y in hollow])


def _ring() -> Points:
    """Around the outside, across, and back around the hole."""
    return _arc(0, 360, 33) + _arc(360, 0, 33, RING_HOLE)


def _regular(corners: int) -> Points:
    return [_arc(0, 360, corners + 1)[i] for i in range(corners)]


def _block(*points: tuple[float, float]) -> Points:
    """Left half of an upright figure, from the top; mirrored."""
    return _fitted([*points, *((-x, y) for x, y in reversed(points))])


_CURVED = {"heart": _heart(), "moon": _moon(), "ring": _ring()}
# Drawn only where no question names a shape; see unnamed.py.
_UNNAMED = {
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "half": _fitted(_arc(-90, 90, 20)),
    "oval": _fitted([(x, 0.55 * y) for x, y in _arc(0, 348, 30)]),
    "bar": _block((-1, -0.35), (-1, 0.35)),
    "arrow": _block((0, -1), (-0.8, -0.1), (-0.3, -0.1), (-0.3, 1)),
    "cross": _block(
        (-0.3, -1), (-0.3, -0.3), (-1, -0.3), (-1, 0.3), (-0.3, 0.3), (-0.3, 1)
    ),
    "tee": _block((-1, -1), (-1, -0.4), (-0.3, -0.4), (-0.3, 1)),
}
UNNAMED_SHAPES = tuple(_UNNAMED)
_OUTLINES = _CURVED | _UNNAMED


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    colour: one of COLOURS, or "#rrggbb" where no question names it.
    shape: one of SHAPES, or of UNNAMED_SHAPES.
    x, y: the centre of its bounding circle, from the top left.
    radius: of the bounding circle, which passes through the corners.
    angle: degrees, clockwise as seen; at 0 a square lies flat, a triangle or star
        points up, a heart's tip is down and a moon's horns point right.
    """

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float = 0.0

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def corners(self, inner: float = 0.42) -> list[tuple[float, float]]:
        """Points (x, y) of the polygon that it is; empty for a circle.

        inner: the radius of a star's inner corners over that of its outer ones.
        """
        if self.shape in _OUTLINES:
            a = math.radians(self.angle)
            sin, cos = self.radius * math.sin(a), self.radius * math.cos(a)
            return [
                (self.x + px * cos - py * sin, self.y + px * sin + py * cos)
                for px, py in _OUTLINES[self.shape]
            ]
        steps = {"circle": [], "square": [45, 135, 225, 315], "triangle": [0, 120, 240]}
        if self.shape == "star":
            turns = [(36 * i, inner if i % 2 else 1.0) for i in range(10)]
        else:
            turns = [(step, 1.0) for step in steps[self.shape]]
        points = []
        for turn, length in turns:
            a = math.radians(self.angle + turn)
            reach = self.radius * length
            points.append((self.x + reach * math.sin(a), self.y - reach * math.cos(a)))
        return points

    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in the scene's unit."""
        if self.shape in ("circle", "ring"):
            r = self.radius
            return self.x - r, self.y - r, self.x + r, self.y + r
        xs, ys = zip(*self.corners(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Scene:
    """Things on a canvas; the longer of width and height is 1."""

    things: tuple[Thing, ...]
    width: float = 1.0
    height: float = 1.0

    def left_to_right(self) -> tuple[Thing, ...]:
        return tuple(sorted(self.things, key=lambda thing: thing.x))

    def count(self, colour: str | None = None, shape: str | None = None) -> int:
        """How many things have this colour and this shape; None stands for any."""
        return sum(
            (colour is None or thing.colour == colour)
            and (shape is None or thing.shape == shape)
            for thing in self.things
        )


def allowed_pairs(pairs: str) -> tuple[Pair, ...]:
    """The (colour, shape) pairs of "training", "held_out" or "all"."""
    sets = {
        "training": TRAINING_PAIRS,
        "held_out": HELD_OUT_PAIRS,
        "all": ALL_PAIRS,
    }
    return sets[pairs]


def sample_pairs(
    rng: random.Random, number: int, pool: Sequence[Pair] = TRAINING_PAIRS
) -> list[Pair]:
    """The colours and shapes of a scene, with many repeats, so that counts matter."""
    style = rng.random()
    colour, shape = rng.choice(pool)
    if style < 0.16:
        pool = [pair for pair in pool if pair[0] == colour]
    elif style < 0.32:
        pool = [pair for pair in pool if pair[1] == shape]
    elif style < 0.50:
        other = rng.choice(pool)
        pool = [(colour, shape), other]
    elif style < 0.66:  # two colours by two shapes: only the binding tells them apart
        other = rng.choice(pool)
        pool = [p for p in pool if p[0] in (colour, other[0])]
        pool = [p for p in pool if p[1] in (shape, other[1])]
    elif style < 0.71:
        pool = [(colour, shape)]
    return [rng.choice(pool) for _ in range(number)]


def sample_canvas(rng: random.Random) -> tuple[float, float]:
    """(width, height): 60% square, else between 2:1 and 1:2."""
    if rng.random() < 0.6:
        return 1.0, 1.0
    short = rng.choice((0.75, 2 / 3, 0.5625)) if rng.random() < 0.4 else None
    short = short or rng.uniform(0.5, 1.0)
    return (1.0, short) if rng.random() < 0.6 else (short, 1.0)


def arrange(
    pairs: Sequence[Pair],
    rng: random.Random,
    *,
    smallest: float = SMALLEST,
    largest: float = 1.0,
    apart: float = 1.0,
) -> Scene:
    """A scene with these colours and shapes at free places, sizes and angles.

    smallest, largest: the radius; what does not fit becomes smaller. apart: the least
    distance of two centres as a share of their radii; below 1 they may overlap.
    """
    width, height = sample_canvas(rng)
    sizes = smallest, largest
    # Retries keep the canvas: else narrow ones, where less fits, would be rare.
    while (places := _places(len(pairs), width, height, sizes, rng, apart)) is None:
        fits = sizes[0] >= SMALLEST and len(pairs) <= 4  # six may not, in a narrow one
        least = SMALLEST if fits else SMALLEST_TRAINED / 2
        sizes = max(least, sizes[0] * 0.9), sizes[1]
    things = []
    for (colour, shape), (x, y, radius) in zip(pairs, places, strict=True):
        angle = 0.0 if rng.random() < 0.35 else rng.uniform(0, 360)
        things.append(Thing(colour, shape, x, y, radius, angle))
    rng.shuffle(things)
    return Scene(tuple(things), width, height)


def _places(
    number: int,
    width: float,
    height: float,
    sizes: tuple[float, float],
    rng: random.Random,
    apart: float,
) -> list[tuple[float, float, float]] | None:
    """(x, y, radius) of each thing, or None when they did not fit."""
    smallest = sizes[0]
    largest = min(_LARGEST[number], min(width, height) / 2 - 2 * GAP, sizes[1])
    radii = [rng.uniform(smallest, max(largest, smallest)) for _ in range(number)]
    places: list[tuple[float, float, float]] = []
    for radius in sorted(radii, reverse=True):  # the large ones first: easier to fit
        edge = radius + GAP
        for _ in range(40):
            x = rng.uniform(edge, width - edge)
            y = rng.uniform(edge, height - edge)
            if all(
                abs(x - px) >= MIN_STEP
                and (x - px) ** 2 + (y - py) ** 2 >= (apart * (radius + pr) + GAP) ** 2
                for px, py, pr in places
            ):
                places.append((x, y, radius))
                break
        else:
            return None
    rng.shuffle(places)
    return places


def sample_scene(
    rng: random.Random,
    *,
    min_things: int = 1,
    max_things: int = 4,
    pairs: str = "training",
    smallest: float = SMALLEST,
) -> Scene:
    """A random scene.

    pairs: "training" never has one of HELD_OUT_PAIRS, "held_out" has at least one of
        them, "all" draws from every pair.
    smallest: the smallest radius; the curriculum starts with larger things.
    """
    number = rng.randint(min_things, max_things)
    if pairs == "held_out":
        chosen = sample_pairs(rng, number, ALL_PAIRS)
        if not any(pair in HELD_OUT_PAIRS for pair in chosen):
            chosen[rng.randrange(number)] = rng.choice(HELD_OUT_PAIRS)
    else:
        chosen = sample_pairs(rng, number, allowed_pairs(pairs))
    return arrange(chosen, rng, smallest=smallest)


def sample_overlapping(
    rng: random.Random, *, max_things: int = 4, smallest: float = SMALLEST
) -> Scene:
    """Two or more things, of which some lie partly over others of another colour.

    The smaller ones are drawn last, so that none is hidden.
    """
    while True:
        chosen = sample_pairs(rng, rng.randint(2, max_things))
        scene = arrange(chosen, rng, smallest=max(smallest, 0.1), apart=0.68)
        touching = [
            (a, b)
            for a, b in combinations(scene.things, 2)
            if math.hypot(a.x - b.x, a.y - b.y) < 0.8 * (a.radius + b.radius)
        ]
        if touching and all(a.colour != b.colour for a, b in touching):
            things = sorted(scene.things, key=lambda thing: -thing.radius)
            return replace(scene, things=tuple(things))


def sample_outlined(
    rng: random.Random, *, max_things: int = 4, smallest: float = SMALLEST
) -> Scene:
    """Things whose shape is known without a filling: an empty circle is a ring."""
    pool = [pair for pair in TRAINING_PAIRS if pair[1] in OUTLINED]
    chosen = sample_pairs(rng, rng.randint(1, max_things), pool)
    return arrange(chosen, rng, smallest=max(smallest, 0.12))


def sample_two_scenes(
    rng: random.Random,
    *,
    max_things: int = 4,
    pairs: str = "training",
    smallest: float = SMALLEST,
) -> tuple[Scene, Scene]:
    """Two scenes that share enough for a comparison to need a look at both."""
    style = rng.random()
    pool = allowed_pairs(pairs)
    if style < 0.22:  # one thing each; the same colour or shape half of the time
        first = rng.choice(pool)
        same_colour, same_shape = rng.random() < 0.5, rng.random() < 0.5
        near = [
            pair
            for pair in pool
            if (pair[0] == first[0]) == same_colour
            and (pair[1] == first[1]) == same_shape
        ]
        chosen = [first], [rng.choice(near or pool)]
    elif style < 0.5:
        chosen = (
            sample_pairs(rng, rng.randint(1, max_things), pool),
            sample_pairs(rng, rng.randint(1, max_things), pool),
        )
    else:  # the second keeps some of the first
        before = sample_pairs(rng, rng.randint(1, max_things), pool)
        number = rng.randint(1, max_things)
        kept = rng.sample(before, rng.randint(0, min(len(before), number)))
        fresh = sample_pairs(rng, number - len(kept), [*pool, *before * 4])
        chosen = before, kept + fresh
        if rng.random() < 0.5:
            chosen = chosen[1], chosen[0]
    first_scene = arrange(chosen[0], rng, smallest=smallest)
    return first_scene, arrange(chosen[1], rng, smallest=smallest)
