"""Samples that could not be asked count as wrong, whatever the metric."""

from dataclasses import replace

import pytest
from test_evaluate import run, too_long

from mm1_mlx.evaluation import cleaning
from mm1_mlx.evaluation.metrics.pope import pope_score
from mm1_mlx.evaluation.samples import Answered, Sample
from mm1_mlx.evaluation.tasks import TASKS


def answered(sample: Sample) -> Answered:
    """One that could not be asked."""
    return Answered(sample, "", None)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_could_not_be_asked_is_wrong(name):
    fields = {"answer_type": "text", "box": (0, 0, 1, 1), "category": "count"}
    yes = Sample(id="1", answers=("yes",), fields=fields | {"pair": "p"})
    none = replace(yes, answers=("None", "none"))
    options = replace(yes, answers=("A",), choices=("A", "a longer one"))
    for sample in (yes, none, options):
        assert TASKS[name].metric([answered(sample)]).each == [0.0]


def test_what_could_not_be_asked_is_no_yes_and_no_no():
    rows = [Sample(id=str(i), answers=(a,)) for i, a in enumerate(("yes", "no"))]
    score = pope_score([answered(row) for row in rows])
    assert score.total == 0 and score.groups["accuracy"] == score.groups["yes"] == 0


def test_a_rule_that_finds_yes_in_nothing_is_not_asked(model, processor):
    """POPE's rule makes "yes" of an empty answer."""
    task = replace(too_long([2]), clean=cleaning.pope_yes_or_no, metric=pope_score)
    made = [replace(s, answers=("yes",)) for s in task.read("", "val")]
    task = replace(task, read=lambda where, split: iter(made))
    result = run(model, processor, task)
    assert [r["score"] for r in result.records].index(0.0) == 2
    assert result.records[2]["value"] is None and result.score.each[2] == 0.0
