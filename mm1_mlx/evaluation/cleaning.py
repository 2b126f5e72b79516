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
_SAID = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*(\(?([A-Z])\b(?!').*)")
# "A" and "I" are words, too: a mark, the end, or a reason behind one makes it a letter.
_LETTER_ALONE = re.compile(
    r"\(|[A-Z]\s*(?:[^\w\s]|$)|[A-Z]\s+(?:because|since|as|for)\b"
)
_STANDING = re.compile(r"(?<![\w'])[A-HJ-Z](?![\w'])")


def letter(text: str, sample: Sample) -> str | None:
    """The letter of a choice, or None: ours.

    "B", "B.", "(B)", "B: a cat", "The answer is B", or the whole text of a choice, also
    behind "the answer is"; else the one letter or the one choice that is named. A
    letter that no choice has is None. MM1.5 counts exact letters alone; models that
    were not tuned on such prompts also get the other forms.
    """
    said = first_line(text, sample)
    names = LETTERS[: len(sample.choices) or len(LETTERS)]
    if (opens := _OPENING.match(said)) and opens.group(1).upper() in names:
        return opens.group(1).upper()
    if told := _SAID.search(said):
        behind, named = told.groups()
        if (whole := _of_words(behind, sample.choices)) is not None:
            return whole
        if named in names and (named not in "AI" or _LETTER_ALONE.match(behind)):
            return named
    if (whole := _of_words(said, sample.choices)) is not None:
        return whole
    standing = set(_STANDING.findall(said)) & set(names)
    if len(standing) == 1 and "A" not in standing:
        return standing.pop()
    within = [
        name
        for name, choice in zip(LETTERS, sample.choices, strict=False)
        if re.search(rf"(?<!\w){re.escape(choice.strip().lower())}(?!\w)", said.lower())
    ]
    return within[0] if len(within) == 1 else None


def _of_words(said: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a text is, word for word."""
    plain = said.removesuffix(".").strip().lower()
    for name, choice in zip(LETTERS, choices, strict=False):
        if choice.strip().removesuffix(".").lower() == plain:
            return name
    return None


# What stands around a letter of MMBench's rule, in the order in which it looks.
_AROUND = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ").")),
    *(("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."), (":", ")")),
    (":", ")."),
)


def mmbench_letter(text: str, sample: Sample) -> str | None:
    """Rule of MMBench, then `letter` where MMBench asks ChatGPT which choice is meant.

    MMBench (lmms-eval's mmbench_evals.py, can_infer): the one letter of A to E that
    stands alone, or with one of a few marks, where "A" in more than three words may be
    an article; else the one choice whose words are part of the text.
    """
    words = text.split()
    alone = [name for name in LETTERS[:5] if name in words]
    found = alone if alone != ["A"] or len(words) <= 3 else []
    for before, behind in _AROUND:
        if len(found) == 1:
            break
        found = [n for n in LETTERS[:5] if f"{before}{n}{behind}" in words]
    if len(found) == 1:
        return found[0] if found[0] in LETTERS[: len(sample.choices)] else None
    said = text.lower()
    told = [
        n for n, c in zip(LETTERS, sample.choices, strict=False) if c.lower() in said
    ]
    return told[0] if len(told) == 1 else letter(text, sample)


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
