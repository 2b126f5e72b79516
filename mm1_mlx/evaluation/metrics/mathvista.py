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
# "the answer is", "answer:", "final answer =": what follows the last of them counts.
_TELLS = re.compile(r"(?:answer|result)(?:\s+is)?\s*[:=]?\s+|=\s*", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-Za-z])\)|(?<![\w'])([A-Z])(?![\w'])")


def extract(text: str, sample: Sample) -> str:
    """The answer in a text, by our rule, not the benchmark's model.

    In order: the whole text if it is a choice or a number; else what follows the
    last "answer is", "answer:" or "="; there the last of what is asked for: a choice's
    letter or text, a number, a list in brackets; else the same in the whole text.
    Nothing found: the text itself, which `comparable` then judges.
    """
    text = text.strip().strip("\"'").removesuffix(".").strip()
    tells = list(_TELLS.finditer(text))
    ends = [text[tells[-1].end() :].strip(), text] if tells else [text]
    for end in ends:
        found = _asked_for(end, sample)
        if found is not None:
            return found
    return text


def _asked_for(text: str, sample: Sample) -> str | None:
    if sample.fields.get("question_type") == "multi_choice" or sample.choices:
        return _choice(text, sample.choices)
    kind = sample.fields.get("answer_type")
    if kind == "list":
        lists = _LIST.findall(text)
        return lists[-1] if lists else None
    if kind in ("integer", "float"):
        found = [match.group() for match in _NUMBER.finditer(text) if match.group()]
        found = [number for number in found if any(map(str.isdigit, number))]
        return found[-1].replace(",", "").lstrip("+") if found else None
    return None


def _choice(text: str, choices: Sequence[str]) -> str | None:
    """A choice that the text names: by its letter, or else by its words."""
    whole = [choice for choice in choices if choice.lower() == text.lower()]
    if whole:
        return whole[0]
    named = [bracket or bare for bracket, bare in _LETTER.findall(text)]
    letters = [LETTERS.find(letter.upper()) for letter in named]
    # "A" opens sentences: a letter alone, in brackets or last counts, or any but A.
    letters = [i for i in letters if i < len(choices)]
    if letters and (letters[-1] > 0 or len(text.split()) == 1 or "(" in text):
        return choices[letters[-1]]
    places = [(text.lower().rfind(choice.lower()), choice) for choice in choices]
    place, choice = max(places, key=lambda pair: (pair[0], len(pair[1])))
    if place >= 0:
        return choice
    return choices[letters[-1]] if letters else None


def comparable(extracted: str, sample: Sample) -> str | None:
    """The extracted answer as the benchmark compares it; None if it cannot be one.

    Choices: a letter stands for its text, anything else for the choice with the
    smallest edit distance. Numbers: as integer, or with `fields["precision"]`
    decimals.
    """
    if sample.fields.get("question_type") == "multi_choice" or sample.choices:
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
        same(comparable(str(one.value), one.sample), one.sample) for one in answered
    ]
    return share(answered, right)
