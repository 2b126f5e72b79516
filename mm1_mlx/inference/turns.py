"""One call for answers: what it need not compute again, and what it leaves behind."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import mlx.core as mx

from mm1_mlx.inference.pictures import Picture, image_tokens
from mm1_mlx.inference.prefix_tree import Columns, columns, shared_length
from mm1_mlx.inference.reuse import Reuse
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.steps import generation_stream, prefill_piece
from mm1_mlx.models.cache import KVCache
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.processes import sums, together

LEAST = 8  # columns that are worth a cache that begins with them
# What rows have in common is read before them where that saves so many tokens: it is
# one more pass over the weights.
LEAST_SHARED = 64


class Request(Protocol):
    """What is read of a prompt; reused_tokens is told to it."""

    input_ids: list[int]
    pictures: list[Picture]
    reused_tokens: int


def as_one(model: MM1) -> AbstractContextManager:
    """Where processes share a model, an error of one of them is every one's."""
    group = model.decoder.group
    return nullcontext() if group is None else together(group)


def keys_of(ids: Sequence[int], slot: int | None, pictures: Sequence[Picture]) -> list:
    """What stands for each position: a token's id, or below zero a picture's place."""
    if not pictures:
        return list(ids)
    firsts = [-(int(picture.digest, 16) << 24) - 1 for picture in pictures]
    places = iter(
        first - place
        for first, picture in zip(firsts, pictures, strict=True)
        for place in range(picture.tokens)
    )
    return [next(places) if i == slot else i for i in ids]


class Turn:
    """What one call reuses of earlier ones, row by row, and keeps for later ones.

    The rows end together, as Decoding wants them; padding: what is in front of each.
    store: None reuses nothing. image_seconds: encoder and connector. seconds: reading
    what the rows have in common.

    Where processes share the model each holds its own heads, and all begin where the
    one that knows least can.
    """

    def __init__(
        self,
        model: MM1,
        store: Reuse | None,
        requests: Sequence[Request],
        settings: Settings,
    ):
        self._model, self._settings = model, settings
        self._requests = requests
        self._slot = model.config.image_token_id
        self._lengths = [len(request.input_ids) for request in requests]
        self._total = max(self._lengths)
        self.padding = [self._total - length for length in self._lengths]
        self.image_seconds = self.seconds = 0.0
        self._store = store if all(map(self._is_known, requests)) else None
        if self._store is not None:
            self._whole, self._eyes = self._store.numbers(model)
            self._keys = [
                keys_of(request.input_ids, self._slot, request.pictures)
                for request in requests
            ]

    def _is_known(self, request: Request) -> bool:
        """Whether it is known which slots a picture takes."""
        slots = request.input_ids.count(self._slot) if self._slot is not None else 0
        return not request.pictures or slots == sum(p.tokens for p in request.pictures)

    # --- before the answer -----------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Decoding's arguments: image_features, and cache, reused or left_padding."""
        start, found = 0, []
        if self._store is not None:
            computed = self._read_shared()
            start, found = self._look()
            for request, pad in zip(self._requests, self.padding, strict=True):
                request.reused_tokens = max(start - pad, 0)
            first = self._requests[0]
            first.reused_tokens = max(first.reused_tokens - computed, 0)
        spans = [
            (max(start - pad, 0), length)
            for pad, length in zip(self.padding, self._lengths, strict=True)
        ]
        given: dict[str, Any] = {"image_features": self._features(spans)}
        if start:
            cache = self._cache(found, start, self._total, self.padding)
            given |= {"cache": cache, "reused": start}
        else:
            given["left_padding"] = self.padding
        if self._store is not None and (self._settings.kv_bits or len(spans) > 1):
            given["on_prompt"] = self.keep_prompts
        return given

    def _most(self) -> int:
        """Columns that may be reused: not the last one, which gives the first logits,
        and none that is read after the cache is quantized, for they see less of it."""
        s = self._settings
        if s.kv_bits is None:
            return self._total - 1
        step = self._piece(len(self._lengths))
        quantized = max(step, -(-s.quantized_kv_start // step) * step)
        return min(self._total, quantized) - 1

    def _piece(self, rows: int) -> int:
        """Prompt tokens that Decoding reads at a time."""
        step = self._settings.prefill_step_size
        return prefill_piece(self._model.decoder.config, rows, step)

    def _look(self) -> tuple[int, list[list[Columns]]]:
        """The column from which on all rows are read, and what is known of each."""
        assert self._store is not None
        known, found = [], []
        for keys in self._keys:
            n, pieces = self._store.prefix(self._model, self._whole, keys[:-1])
            known.append(n)
            found.append(pieces)
        rest = max(a - b for a, b in zip(self._lengths, known, strict=True))
        start = self._agreed(min(self._total - rest, self._most()))
        return (start, found) if start >= LEAST else (0, [])

    def _agreed(self, columns: int) -> int:
        """The least of all processes that share the model."""
        group = self._model.decoder.group
        if group is None:
            return columns
        counts = [0] * group.size()
        counts[group.rank()] = columns
        return min(sums(counts, group))

    def _cache(
        self,
        rows: Sequence[list[Columns]],
        start: int,
        room: int,
        padding: Sequence[int] | None = None,
    ) -> list:
        """A cache of which `start` columns are read, padding included.

        rows: of each what is known behind its padding, in pieces. room: columns that it
        has space for. Each piece goes straight to its place: to join the pieces first,
        then the rows, would take the memory of the whole several times.
        """
        parts: list[tuple[int, int, Columns]] = []
        for row, pieces in enumerate(rows):
            at = padding[row] if padding else 0
            for piece in pieces:
                n = min(piece[0].shape[-2], start - at)
                if n > 0:
                    parts.append((row, at, columns(piece, 0, n)))
                    at += n
        cache = self._model.make_cache(left_padding=padding)
        with mx.stream(generation_stream()):
            for i, entry in enumerate(cache):
                entry.begin(
                    [(row, at, *x[2 * i : 2 * i + 2]) for row, at, x in parts],
                    (len(rows), start, room),
                )
                entry.adapter = self._model.decoder.adapter
        return cache

    def _features(self, spans: Sequence[tuple[int, int]]) -> mx.array | None:
        """Image tokens between two positions of each row, (1, T, D), or None.

        Only the pictures that are seen there are encoded.
        """
        began = time.perf_counter()
        seen, cuts = [], []
        for request, (start, stop) in zip(self._requests, spans, strict=True):
            before, end = self._slots(request, start), self._slots(request, stop)
            for picture in request.pictures:
                tokens = picture.tokens
                if self._store is None or (before < tokens and end > 0):
                    seen.append(picture)
                    cuts.append((max(before, 0), end))
                before, end = before - tokens, end - tokens
        if not seen:
            return None
        with as_one(self._model):
            parts = self._encode(seen)
        with mx.stream(generation_stream()):
            if self._store is not None:
                parts = [x[a:b] for x, (a, b) in zip(parts, cuts, strict=True)]
            features = (parts[0] if len(parts) == 1 else mx.concatenate(parts))[None]
            mx.eval(features)
        self.image_seconds += time.perf_counter() - began
        return features

    def _slots(self, request: Request, position: int) -> int:
        """Image slots before a position."""
        return request.input_ids[:position].count(self._slot)  # type: ignore[arg-type]

    def _encode(self, pictures: list[Picture]) -> list[mx.array]:
        store = self._store
        report = self._settings.on_images
        if store is None:
            return image_tokens(self._model, pictures, report=report)
        eyes = self._eyes
        return image_tokens(
            self._model,
            pictures,
            lambda digest: store.features(eyes, digest),
            lambda digest, features: store.keep_features(eyes, digest, features),
            report,
        )

    def _read_shared(self) -> int:
        """Read once what all rows begin with; how many tokens were read for it."""
        assert self._store is not None
        others, keys = len(self._keys) - 1, self._keys[0]
        shared = min(self._most(), *(length - 1 for length in self._lengths))
        for each in self._keys[1:]:
            shared = min(shared, shared_length(keys[:shared], each[:shared]))
        if others * shared < LEAST_SHARED:
            return 0
        known, pieces = self._store.prefix(self._model, self._whole, keys[:shared])
        known = self._agreed(known)
        if others * (shared - known) < LEAST_SHARED:
            return 0
        spans = [(known, shared)] + [(0, 0)] * others
        features = self._features(spans)
        began = time.perf_counter()
        cache = self._read(known, shared, pieces, features)
        self._store.keep(self._model, self._whole, keys[:shared], cache)
        self.seconds = time.perf_counter() - began
        return shared - known

    def _read(
        self, known: int, stop: int, pieces: list[Columns], features: mx.array | None
    ) -> list:
        """A cache of the first row's tokens up to `stop`, of which some are known."""
        model, step = self._model, self._piece(1)
        with mx.stream(generation_stream()):
            cache = model.make_cache()
            if known:
                cache = self._cache([pieces], known, stop)
            ids = mx.array([self._requests[0].input_ids[known:stop]])
            embeddings = model.embed(ids, image_features=features)
            for at in range(0, stop - known, step):
                part = embeddings[:, at : at + step]
                model.decoder.hidden(None, cache, part, last_only=True)
                mx.eval([entry.state for entry in cache])
                mx.clear_cache()
        return cache

    # --- after it --------------------------------------------------------------------

    def keep_prompts(self, cache: Sequence[Any]) -> None:
        """Keep what was read of each row's prompt; the cache is not quantized yet."""
        if self._store is None or not self._can_be_kept(cache):
            return
        stop = min(cache[0].offset, self._total)
        for row, (pad, keys) in enumerate(zip(self.padding, self._keys, strict=True)):
            if pad < stop:
                keys = keys[: stop - pad]
                self._store.keep(self._model, self._whole, keys, cache, row, pad)

    def keep_answer(
        self, cache: Sequence[Any], tokens: Sequence[int], *, later: bool = False
    ) -> None:
        """Keep the prompt and the answer of the only row, as far as they were read.

        later: when the next prompt comes; see Reuse.leave.
        """
        if self._store is None or not _is_plain(cache):
            return
        keys = [*self._keys[0], *tokens][: cache[0].offset]
        if later:  # waits for no lock
            if self._store.has_room(cache):
                self._store.leave(self._model, self._whole, keys, cache)
        elif self._can_be_kept(cache):
            self._store.keep(self._model, self._whole, keys, cache)

    def _can_be_kept(self, cache: Sequence[Any]) -> bool:
        """Whether the weights are still those that it was computed with, and there is
        room for a copy."""
        assert self._store is not None
        if not _is_plain(cache) or self._store.numbers(self._model)[0] != self._whole:
            return False
        with mx.stream(generation_stream()), suppress(RuntimeError):
            mx.eval([entry.state for entry in cache])  # else it is not in use yet
        return self._store.has_room(cache)


def _is_plain(cache: Sequence[Any]) -> bool:
    return all(type(entry) is KVCache for entry in cache)
