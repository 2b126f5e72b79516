"""The one table of benchmarks: where each is read, how it is asked, and its metric.

Names are lmms-eval's, so that a figure can be looked up; ALIASES has the short ones.
Only splits with public answers are here. MM1 measured VQAv2 and VizWiz on test-dev,
whose answers a server keeps: figures on `val` are near them, not the same.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

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
from mm1_mlx.evaluation.prompts import FORMS
from mm1_mlx.evaluation.readings import READINGS
from mm1_mlx.evaluation.samples import Task

# Datasets on the hub with the split that shots come from; of others it is in the
# original files alone.
_HUB_SHOTS = (
    "lmms-lab-encoder/TextCaps",
    "lmms-lab-encoder/textvqa",
    "lmms-lab-encoder/ScienceQA",
    "lmms-lab-encoder/MMMU",
)


def _task(
    name: str,
    summary: str,
    form: str,
    read: Read,
    split: str,
    *,
    reading: str | None = None,
    shots: str | None = None,
    note: str = "",
    **more: Any,
) -> Task:
    """A row of the table. form: of prompts.FORMS. reading: of readings.READINGS; None:
    that of the form. shots: the split that has them. more: what else a Task has."""
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
        source=f"{asked.source}{'; ' if note else ''}{note}",
        hub_shots=more.get("hub") in _HUB_SHOTS,
        **vars(READINGS[reading or form]),
        **more,
    )


def _captions(name: str, summary: str, form: str, read: Read, split: str, **more: Any):
    return _task(name, summary, form, read, split, shots="train", **more)


def _vqa(name: str, summary: str, form: str, read: Read, hub: str, **more: Any) -> Task:
    return _task(name, summary, form, read, "val", shots="train", hub=hub, **more)


def _boxes(family: str, name: str, read: Read, hub: str, splits: Iterable[str]):
    for split in splits:
        yield _task(
            f"{family}_{split}",
            f"{name} {split}: the box of a phrase, IoU above 0.5",
            "refcoco",
            read,
            split,
            hub=hub,
            shots="train",
            boxes=True,
        )


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
        captions.read_coco2014,
        "val",
        hub="lmms-lab-encoder/COCO-Caption",
    ),
    _captions(
        "coco2017_cap_val",
        f"COCO 2017 val, 5000 pictures: {_CIDER}",
        "coco",
        captions.read_coco2017,
        "val",
        hub="lmms-lab-encoder/COCO-Caption2017",
    ),
    _captions(
        "nocaps_val",
        f"NoCaps val, objects that COCO does not name: {_CIDER}",
        "nocaps",
        captions.read_nocaps,
        "val",
        hub="lmms-lab-encoder/NoCaps",
        note="it has no train split: shots are COCO's, of files in the same folder",
    ),
    _captions(
        "textcaps_val",
        f"TextCaps val, pictures with text: {_CIDER}",
        "textcaps",
        captions.read_textcaps,
        "val",
        hub="lmms-lab-encoder/TextCaps",
    ),
    # questions with ten answers
    _vqa(
        "vqav2_val",
        f"VQAv2 val: {_ACCURACY}",
        "vqav2",
        vqa.read_vqav2,
        "lmms-lab-encoder/VQAv2",
        note="MM1 states test-dev",
    ),
    _vqa(
        "ok_vqa_val2014",
        f"OK-VQA val, questions that need knowledge: {_ACCURACY}",
        "okvqa",
        vqa.read_okvqa,
        "lmms-lab-encoder/OK-VQA",
    ),
    _vqa(
        "textvqa_val",
        f"TextVQA val, text in pictures: {_ACCURACY}",
        "textvqa",
        vqa.read_textvqa,
        "lmms-lab-encoder/textvqa",
    ),
    _vqa(
        "vizwiz_vqa_val",
        f"VizWiz val, questions of blind people: {_ACCURACY}",
        "vizwiz",
        vqa.read_vizwiz,
        "lmms-lab-encoder/VizWiz-VQA",
        note="MM1 states test-dev",
    ),
    # school, college, diagrams
    _task(
        "scienceqa",
        "ScienceQA test, with and without pictures: choices",
        "scienceqa",
        science.read_scienceqa,
        "test",
        hub="lmms-lab-encoder/ScienceQA",
        shots="train",
    ),
    _task(
        "scienceqa_img",
        "ScienceQA test, the questions with a picture: choices",
        "scienceqa",
        science.read_scienceqa_img,
        "test",
        hub="lmms-lab-encoder/ScienceQA",
        shots="train",
        note="SQA-I of the papers",
    ),
    _task(
        "mmmu_val",
        "MMMU val, college exams with up to 7 pictures: choices and open",
        "mmmu",
        science.read_mmmu,
        "val",
        hub="lmms-lab-encoder/MMMU",
        shots="dev",
    ),
    _task(
        "mathvista_testmini",
        "MathVista testmini, mathematics in pictures (our extraction)",
        "mathvista",
        science.read_mathvista,
        "testmini",
        hub="AI4Math/MathVista",
        note="the benchmark lets a language model extract answers; this rule is ours",
    ),
    _task(
        "ai2d",
        "AI2D test, diagrams of school books: choices",
        "ai2d",
        science.read_ai2d,
        "test",
        hub="lmms-lab-encoder/ai2d",
        shots="train",
    ),
    # charts and documents
    _task(
        "chartqa",
        "ChartQA test, human and augmented: relaxed accuracy (5%)",
        "chartqa",
        documents.read_chartqa,
        "test",
        hub="lmms-lab-encoder/ChartQA",
        shots="train",
    ),
    _task(
        "docvqa_val",
        "DocVQA val, scanned pages: ANLS",
        "docvqa",
        documents.read_docvqa,
        "val",
        hub="lmms-lab-encoder/DocVQA",
        shots="train",
        note="the papers state test, whose answers a server keeps",
    ),
    _task(
        "infovqa_val",
        "InfographicVQA val: ANLS",
        "infovqa",
        documents.read_infovqa,
        "val",
        hub="lmms-lab-encoder/DocVQA",
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
        hub="lmms-lab-encoder/POPE",
    ),
    *(
        _task(
            f"pope_{short}",
            f"POPE, {part} objects alone: F1",
            "pope",
            yes_no.read_pope_part(part),
            "test",
            hub="lmms-lab-encoder/POPE",
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
        hub="lmms-lab-encoder/MME",
    ),
    # choices
    _task(
        "seedbench",
        "SEED-Bench, pictures and frames of videos: choices",
        "seedbench",
        options.read_seed,
        "test",
        hub="lmms-lab-encoder/SEED-Bench",
    ),
    _task(
        "seedbench_image",
        "SEED-Bench, the pictures alone: choices",
        "seedbench",
        options.read_seed_image,
        "test",
        hub="lmms-lab-encoder/SEED-Bench",
    ),
    _task(
        "mmbench_en_dev",
        "MMBench dev: choices, right in every order that the table has",
        "mmbench",
        options.read_mmbench,
        "dev",
        hub="lmms-lab-encoder/MMBench",
        note="no ChatGPT, as MM1.5; CircularEval of arXiv 2307.06281",
    ),
    _task(
        "mmbench_en_dev_once",
        "MMBench dev, each question in its first order alone: choices",
        "mmbench",
        options.read_mmbench_once,
        "dev",
        reading="mmbench_once",
        hub="lmms-lab-encoder/MMBench",
    ),
    # boxes
    *_boxes(
        "refcoco",
        "RefCOCO",
        refcoco.read_refcoco,
        "lmms-lab-encoder/RefCOCO",
        ("val", "testA", "testB"),
    ),
    *_boxes(
        "refcoco+",
        "RefCOCO+",
        refcoco.read_refcoco_plus,
        "lmms-lab-encoder/RefCOCOplus",
        ("val", "testA", "testB"),
    ),
    *_boxes(
        "refcocog",
        "RefCOCOg (UMD)",
        refcoco.read_refcocog,
        "lmms-lab-encoder/RefCOCOg",
        ("val", "test"),
    ),
]

# Questions of one's own (--data FILE or FOLDER): how they are scored, in words, and
# their names among FORMS and READINGS.
_OWN = [
    ("captions", "CIDEr", "own_captions", "own_captions"),
    ("vqa", "VQA accuracy of ten answers", "vqav2", "vqav2"),
    ("choices", "letters", "ai2d", "own_choices"),
    ("exact", "equal but for case", "own_exact", "own_exact"),
    ("anls", "ANLS", "docvqa", "docvqa"),
    ("relaxed", "numbers within 5%", "chartqa", "chartqa"),
    ("boxes", "IoU above 0.5", "refcoco", "refcoco"),
]
_NEEDS = {"choices": "choices", "boxes": "box", "vqa": "vqa"}
_ROWS += [
    _task(
        f"own_{name}",
        f"Your own test.jsonl, .json or .parquet: {how}",
        form,
        partial(own.read_own, needs=_NEEDS.get(name, "answers")),
        "test",
        reading=reading,
        shots="train",
        boxes=name == "boxes",
    )
    for name, how, form, reading in _OWN
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
