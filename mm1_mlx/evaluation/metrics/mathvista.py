"""MathVista: choices, whole numbers, decimals, lists.

The benchmark has a language model find the answer in what was said, and compares by
rule. Here both are rules: `extract` is ours and takes the model's place (label such
figures "our extraction"); `comparable` and `same` are the benchmark's own
(lupantech/MathVista, evaluation/calculate_score.py).
"""

import re
from collections.abc import Sequence

from mm1_mlx.evaluation.metrics.anls import edit_distance
from mm1_mlx.evaluation.metrics.choices import LETTERS
from mm1_mlx.evaluation.metrics.scores import share
from mm1_mlx.evaluation.samples import Answered, Sample, Score

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:e[-+]?\d+)?")
_LIST = re.compile(r"\[[^\[\]]*\]")
# "the answer is", "answer:", "the right option is", "final answer =": what follows the
# last of them counts.
_TELLS = re.compile(
    r"(?:(?:answer|result)(?:\s+is)?|(?:option|choice)\s+is)\s*[:=]?\s+|=\s*",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\(([A-Za-z])\)|(?<![\w'])([A-Z])(?![\w'])")


def extract(text: str, sample: Sample) -> str:
    """The answer in a text, by our rule, not the benchmark's model.

    What is asked for is a choice's letter or text, a number, or a list in brackets:
    the first of them after the last "answer is", "answer:" or "=", else the last of
    them in the whole text. Nothing found: the text itself, which `comparable` judges.
    """
    text = text.strip().strip("\"'").removesuffix(".").strip()
    tells = list(_TELLS.finditer(text))
    found = []
    if tells:
        behind = text[tells[-1].end() :].strip()
        if sample.choices:  # what comes later may name the wrong ones
            found = _asked_for(re.split(r"[.;]\s|\n", behind)[0], sample)
        found = found or _asked_for(behind, sample)[:1]
    found = found or _asked_for(text, sample)
    return found[-1] if found else text


def _asked_for(text: str, sample: Sample) -> list[str]:
    """Everything in a text that has the form of the answer."""
    if sample.choices:
        choice = _choice(text, sample.choices)
        return [] if choice is None else [choice]
    kind = sample.fields.get("answer_type")
    if kind == "list":
        return _LIST.findall(text)
    if kind in ("integer", "float"):
        numbers = (match.group() for match in _NUMBER.finditer(text))
        return [n.replace(",", "").lstrip("+") for n in numbers if n.strip("+-")]
    return []


def _choice(text: str, choices: Sequence[str]) -> str | None:
    """A choice that the text names: by its words alone, by a letter, or among words."""
    for choice in choices:
        if choice.lower() == text.lower():
            return choice
    named = [bracketed or bare for bracketed, bare in _LETTER.findall(text)]
    places = [LETTERS.find(letter.upper()) for letter in named]
    places = [i for i in places if i < len(choices)]
    # "A" also opens sentences: it counts in brackets, or alone.
    if places and (places[-1] > 0 or "(" in text or len(text.split()) == 1):
        return choices[places[-1]]
    found = [(text.lower().rfind(choice.lower()), choice) for choice in choices]
    place, choice = max(found, key=lambda pair: (pair[0], len(pair[1])))
    if place >= 0:
        return choice
    return choices[places[-1]] if places else None


def comparable(extracted: str, sample: Sample) -> str | None:
    """The extracted answer as the benchmark compares it; None if it cannot be one.

    Choices: a letter stands for its text, anything else for the choice with the
    smallest edit distance. Numbers: as integer, or with `fields["precision"]`
    decimals.
    """
    if sample.choices:
        return nearest_choice(extracted.strip(), sample.choices)
    kind = sample.fields.get("answer_type")
    try:
        if kind == "integer":
            return str(int(float(extracted)))
        if kind == "float":
            return str(round(float(extracted), int(sample.fields["precision"])))
    except (ValueError, OverflowError):
        return None
    return extracted


def nearest_choice(said: str, choices: Sequence[str]) -> str:
    """The choice that a letter names, (A) in brackets or A alone, or the nearest."""
    bracketed = re.findall(r"\(([a-zA-Z])\)", said)
    if bracketed:
        said = bracketed[0].upper()
    letters = list(LETTERS[: len(choices)])
    if said in letters:
        return choices[letters.index(said)]
    return min(choices, key=lambda choice: edit_distance(said, choice))


def same(value: str | None, sample: Sample) -> bool:
    """Whether a comparable answer is the reference, a choice's text or a number.

    A reference that is the letter of a choice stands for the choice's text.
    """
    right = sample.answers[0]
    letters = list(LETTERS[: len(sample.choices)])
    if right not in sample.choices and right in letters:
        right = sample.choices[letters.index(right)]
    return value == right


def mathvista_accuracy(answered: Sequence[Answered]) -> Score:
    """The share of right answers in percent. The value is what `extract` gives."""
    right = [
        one.value is not None
        and same(comparable(str(one.value), one.sample), one.sample)
        for one in answered
    ]
    return share(answered, right)
