"""An adapter taken into the weights: the same answers without it."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.adapters.folder import adapted_layers
from mm1_mlx.adapters.layers import AdaptedLinear
from mm1_mlx.models.moe import QuantizedStack
from mm1_mlx.quantization.modules import replace_module


def fuse_adapter(
    model: Any, *, dequantize: bool = False, bits: int | None = None
) -> int:
    """Replace a model's adapted layers by plain ones, in place; how many there were.

    Of several beside each other the one in use; the others, which were made for the
    weights before, are forgotten.

    Weights keep their type; packed ones are packed again in their own bits, which
    rounds what the adapter has added. bits: how many they get instead, in affine mode;
    the model's config says so then. dequantize: they are left in 16 bits.
    """
    layers = adapted_layers(model)
    settings: dict[str, Any] = dict(model.config.quantization or {})
    for path, layer in layers.items():
        how = None if dequantize else _packing(layer, bits)
        make: Any = _linear if isinstance(layer, AdaptedLinear) else _stack
        replace_module(model, path, make(layer, how))
        if how is not None and bits is not None:
            settings[path] = how
        mx.eval(model.parameters())
    if settings:
        model.config = replace(model.config, quantization=settings)
    _forget(model)
    return len(layers)


def _packing(layer: Any, bits: int | None) -> dict[str, Any] | None:
    """How an adapted weight will be packed; None: it is not packed below either."""
    base = layer.get("base")
    if base is None or "scales" not in base:
        return None
    if bits is None:
        return {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    # Of the sizes that affine mode has, one that divides a row as the old one did.
    return {"group_size": max(base.group_size, 32), "bits": bits, "mode": "affine"}


def without_adapter(model: nn.Module) -> int:
    """Take a model's adapter off, in place; how many layers had one.

    Whole weights that it trained stay, unless it is one of several beside each other.
    """
    if (held := getattr(model, "adapters", None)) is not None:
        held.use(model, None)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        replace_module(model, path, layer.frozen)
    _forget(model)
    return len(layers)


def _forget(model: Any) -> None:
    """The model is a base model now, whatever it was."""
    model.adapters = model.decoder.adapter = None


def _linear(layer: AdaptedLinear, how: dict[str, Any] | None) -> nn.Module:
    base: Any = layer.base
    packed = isinstance(base, nn.QuantizedLinear)
    weight = layer.merged()
    weight = weight.astype(_type_of(base) if packed else base.weight.dtype)
    bias = base.get("bias")
    plain = nn.Linear(1, 1, bias=bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias
    return plain if how is None else nn.QuantizedLinear.from_linear(plain, **how)


def _type_of(packed: Any) -> mx.Dtype:
    """Of the numbers that a packed weight stands for; mxfp4 and its kin do not say."""
    kind = packed.scales.dtype
    return kind if mx.issubdtype(kind, mx.floating) else mx.bfloat16


def _stack(layer: Any, how: dict[str, Any] | None) -> "mx.array | QuantizedStack":
    if "weight" in layer:
        return layer.merged().astype(layer.weight.dtype)
    stack = layer.merged().astype(_type_of(layer.base))
    return stack if how is None else QuantizedStack(stack, **how)
