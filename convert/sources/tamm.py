"""Modules of Apple's tamm 0.2.0 -> names of mm1_mlx.models.

tamm is a library, not a checkpoint: VISION is its VisionTransformer, POOLER its
CAbstractorPooler, MOE its MixtureOfExperts with the norm before it. Their
configurations are the arguments of their builders.

A folder for `convert` (an encoder) or `convert assemble --connector` has the module's
state_dict() as model.safetensors or model.pt, and a config.json with the arguments of
its create_basic_builder and "model_type": "tamm_vit" or "tamm_c_abstractor" (our own
convention: tamm writes no such file).
"""

from typing import Any

from mm1_mlx.config import ConnectorConfig, MoEConfig, VisionConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import (
    Drop,
    Rule,
    Table,
    flatten_patches,
    library,
    oihw_to_ohwi,
    prefixed,
    spatial_to_rows,
    squeeze_1x1,
    squeeze_first,
    swap_last,
)
from ..source import CONNECTOR, ENCODER, Source
from .fields import Fields

TOKENS = "embedding.convolution_tokens"
SOURCE, LAYER = "layers.layer_{i}", "layers.{i}"

CLASS_TOKENS = "embedding.class_tokens.weight"

_ENCODER: Table = [
    Rule(TOKENS + ".convolution.weight", "patch_embed.weight", flatten_patches),
    Rule(TOKENS + ".positional_encoding.weight", "position_embedding", spatial_to_rows),
    Rule(TOKENS + ".norm.{p}", "norm_in.{p}"),
    Rule(SOURCE + ".attention.norm.{p}", LAYER + ".norm1.{p}"),
    Rule(
        SOURCE + ".attention.qkv_transform.fused_linear.{p}",
        LAYER + ".attn.qkv_proj.{p}",
    ),
    Rule(SOURCE + ".attention.output_transform.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(SOURCE + ".feed_forward.norm.{p}", LAYER + ".norm2.{p}"),
    Rule(SOURCE + ".feed_forward.hidden_transform.{p}", LAYER + ".mlp.up_proj.{p}"),
    Rule(SOURCE + ".feed_forward.output_transform.{p}", LAYER + ".mlp.down_proj.{p}"),
    Rule("output_norm.{p}", "norm_out.{p}"),
]

VISION: Table = [Rule(CLASS_TOKENS, "class_embedding", squeeze_first), *_ENCODER]
VISION_WITHOUT_CLASS: Table = [
    Drop(CLASS_TOKENS, why="an empty array: there is no class token"),
    *_ENCODER,
]


def _stage(source: str, target: str) -> Table:
    """One stage of the C-Abstractor; tamm counts from 0 where we count from 1."""
    block, ours = source + ".block_{b}", target + ".{b}"
    excite = block + ".squeeze_excitation_1"
    shortcut = block + ".residual_connection.shortcut"
    return [
        Rule(block + ".convolution_0.weight", ours + ".conv1.weight", squeeze_1x1),
        Rule(block + ".norm_0.{p}", ours + ".norm1.{p}"),
        Rule(block + ".convolution_1.weight", ours + ".conv2.weight", oihw_to_ohwi),
        Rule(block + ".norm_1.{p}", ours + ".norm2.{p}"),
        Rule(excite + ".reduce_transform.weight", ours + ".se.fc1.weight", squeeze_1x1),
        Rule(excite + ".reduce_transform.bias", ours + ".se.fc1.bias"),
        Rule(excite + ".expand_transform.weight", ours + ".se.fc2.weight", squeeze_1x1),
        Rule(excite + ".expand_transform.bias", ours + ".se.fc2.bias"),
        Rule(block + ".convolution_2.weight", ours + ".conv3.weight", squeeze_1x1),
        Rule(block + ".norm_2.{p}", ours + ".norm3.{p}"),
        Rule(shortcut + ".convolution.weight", ours + ".shortcut.weight", squeeze_1x1),
        Rule(shortcut + ".norm.{p}", ours + ".shortcut_norm.{p}"),
    ]


POOLER: Table = [
    Rule("positional_encoding.weight", "position_embedding", spatial_to_rows),
    *_stage("convolution_0", "stage1"),
    *_stage("convolution_1", "stage2"),
    Rule("feed_forward.hidden_transform_{j}.{p}", "readout.0.{p}"),
    Rule("feed_forward.hidden_transform.{p}", "readout.0.{p}"),
    Rule("feed_forward.output_transform.{p}", "readout.1.{p}"),
    Rule("add_tokens.weight_end", "eos_tokens"),
]


def experts_gate_up(linear: Any, gate: Any) -> Any:
    """(1, E, D, F) twice -> (E, 2F, D): the gated side's rows first."""
    both = [swap_last(squeeze_first(array)) for array in (linear, gate)]
    return library(linear).concatenate(both, axis=1)


def experts_down(weight: Any) -> Any:
    """(1, E, F, D) -> (E, D, F)."""
    return swap_last(squeeze_first(weight))


MOE: Table = [
    Rule("norm.{p}", "norm2.{p}"),
    Rule("router.input_transform.weight", "moe.router.weight"),
    Rule(
        (
            "experts.hidden_transform.linear_0.weight",
            "experts.hidden_transform.linear_1.weight",
        ),
        "moe.experts.gate_up_proj",
        experts_gate_up,
    ),
    Rule("experts.output_transform.weight", "moe.experts.down_proj", experts_down),
]

RULES: Table = [
    *prefixed(VISION, source="vision.", target="vision."),
    *prefixed(POOLER, source="pooler.", target="connector."),
]

# tamm's "gelu" is the tanh approximation (layers/activation.py).
_ACTIVATIONS = {"gelu": "gelu_pytorch_tanh"}


def _activation(name: str) -> str:
    return _ACTIVATIONS.get(name, name)


# Defaults of VisionTransformer.create_basic_builder.
_VISION_DEFAULTS = {
    "hidden_dim": 768,
    "num_layers": 12,
    "num_heads": 12,
    "hidden_dim_scale_factor": 4.0,
    "input_dim": 3,
    "patch_size": (16, 16),
    "positional_embedding_shape": (14, 14),
    "num_class_tokens": 0,
    "activation": "relu",
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_logits_soft_cap": None,
}

# Defaults of CAbstractorPooler.create_basic_builder.
_POOLER_DEFAULTS = {
    "convolution_output_dim": None,
    "feed_forward_hidden_dim": None,
    "apply_positional_embedding": False,
    "blocks_per_regnet_stage": 3,
    "regnet_activation": "relu",
    "feed_forward_activation": "relu",
    "norm_eps": 1e-5,
    "norm_bias": False,
    "squeeze_excitation_reduced_dim": None,
    "squeeze_excitation_bias": False,
    "num_prepend_tokens": 0,
    "num_append_tokens": 0,
}


def config(hub_config: dict) -> VisionConfig:
    """Of a VisionTransformer's arguments."""
    f = Fields(hub_config, _VISION_DEFAULTS, "tamm vision")
    f.refuse("num_class_tokens", 0, 1)
    f.refuse("attention_logits_soft_cap", None)
    patch, width = f.square("patch_size"), f["hidden_dim"]
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=f["num_layers"],
        num_attention_heads=f["num_heads"],
        intermediate_size=round(width * f["hidden_dim_scale_factor"]),
        image_size=patch * f.square("positional_embedding_shape"),
        patch_size=patch,
        num_channels=f["input_dim"],
        hidden_act=_activation(f.activation("activation")),
        norm_bias=f["norm_bias"],
        norm_eps=f["norm_eps"],
        class_token=f["num_class_tokens"] == 1,
        norm_in="patches",
        feature_norm=True,  # its output norm is applied to every token
    )


def pooler_config(hub_config: dict) -> ConnectorConfig:
    """Of a CAbstractorPooler's arguments."""
    f = Fields(hub_config, _POOLER_DEFAULTS, "tamm pooler")
    hidden = f.get("convolution_output_dim") or f["input_dim"]
    f.refuse("feed_forward_hidden_dim", None, hidden)
    f.refuse("feed_forward_activation", f["regnet_activation"])
    f.refuse("squeeze_excitation_reduced_dim", None)
    f.refuse("num_prepend_tokens", 0)
    side = f.square("pooler_output_shape")
    return ConnectorConfig(
        type="c_abstractor",
        variant="tamm",
        num_query_tokens=side * side,
        hidden_size=hidden,
        depth=f["blocks_per_regnet_stage"],
        mlp_depth=2,
        hidden_act=_activation(f.activation("regnet_activation")),
        position_embedding=f["apply_positional_embedding"],
        pooling="strided",
        norm_bias=f["norm_bias"],
        norm_eps=f["norm_eps"],
        squeeze_bias=f["squeeze_excitation_bias"],
        squeeze_ratio=1 / 16,  # ceil(width / 16): SqueezeExcitation's own default
        num_eos_tokens=f["num_append_tokens"],
    )


def moe_config(hub_config: dict) -> MoEConfig:
    """Of a MixtureOfExperts' arguments: every layer sparse, dropless."""
    f = Fields(
        hub_config, {"num_experts_per_token": 2, "activation": "swi_glu"}, "tamm"
    )
    if f["activation"] != "swi_glu":
        raise CheckpointError(
            f"The tamm config has activation = {f['activation']!r}, which is not "
            f"supported; only 'swi_glu'."
        )
    return MoEConfig(
        num_local_experts=f["num_experts"],
        num_experts_per_tok=f["num_experts_per_token"],
        sparse_step=1,
        first_sparse_layer=0,
        moe_intermediate_size=f["expert_hidden_dim"],
    )


def _images(values: dict, tower: dict | None, preprocessor: dict | None) -> Any:
    """tamm says nothing of its pictures; without a preprocessor_config.json as CLIP's,
    resized to the encoder's size."""
    if preprocessor is not None:
        return ImageSettings.from_dict(preprocessor)
    return ImageSettings(size=config(values).image_size)


ENTRIES = (
    Source(
        name="tamm_vit",
        what="the VisionTransformer of Apple's tamm",
        kind=ENCODER,
        rules=lambda config, values: (
            VISION if config.vision_config.class_token else VISION_WITHOUT_CLASS
        ),
        config=lambda values, tower: config(values),
        types=("tamm_vit",),
        images=_images,
    ),
    Source(
        name="tamm_c_abstractor",
        what="the CAbstractorPooler of Apple's tamm, for assemble",
        kind=CONNECTOR,
        rules=POOLER,
        config=lambda values, tower: pooler_config(values),
        types=("tamm_c_abstractor",),
    ),
)
