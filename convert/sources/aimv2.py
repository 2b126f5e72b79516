"""Apple's AIMv2 -> names of mm1_mlx.models.vision.

Three files hold the same net: the original, `mlx_model.safetensors` (the same names,
patch convolution channels-last) and the one of transformers.
"""

from mm1_mlx.config import VisionConfig

from ..rules import (
    Drop,
    Rule,
    Table,
    concatenate,
    flatten_patches,
    prefixed,
    squeeze_first,
)
from ..source import ENCODER, Source
from .aim import BLOCK, LAYER, TRUNK
from .fields import Fields
from .parts import fused_gate_up, fused_qkv

ORIGINAL: Table = [
    *TRUNK,
    Rule("preprocessor.pos_embed", "position_embedding", squeeze_first),
    Rule(
        (BLOCK + ".mlp.fc1.{p}", BLOCK + ".mlp.fc3.{p}"),  # gate, up
        LAYER + ".mlp.gate_up_proj.{p}",
        concatenate,
    ),
    Rule(BLOCK + ".mlp.fc2.{p}", LAYER + ".mlp.down_proj.{p}"),
]

HF_LAYER = "encoder.layers.{i}"

HF: Table = [
    Rule("embeddings.patch_embed.weight", "patch_embed.weight", flatten_patches),
    Rule("embeddings.patch_embed.bias", "patch_embed.bias"),
    Rule("embeddings.rms_norm.weight", "norm_in.weight"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    Drop("embeddings.position_ids", why="0, 1, 2, ...: a constant"),
    Rule(HF_LAYER + ".rms_norm1.weight", LAYER + ".norm1.weight"),
    fused_qkv(HF_LAYER + ".attention"),
    Rule(HF_LAYER + ".attention.out_proj.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(HF_LAYER + ".rms_norm2.weight", LAYER + ".norm2.weight"),
    fused_gate_up(HF_LAYER + ".ffn", LAYER + ".mlp"),
    Rule(HF_LAYER + ".ffn.down_proj.{p}", LAYER + ".mlp.down_proj.{p}"),
    Rule("rms_norm.weight", "norm_out.weight"),
]

RULES: Table = [
    *ORIGINAL,  # its Drop of head.* serves both
    *HF,
    *prefixed(HF, source="vision_model."),
    Drop("vision_model.head.{rest}", why="pools the picture"),
    Drop("text_model.{rest}", why="text tower"),
    Drop("visual_projection.weight", why="the connector reads the grid"),
    Drop("text_projection.weight", why="text tower"),
    Drop("logit_scale", why="contrastive loss only"),
]

# Class defaults of Aimv2VisionConfig, and of the original's configuration_aimv2.py.
_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "is_native": False,
}


def config(hub_config: dict) -> VisionConfig:
    """Of any of the three files."""
    f = Fields(hub_config.get("vision_config") or hub_config, _DEFAULTS, "AIMv2")
    f.refuse("is_native", False)  # positions computed for any size
    original = "use_bias" in f.values  # transformers ties it to qkv_bias
    bias = f["use_bias"] if original else f["qkv_bias"]
    return VisionConfig(
        **f.vision("rms_norm_eps"),
        gated_mlp=True,
        norm_type="rms_norm",
        class_token=False,
        norm_in="embed",
        patch_bias=True,
        qkv_bias=f["qkv_bias"],
        attention_out_bias=bias,
        mlp_bias=f["use_bias"] if original else f["mlp_bias"],
    )


ENTRY = Source(
    name="aimv2",
    what="Apple's AIMv2: original, channels-last and transformers files",
    kind=ENCODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("aimv2", "aimv2_vision_model"),
)
