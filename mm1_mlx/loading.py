"""From a name, folder or hub id to a model and its processor, and back to a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mm1_mlx.checkpoint.folder import (
    check_weights,
    read_config,
    read_weights,
    write_folder,
)
from mm1_mlx.checkpoint.hub import find_folder
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import MM1Error
from mm1_mlx.models.mm1 import MM1

if TYPE_CHECKING:
    from mm1_mlx.inputs.processor import Processor

_DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


def load(
    name_or_path: str | Path, *, dtype: mx.Dtype | str | None = None, lazy: bool = False
) -> "tuple[MM1, Processor]":
    """The model and the processor of a name ("mm1-tiny"), a folder or a hub id.

    dtype: the floating-point type of the weights. None keeps the stored one, except on
    MLX's CPU back end, whose 16-bit arithmetic is slow and coarse: there it is float32,
    at twice the memory. lazy: leave the weights on disk until they are used; then only
    the thread that loaded may use them.

    Raises CheckpointError for a model that cannot be found or does not fit its config,
    ConfigError for a config that makes no sense.
    """
    from mm1_mlx.inputs.processor import Processor

    wanted = _wanted_type(dtype)
    folder = find_folder(name_or_path)
    config = read_config(folder)
    processor = Processor.from_folder(folder, config)
    return load_model(folder, config, wanted, lazy=lazy), processor


def load_model(
    folder: Path,
    config: MM1Config | None = None,
    dtype: mx.Dtype | None = None,
    *,
    lazy: bool = False,
) -> MM1:
    """The model of a folder, without its processor; dtype None keeps the stored types.

    Names and shapes must be exactly those of the config's model.
    """
    folder = Path(folder)
    config = config or read_config(folder)
    weights = read_weights(folder)
    model = _empty_model(config, weights)
    expected = {name: array.shape for name, array in _named(model).items()}
    found = {name: array.shape for name, array in weights.items()}
    check_weights(found, expected, str(folder))
    if dtype is not None:
        weights = {
            name: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w
            for name, w in weights.items()
        }
    model.load_weights(list(weights.items()), strict=False)  # checked above
    model.eval()
    if not lazy:
        mx.eval(_all_arrays(model))
    return model


def _wanted_type(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    if dtype is None:
        on_cpu = mx.default_device().type == mx.cpu
        return mx.float32 if on_cpu else None
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype, dtype)
    if dtype not in _DTYPES.values():
        raise MM1Error(f"dtype is {dtype!r}, but must be one of {', '.join(_DTYPES)}.")
    return dtype  # type: ignore[return-value]


def _empty_model(config: MM1Config, weights: dict[str, mx.array]) -> MM1:
    """The model with weights that nobody will compute: MLX's are made when used."""
    model = MM1(config)
    if config.quantization is not None:
        settings = {
            key: config.quantization[key]
            for key in ("group_size", "bits", "mode")
            if key in config.quantization
        }
        nn.quantize(
            model,
            **settings,
            class_predicate=lambda path, module: f"{path}.scales" in weights,
        )
    return model


def _named(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def _all_arrays(model: nn.Module) -> list[mx.array]:
    """Weights and constants. All must be evaluated here: in MLX, what is left lazy in
    one thread cannot be computed in another."""
    return [
        value
        for module in model.modules()
        for value in module.values()
        if isinstance(value, mx.array)
    ]


def save(
    model: MM1, processor: "Processor", folder: str | Path, *, overwrite: bool = False
) -> None:
    """Write a model folder that `load` reads: all of it, or nothing.

    overwrite: replace a model folder that is there (also the one that the model was
    loaded from). Raises CheckpointError for a folder that is in use for other things.
    """
    weights = _named(model)
    write_folder(
        Path(folder).expanduser(),
        model.config,
        weights,
        processor.save,
        overwrite=overwrite,
    )
