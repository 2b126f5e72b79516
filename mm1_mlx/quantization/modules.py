"""Puts quantized modules where a model's weights are quantized."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from mm1_mlx.models.moe import Experts
from mm1_mlx.models.router import Router

# path of a module -> its settings (group_size, bits, mode), or None to leave it
SettingsOf = Callable[[str], dict | None]


def quantize_model(model: nn.Module, settings_of: SettingsOf) -> None:
    """Replace modules by quantized ones, in place; weights that are there are used.

    settings_of: called with the path of each linear layer and embedding, and of each
    stack of experts ("....experts.gate_up_proj").
    """
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            found = {
                name: settings
                for name in module.stacks
                if (settings := settings_of(f"{path}.{name}")) is not None
            }
            if found:
                module.quantize(found)
        elif isinstance(module, Router):
            if (settings := settings_of(path)) is not None:
                module.quantize(settings)
        elif hasattr(module, "to_quantized") and (settings := settings_of(path)):
            replace_module(model, path, module.to_quantized(**settings))  # type: ignore


def module_at(model: nn.Module, path: str) -> Any:
    """What is at a path like "decoder.layers.3.mlp"; "" is the model itself."""
    place: Any = model
    for part in path.split(".") if path else ():
        place = place[int(part)] if part.isdigit() else place[part]
    return place


def replace_module(model: nn.Module, path: str, module: Any) -> None:
    """Put another module (or array) at a path like "decoder.layers.3.mlp.up_proj"."""
    owner, _, last = path.rpartition(".")
    place = module_at(model, owner)
    if last.isdigit():
        place[int(last)] = module
    else:
        setattr(place, last, module)


def settings_by_name(quantization: dict, names: set[str]) -> SettingsOf:
    """What a config.json's `quantization` says of each module, as mlx-lm reads it.

    names: of the stored weights; a module without scales is not quantized. An entry
    with the module's path changes the settings for it.
    """
    default = {k: v for k, v in quantization.items() if not isinstance(v, dict)}

    def settings_of(path: str) -> dict | None:
        if f"{path}.scales" not in names:
            return None
        own = quantization.get(path)
        return {**default, **own} if isinstance(own, dict) else default

    return settings_of
