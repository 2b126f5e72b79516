"""VQA accuracy: VQAv2, OK-VQA, TextVQA, VizWiz.

The figure is that of the official script (GT-Vision-Lab/VQA, vqaEval.py; BSD). How
answers are made alike before they are compared differs among the programs in use: a
Rule each, odd corners included, for published figures are made with them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mm1_mlx.evaluation.metrics.scores import average, said
from mm1_mlx.evaluation.samples import Answered, Score
from mm1_mlx.evaluation.stemming import stems_of

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The script hands a flag of re where the number of replacements belongs.
_PERIODS = int(re.UNICODE)  # 32
_ARTICLES = {"a", "an", "the"}
_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {name: str(value) for value, name in enumerate(_TEN.split())}
_NUMBERS["none"] = "0"
# Contractions without some of their apostrophes, and what they become. The script's
# own slips stay (somebody'd loses its apostrophe); entries that lower case never
# reaches (Id've, Im, Ive) are left out.
_PAIRS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't
couldn'tve:couldn't've couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't
hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd
hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't
mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't
mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't
ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've
she'dve:she'd've shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've
shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
someoned:someone'd someoned've:someone'd've someone'dve:someone'd've
someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll
thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're
theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll
theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've
weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've
whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're
whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've
wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've
youll:you'll youre:you're youve:you've
"""
_CONTRACTIONS = {
    short: long for short, _, long in (pair.partition(":") for pair in _PAIRS.split())
}


def normalize(text: str) -> str:
    """An answer as VQA's script compares it.

    Punctuation goes, number words become digits, articles go, contractions get their
    apostrophes, all in lower case.
    """
    return _words(_without_punctuation(_one_line(text)))


def normalize_evalai(text: str) -> str:
    """An answer as Pythia's copy of that script compares it, EvalAIAnswerProcessor.

    Commas and question marks go before all else, wherever they stand ("1,000" is 1000
    and "red,blue" redblue), and "'s" becomes a word of its own.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize(text.strip())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, one between words becomes a space.

    In a text with a comma between digits all of them just go.
    """
    numbers = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        goes = numbers or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


@dataclass(frozen=True)
class Rule:
    """How answers and references are made alike, both by `normalize`.

    always: else only where the references differ, as the official script does; an
    answer "Yes" is then wrong where all ten people wrote "yes".
    """

    normalize: Callable[[str], str]
    always: bool = True


# vqaEval.py of VQA, and Apple's axlearn (vision/metrics_vqa.py).
OFFICIAL = Rule(normalize, always=False)
# OpenFlamingo for all four benchmarks; lmms-eval for VQAv2, but for "1,,2", which it
# makes 12.
OPENFLAMINGO = Rule(normalize)
# lmms-eval for TextVQA, VizWiz and OK-VQA; LLaVA (llava/eval/m4c_evaluator.py).
EVALAI = Rule(normalize_evalai)


def vqa_accuracy(
    answer: str, references: Sequence[str], rule: Rule = OFFICIAL
) -> float:
    """How far people agree with an answer, 0..1.

    Mean over the references, each left out once, of min(1, matches among the others
    / 3).
    """
    said, people = _one_line(answer), [_one_line(text) for text in references]
    if rule.always or len(set(people)) > 1:
        said = rule.normalize(answer)
        people = [rule.normalize(text) for text in references]
    if not people:
        return 0.0
    matches = people.count(said)
    shares = [min(1.0, (matches - (one == said)) / 3) for one in people]
    return sum(shares) / len(shares)


def vqa_score(answered: Sequence[Answered], rule: Rule = OPENFLAMINGO) -> Score:
    """VQA accuracy in percent: the mean over the questions."""
    each = [vqa_accuracy(said(one), one.sample.answers, rule) for one in answered]
    return average(answered, each)


def textvqa_score(answered: Sequence[Answered]) -> Score:
    """The same by the rule that TextVQA, VizWiz and OK-VQA have in lmms-eval."""
    return vqa_score(answered, EVALAI)


def okvqa_stem_score(answered: Sequence[Answered]) -> Score:
    """OK-VQA's accuracy of stems, as OpenFlamingo computes it.

    The value is stems, too (cleaning.okvqa).
    """
    each = [
        vqa_accuracy(said(one), stems_of(one.sample), OPENFLAMINGO) for one in answered
    ]
    return average(answered, each)
