"""Training documents of many pictures or tiles: new names, steps, small things."""

import random
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from examples.mm1_tiny import drawing, naming, reasoning, small
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.pictures import (
    BARE_TASKS,
    Picture,
    bare_shot,
    choose,
    difficulty,
    scene_regions,
)
from mm1_mlx.training.documents import Document, Region, Text
from mm1_mlx.training.encoder_stage import box_weights

LONG_MIX = {
    "naming": 0.36, "tiles": 0.38, "numbered": 0.08, "steps": 0.13, "shots": 0.05
}  # fmt: skip
GLANCES = 0.6  # share of naming documents that read a few tokens of each picture
SIDE = 8  # image tokens of a picture are SIDE x SIDE
NUMBERED = 0.4  # share of "many": numbered pictures
POOL = 28  # pictures of single things that the documents of a batch share
FEW = 5  # pictures or tiles of a "long" document: what a row of 384 tokens holds
MOST_PICTURES = 16  # MM1: up to 16 pictures in a sequence
_USER, _ASSISTANT, _IMAGE = "<user>", "<assistant>", "<image>"
_pools: WeakKeyDictionary[random.Random, list[naming.Shown]] = WeakKeyDictionary()


def pool(rng: random.Random, progress: float) -> list[naming.Shown]:
    """Pictures of one thing each, the same ones for a whole batch.

    A batch has a generator of its own, so it decides them. What a document calls them
    is its own affair; the encoder reads each once.
    """
    if rng not in _pools:
        # Large: what is new here is the name, not the seeing.
        smallest = max(0.12, difficulty(progress)["smallest"])
        settings = {"max_things": 1, "smallest": smallest}
        made = []
        for _ in range(POOL):
            scene = s.sample_scene(rng, **settings)
            picture = drawing.draw(scene, rng)
            made.append((scene.things[0], picture, scene_regions(scene, rng)))
        _pools[rng] = made
    return _pools[rng]


def document(
    rng: random.Random,
    kind: str,
    progress: float,
    mix: dict[str, float] = LONG_MIX,
    numbered: float = NUMBERED,
) -> Document:
    """kind: "long", of two to five pictures or tiles, or "many", of up to sixteen.

    numbered: how many of "many" are numbered pictures.
    """
    makers = {
        "naming": _naming,
        "tiles": _tiles,
        "numbered": _glanced_at,
        "steps": _steps,
        "shots": _shots,
    }
    if kind == "many" and rng.random() < numbered:
        return _numbered(rng, progress, MOST_PICTURES)
    most = FEW if kind == "long" else MOST_PICTURES
    return makers[choose(mix, rng)](rng, progress, most)


def _document(
    images: list[Any],
    regions: list[list[Region]],
    pieces: list[Text],
    task: str,
) -> Document:
    """A document whose last piece is its only branch."""
    kind = "long" if len(images) <= FEW else "many"
    return Document(kind, images, pieces[:-1], [pieces[-1:]], [task], regions)


def _naming(rng: random.Random, progress: float, most: int) -> Document:
    least = 3 if most == FEW else FEW + 1
    return naming_document(rng, progress, least, most, GLANCES)


def naming_document(
    rng: random.Random,
    progress: float,
    least: int,
    most: int,
    glances: float,
    tokens: Sequence[int] = (12,),
    again: float = 0.0,
) -> Document:
    """Pictures that new words name; glances: how often only a few tokens of each, as
    many of its thing as one of `tokens` says."""
    shown, text = naming.named_pictures(pool(rng, progress), rng, least, most, again)
    images, regions = [x[1] for x in shown], [x[2] for x in shown]
    document = _document(images, regions, text, "naming")
    if rng.random() < glances:
        number = rng.choice(tokens)
        seen = {
            id(image): glance(image, own, rng, number)
            for image, own in zip(images, regions, strict=True)
        }
        document.kept = [seen[id(image)] for image in images]
    return document


def glance(
    image: Any, regions: list[Region], rng: random.Random, tokens: int = 12
) -> list[int]:
    """Some of a picture's tokens, a quarter or as many as asked.

    tokens: of its thing; a third as many are from anywhere, but none of three or less:
    a name then follows a token of its thing, as it would follow a word.
    """
    on = box_weights(regions[0].box, *image.size, SIDE)
    inside = [i for i, weight in enumerate(on) if weight > 0]
    inside.sort(key=lambda i: on[i] * rng.random(), reverse=True)  # not its rim alone
    found = set(inside[:tokens])
    found |= set(rng.sample(range(SIDE * SIDE), tokens // 3 if tokens > 3 else 0))
    return sorted(found)


def _shots(rng: random.Random, progress: float, most: int) -> Document:
    """What the lines before name: a colour, a shape, a count, a number, a word."""
    task = rng.choice(BARE_TASKS)
    number = rng.randint(2, FEW if most == FEW else 10)
    shots = [bare_shot(task, rng, progress) for _ in range(number)]
    answers = [shot.questions[0].answer for shot in shots]
    form = rng.choice(("lines", "plain", "turns"))
    known = [i > 0 for i in range(len(shots))]
    pieces = naming.pieces(answers, known, rng, form)
    images, regions = [x.image for x in shots], [x.regions for x in shots]
    return _document(images, regions, pieces, "few_shot_bare")


def _steps(rng: random.Random, progress: float, most: int) -> Document:
    """Two-step questions in turns, all answered in steps or all at once."""
    in_steps = rng.random() < 0.6
    told = f" {reasoning.STEP_BY_STEP}" if rng.random() < 0.25 else ""
    pictures: list[Picture] = []
    pieces = []
    for _ in range(rng.randint(2, 3 if most == FEW else 9)):
        scene = s.sample_scene(rng, min_things=2, **difficulty(progress))
        asked = reasoning.two_steps(scene, rng)
        image = drawing.draw(scene, rng)
        pictures.append(Picture(image, scene_regions(scene, rng)))
        question = asked.question + (told if in_steps else "")
        pieces.append(Text(f"{_USER}{_IMAGE}{question}{_ASSISTANT}"))
        pieces.append(Text(asked.reasoned if in_steps else asked.answer, True))
    images, regions = [x.image for x in pictures], [x.regions for x in pictures]
    return _document(images, regions, pieces, "worth_shots")


def _tiles(rng: random.Random, progress: float, most: int) -> Document:
    """A large picture of small things, as the model reads it in tiles."""
    image, asked = small.small_picture(rng)
    tiles, marks = small.as_pieces(image, 4 if most == FEW else 9)
    branches = [[Text(x.question + _ASSISTANT), Text(x.answer, True)] for x in asked]
    tasks = [f"{x.task}_small" for x in asked]
    regions: list[list[Region]] = [[] for _ in tiles]
    kind = "long" if len(tiles) <= FEW else "many"
    return Document(kind, tiles, [Text(_USER + marks)], branches, tasks, regions)


# --- many pictures -------------------------------------------------------------------

_WHICH_OF_MANY = (
    "Which picture shows {a_what}?",
    "Which picture has {a_what}?",
    "In which picture is {a_what}?",
    "Where is {a_what}? Give the number of the picture.",
)
_HOW_MANY = (
    "How many pictures show {a_what}?",
    "How many pictures have {a_what}?",
    "In how many pictures is {a_what}?",
)
_WHAT_IN = (
    "What is in picture {n}?",
    "What does picture {n} show?",
    "Describe picture {n}.",
)


def _glanced_at(rng: random.Random, progress: float, most: int) -> Document:
    """Numbered pictures, a quarter of the tokens of each: twice as many have room.

    In half of the documents words stand in the place of some pictures.
    """
    words = rng.random() if rng.random() < 0.5 else 0.0
    document = _numbered(rng, progress, min(2 * most, MOST_PICTURES), 2, words)
    pairs = zip(document.images, document.regions, strict=True)
    document.kept = [glance(image, own, rng) for image, own in pairs]
    return document


def _numbered(
    rng: random.Random, progress: float, most: int, least: int = 5, words: float = 0.0
) -> Document:
    """Numbered pictures of single things, and questions about them.

    words: how often what a picture shows is written in its place.
    """
    shown = rng.sample(pool(rng, progress), rng.randint(least, most))
    told = [rng.random() < words for _ in shown]
    start, branches = _lines([t[0] for t in shown], told, rng)
    drawn = [each for each, instead in zip(shown, told, strict=True) if not instead]
    return Document(
        kind="many",
        images=[x[1] for x in drawn],
        context=[Text(start)],
        branches=branches,
        tasks=["of_many"] * len(branches),
        regions=[x[2] for x in drawn],
    )


def numbered_in_words(rng: random.Random) -> Document:
    """Numbered pictures of which there are words only."""
    number = rng.randint(2, MOST_PICTURES)
    things = [s.sample_scene(rng, max_things=1).things[0] for _ in range(number)]
    start, branches = _lines(things, [True] * number, rng)
    tasks = ["of_many_told"] * len(branches)
    return Document("text", [], [Text(start)], branches, tasks)


def _lines(
    things: list[s.Thing], told: list[bool], rng: random.Random
) -> tuple[str, list[list[Text]]]:
    """ "Picture 1: ..." line by line, and questions with their answers."""
    gap = rng.choice((" ", "\n"))
    lines = [
        f"Picture {i}: {w.with_article(thing.name) if instead else _IMAGE}"
        for i, (thing, instead) in enumerate(zip(things, told, strict=True), 1)
    ]
    asked = [x for _ in range(10) if (x := about_many(things, rng))]
    space = " " if gap == " " else ""
    branches = [
        [Text(space + question + _ASSISTANT), Text(answer, True)]
        for question, answer in dict(asked).items()
    ]
    return _USER + gap.join(lines) + gap.rstrip(" "), branches


def about_many(things: list[s.Thing], rng: random.Random) -> tuple[str, str] | None:
    """A question about numbered pictures of one thing each, and its answer."""
    thing = rng.choice(things)
    place = rng.randrange(3)
    colour, shape = ((thing.colour, None), (None, thing.shape), thing.pair)[place]
    word = shape or w.noun(rng, shape=False)
    a_what = w.with_article(f"{colour} {word}" if colour else word)
    fits = [
        i
        for i, each in enumerate(things, 1)
        if colour in (None, each.colour) and shape in (None, each.shape)
    ]
    kind = rng.random()
    if kind < 0.4:
        n = rng.randint(1, len(things))
        text = w.voiced(rng.choice(_WHAT_IN).format(n=n), rng)
        return text, w.with_article(things[n - 1].name)
    if kind < 0.75:
        if len(fits) > 1:
            return None
        text = rng.choice(_WHICH_OF_MANY).format(a_what=a_what)
        return w.voiced(text, rng), str(fits[0])
    text = rng.choice(_HOW_MANY).format(a_what=a_what)
    return w.voiced(text, rng), str(len(fits))
