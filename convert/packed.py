"""Weights that are quantized already, as MLX's own tools write them.

mlx-lm and mlx-vlm put scales and biases beside a packed weight, and say in config.json
how it was packed. They are taken as they are: rows can be put under each other without
looking into them.
"""

from dataclasses import dataclass
from typing import Any

from mm1_mlx.config_checks import check_quantization
from mm1_mlx.errors import CheckpointError

from .readers import LazyArray

PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Packed:
    """A quantized weight. shape: of the numbers that it stands for."""

    parts: dict[str, LazyArray]
    settings: dict
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Of what it would be if it were not packed."""
        kind = self.parts["scales"].dtype
        return "BF16" if kind == "U8" else kind

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(part.nbytes for part in self.parts.values())


def settings_of(config: dict) -> dict | None:
    """The `quantization` of an MLX config.json, or None where nothing is packed.

    mlx-lm writes it twice, the second time as quantization_config. Other tools' way of
    quantizing (bitsandbytes, AWQ, GPTQ, ...) has a quant_method, which is refused.
    """
    found = config.get("quantization") or config.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or (method and method not in ("affine", "mlx")):
        raise CheckpointError(
            f"This checkpoint is quantized by {method!r}, which only its own tools can "
            f"read. Take the checkpoint that is not quantized, and -q."
        )
    return {k: v for k, v in found.items() if k != "quant_method"}


def bundle(arrays: dict[str, LazyArray], quantization: dict | None) -> dict[str, Any]:
    """The same arrays with each packed weight as one, under its weight's name.

    CheckpointError where scales and weight do not fit, or nothing says how they were
    made.
    """
    stems = [
        name.removesuffix(".scales") for name in arrays if name.endswith(".scales")
    ]
    stems = [stem for stem in stems if f"{stem}.weight" in arrays]
    if not stems:
        return dict(arrays)
    if quantization is None:
        raise CheckpointError(
            f"{stems[0]}.weight has scales, but config.json has no 'quantization' that "
            f"says how it was packed. Is it this checkpoint's config.json?"
        )
    default = {k: v for k, v in quantization.items() if not isinstance(v, (dict, bool))}
    found: dict[str, Any] = dict(arrays)
    for stem in stems:
        own = quantization.get(stem)
        settings = default | (own if isinstance(own, dict) else {})
        parts = {
            part: found.pop(f"{stem}.{part}")
            for part in PARTS
            if f"{stem}.{part}" in found
        }
        found[f"{stem}.weight"] = _packed(stem, parts, settings)
    return found


def _packed(stem: str, parts: dict[str, LazyArray], settings: dict) -> Packed:
    settings = {"group_size": 64, "mode": "affine"} | settings
    check_quantization(f"quantization of {stem}", settings)
    weight, scales = parts["weight"], parts["scales"]
    columns = scales.shape[-1] * settings["group_size"]
    packed = columns * settings["bits"] // 32
    shape = (*weight.shape[:-1], columns)
    if (
        weight.dtype != "U32"
        or weight.shape[-1] != packed
        or scales.shape[:-1] != weight.shape[:-1]
        or ("biases" in parts) != (settings["mode"] == "affine")
        or ("biases" in parts and parts["biases"].shape != scales.shape)
    ):
        raise CheckpointError(
            f"{stem}: a weight of {weight.dtype} {weight.shape} with scales of "
            f"{scales.shape} cannot be {settings['bits']} bits in groups of "
            f"{settings['group_size']} ({settings['mode']}), as config.json says."
        )
    return Packed(parts, settings, shape)
