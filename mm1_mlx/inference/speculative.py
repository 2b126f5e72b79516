"""Speculative decoding: the next tokens are guessed, and the model checks them at once.

A step of decoding waits for the weights to be read, whatever few tokens they are used
on. So several guesses cost the model about one step, and each right one saves a step.
What counts is the model's own choice at every place, made from the same random numbers
as without guesses. So guesses, good or bad, change when tokens come, never which: the
answer is that of plain decoding, sampled ones too, and equal seeds give equal answers
with any draft. (Drafts that share the randomness: arXiv 2408.07978.)

In 32 bits that holds to the token. In 16 bits a product over several positions may
round otherwise than over one, as it does in a batch: where two tokens are as likely but
for that rounding, the other one may come.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

from mm1_mlx.errors import MM1Error, MM1Warning, PromptError
from mm1_mlx.inference.asked import Asked
from mm1_mlx.inference.pictures import Picture, pictures_of
from mm1_mlx.inference.reuse import Reuse
from mm1_mlx.inference.sampling import greedy
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.steps import STEPS_TO_CLEAR, Decoding, generation_stream
from mm1_mlx.inference.turns import Turn
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.processes import from_first

_COMPARED = 997  # ids of two vocabularies that are looked at

# Logits (1, V) after so many guesses (n,) -> the token (1,) that would be chosen.
Choose = Callable[[mx.array, list[mx.array]], mx.array]


class Drafter(Protocol):
    """Guesses how an answer goes on."""

    def guess(self, answer: Sequence[int], count: int, choose: Choose) -> mx.array:
        """At most `count` tokens that may follow. answer: at least one. (n,) uint32."""
        ...


class Lookup:
    """Guesses that the text goes on as it did after the last place like this one.

    Like this one: with the same last tokens, `longest` of them or as many as are found.
    Good where answers repeat the prompt or themselves; costs microseconds. (Prompt
    lookup decoding, as in transformers and llama.cpp.)
    """

    def __init__(self, prompt: Sequence[int], longest: int, usable: Callable):
        self._longest, self._usable = longest, usable
        self._prompt = len(prompt)
        self._tokens = list(prompt)
        self._known = 0  # tokens that the table knows
        self._after: dict[tuple[int, ...], int] = {}  # where what follows them stands

    def guess(self, answer: Sequence[int], count: int, choose: Choose) -> mx.array:
        """What followed the last place like this one; see Drafter."""
        tokens = self._tokens
        tokens.extend(answer[len(tokens) - self._prompt :])
        for i in range(self._known, len(tokens)):
            for n in range(1, min(self._longest, i) + 1):
                self._after[tuple(tokens[i - n : i])] = i
        self._known = len(tokens)
        return mx.array(self._continued(self._place(), count), mx.uint32)

    def _place(self) -> int | None:
        for n in range(min(self._longest, len(self._tokens)), 0, -1):
            if (found := self._after.get(tuple(self._tokens[-n:]))) is not None:
                return found
        return None

    def _continued(self, start: int | None, count: int) -> list[int]:
        """What stands at a place; beyond the end, what was guessed: a round goes on."""
        found: list[int] = []
        size = len(self._tokens)
        for i in range(start, start + count) if start is not None else ():
            token = self._tokens[i] if i < size else found[i - size]
            if not self._usable(token):  # an image slot
                break
            found.append(token)
        return found


@dataclass
class _Prompt:
    """A prompt as a draft model reads it."""

    input_ids: list[int]
    pictures: list[Picture] = field(default_factory=list)
    reused_tokens: int = 0


class DraftModel:
    """Guesses by a smaller model, which reads the prompt when the first guess is due.

    input_ids: the prompt as this model reads it. store: where what an earlier prompt
    began with like this one is found, and this one is kept; its answer is not.
    """

    def __init__(
        self,
        model: MM1,
        input_ids: Sequence[int],
        pictures: Sequence[Picture] = (),
        *,
        store: Reuse | None = None,
        prefill_step_size: int = 2048,
    ):
        self._model = model
        self._prompt = _Prompt(list(input_ids), list(pictures))
        self._store = None if model.training else store
        self._settings = Settings(prefill_step_size=prefill_step_size)
        self._start = len(input_ids)
        text = model.config.text_config
        self._size, self._context = text.vocab_size, text.max_position_embeddings
        self._cache: list = []
        if self._start >= self._context:
            raise PromptError(
                f"The prompt has {self._start} tokens for the draft model, whose "
                f"context has {self._context}. Take a draft model with a longer one, "
                f"or lookup (--lookup) in its place."
            )

    def guess(self, answer: Sequence[int], count: int, choose: Choose) -> mx.array:
        """What the draft model would say next; fewer where its context ends."""
        count = min(count, self._context - self._start - len(answer) + 1)
        if count < 1:
            return mx.array([], mx.uint32)
        cache = self._cache = self._cache or self._read_prompt()
        read = cache[0].offset - self._start
        kept = min(read, len(answer) - 1)  # what follows was guessed wrong
        for entry in cache:
            entry.trim(read - kept)
        # An id beyond this vocabulary has no row: MLX would read what lies behind.
        new = mx.array([[t if t < self._size else 0 for t in answer[kept:]]])
        guesses: list[mx.array] = []
        decoder = self._model.decoder
        for _ in range(count):
            hidden = decoder.hidden(new, cache, last_only=True)
            guesses.append(choose(decoder.head(hidden[:, -1]), guesses))
            new = guesses[-1][:, None]
        return mx.concatenate(guesses)

    def _read_prompt(self) -> list:
        turn = Turn(self._model, self._store, [self._prompt], self._settings)
        reading = Decoding(
            self._model,
            mx.array([self._prompt.input_ids]),
            max_tokens=1,
            **turn.start(),
            **self._settings.decoding(),
        )
        turn.keep_prompts(reading.cache)
        return reading.cache


class SpeculativeDecoding(Decoding):
    """Decoding of one row whose steps are checked guesses.

    `step` gives one token, as Decoding does: those that a check brought come one after
    the other. drafted, accepted: tokens guessed so far, and those of them among the
    tokens given.
    """

    drafted: int = 0
    accepted: int = 0

    def __init__(
        self,
        model: MM1,
        input_ids: mx.array,
        *,
        drafter: Drafter,
        num_draft_tokens: int = 3,
        **settings: Any,
    ):
        assert input_ids.shape[0] == 1, "rows would go on at different rates"
        super().__init__(model, input_ids, **settings)
        self._drafter, self._count = drafter, num_draft_tokens
        self._width = model.config.text_config.vocab_size
        self._answer: list[int] = []
        self._ready: deque[tuple[int, mx.array, bool]] = deque()
        self._last_cleared = 0

    def step(self) -> tuple[list[int], mx.array]:
        """The next token, and its log-probabilities (1, V)."""
        assert self._left > 0, "max_tokens were given"
        if not self._steps:
            tokens, logprobs = self._pending
            self._answer = tokens.tolist()  # type: ignore[assignment]
            self._ready.append((self._answer[0], logprobs, False))
            self.prompt_seconds = time.perf_counter() - self._start
        elif not self._ready:
            self._check(min(self._count, self._left - 1))
        token, logprobs, guessed = self._ready.popleft()
        self._left -= 1
        self._steps += 1
        self.accepted += guessed
        if self._steps == 2:  # as Decoding: what reading the prompts has used
            mx.clear_cache()
        return [token], logprobs

    def _check(self, count: int) -> None:
        """Guess, and let the model choose after every guess."""
        states = [self._random()]
        with mx.stream(generation_stream()):
            guesses = self._guesses(min(count, self._until_quantized()))
            self._set_random(states[0])  # the model draws what the draft has drawn
            new = mx.concatenate([mx.array(self._answer[-1:], mx.uint32), guesses])
            hidden = self._decoder.hidden(new[None], self.cache)
            logits = self._decoder.head(hidden[0])  # (n + 1, V)
            tokens, logprobs = self._choices(logits, guesses, states)
            if self._group is not None:  # one rounding apart, and they would part
                tokens = from_first(tokens, self._group)
            mx.eval(tokens, guesses, logprobs, states)
        self._accept(tokens.tolist(), guesses.tolist(), logprobs, states)  # type: ignore

    def _guesses(self, count: int) -> mx.array:
        if count < 1:
            return mx.array([], mx.uint32)
        guesses = self._drafter.guess(self._answer, count, self._draw)
        self.drafted += guesses.size
        return guesses.astype(mx.uint32)

    def _draw(self, logits: mx.array, before: list[mx.array]) -> mx.array:
        """What would be chosen by a draft's logits, as wide as the model's are."""
        missing = self._width - logits.shape[-1]
        if missing > 0:
            beyond = mx.full((1, missing), -mx.inf, logits.dtype)
            logits = mx.concatenate([logits, beyond], axis=-1)
        guesses = mx.concatenate(before) if before else mx.array([], mx.uint32)
        return self._chosen(logits[:, : self._width], guesses)[0]

    def _choices(
        self, logits: mx.array, guesses: mx.array, states: list
    ) -> tuple[mx.array, mx.array]:
        """The model's choice after each guess, and the random state behind each.

        logits: (n + 1, V). Gives tokens (n + 1,) and log-probabilities (n + 1, V).
        """
        if self._sampler is greedy and self._history is None:  # all at once
            states += [states[0]] * (logits.shape[0] - 1)
            return self._chosen(logits, guesses)
        tokens, logprobs = [], []
        for i in range(logits.shape[0]):
            token, its_logprobs = self._chosen(logits[i : i + 1], guesses[:i])
            tokens.append(token)
            logprobs.append(its_logprobs)
            states.append(self._random())
        del states[0]
        return mx.concatenate(tokens), mx.concatenate(logprobs)

    def _chosen(self, logits: mx.array, guesses: mx.array) -> tuple[mx.array, mx.array]:
        """As Decoding chooses; guesses: (n,), those that stand before."""
        if self._history is not None:
            before = guesses[None].astype(self._history.dtype)
            history = mx.concatenate([self._history, before], axis=1)
            for processor in self._processors:
                logits = processor(history, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self._sampler(logprobs), logprobs

    def _accept(
        self, tokens: list[int], guesses: list[int], logprobs: mx.array, states: list
    ) -> None:
        """Keep the guesses up to the first wrong one, in whose place stands the right
        one, and have all caches forget the others."""
        right = 0
        while right < len(guesses) and guesses[right] == tokens[right]:
            right += 1
        given = tokens[: right + 1]
        self._set_random(states[right])
        for entry in self.cache:
            entry.trim(len(guesses) - right)
        with mx.stream(generation_stream()):
            self._quantize_cache()
            if self._history is not None:
                more = mx.array([given], self._history.dtype)
                self._history = mx.concatenate([self._history, more], axis=1)
                mx.async_eval(self._history)
        self._answer += given
        for i, token in enumerate(given):
            self._ready.append((token, logprobs[i : i + 1], i < right))
        if len(self._answer) - self._last_cleared >= STEPS_TO_CLEAR:
            self._last_cleared = len(self._answer)
            mx.clear_cache()

    def _until_quantized(self) -> int:
        """How many guesses end before the cache is quantized: those behind would see
        what plain decoding has quantized by then."""
        bits, _, start = self._kv
        offset = self.cache[0].offset
        return self._count if bits is None or offset >= start else start - offset - 1

    def _random(self) -> list[mx.array]:
        return list(getattr(self._sampler, "state", []))

    def _set_random(self, state: list[mx.array]) -> None:
        if state:
            self._sampler.state[:] = state  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Nothing was begun ahead."""


# --- Which draft -------------------------------------------------------------------


def check_draft(settings: Settings, model: MM1, processor: Any) -> None:
    """MM1Error, before anything runs, for a draft that does not suit the model."""
    draft, its_processor = _draft_of(settings)
    if draft is None:
        return
    if model.decoder.group is not None or draft.decoder.group is not None:
        raise MM1Error(
            "Where processes share a model, a draft model cannot guess for it: use "
            "lookup (--lookup), or a single process."
        )
    if its_processor is not None:
        _compare(processor.tokenizer, its_processor.tokenizer)
        return
    ours = model.config.text_config.vocab_size
    its = draft.config.text_config.vocab_size
    if ours != its:
        raise MM1Error(
            f"The draft model has {its} tokens, the model {ours}. If these are the "
            f"same vocabulary but for unused rows, give what load() gave, "
            f"draft_model=(model, processor), so that they can be compared."
        )


def refuse_for_batches(settings: Settings) -> None:
    """MM1Error: the rows of a batch go on together."""
    if settings.draft_model is not None or settings.lookup is not None:
        name = "lookup" if settings.draft_model is None else "draft_model"
        raise MM1Error(
            f"batch_generate takes no {name}: guesses are right in some rows only, but "
            f"rows go on together. Use generate for one prompt after the other."
        )


def make_drafter(
    settings: Settings,
    model: MM1,
    asked: Asked,
    input_ids: Sequence[int],
    store: Reuse | None = None,
) -> Drafter | None:
    """What guesses for an answer; None where nothing shall.

    asked: prompt and pictures, for a draft with its own processor. input_ids: as the
    model reads them. A draft that sees no pictures reads no slots. store: what the
    model reuses, for the draft, too.
    """
    slot, size = model.config.image_token_id, model.config.text_config.vocab_size
    if settings.lookup is not None:
        return Lookup(
            input_ids, settings.lookup, lambda token: token != slot and token < size
        )
    draft, its_processor = _draft_of(settings)
    if draft is None:
        return None
    how: Any = {"store": store, "prefill_step_size": settings.prefill_step_size}
    if slot in input_ids and draft.config.reads_images and its_processor is not None:
        inputs = _as_draft_reads(its_processor, asked, settings, store)
        rows: Any = inputs.input_ids.tolist()
        (its_ids,) = rows
        slots = its_ids.count(draft.config.image_token_id)
        return DraftModel(draft, its_ids, pictures_of(inputs, slots), **how)
    its_size = draft.config.text_config.vocab_size
    ids = [token for token in input_ids if token != slot and token < its_size]
    return DraftModel(draft, ids or [0], **how)


def _as_draft_reads(
    processor: Any, asked: Asked, settings: Settings, store: Reuse | None
) -> Any:
    """What a draft's processor gives for a prompt: in the resolution that was asked, or
    where it cannot, which is said, in its own."""
    how = replace(settings, resolution=None, max_tiles=None).reading()
    own = isinstance(processor, Processor)
    if own and store is not None:
        how["known"] = store.pixels
    if own and (asked.resolution, settings.max_tiles) != (None, None):
        # As if it were its default: what it was trained for is not the user's concern.
        reader = copy(processor)
        if asked.resolution is not None:
            reader.resolution = asked.resolution
        reader.max_tiles = settings.max_tiles
        try:
            return reader(asked.prompt, images=asked.images, **how)
        except PromptError as error:
            warnings.warn(
                f"The draft model reads the pictures in its own resolution, so that "
                f"fewer of its guesses may be right: {error}",
                MM1Warning,
                stacklevel=2,
            )
    return processor(asked.prompt, images=asked.images, **how)


def _draft_of(settings: Settings) -> tuple[MM1 | None, Any]:
    """The draft model, and its processor where it came with it."""
    given = settings.draft_model
    model, processor = given if isinstance(given, tuple) else (given, None)
    return model, processor


def _compare(ours: Any, its: Any) -> None:
    """MM1Error unless two vocabularies agree: what both have is the same, and what only
    one has are marks that were added to it, such as <image>."""
    common = min(ours.vocab_size, its.vocab_size)
    longer = ours if ours.vocab_size > common else its
    added = set(longer.marks.values())
    sizes = f"it has {its.vocab_size} tokens, the model {ours.vocab_size}"
    advice = "Take a draft model of the same family"
    if any(i not in added for i in range(common, longer.vocab_size)):
        raise MM1Error(
            f"The draft model's vocabulary is not the model's: {sizes}. {advice}."
        )
    for i in range(0, common, max(1, common // _COMPARED)):
        one, other = (t.piece(i, skip_special=False) for t in (ours, its))
        if one != other:
            raise MM1Error(
                f"The draft model's vocabulary is not the model's: its token {i} is "
                f"{_text(other)}, the model's {_text(one)}. {advice}."
            )


def _text(piece: bytes) -> str:
    return repr(piece.decode(errors="replace"))
