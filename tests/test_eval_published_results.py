"""The table of published results: its rows, its sources, how it is shown."""

import json

import pytest

from helpers import ROOT
from mm1_mlx.evaluation.published import published, published_table

DATA = json.loads(
    (ROOT / "mm1_mlx" / "assets" / "published" / "results.json").read_text("utf-8")
)


def test_every_figure_has_a_source_and_says_how_it_was_read():
    for row in DATA["rows"]:
        assert row["form"] in ("pretrained", "tuned") and row["shots"] in (0, 4, 8, 16)
        assert row["source"] in DATA["sources"], row
        for benchmark, value in row["results"].items():
            assert benchmark in DATA["benchmarks"], row
            most = {"mme_perception": 2000, "mme_cognition": 800}.get(benchmark, 160)
            assert 0 < value <= most, (row["model"], benchmark)
    for name, source in DATA["sources"].items():
        assert source["read"] in ("paper", "later paper", "secondary"), name
        assert source["note"] and source["title"], name
        # a version only with a number, and a number or a named place
        assert source["arxiv"] or (
            not source["version"] and "commit" in source["title"]
        )


def test_no_figure_is_there_twice():
    seen = set()
    for row in DATA["rows"]:
        for benchmark in row["results"]:
            key = row["model"], row["shots"], benchmark
            assert key not in seen, key
            seen.add(key)


def test_the_models_of_the_literature_are_there():
    names = {row["model"].partition("-")[0] for row in DATA["rows"]}
    wanted = {"MM1", "MM1.5", "Flamingo", "IDEFICS", "Emu2", "LLaVA", "GPT", "Kosmos"}
    assert wanted | {"PaLM"} <= names
    assert {"Gemini Ultra", "Gemini Pro"} <= {row["model"] for row in DATA["rows"]}
    for shots in (0, 8, 16):
        assert published("vqav2_val", shots=shots, model="MM1-30B") or shots == 0


def test_one_figure():
    (one,) = published("coco_karpathy_test", shots=8, model="MM1-30B")
    assert (one.value, one.form, one.read) == (123.1, "pretrained", "secondary")
    assert one.reference == "arXiv 2403.09611 (version not known)"
    (one,) = published("docvqa_val", model="MM1.5-30B")
    assert (one.value, one.reference) == (91.4, "arXiv 2509.16197 v1")
    (one,) = published("pope", model="LLaVA-1.5-7B")
    assert one.reference.startswith("LLaVA, docs/MODEL_ZOO.md at commit")


def test_a_figure_with_shots_stands_with_them():
    (one,) = published("chartqa", model="GPT-4V")
    assert (one.value, one.shots) == (78.5, 4) and "4 shots and chain" in one.note


def test_figures_of_another_prompt_say_so():
    (one,) = published("textvqa_val", model="LLaVA-1.5-7B")
    assert one.value == 58.2 and "OCR program" in one.note
    (one,) = published("pope", model="LLaVA-1.5-7B")
    assert "OCR" not in one.note


def test_a_table_names_its_sources_once():
    text = published_table("ok_vqa_val2014")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert "| MM1-30B | 8 | 58.3 | OK-VQA val, VQA accuracy | secondary | [1] |" in rows
    assert "| PaLM-E-562B | 0 | 66.1 | OK-VQA val, VQA accuracy | paper |" in text
    cited = {line.rpartition("[")[2].rstrip("] |") for line in rows}
    listed = [
        line.partition(".")[0] for line in text.splitlines() if line[:1].isdigit()
    ]
    assert sorted(cited, key=int) == listed == sorted(listed, key=int)
    assert "arXiv 2303.03378 v1" in text and text.endswith("the paper itself.")


@pytest.mark.parametrize(
    "task, benchmark",
    [("mme", "mme_cognition"), ("refcoco+_testA", "refcoco_average")],
)
def test_figures_under_other_names(task, benchmark):
    assert benchmark in {one.benchmark for one in published(task)}


def test_a_task_without_published_figures_has_no_table():
    assert published_table("own_vqa") == "" and published("own_vqa") == []
