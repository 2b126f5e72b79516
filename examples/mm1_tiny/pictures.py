"""Pictures of mm1-tiny with their regions and questions: scenes, glyphs, unknown."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from examples.mm1_tiny import asking, drawing, glyphs, photos, reasoning, unnamed
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.questions import Question
from mm1_mlx.training.documents import Region

# What single pictures show, in caption documents and in the encoder stage. With 0.13 of
# each, the encoder knew 97% of the shapes but 44% of the digits and 34% of the letters.
CAPTION_MIX = {
    "scene": 0.42, "boxes": 0.1, "steps": 0.1, "unnamed": 0.12, "digits": 0.07,
    "word": 0.14, "unknown": 0.05
}  # fmt: skip
ENCODER_MIX = {
    "scene": 0.26, "unnamed": 0.16, "digits": 0.18, "word": 0.34, "unknown": 0.06
}  # fmt: skip
BARE_TASKS = ("colour", "shape", "pair", "count", "digits", "words")
IMAGE_MARK = "<image>"
EMPTY, CROWDED = 0.02, 0.12  # shares of the scenes with nothing, with five or six
BOXES = ("box", "box", "box", "box", "at", "at", "point", "grounded")
SEVERAL = ("colour_many", "colour_many", "shape_many", "shape_many", "count",
           "count_colour", "count_shape", "count_pair", "caption")  # fmt: skip


@dataclass
class Picture:
    """A picture, what stands where in it, and questions about it."""

    image: Any
    regions: list[Region]
    questions: list[Question] = field(default_factory=list)


def difficulty(progress: float) -> dict[str, Any]:
    """Settings of sample_scene: one or two large things at first, then everything."""
    smallest = max(s.SMALLEST_TRAINED, 0.16 - 0.7 * progress)
    return {"max_things": 2 if progress < 0.03 else 4, "smallest": smallest}


def scene_regions(scene: s.Scene, rng: random.Random) -> list[Region]:
    """The box of each thing, and of one or two empty places."""
    regions = [Region(_fractions(t.box(), scene), t.name) for t in scene.things]
    for _ in range(rng.randint(1, 2)):
        for _ in range(10):
            half = rng.uniform(0.08, 0.14)
            x = rng.uniform(half, scene.width - half)
            y = rng.uniform(half, scene.height - half)
            if all(
                max(abs(x - t.x), abs(y - t.y)) > half + t.radius for t in scene.things
            ):
                box = (x - half, y - half, x + half, y + half)
                regions.append(Region(_fractions(box, scene), "nothing"))
                break
    return regions


def _fractions(
    box: tuple[float, float, float, float], scene: s.Scene
) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    w, h = scene.width, scene.height
    return left / w, top / h, right / w, bottom / h


def scene_picture(rng: random.Random, progress: float) -> Picture:
    """A drawn scene with six to ten questions."""
    settings = difficulty(progress)
    if rng.random() < EMPTY:
        scene = s.Scene((), *s.sample_canvas(rng))
        image = drawing.draw(scene, rng)
        asked = asking.ask_of_nothing(scene, rng)
        return Picture(image, scene_regions(scene, rng), asked)
    if rng.random() < CROWDED and progress > 0.03:
        settings |= {"min_things": 5, "max_things": 6}
    scene = s.sample_scene(rng, **settings)
    image = drawing.draw(scene, rng)
    asked = asking.ask(scene, rng)
    return Picture(image, scene_regions(scene, rng), asked)


def _boxes_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    """A drawn scene with questions that have a box or a point."""
    scene = s.sample_scene(rng, **difficulty(progress))
    ways = [*rng.choices(BOXES, k=7), "at"]  # which every scene allows
    asked = [asking.ASKERS[way](scene, rng, "training", None) for way in ways]
    image = drawing.draw(scene, rng)
    found = {x.question: x for x in asked if x}
    return Picture(image, scene_regions(scene, rng), list(found.values()))


def _several_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    """A drawn scene in which things are alike, with questions about all of a kind."""
    few = difficulty(progress)["max_things"]
    while True:
        scene = s.sample_scene(rng, min_things=few - 1, **difficulty(progress))
        asked = [asking.ASKERS[task](scene, rng, "training", None) for task in SEVERAL]
        found = {x.question: x for x in asked if x}
        if any(x.task in ("colour_many", "shape_many") for x in found.values()):
            image = drawing.draw(scene, rng)
            return Picture(image, scene_regions(scene, rng), list(found.values()))


def outlined(rng: random.Random, progress: float = 1.0) -> tuple[s.Scene, Any]:
    """Things without a filling, and their picture."""
    scene = s.sample_outlined(rng, **difficulty(progress))
    return scene, drawing.draw(scene, rng, line=rng.uniform(0.14, 0.28))


def overlapping(rng: random.Random, progress: float = 1.0) -> tuple[s.Scene, Any]:
    """Things that lie partly over each other, and their picture."""
    scene = s.sample_overlapping(rng, **difficulty(progress))
    return scene, drawing.draw(scene, rng)


def _edge_picture(
    made: Callable[[random.Random, float], tuple[s.Scene, Any]],
    rng: random.Random,
    progress: float = 1.0,
) -> Picture:
    scene, image = made(rng, progress)
    return Picture(image, scene_regions(scene, rng), asking.ask(scene, rng))


def _capitals_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    """A drawn scene with questions in capitals, answered as ever."""
    picture = scene_picture(rng, progress)
    asked = [replace(x, question=x.question.upper()) for x in picture.questions]
    return replace(picture, questions=asked)


def _steps_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    """A drawn scene with questions in two steps, one answered at once."""
    scene = s.sample_scene(rng, min_things=2, **difficulty(progress))
    asked = reasoning.questions(scene, rng)
    return Picture(drawing.draw(scene, rng), scene_regions(scene, rng), asked)


CAPTION_QUESTIONS = tuple(
    f"{start} {word}{end}"
    for word in ("the picture", "the image", "this picture")
    for start, end in (("Describe", "."), ("What is in", "?"), ("Caption", "."))
)


def _digits_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    found = glyphs.sample_digits(rng, "train")
    asked = {glyphs.digit_questions(rng): ("digits", found.text) for _ in range(2)}
    if rng.random() < 0.3:
        asked[rng.choice(CAPTION_QUESTIONS)] = (
            "digits_caption",
            f"the number {found.text}",
        )
    return Picture(found.image, found.regions, _as_questions(asked, rng))


def _word_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    found = glyphs.sample_word(rng, "train")
    asked = {glyphs.word_questions(rng): ("words", found.text) for _ in range(2)}
    if rng.random() < 0.3:
        asked[rng.choice(CAPTION_QUESTIONS)] = (
            "words_caption",
            f"the word {found.text}",
        )
    return Picture(found.image, found.regions, _as_questions(asked, rng))


def _as_questions(
    asked: dict[str, tuple[str, str]], rng: random.Random
) -> list[Question]:
    """Questions by text, some with a small letter first or without the last mark."""
    found = []
    for text, (task, answer) in asked.items():
        if rng.random() < 0.12:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.12:
            text = text.rstrip("?.")
        found.append(Question(task, text, answer))
    return found


def any_question(rng: random.Random) -> str:
    """A question that some picture has: of a random scene, or about text."""
    kind = rng.random()
    if kind < 0.14:
        return glyphs.digit_questions(rng)
    if kind < 0.28:
        return glyphs.word_questions(rng)
    return rng.choice(asking.ask(s.sample_scene(rng), rng)).question


def _unknown_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    image = photos.sample_unknown(rng, "train")
    asked = {
        any_question(rng): ("unknown", photos.UNKNOWN_ANSWER)
        for _ in range(rng.randint(2, 4))
    }
    whole = [Region((0.0, 0.0, 1.0, 1.0), "photo")]
    return Picture(image, whole, [Question(t, x, a) for x, (t, a) in asked.items()])


def _unnamed_regions(
    rng: random.Random, progress: float
) -> tuple[tuple[s.Scene, bool], Any, list[Region]]:
    """(scene, whether its colours have the names), its picture, and its regions."""
    colours = rng.random() < 0.5
    scene = unnamed.sample_scene(rng, colours, **difficulty(progress))
    regions = [
        Region(_fractions(t.box(), scene), t.colour if colours else t.shape)
        for t in scene.things
    ]
    return (scene, colours), drawing.draw(scene, rng), regions


def _unnamed_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    (scene, colours), image, regions = _unnamed_regions(rng, progress)
    return Picture(image, regions, unnamed.ask(scene, rng, colours))


_PICTURES = {
    "scene": scene_picture,
    "several": _several_picture,
    "capitals": _capitals_picture,
    "outlined": partial(_edge_picture, outlined),
    "overlapping": partial(_edge_picture, overlapping),
    "boxes": _boxes_picture,
    "steps": _steps_picture,
    "unnamed": _unnamed_picture,
    "digits": _digits_picture,
    "word": _word_picture,
    "unknown": _unknown_picture,
}


def sample_picture(
    rng: random.Random, progress: float = 1.0, mix: dict[str, float] = CAPTION_MIX
) -> Picture:
    """A picture of any kind, by the mix of kinds, with questions about it."""
    return _PICTURES[choose(mix, rng)](rng, progress)


def choose(mix: dict[str, float], rng: random.Random) -> str:
    """A key by its share."""
    return rng.choices(list(mix), list(mix.values()))[0]


def region_picture(
    rng: random.Random, progress: float = 1.0
) -> tuple[Any, list[Region]]:
    """A picture for the encoder stage and what stands where in it."""
    kind = choose(ENCODER_MIX, rng)
    if kind == "scene":
        scene = s.sample_scene(rng, **difficulty(progress))
        return drawing.draw(scene, rng), scene_regions(scene, rng)
    if kind == "unnamed":
        return _unnamed_regions(rng, progress)[1:]
    if kind == "unknown":
        whole = [Region((0.0, 0.0, 1.0, 1.0), "photo")]
        return photos.sample_unknown(rng, "train"), whole
    sample = glyphs.sample_digits if kind == "digits" else glyphs.sample_word
    found = sample(rng, "train")
    return found.image, found.regions


def shot_of(task: str, rng: random.Random, progress: float) -> Picture:
    """A picture with one question of a task."""
    if task == "digits":
        picture = _digits_picture(rng)
        return Picture(picture.image, picture.regions, picture.questions[:1])
    if task == "words":
        picture = _word_picture(rng)
        return Picture(picture.image, picture.regions, picture.questions[:1])
    scene, question = scene_with(task, rng, **difficulty(progress))
    return Picture(drawing.draw(scene, rng), scene_regions(scene, rng), [question])


def scene_with(task: str, rng: random.Random, **settings) -> tuple[s.Scene, Question]:
    """A scene about which a question of this task can be asked, and the question."""
    while True:
        scene = s.sample_scene(rng, **settings)
        question = asking.ASKERS[task](scene, rng, "training", None)
        if question:
            return scene, question


def bare_shot(task: str, rng: random.Random, progress: float) -> Picture:
    """A picture and, as its only question's answer, what a bare pattern names."""
    if task in ("digits", "words"):
        return shot_of(task, rng, progress)
    settings = difficulty(progress)
    if task != "count":
        settings["max_things"] = 1
    scene = s.sample_scene(rng, **settings)
    thing = scene.things[0]
    answers = {
        "colour": thing.colour,
        "shape": thing.shape,
        "pair": thing.name,
        "count": str(len(scene.things)),
    }
    question = Question(f"bare_{task}", "", answers[task])
    return Picture(drawing.draw(scene, rng), scene_regions(scene, rng), [question])


def bare_prompt(answers: list[str], mark: str = "") -> str:
    """ "<image> red\\n<image> blue\\n<image>": answers of all pictures but the last."""
    shown = [f"{IMAGE_MARK}{mark} {answer}\n" for answer in answers]
    return "".join(shown) + IMAGE_MARK + mark
