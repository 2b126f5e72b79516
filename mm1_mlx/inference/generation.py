"""Answers to prompts with pictures: whole, in pieces, or many at once."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mm1_mlx.inference.asked import Asked
from mm1_mlx.inference.asking import asked_of, check_batch, check_one, read
from mm1_mlx.inference.memory_plan import GenerationPlan, plan_answers
from mm1_mlx.inference.pictures import Picture, largest_side, pictures_of
from mm1_mlx.inference.reuse import Reuse, store_of
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.shot_template import split_answer
from mm1_mlx.inference.speculative import (
    SpeculativeDecoding,
    check_draft,
    make_drafter,
    refuse_for_batches,
)
from mm1_mlx.inference.steps import Decoding, generate_step
from mm1_mlx.inference.text import AnswerText
from mm1_mlx.inference.turns import Turn, as_one
from mm1_mlx.models.mm1 import MM1

__all__ = [
    "GenerationResponse",
    "batch_generate",
    "generate",
    "generate_step",
    "stream_generate",
]

Prompt = str | list[dict] | Asked
Images = Any  # one picture, or a list: file, bytes, PIL image or array each


@dataclass(frozen=True, kw_only=True)
class GenerationResponse:
    """An answer, or from stream_generate a piece of it; `str` gives its text.

    text, token_ids: of the whole answer, or of this piece. The token that ended it is
    among token_ids, but has no text. token_id: the last token. prompt_tokens: image
    slots included. prompt_tps: prompt tokens per second, without encoding the images.
    generation_tokens: tokens so far. generation_tps: tokens per second after the first
    one, NaN when there is only one. ttft: seconds from the call to the first token,
    everything included. image_sizes: (width, height) of the encoder's tiles, each size
    once; image_tiles: how many they are, one for each image or more. image_seconds:
    encoder and connector. peak_memory: GB (10^9 bytes) that MLX used at most, in this
    process. finish_reason: "stop" (end of text, or a stop string), "length"
    (max_tokens, or the context is full), or None while it goes on.
    drafted_tokens: guessed so far by a draft model or lookup, accepted_tokens: those of
    them in the answer; None where nothing guesses. shots: the examples that stood in
    front, by their lines; shot_images: how many of num_images are theirs; answer_mark:
    what they have between reasoning and answer.
    """

    text: str
    token_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int = 0
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft: float
    num_images: int
    image_tokens: int
    image_tiles: int = 0
    image_seconds: float
    image_sizes: tuple[tuple[int, int], ...] = ()
    peak_memory: float
    finish_reason: str | None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    shots: tuple[int, ...] = ()
    shot_images: int = 0
    answer_mark: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def reasoning(self) -> str | None:
        """Of a whole answer, what stands before the mark of examples with reasoning."""
        return split_answer(self.text, self.answer_mark)[0]

    @property
    def answer(self) -> str:
        """Of a whole answer, what stands behind that mark; without one, all of it."""
        return split_answer(self.text, self.answer_mark)[1]


@dataclass
class _Request:
    """One prompt, read: its tokens, pictures, and how long its answer may be."""

    input_ids: list[int]
    pictures: list[Picture]
    image_tokens: int
    max_tokens: int
    asked: Asked
    reused_tokens: int = 0

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        shapes = (picture.pixels.shape for picture in self.pictures)
        return tuple(dict.fromkeys((width, height) for _, height, width, _ in shapes))


def _read(
    model: MM1, processor: Any, asked: Asked, settings: Settings, store: Reuse | None
) -> _Request:
    """Prompt and pictures through the processor; the context is checked here."""
    context = model.config.text_config.max_position_embeddings
    known = None if store is None else store.pixels
    inputs, ids = read(processor, asked, settings, context, known)
    slot = model.config.image_token_id
    slots = ids.count(slot) if slot is not None else 0
    return _Request(
        input_ids=ids,
        pictures=pictures_of(inputs, slots),
        image_tokens=slots,
        max_tokens=min(settings.max_tokens, context - len(ids)),
        asked=asked,
    )


def _check_memory(
    model: MM1, requests: list[_Request], settings: Settings, store: Reuse | None
) -> None:
    """MemoryPlanError where there is no room for the answers, MM1Warning where there
    may be none; what is kept of earlier prompts goes before, where that helps."""
    if not settings.check_memory:
        return

    def plan() -> GenerationPlan:
        pictures = [p for request in requests for p in request.pictures]
        vision = model.config.vision_config
        return plan_answers(
            model,
            settings,
            [request.input_ids for request in requests],
            [picture.pixels.shape[0] for picture in pictures],
            max(request.max_tokens for request in requests),
            largest_side(pictures, vision.image_size) if vision else None,
        )

    found = plan()
    if not found.fits and store is not None and store.nbytes:
        without = replace(found, weights=found.weights - store.nbytes)
        if without.fits or (found.impossible and not without.impossible):
            store.clear()
            found = plan()
    found.check()
    if model.decoder.group is None or model.decoder.group.rank() == 0:
        found.warn()


def _ends(model: MM1, processor: Any) -> frozenset[int]:
    """The ids that end an answer: the config's and the tokenizer's."""
    ours = model.config.eos_token_ids
    return frozenset([*ours, *processor.tokenizer.eos_token_ids])


class _Clock:
    """When things happened, and the statistics of a response from that."""

    def __init__(self):
        self._start = time.perf_counter()
        self.image_seconds = self.shared_seconds = 0.0
        self._first: float | None = None

    def tick(self) -> None:
        """A step has given its tokens."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last

    def response(
        self,
        request: _Request,
        text: str,
        ids: Sequence[int],
        count: int,
        decoding: Decoding,
        finish_reason: str | None,
    ) -> GenerationResponse:
        """What is told of a request after `count` tokens; rates in tokens a second."""
        assert self._first is not None
        after = self._last - self._first
        read = len(request.input_ids) - request.reused_tokens
        return GenerationResponse(
            text=text,
            token_id=ids[-1],
            token_ids=tuple(ids),
            prompt_tokens=len(request.input_ids),
            reused_tokens=request.reused_tokens,
            prompt_tps=read / max(decoding.prompt_seconds + self.shared_seconds, 1e-9),
            generation_tokens=count,
            generation_tps=(count - 1) / after if count > 1 else float("nan"),
            ttft=self._first - self._start,
            num_images=len(request.pictures),
            image_tokens=request.image_tokens,
            image_tiles=sum(picture.pixels.shape[0] for picture in request.pictures),
            image_seconds=self.image_seconds,
            image_sizes=request.image_sizes,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            drafted_tokens=decoding.drafted,
            accepted_tokens=decoding.accepted,
            shots=tuple(shot.number for shot in request.asked.shots),
            shot_images=sum(len(shot.images) for shot in request.asked.shots),
            answer_mark=request.asked.mark,
        )


def stream_generate(
    model: MM1,
    processor: Any,
    prompt: Prompt,
    images: Images = None,
    *,
    reuse: Reuse | bool | None = None,
    **settings: Any,
) -> Generator[GenerationResponse, None, None]:
    """The answer to a prompt, piece by piece, as it is made.

    Stop by leaving the loop, or with the generator's close(). The last piece has a
    finish_reason; a piece may have no text (half a character, or what may become a stop
    string).

    prompt: text with <image> where each picture belongs (else they come first), or a
    list of messages {"role": ..., "content": text or parts}, or what FewShot.ask gives.
    images: one, or a list in their order; each a file, bytes, a PIL image or an array.

    Settings (keywords), with their defaults:
        system=None: a system prompt
        max_tokens=256: tokens at most; fewer where the context ends
        temp=0.0: 0 takes the likeliest token
        top_p=1.0, top_k=0, min_p=0.0: filters, off
        repetition_penalty=None: above 1 makes recent tokens less likely
        repetition_context_size=20: how many are recent
        seed=None: the same seed gives the same answer
        stop=None: a text or texts; the answer ends before the first one
        kv_bits=None: 8 or 4 stores the cache quantized; kv_group_size=64
        quantized_kv_start=0: tokens from which on kv_bits holds
        use_template=True: False takes the prompt's text without the chat template
        chat_template_config=None: variables for the template, {"name": value}
        prefill_step_size=2048: prompt tokens per step
        resolution=None: how large pictures are read, "native", a number of pixels or
            "dynamic", or a list, one for each picture; see Processor. None: the model's
        max_tiles=None: of "dynamic"; None takes the model's
        max_pixels=None: a picture's pixels at most; None takes the processor's limit
        allow_url=False: whether pictures may be https addresses
        draft_model=None: a smaller model that guesses tokens, or its (model, processor)
        lookup=None: guess what followed where so many of the last tokens stood before
        num_draft_tokens=3: guesses at a time, 64 at most. In 32 bits they change the
            speed, not the answer; in 16 several tokens at once may round otherwise
        check_memory=True: refuse what cannot fit, warn of what may not; False tries
        shots=None: a FewShot, whose examples stand before the prompt
        on_images=None: is told the encoder's layers that are done, and their number

    reuse: what is kept of pictures and prompts between calls, so that what a prompt
    begins with like an earlier one (the same pictures, examples, or conversation) is
    not computed again, nor by a draft model. None: the model's own, with a limit (see
    Reuse); False: nothing. In 16 bits a prompt that is read in other parts may round
    otherwise, so that of two tokens as likely the other one comes.

    Raises PromptError and ImageError from the processor, PromptError for a prompt over
    the context or a list of prompts, MM1Error for a setting out of range.
    """
    check_one(prompt)
    chosen, store = Settings.of(settings), store_of(model, reuse)
    check_draft(chosen, model, processor)
    return _stream(model, processor, prompt, images, chosen, store)


def _stream(
    model: MM1,
    processor: Any,
    prompt: Prompt,
    images: Images,
    settings: Settings,
    store: Reuse | None,
) -> Generator[GenerationResponse, None, None]:
    clock = _Clock()
    with as_one(model):
        asked = asked_of(model, processor, prompt, images, settings)
        request = _read(model, processor, asked, settings, store)
        drafter = make_drafter(settings, model, asked, request.input_ids, store)
        _check_memory(model, [request], settings, store)
        turn = Turn(model, store, [request], settings)
    known = turn.start()
    clock.image_seconds = turn.image_seconds
    answer = AnswerText(
        processor.detokenizer(),
        [*settings.stops, *asked.stops],
        _ends(model, processor),
        request.max_tokens,
    )
    how = settings.decoding()
    kind = Decoding
    if drafter is not None:
        kind = SpeculativeDecoding
        how |= {"drafter": drafter, "num_draft_tokens": settings.num_draft_tokens}
    decoding = kind(
        model,
        mx.array([request.input_ids]),
        max_tokens=request.max_tokens,
        **known,
        **how,
    )
    try:
        while answer.finish_reason is None:
            tokens, _ = decoding.step()
            clock.tick()
            text = answer.add(tokens[0])
            yield clock.response(
                request,
                text,
                tokens,
                len(answer.token_ids),
                decoding,
                answer.finish_reason,
            )
    except GeneratorExit:  # the caller has enough
        decoding.settle()
        turn.keep_answer(decoding.cache, answer.token_ids, later=True)
        raise
    decoding.settle()
    turn.keep_answer(decoding.cache, answer.token_ids)


def generate(
    model: MM1,
    processor: Any,
    prompt: Prompt,
    images: Images = None,
    *,
    reuse: Reuse | bool | None = None,
    **settings: Any,
) -> GenerationResponse:
    """The whole answer to a prompt; arguments and errors as stream_generate."""
    pieces = stream_generate(model, processor, prompt, images, reuse=reuse, **settings)
    return joined(list(pieces))


def joined(pieces: Sequence[GenerationResponse]) -> GenerationResponse:
    """The whole answer from all the pieces of stream_generate."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
    )


def batch_generate(
    model: MM1,
    processor: Any,
    prompts: Sequence[Prompt],
    images: Sequence[Images] | None = None,
    *,
    reuse: Reuse | bool | None = None,
    **settings: Any,
) -> list[GenerationResponse]:
    """The answers to several prompts, made together; finished ones leave the batch.

    Greedy answers are those that `generate` gives one by one. Settings and errors as
    stream_generate, for all rows; a prompt that fails fails the call. The rates of a
    row count its own tokens over the batch's time, so they add up. What all prompts
    begin with, such as examples, is computed once, and kept with the prompts for later
    calls (reuse).

    prompts: a list of what stream_generate takes. images: a list with an entry for each
    prompt: one image, a list of images, or None. So may resolution be, or one for all.
    """
    chosen, store = Settings.of(settings), store_of(model, reuse)
    refuse_for_batches(chosen)
    check_batch(prompts, images)
    if not len(prompts):
        return []
    clock = _Clock()
    lists = images if images is not None else [None] * len(prompts)
    with as_one(model):
        rows = chosen.each(len(prompts))
        every = [
            asked_of(model, processor, *row)
            for row in zip(prompts, lists, rows, strict=True)
        ]
        requests = [
            _read(model, processor, asked, row, store)
            for asked, row in zip(every, rows, strict=True)
        ]
        _check_memory(model, requests, chosen, store)
        turn = Turn(model, store, requests, chosen)
    ends = _ends(model, processor)
    answers = [
        AnswerText(
            processor.detokenizer(),
            [*chosen.stops, *request.asked.stops],
            ends,
            request.max_tokens,
        )
        for request in requests
    ]
    return _run_batch(model, requests, answers, turn, chosen, clock)


def _run_batch(
    model: MM1,
    requests: list[_Request],
    answers: list[AnswerText],
    turn: Turn,
    settings: Settings,
    clock: _Clock,
) -> list[GenerationResponse]:
    rows = [
        [_pad_id(model)] * pad + request.input_ids
        for pad, request in zip(turn.padding, requests, strict=True)
    ]
    known = turn.start()
    clock.image_seconds, clock.shared_seconds = turn.image_seconds, turn.seconds
    decoding = Decoding(
        model,
        mx.array(rows),
        max_tokens=max(request.max_tokens for request in requests),
        **known,
        **settings.decoding(),
    )
    texts = [""] * len(rows)
    done: list[GenerationResponse | None] = [None] * len(rows)
    alive = list(range(len(rows)))
    while alive:
        tokens, _ = decoding.step()
        clock.tick()
        for row, token in zip(alive, tokens, strict=True):
            answer = answers[row]
            texts[row] += answer.add(token)
            if answer.finish_reason is not None:
                done[row] = clock.response(
                    requests[row],
                    texts[row],
                    answer.token_ids,
                    len(answer.token_ids),
                    decoding,
                    answer.finish_reason,
                )
        kept = [i for i, row in enumerate(alive) if done[row] is None]
        if kept and len(kept) < len(alive):
            decoding.keep(kept)
        alive = [alive[i] for i in kept]
    decoding.settle()
    return [response for response in done if response is not None]


def _pad_id(model: MM1) -> int:
    """Any id will do, since nobody sees padding, but it must not be an image slot."""
    pad = model.config.pad_token_id
    slot = model.config.image_token_id
    if pad is not None and pad != slot:
        return pad
    return 0 if slot != 0 else 1
