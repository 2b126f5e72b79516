"""The decoding loop: a prompt is read once, then each step gives one token per row."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import mlx.core as mx

from mm1_mlx.config import DecoderConfig
from mm1_mlx.grids import Layout
from mm1_mlx.inference.sampling import LogitsProcessor, Sampler, greedy
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.processes import from_first

STEPS_TO_CLEAR = 256  # MLX's buffer cache is emptied this often, as mlx-lm does
IMAGES_AT_ONCE = 8  # pictures per run of the encoder: bounds its memory
# Metal's product of sorted expert rows overflowed above this many (MLX 0.32.2 on M5).
EXPERT_ROWS = 32768


@cache
def _stream_of(kind: Any, index: int) -> Any:
    device = mx.Device(kind, index)
    if hasattr(mx, "new_thread_local_stream"):
        return mx.new_thread_local_stream(device)
    return mx.new_stream(device)


def generation_stream() -> Any:
    """The stream that generation runs on, one per thread, on the default device.

    MLX's streams belong to a thread: work left lazy in one thread cannot be finished in
    another. So everything that outlives a step is handed to mx.async_eval in it.
    """
    device: Any = mx.default_device()
    return _stream_of(device.type, getattr(device, "index", 0))


def encode_images(
    model: MM1,
    pixel_values: mx.array | Sequence[mx.array],
    layouts: Sequence[Layout] = (),
    walk: LayerWalk | None = None,
) -> mx.array:
    """Image tokens, evaluated, a few pictures at a time. (N, H, W, 3) -> (N, Q, D).

    layouts: the tiles of each picture, for a model that puts them together; then N
    counts tiles, and the result is (1, T, D). So it is for arrays that differ in size.
    walk: through the encoder's layers; see picture_progress.
    """
    tiling = model.config.tiling_config
    with mx.stream(generation_stream()):
        if isinstance(pixel_values, tuple):
            each = [encode_images(model, one, walk=walk) for one in pixel_values]
            parts = [x.reshape(1, -1, x.shape[-1]) for x in each]
        elif layouts and tiling is not None and tiling.arranges:
            pixels: Any = pixel_values
            parts = _encode_tiles(model, pixels, layouts, walk)
        else:
            return _encode_apart(model, pixel_values, walk)  # type: ignore[arg-type]
        features = mx.concatenate(parts, axis=1)
        mx.eval(features)
    return features


def _encode_apart(
    model: MM1, pixel_values: mx.array, walk: LayerWalk | None
) -> mx.array:
    """Pictures, or tiles that are pictures to the model. (N, H, W, 3) -> (N, Q, D)."""
    parts = []
    for start in range(0, pixel_values.shape[0], IMAGES_AT_ONCE):
        batch = mx.array(pixel_values[start : start + IMAGES_AT_ONCE])
        parts.append(model.encode_images(batch, walk=walk))
        mx.eval(parts[-1])
    features = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    mx.eval(features)
    return features


def _encode_tiles(
    model: MM1,
    pixel_values: mx.array,
    layouts: Sequence[Layout],
    walk: LayerWalk | None,
) -> list[mx.array]:
    """Picture by picture: each has many tiles. (1, T, D) each."""
    start, parts = 0, []
    for layout in layouts:
        tiles = mx.array(pixel_values[start : start + layout.tiles])
        start += layout.tiles
        parts.append(model.encode_images(tiles, [layout], walk=walk))
        mx.eval(parts[-1])
    return parts


def prefill_piece(config: DecoderConfig, rows: int, step: int) -> int:
    """Prompt tokens at a time: `step`, or as few as keep B * T * K in EXPERT_ROWS."""
    moe = config.moe_config
    if moe is None:
        return step
    return min(step, max(1, EXPERT_ROWS // (rows * moe.num_experts_per_tok)))


class Decoding:
    """A batch of rows that grows by one token per step; one step is computed ahead.

    The prompt is read when the object is made. `step` gives the next tokens, and has
    the device start on the ones after before it waits. `keep` drops finished rows.

    Shapes:
        input_ids: (B, L), config.image_token_id once per image token
        image_features: (N, Q, D), all pictures of the batch in reading order, or None
        left_padding: for each row how many columns hold no token, or None

    reused: columns of input_ids that the cache has read; image_features are then of
    the others. on_prompt: is given the cache when the prompt is read, or before it is
    first quantized.
    """

    drafted: int | None = None  # see SpeculativeDecoding
    accepted: int | None = None

    def __init__(
        self,
        model: MM1,
        input_ids: mx.array,
        *,
        image_features: mx.array | None = None,
        left_padding: Sequence[int] | None = None,
        cache: list | None = None,
        max_tokens: int = 256,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        prefill_step_size: int = 2048,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
        on_prefill: Callable[[int, int], None] | None = None,
        reused: int = 0,
        on_prompt: Callable[[list], None] | None = None,
    ):
        assert cache is None or left_padding is None, "the cache knows its padding"
        self._decoder = model.decoder
        self._group = model.decoder.group
        if cache is None:
            cache = model.make_cache(left_padding=left_padding)
        self.cache = cache
        self._left = max_tokens
        self._steps = 0
        self._sampler = sampler or greedy
        self._processors = list(logits_processors)
        self._kv = (kv_bits, kv_group_size, quantized_kv_start)
        self._history = None
        if self._processors:
            padding = getattr(cache[0], "left_padding", None)
            self._history = padded_history(input_ids, padding)
        self._on_prompt = on_prompt
        self.prompt_seconds = 0.0  # known when the first step has given its tokens
        self._start = time.perf_counter()
        with mx.stream(generation_stream()):
            new = input_ids[:, reused:]
            embeddings = model.embed(new, image_features=image_features)
            logits = self._prefill(embeddings, prefill_step_size, on_prefill, reused)
            self._pending = self._choose(logits)

    def _prefill(
        self,
        embeddings: mx.array,
        step: int,
        on_prefill: Callable[[int, int], None] | None,
        reused: int,
    ) -> mx.array:
        """Read the prompt in pieces; logits (B, V) of its last position only.

        Pieces end where they would without reuse: there a cache may be quantized.
        """
        rows, length, _ = embeddings.shape
        step = prefill_piece(self._decoder.config, rows, step)
        start, stop = 0, step - reused % step
        while stop < length:
            self._decoder.hidden(None, self.cache, embeddings[:, start:stop])
            start, stop = stop, stop + step
            self._quantize_cache()
            mx.eval([entry.state for entry in self.cache])
            mx.clear_cache()
            if on_prefill is not None:
                on_prefill(reused + start, reused + length)
        rest = embeddings[:, start:]
        hidden = self._decoder.hidden(None, self.cache, rest, last_only=True)
        logits = self._decoder.head(hidden[:, -1])
        self._show_prompt()
        self._quantize_cache()
        if on_prefill is not None:
            on_prefill(reused + length, reused + length)
        return logits

    def _show_prompt(self) -> None:
        if self._on_prompt is not None:
            self._on_prompt(self.cache)
            self._on_prompt = None

    def _quantize_cache(self) -> None:
        bits, group_size, start = self._kv
        if bits is None or self.cache[0].offset < start:
            return
        self._show_prompt()
        for i, entry in enumerate(self.cache):
            if hasattr(entry, "to_quantized") and entry.offset >= start:
                self.cache[i] = entry.to_quantized(group_size=group_size, bits=bits)
                mx.async_eval(self.cache[i].state)  # a later thread needs it

    def _choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Tokens (B,) and log-probabilities (B, V), on their way."""
        if self._history is not None:
            for processor in self._processors:
                logits = processor(self._history, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        tokens = self._sampler(logprobs)
        if self._group is not None:  # one rounding apart, and they would part for good
            tokens = from_first(tokens, self._group)
        if self._history is not None:
            self._history = mx.concatenate([self._history, tokens[:, None]], axis=1)
        # Whatever a later step reads is evaluated here, in this thread's stream.
        kept = [self._history] if self._history is not None else []
        kept += getattr(self._sampler, "state", [])
        mx.async_eval(tokens, logprobs, *kept)
        return tokens, logprobs

    def step(self) -> tuple[list[int], mx.array]:
        """The next token of each row, and its log-probabilities (B, V)."""
        assert self._left > 0, "max_tokens were given"
        tokens, logprobs = self._pending
        self._left -= 1
        self._steps += 1
        if self._left:
            with mx.stream(generation_stream()):
                hidden = self._decoder.hidden(tokens[:, None], self.cache)
                logits = self._decoder.head(hidden[:, -1])
                self._quantize_cache()
                self._pending = self._choose(logits)
        given: Any = tokens.tolist()
        if self._steps == 1:
            self.prompt_seconds = time.perf_counter() - self._start
        # What reading the prompt has used is given back once the answer is on its way.
        if self._steps % STEPS_TO_CLEAR == 0 or self._steps == 2:
            mx.clear_cache()
        return given, logprobs

    def settle(self) -> None:
        """Where processes share the model: wait for the step that was begun ahead.

        A process that left in the midst of it would take the others down.
        """
        if self._group is not None:
            with suppress(RuntimeError):  # another process is gone
                mx.eval(self._pending)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        with mx.stream(generation_stream()):
            chosen = mx.array(list(rows))
            tokens, logprobs = self._pending
            self._pending = (tokens[chosen], logprobs[chosen])
            if self._history is not None:
                self._history = self._history[chosen]
            for entry in self.cache:
                entry.filter(rows)
            history = [] if self._history is None else [self._history]
            state = [entry.state for entry in self.cache]
            mx.async_eval(*self._pending, *history, state)


def padded_history(input_ids: mx.array, left_padding: Sequence[int] | None) -> mx.array:
    """What logits processors see of the prompt: a row's padding repeats its first
    token, so that a padded row is penalised as it is alone. (B, L) -> (B, L)."""
    if left_padding is None or not any(left_padding):
        return input_ids
    starts = mx.array(list(left_padding))[:, None]
    places = mx.maximum(mx.arange(input_ids.shape[1]), starts)
    return mx.take_along_axis(input_ids, places, axis=1)


def generate_step(
    model: MM1,
    input_ids: mx.array,
    *,
    pixel_values: mx.array | None = None,
    image_features: mx.array | None = None,
    layouts: Sequence[Layout] = (),
    max_tokens: int = 256,
    **settings,
) -> Generator[tuple[int, mx.array], None, None]:
    """One token after the other, with its log-probabilities (V,); no text, no end.

    settings: cache (one that read the tokens before input_ids), sampler,
    logits_processors, prefill_step_size, kv_bits, kv_group_size, quantized_kv_start
    (tokens from which on the cache is quantized), on_prefill (called with the tokens
    read so far and their number).

    Shapes:
        input_ids: (1, L) or (L,)
        pixel_values: (N, H, W, 3), and layouts where they are tiles; or image_features
            (N, Q, D) when they are known
    """
    input_ids = mx.array(input_ids)
    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    if image_features is None and pixel_values is not None:
        image_features = encode_images(model, pixel_values, layouts)
    decoding = Decoding(
        model,
        input_ids,
        image_features=image_features,
        max_tokens=max_tokens,
        **settings,
    )
    for _ in range(max_tokens):
        tokens, logprobs = decoding.step()
        yield tokens[0], logprobs[0]
