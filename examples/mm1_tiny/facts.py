"""Text without pictures: small facts as questions, and plain sentences."""

import random
from collections.abc import Callable

from examples.mm1_tiny.scenes import COLOURS, SHAPES, TRAINING_PAIRS
from examples.mm1_tiny.wordings import listed, voiced, with_article

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten",
)  # fmt: skip
DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August",
    "September", "October", "November", "December",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "cat", "dog", "sun", "tree", "fish", "book", "house", "door", "bird", "water",
    "milk", "bread", "table", "chair", "snow", "rain", "wind", "hand", "shoe", "cup",
    "box", "car", "key", "map", "pen", "hat", "egg", "leaf", "lamp", "ship",
)  # fmt: skip
ANIMALS = ("cat", "dog", "fish", "bird", "horse", "cow", "sheep", "mouse", "duck")
FOODS = ("bread", "milk", "cheese", "butter", "egg", "soup", "rice", "cake", "pear")
CORNERS = {"circle": 0, "square": 4, "triangle": 3, "star": 10}
TYPICAL = {
    "red": ("a ripe tomato", "blood", "a stop sign"),
    "green": ("grass", "a leaf", "a frog"),
    "blue": ("the clear sky", "the sea"),
    "yellow": ("a banana", "a lemon", "the yolk of an egg"),
    "orange": ("a carrot", "a ripe pumpkin"),
    "black": ("coal", "a raven", "the night"),
    "purple": ("a plum", "lavender"),
    "white": ("fresh snow", "milk", "a swan"),
    "grey": ("an elephant", "a rain cloud"),
    "pink": ("a flamingo", "a piglet"),
    "brown": ("chocolate", "the bark of a tree"),
}
MIXED = {("red", "yellow"): "orange", ("blue", "yellow"): "green"}
MIXED |= {("red", "blue"): "purple"}
OPPOSITES = {
    "left": "right", "top": "bottom", "above": "below", "big": "small", "hot": "cold",
    "day": "night", "yes": "no", "up": "down", "first": "last", "old": "new",
    "light": "dark", "open": "closed", "full": "empty", "fast": "slow",
}  # fmt: skip

Fact = tuple[str, str]


def _plus(rng: random.Random) -> Fact:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return rng.choice(
        (f"What is {a} plus {b}?", f"{a} + {b} =", f"Add {a} and {b}.")
    ), str(a + b)


def _minus(rng: random.Random) -> Fact:
    b, rest = rng.randint(0, 9), rng.randint(0, 9)
    a = b + rest
    return rng.choice(
        (f"What is {a} minus {b}?", f"{a} - {b} =", f"Take {b} from {a}.")
    ), str(rest)


def _next_number(rng: random.Random) -> Fact:
    n = rng.randint(0, 20)
    if rng.random() < 0.5:
        return f"Which number comes after {n}?", str(n + 1)
    return f"Which number comes before {n + 1}?", str(n)


def _go_on(rng: random.Random) -> Fact:
    start, step = rng.randint(0, 9), rng.choice((1, 1, 2, 10))
    shown = [str(start + i * step) for i in range(4)]
    return f"What comes next: {', '.join(shown[:3])}?", shown[3]


def _larger(rng: random.Random) -> Fact:
    a, b = rng.sample(range(21), 2)
    if rng.random() < 0.5:
        return f"Which is larger, {a} or {b}?", str(max(a, b))
    return f"Which is smaller, {a} or {b}?", str(min(a, b))


def _number_word(rng: random.Random) -> Fact:
    n = rng.randint(0, 10)
    if rng.random() < 0.5:
        return f"Write {n} as a word.", NUMBERS[n]
    return f"Write {NUMBERS[n]} as a number.", str(n)


def _corners(rng: random.Random) -> Fact:
    shape, n = rng.choice(list(CORNERS.items())[:3])
    word = rng.choice(("corners", "sides")) if n else "corners"
    a = with_article(shape)
    texts = (
        f"How many {word} does {a} have?",
        f"How many {word} has {a}?",
        f"Number of {word} of {a}?",
    )
    return rng.choice(texts), str(n)


def _points(rng: random.Random) -> Fact:
    return rng.choice(
        ("How many points does a star have?", "How many points has a star?")
    ), "5"


def _more_corners(rng: random.Random) -> Fact:
    a, b = rng.sample(list(CORNERS)[:3], 2)
    best = max(a, b, key=lambda shape: CORNERS[shape])
    return (
        f"Which has more corners, {with_article(a)} or {with_article(b)}?",
        f"the {best}",
    )


def _is_colour(rng: random.Random) -> Fact:
    word = rng.choice(COLOURS if rng.random() < 0.5 else SHAPES + WORDS)
    asked = (f"Is {word} a colour?", f"Is the word {word} the name of a colour?")
    return rng.choice(asked), "yes" if word in COLOURS else "no"


def _is_shape(rng: random.Random) -> Fact:
    word = rng.choice(SHAPES if rng.random() < 0.5 else COLOURS + ANIMALS)
    return f"Is {word} the name of a shape?", "yes" if word in SHAPES else "no"


def _kind_of_word(rng: random.Random) -> Fact:
    sort, words = rng.choice(
        (("colour", COLOURS), ("shape", SHAPES), ("animal", ANIMALS), ("food", FOODS),
         ("number", NUMBERS), ("day", DAYS), ("month", MONTHS[:4]))
    )  # fmt: skip
    word = rng.choice(words)
    sorts = "a colour, shape, animal, food, number, day or month"
    return f"What is {word}: {sorts}?", sort


def _typical(rng: random.Random) -> Fact:
    colour = rng.choice(list(TYPICAL))
    return f"What colour is {rng.choice(TYPICAL[colour])}?", colour


def _typical_check(rng: random.Random) -> Fact:
    colour, asked = rng.choice(COLOURS), rng.choice(COLOURS)
    if rng.random() < 0.4:
        asked = colour
    return (
        f"Is {rng.choice(TYPICAL[colour])} {asked}?",
        "yes" if asked == colour else "no",
    )


def _mixed(rng: random.Random) -> Fact:
    (a, b), result = rng.choice(list(MIXED.items()))
    if rng.random() < 0.5:
        a, b = b, a
    return f"Which colour do you get when you mix {a} and {b}?", result


def _letter_after(rng: random.Random) -> Fact:
    i = rng.randrange(25)
    if rng.random() < 0.5:
        return f"Which letter comes after {LETTERS[i]}?", LETTERS[i + 1]
    return f"Which letter comes before {LETTERS[i + 1]}?", LETTERS[i]


def _letters_go_on(rng: random.Random) -> Fact:
    i = rng.randrange(23)
    return f"What comes next: {', '.join(LETTERS[i : i + 3])}?", LETTERS[i + 3]


def _first_letter(rng: random.Random) -> Fact:
    word = rng.choice(WORDS + SHAPES + COLOURS)
    end, letter = rng.choice((("first", word[0]), ("last", word[-1])))
    return f"What is the {end} letter of {word}?", letter


def _word_length(rng: random.Random) -> Fact:
    word = rng.choice(WORDS + COLOURS)
    return f"How many letters does the word {word} have?", str(len(word))


def _spelled(rng: random.Random) -> Fact:
    word = rng.choice(WORDS + COLOURS + SHAPES)
    if rng.random() < 0.5:
        return f"Spell {word}.", " ".join(word.upper())
    return f"Which word is {' '.join(word.upper())}?", word


def _joined(rng: random.Random) -> Fact:
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))
    return f"Join the letters {', '.join(word)}.", word


def _alphabetical(rng: random.Random) -> Fact:
    a, b = rng.sample(WORDS, 2)
    return f"Which comes first in the alphabet, {a} or {b}?", min(a, b)


def _day(rng: random.Random) -> Fact:
    i = rng.randrange(7)
    if rng.random() < 0.5:
        return f"Which day comes after {DAYS[i]}?", DAYS[(i + 1) % 7]
    return f"Which day comes before {DAYS[i]}?", DAYS[i - 1]


def _month(rng: random.Random) -> Fact:
    i = rng.randrange(12)
    return f"Which month comes after {MONTHS[i]}?", MONTHS[(i + 1) % 12]


def _opposite(rng: random.Random) -> Fact:
    a, b = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        a, b = b, a
    return f"What is the opposite of {a}?", b


def _colour_of_phrase(rng: random.Random) -> Fact:
    """Reading the words alone: the text half of the picture tasks."""
    colour, shape = _pair(rng)
    what = with_article(f"{colour} {shape}")
    if rng.random() < 0.5:
        return f"I have {what}. What colour is it?", colour
    return f"I have {what}. What shape is it?", shape


def _count_in_phrase(rng: random.Random) -> Fact:
    things = [rng.choice(SHAPES) for _ in range(rng.randint(1, 4))]
    shape = rng.choice(things) if rng.random() < 0.7 else rng.choice(SHAPES)
    said = listed([with_article(thing) for thing in things])
    return f"There is {said}. How many {shape}s are there?", str(things.count(shape))


def _order_in_phrase(rng: random.Random) -> Fact:
    colours = rng.sample(COLOURS, rng.randint(2, 4))
    end, answer = rng.choice((("first", colours[0]), ("last", colours[-1])))
    return f"In the list {listed(colours)}, which colour is {end}?", answer


def _repeat(rng: random.Random) -> Fact:
    words = rng.sample(WORDS, rng.randint(1, 3))
    return f"Say {' '.join(words)}.", " ".join(words)


def _greeting(rng: random.Random) -> Fact:
    pairs = (
        ("Hello!", "Hello. Show me a picture and ask me about it."),
        ("Hi", "Hello. Show me a picture and ask me about it."),
        ("Who are you?", "I am mm1-tiny, a small model that looks at pictures."),
        ("What are you?", "I am mm1-tiny, a small model that looks at pictures."),
        ("What is your name?", "mm1-tiny"),
        (
            "What can you do?",
            "I can describe, count and compare coloured shapes, and read digits and "
            "short words.",
        ),
        (
            "What do you know?",
            "I know coloured shapes, digits and short words in pictures.",
        ),
        ("Thank you.", "You are welcome."),
        ("Thanks", "You are welcome."),
    )
    return rng.choice(pairs)


_FACTS: tuple[Callable[[random.Random], Fact], ...] = (
    _plus, _minus, _next_number, _go_on, _larger, _number_word, _corners, _points,
    _more_corners, _is_colour, _is_shape, _kind_of_word, _typical, _typical_check,
    _mixed, _letter_after, _letters_go_on, _first_letter, _word_length, _spelled,
    _spelled, _joined, _joined, _alphabetical, _day, _month, _opposite,
    _colour_of_phrase, _count_in_phrase, _order_in_phrase, _repeat, _greeting,
)  # fmt: skip


def _pair(rng: random.Random) -> tuple[str, str]:
    return rng.choice(TRAINING_PAIRS)


def text_only(rng: random.Random) -> Fact:
    """A question and its answer that need no picture."""
    question, answer = rng.choice(_FACTS)(rng)
    return voiced(question, rng), answer


def sentence(rng: random.Random) -> str:
    """A plain true sentence."""
    colour = rng.choice(COLOURS)
    shape = rng.choice(SHAPES)
    i, j = rng.randrange(7), rng.randrange(25)
    n = rng.randrange(10)
    (a, b), mixed = rng.choice(list(MIXED.items()))
    known, corners = rng.choice(list(CORNERS.items()))
    said = "no corners" if corners == 0 else f"{NUMBERS[corners]} corners"
    choices = (
        f"{rng.choice(TYPICAL[colour])} is {colour}.",
        f"{with_article(known)} has {said}.",
        f"{DAYS[i]} comes before {DAYS[(i + 1) % 7]}.",
        f"the letter {LETTERS[j + 1]} follows the letter {LETTERS[j]}.",
        f"{NUMBERS[n + 1]} is one more than {NUMBERS[n]}.",
        f"{a} and {b} together make {mixed}.",
        f"{colour} is a colour, and {shape} is the name of a shape.",
        "what is left of a thing is not right of it.",
        f"we count {', '.join(NUMBERS[1 : n + 2])}.",
        f"the word {(word := rng.choice(WORDS))} is written {' '.join(word.upper())}.",
        f"{with_article(rng.choice(ANIMALS))} is an animal.",
        f"{listed(rng.sample(COLOURS, 3))} are colours.",
    )
    text = rng.choice(choices)
    text = text[0].upper() + text[1:]
    return text.replace("colour", "color") if rng.random() < 0.5 else text
