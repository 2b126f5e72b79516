"""Activations for training on MLX's CPU back end, where `exp` is most of their time.

See cpu_attention.exp_below. On a GPU, and in 16 bits, the definitions are used.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mm1_mlx.kernels.cpu_attention import exp_below

Activation = Callable[[mx.array], mx.array]


def _sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x) in float32, relative error 4e-7; at least 1e-26: no denormals."""
    return 1 / (1 + exp_below(mx.minimum(-x, 60.0)))


fast_sigmoid: Any = mx.custom_function(_sigmoid)


@fast_sigmoid.vjp
def _fast_sigmoid_vjp(primals, cotangent, output):
    return cotangent * (output * (1 - output))


def fast_silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * fast_sigmoid(x)


def fast_quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x)."""
    return x * fast_sigmoid(1.702 * x)


def fast_gelu_approx(x: mx.array) -> mx.array:
    """x / 2 * (1 + tanh(u)), which is x * sigmoid(2 u)."""
    return x * fast_sigmoid(_TWICE * (x + 0.044715 * (x * x * x)))


_TWICE = 2 * math.sqrt(2 / math.pi)
_FAST: dict[str, Activation] = {
    "silu": fast_silu,
    "quick_gelu": fast_quick_gelu,
    "gelu_pytorch_tanh": fast_gelu_approx,
}


def fast_activation(name: str, x: mx.array) -> Activation | None:
    """What to train with in place of an activation of x, or None: as it is."""
    fits = mx.default_device().type == mx.cpu and x.dtype == mx.float32
    return _FAST.get(name) if fits else None


def rows_at_a_time(width: int, x: mx.array) -> int:
    """How many rows of an MLP of this width stay in a processor's cache; 0: no matter.

    On a CPU, in float32, made in such blocks an MLP is as fast with all of it made
    again for the gradient as with its inner states kept: what is kept is written to
    memory and read again. (Measured: 0.6 of the memory of a step of LoRA.)
    """
    fits = mx.default_device().type == mx.cpu and x.dtype == mx.float32
    return max(64, (3 << 18) // width) if fits else 0
