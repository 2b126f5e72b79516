"""The one table of benchmarks: where each is read, how it is asked, and its metric.

Names are lmms-eval's, so that a figure can be looked up; ALIASES has the short ones.
Only splits with public answers are here. MM1 measured VQAv2 and VizWiz on test-dev,
whose answers a server keeps: figures on `val` are near them, not the same.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from mm1_mlx.evaluation import cleaning
from mm1_mlx.evaluation.datasets import (
    captions,
    documents,
    options,
    own,
    refcoco,
    science,
    vqa,
    yes_no,
)
from mm1_mlx.evaluation.datasets.tables import Read
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
from mm1_mlx.evaluation.metrics.vqa import vqa_score
from mm1_mlx.evaluation.prompts import FORMS
from mm1_mlx.evaluation.said_boxes import first_box
from mm1_mlx.evaluation.samples import Metric, Task

Clean = Callable[..., Any]


def _task(
    name: str,
    summary: str,
    form: str,
    read: Read,
    split: str,
    metric: Metric,
    clean: Clean,
    *,
    hub: str | None = None,
    shots: str | None = None,
    shot_clean: Clean | None = None,
    note: str = "",
    boxes: bool = False,
) -> Task:
    """A row of the table. form: of prompts.FORMS. shots: the split that has them."""
    asked = FORMS[form]
    return Task(
        name=name,
        summary=summary,
        read=read,
        split=split,
        shot_split=shots,
        prompt=asked.ask,
        shot_prompt=asked.shot,
        target=asked.target,
        stop=asked.stop,
        shot_stop=asked.shot_stop,
        max_tokens=asked.max_tokens,
        clean=clean,
        shot_clean=shot_clean,
        metric=metric,
        hub=hub,
        boxes=boxes,
        source=f"{asked.source}{'; ' if note else ''}{note}",
    )


def _captions(name: str, summary: str, form: str, read: Read, split: str, **more: Any):
    clean = cleaning.caption
    shots = more.pop("shots", "train")
    return _task(
        name, summary, form, read, split, cider_score, clean, shots=shots, **more
    )


def _vqa(name: str, summary: str, form: str, read: Read, hub: str, **more: Any) -> Task:
    more = {
        "clean": cleaning.short_answer,
        "shot_clean": cleaning.openflamingo_vqa,
    } | more
    return _task(
        name, summary, form, read, "val", vqa_score, shots="train", hub=hub, **more
    )


def _boxes(family: str, name: str, read: Read, hub: str, splits: Iterable[str]):
    for split in splits:
        yield _task(
            f"{family}_{split}",
            f"{name} {split}: the box of a phrase, IoU above 0.5",
            "refcoco",
            read,
            split,
            box_accuracy,
            first_box,
            hub=hub,
            shots="train",
            boxes=True,
        )


_LETTER, _SHORT, _LINE = cleaning.letter, cleaning.short_answer, cleaning.first_line
_CIDER = "captions, CIDEr"
_ACCURACY = "VQA accuracy"

_ROWS = [
    # captions
    _captions(
        "coco_karpathy_test",
        f"COCO, Karpathy's test split: {_CIDER}",
        "coco",
        captions.read_karpathy,
        "test",
        note="MM1's split; needs dataset_coco.json and the pictures of 2014",
    ),
    _captions(
        "coco_karpathy_val",
        f"COCO, Karpathy's val split: {_CIDER}",
        "coco",
        captions.read_karpathy,
        "val",
    ),
    _captions(
        "coco2014_cap_val",
        f"COCO 2014 val, all 40504 pictures: {_CIDER}",
        "coco",
        captions.read_coco,
        "val",
        hub="lmms-lab/COCO-Caption",
    ),
    _captions(
        "coco2017_cap_val",
        f"COCO 2017 val, 5000 pictures: {_CIDER}",
        "coco",
        captions.read_coco,
        "val",
        hub="lmms-lab/COCO-Caption2017",
    ),
    _captions(
        "nocaps_val",
        f"NoCaps val, objects that COCO does not name: {_CIDER}",
        "nocaps",
        captions.read_nocaps,
        "val",
        hub="lmms-lab/NoCaps",
        note="it has no train split: shots are COCO's, of files in the same folder",
    ),
    _captions(
        "textcaps_val",
        f"TextCaps val, pictures with text: {_CIDER}",
        "textcaps",
        captions.read_textcaps,
        "val",
        hub="lmms-lab/TextCaps",
    ),
    # questions with ten answers
    _vqa(
        "vqav2_val",
        f"VQAv2 val: {_ACCURACY}",
        "vqav2",
        vqa.read_vqav2,
        "lmms-lab/VQAv2",
        note="MM1 states test-dev",
    ),
    _vqa(
        "ok_vqa_val2014",
        f"OK-VQA val, questions that need knowledge: {_ACCURACY}",
        "okvqa",
        vqa.read_okvqa,
        "lmms-lab/OK-VQA",
        clean=cleaning.okvqa,
        shot_clean=cleaning.okvqa,
    ),
    _vqa(
        "textvqa_val",
        f"TextVQA val, text in pictures: {_ACCURACY}",
        "textvqa",
        vqa.read_textvqa,
        "lmms-lab/textvqa",
    ),
    _vqa(
        "vizwiz_vqa_val",
        f"VizWiz val, questions of blind people: {_ACCURACY}",
        "vizwiz",
        vqa.read_vizwiz,
        "lmms-lab/VizWiz-VQA",
        note="MM1 states test-dev",
    ),
    # school, college, diagrams
    _task(
        "scienceqa",
        "ScienceQA test, with and without pictures: choices",
        "scienceqa",
        science.read_scienceqa,
        "test",
        choice_accuracy,
        cleaning.scienceqa_letter,
        hub="lmms-lab/ScienceQA",
        shots="train",
    ),
    _task(
        "scienceqa_img",
        "ScienceQA test, the questions with a picture: choices",
        "scienceqa",
        science.read_scienceqa_img,
        "test",
        choice_accuracy,
        cleaning.scienceqa_letter,
        hub="lmms-lab/ScienceQA",
        shots="train",
        note="SQA-I of the papers",
    ),
    _task(
        "mmmu_val",
        "MMMU val, college exams with up to 7 pictures: choices and open",
        "mmmu",
        science.read_mmmu,
        "val",
        mmmu_accuracy,
        cleaning.mmmu,
        hub="lmms-lab/MMMU",
        shots="dev",
    ),
    _task(
        "mathvista_testmini",
        "MathVista testmini, mathematics in pictures (our extraction)",
        "mathvista",
        science.read_mathvista,
        "testmini",
        mathvista_accuracy,
        cleaning.mathvista,
        hub="AI4Math/MathVista",
        note="the benchmark lets a language model extract answers; this rule is ours",
    ),
    _task(
        "ai2d",
        "AI2D test, diagrams of school books: choices",
        "ai2d",
        science.read_ai2d,
        "test",
        choice_accuracy,
        _LETTER,
        hub="lmms-lab/ai2d",
        shots="train",
    ),
    # charts and documents
    _task(
        "chartqa",
        "ChartQA test, human and augmented: relaxed accuracy (5%)",
        "chartqa",
        documents.read_chartqa,
        "test",
        relaxed_accuracy,
        _SHORT,
        hub="lmms-lab/ChartQA",
        shots="train",
    ),
    _task(
        "docvqa_val",
        "DocVQA val, scanned pages: ANLS",
        "docvqa",
        documents.read_docvqa,
        "val",
        anls_score,
        _LINE,
        hub="lmms-lab/DocVQA",
        shots="train",
        note="the papers state test, whose answers a server keeps",
    ),
    _task(
        "infovqa_val",
        "InfographicVQA val: ANLS",
        "infovqa",
        documents.read_infovqa,
        "val",
        anls_score,
        _LINE,
        hub="lmms-lab/DocVQA",
        shots="train",
        note="the papers state test, whose answers a server keeps",
    ),
    # yes or no
    _task(
        "pope",
        "POPE, is it there? Mean F1 of random, popular and adversarial",
        "pope",
        yes_no.read_pope,
        "test",
        pope_score,
        cleaning.pope_yes_or_no,
        hub="lmms-lab/POPE",
    ),
    *(
        _task(
            f"pope_{short}",
            f"POPE, {part} objects alone: F1",
            "pope",
            yes_no.read_pope_part(part),
            "test",
            pope_score,
            cleaning.pope_yes_or_no,
            hub="lmms-lab/POPE",
        )
        for short, part in (
            ("random", "random"),
            ("pop", "popular"),
            ("adv", "adversarial"),
        )
    ),
    _task(
        "mme",
        "MME, two questions a picture: perception and cognition, up to 2800",
        "mme",
        yes_no.read_mme,
        "test",
        mme_score,
        cleaning.mme_yes_or_no,
        hub="lmms-lab/MME",
    ),
    # choices
    _task(
        "seedbench",
        "SEED-Bench, pictures and frames of videos: choices",
        "seedbench",
        options.read_seed,
        "test",
        choice_accuracy,
        _LETTER,
        hub="lmms-lab/SEED-Bench",
    ),
    _task(
        "seedbench_image",
        "SEED-Bench, the pictures alone: choices",
        "seedbench",
        options.read_seed_image,
        "test",
        choice_accuracy,
        _LETTER,
        hub="lmms-lab/SEED-Bench",
    ),
    _task(
        "mmbench_en_dev",
        "MMBench dev: choices, right in every order that the table has",
        "mmbench",
        options.read_mmbench,
        "dev",
        circular_accuracy,
        _LETTER,
        hub="lmms-lab/MMBench",
        note="exact letters, no ChatGPT, as MM1.5; CircularEval of arXiv 2307.06281",
    ),
    _task(
        "mmbench_en_dev_once",
        "MMBench dev, each question in its first order alone: choices",
        "mmbench",
        options.read_mmbench_once,
        "dev",
        choice_accuracy,
        _LETTER,
        hub="lmms-lab/MMBench",
    ),
    # boxes
    *_boxes(
        "refcoco",
        "RefCOCO",
        refcoco.read_refcoco,
        "lmms-lab/RefCOCO",
        ("val", "testA", "testB"),
    ),
    *_boxes(
        "refcoco+",
        "RefCOCO+",
        refcoco.read_refcoco_plus,
        "lmms-lab/RefCOCOplus",
        ("val", "testA", "testB"),
    ),
    *_boxes(
        "refcocog",
        "RefCOCOg (UMD)",
        refcoco.read_refcocog,
        "lmms-lab/RefCOCOg",
        ("val", "test"),
    ),
]

# Questions of one's own (--data FILE or FOLDER), by how they are scored.
_OWN: list[tuple[str, str, str, Metric, Clean]] = [
    ("captions", "CIDEr", "own_captions", cider_score, cleaning.caption),
    ("vqa", "VQA accuracy of ten answers", "vqav2", vqa_score, _SHORT),
    ("choices", "letters", "ai2d", choice_accuracy, _LETTER),
    ("exact", "equal but for case", "own_exact", exact_accuracy, _SHORT),
    ("anls", "ANLS", "docvqa", anls_score, _LINE),
    (
        "relaxed",
        "numbers within 5%",
        "chartqa",
        relaxed_accuracy,
        _SHORT,
    ),
    ("boxes", "IoU above 0.5", "refcoco", box_accuracy, first_box),
]
_NEEDS = {"choices": "choices", "boxes": "box"}
_ROWS += [
    _task(
        f"own_{name}",
        f"Your own test.jsonl, .json or .parquet: {how}",
        form,
        partial(own.read_own, needs=_NEEDS.get(name, "answers")),
        "test",
        metric,
        clean,
        shots="train",
        boxes=name == "boxes",
    )
    for name, how, form, metric, clean in _OWN
]

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}

ALIASES = {
    "coco": "coco_karpathy_test",
    "coco_cap": "coco_karpathy_test",
    "nocaps": "nocaps_val",
    "textcaps": "textcaps_val",
    "vqav2": "vqav2_val",
    "okvqa": "ok_vqa_val2014",
    "ok_vqa": "ok_vqa_val2014",
    "okvqa_val": "ok_vqa_val2014",
    "textvqa": "textvqa_val",
    "vizwiz": "vizwiz_vqa_val",
    "vizwiz_val": "vizwiz_vqa_val",
    "vizwiz_vqa": "vizwiz_vqa_val",
    "sqa": "scienceqa_img",
    "mmmu": "mmmu_val",
    "mathvista": "mathvista_testmini",
    "docvqa": "docvqa_val",
    "infovqa": "infovqa_val",
    "infographicvqa": "infovqa_val",
    "pope_popular": "pope_pop",
    "pope_adversarial": "pope_adv",
    "seed": "seedbench",
    "seed_bench": "seedbench",
    "seed_image": "seedbench_image",
    "mmbench": "mmbench_en_dev",
    "mmbench_dev": "mmbench_en_dev",
    "refcoco": "refcoco_val",
    "refcoco+": "refcoco+_val",
    "refcocog": "refcocog_val",
}
# lmms-eval: refcoco_bbox_rec_testA
ALIASES |= {
    name.replace("_", "_bbox_rec_"): name
    for name in TASKS
    if name.startswith("refcoco")
}
