"""How examples are written as text: a template with fields, and what it makes."""

import string
from collections.abc import Sequence
from dataclasses import replace

from mm1_mlx.errors import DatasetError, PromptError
from mm1_mlx.inputs.examples import Example
from mm1_mlx.inputs.prompts import IMAGE_TOKEN

Piece = tuple[str, str | None]  # a text, and the field behind it

FIELDS = ("image", "prompt", "reasoning", "answer")
# Examples without a question are lines of a picture and its label. With one, a model
# without a chat template gets the pretraining form that MM1 is reported to use.
BARE = "{image} {answer}"
QUESTIONS = "{image} Question: {prompt} Short answer: {answer}"


def parse_template(template: str) -> list[Piece]:
    """A template as (text, the field behind it): each field once, in an order that can
    be asked; PromptError else."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise PromptError(
            f"The template of shots {template[:60]!r} is broken ({error}). A brace "
            f"that is no field is written twice: {{{{."
        ) from error
    fields = [field for _, field, _, _ in parts if field is not None]
    known = ", ".join(f"{{{field}}}" for field in FIELDS)
    for field in fields:
        if field not in FIELDS or fields.count(field) > 1:
            problem = "twice" if field in FIELDS else "but it is none"
            raise PromptError(
                f"The template of shots has {{{field}}} {problem}. Fields are {known}, "
                f"each once at most."
            )
    before = ["reasoning"] if "reasoning" in fields else []
    if fields[-1 - len(before) :] != [*before, "answer"]:
        raise PromptError(
            f"The template of shots {template[:60]!r} must end with {{answer}}, and "
            f"{{reasoning}} stands right before it, if it is there. Fields are {known}."
        )
    pieces: list[tuple[str, str | None]] = [
        (text, field) for text, field, _, _ in parts
    ]
    if "reasoning" in fields:
        mark = next(text for text, field in pieces if field == "answer")
        if not mark.strip():
            raise PromptError(
                "The template of shots has nothing between {reasoning} and {answer}: "
                "write a mark there, such as 'Answer:'."
            )
    return pieces


def with_reasoning(template: str, mark: str) -> str:
    """The template with reasoning before the answer, and the mark between both."""
    template = template.replace("Short answer: {answer}", "{answer}")
    mark = mark.replace("{", "{{").replace("}", "}}")
    return template.replace("{answer}", "{reasoning} " + mark + " {answer}")


def prompt_of(shot: Example, question: str) -> str:
    """Its own, or the question that is asked of all."""
    if shot.prompt is not None:
        return shot.prompt
    if question.count(IMAGE_TOKEN) == len(shot.images):
        return question
    return question.replace(IMAGE_TOKEN, "").strip()


def written(pieces: Sequence[Piece], shot: Example, question: str) -> str:
    """One example as text; question: where it has no prompt of its own."""
    prompt = prompt_of(shot, question)
    inside = IMAGE_TOKEN in prompt
    values = {
        "image": "" if inside else IMAGE_TOKEN * len(shot.images),
        "prompt": prompt,
        "reasoning": shot.reasoning,
        "answer": shot.answer,
    }
    made = "".join(
        text + (str(values[field]) if field else "") for text, field in pieces
    )
    return made.lstrip(" ")


def check_mark(mark: str, stops: Sequence[str]) -> None:
    """PromptError where what stands before an answer would end one."""
    for stop in (stop for stop in stops if stop in mark):
        raise PromptError(
            f"The template of shots has {stop!r} between {{reasoning}} and {{answer}}, "
            f"but that ends an answer. Write another text there, or give another "
            f"separator (--shot-separator)."
        )


def unbroken(shot: Example, stops: Sequence[str], reasoned: bool) -> Example:
    """The example with nothing in its answer, nor in reasoning that is shown, that
    would end an answer: line breaks become spaces; DatasetError for another text."""
    for field in ("reasoning", "answer") if reasoned else ("answer",):
        text = str(getattr(shot, field))
        for stop in (stop for stop in stops if stop in text):
            if not stop.isspace():
                raise DatasetError(
                    f"{shot.where}: the {field} has {stop!r} in it, which ends an "
                    f"answer here. Take it out, or write examples in another way "
                    f"(--shot-separator, --shot-template)."
                )
            text = " ".join(text.split())
            shot = replace(shot, **{field: text})
    return shot


def split_answer(text: str, mark: str | None) -> tuple[str | None, str]:
    """Reasoning and answer of a text; None and the text where the mark is missing."""
    if mark is None:
        return None, text.strip()
    reasoning, found, answer = text.rpartition(mark)
    return (reasoning.strip() if found else None), answer.strip()
