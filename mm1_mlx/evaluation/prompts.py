"""The one table of how questions are asked: for tuned models, and with shots.

`ask` is the form for models that were tuned on instructions. Its sentences are those
that LLaVA-1.5 was trained on, which lmms-eval asks, too; MM1.5 was measured with that.
`shot` is the form for pretrained models, with or without shots before it: MM1's, which
is OpenFlamingo's with other words for captions. Pictures stand where `<image>` stands,
else in front.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mm1_mlx.evaluation.datasets.rows import LETTERS
from mm1_mlx.evaluation.samples import Sample

Write = Callable[[Sample], str]

SHORT = "Answer the question using a single word or phrase."
WORD = "Answer the question with a single word."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
BOX = (
    "Please provide the bounding box coordinate of the region this sentence describes:"
)

_YES_NO = " Please answer yes or no."


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a benchmark is asked.

    ask, shot: the question in the two forms, see above; shot None: it has only the
    first. target: the answer that a shot shows. stop, shot_stop: where answers end.
    source: where the words come from.
    """

    ask: Write
    shot: Write | None = None
    target: Write
    stop: tuple[str, ...] = ()
    shot_stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 16
    source: str


# --- the words -----------------------------------------------------------------------


def _marked(sample: Sample, text: str) -> str:
    """The text with the pictures in front, unless it says itself where they stand."""
    marks = "" if "<image>" in text else "<image>" * len(sample.images)
    return marks + text


def caption(sample: Sample) -> str:
    """The sentence that asks for a caption."""
    return CAPTION


def photo_of(sample: Sample) -> str:
    """MM1: "{image} A photo of", which the caption goes on from."""
    return _marked(sample, " A photo of")


def short_answer(sample: Sample) -> str:
    """MM1: "{image} Question: ... Short answer:"."""
    return _marked(sample, f" Question: {sample.question} Short answer:")


def after_question(*sentences: str) -> Write:
    """The question, and sentences on lines of their own."""
    return lambda sample: "\n".join([sample.question, *sentences])


def textvqa(sample: Sample) -> str:
    """As lmms-eval: the question with one capital, at its start."""
    return f"{sample.question.capitalize()}\n{SHORT}"


def vizwiz(sample: Sample) -> str:
    """As LLaVA-1.5, which is told what to say when there is no answer."""
    return f"{sample.question.capitalize()}\n{UNSURE}\n{SHORT}"


def yes_or_no(sample: Sample) -> str:
    """MME's question without its own last sentence."""
    return f"{sample.question.replace(_YES_NO, '')}\n{SHORT}"


def options(sample: Sample) -> str:
    """A line "A. ..." for each choice."""
    pairs = zip(LETTERS, sample.choices, strict=False)
    return "\n".join(f"{letter}. {choice}" for letter, choice in pairs)


def choice(sample: Sample) -> str:
    """The question, its choices, and how to answer."""
    return f"{sample.question}\n{options(sample)}\n{LETTER}"


def choice_with_context(sample: Sample) -> str:
    """ScienceQA: the hint, where there is one, is called the context."""
    hint = sample.fields.get("hint")
    return f"Context: {hint}\n{choice(sample)}" if hint else choice(sample)


def choice_with_hint(sample: Sample) -> str:
    """MMBench: the hint stands on a line before the question."""
    hint = sample.fields.get("hint")
    return f"{hint}\n{choice(sample)}" if hint else choice(sample)


def mmmu(sample: Sample) -> str:
    """MMMU: a question with choices, or an open one."""
    if not sample.choices:
        return f"{sample.question}\n\n{SHORT}"
    return f"{sample.question}\n{options(sample)}\n\n{LETTER}"


def mathvista(sample: Sample) -> str:
    """MathVista's own `query`; made by the same rule where a file lacks it, or does
    not give it as the question."""
    if query := sample.fields.get("query"):
        return query
    if sample.question.startswith("Hint: "):
        return sample.question
    lines = [f"Hint: {_math_hint(sample)}", f"Question: {sample.question}"]
    if unit := sample.fields.get("unit"):
        lines[-1] += f" (Unit: {unit})"
    if sample.choices:
        pairs = zip(LETTERS, sample.choices, strict=False)
        lines += ["Choices:", *(f"({letter}) {choice}" for letter, choice in pairs)]
    return "\n".join(lines)


def _math_type(sample: Sample) -> tuple[str | None, int | None]:
    """The type of the answer and its decimals; where nothing says them, as it looks."""
    kind, precision = sample.fields.get("answer_type"), sample.fields.get("precision")
    if kind is None and sample.answers:
        answer = sample.answers[0].strip()
        whole, dot, decimals = answer.partition(".")
        if answer.startswith("["):
            kind = "list"
        elif dot and f"{whole.lstrip('-')}{decimals}".isdecimal():
            kind, precision = "float", len(decimals)
    return kind, precision


def _math_hint(sample: Sample) -> str:
    kind, precision = _math_type(sample)
    if sample.choices:
        return (
            "Please answer the question and provide the correct option letter, e.g., "
            "A, B, C, D, at the end."
        )
    if kind == "float":
        places, shown = {2: ("two decimal places", "1.23, 1.34, 1.45")}.get(
            precision or 1, ("one decimal place", "1.2, 1.3, 1.4")
        )
        what = f"a floating-point number with {places}", "value", shown
    elif kind == "list":
        what = "a Python list as an answer", "list", "[1, 2, 3], [1.2, 1.3, 1.4]"
    else:
        what = "an integer answer", "value", "1, 2, 3"
    return (
        f"Please answer the question requiring {what[0]} and provide the final "
        f"{what[1]}, e.g., {what[2]}, at the end."
    )


def where_is(sample: Sample) -> str:
    """As LLaVA-1.5's grounding data asks for the box of a phrase."""
    return f"{BOX} {sample.question}"


# --- what a shot answers -------------------------------------------------------------


def first_caption(sample: Sample) -> str:
    """The first caption, small at its start and without a full stop: it goes on from
    "A photo of" (ours; the paper does not say)."""
    text = sample.answers[0].strip().removesuffix(".").rstrip()
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def most_common(sample: Sample) -> str:
    """The answer that most people gave, of several the first. (VQAv2 calls it
    multiple_choice_answer.)"""
    found = sample.answers
    return Counter(found).most_common(1)[0][0] if found else ""


def first_answer(sample: Sample) -> str:
    """The first of the right answers; "" where they are secret."""
    return sample.answers[0] if sample.answers else ""


def spelled_box(sample: Sample) -> str:
    """A box as MM1.5 writes it: <left,top,right,bottom> in parts of 1000.

    "" without a box: of a picture whose size is not known.
    """
    if sample.fields["box"] is None:
        return ""
    numbers = (min(round(part * 1000), 999) for part in sample.fields["box"])
    return f"<{','.join(map(str, numbers))}>"


def solution(sample: Sample) -> str:
    """MathVista: the letter of a choice, or the value."""
    answer = first_answer(sample)
    if answer in sample.choices:
        return f"({LETTERS[sample.choices.index(answer)]}) {answer}"
    return answer


# --- the table -----------------------------------------------------------------------

_PAPER = "MM1, arXiv 2403.09611, appendix, as remembered"
_LLAVA = "LLaVA docs/Evaluation.md"
_LMMS = "lmms-eval lmms_eval/tasks"
_VQA_STOP = ("\n", ".", ",", "Question")  # MM1: newline; for VQA also these


def _captions(name: str) -> Form:
    return Form(
        ask=caption,
        shot=photo_of,
        target=first_caption,
        max_tokens=64,
        source=f"ask: {_LMMS}/{name}; shot: {_PAPER}",
    )


def _vqa(ask: Write, source: str, max_tokens: int = 128) -> Form:
    """max_tokens: LLaVA's room; lmms-eval has 16 for VQAv2 and 1024 for the others."""
    return Form(
        ask=ask,
        shot=short_answer,
        target=most_common,
        shot_stop=_VQA_STOP,
        max_tokens=max_tokens,
        source=f"ask: {source}; shot: {_PAPER}",
    )


def _letters(ask: Write, source: str, max_tokens: int = 16) -> Form:
    return Form(ask=ask, target=first_answer, max_tokens=max_tokens, source=source)


def _read(*sentences: str, source: str) -> Form:
    return Form(
        ask=after_question(*sentences),
        target=first_answer,
        max_tokens=32,
        source=source,
    )


FORMS: dict[str, Form] = {
    "coco": _captions("coco_cap/coco2014_cap_val.yaml"),
    "nocaps": _captions("nocaps/_default_template_nocaps_yaml"),
    "textcaps": _captions("textcaps/_default_template_textcaps_yaml"),
    "vqav2": _vqa(after_question(SHORT), f"{_LLAVA}; {_LMMS}/vqav2", 16),
    # lmms-eval also names "Unanswerable" here, which OK-VQA has no answers of.
    "okvqa": _vqa(after_question(SHORT), f"{_LLAVA} (short answers)"),
    "textvqa": _vqa(textvqa, f"{_LMMS}/textvqa"),
    "vizwiz": _vqa(vizwiz, f"{_LLAVA} (VisWiz script); {_LMMS}/vizwiz_vqa"),
    # LLaVA has 1024 tokens: its rule also finds "The answer is B." behind a reason.
    "scienceqa": _letters(choice_with_context, f"{_LMMS}/scienceqa; {_LLAVA}", 256),
    "ai2d": _letters(choice, f"{_LMMS}/ai2d"),
    "seedbench": _letters(choice, f"{_LMMS}/seedbench; {_LLAVA}"),
    "mmbench": _letters(choice_with_hint, "LLaVA llava/eval/model_vqa_mmbench.py"),
    "mmmu": Form(
        ask=mmmu, target=first_answer, max_tokens=128, source=f"{_LMMS}/mmmu/utils.py"
    ),
    "mathvista": Form(
        ask=mathvista,
        target=solution,
        max_tokens=512,
        source=f"the dataset's `query`; {_LMMS}/mathvista/mathvista_evals.py",
    ),
    "chartqa": Form(
        ask=after_question(WORD), target=first_answer, source=f"{_LMMS}/chartqa"
    ),
    "docvqa": _read(SHORT, source=f"{_LMMS}/docvqa"),
    "infovqa": _read(SHORT, source=f"{_LMMS}/infovqa"),
    "pope": Form(
        ask=after_question(SHORT),
        target=first_answer,
        max_tokens=128,
        source=f"{_LLAVA}; {_LMMS}/pope",
    ),
    "mme": Form(ask=yes_or_no, target=first_answer, source=f"{_LLAVA}; {_LMMS}/mme"),
    "refcoco": Form(
        ask=where_is,
        target=spelled_box,
        max_tokens=48,
        source=f"LLaVA-1.5's grounding data; {_LMMS}/refcoco/utils_rec.py",
    ),
    "own_exact": Form(
        ask=lambda sample: sample.question,
        target=first_answer,
        max_tokens=64,
        source="ours: the question as it stands",
    ),
}
FORMS["own_captions"] = Form(
    ask=lambda sample: sample.question or CAPTION,
    shot=photo_of,
    target=first_caption,
    max_tokens=64,
    source=FORMS["coco"].source,
)
