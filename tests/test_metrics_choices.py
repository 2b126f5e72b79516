"""Metrics of choices, of MathVista's answers, and of yes or no."""

import pytest
from test_metrics import said

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation import cleaning
from mm1_mlx.evaluation.metrics import intervals, mathvista, mme, pope
from mm1_mlx.evaluation.metrics.choices import (
    choice_accuracy,
    circular_accuracy,
    mmmu_accuracy,
    rotations,
)
from mm1_mlx.evaluation.samples import Answered, Sample

# --- choices ---


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B)", "B"),
        ("B: the dog", "B"),
        (" B\nbecause", "B"),
        ("The answer is B.", "B"),
        ("Answer: (B)", "B"),
        ("The answer is a mouse", None),
        ("The dog.", "B"),
        ("Because it barks", None),
        ("A dog", None),  # an article, not choice A
        ("E", None),  # there are four
        ("", None),
        ("The answer is A cow.", "C"),  # the choice, not the letter
        ("Answer: A mouse", None),
        ("The best option is A because it purrs", "A"),
        ("The answer is (A) a cat", "A"),
        ("Answer: A", "A"),
        ("I think B", "B"),
        ("I think it is A or B", None),
        ("It shows a cow in a field", "C"),
        ("Either a cow or a pig", None),
        ("A cowboy", None),
    ],
)
def test_letters(text, letter):
    sample = Sample(id="0", choices=("a cat", "the dog", "a cow", "a pig"))
    assert cleaning.letter(text, sample) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("It is B.", "B"),
        ("B a dog", "B"),
        ("A dog", "A"),  # as MMBench reads it
        ("The answer is A cow.", "C"),
        ("Surely not A nor B", None),
        ("(C) of course, not B:", "B"),  # the order of its marks
        ("E", None),
        ("b", "B"),  # ours, in ChatGPT's place
        ("It shows A COW in a field", "C"),
    ],
)
def test_mmbenchs_letters(text, letter):
    sample = Sample(id="0", choices=("a cat", "the dog", "a cow", "a pig"))
    assert cleaning.mmbench_letter(text, sample) == letter


def test_a_choice_of_one_letter_is_the_whole_text_of_it():
    """AI2D asks for letters in drawings."""
    sample = Sample(id="", choices=("C", "F", "G", "H"))
    assert [cleaning.letter(t, sample) for t in ("F", "H.", "B", "C")] == list("BDBC")
    assert cleaning.letter("Z", sample) is None


@pytest.mark.parametrize(
    "text, letter",
    [
        (" B ", "B"),
        ("B. the dog", "B"),
        ("It barks.\nThe answer is B.", "B"),
        ("The answer is B", None),  # LLaVA wants something behind it
        ("The answer is B. The answer is C.", None),
        ("b", None),
        ("B.", None),
        ("(B)", None),
        ("E", None),  # there are four
        ("the dog", None),
        ("", None),
    ],
)
def test_scienceqas_letters(text, letter):
    sample = Sample(id="0", choices=("a cat", "the dog", "a cow", "a pig"))
    assert cleaning.scienceqa_letter(text, sample) == letter
    assert cleaning.scienceqa_letter("E", Sample(id="0")) == "E"  # choices not known


@pytest.mark.parametrize(
    "text, letter",
    [("B. the dog", "B"), ("(b)", "B"), ("B)", "B"), ("B: dog", None), ("", None)],
)
def test_ai2ds_letters(text, letter):
    assert cleaning.ai2d_letter(text, Sample(id="0")) == letter


def test_space_before_an_answer_is_not_a_yes():
    assert cleaning.pope_yes_or_no("\nNo", Sample(id="0")) == "no"


def test_exact_letters():
    sample = Sample(id="0", choices=("x", "y"))
    assert cleaning.exact_letter(" b ", sample) == "B"
    assert cleaning.exact_letter("B.", sample) is None


def test_choice_accuracy():
    rows = [said("B", "B", category="x"), said(None, "A", category="y"), said("a", "A")]
    score = choice_accuracy(rows)
    assert score.each == [1, 0, 1] and score.total == pytest.approx(200 / 3)
    assert score.groups == {"x": 100, "y": 0}


def test_rotations_turn_the_choices_and_the_answer():
    sample = Sample(id="7", choices=("x", "y", "z"), answers=("B",))
    turned = list(rotations(sample))
    assert [s.choices for s in turned] == [tuple("xyz"), tuple("yzx"), tuple("zxy")]
    assert [s.answers[0] for s in turned] == ["B", "A", "C"]  # always y
    assert [s.id for s in turned] == ["7", "7+1", "7+2"]
    assert {s.fields["circle"] for s in turned} == {"7"}


def test_a_circle_is_right_when_all_its_rotations_are():
    samples = [
        turned
        for name in "pq"
        for turned in rotations(Sample(id=name, choices=("x", "y"), answers=("A",)))
    ]
    right = [Answered(s, s.answers[0], s.answers[0]) for s in samples]
    assert circular_accuracy(right).total == 100
    for place in (2, 3):  # either copy of q
        one_wrong = [*right]
        one_wrong[place] = Answered(samples[place], None, None)
        score = circular_accuracy(one_wrong)
        assert score.total == 50 and score.each == [1, 1, 0, 0]
    # "always A" is right half of the time, and never in a circle
    lazy = [Answered(s, "A", "A") for s in samples]
    assert choice_accuracy(lazy).total == 50 and circular_accuracy(lazy).total == 0


def test_rotations_need_the_letter_of_a_choice():
    sample = Sample(id="7", choices=("x", "y"), answers=("D",))
    with pytest.raises(
        DatasetError, match=r"Question 7 has the answer 'D' and 2 choic"
    ):
        list(rotations(sample))


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B. cat", "B"),
        ("B cat", "B"),
        ("(A) or (B)", "B"),
        ("A. dog B. cat", "A"),  # neither letter stands alone
        ("cat", None),
        ("I am sure that it is a dog", "A"),
    ],
)
def test_mmmus_letters(text, letter):
    assert cleaning.mmmu_letter(text, ("dog", "cat")) == letter


def test_mmmu_takes_letters_and_open_answers():
    def one(text, *answers, choices=(), **fields):
        sample = Sample(id="0", answers=answers, choices=choices, fields=fields)
        return Answered(sample, text, cleaning.mmmu(text, sample))

    rows = [
        one("I say (B)", "B", choices=("x", "y"), category="Art"),
        one("the answer is 1,200", "1200", category="Music"),
        one("it is blue, so red", "blue", category="Music"),  # blue stands before so
    ]
    score = mmmu_accuracy(rows)
    assert score.each == [1, 1, 0]
    assert score.groups == {"Art": 100, "Music": 50, "macro": 75}
    assert mmmu_accuracy([one("(B)", "b", choices=("x", "y"))]).groups == {}


# --- MathVista, with our extraction ---


@pytest.mark.parametrize(
    "text, kind, precision, answer",
    [
        ("14", "integer", 0, "14"),
        ("There are 3 cats and 4 dogs. The answer is 7.", "integer", 0, "7"),
        ("Answer: 1,200 m", "integer", 0, "1200"),
        ("The answer is 5. The answer is 7, as 3 + 4 make 7 of 9", "integer", 0, "7"),
        ("I see 3 dogs, no, 4", "integer", 0, "4"),
        ("+5 - or so", "integer", 0, "5"),
        ("so x = -3", "integer", 0, "-3"),
        ("about 0.571 of them", "float", 2, "0.57"),
        ("$1.45", "float", 2, "1.45"),
        ("peak between [2007, 2008]", "list", 0, "[2007, 2008]"),
    ],
)
def test_mathvista_numbers_and_lists(text, kind, precision, answer):
    fields = {"question_type": "free_form", "answer_type": kind}
    sample = Sample(
        id="0", answers=(answer,), fields={**fields, "precision": precision}
    )
    found = cleaning.mathvista(text, sample)
    assert mathvista.comparable(found, sample) == answer
    score = mathvista.mathvista_accuracy([Answered(sample, text, found)])
    assert score.total == 100


@pytest.mark.parametrize(
    "text, choice",
    [
        ("B", "tokyo"),
        ("(B) tokyo", "tokyo"),
        ("The correct answer is (C).", "larger than"),
        ("A city: it has to be Tokyo", "tokyo"),
        ("The right option is B, for its size. A is wrong.", "tokyo"),
        ("The correct option is A, as it is near. B is wrong.", "osaka"),
        ("the answer is osaka", "osaka"),
        ("not tokyo or A, but osaka", "osaka"),
        ("A", "osaka"),
        ("tokio", "tokyo"),  # the nearest spelling, as the benchmark does
    ],
)
@pytest.mark.parametrize("as_letter", [False, True])
def test_mathvista_choices(text, choice, as_letter):
    choices = ("osaka", "tokyo", "larger than")
    answer = "ABC"[choices.index(choice)] if as_letter else choice
    fields = {"question_type": "multi_choice", "answer_type": "text"}
    sample = Sample(id="0", choices=choices, answers=(answer,), fields=fields)
    found = cleaning.mathvista(text, sample)
    assert mathvista.same(mathvista.comparable(found, sample), sample)


def test_mathvista_without_an_answer_is_wrong():
    fields = {"question_type": "free_form", "answer_type": "integer"}
    sample = Sample(id="0", answers=("3",), fields=fields)
    assert mathvista.comparable(cleaning.mathvista("no idea", sample), sample) is None


# --- yes or no ---


@pytest.mark.parametrize(
    "text, mme_answer, pope_answer",
    [
        ("Yes, it is.", "yes", "yes"),
        ("a yes", "other", "yes"),  # not within four characters
        ("It is not there", "other", "no"),
        ("Yes. There is no dog", "yes", "yes"),  # the first sentence alone
        ("No, there is none", "no", "no"),
        ("", "other", "yes"),
        ("n.", "no", "yes"),
    ],
)
def test_yes_and_no(text, mme_answer, pope_answer):
    assert cleaning.mme_yes_or_no(text, Sample(id="")) == mme_answer
    assert cleaning.pope_yes_or_no(text, Sample(id="")) == pope_answer


def test_mme_counts_pairs():
    rows = [
        said("yes", "Yes", category="count", pair=1),
        said("no", "No", category="count", pair=1),
        said("yes", "Yes", category="count", pair=2),
        said("yes", "No", category="count", pair=2),
        said("no", "Yes", category="code_reasoning", pair=1),
        said("no", "No", category="code_reasoning", pair=1),
        said("yes", "Yes", category="OCR", pair=1),  # its partner was not asked
    ]
    score = mme.mme_score(rows)
    assert score.groups["count"] == (200 + 50) / 2
    assert score.groups["perception"] == 125 and score.groups["cognition"] == 50
    assert score.total == 175 and score.groups["MM1.5 (/ 28)"] == 175 / 28
    assert score.each == [1, 1, 1, 0, 0, 1, 1] and "OCR" not in score.groups
    assert score.low is None and score.high is None  # of 2 categories of 14
    assert mme.mme_score([]).total == 0


def test_the_interval_of_mme():
    """Pairs that are all right in each category are not certain."""
    names = (*mme.PERCEPTION, *mme.COGNITION)
    right = [
        said(word, word, category=name, pair=pair)
        for name in names
        for pair in (1, 2, 3)
        for word in ("yes", "no")
    ]
    score = mme.mme_score(right)
    reach = 200 * (1 - intervals.wilson(3, 3)[0])
    assert (score.total, score.high) == (2800, 2800)
    assert score.low == pytest.approx(2800 - reach * 14**0.5)
    assert mme.mme_score(right[6:]).low is None


def test_mme_needs_its_fields_and_pairs_of_two():
    with pytest.raises(DatasetError, match=r"question 9 has no field 'pair'"):
        mme.mme_score([said("yes", "Yes", id="9", category="count")])
    rows = [said("yes", "Yes", category="count", pair=1)] * 3
    with pytest.raises(
        DatasetError, match="picture 1 of count has 3 questions, expect"
    ):
        mme.mme_score(rows)


def test_pope_by_hand():
    """3 of 4 there are seen; 1 of 2 others is seen, too."""
    answers = ["yes", "yes", "yes", "no", "yes", "no"]
    there = ["yes", "yes", "yes", "yes", "no", "no"]
    found = pope.existence(answers, there)
    assert found == pope.Existence(4 / 6, 3 / 4, 3 / 4, 3 / 4, 4 / 6)
    assert pope.existence([], []) == pope.Existence(0, 0, 0, 0, 0)
    assert pope.existence(["other"], ["no"]).accuracy == 0


def test_pope_is_the_mean_of_its_splits():
    rows = [
        said("yes", "yes", category="random"),
        said("no", "no", category="random"),
        said("yes", "yes", category="adversarial"),
        said("yes", "no", category="adversarial"),
    ]
    score = pope.pope_score(rows)
    assert score.total == pytest.approx((100 + 200 / 3) / 2)
    assert score.groups["adversarial precision"] == 50
    assert score.groups["yes"] == 75 and score.each == [1, 1, 1, 0]
    assert score.low < score.total <= score.high
    certain = pope.pope_score(rows[:2] * 10)
    assert (certain.total, certain.high) == (100, 100)
    assert certain.low == pytest.approx(100 * intervals.wilson(20, 20)[0])
    assert pope.pope_accuracy(rows).total == 75
    assert set(pope.pope_score(rows[:2]).groups) == set(pope._FIGURES)
    assert pope.pope_score([]).total == 0
