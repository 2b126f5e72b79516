"""Names of an open_clip vision tower -> names of mm1_mlx.models.vision."""

from mm1_mlx.config import VisionConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import CLIP_MEAN, CLIP_STD, ImageSettings

from ..rules import Drop, Rule, Table, flatten_patches
from ..source import ENCODER, Source
from .fields import Fields

BLOCK, LAYER = "visual.transformer.resblocks.{i}", "layers.{i}"

RULES: Table = [
    Rule("visual.conv1.weight", "patch_embed.weight", flatten_patches),
    Rule("visual.class_embedding", "class_embedding"),
    Rule("visual.positional_embedding", "position_embedding"),
    Rule("visual.ln_pre.{p}", "norm_in.{p}"),
    Rule(BLOCK + ".ln_1.{p}", LAYER + ".norm1.{p}"),
    Rule(BLOCK + ".attn.in_proj_{p}", LAYER + ".attn.qkv_proj.{p}"),  # fused in both
    Rule(BLOCK + ".attn.out_proj.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(BLOCK + ".ln_2.{p}", LAYER + ".norm2.{p}"),
    Rule(BLOCK + ".mlp.c_fc.{p}", LAYER + ".mlp.up_proj.{p}"),
    Rule(BLOCK + ".mlp.c_proj.{p}", LAYER + ".mlp.down_proj.{p}"),
    Rule("visual.ln_post.{p}", "norm_out.{p}"),
    Drop("visual.proj", why="the connector reads the grid, not the pooled head"),
    Drop("transformer.{rest}", why="text tower"),
    Drop("token_embedding.weight", why="text tower"),
    Drop("positional_embedding", why="text tower"),
    Drop("ln_final.{p}", why="text tower"),
    Drop("text_projection", why="text tower"),
    Drop("attn_mask", why="text tower"),
    Drop("logit_scale", why="contrastive loss only"),
    Drop("logit_bias", why="contrastive loss only"),
]

# Defaults of open_clip's CLIPVisionCfg (open_clip/model.py).
_DEFAULTS = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "timm_model_name": None,
    "no_ln_pre": False,
    "attentional_pool": False,
    "final_ln_after_pool": False,
    "ls_init_value": None,
    "pos_embed_type": "learnable",
    "norm_kwargs": None,
    "act_kwargs": None,
}


def config(hub_config: dict) -> VisionConfig:
    """Of open_clip_config.json, or of its model_cfg."""
    model = hub_config.get("model_cfg", hub_config)
    if not isinstance(model.get("vision_cfg"), dict):
        raise CheckpointError(
            "The open_clip config has no 'vision_cfg'. Is it open_clip_config.json?"
        )
    f = Fields(model["vision_cfg"], _DEFAULTS, "open_clip")
    f.refuse("timm_model_name", None)
    f.refuse("no_ln_pre", False)
    f.refuse("attentional_pool", False)
    f.refuse("ls_init_value", None)
    f.refuse("pos_embed_type", "learnable")
    f.refuse("norm_kwargs", None, {})
    f.refuse("act_kwargs", None, {})
    width = f["width"]
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=f["layers"],
        num_attention_heads=width // f["head_width"],
        intermediate_size=int(width * f["mlp_ratio"]),
        image_size=f.square("image_size"),
        patch_size=f.square("patch_size"),
        # The switch stands beside vision_cfg; without it open_clip takes exact GELU.
        hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu",
        norm_eps=1e-5,  # torch's LayerNorm, which open_clip subclasses
        norm_in="all",
    )


_RESIZE = {"squash": "squash", "shortest": "crop", "longest": "pad"}


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    """What preprocess_cfg says; open_clip's own default is the shortest side."""
    settings = values.get("preprocess_cfg") or {}
    mode = settings.get("resize_mode", "shortest")
    if mode not in _RESIZE:
        raise CheckpointError(
            f"The open_clip config has resize_mode = {mode!r}, which is not supported; "
            f"only {', '.join(map(repr, _RESIZE))}."
        )
    fill = settings.get("fill_color", 0)
    red, green, blue = [fill] * 3 if isinstance(fill, int) else fill
    return ImageSettings(
        size=config(values).image_size,
        resize_mode=_RESIZE[mode],
        image_mean=tuple(settings.get("mean", CLIP_MEAN)),
        image_std=tuple(settings.get("std", CLIP_STD)),
        pad_color=(red, green, blue),
    )


ENTRY = Source(
    name="open_clip_vit",
    what="vision tower of an open_clip file (Apple's DFN)",
    kind=ENCODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    is_it=lambda values, entries: "vision_cfg" in values.get("model_cfg", values),
    images=_images,
)
