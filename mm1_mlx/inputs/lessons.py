"""Conversations to learn from: the ids that an answer has, and which are learned.

A conversation is cut where an answer begins and where it ends, and each piece is
encoded alone: so the ids before an answer are those of the prompt that asks for it, and
the answer begins as a model must begin it. Learned are the answers with the mark that
ends them, and nothing else: no image slot, no question, no template.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm1_mlx.errors import PromptError
from mm1_mlx.grids import Layout
from mm1_mlx.inputs.counting import Slot, layouts_of
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.prompts import (
    IMAGE_TOKEN,
    flatten_messages,
    guard,
    place_images,
    render_chat,
)
from mm1_mlx.inputs.resolution import Way


@dataclass(frozen=True)
class Lesson:
    """One conversation, ready to be learned.

    ids, learned: an entry per token. pixel_values: (N, H, W, 3) float32, all pictures'
    tiles in order, or None. layouts: of each picture, where some are in tiles.
    image_tokens: of each picture.
    """

    ids: list[int]
    learned: list[bool]
    pixel_values: np.ndarray | None
    layouts: tuple[Layout, ...]
    image_tokens: tuple[int, ...]


def make_lesson(
    processor: Processor,
    messages: list[dict[str, Any]],
    images: list[Any] | None = None,
    *,
    chat_template_config: Mapping[str, Any] | None = None,
) -> Lesson:
    """The lesson of a conversation; every turn of the assistant is learned.

    messages, images: as the processor takes them. Raises PromptError for a
    conversation without an answer, ImageError for a picture that cannot be read.
    """
    flat, sources = _flat(processor, messages, images)
    ways = processor.ways(len(sources))
    pairs = zip(sources, ways, strict=True)
    read = [processor.read_picture(source, way) for source, way in pairs]
    slots = processor.slots(ways, [layout for _, _, layout in read])
    ids, learned = _encode(processor, flat, slots, chat_template_config)
    if not any(learned):
        raise PromptError(
            f"None of the conversation's {len(ids)} tokens would be learned: the "
            f"tokenizer makes no token of its answers, and has none that ends them."
        )
    shots = [shot for shot, _, _ in read]
    return Lesson(
        ids,
        learned,
        np.concatenate(shots) if shots else None,
        layouts_of(slots),
        tuple(slot.tokens for slot in slots),
    )


def lesson_length(
    processor: Processor,
    messages: list[dict[str, Any]],
    images: list[Any] | None = None,
    *,
    chat_template_config: Mapping[str, Any] | None = None,
) -> int:
    """How many tokens the lesson of a conversation has; no picture is decoded for it.

    Arguments and errors as of `make_lesson`.
    """
    flat, sources = _flat(processor, messages, images)
    ways = processor.ways(len(sources))
    pairs = zip(sources, ways, strict=True)
    layouts = [processor.picture_layout(source, way) for source, way in pairs]
    slots = processor.slots(ways, layouts)
    return len(_encode(processor, flat, slots, chat_template_config)[0])


def lesson_layouts(
    processor: Processor,
    messages: list[dict[str, Any]],
    images: list[Any] | None = None,
) -> list[tuple[Way, Layout]]:
    """How each picture of a lesson is read, and how its tiles lie; as lesson_length."""
    _, sources = _flat(processor, messages, images)
    pairs = zip(sources, processor.ways(len(sources)), strict=True)
    return [(way, processor.picture_layout(source, way)) for source, way in pairs]


def _flat(
    processor: Processor, messages: list[dict[str, Any]], images: list[Any] | None
) -> tuple[list[dict], list]:
    """The messages with a slot for each picture, and the pictures, up to the last
    answer: nothing is learned of what comes after it."""
    flat, held = flatten_messages(messages)
    if held and images:
        raise PromptError(
            f"The messages hold {len(held)} images and {len(images)} more stand beside "
            f"them. Give them in one place only."
        )
    sources = held or list(images or [])
    if sources and not processor.config.reads_images:
        raise PromptError("This model reads text only, but the sample has images.")
    _check_answers(flat)
    marks = processor.tokenizer.marks
    flat = [{**m, "content": guard(m["content"], marks)} for m in flat]
    flat = place_images(flat, len(sources))
    last = max(i for i, m in enumerate(flat) if m["role"] == "assistant")
    flat = flat[: last + 1]
    return flat, sources[: sum(m["content"].count(IMAGE_TOKEN) for m in flat)]


def _check_answers(messages: list[dict]) -> None:
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        raise PromptError("The conversation has no message of the role 'assistant'.")
    if not all(text.strip() for text in answers):
        raise PromptError("An answer (role 'assistant') is empty: nothing to learn.")
    if any(IMAGE_TOKEN in text for text in answers):
        raise PromptError(f"An answer holds {IMAGE_TOKEN}: models answer with text.")
    if messages[0]["role"] == "assistant":
        raise PromptError("The conversation begins with an answer to nothing.")


def _pieces(
    messages: list[dict], template: str | None, variables: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """The text of the conversation in pieces, and whether each is an answer."""
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render_chat(messages[:number], template, **variables)
        answered = render_chat(messages[: number + 1], template, False, **variables)
        if not asked.startswith(done) or not answered.startswith(asked.rstrip()):
            raise PromptError(
                "The chat template changes earlier turns when a later one comes, so it "
                "is not known which text is an answer. Name a built-in template."
            )
        # A prompt may end with a space that an answer's own first word brings.
        start = len(asked) if answered.startswith(asked) else len(asked.rstrip())
        yield asked[len(done) : start], False
        yield answered[start:], True
        done = answered


def _encode(
    processor: Processor,
    flat: list[dict],
    slots: list[Slot],
    chat_template_config: Mapping[str, Any] | None,
) -> tuple[list[int], list[bool]]:
    """Ids, and which are learned. slots: of each picture."""
    variables = {
        **processor.tokenizer.template_tokens(),
        **(chat_template_config or {}),
    }
    pieces = _pieces(flat, processor.chat_template, variables)
    ids: list[int] = []
    learned: list[bool] = []
    left, place = list(slots), "start"
    ends = set(processor.eos_token_ids)
    for text, is_answer in pieces:
        new = processor.encode_piece(text, left, place=place)
        flags = [is_answer] * len(new)
        if is_answer:
            first = next((k for k, i in enumerate(new) if i in ends), len(new) - 1)
            flags[first + 1 :] = [False] * (len(new) - first - 1)
        ids += new
        learned += flags
        place = processor.tokenizer.place_after(text)
    if ends and not any(i in ends and flag for i, flag in _tail(ids, learned)):
        ids.append(processor.eos_token_ids[0])  # or the model would never stop
        learned.append(True)
    processor.check_ids(ids, [slot.tokens for slot in slots])
    return ids, learned


def _tail(ids: list[int], learned: list[bool]) -> Iterator[tuple[int, bool]]:
    """The last answer's ids, from its end back."""
    pairs = list(zip(ids, learned, strict=True))
    while pairs and not pairs[-1][1]:
        pairs.pop()
    return reversed(pairs[-1:])
