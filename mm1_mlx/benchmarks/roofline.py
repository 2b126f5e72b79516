"""The bytes that a token costs, and how fast they can be read: the limit of decoding.

A decoder reads all its weights for each token, but of its experts only the chosen ones,
and the keys and values of what came before. What it computes is little beside that.
"""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm1_mlx.config import DecoderConfig

if TYPE_CHECKING:
    from mm1_mlx.models.decoder import Decoder

_COPIED = 256 * 2**20  # bytes: more than any cache holds


@dataclass(frozen=True)
class TokenBytes:
    """What one row reads for one token, in bytes. context: tokens before it."""

    weights: int  # all but experts
    experts: int  # of the chosen ones
    cache: int  # keys and values of the context
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.experts + self.cache

    def limit(self, bandwidth: float) -> float:
        """Tokens a second where `bandwidth` bytes a second can be read."""
        return bandwidth / self.total


def token_bytes(decoder: "Decoder", context: int) -> TokenBytes:
    """Of a decoder as it is in memory."""
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(decoder.parameters())
    sizes = {name: array.nbytes for name, array in flat}
    # Keys and values have the type of the activations, which is that of the norms.
    norm: Any = decoder.norm
    width = norm.weight.dtype.size
    return count_bytes(decoder.config, sizes, context, width)


def count_bytes(
    config: DecoderConfig, sizes: dict[str, int], context: int, width: int
) -> TokenBytes:
    """From the bytes of each array of a decoder; width: of a key's number."""
    moe = config.moe_config
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    table = sum(size for name, size in sizes.items() if name.startswith("embed_tokens"))
    weights = sum(sizes.values()) - experts
    if not config.tie_word_embeddings:  # one row of the table is read, not all
        weights -= table - table // config.vocab_size
    if moe is not None:
        experts = experts * moe.num_experts_per_tok // moe.num_local_experts
    per_token = 2 * config.num_hidden_layers * config.kv_heads * config.size_per_head
    return TokenBytes(weights, experts, per_token * width * context, context)


def measure_bandwidth(rounds: int = 7) -> float:
    """Bytes a second that this machine moves in a copy: what is read and written.

    On a GPU MLX copies, elsewhere every core a part of the array. The median.
    """
    import mlx.core as mx

    device = mx.default_device()
    seconds = _on_gpu(rounds) if device.type == mx.gpu else _on_cpu(rounds)  # type: ignore[attr-defined]
    return 2 * _COPIED / statistics.median(seconds)


def _on_gpu(rounds: int) -> list[float]:
    import mlx.core as mx

    source = mx.zeros((_COPIED // 4,), mx.float32)
    mx.eval(source, source + 1)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(source + 1)
        seconds.append(time.perf_counter() - start)
    return seconds


def _on_cpu(rounds: int) -> list[float]:
    import numpy as np

    cores = os.cpu_count() or 1
    source = np.ones(_COPIED // 8)
    target = np.zeros_like(source)
    pieces = zip(
        np.array_split(target, cores), np.array_split(source, cores), strict=True
    )
    pairs = list(pieces)
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            seconds.append(time.perf_counter() - start)
    return seconds
