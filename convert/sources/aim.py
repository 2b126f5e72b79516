"""Apple's AIM, version 1 (apple/ml-aim: aim-v1) -> names of mm1_mlx.models.vision.

Its positions are sines and cosines that the file does not hold: `additions` makes them.
"""

from typing import Any

from mm1_mlx.config import VisionConfig

from ..rules import Drop, Rule, Table, flatten_patches_either
from ..source import ENCODER, Source
from .fields import Fields

BLOCK, LAYER = "trunk.blocks.{i}", "layers.{i}"

TRUNK: Table = [
    Rule(
        "preprocessor.patchifier.proj.weight",
        "patch_embed.weight",
        flatten_patches_either,
    ),
    Rule("preprocessor.patchifier.proj.bias", "patch_embed.bias"),
    Rule("preprocessor.patchifier.norm.{p}", "norm_in.{p}"),
    Rule(BLOCK + ".norm_1.{p}", LAYER + ".norm1.{p}"),
    Rule(BLOCK + ".attn.qkv.{p}", LAYER + ".attn.qkv_proj.{p}"),
    Rule(BLOCK + ".attn.proj.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(BLOCK + ".norm_2.{p}", LAYER + ".norm2.{p}"),
    Rule("trunk.post_trunk_norm.{p}", "norm_out.{p}"),
    Drop("head.{rest}", why="classifies the picture; the connector reads the grid"),
]

RULES: Table = [
    *TRUNK,
    Rule(BLOCK + ".mlp.fc1.{p}", LAYER + ".mlp.up_proj.{p}"),
    Rule(BLOCK + ".mlp.fc2.{p}", LAYER + ".mlp.down_proj.{p}"),
]

# Defaults of _aim and Transformer (aim-v1/aim/v1/torch/models.py).
_DEFAULTS = {
    "img_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "mlp_ratio": 4,
    "mlp_hidden_dim": None,
    "use_bias": False,
    "post_trunk_norm": True,
}


def config(hub_config: dict) -> VisionConfig:
    """Of the arguments that the file's config.json holds, nested in "config" or not."""
    f = Fields(hub_config.get("config") or hub_config, _DEFAULTS, "AIM")
    f.refuse("post_trunk_norm", True)
    width = f["embed_dim"]
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=f["num_blocks"],
        num_attention_heads=f["num_heads"],
        intermediate_size=f["mlp_hidden_dim"] or int(f["mlp_ratio"] * width),
        image_size=f.square("img_size"),
        patch_size=f.square("patch_size"),
        num_channels=f["num_channels"],
        hidden_act="gelu",
        norm_eps=1e-6,
        class_token=False,
        norm_in="embed",
        patch_bias=True,
        qkv_bias=False,
        attention_out_bias=f["use_bias"],
        mlp_bias=f["use_bias"],
    )


def additions(config: VisionConfig) -> dict[str, Any]:
    """The position table (P, Dv), float32: half of each row for x, half for y.

    Each half holds sines, then cosines, of the coordinate times 10000^(-k/n), n a
    quarter of the width (the layout of MAE's position table).
    """
    import numpy as np

    quarter = config.hidden_size // 4
    frequencies = 1.0 / 10000.0 ** (np.arange(quarter) / quarter)
    y, x = np.divmod(np.arange(config.num_patches), config.grid)
    angles = [np.outer(axis, frequencies) for axis in (x, y)]
    waves = [wave(a) for a in angles for wave in (np.sin, np.cos)]
    return {"position_embedding": np.concatenate(waves, axis=1).astype(np.float32)}


ENTRY = Source(
    name="aim",
    what="Apple's AIM, version 1",
    kind=ENCODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    is_it=lambda values, entries: "num_blocks" in values.get("config", values),
    additions=additions,
)
