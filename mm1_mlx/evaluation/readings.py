"""The one table of how answers are read and scored, and whose rules these are.

Beside prompts.FORMS, with its names: the first form is for models that were tuned on
instructions, `shot_...` for pretrained ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm1_mlx.evaluation import cleaning
from mm1_mlx.evaluation.metrics.anls import anls_score
from mm1_mlx.evaluation.metrics.boxes import box_accuracy
from mm1_mlx.evaluation.metrics.choices import (
    choice_accuracy,
    circular_accuracy,
    mmmu_accuracy,
)
from mm1_mlx.evaluation.metrics.cider import cider_score
from mm1_mlx.evaluation.metrics.exact import exact_accuracy
from mm1_mlx.evaluation.metrics.mathvista import mathvista_accuracy
from mm1_mlx.evaluation.metrics.mme import mme_score
from mm1_mlx.evaluation.metrics.pope import pope_score
from mm1_mlx.evaluation.metrics.relaxed import relaxed_accuracy
from mm1_mlx.evaluation.metrics.vqa import (
    okvqa_stem_score,
    textvqa_score,
    vqa_score,
)
from mm1_mlx.evaluation.said_boxes import first_box
from mm1_mlx.evaluation.samples import Metric

Clean = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """From answers to a figure; the fields are those of Task.

    rule: whose rule reads and compares the answers, or "ours: ...".
    """

    clean: Clean
    metric: Metric
    rule: str
    shot_clean: Clean | None = None
    shot_metric: Metric | None = None
    shot_rule: str = ""


_WHOLE = "lmms-eval: the whole answer"
_OPENFLAMINGO = "OpenFlamingo: cut before its next words and at a comma"
_NORMAL = "both sides always normalized as by VQA's script"
_EVALAI = "both sides always normalized by EvalAIAnswerProcessor"
_LETTERS = "ours: a letter, or the text of a choice"
_MMBENCH = (
    "ours: MMBench's own rule (the one letter, else the one choice, that is named), "
    "then another one where MMBench asks ChatGPT"
)
_LINE = "ours: the first line"


def _vqa(metric: Metric, rule: str) -> Reading:
    return Reading(
        clean=cleaning.stripped,
        metric=metric,
        rule=f"lmms-eval: the whole answer; {rule}",
        shot_clean=cleaning.openflamingo_vqa,
        shot_metric=vqa_score,
        shot_rule=f"{_OPENFLAMINGO}; {_NORMAL}",
    )


def _captions(clean: Clean, rule: str) -> Reading:
    return Reading(
        clean=clean,
        metric=cider_score,
        rule=rule,
        shot_clean=cleaning.caption,
        shot_rule="OpenFlamingo: what stands before 'Output', without quotation "
        "marks; of that the first line",
    )


_CAPTIONS = _captions(cleaning.stripped, _WHOLE)
_TEXTVQA = _vqa(textvqa_score, f"{_EVALAI} (LLaVA's, too)")
_ANLS = Reading(clean=cleaning.stripped, metric=anls_score, rule=_WHOLE)

READINGS: dict[str, Reading] = {
    "coco": _CAPTIONS,
    "nocaps": _CAPTIONS,
    "textcaps": _CAPTIONS,
    "vqav2": _vqa(vqa_score, _NORMAL),
    "okvqa": Reading(
        clean=cleaning.stripped,
        metric=textvqa_score,
        rule=_TEXTVQA.rule,
        shot_clean=cleaning.okvqa,
        shot_metric=okvqa_stem_score,
        shot_rule=f"{_OPENFLAMINGO}; stems on both sides (ours where the dataset has "
        f"none); {_NORMAL}",
    ),
    "textvqa": _TEXTVQA,
    "vizwiz": _TEXTVQA,
    "scienceqa": Reading(
        clean=cleaning.scienceqa_letter,
        metric=choice_accuracy,
        rule="LLaVA: 'B', 'B. ...', or 'The answer is B.' once; else wrong",
    ),
    "mmmu": Reading(
        clean=cleaning.mmmu,
        metric=mmmu_accuracy,
        rule="lmms-eval: '(B)', 'B ', 'B.' or a choice's words, open answers as MMMU; "
        "none is wrong, where both draw one",
    ),
    "mathvista": Reading(
        clean=cleaning.mathvista,
        metric=mathvista_accuracy,
        rule="ours: the last thing that may be an answer, where MathVista asks a "
        "language model; then MathVista's comparison",
    ),
    "ai2d": Reading(
        clean=cleaning.ai2d_letter,
        metric=choice_accuracy,
        rule="lmms-eval: 'B. ...', or nothing but a letter and marks; else wrong",
    ),
    "chartqa": Reading(clean=cleaning.stripped, metric=relaxed_accuracy, rule=_WHOLE),
    "docvqa": _ANLS,
    "infovqa": _ANLS,
    "pope": Reading(
        clean=cleaning.pope_yes_or_no,
        metric=pope_score,
        rule="POPE, LLaVA: no where the first sentence has No, no or not, else yes",
    ),
    "mme": Reading(
        clean=cleaning.mme_yes_or_no,
        metric=mme_score,
        rule="MME: yes or no among the first four characters; else wrong",
    ),
    "seedbench": Reading(
        clean=cleaning.seed_letter,
        metric=choice_accuracy,
        rule="lmms-eval: the first character",
    ),
    "mmbench": Reading(
        clean=cleaning.mmbench_letter, metric=circular_accuracy, rule=_MMBENCH
    ),
    "mmbench_once": Reading(
        clean=cleaning.mmbench_letter, metric=choice_accuracy, rule=_MMBENCH
    ),
    "refcoco": Reading(
        clean=first_box,
        metric=box_accuracy,
        rule="ours: the first box, as the model's folder says that it writes them",
    ),
    # questions of one's own
    "own_captions": _captions(cleaning.caption, f"{_LINE}, without quotation marks"),
    "own_choices": Reading(
        clean=cleaning.letter, metric=choice_accuracy, rule=_LETTERS
    ),
    "own_exact": Reading(
        clean=cleaning.short_answer,
        metric=exact_accuracy,
        rule=f"{_LINE}, without a full stop at its end",
    ),
}
