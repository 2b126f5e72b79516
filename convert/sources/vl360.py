"""360VL (qihoo360): CLIP, two C-Abstractors, Llama 3 -> names of mm1_mlx.models.mm1.

A picture is read as four crops, whose features are put together for a connector of
their own, and an overview.
"""

from dataclasses import replace
from math import isqrt

import numpy as np

from mm1_mlx.config import MM1Config, TilingConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import Rule, Table, drop_cls_row, prefixed
from ..source import MODEL, Source
from . import llama
from .fields import Fields
from .honeybee import ABSTRACTOR, abstractor_config
from .llava import find_tower, outside_vocabulary, tower_rules


def _cubic(x: np.ndarray) -> np.ndarray:
    """torch's bicubic kernel (a = -0.75) at distance x from a sample."""
    x, a = np.abs(x), -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _enlarging(size: int, factor: int) -> np.ndarray:
    """The matrix of torch.nn.functional.interpolate(mode="bicubic") along one axis.

    Half-pixel centres, samples beyond the edge repeat it. (size * factor, size)
    """
    places = (np.arange(size * factor) + 0.5) / factor - 0.5
    matrix = np.zeros((len(places), size))
    for row, place in enumerate(places):
        for sample in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weight = _cubic(np.array(place - sample))
            matrix[row, min(max(sample, 0), size - 1)] += weight
    return matrix


def positions_of_crops(table: np.ndarray) -> np.ndarray:
    """The table for the crops' whole map, which 360VL enlarges whenever it runs.

    (1, P + 1, D) -> (4P, D), without the row of the class token.
    """
    table = drop_cls_row(table)
    side = isqrt(len(table))
    by = _enlarging(side, 2)
    grid = table.astype(np.float64).reshape(side, side, -1)
    grid = np.einsum("rg,ghd->rhd", by, grid)
    grid = np.einsum("ch,rhd->rcd", by, grid)
    return grid.reshape(4 * len(table), -1).astype(np.float32)


def positions_before(table: np.ndarray) -> np.ndarray:
    """The table whose positions_of_crops are nearest to these. (4P, D) -> (P, D)"""
    side = isqrt(len(table)) // 2
    back = np.linalg.pinv(_enlarging(side, 2))
    grid = table.astype(np.float64).reshape(2 * side, 2 * side, -1)
    grid = np.einsum("gr,rhd->ghd", back, grid)
    grid = np.einsum("hc,gcd->ghd", back, grid)
    return grid.reshape(side * side, -1).astype(np.float32)


_OF_CROPS: Table = [
    Rule("pos_emb", "position_embedding", positions_of_crops, numeric=True),
    *(r for r in ABSTRACTOR if not (isinstance(r, Rule) and r.source == "pos_emb")),
]

RULES: Table = [
    *tower_rules("model.vision_tower.vision_tower."),
    *prefixed(ABSTRACTOR, "model.mm_projector_ori.", "connector."),
    *prefixed(_OF_CROPS, "model.mm_projector_ctt.", "tile_connector."),
    *prefixed(llama.RULES, target="decoder."),
]

_DEFAULTS = {
    "mm_projector_type": "c-abs",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "proj_2": True,
    "image_aspect_ratio": "pad",
    "pad_token_id": None,
}


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """tower: the config.json of the folder that mm_vision_tower names."""
    f = Fields(hub_config, _DEFAULTS, "360VL")
    f.refuse("mm_projector_type", "c-abs")
    f.refuse("mm_vision_select_feature", "patch")
    f.refuse("mm_use_im_start_end", False)
    f.refuse("mm_use_im_patch_token", False)
    f.refuse("proj_2", True)
    projector = hub_config.get("visual_projector_config")
    if not isinstance(projector, dict):
        raise CheckpointError("The 360VL config has no visual_projector_config.")
    vision = find_tower(hub_config.get("mm_vision_tower"), tower)
    text = llama.config(hub_config | {"model_type": "llama"})
    return MM1Config(
        vision_config=replace(vision, feature_layer=f["mm_vision_select_layer"]),
        connector_config=abstractor_config(projector),
        tiling_config=TilingConfig(type="crops", grids=[[2, 2]]),
        text_config=text,
        image_token_id=outside_vocabulary(text),
        bos_token_id=hub_config.get("bos_token_id"),
        eos_token_id=hub_config.get("eos_token_id"),
        pad_token_id=f.get("pad_token_id"),
    )


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    vision = find_tower(values.get("mm_vision_tower"), tower)
    return ImageSettings(size=vision.image_size, resize_mode="pad")


ENTRY = Source(
    name="vl360",
    what="360VL: CLIP, two C-Abstractors, Llama 3",
    kind=MODEL,
    rules=RULES,
    config=config,
    types=("QH_360VL",),
    tower=lambda values: values.get("mm_vision_tower"),
    images=_images,
    template="llama-3",
)
