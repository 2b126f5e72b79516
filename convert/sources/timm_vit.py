"""A CLIP vision transformer as timm writes it -> names of mm1_mlx.models.vision.

timm's config.json names an architecture; what it means stands in timm's source
(timm/models/vision_transformer.py).
"""

import re

from mm1_mlx.config import VisionConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import CLIP_MEAN, CLIP_STD, ImageSettings

from ..rules import Drop, Rule, Table, flatten_patches, flattened, squeeze_first
from ..source import ENCODER, Source

BLOCK, LAYER = "blocks.{i}", "layers.{i}"

RULES: Table = [
    Rule("patch_embed.proj.weight", "patch_embed.weight", flatten_patches),
    Rule("cls_token", "class_embedding", flattened),
    Rule("pos_embed", "position_embedding", squeeze_first),
    Rule("norm_pre.{p}", "norm_in.{p}"),
    Rule(BLOCK + ".norm1.{p}", LAYER + ".norm1.{p}"),
    Rule(BLOCK + ".attn.qkv.{p}", LAYER + ".attn.qkv_proj.{p}"),
    Rule(BLOCK + ".attn.proj.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(BLOCK + ".norm2.{p}", LAYER + ".norm2.{p}"),
    Rule(BLOCK + ".mlp.fc1.{p}", LAYER + ".mlp.up_proj.{p}"),
    Rule(BLOCK + ".mlp.fc2.{p}", LAYER + ".mlp.down_proj.{p}"),
    Rule("norm.{p}", "norm_out.{p}"),
    Drop("head.{rest}", why="the connector reads the grid, not the pooled head"),
    Drop("fc_norm.{rest}", why="pools the picture"),
]

# Width, layers, heads, MLP width of vit_*_clip_*.
_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
_NAME = re.compile(r"vit_([a-z]+)_patch(\d+)_clip_(quickgelu_)?(\d+)")


def config(hub_config: dict) -> VisionConfig:
    """Of timm's config.json; model_args there override what the name says."""
    name = hub_config.get("architecture", "")
    match = _NAME.match(name)
    if not match or match[1] not in _SIZES:
        raise CheckpointError(
            f"timm's architecture {name!r} is not supported; only "
            f"vit_(base|large|huge|giant|gigantic)_patchN_clip_[quickgelu_]SIZE."
        )
    args = hub_config.get("model_args") or {}
    width, layers, heads, hidden = _SIZES[match[1]]
    width = args.get("embed_dim", width)
    hidden = int(width * args["mlp_ratio"]) if "mlp_ratio" in args else hidden
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=args.get("depth", layers),
        num_attention_heads=args.get("num_heads", heads),
        intermediate_size=hidden,
        image_size=args.get("img_size", int(match[4])),
        patch_size=args.get("patch_size", int(match[2])),
        hidden_act="quick_gelu" if match[3] else "gelu",
        norm_eps=1e-5,
        norm_in="all",
    )


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    """What timm's pretrained_cfg says of its pictures."""
    settings = values.get("pretrained_cfg") or {}
    squash = settings.get("crop_mode") == "squash"
    return ImageSettings(
        size=config(values).image_size,
        resize_mode="squash" if squash else "crop",
        image_mean=tuple(settings.get("mean", CLIP_MEAN)),
        image_std=tuple(settings.get("std", CLIP_STD)),
    )


ENTRY = Source(
    name="timm_vit",
    what="CLIP vision transformer as timm writes it",
    kind=ENCODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    is_it=lambda values, entries: (
        _NAME.match(str(values.get("architecture"))) is not None
    ),
    images=_images,
)
