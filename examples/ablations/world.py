"""The data of the ablations: mm1-tiny's scenes and questions, fewer of each.

`pretrain` reads this module (document, region_picture); the tests of a run come from
`questions`, `with_shots`, `naming` and `facts_asked`. The scenes are small enough to be
learned in minutes: one to three things, six colours, four shapes, six tasks. Wordings,
drawing and text-only facts are mm1-tiny's own.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from examples.mm1_tiny import asking, drawing, facts
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.pictures import bare_prompt, scene_regions
from examples.mm1_tiny.questions import Question
from mm1_mlx.training.documents import Document, Region, Text

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "triangle", "star")
PAIRS = tuple(p for p in s.TRAINING_PAIRS if p[0] in COLOURS and p[1] in SHAPES)
TASKS = ("count", "colour", "shape", "existence", "position", "caption")
# Radius, as a part of the picture: the small ones are 10 of 48 pixels across.
SMALLEST, LARGEST = 0.1, 0.24
MOST_THINGS = 3
MOST_SHOTS = 3
NAMES = ("colour", "shape", "pair")  # what a naming document may name
_USER, _ASSISTANT, _IMAGE = "<user>", "<assistant>", "<image>"


@dataclass
class Asked:
    """A test question and its answer; without `<image>` marks pictures come first."""

    prompt: Any  # text, or messages where there are shots
    images: list[Any]
    answer: str
    task: str


# --- training ------------------------------------------------------------------------


def scene(rng: random.Random, most: int = MOST_THINGS) -> s.Scene:
    """One to `most` things of PAIRS."""
    number = rng.randint(1, most)
    pairs = s.sample_pairs(rng, number, PAIRS)
    return s.arrange(pairs, rng, smallest=SMALLEST, largest=LARGEST)


def draw(found: s.Scene, rng: random.Random) -> Any:
    """The scene as a picture of 96 pixels or a little more: no resolution lacks any."""
    return drawing.draw(found, rng, longer=rng.randint(96, 128))


def question_about(found: s.Scene, task: str, rng: random.Random) -> Question | None:
    """A question of a task, None where the scene allows none."""
    return asking.ASKERS[task](found, rng, "training", None)


def scene_for(task: str, rng: random.Random) -> tuple[s.Scene, Question]:
    """A scene that allows a question of this task, and the question."""
    while True:
        found = scene(rng)
        if question := question_about(found, task, rng):
            return found, question


def region_picture(
    rng: random.Random, progress: float = 1.0
) -> tuple[Any, list[Region]]:
    """A picture for the encoder's stage and what stands where in it."""
    found = scene(rng)
    return draw(found, rng), scene_regions(found, rng)


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One training document.

    kind: "caption" (one picture and questions about it), "interleaved" (two to four
        pictures with text after each) or "text" (facts without pictures).
    """
    makers = {"caption": _caption, "interleaved": _interleaved, "text": _text}
    if kind not in makers:
        raise ValueError(f"kind is {kind!r}; use one of {', '.join(makers)}.")
    return makers[kind](rng)


def _answered(question: Question) -> list[Text]:
    return [Text(question.question + _ASSISTANT), Text(question.answer, True)]


def _caption(rng: random.Random) -> Document:
    found = scene(rng)
    asked = [question_about(found, task, rng) for task in TASKS]
    branches = [_answered(question) for question in asked if question]
    rng.shuffle(branches)
    return Document(
        kind="caption",
        images=[draw(found, rng)],
        context=[Text(_USER + _IMAGE)],
        branches=branches,
    )


def _interleaved(rng: random.Random) -> Document:
    """Pictures one after the other: half with questions, half named by a pattern.

    As on a web page, all text is learned, but the first name of a pattern, which
    nothing before it decides.
    """
    number = rng.randint(2, MOST_SHOTS + 1)
    if rng.random() < 0.5:
        task = rng.choice(TASKS)
        shots = [scene_for(task, rng) for _ in range(number)]
        scenes, pieces = [found for found, _ in shots], []
        for _, question in shots:
            turn, answer = _answered(question)
            pieces += [Text(_USER + _IMAGE + turn.text), answer]
    else:
        named = rng.choice(NAMES)
        scenes = [scene(rng, most=1) for _ in range(number)]
        pieces = _pattern([name_of(found, named) for found in scenes])
    return Document(
        kind="interleaved",
        images=[draw(found, rng) for found in scenes],
        context=pieces[:-1],
        branches=[pieces[-1:]],
    )


def _pattern(names: list[str]) -> list[Text]:
    """ "<image> red\\n<image> blue\\n<image>" and the answer; as bare_prompt."""
    pieces = []
    for i, name in enumerate(names[:-1]):
        pieces.append(Text(("\n" if i else _USER) + _IMAGE))
        pieces.append(Text(" " + name, i > 0))
    return [*pieces, Text("\n" + _IMAGE + _ASSISTANT), Text(names[-1], True)]


def name_of(found: s.Scene, named: str) -> str:
    """What a pattern says about a scene of one thing."""
    thing = found.things[0]
    return {"colour": thing.colour, "shape": thing.shape, "pair": thing.name}[named]


def _text(rng: random.Random) -> Document:
    asked = dict(facts.text_only(rng) for _ in range(rng.randint(3, 8)))
    branches = [[Text(x + _ASSISTANT), Text(a, True)] for x, a in asked.items()]
    return Document("text", [], [Text(_USER)], branches)


@cache
def digest() -> str:
    """What tells these data from others: of some documents of every kind, encoder
    pictures and test questions, texts and pixels both."""
    found = hashlib.sha256()

    def add(images: list[Any], *said: Any) -> None:
        found.update(repr(said).encode())
        for image in images:
            found.update(repr(image.size).encode() + image.tobytes())

    rng = random.Random("ablations/digest")
    for kind in ("caption", "interleaved", "text"):
        for _ in range(12):
            made = document(rng, kind)
            add(made.images, made.context, made.branches)
    for _ in range(6):
        image, regions = region_picture(rng)
        add([image], regions)
    for asked in (
        *questions(4), *with_shots(2, MOST_SHOTS), *naming(3, MOST_SHOTS),
        *naming(3, 0), *facts_asked(30),
    ):  # fmt: skip
        add(asked.images, asked.prompt, asked.answer, asked.task)
    return found.hexdigest()[:16]


# --- tests ---------------------------------------------------------------------------


def _test_rng(name: str) -> random.Random:
    """Seeds that no training step has; the same questions for every run."""
    return random.Random(f"ablations/test/{name}")


def questions(each: int) -> list[Asked]:
    """`each` questions of every task, a picture each."""
    rng, found = _test_rng("questions"), []
    for task in TASKS:
        for _ in range(each):
            place, question = scene_for(task, rng)
            image = draw(place, rng)
            found.append(Asked(question.question, [image], question.answer, task))
    return found


def with_shots(each: int, shots: int) -> list[Asked]:
    """`each` questions of every task after `shots` answered ones of the same task."""
    rng, found = _test_rng("shots"), []
    for task in TASKS:
        for _ in range(each):
            shown = [scene_for(task, rng) for _ in range(MOST_SHOTS + 1)]
            images = [draw(place, rng) for place, _ in shown]
            first = MOST_SHOTS - shots  # fewer shots, the same last question
            turns = []
            for _, question in shown[first:]:
                turns.append({"role": "user", "content": _IMAGE + question.question})
                turns.append({"role": "assistant", "content": question.answer})
            answer = shown[-1][1].answer
            found.append(Asked(turns[:-1], images[first:], answer, task))
    return found


def naming(number: int, shots: int) -> list[Asked]:
    """Pictures of one thing; only the `shots` before tell what is to be named."""
    rng, found = _test_rng("naming"), []
    for i in range(number):
        named = NAMES[i % len(NAMES)]
        scenes = [scene(rng, most=1) for _ in range(MOST_SHOTS + 1)]
        images = [draw(place, rng) for place in scenes]
        answers = [name_of(place, named) for place in scenes]
        first = MOST_SHOTS - shots
        prompt = bare_prompt(answers[first:-1])
        found.append(Asked(prompt, images[first:], answers[-1], named))
    return found


def facts_asked(number: int) -> list[Asked]:
    """Questions without pictures: what MM1 calls TextCore is text like this."""
    rng, found = _test_rng("facts"), []
    for _ in range(number):
        question, answer = facts.text_only(rng)
        found.append(Asked(question, [], answer, "facts"))
    return found
