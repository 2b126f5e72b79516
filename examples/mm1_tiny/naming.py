"""Few-shot documents with words that mean nothing before: "<image> dax".

What a word stands for (a shape, a colour, both) is decided anew in every document, so
only its shots can tell. Words of the test split never stand in training.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.facts import WORDS
from examples.mm1_tiny.wordings import with_article
from examples.mm1_tiny.words import TRAIN_WORDS
from mm1_mlx.training.documents import Region, Text

MARKS = ("", "", "", ":", " ->", " =")
ASKED = (
    "What is this?", "What is this called?", "Name it.", "Which one is it?", "Name?",
    "What do I call this?", "", "",
)  # fmt: skip
Shown = tuple[
    s.Thing, Any, list[Region]
]  # the one thing of a picture, picture, regions


def invented(rng: random.Random, split: str = "train") -> str:
    """A word of one or two syllables that is none; a quarter of all is for the test."""
    while True:
        word = "".join(
            rng.choice("bdfgklmnprstvwz")
            + rng.choice("aeiou")
            + (rng.choice("bdgklmnprstx") if rng.random() < 0.6 else "")
            for _ in range(1 if rng.random() < 0.6 else 2)
        )
        if len(word) < 3 or (split == "test" and word in (*TRAIN_WORDS, *WORDS)):
            continue
        if (zlib.crc32(word.encode()) % 4 == 0) == (split == "test"):
            return word


def names(number: int, rng: random.Random, split: str = "train") -> list[str]:
    """Different words for as many classes; in training also letters, digits, nouns."""
    kind = rng.random()
    if split == "train" and kind < 0.12:
        return rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", number)
    if split == "train" and kind < 0.22:
        return rng.sample("0123456789", number)
    if split == "train" and kind < 0.38:
        return rng.sample(WORDS, number)
    found: list[str] = []
    while len(found) < number:
        word = invented(rng, split)
        if word not in found:
            found.append(word)
    return found


KEYS: dict[str, Callable[[s.Thing], Any]] = {
    "shape": lambda thing: thing.shape,
    "colour": lambda thing: thing.colour,
    "pair": lambda thing: thing.pair,
}


def sorted_out(
    pool: Sequence[Any], key: Callable[[Any], Any], classes: int, rng: random.Random
) -> list[list[Any]]:
    """Members of the pool in classes by key; fewer classes where the pool has less."""
    groups: dict[Any, list[Any]] = {}
    for item in pool:
        groups.setdefault(key(item), []).append(item)
    large = [group for group in groups.values() if len(group) > 1]
    usable = large if len(large) >= 2 else list(groups.values())
    return rng.sample(usable, min(classes, len(usable)))


def draws(
    groups: Sequence[Sequence[Any]], number: int, rng: random.Random
) -> list[tuple[int, Any]]:
    """(class, member): each class about equally often, in random order, the last one's
    class among those before it."""
    order = [i % len(groups) for i in range(number - 1)]
    rng.shuffle(order)
    order.append(rng.choice(order))
    found, last = [], None
    for which in order:
        options = [item for item in groups[which] if item is not last]
        last = rng.choice(options or list(groups[which]))
        found.append((which, last))
    return found


def pieces(
    answers: Sequence[str], repeated: Sequence[bool], rng: random.Random, form: str
) -> list[Text]:
    """The text of a document: "lines" in one user turn, "plain" lines, or "turns".

    repeated: whether an answer's class was shown before; only then it is learned.
    """
    if form == "turns":
        asked = rng.choice(ASKED)
        found = []
        for answer, known in zip(answers, repeated, strict=True):
            found.append(Text(f"<user><image>{asked}<assistant>"))
            found.append(Text(answer, known))
        return found
    mark = rng.choice(MARKS)
    found = [Text("<user><image>" + mark if form == "lines" else "<image>" + mark)]
    for i, (answer, known) in enumerate(zip(answers, repeated, strict=True)):
        last = i + 1 == len(answers)
        if last and form == "lines":
            found += [Text("<assistant>"), Text(answer, True)]
            break
        found.append(Text(" " + answer, known))
        if not last:
            found.append(Text("\n<image>" + mark))
    return found


def named_pictures(
    pool: Sequence[Shown],
    rng: random.Random,
    least: int,
    most: int,
    again: float = 0.0,
) -> tuple[list[Shown], list[Text]]:
    """`least` to `most` pictures of single things, and the text in which new words
    name them. again: how often a class is one picture, shown again and again.

    In a third of the documents words stand in place of some pictures, or beside them:
    from "red star: dax" it is a small step to what a picture shows.
    """
    key = KEYS[rng.choices(list(KEYS), (0.45, 0.45, 0.1))[0]]
    groups = sorted_out(pool, lambda shown: key(shown[0]), rng.randint(2, 4), rng)
    if rng.random() < again:
        groups = [[rng.choice(group)] for group in groups]
    number = rng.randint(max(len(groups) + 1, least), most)
    chosen = draws(groups, number, rng)
    words = names(len(groups), rng)
    seen: set[int] = set()
    repeated = []
    for which, _ in chosen:
        repeated.append(which in seen)
        seen.add(which)
    answers = [words[which] for which, _ in chosen]
    shown = [item for _, item in chosen]
    if rng.random() < 0.35:
        return _with_phrases(shown, answers, repeated, rng)
    form = rng.choices(("lines", "plain", "turns"), (0.45, 0.15, 0.4))[0]
    return shown, pieces(answers, repeated, rng, form)


def _with_phrases(
    shown: Sequence[Shown],
    answers: Sequence[str],
    repeated: Sequence[bool],
    rng: random.Random,
) -> tuple[list[Shown], list[Text]]:
    """ "<image>: dax, red star: dax, <image> blue ring: wug, <image>: dax"."""
    mark, end = rng.choice((":", " ->", " =", "")), rng.choice(("\n", ", "))
    left, text = [], []
    for i, (item, answer) in enumerate(zip(shown, answers, strict=True)):
        kind = rng.choices(("picture", "phrase", "both"), (0.4, 0.35, 0.25))[0]
        if kind != "phrase":
            left.append(item)
        line = {
            "picture": "<image>",
            "phrase": item[0].name,
            "both": f"<image> {item[0].name}",
        }[kind]
        text.append(Text(("<user>" if not i else end) + line + mark))
        text.append(Text(" " + answer, repeated[i]))
    return left, text


def named_phrases(rng: random.Random) -> list[Text]:
    """The same in text alone: "red star: dax, blue ring: wug, ...": quick to learn.

    Half of the phrases are one word, and some have nothing between phrase and name: a
    name that follows its word is found first, and the rest grows from there.
    """
    place = rng.choice((0, 1))
    pool = [rng.choice(s.TRAINING_PAIRS) for _ in range(rng.choice((6, 16)))]
    groups = sorted_out(pool, lambda pair: pair[place], rng.randint(2, 4), rng)
    if len(groups) < 2:
        return named_phrases(rng)
    chosen = draws(groups, rng.randint(len(groups) + 2, 14), rng)
    words = names(len(groups), rng)
    mark, end = rng.choice(("", "", ":", " ->", " =")), rng.choice(("\n", ", ", ". "))
    short, article = rng.random() < 0.5, rng.random() < 0.2
    found, seen = [], set()
    for i, (which, pair) in enumerate(chosen):
        phrase = pair[place] if short else " ".join(pair)
        phrase = with_article(phrase) if article else phrase
        found.append(Text(("<user>" if not i else end) + phrase + mark))
        found.append(Text(" " + words[which], which in seen))
        seen.add(which)
    return found
