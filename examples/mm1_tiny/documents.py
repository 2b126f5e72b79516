"""Training documents, encoder pictures and test questions of mm1-tiny.

`python -m mm1_mlx.pretrain --data examples.mm1_tiny.documents` reads this module.
Everything is made on the fly from the random generator that is passed in: the same
seed gives the same document.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from examples.mm1_tiny import drawing, facts, glyphs, photos
from examples.mm1_tiny import questions as q
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.comparisons import compare
from examples.mm1_tiny.questions import Question
from examples.mm1_tiny.wordings import NOUNS, PICTURE_WORDS
from mm1_mlx.training.documents import Document, Region, Text

CAPTION_MIX = {"scene": 0.62, "digits": 0.13, "word": 0.13, "unknown": 0.12}
INTERLEAVED_MIX = {"comparison": 0.55, "few_shot": 0.25, "multi_turn": 0.20}
QUESTION_FIRST = 0.15  # share of caption documents: the question, then the picture
NEW_LINE = 0.10  # share of caption documents with a line break after the picture
SENTENCES = 0.2  # share of text documents
FEW_SHOT_TASKS = (
    "count", "count_colour", "count_shape", "count_pair", "colour", "shape",
    "existence", "position", "relation", "caption", "digits", "words",
)  # fmt: skip
BARE_TASKS = ("colour", "shape", "pair", "count", "digits", "words")
_USER, _ASSISTANT, _IMAGE = "<user>", "<assistant>", "<image>"


@dataclass
class Picture:
    """A picture, what stands where in it, and questions about it."""

    image: Any
    regions: list[Region]
    questions: list[Question] = field(default_factory=list)


@dataclass
class Example:
    """One test question. The prompt has no role marks; images without an `<image>`
    mark in it come first."""

    images: list[Any]
    prompt: str
    answer: str
    task: str


# --- pictures ------------------------------------------------------------------------


def _difficulty(progress: float) -> dict[str, Any]:
    """How large scenes are: two large things at first, then everything."""
    smallest = max(s.SMALLEST, 0.16 - 0.35 * progress)
    return {"max_things": 2 if progress < 0.08 else 4, "smallest": smallest}


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


def _scene_picture(rng: random.Random, progress: float) -> Picture:
    scene = s.sample_scene(rng, **_difficulty(progress))
    image = drawing.draw(scene, rng)
    return Picture(image, scene_regions(scene, rng), q.ask(scene, rng))


def _captions() -> tuple[str, ...]:
    return tuple(
        f"{start} {word}{end}"
        for word in ("the picture", "the image", "this picture")
        for start, end in (("Describe", "."), ("What is in", "?"), ("Caption", "."))
    )


def _digits_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    found = glyphs.sample_digits(rng, "train")
    asked = {glyphs.digit_questions(rng): ("digits", found.text) for _ in range(2)}
    if rng.random() < 0.3:
        asked[rng.choice(_captions())] = ("digits_caption", f"the number {found.text}")
    return Picture(found.image, found.regions, _as_questions(asked, rng))


def _word_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    found = glyphs.sample_word(rng, "train")
    asked = {glyphs.word_questions(rng): ("words", found.text) for _ in range(2)}
    if rng.random() < 0.3:
        asked[rng.choice(_captions())] = ("words_caption", f"the word {found.text}")
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


def _any_question(rng: random.Random) -> str:
    """A question that some picture has: of a random scene, or about text."""
    kind = rng.random()
    if kind < 0.14:
        return glyphs.digit_questions(rng)
    if kind < 0.28:
        return glyphs.word_questions(rng)
    return rng.choice(q.ask(s.sample_scene(rng), rng)).question


def _unknown_picture(rng: random.Random, progress: float = 1.0) -> Picture:
    image = photos.sample_unknown(rng, "train")
    asked = {
        _any_question(rng): ("unknown", photos.UNKNOWN_ANSWER)
        for _ in range(rng.randint(2, 4))
    }
    whole = [Region((0.0, 0.0, 1.0, 1.0), "photo")]
    return Picture(image, whole, [Question(t, x, a) for x, (t, a) in asked.items()])


_PICTURES = {
    "scene": _scene_picture,
    "digits": _digits_picture,
    "word": _word_picture,
    "unknown": _unknown_picture,
}


def _choose(mix: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(mix), list(mix.values()))[0]


def region_picture(
    rng: random.Random, progress: float = 1.0
) -> tuple[Any, list[Region]]:
    """A picture for the encoder stage and what stands where in it."""
    kind = _choose(CAPTION_MIX, rng)
    if kind == "scene":
        scene = s.sample_scene(rng, **_difficulty(progress))
        return drawing.draw(scene, rng), scene_regions(scene, rng)
    if kind == "unknown":
        whole = [Region((0.0, 0.0, 1.0, 1.0), "photo")]
        return photos.sample_unknown(rng, "train"), whole
    sample = glyphs.sample_digits if kind == "digits" else glyphs.sample_word
    found = sample(rng, "train")
    return found.image, found.regions


# --- documents -----------------------------------------------------------------------


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One training document.

    kind: "caption" (one picture), "interleaved" (two to four pictures, or several
        turns about one) or "text".
    progress: 0 to 1 over the run; early documents have fewer and larger things.
    """
    if kind == "caption":
        return _caption(rng, progress)
    if kind == "interleaved":
        makers = {
            "comparison": _comparison,
            "few_shot": _few_shot,
            "multi_turn": _multi_turn,
        }
        return makers[_choose(INTERLEAVED_MIX, rng)](rng, progress)
    if kind == "text":
        return _text(rng)
    raise ValueError(f"kind is {kind!r}; use caption, interleaved or text.")


def _answered(question: Question) -> list[Text]:
    return [Text(question.question + _ASSISTANT), Text(question.answer, True)]


def _caption(rng: random.Random, progress: float) -> Document:
    picture = _PICTURES[_choose(CAPTION_MIX, rng)](rng, progress)
    asked = picture.questions
    style = rng.random()
    if style < QUESTION_FIRST:
        asked = [rng.choice(asked)]
        gap = rng.choice((" ", "\n"))
        start = f"{_USER}{asked[0].question}{gap}{_IMAGE}{_ASSISTANT}"
        branches = [[Text(asked[0].answer, True)]]
    else:
        after = "\n" if style < QUESTION_FIRST + NEW_LINE else ""
        start = f"{_USER}{_IMAGE}{after}"
        branches = [_answered(question) for question in asked]
    return Document(
        kind="caption",
        images=[picture.image],
        context=[Text(start)],
        branches=branches,
        tasks=[question.task for question in asked],
        regions=[picture.regions],
    )


_TWO_PICTURES = (
    "{i}{i}",
    "{i}{i}",
    "{i}{i}",
    "{i}{i}\n",
    "Picture 1: {i} Picture 2: {i} ",
    "Picture 1: {i}\nPicture 2: {i}\n",
    "First: {i} Second: {i} ",
    "{i} and {i} ",
)


def _comparison(rng: random.Random, progress: float) -> Document:
    """Two pictures; questions about both, and about one of them by its place."""
    both = s.sample_two_scenes(rng, **_difficulty(progress))
    asked = compare(*both, rng)
    for scene, which in zip(both, ("first", "second"), strict=True):
        single = q.ask(scene, rng, which=which)[: rng.randint(1, 2)]
        asked += [Question(f"{x.task}_of_two", x.question, x.answer) for x in single]
    rng.shuffle(asked)
    if rng.random() < 0.12:
        asked = asked[:1]
        start = f"{_USER}{asked[0].question} {_IMAGE}{_IMAGE}{_ASSISTANT}"
        branches = [[Text(asked[0].answer, True)]]
    else:
        start = _USER + rng.choice(_TWO_PICTURES).format(i=_IMAGE)
        branches = [_answered(question) for question in asked]
    return Document(
        kind="interleaved",
        images=[drawing.draw(scene, rng) for scene in both],
        context=[Text(start)],
        branches=branches,
        tasks=[question.task for question in asked],
        regions=[scene_regions(scene, rng) for scene in both],
    )


def _multi_turn(rng: random.Random, progress: float) -> Document:
    """Several questions about one scene, in one branch and in random order."""
    picture = _scene_picture(rng, progress)
    asked = picture.questions[: rng.randint(2, 5)]
    branch = _answered(asked[0])
    for question in asked[1:]:
        turn, answer = _answered(question)
        branch += [Text(_USER + turn.text), answer]
    return Document(
        kind="interleaved",
        images=[picture.image],
        context=[Text(_USER + _IMAGE)],
        branches=[branch],
        tasks=["multi_turn"],
        regions=[picture.regions],
    )


def _shot(task: str, rng: random.Random, progress: float) -> Picture:
    """A picture with one question of a task."""
    if task == "digits":
        picture = _digits_picture(rng)
        return Picture(picture.image, picture.regions, picture.questions[:1])
    if task == "words":
        picture = _word_picture(rng)
        return Picture(picture.image, picture.regions, picture.questions[:1])
    scene, question = scene_with(task, rng, **_difficulty(progress))
    return Picture(drawing.draw(scene, rng), scene_regions(scene, rng), [question])


def scene_with(task: str, rng: random.Random, **settings) -> tuple[s.Scene, Question]:
    """A scene about which a question of this task can be asked, and the question."""
    while True:
        scene = s.sample_scene(rng, **settings)
        question = q.ASKERS[task](scene, rng, "training", None)
        if question:
            return scene, question


def _bare_shot(task: str, rng: random.Random, progress: float) -> Picture:
    """A picture and, as its only question's answer, what a bare pattern names."""
    if task in ("digits", "words"):
        return _shot(task, rng, progress)
    settings = _difficulty(progress)
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


def _few_shot(rng: random.Random, progress: float) -> Document:
    """Two to four pictures with the same task; the last answer ends the document."""
    number = rng.randint(2, 4)
    bare = rng.random() < 0.5
    task = rng.choice(BARE_TASKS if bare else FEW_SHOT_TASKS)
    maker = _bare_shot if bare else _shot
    shots = [maker(task, rng, progress) for _ in range(number)]
    asked = [shot.questions[0] for shot in shots]
    context: list[Text] = []
    if not bare:
        for question in asked:
            turn, answer = _answered(question)
            context += [Text(_USER + _IMAGE + turn.text), answer]
        context.pop()
    else:
        mark = rng.choice(("", "", ":", " ->", " ="))
        answers = [question.answer for question in asked]
        if rng.random() < 0.65:  # inside one user turn
            context = [Text(bare_prompt(answers[:-1], mark) + _ASSISTANT)]
            context = [Text(_USER + context[0].text)]
        else:  # a plain page; what the first answer will be about cannot be known
            for i, answer in enumerate(answers[:-1]):
                context += [Text(("\n" if i else "") + _IMAGE + mark)]
                context += [Text(" " + answer, i > 0)]
            context += [Text(f"\n{_IMAGE}{mark}")]
    last = asked[-1].answer
    if bare and not context[-1].text.endswith(_ASSISTANT):
        last = " " + last
    return Document(
        kind="interleaved",
        images=[shot.image for shot in shots],
        context=context,
        branches=[[Text(last, True)]],
        tasks=["few_shot_bare" if bare else "few_shot"],
        regions=[shot.regions for shot in shots],
    )


def bare_prompt(answers: list[str], mark: str = "") -> str:
    """ "<image> red\\n<image> blue\\n<image>": answers of all pictures but the last."""
    shown = [f"{_IMAGE}{mark} {answer}\n" for answer in answers]
    return "".join(shown) + _IMAGE + mark


def _text(rng: random.Random) -> Document:
    if rng.random() < SENTENCES:
        branches = [[Text(facts.sentence(rng), True)] for _ in range(rng.randint(1, 3))]
        return Document(
            "text", [], [Text(_ASSISTANT)], branches, ["sentence"] * len(branches)
        )
    pairs = dict(facts.text_only(rng) for _ in range(rng.randint(3, 8)))
    branches = [[Text(x + _ASSISTANT), Text(a, True)] for x, a in pairs.items()]
    return Document("text", [], [Text(_USER)], branches, ["fact"] * len(branches))


def corpus(rng: random.Random, n: int) -> Iterator[str]:
    """n lines of all text the model will meet, to train its vocabulary on."""
    for _ in range(n):
        yield _line(rng)


def _line(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        found = rng.choice(q.ask(s.sample_scene(rng), rng))
        return f"{found.question} {found.answer}"
    if kind < 0.58:
        found = rng.choice(compare(*s.sample_two_scenes(rng), rng))
        return f"{found.question} {found.answer}"
    if kind < 0.64:
        which = rng.choice(("first", "second"))
        found = rng.choice(q.ask(s.sample_scene(rng), rng, which=which))
        return f"{found.question} {found.answer}"
    if kind < 0.78:
        return " ".join(facts.text_only(rng))
    if kind < 0.82:
        return facts.sentence(rng)
    if kind < 0.88:
        return f"{glyphs.digit_questions(rng)} {rng.randrange(1000)}"
    if kind < 0.97:
        letters = "".join(
            rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 5))
        )
        word = rng.choice(glyphs.TRAIN_WORDS).upper() if kind < 0.92 else letters
        return f"{glyphs.word_questions(rng)} {word}"
    if kind < 0.985:
        return f"{rng.choice(_captions())} {photos.UNKNOWN_ANSWER}"
    word = rng.choice(PICTURE_WORDS)
    colour, shape = rng.choice(s.TRAINING_PAIRS)
    return rng.choice(
        (
            f"Picture 1: Picture 2: the {word}s and {rng.choice(NOUNS)}s -> = :",
            f"First: Second: {colour} {shape}",
        )
    )


# --- tests ---------------------------------------------------------------------------


def _test_scene(task: str, rng: random.Random) -> Example:
    scene, question = scene_with(task, rng)
    return Example([drawing.draw(scene, rng)], question.question, question.answer, task)


def _test_glyphs(task: str, rng: random.Random) -> Example:
    if task == "digits":
        found, asked = glyphs.sample_digits(rng, "test"), glyphs.digit_questions(rng)
    else:
        found, asked = glyphs.sample_word(rng, "test"), glyphs.word_questions(rng)
    return Example([found.image], asked, found.text, task)


def _test_compare(rng: random.Random) -> Example:
    both = s.sample_two_scenes(rng)
    question = rng.choice(compare(*both, rng))
    images = [drawing.draw(scene, rng) for scene in both]
    return Example(images, question.question, question.answer, "compare")


def _test_of_two(rng: random.Random) -> Example:
    both = s.sample_two_scenes(rng)
    place = rng.randrange(2)
    question = q.ask(both[place], rng, which=("first", "second")[place])[0]
    images = [drawing.draw(scene, rng) for scene in both]
    return Example(images, question.question, question.answer, "of_two")


def _test_held_out(rng: random.Random) -> Example:
    """A question about a thing whose colour and shape never met in training."""
    scene, question = held_out_question(rng)
    image = drawing.draw(scene, rng)
    return Example([image], question.question, question.answer, "held_out")


def held_out_question(rng: random.Random) -> tuple[s.Scene, Question]:
    """A scene and a question that concerns one of HELD_OUT_PAIRS."""
    task = rng.choice(("shape", "colour", "existence", "caption", "count_pair"))
    if task == "existence" and rng.random() < 0.5:  # its parts are there, it is not
        colour, shape = rng.choice(s.HELD_OUT_PAIRS)
        parts = [
            rng.choice([p for p in s.TRAINING_PAIRS if p[0] == colour]),
            rng.choice([p for p in s.TRAINING_PAIRS if p[1] == shape]),
        ]
        parts += s.sample_pairs(rng, rng.randint(0, 2))
        wanted, answer = f"{colour} {shape}", "no"
        scene = s.arrange(parts, rng)
    else:
        scene = s.sample_scene(rng, pairs="held_out")
        thing = next(t for t in scene.things if t.pair in s.HELD_OUT_PAIRS)
        colour, shape, wanted = thing.colour, thing.shape, thing.name
        answer = {"colour": colour, "shape": shape, "existence": "yes"}.get(task)
    while True:
        question = q.ASKERS[task](scene, rng, "all", None)
        if question is None:  # a shape or colour that is there more than once
            return held_out_question(rng)
        text = question.question
        concerns = {
            "colour": shape in text,
            "shape": colour in text,
            "caption": True,
        }.get(task, wanted in text)
        if concerns and answer in (None, question.answer):
            return scene, question
        if task in ("colour", "shape") and rng.random() < 0.2:
            return held_out_question(rng)


def _test_unknown(rng: random.Random) -> Example:
    image = photos.sample_unknown(rng, "test")
    return Example([image], _any_question(rng), photos.UNKNOWN_ANSWER, "unknown")


def _test_elsewhere(rng: random.Random) -> Example:
    from examples.mm1_tiny import elsewhere  # its drawing libraries are not light

    scene, question = scene_with(rng.choice(SCENE_TASKS), rng)
    image = elsewhere.draw(scene, rng)
    return Example([image], question.question, question.answer, "elsewhere")


def _test_few_shot(rng: random.Random) -> Example:
    task = rng.choice(BARE_TASKS[:4])
    shots = [_bare_shot(task, rng, 1.0) for _ in range(rng.randint(3, 4))]
    answers = [shot.questions[0].answer for shot in shots]
    images = [shot.image for shot in shots]
    return Example(images, bare_prompt(answers[:-1]), answers[-1], "few_shot")


def _test_any_of(tasks: tuple[str, ...], name: str, rng: random.Random) -> Example:
    example = _test_scene(rng.choice(tasks), rng)
    return Example(example.images, example.prompt, example.answer, name)


SCENE_TASKS = tuple(q.ASKERS)[:10]
TASKS: dict[str, Callable[[random.Random], Example]] = {
    **{task: partial(_test_scene, task) for task in SCENE_TASKS},
    "digits": partial(_test_glyphs, "digits"),
    "words": partial(_test_glyphs, "words"),
    "compare": _test_compare,
    "held_out": _test_held_out,
    "unknown": _test_unknown,
    "elsewhere": _test_elsewhere,
    # Reported, without a goal:
    "of_two": _test_of_two,
    "absent": partial(
        _test_any_of, ("colour_absent", "shape_absent", "position_absent"), "absent"
    ),
    "many": partial(_test_any_of, ("colour_many", "shape_many"), "many"),
    "few_shot": _test_few_shot,
}
