"""In which order the experts read tokens: expert, token and choice as one number."""

from functools import lru_cache

import mlx.core as mx

from mm1_mlx.kernels.fused import fused


def place_bits(tokens: int, k: int) -> tuple[int, int]:
    """Bits of a key below the expert: of the choice alone, and of token and choice."""
    low = (k - 1).bit_length()
    both = low + (tokens - 1).bit_length()
    assert both <= 22, "prompts are read in pieces"
    return low, both


@lru_cache(maxsize=64)
def places(tokens: int, k: int) -> mx.array:
    """Token and choice of each place as one number. (tokens, k) uint32."""
    low, _ = place_bits(tokens, k)
    rows = [[token << low | choice for choice in range(k)] for token in range(tokens)]
    return mx.array(rows, mx.uint32)


@lru_cache(maxsize=64)
def row_numbers(count: int, times: int) -> mx.array:
    """0, 0, 1, 1, ... for times=2. (count * times,) uint32.

    Kept: where none are given, MLX makes them anew, one launch a product.
    """
    return mx.array([n for n in range(count) for _ in range(times)], mx.uint32)


@fused
def _packed(experts: mx.array, places: mx.array, shift: mx.array) -> mx.array:
    return (experts << shift) | places


def keys_of(experts: mx.array) -> mx.array:
    """Expert, token and choice as one number: sorted, they are the experts' order.

    (T, k) uint32 -> (T, k) uint32.
    """
    experts = mx.stop_gradient(experts)
    shift = mx.array(place_bits(*experts.shape)[1], mx.uint32)
    return _packed(experts, places(*experts.shape), shift)
