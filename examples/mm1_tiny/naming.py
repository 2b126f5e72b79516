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
        if len(word) < 3:
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
    pool: Sequence[Shown], rng: random.Random, least: int, most: int
) -> tuple[list[Shown], list[Text]]:
    """`least` to `most` pictures of single things, and the text in which new words
    name them."""
    key = KEYS[rng.choices(list(KEYS), (0.45, 0.45, 0.1))[0]]
    groups = sorted_out(pool, lambda shown: key(shown[0]), rng.randint(2, 4), rng)
    number = rng.randint(max(len(groups) + 1, least), most)
    chosen = draws(groups, number, rng)
    words = names(len(groups), rng)
    form = rng.choices(("lines", "plain", "turns"), (0.45, 0.15, 0.4))[0]
    seen: set[int] = set()
    repeated = []
    for which, _ in chosen:
        repeated.append(which in seen)
        seen.add(which)
    text = pieces([words[which] for which, _ in chosen], repeated, rng, form)
    return [item for _, item in chosen], text


def named_phrases(rng: random.Random) -> list[Text]:
    """The same in text alone: "red star: dax, blue ring: wug, ...": quick to learn."""
    pool = [rng.choice(s.TRAINING_PAIRS) for _ in range(16)]
    place = rng.choice((0, 1))
    groups = sorted_out(pool, lambda pair: pair[place], rng.randint(2, 4), rng)
    chosen = draws(groups, rng.randint(len(groups) + 1, 9), rng)
    words = names(len(groups), rng)
    mark, end = rng.choice((":", " ->", " =")), rng.choice(("\n", ", ", ". "))
    found, seen = [], set()
    for i, (which, (colour, shape)) in enumerate(chosen):
        phrase = f"{colour} {shape}"
        phrase = with_article(phrase) if rng.random() < 0.3 else phrase
        found.append(Text(("<user>" if not i else end) + phrase + mark))
        found.append(Text(" " + words[which], which in seen))
        seen.add(which)
    return found
