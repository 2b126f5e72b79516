"""A model with 360VL's crops in the layout of 360VL (qihoo360), for its own code.

Names are those of the table of sources/vl360.py, read backwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.checkpoint.folder import write_json
from mm1_mlx.config import MM1Config, VisionConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.presets import ENCODERS

from . import numbers
from .adapters.names import Names
from .adapters.names import Piece as Made
from .inverse import undo
from .readers import LazyArray
from .rules import drop_cls_row
from .sources import vl360
from .sources.llava import TOWERS

TOWER = "vision_tower"  # the folder with the shape of a tower that has no known name
# How far the crops' table may be from an enlarged one, as a part of its largest number.
_ROUNDED = {"F32": 1e-5, "F16": 2e-3, "BF16": 2e-2}


@dataclass(frozen=True)
class Piece:
    """One array of a foreign layout. take: of one of ours, by name."""

    name: str
    shape: tuple[int, ...]
    source: str
    take: Callable[[np.ndarray], np.ndarray]


def config_values(
    config: MM1Config, text: dict[str, Any], tower: dict[str, Any]
) -> dict[str, Any]:
    """The config.json of 360VL. text, tower: as transformers has these parts.

    CheckpointError for a model of another shape.
    """
    vision, connector = config.vision_config, config.connector_config
    assert vision is not None and connector is not None
    name = _name_of(vision)
    values = text | {
        "model_type": "QH_360VL",
        "architectures": ["QH360_VL_LlamaForCausalLM"],
        "mm_vision_tower": name or TOWER,
        "mm_hidden_size": vision.hidden_size,
        "mm_num_tokens": vision.num_patches + 1,
        "mm_projector_type": "c-abs",
        "mm_vision_select_layer": vision.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "proj_2": True,
        "image_aspect_ratio": "pad",
        "visual_projector_config": {
            "projector_type": "c-abs",
            "depth": connector.depth,
            "mlp_depth": connector.mlp_depth,
            "hidden_size": connector.hidden_size,
            "num_eos_tokens": connector.num_eos_tokens,
            "pos_emb": connector.position_embedding,
            "prenorm": connector.norm_input,
            "num_queries": connector.num_query_tokens,
            "encoder_hidden_size": vision.hidden_size,
        },
    }
    back = vl360.config(values, tower)
    for part in ("vision_config", "connector_config", "tiling_config", "text_config"):
        if getattr(back, part) != getattr(config, part):
            raise CheckpointError(
                f"This model reads pictures in crops, but its {part} is not one that "
                f"360VL can have, and no other layout of the hub has crops."
            )
    return values


def _name_of(vision: VisionConfig) -> str | None:
    """What the hub calls the tower of this shape, where it is a known one."""
    for name, ours in TOWERS.items():
        if replace(ENCODERS[ours], feature_layer=vision.feature_layer) == vision:
            return name
    return None


def write_tower(folder: Path, values: dict[str, Any], tower: dict[str, Any]) -> None:
    """The shape of the tower, where config.json only says that it lies beside it."""
    if values["mm_vision_tower"] == TOWER:
        (folder / TOWER).mkdir()
        write_json(folder / TOWER / "config.json", tower)


def pieces(
    config: MM1Config, values: dict[str, Any], arrays: dict[str, LazyArray]
) -> Iterator[Piece]:
    """Every array of 360VL's layout."""
    names = Names(config, vl360.ENTRY, values)
    for weight, array in arrays.items():
        made = names.pieces[weight]
        same_rule = [piece for piece in made if piece.rule is made[0].rule]
        for piece in same_rule:
            take = _take(piece, names, array.dtype, config)
            dummy = np.broadcast_to(np.zeros((), np.uint8), array.shape)
            shape = _shape(piece, take, dummy)
            yield Piece(piece.name, shape, weight, take)


def _shape(piece: Made, take: Callable, dummy: np.ndarray) -> tuple[int, ...]:
    if piece.rule.transform is vl360.positions_of_crops:
        return 1, len(dummy) // 4 + 1, dummy.shape[1]
    return take(dummy).shape


def _take(
    piece: Made, names: Names, dtype: str, config: MM1Config
) -> Callable[[np.ndarray], np.ndarray]:
    if piece.rule.transform is drop_cls_row:
        return _with_cls_row
    if piece.rule.transform is vl360.positions_of_crops:
        return lambda array: _positions(array, dtype)
    sizes = names.sizes(piece.weight)
    assert config.vision_config is not None
    patch = config.vision_config.patch_size

    def take(array: np.ndarray) -> np.ndarray:
        parts = undo(piece.rule, array, sizes, patch)
        assert parts is not None, piece.name
        return parts[piece.index]

    return take


def _with_cls_row(table: np.ndarray) -> np.ndarray:
    """A row in front for the class token, which nobody reads. (P, D) -> (1, P+1, D)"""
    return np.concatenate([np.zeros_like(table[:1]), table])[None]


def _positions(table: np.ndarray, dtype: str) -> np.ndarray:
    """The table that 360VL enlarges to that of the crops. (4P, D) -> (1, P+1, D)"""
    given = numbers.to_float32(table, dtype)
    found = vl360.positions_before(given)
    off = np.abs(vl360.positions_of_crops(found[None]) - given).max()
    if off > _ROUNDED.get(dtype, 0.0) * np.abs(given).max():
        raise CheckpointError(
            "This model cannot be written as 360VL: the positions of its crops were "
            "trained one by one, and 360VL enlarges a table of a quarter as many."
        )
    return _with_cls_row(numbers.cast(found, "F32", dtype))
