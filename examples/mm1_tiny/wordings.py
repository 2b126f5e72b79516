"""The many ways to ask the same thing, and the few ways to answer.

In a template `{place}` may become " in the picture" or " in the second picture",
`{picture}` "the picture" or "the second picture"; `{thing}` and `{things}` become one
of the words of NOUNS. The rest is filled by the caller.
"""

import random
from collections.abc import Sequence

NOUNS = ("thing", "object", "item", "shape")
PICTURE_WORDS = ("picture", "picture", "image", "photo")

COUNT = (
    "How many {things} are there{place}?",
    "How many {things} are{place_or_there}?",
    "How many {things} do you see{place}?",
    "How many {things} can you see{place}?",
    "Count the {things}{place}.",
    "What is the number of {things}{place}?",
    "How many {things} does {picture} show?",
    "How many {things} does {picture} have?",
    "What number of {things} is there{place}?",
    "Tell me how many {things} there are{place}.",
    "Tell me the number of {things}{place}.",
    "Number of {things}{place}?",
)
COLOUR = (
    "What colour is the {what}{place}?",
    "What is the colour of the {what}{place}?",
    "Which colour is the {what}{place}?",
    "Which colour does the {what}{place} have?",
    "What colour does the {what}{place} have?",
    "Tell me the colour of the {what}{place}.",
    "Name the colour of the {what}{place}.",
    "The {what}{place} is what colour?",
    "Of what colour is the {what}{place}?",
    "What's the colour of the {what}{place}?",
)
COLOURS_OF_MANY = (
    "What colours are the {what}{place}?",
    "What are the colours of the {what}{place}?",
    "Which colours are the {what}{place}?",
    "Which colours do the {what}{place} have?",
    "Tell me the colours of the {what}{place}.",
    "Name the colours of the {what}{place} from left to right.",
    "From left to right, what colours are the {what}{place}?",
)
SHAPE = (
    "What shape is the {what}{place}?",
    "What is the shape of the {what}{place}?",
    "Which shape is the {what}{place}?",
    "Which shape does the {what}{place} have?",
    "What shape does the {what}{place} have?",
    "Tell me the shape of the {what}{place}.",
    "Name the shape of the {what}{place}.",
    "The {what}{place} has what shape?",
    "What kind of shape is the {what}{place}?",
    "What's the shape of the {what}{place}?",
)
SHAPES_OF_MANY = (
    "What shapes are the {what}{place}?",
    "What are the shapes of the {what}{place}?",
    "Which shapes are the {what}{place}?",
    "Which shapes do the {what}{place} have?",
    "Tell me the shapes of the {what}{place}.",
    "Name the shapes of the {what}{place} from left to right.",
    "From left to right, what shapes are the {what}{place}?",
)
EXISTENCE = (
    "Is there {a_what}{place}?",
    "Is there {a_what}{place}?",
    "Is {a_what} there{place}?",
    "Can you see {a_what}{place}?",
    "Do you see {a_what}{place}?",
    "Does {picture} show {a_what}?",
    "Does {picture} have {a_what}?",
    "Does {picture} contain {a_what}?",
    "Is {a_what} shown{place}?",
    "Is {a_what} present{place}?",
    "Are there any {whats}{place}?",
    "Do you see any {whats}{place}?",
)
POSITION = (
    "Where is the {what}{place}?",
    "Where is the {what}{place}?",
    "Where can I find the {what}{place}?",
    "Where's the {what}{place}?",
    "In which part of {picture} is the {what}?",
    "What part of {picture} is the {what} in?",
    "Where do you see the {what}{place}?",
    "Tell me where the {what} is{place}.",
    "What is the position of the {what}{place}?",
    "Name the position of the {what}{place}.",
    "Which part of {picture} has the {what}?",
)
_RELATION = (
    "Is the {a} {relation} the {b}{place}?",
    "Is the {a} {relation} the {b}{place}?",
    "Does the {a} stand {relation} the {b}{place}?",
    "Would you say the {a} is {relation} the {b}{place}?",
    "Do you see the {a} {relation} the {b}{place}?",
    "Is it true that the {a} is {relation} the {b}{place}?",
    "Tell me if the {a} is {relation} the {b}{place}.",
    "The {a} is {relation} the {b}{place}, yes or no?",
)
RELATION = {
    "left": ("left of", "to the left of", "on the left of", "further left than"),
    "right": ("right of", "to the right of", "on the right of", "further right than"),
    "above": ("above", "above", "over", "higher than"),
    "below": ("below", "below", "under", "lower than"),
}
RELATION_QUESTIONS = _RELATION
CAPTION = (
    "Describe {picture}.",
    "Describe {picture}.",
    "What is shown{place}?",
    "What is{place_or_there}?",
    "What do you see{place}?",
    "What can you see{place}?",
    "What does {picture} show?",
    "Tell me what you see{place}.",
    "What {things} are there{place}?",
    "Which {things} are there{place}?",
    "List the {things}{place}.",
    "List everything{place_needed}.",
    "Caption {picture}.",
    "Write a caption for {picture}.",
    "What is {picture} of?",
)
MORE = (
    "Which {word} has more {whats}?",
    "Which {word} has more {whats}?",
    "Which of the two {word}s has more {whats}?",
    "In which {word} are there more {whats}?",
    "Which {word} shows more {whats}?",
    "Where are there more {whats}, in the first or the second {word}?",
    "Are there more {whats} in the first or in the second {word}?",
    "More {whats}: which {word}?",
    "Which {word} has the most {whats}?",
)
FEWER = (
    "Which {word} has fewer {whats}?",
    "Which of the two {word}s has fewer {whats}?",
    "In which {word} are there fewer {whats}?",
    "Which {word} shows fewer {whats}?",
    "Where are there fewer {whats}, in the first or the second {word}?",
    "Are there fewer {whats} in the first or in the second {word}?",
)
SAME_NUMBER = (
    "Do both {word}s have the same number of {whats}?",
    "Do the two {word}s have the same number of {whats}?",
    "Do the {word}s show equally many {whats}?",
    "Are there as many {whats} in the first {word} as in the second?",
    "Is the number of {whats} the same in both {word}s?",
    "Does the first {word} have as many {whats} as the second?",
    "Does each {word} have the same number of {whats}?",
)
BOTH = (
    "Is there {a_what} in both {word}s?",
    "Do both {word}s have {a_what}?",
    "Do both {word}s show {a_what}?",
    "Is {a_what} in each of the two {word}s?",
    "Can you see {a_what} in both {word}s?",
    "Does each {word} have {a_what}?",
    "Do the two {word}s both contain {a_what}?",
)
WHICH = (
    "Which {word} has {a_what}?",
    "Which {word} shows {a_what}?",
    "In which {word} is there {a_what}?",
    "Which of the two {word}s has {a_what}?",
    "Which {word} contains {a_what}?",
    "In which {word} do you see {a_what}?",
)
SAME_COLOUR = (
    "Is the {thing} in both {word}s the same colour?",
    "Do the two {word}s show the same colour?",
    "Are the {things} in the two {word}s the same colour?",
    "Do the {things} in both {word}s have the same colour?",
    "Is the colour the same in both {word}s?",
    "Does the {thing} in the first {word} have the same colour as in the second?",
)
SAME_SHAPE = (
    "Is the {thing} in both {word}s the same shape?",
    "Do the two {word}s show the same shape?",
    "Do the {things} in both {word}s have the same shape?",
    "Are the {things} in the two {word}s of the same shape?",
    "Is the shape the same in both {word}s?",
    "Does the {thing} in the first {word} have the same shape as in the second?",
)


def with_article(phrase: str) -> str:
    """ "an orange circle", "a red star"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def listed(phrases: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def noun(rng: random.Random, *, shape: bool = True) -> str:
    """A word for any thing; without "shape" where the question is about shapes."""
    return rng.choice(NOUNS if shape else NOUNS[:3])


def fill(
    templates: Sequence[str],
    rng: random.Random,
    which: str | None = None,
    **words: str,
) -> str:
    """One of the templates, filled.

    which: "first" or "second" where the question is about one of two pictures; then
        the question says so.
    words: the values of the template's own names; None of them may be "".
    """
    template = rng.choice(templates)
    word = rng.choice(PICTURE_WORDS)
    name = f"the {which} {word}" if which else f"the {word}"
    if not which and rng.random() < 0.1:
        name = f"this {word}"
    inside = f" in {name}"
    place = inside
    prefix = ""
    if which:
        if "{place" not in template and "{picture}" not in template:
            prefix = f"in {name}, "
        elif rng.random() < 0.25:
            prefix, place = f"in {name}, ", ""
            if "{picture}" in template or "_needed" in template:
                prefix, place = "", inside
    elif rng.random() < 0.7:
        place = rng.choice((" here", "", "", "", "", "")) if rng.random() < 0.3 else ""
    some = noun(rng)
    words = {"thing": some, "things": some + "s", "word": word, **words}
    text = template.format(
        place=place,
        place_or_there=place or " there",
        place_needed=place or " you see",
        picture=name,
        **words,
    )
    text = text.replace("there here", "here")
    if rng.random() < 0.4:
        text = text.replace("grey", "gray")
    return voiced(prefix + text[0].lower() + text[1:] if prefix else text, rng)


def voiced(text: str, rng: random.Random) -> str:
    """The text as different people type it: spelling, contractions, marks, capitals."""
    text = text[0].upper() + text[1:]
    if rng.random() < 0.5:
        text = text.replace("colour", "color").replace("Colour", "Color")
    if rng.random() < 0.25:
        for long, short in (("What is ", "What's "), ("Where is ", "Where's ")):
            if text.startswith(long):
                text = short + text[len(long) :]
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    elif rng.random() < 0.02:
        text = text.rstrip("?.") + " ?"
    if rng.random() < 0.015:
        text = text.upper()
    return text
