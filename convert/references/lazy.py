"""PyTorch modules whose weights are in memory only while they are used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mm1_mlx.errors import CheckpointError

Read = Callable[[str], np.ndarray]  # a parameter's name -> its numbers, float32


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters without memory; their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: Any) -> None:
        if value is not None:
            value = nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def attach(module: nn.Module, read: Read) -> None:
    """Have every block of a module read its weights before it runs, and forget them
    after.

    A block is an element of a list of layers, or another module that has parameters of
    its own, with all that is inside it but lists of layers.
    """
    module.eval()
    for name, block, deep in list(_blocks("", module)):
        block.register_forward_pre_hook(_loader(name, block, deep, read))
        block.register_forward_hook(_forgetter(block, deep))


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, module, and whether what is inside it belongs to it."""
    own = any(True for _ in module.parameters(recurse=False))
    lists = any(isinstance(inner, nn.ModuleList) for inner in module.modules())
    if own:
        yield name, module, not lists
    if own and not lists:
        return
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if isinstance(module, nn.ModuleList):
            yield full, child, True
        else:
            yield from _blocks(full, child)


def _loader(name: str, block: nn.Module, deep: bool, read: Read) -> Callable[..., None]:
    def load(*_: Any) -> None:
        for inner, owner, short in list(_parameters(block, deep)):
            full = f"{name}.{inner}" if name else inner
            wanted = tuple(owner._parameters[short].shape)  # type: ignore[union-attr]
            tensor = torch.from_numpy(_shaped(read(full), wanted, full))
            owner._parameters[short] = nn.Parameter(tensor, requires_grad=False)

    return load


def _shaped(numbers: np.ndarray, wanted: tuple[int, ...], name: str) -> np.ndarray:
    """The numbers in the layout of torch; a convolution may come in that of MLX."""
    found = np.array(numbers, np.float32)
    if found.shape == wanted:
        return found
    if len(wanted) == 4 and found.shape == tuple(wanted[k] for k in (0, 2, 3, 1)):
        return np.ascontiguousarray(found.transpose(0, 3, 1, 2))
    long = [tuple(n for n in shape if n > 1) for shape in (found.shape, wanted)]
    if long[0] != long[1]:
        raise CheckpointError(
            f"{name} has the shape {found.shape} in the original, but its config says "
            f"{wanted}."
        )
    return found.reshape(wanted)


def _forgetter(block: nn.Module, deep: bool) -> Callable[..., None]:
    def forget(*_: Any) -> None:
        for __, owner, short in list(_parameters(block, deep)):
            value = owner._parameters[short]
            assert value is not None
            empty = nn.Parameter(value.to("meta"), requires_grad=False)
            owner._parameters[short] = empty

    return forget


def _parameters(block: nn.Module, deep: bool) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, owner and own name of every parameter of a block."""
    for prefix, owner in block.named_modules() if deep else [("", block)]:
        for short, value in owner._parameters.items():
            if value is not None:
                yield f"{prefix}.{short}" if prefix else short, owner, short
