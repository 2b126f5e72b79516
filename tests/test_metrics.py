"""Metrics and answer rules by hand: small cases whose answer can be seen."""

import math

import numpy as np
import pytest

from helpers import assert_close
from mm1_mlx.evaluation import cleaning
from mm1_mlx.evaluation.metrics import intervals, mathvista, mme, pope, vqa
from mm1_mlx.evaluation.metrics.anls import anls, anls_of_the_paper, anls_score
from mm1_mlx.evaluation.metrics.boxes import box_accuracy, iou
from mm1_mlx.evaluation.metrics.choices import (
    choice_accuracy,
    circular_accuracy,
    mmmu_accuracy,
)
from mm1_mlx.evaluation.metrics.cider import cider, cider_score
from mm1_mlx.evaluation.metrics.exact import exact_accuracy
from mm1_mlx.evaluation.metrics.ptb import tokenize
from mm1_mlx.evaluation.metrics.relaxed import relaxed_accuracy, relaxed_match
from mm1_mlx.evaluation.metrics.vqa import normalize, vqa_accuracy, vqa_score
from mm1_mlx.evaluation.samples import Answered, Sample
from mm1_mlx.evaluation.stemming import stem
from mm1_mlx.evaluation.table import find_task


def said(value, *answers, id="0", choices=(), **fields):
    """An answered sample in one line."""
    sample = Sample(id=id, answers=answers, choices=tuple(choices), fields=fields)
    return Answered(sample, str(value), value)


# --- captions ---


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A man rides a horse.", "a man rides a horse"),
        ("the dog's toy isn't red", "the dog 's toy is n't red"),
        ("You cannot, or can't?", "you can not or ca n't"),
        ('a sign: "STOP!!"', "a sign stop !!"),  # runs of marks stay
        ("two (2) cats", "two -lrb- 2 -rrb- cats"),  # so do brackets
        ("Mr. Smith at 5 p.m. in the U.S.", "mr. smith at 5 p.m. in the u.s."),
        ("a 1/2 price T-shirt for $5.00", "a 1/2 price t-shirt for $ 5.00"),
        ("2 1/2 cups", "2 1/2 cups"),
        ("black&white, and/or www.foo.com", "black & white and/or www.foo.com"),
        ("it’s “fine” — really…", "it 's fine really"),
        ("café 日本語 😀", "café 日本語"),
        ("", ""),
    ],
)
def test_words_of_captions(caption, words):
    assert tokenize([caption]) == [words.split()]


def test_captions_keep_their_lines():
    lines = ["a\nb", "", "c\u2028dog.", ""]
    assert tokenize(lines) == [["a", "b"], [], ["c", "dog"], []]
    assert tokenize([]) == []


def test_cider_of_the_same_caption_is_ten():
    captions = [["a", "red", "cat", "sits"], ["two", "blue", "dogs", "run"]]
    assert_close(
        np.array(cider(captions, [[c] for c in captions])), [10, 10], atol=1e-9
    )
    assert cider(captions[::-1], [[c] for c in captions]) == [0, 0]


def test_cider_by_hand():
    """One word right of two, of one reference, in a set of two pictures."""
    found = cider([["cat", "in"], ["x"]], [[["cat", "on"]], [["y"]]])
    # n = 1: both words of each have weight log 2, one is shared: cosine 1/2.
    # n = 2: the pairs differ. n = 3, 4: none.
    assert_close(np.array(found), np.array([10 * (0.5 + 0 + 0 + 0) / 4, 0]), atol=1e-12)


def test_cider_punishes_repetition_and_length():
    references = [[["a", "red", "cat"]], [["two", "dogs"]]]
    once, twice = (
        cider([words, ["x"]], references)[0]
        for words in (["a", "red", "cat"], ["a", "red", "cat"] * 2)
    )
    assert twice < 0.9 * once


def test_cider_score_is_on_the_scale_of_the_papers():
    texts = ["A red cat sits.", "two blue dogs run", "an old man waits there"]
    score = cider_score([said(t, t, id=t) for t in texts])
    assert math.isclose(score.total, 1000) and score.each == pytest.approx([1, 1, 1])
    assert score.low is None and score.high is None  # all the same
    other = cider_score([said(t, t, id=t) for t in texts] + [said("x", "y", id="4")])
    assert other.low < other.total < other.high


# --- short answers ---


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The two dogs!", "2 dogs"),
        ("dont", "don't"),
        ("a T-shirt", "t shirt"),  # a mark between letters becomes a space
        ("yes, it is", "yes it is"),  # beside a space it goes
        ("1,000 red-cars", "1000 redcars"),  # with a comma between digits all go
        ("3.5 ft.", "3.5 ft"),
        ("None", "0"),
        ("", ""),
    ],
)
def test_normalized_answers(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize(
    "answer, people, accuracy",
    [
        # Left out once each: 3 with 2 others (2/3), 7 with 3 (1).
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("green", ["red"] * 10, 0.0),
        # All the same: compared as written.
        ("Two.", ["two."] * 10, 0.0),
        ("Two.", ["2"] * 9 + ["many"], 1.0),
        ("x", [], 0.0),
    ],
)
def test_vqa_accuracy(answer, people, accuracy):
    assert vqa_accuracy(answer, people) == pytest.approx(accuracy)


def test_vqa_accuracy_of_the_copies_that_always_normalize():
    people = ["two"] * 10
    assert vqa_accuracy("2", people) == 0
    assert vqa_accuracy("2", people, vqa.OPENFLAMINGO) == 1
    assert vqa_accuracy("2", people, vqa.EVALAI) == 1
    apart = ["red blue"] * 10
    assert vqa_accuracy("Red,blue.", apart, vqa.OPENFLAMINGO) == 1
    assert vqa_accuracy("Red,blue.", apart, vqa.EVALAI) == 0  # "redblue"


@pytest.mark.parametrize("name", ["vqav2", "textvqa", "vizwiz", "okvqa", "own_vqa"])
@pytest.mark.parametrize("form", ["chat", "pretrain"])
def test_a_capital_and_a_full_stop_are_not_wrong(name, form):
    """Also where all ten people wrote the same."""
    clean, metric, rule = find_task(name).reading(form)
    sample = Sample(id="0", answers=("yes",) * 10)
    score = metric([Answered(sample, "Yes.", clean("Yes.", sample))])
    assert score.total == 100 and "both sides always normalized" in rule


def test_vqa_score_by_category():
    score = vqa_score(
        [
            said("red", *["red"] * 10, category="colour"),
            said("red", *["blue"] * 10, category="colour"),
            said("2", *["2"] * 10, category="number"),
        ]
    )
    assert score.total == pytest.approx(200 / 3)
    assert score.each == [1, 0, 1]
    assert score.groups == {"colour": 50, "number": 100}
    assert score.low < score.total < score.high


def test_anls():
    assert anls("Hello  World", ["hello world"]) == 1
    assert anls("hallo", ["x", "hello"]) == pytest.approx(0.8)
    assert anls("abcd", ["abxy"]) == 0.5  # the server counts the threshold itself
    assert anls_of_the_paper("abcd", ["abxy"]) == 0
    assert anls("abc", ["xyz"]) == 0
    assert anls("", [""]) == 1
    score = anls_score([said("hallo", "hello"), said("a", "b")])
    assert score.total == pytest.approx(40) and score.each == pytest.approx([0.8, 0])


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("104", "100", True),
        ("106", "100", False),
        ("10%", "0.1", True),
        ("0.01", "0", False),  # 5% of nothing is nothing
        ("0", "0", True),
        ("Red", "red", True),
        ("red car", "red", False),
        ("100", "hundred", False),
    ],
)
def test_relaxed_match(answer, reference, right):
    assert relaxed_match(answer, reference) is right


def test_chartqa_is_the_mean_of_its_parts():
    rows = [said("1", "1", category="human")] * 3 + [
        said("1", "2", category="augmented")
    ]
    score = relaxed_accuracy(rows)
    assert score.total == 50 and score.groups == {"human": 100, "augmented": 0}
    assert relaxed_accuracy(rows[:3]).total == 100
    assert relaxed_accuracy([said("1", "1"), said("1", "2")]).total == 50
    # Other categories only group the figures.
    own = [said("1", "1", category="a")] * 3 + [said("1", "2", category="b")]
    score = relaxed_accuracy(own)
    assert score.total == 75 and score.groups == {"a": 100, "b": 0}


def test_exact_accuracy():
    score = exact_accuracy([said(" Red ", "blue", "red"), said("redder", "red")])
    assert score.total == 50 and score.each == [1, 0]
    assert (score.low, score.high) == tuple(100 * x for x in intervals.wilson(1, 2))


# --- boxes ---


def test_iou_by_hand():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (2, 2, 0, 0)) == 1  # corners in any order
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert iou((math.nan, 0, 1, 1), (0, 0, 1, 1)) == 0


def test_a_box_must_cover_more_than_half():
    rows = [
        said((0, 0, 2, 1), box=(0, 0, 1, 1)),  # exactly 0.5
        said((0, 0, 10, 9), box=(0, 0, 10, 10)),
        said(None, box=(0, 0, 1, 1)),
    ]
    assert box_accuracy(rows).each == [0, 1, 0]


# --- answers ---


def test_cuts_of_pretrained_answers():
    assert cleaning.openflamingo_vqa("red, blue Question: x", Sample(id="")) == "red"
    assert cleaning.caption('\n A "red" cat\nOutput: a', Sample(id="")) == "A red cat"
    assert cleaning.short_answer(" Yes.\nIt is", Sample(id="")) == "Yes"
    assert cleaning.first_line("\n\n", Sample(id="")) == ""
    assert cleaning.stripped(" a\n", Sample(id="")) == "a"


@pytest.mark.parametrize(
    "text, stems",
    [
        ("riding horses", "ride horse"),
        ("two children, and a dog Question", "two child"),
        ("running", "run"),
        ("glass", "glass"),
        ("king", "king"),
        ("swimming", "swim"),
    ],
)
def test_okvqa_stems(text, stems):
    assert cleaning.okvqa(text, Sample(id="")) == stems


@pytest.mark.parametrize(
    "word, one",
    [
        ("tomatoes", "tomato"),
        ("knives", "knife"),
        ("wolves", "wolf"),
        ("buses", "bus"),
        ("men", "man"),
        ("firemen", "fireman"),
        ("people", "person"),
        ("mice", "mouse"),
        ("cities", "city"),
        ("boxes", "box"),
        ("series", "series"),
    ],
)
def test_singulars(word, one):
    assert stem(word) == one
    assert stem(one) == one


def test_okvqa_takes_the_datasets_own_stems_first():
    fields = {"stems": ("kiteboard", "surf")}
    sample = Sample(id="", answers=("kiteboarding", "surfing"), fields=fields)
    assert cleaning.okvqa("Kiteboarding", sample) == "kiteboard"
    assert cleaning.okvqa("kiteboarding", Sample(id="")) == "kiteboarding"


RACING = ("racing",) * 6 + ("motocross",) * 2 + ("riding",) * 2


@pytest.mark.parametrize("form", ["chat", "pretrain"])
@pytest.mark.parametrize(
    "stems", [None, ("race",) * 6 + ("motocross",) * 2 + ("ride",) * 2]
)
def test_okvqa_never_stems_one_side_alone(form, stems):
    """Answers of the hub are as people gave them; the original file has stems, too."""
    fields = {} if stems is None else {"stems": stems}
    sample = Sample(id="", answers=RACING, fields=fields)
    clean, metric, _ = find_task("okvqa").reading(form)
    for text, wanted in (("racing", 100), ("Riding", 60), ("surfing", 0)):
        score = metric([Answered(sample, text, clean(text, sample))])
        assert score.total == pytest.approx(wanted), text
    score = metric([Answered(sample, "race", clean("race", sample))])
    assert score.total == (100 if form == "pretrain" else 0)  # stems, or as written


# --- intervals ---


def test_wilsons_interval():
    low, high = intervals.wilson(5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    assert intervals.wilson(0, 0) == (0, 1)
    assert intervals.wilson(0, 20)[0] == 0 and intervals.wilson(20, 20)[1] == 1


def test_the_bootstrap_finds_the_interval_of_a_mean():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = intervals.bootstrap([values])
    reach = 1.96 * values.std() / 20
    # 1000 rounds: an end is known to about 5% of the width.
    assert_close(
        np.array([low, high]), values.mean() + reach * np.array([-1, 1]), atol=0.03
    )


def test_few_answers_that_are_all_right_are_not_certain():
    """No draw of the bootstrap changes them, so it is Wilson's interval."""
    assert intervals.spread([1.0] * 5) == intervals.wilson(5, 5)
    assert intervals.spread([0.0] * 5) == intervals.wilson(0, 5)
    values = [0.0, 0.3, 1.0]
    assert intervals.spread(values) == intervals.bootstrap([values])
    right = said("a", *["a"] * 10)
    for score in (vqa_score([right] * 5), anls_score([right] * 5)):
        low, high = intervals.wilson(5, 5)
        assert (score.low, score.high) == (100 * low, 100 * high)


def test_the_interval_of_a_sum():
    """By hand: 3 and 4 make 5."""
    found = intervals.of_sum([(10.0, 7.0, 14.0), (20.0, 16.0, 23.0)])
    assert found == pytest.approx((25.0, 35.0))
    assert intervals.of_sum([(1.0, 0.5, 2.0)]) == pytest.approx((0.5, 2.0))


def test_the_bootstrap_repeats_itself_and_keeps_groups_apart():
    values = list(np.random.default_rng(2).random(50))
    assert intervals.bootstrap([values]) == intervals.bootstrap([values])
    assert intervals.bootstrap([values]) != intervals.bootstrap([values], seed=1)
    # Two groups without spread: however they are drawn, their means stand.
    assert intervals.bootstrap([[1.0] * 3, [5.0]]) == (2, 2)
    halves = intervals.bootstrap([[1.0] * 3, [5.0]], lambda means: np.mean(means, 0))
    assert halves == (3, 3)
    with pytest.raises(ValueError, match="bootstrap of nothing"):
        intervals.bootstrap([[]])


@pytest.mark.parametrize(
    "metric",
    [
        anls_score,
        box_accuracy,
        choice_accuracy,
        cider_score,
        circular_accuracy,
        exact_accuracy,
        mathvista.mathvista_accuracy,
        mme.mme_score,
        mmmu_accuracy,
        pope.pope_accuracy,
        pope.pope_score,
        relaxed_accuracy,
        vqa_score,
    ],
)
def test_nothing_answered_scores_zero(metric):
    score = metric([])
    assert score.total == 0 and score.each == []
