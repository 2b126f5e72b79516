"""The loss of the next token without ever holding the logits of a whole vocabulary.

(B, L, V) in float32 is what runs out of memory first: 4 rows of 2048 tokens with 152k
words are 5 GB. Only states that predict something come here, and their logits are made
for some words at a time, forwards and again backwards.
"""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mm1_mlx.adapters.layers import AdaptedLinear
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.walk import LayerWalk


def cross_entropy(
    states: mx.array,
    target: mx.array,
    head: nn.Module,
    vocab: int,
    chunk: int,
    walk: LayerWalk | None = None,
) -> tuple[mx.array, mx.array]:
    """Loss of each state, and whether its likeliest word is the target.

    head: the output layer, or the token table where it is tied; plain, packed or
    adapted. chunk: words at a time, after which a training step's walk can pause.

    Shapes:
        states: (M, D); target: (M,) ids
        returns: (M,) float32 nats, (M,) bool
    """
    walk = walk or LayerWalk()
    flat: Any = tree_flatten(head.trainable_parameters())
    names = [name for name, _ in flat]

    def logits_of(start: int, states: mx.array, *parameters: mx.array) -> mx.array:
        head.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return head_rows(head, states, start, min(start + chunk, vocab))

    @mx.custom_function
    def run(states: mx.array, *parameters: mx.array) -> tuple[mx.array, ...]:
        """Loss, hit and log-sum-exp of each row, (M,); no logits are kept."""
        parts: list[mx.array] = []
        for start in range(0, vocab, chunk):
            logits = logits_of(start, _after(states, parts), *parameters)
            parts.append(_of_chunk(logits, target, start))
            walk.ahead[f"loss {start}"] = parts[-1]
        totals, owns, bests = mx.stack(parts, axis=1)  # (3, chunks, M)
        whole, own = mx.logsumexp(totals, axis=0), owns.sum(axis=0)
        right = (own >= bests.max(axis=0)).astype(mx.float32)
        return whole - own, right, whole

    @run.vjp
    def run_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """Logits are made again a chunk at a time; softmax minus one-hot."""
        alone = isinstance(primals, mx.array)  # MLX gives one without its tuple
        every: list[mx.array] = [primals] if alone else list(primals)
        states, *parameters = every
        grads: list[mx.array] = []
        for start in range(0, vocab, chunk):
            rows = partial(logits_of, start)
            given = [_after(states, grads), *parameters]
            slope = mx.exp(rows(*given) - outputs[2][:, None])
            words = mx.arange(start, start + slope.shape[-1])
            slope = slope - (target[:, None] == words).astype(slope.dtype)
            new: Any = mx.vjp(rows, given, [slope * cotangents[0][:, None]])[1]
            grads = [a + b for a, b in zip(grads, new, strict=True)] if grads else new
            walk.back[f"loss {start}"] = mx.depends(grads[0], grads[1:])
        return grads[0] if alone else tuple(grads)

    losses, right, _ = run(states, *(array for _, array in flat))  # type: ignore
    head.update(tree_unflatten(flat))
    return losses, right > 0


def _after(states: mx.array, made: list[mx.array]) -> mx.array:
    """The states, but not before the last chunk is done.

    MLX works on up to twenty branches of a graph side by side, so the logits of twenty
    chunks would be held.
    """
    return mx.depends(states, made) if made else states


def _of_chunk(logits: mx.array, target: mx.array, start: int) -> mx.array:
    """Of some words: log of the sum, the target's logit or 0, the largest. (3, M)."""
    words = logits.shape[-1]
    inside = (target >= start) & (target < start + words)
    place = mx.clip(target - start, 0, words - 1)[:, None]
    own = mx.take_along_axis(logits, place, axis=-1)[:, 0]
    own = mx.where(inside, own, 0.0)
    return mx.stack([mx.logsumexp(logits, axis=-1), own, logits.max(axis=-1)])


def output_layer(decoder: Decoder) -> nn.Module:
    """What makes logits of states: the head, or the token table where it is tied."""
    return decoder["embed_tokens" if decoder.config.tie_word_embeddings else "lm_head"]


def head_rows(head: Any, states: mx.array, start: int, stop: int) -> mx.array:
    """Logits of the words from `start` to `stop`. (M, D) -> (M, words) float32."""
    if isinstance(head, AdaptedLinear):
        logits = head_rows(head.base, states, start, stop)
        return logits + _pair_rows(head, states, logits, start, stop)
    if "scales" in head:
        logits = mx.quantized_matmul(
            states,
            head.weight[start:stop],
            head.scales[start:stop],
            None if head.get("biases") is None else head.biases[start:stop],
            transpose=True,
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )
    else:
        logits = states @ head.weight[start:stop].T
    if (bias := head.get("bias")) is not None:
        logits = logits + bias[start:stop]
    return logits.astype(mx.float32)


def _pair_rows(
    head: AdaptedLinear, states: mx.array, logits: mx.array, start: int, stop: int
) -> mx.array:
    """What an adapter of the head adds to these words' logits."""
    (name,) = head.pairs
    pair, settings = head.pairs[name], head.settings
    low = head.dropped(states) @ pair.lora_a
    delta = settings.scale * (low @ pair.lora_b[:, start:stop])
    if not settings.dora:
        return delta
    bias = head.base.get("bias")
    plain = logits if bias is None else logits - bias[start:stop]
    rows = head.row_scales()[start:stop]
    return (plain + delta) * rows - plain
