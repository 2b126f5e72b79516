"""How likely a model takes a text as the continuation of a prompt with pictures."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import ContextError, PromptError
from mm1_mlx.inference.pictures import Picture, image_tokens, pictures_of
from mm1_mlx.inference.prefix_tree import shared_length
from mm1_mlx.inference.steps import generation_stream, prefill_piece
from mm1_mlx.inference.turns import keys_of
from mm1_mlx.inputs.lessons import Lesson, make_lesson
from mm1_mlx.inputs.processor import Inputs, Processor
from mm1_mlx.inputs.prompts import builtin_name
from mm1_mlx.models.mm1 import MM1

_STEP = 2048  # prompt tokens at a time, as generate has it


class Likelihood:
    """Scores continuations one after the other.

    What one begins with like the one before, as the choices of one question do, is
    read once; so are its pictures.
    """

    def __init__(self, model: MM1, processor: Processor):
        self._model, self._processor = model, processor
        self._cache = model.make_cache()
        self._keys: list[int] = []
        self._pictures: dict[str, mx.array] = {}

    def __call__(
        self,
        prompt: Any,
        continuation: str,
        images: Sequence[Any] = (),
        *,
        system: str | None = None,
    ) -> tuple[float, bool]:
        """The sum of the log-probabilities of a continuation's tokens, and whether
        each is the likeliest one, so that it is what a greedy answer begins with.

        prompt: text or messages, as generate takes them, without the answer; an empty
        one asks for the continuation alone. The mark that ends an answer is not
        counted. A chat template puts what belongs between prompt and answer, so a space
        that the continuation begins with goes there; without a template it stays.

        Raises PromptError for an empty continuation or one beyond the context.
        """
        if not continuation.strip():
            raise PromptError("The continuation is empty: there is nothing to score.")
        ids, pictures, start, stop = self._read(prompt, continuation, images, system)
        context = self._model.config.text_config.max_position_embeddings
        if stop > context:
            raise ContextError(
                f"Prompt and continuation have {stop} tokens, but the model's context "
                f"has {context}. Shorten the prompt or use fewer images."
            )
        with mx.stream(generation_stream()):
            logits = self._logits(ids[:stop], pictures, start)
            tokens = mx.array(ids[start:stop])[:, None]
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            total = mx.take_along_axis(scores, tokens, axis=-1).sum()
            greedy = (mx.argmax(logits, axis=-1) == tokens[:, 0]).all()
            mx.eval(total, greedy)
        return float(total), bool(greedy)

    def _read(
        self, prompt: Any, continuation: str, images: Sequence[Any], system: str | None
    ) -> tuple[list[int], list[Picture], int, int]:
        """Ids of prompt and continuation, pictures, and from where to where it goes."""
        if not prompt and not images:
            tokenizer = self._processor.tokenizer
            ids = tokenizer.encode_plain(continuation, add_special=True)
            if len(ids) < 2:
                raise PromptError(
                    f"Without a prompt nothing stands before {continuation!r}, so it "
                    f"has no likelihood: this model's texts have no begin mark."
                )
            return ids, [], 1, len(ids)  # nothing predicts the first
        messages = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            messages = list(prompt)
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if builtin_name(self._processor.chat_template) != "plain":
            continuation = continuation.lstrip()
        messages.append({"role": "assistant", "content": continuation})
        lesson = make_lesson(self._processor, messages, list(images))
        start, stop = self._span(lesson)
        return lesson.ids, self._seen(lesson), start, stop

    def _span(self, lesson: Lesson) -> tuple[int, int]:
        """Of the last answer, without the mark that ends it."""
        stop = max(i for i, flag in enumerate(lesson.learned) if flag) + 1
        start = stop
        while start and lesson.learned[start - 1]:
            start -= 1
        ends = set(self._processor.eos_token_ids)
        while stop > start and lesson.ids[stop - 1] in ends:
            stop -= 1
        return start, stop

    def _seen(self, lesson: Lesson) -> list[Picture]:
        if lesson.pixel_values is None:
            return []
        inputs = Inputs(
            input_ids=mx.array([lesson.ids]),
            pixel_values=mx.array(lesson.pixel_values),
            left_padding=mx.array([0]),
            images_per_row=(len(lesson.image_tokens),),
            image_tokens=lesson.image_tokens,
            layouts=lesson.layouts,
        )
        return pictures_of(inputs, sum(lesson.image_tokens))

    def _logits(self, ids: list[int], pictures: list[Picture], start: int) -> mx.array:
        """What is predicted for ids[start:]. (T, V) float32"""
        model = self._model
        keys = keys_of(ids, model.config.image_token_id, pictures)
        known = min(shared_length(keys, self._keys), start - 1)
        for entry in self._cache:
            entry.trim(entry.offset - known)
        self._keys = keys[:known]  # if what follows fails, the cache holds no more
        features = self._features(pictures)
        embeddings = model.embed(mx.array([ids]), image_features=features)
        step = prefill_piece(model.config.text_config, 1, _STEP)
        while start - 1 - known > step:
            piece = embeddings[:, known : known + step]
            model.decoder.hidden(None, self._cache, piece)
            mx.eval([entry.state for entry in self._cache])
            known += step
        # The last token is not read: nothing is predicted from it.
        rest = embeddings[:, known : len(ids) - 1]
        hidden = model.decoder.hidden(None, self._cache, rest)
        logits = model.decoder.head(hidden[:, start - 1 - known :])[0]
        mx.eval(logits, [entry.state for entry in self._cache])
        self._keys = keys[:-1]
        return logits.astype(mx.float32)

    def _features(self, pictures: list[Picture]) -> mx.array | None:
        """Image tokens of all pictures, (1, T, D); the last prompt's are kept."""
        if not pictures:
            return None
        known = self._pictures
        found = image_tokens(
            self._model,
            pictures,
            known.get,
            lambda key, made: known.update({key: made}),
        )
        self._pictures = {p.digest: f for p, f in zip(pictures, found, strict=True)}
        return mx.concatenate(found)[None]
