"""A second reading of mm1-tiny's questions: from the words and the scene alone.

It shares no code with the generator, so that a wrong template or a wrong answer shows.
"""

import re

COLOURS = (
    "red", "green", "blue", "yellow", "purple", "orange", "black", "white", "grey",
    "pink", "brown",
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "ring")


def _plain(question: str) -> str:
    text = question.lower().replace("color", "colour").replace("gray", "grey")
    text = text.rstrip("?. ")
    text = re.sub(r"\b(what|where)'s\b", r"\1 is", text)
    place = r"\bin (the|this) ?(first|second)? (picture|image|photo)\b,?"
    return re.sub(rf"{place}|\bhere$", "", text).strip()


def _described(text: str) -> tuple[str | None, str | None]:
    colour = re.search(rf"\b({'|'.join(COLOURS)})\b", text)
    shape = re.search(rf"\b({'|'.join(SHAPES)})s?\b", text)
    return colour and colour[1], shape and shape[1]


def _matching(scene, colour, shape) -> list:
    return [
        thing
        for thing in sorted(scene.things, key=lambda thing: thing.x)
        if colour in (None, thing.colour) and shape in (None, thing.shape)
    ]


def _by_place(text: str, scene):
    ends = {
        "leftmost": lambda t: t.x, "rightmost": lambda t: -t.x,
        "topmost|highest": lambda t: t.y, "bottommost|lowest": lambda t: -t.y,
    }  # fmt: skip
    for words, key in ends.items():
        if re.search(words, text):
            return [min(scene.things, key=key)]
    return None


def _and(words: list[str]) -> str:
    return " and ".join(", ".join(words).rsplit(", ", 1))


def _a(name: str) -> str:
    return f"an {name}" if name.startswith("orange") else f"a {name}"


def _count_answer(text: str, scene) -> str | None:
    if re.search(r"how many|count the|number", text):
        return str(len(_matching(scene, *_described(text))))
    return None


def _relation_answer(text: str, scene) -> str | None:
    relations = {
        r"(to the |on the |further )?left (of|than)": lambda a, b: b.x - a.x,
        r"(to the |on the |further )?right (of|than)": lambda a, b: a.x - b.x,
        r"above|over|higher than": lambda a, b: b.y - a.y,
        r"below|under|lower than": lambda a, b: a.y - b.y,
    }
    for words, gap in relations.items():
        parts = re.split(rf"\b(?:{words})\b", text)
        if len(parts) > 1:
            (a,), (b,) = (
                _matching(scene, *_described(p)) for p in (parts[0], parts[-1])
            )
            assert abs(gap(a, b)) >= 0.08
            return "yes" if gap(a, b) > 0 else "no"
    return None


def _position(scene, thing) -> str:
    across = thing.x / scene.width * 3
    down = thing.y / scene.height * 3
    for part, length in ((across, scene.width), (down, scene.height)):
        assert min(abs(part - 1), abs(part - 2)) * length / 3 >= 0.04 - 1e-9
    vertical = "top" if down < 1 else "bottom" if down > 2 else ""
    horizontal = "left" if across < 1 else "right" if across > 2 else ""
    return f"{vertical} {horizontal}".strip() or "middle"


def _name(colour: str | None, shape: str | None) -> str:
    return " ".join(word for word in (colour, shape or "thing") if word)


_BOX = r"<(\d+),(\d+),(\d+),(\d+)>"


def _square(scene, x: float, y: float) -> tuple[int, int]:
    """A place in hundredths of the square that the picture is padded to."""
    across = x + 0.5 - scene.width / 2
    down = y + 0.5 - scene.height / 2
    return min(max(int(100 * across), 0), 99), min(max(int(100 * down), 0), 99)


def _box_of(scene, thing) -> str:
    left, top, right, bottom = thing.box()
    corners = *_square(scene, left, top), *_square(scene, right, bottom)
    return "<{},{},{},{}>".format(*corners)


def _box_answer(text: str, scene) -> str | None:
    """Questions that a box or a point asks or answers."""
    if found := re.search(_BOX, text):
        (thing,) = {t for t in scene.things if _box_of(scene, t) == found[0]}
        return _a(f"{thing.colour} {thing.shape}")
    if found := re.search(r"<(\d+),(\d+)>", text):
        x, y = (int(n) for n in found.groups())

        def far(thing) -> float:
            px, py = _square(scene, thing.x, thing.y)
            return ((px - x) ** 2 + (py - y) ** 2) ** 0.5 / thing.radius

        thing = min(scene.things, key=far)
        assert far(thing) < 60  # well inside it
        return _a(f"{thing.colour} {thing.shape}")
    if re.search(r"\bboxes\b|\beach\b|^find all", text):
        things = _matching(scene, None, None)
        return _and(
            [f"{_a(f'{t.colour} {t.shape}')} {_box_of(scene, t)}" for t in things]
        )
    if re.search(r"\bbox\b|^find|^show me the|^draw", text):
        (thing,) = _matching(scene, *_described(text))
        return _box_of(scene, thing)
    if re.search(r"^point|point on|click", text):
        (thing,) = _matching(scene, *_described(text))
        return "<{},{}>".format(*_square(scene, thing.x, thing.y))
    return None


def answer_to(question: str, scene) -> str:
    """The answer to a question about one scene."""
    text = _plain(question)
    if answer := _box_answer(text, scene):
        return answer
    if answer := _count_answer(text, scene):
        return answer
    # "on the left of" is a relation, "from left to right" is an order.
    order = "from left to right" in text
    text = text.replace("from left to right", "")
    if not order and (answer := _relation_answer(text, scene)):
        return answer
    colour, shape = _described(text)
    found = _by_place(text, scene) or _matching(scene, colour, shape)
    if re.match(r"(is|are|can|do|does)\b", text):
        return "yes" if found else "no"
    if re.search(r"\bwhere\b|\bposition\b|\bpart of\b", text):
        if not found:
            return f"there is no {_name(colour, shape)}"
        (thing,) = found
        return _position(scene, thing)
    asks_colour = "colour" in text
    asks_shape = not asks_colour and re.search(
        r"shapes? (is|are|of|does|do)\b|what shape|which shape\b", text
    )
    is_list = re.search(r"^(what|which) (thing|object|item|shape)s are( there)?$", text)
    if is_list or not (asks_colour or asks_shape):
        names = [_a(f"{t.colour} {t.shape}") for t in _matching(scene, None, None)]
        if not names:
            return "nothing"
        return names[0] if len(names) == 1 else f"from left to right: {_and(names)}"
    if not found:
        return f"there is no {_name(colour, shape)}"
    assert len(found) == 1 or re.search("colours|shapes", text), text
    return _and([thing.colour if asks_colour else thing.shape for thing in found])


def answer_to_two(question: str, first, second) -> tuple[str, str]:
    """(kind of comparison, answer) for a question about two scenes."""
    text = question.lower().replace("color", "colour").replace("gray", "grey")
    text = text.rstrip("?. ")
    counts = [len(_matching(scene, *_described(text))) for scene in (first, second)]
    a, b = counts
    if re.search(r"\b(more|most|fewer)\b", text):
        fewer = "fewer" in text
        if a == b:
            return "fewer" if fewer else "more", "neither"
        best = "the first" if (a > b) != fewer else "the second"
        return "fewer" if fewer else "more", best
    if re.search(r"same number|equally many|as many|number of .* the same", text):
        return "same number", "yes" if a == b else "no"
    look = re.search(r"same (colour|shape)|(colour|shape) the same", text)
    if look:
        what = look[1] or look[2]
        (one,), (two,) = first.things, second.things
        same = getattr(one, what) == getattr(two, what)
        return "same look", "yes" if same else "no"
    if re.search(r"\bboth\b|\beach\b", text):
        return "both", "yes" if a and b else "no"
    assert re.search(r"\bwhich\b", text), text
    answers = {(True, True): "both", (True, False): "the first"}
    answers |= {(False, True): "the second", (False, False): "neither"}
    return "which", answers[a > 0, b > 0]
