"""Training documents, encoder pictures and test questions of mm1-tiny.

`python -m mm1_mlx.pretrain --data examples.mm1_tiny.documents` reads this module.
Everything is made on the fly from the random generator that is passed in: the same
seed gives the same document.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from examples.mm1_tiny import (
    asking,
    drawing,
    facts,
    glyphs,
    long_documents,
    naming,
    photos,
    reasoning,
    turns,
)
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.comparisons import compare
from examples.mm1_tiny.pictures import (
    BARE_TASKS,
    CAPTION_MIX,
    CAPTION_QUESTIONS,
    IMAGE_MARK,
    Picture,
    bare_prompt,
    bare_shot,
    choose,
    difficulty,
    region_picture,
    sample_picture,
    scene_picture,
    scene_regions,
    shot_of,
)
from examples.mm1_tiny.questions import Question, caption_of
from examples.mm1_tiny.tasks import TASKS, Example
from examples.mm1_tiny.wordings import NOUNS, PICTURE_WORDS
from mm1_mlx.training.documents import KINDS, Document, Text

__all__ = ["TASKS", "Example", "corpus", "document", "region_picture"]

# MM1 weighs its kinds of data by hand, too. Single pictures: pictures.CAPTION_MIX.
INTERLEAVED_MIX = {"comparison": 0.5, "few_shot": 0.15, "multi_turn": 0.15, "talk": 0.2}
TEXT_MIX = {
    "sentences": 0.13, "naming": 0.42, "told": 0.2, "numbered": 0.05, "facts": 0.2
}  # fmt: skip
QUESTION_FIRST = 0.15  # share of caption documents: the question, then the picture
NEW_LINE = 0.10  # share of caption documents with a line break after the picture
FEW_SHOT_TASKS = (
    "count", "count_colour", "count_shape", "count_pair", "colour", "shape",
    "existence", "position", "relation", "caption", "digits", "words", "words",
    "words",
)  # fmt: skip
_USER, _ASSISTANT = "<user>", "<assistant>"


@dataclass(frozen=True)
class Mixes:
    """Shares of what the documents of a kind are."""

    caption: dict[str, float] = field(default_factory=lambda: CAPTION_MIX)
    interleaved: dict[str, float] = field(default_factory=lambda: INTERLEAVED_MIX)
    text: dict[str, float] = field(default_factory=lambda: TEXT_MIX)
    long: dict[str, float] = field(default_factory=lambda: long_documents.LONG_MIX)


EVERYTHING = Mixes()


def document(
    rng: random.Random, kind: str, progress: float = 1.0, mixes: Mixes = EVERYTHING
) -> Document:
    """One training document.

    kind: "caption" (one picture), "interleaved" (two to four pictures, or several
        turns about one), "text", "long" (two to five pictures or tiles, at a glance
        up to ten) or "many" (up to sixteen).
    progress: 0 to 1 over the run; early documents have fewer and larger things.
    """
    if kind == "caption":
        return _caption(rng, progress, mixes.caption)
    if kind == "interleaved":
        makers = {
            "comparison": _comparison,
            "few_shot": _few_shot,
            "multi_turn": _multi_turn,
            "talk": _talk,
        }
        return makers[choose(mixes.interleaved, rng)](rng, progress)
    if kind == "text":
        return _text(rng, mixes.text)
    if kind in ("long", "many"):
        return long_documents.document(rng, kind, progress, mixes.long)
    raise ValueError(f"kind is {kind!r}; use one of {', '.join(KINDS)}.")


def _answered(question: Question) -> list[Text]:
    return [Text(question.question + _ASSISTANT), Text(question.answer, True)]


def _caption(rng: random.Random, progress: float, mix: dict[str, float]) -> Document:
    picture = sample_picture(rng, progress, mix)
    asked = picture.questions
    style = rng.random()
    if style < QUESTION_FIRST:
        asked = [rng.choice(asked)]
        gap = rng.choice((" ", "\n"))
        start = f"{_USER}{asked[0].question}{gap}{IMAGE_MARK}{_ASSISTANT}"
        branches = [[Text(asked[0].answer, True)]]
    else:
        # What does not fit into a row is left out: the long answers would be rare.
        asked = sorted(asked, key=lambda question: question.task != "caption")
        after = "\n" if style < QUESTION_FIRST + NEW_LINE else ""
        start = f"{_USER}{IMAGE_MARK}{after}"
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
    both = s.sample_two_scenes(rng, **difficulty(progress))
    asked = compare(*both, rng)
    for scene, which in zip(both, ("first", "second"), strict=True):
        single = asking.ask(scene, rng, which=which)[: rng.randint(1, 3)]
        asked += [Question(f"{x.task}_of_two", x.question, x.answer) for x in single]
    rng.shuffle(asked)
    if rng.random() < 0.12:
        asked = asked[:1]
        start = f"{_USER}{asked[0].question} {IMAGE_MARK}{IMAGE_MARK}{_ASSISTANT}"
        branches = [[Text(asked[0].answer, True)]]
    else:
        start = _USER + rng.choice(_TWO_PICTURES).format(i=IMAGE_MARK)
        # A space before a word belongs to the word's token, also across the border.
        gap = start[len(start.rstrip(" ")) :]
        start = start.rstrip(" ")
        branches = [_answered(replace(x, question=gap + x.question)) for x in asked]
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
    picture = scene_picture(rng, progress)
    asked = picture.questions[: rng.randint(2, 5)]
    branch = _answered(asked[0])
    for question in asked[1:]:
        turn, answer = _answered(question)
        branch += [Text(_USER + turn.text), answer]
    return Document(
        kind="interleaved",
        images=[picture.image],
        context=[Text(_USER + IMAGE_MARK)],
        branches=[branch],
        tasks=["multi_turn"],
        regions=[picture.regions],
    )


def _talk(rng: random.Random, progress: float) -> Document:
    """A conversation in which questions need the turn before."""
    while True:
        scene = s.sample_scene(rng, **difficulty(progress))
        if asked := turns.talk(scene, rng):
            break
    branch = _answered(asked[0])
    for question in asked[1:]:
        turn, answer = _answered(question)
        branch += [Text(_USER + turn.text), answer]
    return Document(
        kind="interleaved",
        images=[drawing.draw(scene, rng)],
        context=[Text(_USER + IMAGE_MARK)],
        branches=[branch],
        tasks=["talk"],
        regions=[scene_regions(scene, rng)],
    )


def _few_shot(rng: random.Random, progress: float) -> Document:
    """Two to four pictures with the same task; the last answer ends the document."""
    number = rng.randint(2, 4)
    bare = rng.random() < 0.5
    task = rng.choice(BARE_TASKS if bare else FEW_SHOT_TASKS)
    maker = bare_shot if bare else shot_of
    shots = [maker(task, rng, progress) for _ in range(number)]
    pieces = _bare_pieces(shots, rng) if bare else _turns(shots)
    return Document(
        kind="interleaved",
        images=[shot.image for shot in shots],
        context=pieces[:-1],
        branches=[pieces[-1:]],
        tasks=["few_shot_bare" if bare else "few_shot"],
        regions=[shot.regions for shot in shots],
    )


def _turns(shots: list[Picture]) -> list[Text]:
    """A turn per picture: question and answer."""
    pieces = []
    for shot in shots:
        turn, answer = _answered(shot.questions[0])
        pieces += [Text(_USER + IMAGE_MARK + turn.text), answer]
    return pieces


def _bare_pieces(shots: list[Picture], rng: random.Random) -> list[Text]:
    """ "<image> red", line by line; what is named must be read from the lines before.

    The first answer is not supervised: nothing tells what it will name.
    """
    mark = rng.choice(("", "", ":", " ->", " ="))
    answers = [shot.questions[0].answer for shot in shots]
    if rng.random() < 0.65:  # inside one user turn
        prompt = _USER + bare_prompt(answers[:-1], mark) + _ASSISTANT
        return [Text(prompt), Text(answers[-1], True)]
    pieces = []
    for i, answer in enumerate(answers):
        pieces.append(Text(("\n" if i else "") + IMAGE_MARK + mark))
        pieces.append(Text(" " + answer, i > 0))
    return pieces


def _text(rng: random.Random, mix: dict[str, float]) -> Document:
    style = choose(mix, rng)
    if style == "sentences":
        branches = [[Text(facts.sentence(rng), True)] for _ in range(rng.randint(1, 3))]
        return Document(
            "text", [], [Text(_ASSISTANT)], branches, ["sentence"] * len(branches)
        )
    if style == "naming":
        pieces = naming.named_phrases(rng)
        return Document("text", [], pieces[:-1], [pieces[-1:]], ["naming_text"])
    if style == "numbered":
        return long_documents.numbered_in_words(rng)
    if style == "told":
        return _told(rng)
    makers = (facts.text_only, reasoning.arithmetic)
    pairs = dict(rng.choice(makers)(rng) for _ in range(rng.randint(3, 8)))
    branches = [[Text(x + _ASSISTANT), Text(a, True)] for x, a in pairs.items()]
    return Document("text", [], [Text(_USER)], branches, ["fact"] * len(branches))


def _told(rng: random.Random) -> Document:
    """A scene in words, and questions in two steps about it."""
    scene = s.sample_scene(rng, min_things=2)
    asked = reasoning.questions(scene, rng)
    branches = [_answered(replace(x, question=f" {x.question}")) for x in asked]
    context = [Text(f"{_USER}{caption_of(scene)}.")]
    return Document("text", [], context, branches, ["told"] * len(branches))


def corpus(rng: random.Random, n: int) -> Iterator[str]:
    """Lines of all text the model will meet, from n questions or sentences.

    Questions and answers are lines of their own: an answer follows a role mark, so it
    starts without a space.
    """
    for _ in range(n):
        yield from _line(rng).split("\n")


def _line(rng: random.Random) -> str:
    """A sentence, or a question and its answer with a line break between."""
    kind = rng.random()
    if kind < 0.45:
        found = rng.choice(asking.ask(s.sample_scene(rng), rng))
        return f"{found.question}\n{found.answer}"
    if kind < 0.58:
        found = rng.choice(compare(*s.sample_two_scenes(rng), rng))
        return f"{found.question}\n{found.answer}"
    if kind < 0.64:
        which = rng.choice(("first", "second"))
        found = rng.choice(asking.ask(s.sample_scene(rng), rng, which=which))
        return f"{found.question}\n{found.answer}"
    if kind < 0.78:
        return "\n".join(facts.text_only(rng))
    if kind < 0.82:
        return facts.sentence(rng)
    if kind < 0.88:
        return f"{glyphs.digit_questions(rng)}\n{rng.randrange(1000)}"
    if kind < 0.97:
        letters = "".join(
            rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 5))
        )
        word = rng.choice(glyphs.TRAIN_WORDS).upper() if kind < 0.92 else letters
        return f"{glyphs.word_questions(rng)}\n{word}"
    if kind < 0.985:
        return f"{rng.choice(CAPTION_QUESTIONS)}\n{photos.UNKNOWN_ANSWER}"
    word = rng.choice(PICTURE_WORDS)
    colour, shape = rng.choice(s.TRAINING_PAIRS)
    return rng.choice(
        (
            f"Picture 1: Picture 2: the {word}s and {rng.choice(NOUNS)}s -> = :",
            f"First: Second: {colour} {shape}",
        )
    )
