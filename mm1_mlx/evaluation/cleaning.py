"""From what a model said to the value that a metric compares: one rule per task.

Each is `(text, sample) -> value`. "Rule of X" names the program whose rule it is;
the others are ours.
"""

import re
import string
from collections.abc import Sequence

from mm1_mlx.evaluation.metrics import mathvista as mathvista_rules
from mm1_mlx.evaluation.metrics import open_answers
from mm1_mlx.evaluation.metrics.choices import LETTERS, is_open
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.evaluation.stemming import stem, stems_of


def stripped(text: str, sample: Sample) -> str:
    """The text without space around it."""
    return text.strip()


def first_line(text: str, sample: Sample) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def short_answer(text: str, sample: Sample) -> str:
    """The first line without a full stop at its end: "Yes." is the answer Yes."""
    return first_line(text, sample).removesuffix(".").rstrip()


# --- captions and short answers of pretrained models ---


def caption(text: str, sample: Sample) -> str:
    """The first line without quotation marks.

    OpenFlamingo cuts at its next "Output" and drops the marks; MM1's prompt ("A photo
    of") ends a caption at the line.
    """
    return first_line(openflamingo_caption(text, sample), sample)


def openflamingo_caption(text: str, sample: Sample) -> str:
    """Rule of OpenFlamingo: what comes before "Output", without quotation marks."""
    return text.split("Output", 1)[0].replace('"', "")


def openflamingo_vqa(text: str, sample: Sample) -> str:
    """Rule of OpenFlamingo: cut at "Question", "Answer" or "Short", then at ", "."""
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0]


def okvqa(text: str, sample: Sample) -> str:
    """OpenFlamingo's cut, then stems, to be compared with stems.

    An answer that people gave becomes the stem that stands for theirs. Anything else
    goes through `stemming.stem`, which is ours: the original asks a tagger and WordNet.
    """
    answer = openflamingo_vqa(text, sample)
    said = answer.strip().lower()
    for written, stemmed in zip(sample.answers, stems_of(sample), strict=True):
        if written.strip().lower() == said:
            return stemmed
    return stem(answer)


# --- yes or no ---


def mme_yes_or_no(text: str, sample: Sample) -> str:
    """Rule of MME's evaluation: "yes", "no" or "other", from the first four characters.

    A single y or n counts.
    """
    said = text.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope_yes_or_no(text: str, sample: Sample) -> str:
    """Rule of POPE's script: "no" if the first sentence has No, no or not."""
    words = text.strip().split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


# --- multiple choice ---

_NO_MARKS = str.maketrans("", "", string.punctuation)
_OPENING = re.compile(r"\(?([A-Za-z])(?:[).:,]|$)")
_SAID = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-Z])\b(?!')")


def letter(text: str, sample: Sample) -> str | None:
    """The letter of a choice, or None: ours.

    "B", "B.", "(B)", "B: a cat", "The answer is B", or the whole text of a choice.
    A letter that no choice has is None. It stands where MMBench asks ChatGPT which
    choice is meant. MM1.5 counts exact letters alone; models that were not tuned on
    such prompts also get the other forms.
    """
    said = first_line(text, sample)
    n = len(sample.choices) or len(LETTERS)
    match = _OPENING.match(said) or _SAID.search(said)
    if match:
        found = match.group(1).upper()
        if LETTERS.index(found) < n:
            return found
    plain = said.removesuffix(".").strip().lower()
    for name, choice in zip(LETTERS, sample.choices, strict=False):
        if choice.strip().removesuffix(".").lower() == plain:
            return name
    return None


def exact_letter(text: str, sample: Sample) -> str | None:
    """The text if it is nothing but a letter, as MM1.5 counts it, else None."""
    said = text.strip().upper()
    return said if len(said) == 1 and said in LETTERS else None


def scienceqa_letter(text: str, sample: Sample) -> str | None:
    """Rule of LLaVA for ScienceQA (llava/eval/eval_science_qa.py).

    "B", a text that opens with "B. ", or one "The answer is B." in it: with a
    character behind the letter, and not said twice. Else, and for a letter that no
    choice has, None, which is wrong; LLaVA calls it FAILED.
    """
    said, names = text.strip(), tuple("ABCDE")
    if said in names:
        found = said
    elif said.startswith(names) and said[1:3] == ". ":
        found = said[0]
    else:
        told = re.findall("The answer is ([A-Z]).", said)
        found = told[0] if len(told) == 1 else None
    return found if found in names[: len(sample.choices) or None] else None


def ai2d_letter(text: str, sample: Sample) -> str | None:
    """Rule of lmms-eval for AI2D: a text that opens with "B.", or a letter and marks
    alone, as "(b)"; else None."""
    said = text.strip()
    if opens := re.match(r"([A-Z])\.", said):
        return opens.group(1)
    left = said.translate(_NO_MARKS).upper()
    return left if len(left) == 1 and left in LETTERS else None


def seed_letter(text: str, sample: Sample) -> str | None:
    """Rule of lmms-eval for SEED: the first character."""
    return text.strip()[:1].upper() or None


def mmmu(text: str, sample: Sample) -> str | list[str | float] | None:
    """Rule of lmms-eval for MMMU's letters, MMMU's own for open answers: all that one
    may mean.

    Both draw a letter at random where they find none; here that is None, which is
    wrong: a run gives the same figure twice.
    """
    if is_open(sample):
        return open_answers.parse(text)
    return mmmu_letter(text, sample.choices)


def mmmu_letter(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names as "(B)", else "B ", else "B.", else by its words.

    Of several the last one; of "B " and "B." those count as later that stand alone.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(choices)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if named := [name for name in letters if form.format(name) in text]:
            return max(named, key=lambda name: text.rfind(place.format(name)))
    if len(text.split()) <= 5:
        return None
    said, by_name = text.lower(), dict(zip(letters, choices, strict=True))
    told = [name for name in letters if by_name[name].lower() in said]
    return max(told, key=lambda name: said.rfind(by_name[name].lower()), default=None)


def mathvista(text: str, sample: Sample) -> str:
    """The answer in a text by our rule; the benchmark asks a language model."""
    return mathvista_rules.extract(text, sample)
