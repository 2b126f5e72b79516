"""An adapter taken into the weights: the same answers without it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.adapters.folder import adapted_layers
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack
from mm1_mlx.models.moe import QuantizedStack
from mm1_mlx.quantization.modules import replace_module


def fuse_adapter(model: nn.Module, *, dequantize: bool = False) -> int:
    """Replace a model's adapted layers by plain ones, in place; how many there were.

    Weights keep their type; packed ones are packed again in their own bits, which
    rounds what the adapter has added, unless dequantize: then every weight that was
    packed below an adapter is left in 16 bits.
    """
    layers = adapted_layers(model)
    for path, layer in layers.items():
        fused = _linear(layer, dequantize) if isinstance(layer, AdaptedLinear) else None
        replace_module(
            model, path, _stack(layer, dequantize) if fused is None else fused
        )
        mx.eval(model.parameters())
    return len(layers)


def without_adapter(model: nn.Module) -> int:
    """Take a model's adapter off, in place; how many layers had one."""
    layers = adapted_layers(model)
    for path, layer in layers.items():
        stack = layer.get("weight") if isinstance(layer, AdaptedStack) else None
        replace_module(model, path, layer["base"] if stack is None else stack)
    return len(layers)


def _linear(layer: AdaptedLinear, dequantize: bool) -> nn.Module:
    base: Any = layer.base
    packed = isinstance(base, nn.QuantizedLinear)
    weight = layer.merged()
    weight = weight.astype(_type_of(base) if packed else base.weight.dtype)
    bias = base.get("bias")
    plain = nn.Linear(1, 1, bias=bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias
    if not packed or dequantize:
        return plain
    return nn.QuantizedLinear.from_linear(plain, base.group_size, base.bits, base.mode)


def _type_of(packed: Any) -> mx.Dtype:
    """Of the numbers that a packed weight stands for; mxfp4 and its kin do not say."""
    kind = packed.scales.dtype
    return kind if mx.issubdtype(kind, mx.floating) else mx.bfloat16


def _stack(layer: Any, dequantize: bool) -> "mx.array | QuantizedStack":
    if "weight" in layer:
        return layer.merged().astype(layer.weight.dtype)
    base: QuantizedStack = layer.base
    stack = layer.merged().astype(_type_of(base))
    if dequantize:
        return stack
    return QuantizedStack(stack, base.group_size, base.bits, base.mode)
