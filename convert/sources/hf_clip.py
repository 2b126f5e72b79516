"""CLIP's vision tower as transformers writes it -> names of mm1_mlx.models.vision.

transformers 4 puts `vision_model.` before the names, transformers 5 nothing.
"""

from mm1_mlx.config import VisionConfig

from ..rules import Drop, Rule, Table, flatten_patches_either, prefixed
from ..source import ENCODER, Source
from .fields import Fields
from .parts import fused_qkv

SOURCE, LAYER = "encoder.layers.{i}", "layers.{i}"

BLOCKS: Table = [
    Rule(SOURCE + ".layer_norm1.{p}", LAYER + ".norm1.{p}"),
    fused_qkv(SOURCE + ".self_attn"),
    Rule(SOURCE + ".self_attn.out_proj.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(SOURCE + ".layer_norm2.{p}", LAYER + ".norm2.{p}"),
    Rule(SOURCE + ".mlp.fc1.{p}", LAYER + ".mlp.up_proj.{p}"),
    Rule(SOURCE + ".mlp.fc2.{p}", LAYER + ".mlp.down_proj.{p}"),
    Rule("post_layernorm.{p}", "norm_out.{p}"),
]

TOWER: Table = [
    Rule(
        "embeddings.patch_embedding.weight",
        "patch_embed.weight",
        flatten_patches_either,  # MLX's own files are channels-last
    ),
    Rule("embeddings.class_embedding", "class_embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    Drop("embeddings.position_ids", why="0, 1, 2, ...: a constant"),
    Rule("pre_layrnorm.{p}", "norm_in.{p}"),  # sic
    *BLOCKS,
]

RULES: Table = [
    *prefixed(TOWER, source="vision_model."),
    *TOWER,
    Drop("visual_projection.weight", why="the connector reads the grid"),
    Drop("text_model.{rest}", why="text tower"),
    Drop("text_projection.weight", why="text tower"),
    Drop("logit_scale", why="contrastive loss only"),
]

# Class defaults of CLIPVisionConfig; hub files of LLaVA leave several out.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def config(hub_config: dict) -> VisionConfig:
    """Of a CLIPVisionModel, or the vision part of a CLIPModel."""
    f = Fields(hub_config.get("vision_config") or hub_config, _DEFAULTS, "CLIP")
    return VisionConfig(
        **f.vision(),
        norm_in="all",
    )


ENTRY = Source(
    name="hf_clip",
    what="CLIP vision tower of transformers 4 or 5",
    kind=ENCODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("clip", "clip_vision_model"),
)
