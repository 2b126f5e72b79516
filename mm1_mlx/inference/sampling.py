"""Which token comes next: filters, temperature, repetition penalty.

The distributions are those of mlx-lm's make_sampler and make_logits_processors, so that
settings carry over. A sampler owns its random state; MLX's global one is not touched.
"""

import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import MM1Error

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Only the likeliest tokens that reach the probability top_p together; rest -inf.

    A token stays if those before it sum to less than top_p. Ties stay together.
    (B, V) -> (B, V).
    """
    ranked = -mx.sort(-logprobs, axis=-1)
    probs = mx.exp(ranked.astype(mx.float32))
    before = mx.cumsum(probs, axis=-1, inclusive=False)
    stays = before < top_p * probs.sum(axis=-1, keepdims=True)
    least = mx.where(stays, ranked, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logprobs >= least, logprobs, -mx.inf)


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Only tokens at least min_p times as likely as the likeliest. (B, V) -> (B, V)."""
    least = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs >= least, logprobs, -mx.inf)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Only the top_k likeliest tokens. (B, V) -> (B, V)."""
    if top_k >= logprobs.shape[-1]:
        return logprobs
    others = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    lowest = mx.array(-mx.inf, logprobs.dtype)
    return mx.put_along_axis(logprobs, others, lowest, axis=-1)


def filter_logprobs(
    logprobs: mx.array, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> mx.array:
    """The filters that are on, in mlx-lm's order: top-p, min-p, top-k.

    Each looks at probabilities at temperature 1, of all tokens. (B, V) -> (B, V).
    """
    if 0 < top_p < 1:
        logprobs = keep_top_p(logprobs, top_p)
    if min_p > 0:
        logprobs = keep_min_p(logprobs, min_p)
    if top_k > 0:
        logprobs = keep_top_k(logprobs, top_k)
    return logprobs


def make_sampler(
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> Sampler:
    """A function from log-probabilities (B, V) to token ids (B,).

    temp: 0 takes the likeliest token, and the filters do nothing. top_p: in (0, 1], 1
    is off (and 0, as in mlx-lm). top_k: 0 is off. min_p: in [0, 1], 0 is off. seed: the
    same seed gives the same tokens; None gives others each time. Its random state is in
    `sampler.state`, a list with one key, so that who samples can evaluate it.
    """
    temp = check_number("temp", temp, 0)
    top_p = check_number("top_p", top_p, 0, 1)
    top_k = check_number("top_k", top_k, 0, whole=True)
    min_p = check_number("min_p", min_p, 0, 1)
    if temp == 0:
        return greedy
    return _RandomSampler(temp, top_p, top_k, min_p, seed)


def greedy(logprobs: mx.array) -> mx.array:
    """The likeliest token of each row. (B, V) -> (B,)."""
    return mx.argmax(logprobs, axis=-1)


class _RandomSampler:
    def __init__(
        self, temp: float, top_p: float, top_k: int, min_p: float, seed: int | None
    ):
        self._temp = temp
        self._filters = (top_p, top_k, min_p)
        start = int.from_bytes(os.urandom(8)) if seed is None else seed
        self.state = [mx.random.key(start)]

    def __call__(self, logprobs: mx.array) -> mx.array:
        self.state[0], key = mx.random.split(self.state[0])
        logprobs = filter_logprobs(logprobs, *self._filters)
        return mx.random.categorical(logprobs * (1 / self._temp), key=key)


def make_logits_processors(
    repetition_penalty: float | None = None, repetition_context_size: int = 20
) -> list[LogitsProcessor]:
    """Functions (tokens (B, T), logits (B, V)) -> logits (B, V), run before sampling.

    repetition_penalty: the logits of the last repetition_context_size tokens are
    divided by it where positive and multiplied where negative (arXiv 1909.05858);
    above 1 they become less likely. None, 0 and 1 are off. An id that has no logit, as
    image slots may have, counts among the recent ones and changes nothing.
    """
    if repetition_penalty is None:
        return []
    penalty = check_number("repetition_penalty", repetition_penalty, 0)
    context = check_number(
        "repetition_context_size", repetition_context_size, 1, whole=True
    )
    if penalty in (0, 1):
        return []

    def penalise(tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens: (B, T) so far, the prompt included; logits: (B, V) -> (B, V)."""
        recent = tokens[:, -context:]
        if not recent.size:
            return logits
        size = logits.shape[-1]
        # MLX checks no index: one beyond the vocabulary is the next row of the batch.
        # So ids without a logit are sent to a spare column, which is cut off again.
        recent = mx.where((recent >= 0) & (recent < size), recent, size)
        spare = mx.zeros((logits.shape[0], 1), logits.dtype)
        padded = mx.concatenate([logits, spare], axis=-1)
        chosen = mx.take_along_axis(padded, recent, axis=-1)
        chosen = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
        return mx.put_along_axis(padded, recent, chosen, axis=-1)[:, :size]

    return [penalise]


def check_number(
    name: str,
    value: Any,
    least: float,
    most: float = math.inf,
    *,
    whole: bool = False,
) -> Any:
    """The value as Python's int (if `whole`) or float, also where NumPy gave it.

    MM1Error unless it is a finite number in [least, most]. bool is no number.
    """
    if isinstance(value, Integral if whole else Real) and not isinstance(value, bool):
        number = int(value) if whole else float(value)  # type: ignore[arg-type]
        if (whole or math.isfinite(number)) and least <= number <= most:
            return number
    kind = "a whole number" if whole else "a number"
    limits = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
    raise MM1Error(f"{name} is {value!r}, but must be {kind} {limits}.")
