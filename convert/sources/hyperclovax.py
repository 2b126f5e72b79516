"""HyperCLOVAX-SEED-Vision (naver): SigLIP, C-Abstractor, a Llama -> models.mm1.

Its code is on the hub only, and no small checkpoint of it exists here: this table was
checked by structure, against the public ports (vLLM: hyperclovax_vision.py).
"""

from dataclasses import replace
from typing import Any

from mm1_mlx.config import ConnectorConfig, MM1Config, TilingConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import Rule, Table, prefixed
from ..source import MODEL, Source
from . import hf_clip, llama, siglip
from .fields import Fields
from .honeybee import ABSTRACTOR
from .llava_next import grids

RULES: Table = [
    *prefixed(siglip.TOWER, "vision_model.vision_model.", "vision."),
    *prefixed(siglip.TOWER, "vision_model.", "vision."),
    *prefixed(ABSTRACTOR, "mm_projector.", "connector."),
    Rule("image_newline", "image_newline"),
    *prefixed(llama.RULES, source="language_model.", target="decoder."),
]

_DEFAULTS = {
    "mm_projector_type": "cabstractor",
    "use_nth_layer": -2,
    "proj_pos_emb": True,
    "proj_prenorm": False,
    "anyres": True,
    "unpad": True,
    "max_num_grids": 9,
    "use_1x1_grid": False,
    "possible_resolutions": None,
}

# Of the text model "hyperclovax" (muP): Llama where they are 1.
_SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """Of a HyperCLOVAX-SEED-Vision folder."""
    f = Fields(hub_config, _DEFAULTS, "HyperCLOVAX")
    f.refuse("mm_projector_type", "cabstractor")
    f.refuse("anyres", True)
    tower_values = hub_config.get("vision_config") or {}
    of_clip = tower_values.get("model_type", "").partition("_")[0] == "clip"
    vision = (hf_clip if of_clip else siglip).config(tower_values)
    text_values = hub_config.get("text_config") or {}
    text = llama.config(text_values | {"model_type": _family(text_values)})
    return MM1Config(
        vision_config=replace(vision, feature_layer=f["use_nth_layer"]),
        connector_config=ConnectorConfig(
            type="c_abstractor",
            num_query_tokens=f["num_queries_vis_abstractor_image"],
            hidden_size=vision.hidden_size,
            position_embedding=f["proj_pos_emb"],
            norm_input=f["proj_prenorm"],
        ),
        tiling_config=TilingConfig(
            type="anyres",
            grids=_grids(f, vision.image_size),
            unpad=f["unpad"],
            overview="fit",
            pad_color=[127, 127, 127],  # int(255 * 0.5), the mean
        ),
        text_config=text,
        image_token_id=f["img_start_id"],
        bos_token_id=text_values.get("bos_token_id"),
        eos_token_id=text_values.get("eos_token_id"),
        pad_token_id=text_values.get("pad_token_id"),
    )


def _family(values: dict) -> str:
    """Llama, also where a config only gives it other scales that are all 1."""
    kind = values.get("model_type") or "llama"
    if kind not in ("llama", "hyperclovax"):
        raise CheckpointError(
            f"This HyperCLOVAX has the text model {kind!r}, which is not supported; "
            f"only 'llama' and 'hyperclovax'."
        )
    for key in _SCALES:
        if values.get(key) not in (None, 1, 1.0):
            raise CheckpointError(
                f"This HyperCLOVAX has {key} = {values[key]!r}, which is not "
                f"supported; only 1."
            )
    return "llama"


def _grids(f: Fields, tile: int) -> list[list[int]]:
    """The grids that the config lists, or all of up to max_num_grids tiles."""
    if f.get("possible_resolutions"):
        return grids(f["possible_resolutions"], tile, height_first=True)
    most = f["max_num_grids"]
    pairs = [[i, j] for i in range(1, most + 1) for j in range(1, most + 1)]
    return [
        p for p in pairs if p[0] * p[1] <= most and (p != [1, 1] or f["use_1x1_grid"])
    ]


_NORMAL = ("image_mean", "image_std")


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    """SigLIP's pixels; what concerns tiles stands in config.json."""
    vision = config(values).vision_config
    assert vision is not None
    half: Any = (0.5, 0.5, 0.5)
    mean, std = ((preprocessor or {}).get(key) or half for key in _NORMAL)
    return ImageSettings(
        size=vision.image_size, image_mean=tuple(mean), image_std=tuple(std)
    )


ENTRY = Source(
    name="hyperclovax",
    what="HyperCLOVAX-SEED-Vision: SigLIP, C-Abstractor, Llama (by structure only)",
    kind=MODEL,
    rules=RULES,
    config=config,
    types=("hyperclovax_vlm",),
    images=_images,
    template="chatml",
)
