"""SigLIP's vision tower as transformers writes it -> names of mm1_mlx.models.vision.

No class token and no norm before the blocks; the patch convolution has a bias.
"""

from mm1_mlx.config import VisionConfig

from ..rules import Drop, Rule, Table, flatten_patches, prefixed
from ..source import ENCODER, Source
from .fields import Fields
from .hf_clip import BLOCKS

TOWER: Table = [
    Rule("embeddings.patch_embedding.weight", "patch_embed.weight", flatten_patches),
    Rule("embeddings.patch_embedding.bias", "patch_embed.bias"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    Drop("embeddings.position_ids", why="0, 1, 2, ...: a constant"),
    *BLOCKS,
    Drop("head.{rest}", why="pools the picture; the connector reads the grid"),
]

RULES: Table = [
    *prefixed(TOWER, source="vision_model."),
    *TOWER,
    Drop("text_model.{rest}", why="text tower"),
    Drop("logit_scale", why="contrastive loss only"),
    Drop("logit_bias", why="contrastive loss only"),
]

# Class defaults of SiglipVisionConfig.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def config(hub_config: dict) -> VisionConfig:
    """Of a SiglipVisionModel, or the vision part of a SiglipModel."""
    f = Fields(hub_config.get("vision_config") or hub_config, _DEFAULTS, "SigLIP")
    return VisionConfig(
        **f.vision(),
        class_token=False,
        patch_bias=True,
    )


ENTRY = Source(
    name="siglip",
    what="SigLIP vision tower of transformers",
    kind=ENCODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("siglip", "siglip_vision_model"),
)
