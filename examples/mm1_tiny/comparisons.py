"""Questions about two scenes that need a look at both."""

import random

from examples.mm1_tiny import wordings as w
from examples.mm1_tiny.questions import Question, phrase, yes
from examples.mm1_tiny.scenes import COLOURS, SHAPES, Scene, allowed_pairs

FIRST, SECOND, BOTH, NEITHER = "the first", "the second", "both", "neither"
Kind = tuple[str | None, str | None]


def _kinds(first: Scene, second: Scene, pairs: str) -> list[Kind]:
    """What may be counted: anything, a colour, a shape, a pair near the scenes."""
    things = (*first.things, *second.things)
    colours = {thing.colour for thing in things}
    shapes = {thing.shape for thing in things}
    there = {thing.pair for thing in things}
    near = [
        pair
        for pair in allowed_pairs(pairs)
        if (pair[0] in colours and pair[1] in shapes) or pair in there
    ]
    return [
        (None, None),
        *((colour, None) for colour in COLOURS),
        *((None, shape) for shape in SHAPES),
        *sorted({*near, *there}),
    ]


def _plural(kind: Kind, rng: random.Random) -> str:
    if kind == (None, None):
        return w.noun(rng) + "s"
    return phrase(*kind, rng, plural=True)


def _pick(
    groups: dict[str, list[Kind]], rng: random.Random, weights: dict[str, float]
) -> tuple[str, Kind] | None:
    """An answer by weight among the possible ones, then something that has it."""
    possible = [answer for answer, kinds in groups.items() if kinds]
    if not possible:
        return None
    answer = rng.choices(possible, [weights.get(p, 1.0) for p in possible])[0]
    kinds = groups[answer]
    # Colours are many and pairs are more: choose the sort of thing first.
    sorts: dict[tuple[bool, bool], list[Kind]] = {}
    for kind in kinds:
        sorts.setdefault((kind[0] is None, kind[1] is None), []).append(kind)
    return answer, rng.choice(sorts[rng.choice(sorted(sorts))])


def _more(first: Scene, second: Scene, rng: random.Random, pairs: str) -> Question:
    fewer = rng.random() < 0.25
    groups: dict[str, list[Kind]] = {FIRST: [], SECOND: [], NEITHER: []}
    empty = []
    for kind in _kinds(first, second, pairs):
        a, b = first.count(*kind), second.count(*kind)
        if a == b == 0:
            empty.append(kind)
        else:
            answer = NEITHER if a == b else FIRST if (a > b) != fewer else SECOND
            groups[answer].append(kind)
    if not groups[NEITHER] or rng.random() < 0.2:
        groups[NEITHER] = empty
    # "Neither" can always be asked for, the other two cannot.
    picked = _pick(groups, rng, {NEITHER: 0.75})
    assert picked  # "neither" always has kinds: seven colours, at most eight things
    question = w.fill(w.FEWER if fewer else w.MORE, rng, whats=_plural(picked[1], rng))
    return Question("compare", question, picked[0])


def _same_number(
    first: Scene, second: Scene, rng: random.Random, pairs: str
) -> Question | None:
    groups: dict[str, list[Kind]] = {"yes": [], "no": []}
    for kind in _kinds(first, second, pairs):
        a, b = first.count(*kind), second.count(*kind)
        if a or b:
            groups[yes(a == b)].append(kind)
    picked = _pick(groups, rng, {"yes": 1.35})
    if picked is None:
        return None
    question = w.fill(w.SAME_NUMBER, rng, whats=_plural(picked[1], rng))
    return Question("compare", question, picked[0])


def _where(first: Scene, second: Scene, kind: Kind) -> str:
    a, b = first.count(*kind) > 0, second.count(*kind) > 0
    return BOTH if a and b else FIRST if a else SECOND if b else NEITHER


def _groups_by_place(first: Scene, second: Scene, pairs: str) -> dict[str, list[Kind]]:
    groups: dict[str, list[Kind]] = {FIRST: [], SECOND: [], BOTH: [], NEITHER: []}
    for kind in _kinds(first, second, pairs)[1:]:
        groups[_where(first, second, kind)].append(kind)
    return groups


def _both(first: Scene, second: Scene, rng: random.Random, pairs: str) -> Question:
    groups = _groups_by_place(first, second, pairs)
    nothing = groups[NEITHER] if rng.random() < 0.4 else []
    one = groups[FIRST] + groups[SECOND] or nothing or groups[NEITHER]
    merged = {"yes": groups[BOTH], "no": nothing or one}
    picked = _pick(merged, rng, {"yes": 1.6})
    assert picked
    a_what = w.with_article(phrase(*picked[1], rng))
    return Question("compare", w.fill(w.BOTH, rng, a_what=a_what), picked[0])


def _which(first: Scene, second: Scene, rng: random.Random, pairs: str) -> Question:
    groups = _groups_by_place(first, second, pairs)
    picked = _pick(groups, rng, {NEITHER: 0.6, BOTH: 1.2})
    assert picked
    a_what = w.with_article(phrase(*picked[1], rng))
    return Question("compare", w.fill(w.WHICH, rng, a_what=a_what), picked[0])


def _same_look(first: Scene, second: Scene, rng: random.Random, pairs: str):
    if len(first.things) != 1 or len(second.things) != 1:
        return None
    a, b = first.things[0], second.things[0]
    if rng.random() < 0.5:
        templates, same = w.SAME_COLOUR, a.colour == b.colour
    else:
        templates, same = w.SAME_SHAPE, a.shape == b.shape
    thing = w.noun(rng, shape=False)
    question = w.fill(templates, rng, thing=thing, things=thing + "s")
    return Question("compare", question, yes(same))


def compare(
    first: Scene, second: Scene, rng: random.Random, *, pairs: str = "training"
) -> list[Question]:
    """Four to six questions about two scenes; each stands by itself."""
    found: dict[str, Question] = {}
    for asker in (_more, _more, _same_number, _both, _which, _same_look):
        question = asker(first, second, rng, pairs)
        if question:
            found[question.question.lower().rstrip("?. ")] = question
    questions = list(found.values())
    rng.shuffle(questions)
    return questions
