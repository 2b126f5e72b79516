"""LLaVA-NeXT (1.6), original and as transformers writes it -> mm1_mlx.models.mm1.

LLaVA 1.5 with tiles of any grid: the tower was trained, so it lies inside and must not
be replaced by OpenAI's; a learned token ends each row of the picture's tokens.
"""

import json
from dataclasses import replace

from mm1_mlx.config import DecoderConfig, MM1Config, TilingConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import Rule, Table
from ..source import MODEL, Source
from . import llama, llava
from .fields import Fields

_NEWLINE = [
    Rule("image_newline", "image_newline"),
    Rule("model.image_newline", "image_newline"),
]
HF: Table = [
    *llava.HF,
    *llava.HF_IN_MEMORY,
    llava.HEAD_IN_MEMORY,
    *_NEWLINE,
]
ORIGINAL: Table = [*llava.ORIGINAL, _NEWLINE[1]]

# Class default of LlavaNextConfig: (height, width) for tiles of 336 pixels.
_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

_DECODERS: dict[str, str] = {
    "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}  # fmt: skip


def grids(pinpoints: object, tile: int, *, height_first: bool) -> list[list[int]]:
    """Grids as [rows, columns] from sizes in pixels.

    transformers writes [height, width], the original [width, height], sometimes as
    text.
    """
    if isinstance(pinpoints, str):
        try:
            pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
        except ValueError:
            pinpoints = None
    found = []
    for size in pinpoints if isinstance(pinpoints, list) else [None]:
        pair = list(size) if isinstance(size, (list, tuple)) else []
        if len(pair) != 2 or any(n % tile or n < tile for n in pair):
            raise CheckpointError(
                f"This checkpoint has image_grid_pinpoints = {pinpoints!r}, but must "
                f"be a list of sizes, each a multiple of {tile} pixels."
            )
        pair = [n // tile for n in pair]
        found.append(pair if height_first else pair[::-1])
    return found


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """Of either layout. tower: the tower's own config.json, for the original."""
    if "text_config" in hub_config or "vision_config" in hub_config:
        return _hf(hub_config)
    return _original(hub_config, tower)


def _hf(hub_config: dict) -> MM1Config:
    found = llava.config(hub_config)
    assert found.vision_config is not None
    text = _decoder(hub_config.get("text_config") or {})
    pinpoints = hub_config.get("image_grid_pinpoints") or _GRIDS
    tile = found.vision_config.image_size
    ids = hub_config.get("text_config") or {}
    return replace(
        found,
        text_config=text,
        tiling_config=TilingConfig(
            type="anyres", grids=grids(pinpoints, tile, height_first=True)
        ),
        box_config=None,  # not published
        bos_token_id=ids.get("bos_token_id", 1),
        eos_token_id=ids.get("eos_token_id", 2),
    )


def _decoder(values: dict) -> DecoderConfig:
    return llama.config(values)


def _original(hub_config: dict, tower: dict | None) -> MM1Config:
    f = Fields(hub_config, {"mm_patch_merge_type": "flat"}, "LLaVA")
    f.refuse("mm_patch_merge_type", "spatial_unpad")
    f.refuse("image_aspect_ratio", "anyres")
    kind = hub_config.get("model_type")
    if kind not in _DECODERS:
        raise CheckpointError(
            f"This config has model_type {kind!r}, but must be one of "
            f"{', '.join(_DECODERS)} to be read as LLaVA-NeXT."
        )
    found = llava.config(hub_config | {"mm_patch_merge_type": "flat"}, tower)
    assert found.vision_config is not None
    tile = found.vision_config.image_size
    pinpoints = f["image_grid_pinpoints"]
    return replace(
        found,
        tiling_config=TilingConfig(
            type="anyres", grids=grids(pinpoints, tile, height_first=False)
        ),
        box_config=None,
    )


# What transformers writes about tiles; they stand in config.json too.
_OF_TILES = (
    "image_grid_pinpoints",
    "do_pad",
    "aspect_ratio_setting",
    "max_image_tiles",
)


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    """Tiles have the tower's size already: only the normalisation is left."""
    vision = config(values, tower).vision_config
    assert vision is not None
    size = vision.image_size
    if preprocessor is None or "mm_vision_tower" in values:
        return ImageSettings(size=size)
    kept = {k: v for k, v in preprocessor.items() if k not in _OF_TILES}
    found = ImageSettings.from_dict(kept)
    return replace(found, size=size, resize_mode="squash")


ENTRIES = (
    Source(
        name="llava_next",
        what="LLaVA-NeXT (1.6) as transformers 4 and 5 write it",
        kind=MODEL,
        rules=HF,
        config=config,
        types=("llava_next",),
        images=_images,
        template="llava-hf",
    ),
    Source(
        name="llava_next_original",
        what="LLaVA-NeXT (1.6) of its authors, the tower inside",
        kind=MODEL,
        rules=ORIGINAL,
        config=config,
        types=tuple(_DECODERS),
        is_it=lambda values, _: "unpad" in str(values.get("mm_patch_merge_type")),
        tower=lambda values: values.get("mm_vision_tower"),
        images=_images,
        template="llava-v1",
    ),
)
