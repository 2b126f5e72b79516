"""How each benchmark is asked, written out by hand."""

import pytest

from mm1_mlx.evaluation.prompts import FORMS
from mm1_mlx.evaluation.said_boxes import first_box
from mm1_mlx.evaluation.samples import Sample

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
HINT = "Hint: Please answer the question "


def sample(question="What is it?", choices=(), answers=("cat",), images=1, **fields):
    return Sample(
        id="1",
        question=question,
        choices=tuple(choices),
        answers=answers,
        images=("a.png",) * images,
        fields=fields,
    )


TWO = ("west", "east")


@pytest.mark.parametrize(
    "name, one, wanted",
    [
        ("coco", sample(""), "Provide a one-sentence caption for the provided image."),
        ("vqav2", sample(), f"What is it?\n{SHORT}"),
        ("okvqa", sample(), f"What is it?\n{SHORT}"),
        ("textvqa", sample("what does IT say?"), f"What does it say?\n{SHORT}"),
        (
            "vizwiz",
            sample("what is it?"),
            "What is it?\nWhen the provided information is insufficient, respond with "
            f"'Unanswerable'.\n{SHORT}",
        ),
        (
            "scienceqa",
            sample("Which?", TWO, hint="Look at the map."),
            f"Context: Look at the map.\nWhich?\nA. west\nB. east\n{LETTER}",
        ),
        (
            "scienceqa",
            sample("Which?", TWO, hint=""),
            f"Which?\nA. west\nB. east\n{LETTER}",
        ),
        ("ai2d", sample("Which?", TWO), f"Which?\nA. west\nB. east\n{LETTER}"),
        ("seedbench", sample("Which?", TWO), f"Which?\nA. west\nB. east\n{LETTER}"),
        (
            "mmbench",
            sample("Which?", TWO, hint="Look."),
            f"Look.\nWhich?\nA. west\nB. east\n{LETTER}",
        ),
        (
            "mmmu",
            sample("<image> or <image>?", TWO),
            f"<image> or <image>?\nA. west\nB. east\n\n{LETTER}",
        ),
        ("mmmu", sample("How much?", kind="open"), f"How much?\n\n{SHORT}"),
        (
            "mathvista",
            sample(query="Hint: as the dataset has it"),
            "Hint: as the dataset has it",
        ),
        (
            "mathvista",
            sample("Which?", TWO),
            f"{HINT}and provide the correct option letter, e.g., A, B, C, D, at the "
            "end.\nQuestion: Which?\nChoices:\n(A) west\n(B) east",
        ),
        (
            "mathvista",
            sample("How long?", unit="cm", answer_type="integer"),
            f"{HINT}requiring an integer answer and provide the final value, e.g., 1, "
            "2, 3, at the end.\nQuestion: How long? (Unit: cm)",
        ),
        (
            "mathvista",
            sample("How long?", answer_type="float", precision=2),
            f"{HINT}requiring a floating-point number with two decimal places and "
            "provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\n"
            "Question: How long?",
        ),
        (
            "mathvista",
            sample("How long?", answer_type="float", precision=1),
            f"{HINT}requiring a floating-point number with one decimal place and "
            "provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\n"
            "Question: How long?",
        ),
        (
            "mathvista",
            sample("Which?", answer_type="list"),
            f"{HINT}requiring a Python list as an answer and provide the final list, "
            "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: Which?",
        ),
        ("chartqa", sample(), "What is it?\nAnswer the question with a single word."),
        ("docvqa", sample(), f"What is it?\n{SHORT}"),
        ("infovqa", sample(), f"What is it?\n{SHORT}"),
        (
            "pope",
            sample("Is there a cat in the image?"),
            f"Is there a cat in the image?\n{SHORT}",
        ),
        ("mme", sample("Is it 3? Please answer yes or no."), f"Is it 3?\n{SHORT}"),
        (
            "refcoco",
            sample("the man"),
            "Please provide the bounding box coordinate of the region this sentence "
            "describes: the man",
        ),
        ("own_exact", sample(), "What is it?"),
        ("own_captions", sample("Describe."), "Describe."),
        (
            "own_captions",
            sample(""),
            "Provide a one-sentence caption for the provided image.",
        ),
    ],
)
def test_the_form_for_tuned_models(name, one, wanted):
    assert FORMS[name].ask(one) == wanted


@pytest.mark.parametrize(
    "name, one, wanted, answer",
    [
        (
            "coco",
            sample("", answers=("A red bus.", "x")),
            "<image> A photo of",
            "a red bus",
        ),
        ("nocaps", sample("", answers=("TV on.",)), "<image> A photo of", "TV on"),
        (
            "vqav2",
            sample("Why?", answers=("no", "yes", "yes")),
            "<image> Question: Why? Short answer:",
            "yes",
        ),
        (
            "okvqa",
            sample(
                "Why?",
                answers=("racing", "racing", "riding"),
                stems=("race", "race", "ride"),
            ),
            "<image> Question: Why? Short answer:",
            "racing",
        ),
        (
            "vqav2",
            sample("<image> or <image>?", images=2),
            " Question: <image> or <image>? Short answer:",
            "cat",
        ),
        (
            "textvqa",
            sample(images=2),
            "<image><image> Question: What is it? Short answer:",
            "cat",
        ),
    ],
)
def test_the_form_for_pretrained_models_and_what_a_shot_answers(
    name, one, wanted, answer
):
    form = FORMS[name]
    assert form.shot is not None and form.shot(one) == wanted
    assert form.target(one) == answer


def test_what_other_shots_answer():
    one = sample("Which?", TWO, ("B",))
    assert FORMS["ai2d"].target(one) == "B" and FORMS["ai2d"].shot is None
    one = sample("Which?", TWO, ("east",))
    assert FORMS["mathvista"].target(one) == "(B) east"
    assert FORMS["mathvista"].target(sample(answers=("1.5",))) == "1.5"
    assert FORMS["mathvista"].target(sample(answers=())) == ""
    one = sample("the man", answers=(), box=(0.1, 0.25, 0.5, 1.0))
    assert FORMS["refcoco"].target(one) == "<100,250,500,999>"


def test_where_answers_of_pretrained_models_end():
    assert FORMS["coco"].shot_stop == ("\n",)
    assert FORMS["vqav2"].shot_stop == ("\n", ".", ",", "Question")
    assert {form.stop for form in FORMS.values()} == {()}


def test_every_form_says_where_it_is_from():
    for name, form in FORMS.items():
        assert form.source, name


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[0.1, 0.25, 0.5, 1.0]", (0.1, 0.25, 0.5, 1.0)),
        ("It is at <100,250,500,999>.", (0.1, 0.25, 0.5, 0.999)),
        ("<box>(100,250),(500,1000)</box>", (0.1, 0.25, 0.5, 1.0)),
        ("[0, 0, 1, 1]", (0.0, 0.0, 1.0, 1.0)),  # as decimals
        ("<10 20 30 40>", (0.01, 0.02, 0.03, 0.04)),
        ("2, 3, 4, 5 dogs at [10, 20, 30, 40]", (0.01, 0.02, 0.03, 0.04)),
        ("[100.0, 250.0, 500.0, 1000.0]", (0.1, 0.25, 0.5, 1.0)),
        ("[0.0, 0.0, 1.0, 1.0] and [0.5, 0.5, 0.6, 0.6]", (0.0, 0.0, 1.0, 1.0)),
        ("[-20, 10, 3000, 40]", (0.0, 0.01, 1.0, 0.04)),
        ("at 1, 2, 3", None),
        ("nowhere", None),
        ("", None),
        ("," * 100_000, None),
        ("1" * 100_000, None),
        ("[" + " " * 100_000, None),
        ("<1 2 3" + " " * 100_000, None),
    ],
)
def test_the_box_that_was_said(text, wanted):
    assert first_box(text, sample()) == wanted
