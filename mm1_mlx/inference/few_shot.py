"""Few-shot prompting: which examples stand before a question, and how they are written.

MM1 (section on few-shot evaluation) shows 4, 8 or 16 examples from the training split.
"""

import random
from collections.abc import Container
from copy import copy
from dataclasses import replace
from itertools import pairwise
from numbers import Integral
from typing import Any, Self

import numpy as np

from mm1_mlx.errors import DatasetError, ImageError, MM1Error, PromptError
from mm1_mlx.inference.asked import Asked
from mm1_mlx.inference.features import Features
from mm1_mlx.inference.shot_template import (
    BARE,
    QUESTIONS,
    check_mark,
    parse_template,
    prompt_of,
    unbroken,
    with_reasoning,
    written,
)
from mm1_mlx.inputs.examples import Example, read_examples
from mm1_mlx.inputs.prompts import (
    IMAGE_TOKEN,
    builtin_name,
    flatten_messages,
    is_conversation,
    place_images,
    with_image_slots,
)
from mm1_mlx.inputs.resolution import is_native, of_frames
from mm1_mlx.inputs.video import is_frame

CHOICES = ("first", "random", "nearest")
MARK = "Answer:"


class FewShot:
    """Examples that stand before every question.

        shots = FewShot("shots.jsonl", 8)
        generate(model, processor, "What is this?", "query.png", shots=shots)

    shots: a file with a JSON object in every line, or a list of dicts, as examples.py
    has them. num_shots: how many are shown; None is all of them.
    choice: "random" by `seed`, the same ones for every question, so that a Reuse reads
    them once; "nearest" to the question's picture by the encoder's features, the
    nearest one last; "first" in the order of the file. By default random, or first
    where all are shown. balanced: as many of each answer as can be.
    template: None writes examples as turns of the chat template. A text with {image},
    {prompt}, {reasoning} and {answer} writes them as one text, of which the question is
    the last part, up to its answer; `separator` (a line break) stands between, and ends
    an answer.
    Without one, examples and question that have no prompt are written as BARE, and for
    a model without a chat template as QUESTIONS.
    reasoning: whether the examples' reasoning is shown, before their answers; None is
    where they have one. answer_mark: what stands between both; GenerationResponse has
    both apart.
    high_resolution_shots: how many of the last ones are read in the question's
    resolution, which must be a higher one than the encoder's own ("native"), in which
    those before them are read. (MM1's mixed resolution.) None: all are read as the
    question, so without dynamic tiles where there are too many pictures for them.
    features: a Features that knows pictures already, or the file where it keeps them.

    Raises DatasetError for what is wrong with the examples, with the line's number,
    MM1Error for other values.
    """

    def __init__(
        self,
        shots: Any,
        num_shots: int | None = None,
        *,
        choice: str | None = None,
        seed: int = 0,
        balanced: bool = False,
        template: str | None = None,
        separator: str | None = None,
        reasoning: bool | None = None,
        answer_mark: str = MARK,
        high_resolution_shots: int | None = None,
        features: Any = None,
    ):
        self.examples = read_examples(shots)
        self.num_shots = self._count(num_shots)
        if choice is None:
            choice = "first" if num_shots is None else "random"
        if choice not in CHOICES:
            raise MM1Error(
                f"choice is {choice!r}, but must be one of {', '.join(CHOICES)}."
            )
        _check_texts(separator=separator, template=template, answer_mark=answer_mark)
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise MM1Error(f"seed is {seed!r}, but must be a whole number.")
        self.choice, self.seed, self.balanced = choice, int(seed), balanced
        self.separator, self._parted = separator or "\n", separator is not None
        self._mark = answer_mark.strip()
        self.high_resolution_shots = _checked(high_resolution_shots)
        self._reasoned = self._wants_reasoning(reasoning)
        self._prompted = self.examples[0].prompt is not None
        self.template = template
        known = isinstance(features, Features)
        self._features: Features = features if known else Features(features)
        self._held: np.ndarray | None = None
        if template is not None:
            parse_template(template)

    def _count(self, num_shots: Any) -> int:
        there = len(self.examples)
        if num_shots is None:
            return there
        whole = isinstance(num_shots, (int, np.integer)) and num_shots is not True
        if not whole or num_shots < 1:
            raise MM1Error(
                f"num_shots is {num_shots!r}, but must be a whole number above 0."
            )
        if num_shots > there:
            raise DatasetError(
                f"{num_shots} shots were asked for, but there are {there}. Give more "
                f"examples, or ask for fewer: --num-shots {there} (num_shots={there})."
            )
        return int(num_shots)

    def _wants_reasoning(self, reasoning: bool | None) -> bool:
        have = self.examples[0].reasoning is not None
        if reasoning and not have:
            raise DatasetError(
                f'{self.examples[0].where}: no "reasoning", but it shall be shown.'
            )
        return have if reasoning is None else bool(reasoning)

    @property
    def reasoned(self) -> bool:
        """Whether reasoning is shown."""
        return self._reasoned

    @property
    def features(self) -> Features:
        """What knows the features of pictures."""
        return self._features

    # --- which examples --------------------------------------------------------------

    def choose(
        self,
        model: Any = None,
        processor: Any = None,
        images: Any = None,
        *,
        leave_out: Container[int] = (),
        **limits: Any,
    ) -> list[Example]:
        """The examples for a question, in the order in which they are shown.

        model, processor, images: of the question, for "nearest". leave_out: numbers of
        examples that must not be shown; others take their places. limits: of
        Features.of.
        """
        if self.choice == "nearest":
            order = self._by_nearness(model, processor, images, limits)
            return list(reversed(self._some(order, leave_out)))
        order = list(self.examples)
        if self.choice == "random":
            random.Random(self.seed).shuffle(order)
        return self._some(order, leave_out)

    def _some(self, order: list[Example], leave_out: Container[int]) -> list[Example]:
        """The first ones, or the first ones of each answer in turn."""
        order = [example for example in order if example.number not in leave_out]
        if not self.balanced:
            return order[: self.num_shots]
        kinds: dict[str, int] = {}
        rounds: list[int] = []
        for example in order:
            rounds.append(kinds.get(example.answer, 0))
            kinds[example.answer] = rounds[-1] + 1
        places = sorted(range(len(order)), key=lambda i: rounds[i])[: self.num_shots]
        if self.choice == "nearest":
            places = sorted(places)
        return [order[i] for i in places]

    def look(self, model: Any, processor: Any, **limits: Any) -> np.ndarray:
        """Features of every example's pictures, (N, Dv), which "nearest" needs; they
        are kept. limits: as of Features.of, `progress` among them.

        DatasetError names the line of a picture that cannot be read.
        """
        if bare := [e for e in self.examples if not e.images]:
            raise DatasetError(
                f"{bare[0].where}: it has no picture, so nothing tells how near it is."
            )
        every = [image for example in self.examples for image in example.images]
        try:
            return self._features.of(model, processor, every, **limits)
        except ImageError as error:
            limits.pop("progress", None)
            asked = Asked("", None, shots=tuple(self.examples))
            raise asked.explained(error, **limits) from error

    def looked(self, model: Any, processor: Any, **limits: Any) -> Self:
        """The same with every example's features held, for many questions: none of
        their pictures is opened for the next one. limits: as of look."""
        return self.changed(_held=self._means(self.look(model, processor, **limits)))

    def _means(self, rows: np.ndarray) -> np.ndarray:
        """Of each example's pictures. (N, Dv) float32"""
        starts = np.cumsum([0] + [len(e.images) for e in self.examples])
        return np.stack([rows[a:b].mean(axis=0) for a, b in pairwise(starts)])

    def _by_nearness(
        self, model: Any, processor: Any, images: Any, limits: dict[str, Any]
    ) -> list[Example]:
        """Nearest first; of equal ones the first in the file."""
        if not images:
            raise PromptError(
                "The nearest shots are those of a picture, but the question has none: "
                "choose them at random, or give a picture."
            )
        rows = self._held
        if rows is None:
            rows = self._means(self.look(model, processor, **limits))
        query = self._features.of(model, processor, images, **limits).mean(axis=0)
        near = [float(row @ query) for row in rows]
        order = sorted(range(len(near)), key=lambda i: -near[i])
        return [self.examples[i] for i in order]

    # --- how they are written --------------------------------------------------------

    def ask(
        self,
        prompt: Any,
        images: Any = None,
        *,
        model: Any = None,
        processor: Any = None,
        use_template: bool = True,
        resolution: Any = None,
        leave_out: Container[int] = (),
        **limits: Any,
    ) -> Asked:
        """A question behind its examples; prompt, images and resolution of what it
        gives go to the processor.

        prompt, images: as generate takes them; resolution: of these images. processor:
        whose chat template it will be. model: for "nearest". leave_out: as of choose.
        limits: of Features.of.
        Raises PromptError for a question that the examples do not go with.
        """
        how = {"model": model, "processor": processor, "use_template": use_template}
        how |= {"resolution": resolution, "leave_out": leave_out}
        asked = self._ask(prompt, images, **how, **limits)

        def other(**values: Any) -> Asked:
            return self.changed(**values)._ask(prompt, images, **how, **limits)

        reads = getattr(processor, "image_settings", None) is not None
        return replace(
            asked,
            again=lambda count: other(num_shots=count),
            large=(lambda count: other(high_resolution_shots=count)) if reads else None,
            high=self.high_resolution_shots,
        )

    def changed(self, **values: Any) -> Self:
        """The same with another num_shots, choice, ..."""
        other = copy(self)
        vars(other).update(values)
        return other

    def _ask(
        self,
        prompt: Any,
        images: Any,
        *,
        model: Any,
        processor: Any,
        use_template: bool,
        resolution: Any,
        leave_out: Container[int],
        **limits: Any,
    ) -> Asked:
        flat, its_images = _question(prompt, images, limits)
        chosen = self.choose(
            model, processor, its_images, leave_out=leave_out, **limits
        )
        template = self.form(flat, processor, use_template)
        if template is None:
            asked = self._turns(chosen, flat, its_images)
        elif len(flat) == 1:
            asked = self._text(template, chosen, flat[0]["content"], its_images)
        else:
            raise PromptError(
                "A conversation goes with shots as turns of a chat template only: give "
                "the question as text, or leave the template of shots out."
            )
        check_resolutions(self.high_resolution_shots, processor, resolution)
        own = getattr(processor, "resolution", None)
        each = self._each(chosen, its_images, resolution, own)
        return replace(asked, resolution=each)

    def _each(
        self, chosen: list[Example], images: list[Any], resolution: Any, own: Any
    ) -> list | Any:
        """The resolution, or where they differ one for each picture. own: of the
        processor."""
        count = sum(len(shot.images) for shot in chosen)
        if self.high_resolution_shots is None:
            if not isinstance(resolution, (list, tuple)):
                return resolution
            return [None] * count + list(resolution)
        low = len(chosen) - self.high_resolution_shots
        shown = [
            "native" if i < low else resolution
            for i, shot in enumerate(chosen)
            for _ in shot.images
        ]
        film = of_frames(resolution, own) if any(map(is_frame, images)) else None
        return shown + [film if is_frame(image) else resolution for image in images]

    def form(self, flat: list[dict], processor: Any, use_template: bool) -> str | None:
        """The template of the text, or None for turns. flat: messages of the question
        that are text."""
        if self.template is not None:
            return self.template
        said = flat[-1]["content"].replace(IMAGE_TOKEN, "").strip()
        if not self._prompted and not said:
            return self._with_reasoning(BARE)
        chat = getattr(processor, "chat_template", None)
        if use_template and builtin_name(chat) != "plain":
            return None
        return self._with_reasoning(QUESTIONS)

    def _with_reasoning(self, template: str) -> str:
        if not self._reasoned:
            return template
        return with_reasoning(template, self._mark)

    def _turns(self, chosen: list[Example], flat: list[dict], images: list) -> Asked:
        if self._parted:
            raise PromptError(
                "A separator stands between shots that are written as one text, but "
                "these are turns of a chat: give a template, too (--shot-template), or "
                "leave the separator out (--shot-separator)."
            )
        turns = []
        if not flat[-1]["content"].replace(IMAGE_TOKEN, "").strip():
            raise PromptError(
                f"{self.examples[0].where} has a prompt, so the question needs one, "
                f"too: say what is asked about its picture."
            )
        for shot in chosen:
            text = prompt_of(shot, flat[-1]["content"])
            text = with_image_slots(text, len(shot.images))
            turns.append({"role": "user", "content": text})
            turns.append({"role": "assistant", "content": self._answer(shot)})
        flat = place_images(flat, len(images))
        begin = int(flat[0]["role"] == "system")
        return Asked(
            [*flat[:begin], *turns, *flat[begin:]],
            [image for shot in chosen for image in shot.images] + images,
            mark=self._mark if self._reasoned else None,
            shots=tuple(chosen),
        )

    def _answer(self, shot: Example) -> str:
        if not self._reasoned:
            return shot.answer
        return f"{shot.reasoning} {self._mark} {shot.answer}"

    def _text(
        self, template: str, chosen: list[Example], question: str, images: list
    ) -> Asked:
        pieces = parse_template(template)
        fields = [field for _, field in pieces]
        self._check_fields(fields, question, chosen, images)
        shown = "reasoning" in fields
        end = fields.index("reasoning" if shown else "answer")
        # A token that an answer begins with brings its own space.
        open_ = [*pieces[:end], (pieces[end][0].rstrip(" "), None)]
        after = "".join(text for text, _ in pieces[fields.index("answer") + 1 :])
        ends = dict.fromkeys(s for s in (after, self.separator) if s.strip(" "))
        stops, mark = tuple(ends), None
        if shown:
            mark = pieces[fields.index("answer")][0]
            check_mark(mark, stops)
        whole = [unbroken(shot, stops, shown) for shot in chosen]
        lines = [written(pieces, shot, question) for shot in whole]
        query = Example(tuple(images), "", question)
        lines.append(written(open_, query, question).rstrip(" "))
        return Asked(
            self.separator.join(lines),
            [image for shot in chosen for image in shot.images] + images,
            stops=stops,
            mark=mark and mark.strip(),
            shots=tuple(chosen),
        )

    def _check_fields(
        self, fields: list, question: str, chosen: list[Example], images: list
    ) -> None:
        if "reasoning" in fields and self.examples[0].reasoning is None:
            raise DatasetError(
                f'{self.examples[0].where}: no "reasoning", but the template of shots '
                f"has {{reasoning}}."
            )
        said = question.replace(IMAGE_TOKEN, "").strip()
        if said and "prompt" not in fields:
            raise PromptError(
                f"The template of shots has no {{prompt}}, so it has no place for the "
                f"question {said[:40]!r}. Add {{prompt}}, or leave the question out."
            )
        if not said and "prompt" in fields:
            raise PromptError(
                "The template of shots has {prompt}, but the question is empty: say "
                "what is asked."
            )
        if not said and not images:
            raise PromptError(
                "The question is empty: give its picture (--image), or say what is "
                "asked."
            )
        inside = IMAGE_TOKEN in question  # it says where its pictures belong
        if "image" not in fields and not inside and (images or chosen[0].images):
            raise PromptError(
                "The template of shots has no {image}, but there are pictures. Add it."
            )


def check_resolutions(high: int | None, processor: Any, resolution: Any) -> None:
    """PromptError where high_resolution_shots would change nothing.

    high: how many. resolution: the question's.
    """
    if high is None:
        return
    if isinstance(resolution, (list, tuple)):
        raise PromptError(
            "high_resolution_shots goes with one resolution, which the last shots "
            "share with all pictures of the question, but a list was given."
        )
    if resolution is None:
        resolution = getattr(processor, "resolution", None)
    settings = getattr(processor, "image_settings", None)
    if settings and is_native(resolution, processor.config, settings):
        raise PromptError(
            "high_resolution_shots reads the last shots in the question's "
            "resolution, but that is the encoder's own, which all have: give a "
            "higher one, such as --resolution 672 or dynamic (resolution=...)."
        )


def _check_texts(**given: Any) -> None:
    """MM1Error for what is no text, or an empty one; all but a mark may be None."""
    for name, text in given.items():
        if text is None and name != "answer_mark":
            continue
        if not isinstance(text, str):
            raise MM1Error(f"{name} is {text!r}, but must be a text.")
        if not (text if name == "separator" else text.strip()):
            raise MM1Error(f"{name} is an empty text: write one, or leave it out.")


def _checked(count: Any) -> int | None:
    whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
    if count is None or (whole and count >= 0):
        return None if count is None else int(count)
    raise MM1Error(
        f"high_resolution_shots is {count!r}, but must be a whole number of 0 or more."
    )


def _question(prompt: Any, images: Any, limits: dict) -> tuple[list[dict], list]:
    """Flat messages and their pictures, of text or a conversation."""
    given = [] if images is None else images
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if isinstance(prompt, str):
        if prompt.strip():
            with_image_slots(prompt, len(given))  # counts marks and pictures
        return [{"role": "user", "content": prompt}], given
    if not is_conversation(prompt):
        raise PromptError(
            f"A prompt is of the type {type(prompt).__name__}, but text or a list of "
            f"messages was expected."
        )
    flat, held = flatten_messages(prompt, **limits)
    if held and given:
        raise PromptError(
            f"The messages hold pictures, and {len(given)} more were given in images=. "
            f"Give them in one place only."
        )
    return flat, held or given
