"""MoE-LLaVA with StableLM, Phi-2 or OpenChat (Mistral) -> names of mm1_mlx.models.mm1.

Its Phi-2 has no bias in lm_head, where microsoft/phi-2 has one
(moellava/model/language_model/llava_phi_moe.py), and its experts have biases. Its
first-generation Qwen is not supported.

Its own code picks the second expert at random even when it answers (DeepSpeed's
sampling). With that noise off it equals a plain, dropless top-2, which is what we run:
eval_capacity_factor 2.0 with 4 experts never drops a token.
"""

from dataclasses import replace

from mm1_mlx.config import DecoderConfig, MM1Config, MoEConfig
from mm1_mlx.errors import CheckpointError

from ..rules import Rule, Table, prefixed
from ..source import MODEL, Source
from . import llama, phi, stablelm
from .fields import Fields
from .llama import SOURCE
from .llava import (
    find_tower,
    mlp_connector,
    outside_vocabulary,
    pads_to_square,
    tower_rules,
)
from .parts import LAYER, expert_rules

SPARSE = SOURCE + ".mlp.deepspeed_moe"
PROJECTOR = "model.mm_projector.image_spatial_proj"
EXPERT = SPARSE + ".experts.deepspeed_experts.{e}"

GATED: Table = [
    *llama.RULES,
    *expert_rules(
        SPARSE + ".gate.wg", EXPERT, gate="gate_proj", up="up_proj", down="down_proj"
    ),
]

_STACKS = LAYER + ".moe.experts"
PHI: Table = [
    *phi.RULES,
    Rule(SPARSE + ".gate.wg.weight", LAYER + ".moe.router.weight"),
    Rule(EXPERT + ".fc1.weight", _STACKS + ".up_proj", stack="e"),
    Rule(EXPERT + ".fc1.bias", _STACKS + ".up_proj_bias", stack="e"),
    Rule(EXPERT + ".fc2.weight", _STACKS + ".down_proj", stack="e"),
    Rule(EXPERT + ".fc2.bias", _STACKS + ".down_proj_bias", stack="e"),
]


def rules(config: MM1Config, values: dict | None = None) -> Table:
    """The table for a config: Phi-2's names, or those that the gated decoders share."""
    decoder = GATED if config.text_config.gated_mlp else PHI
    return [
        *tower_rules("model.image_tower.image_tower."),
        Rule(PROJECTOR + ".{j}.{p}", "connector.linear.{j/2}.{p}"),
        *prefixed(decoder, target="decoder."),
    ]


# model_type without "moe_" (a dense parent has none) -> the decoder's own.
_DECODERS = {
    "llava_stablelm": "stablelm",
    "llava_phi": "phi",
    "llava_mistral": "mistral",
    "llava_llama": "llama",
}

_DEFAULTS = {
    "image_projector_type": "linear",
    "mm_vision_select_feature": "patch",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_MOE_DEFAULTS = {
    "top_k_experts": 2,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
}


def moe_config(values: dict, num_layers: int) -> MoEConfig:
    """Of the "moe" part: which layers are sparse must be every k-th from some layer."""
    f = Fields(values, _MOE_DEFAULTS, "MoE-LLaVA")
    f.refuse("use_residual", False)
    layers, experts = f["moe_layers_idx"], set(f["num_experts"])
    step = layers[1] - layers[0] if len(layers) > 1 else num_layers
    regular = step > 0 and layers == list(range(layers[0], num_layers, step))
    if not regular or len(experts) != 1:
        raise CheckpointError(
            f"This MoE-LLaVA has experts {f['num_experts']} in layers {layers} of "
            f"{num_layers}, which is not supported; only the same number in every k-th "
            f"layer up to the last."
        )
    return MoEConfig(
        num_local_experts=experts.pop(),
        num_experts_per_tok=f["top_k_experts"],
        sparse_step=step,
        first_sparse_layer=layers[0],
        router_aux_loss_coef=f["router_aux_loss_coef"],
        router_z_loss_coef=0.0,  # its training has none
    )


def _family(values: dict) -> str | None:
    """The model_type of the decoder inside, or None where this is no MoE-LLaVA."""
    return _DECODERS.get(str(values.get("model_type")).removeprefix("moe_"))


def _decoder(values: dict) -> DecoderConfig:
    """Of the decoder inside, which writes its keys beside the others."""
    family = _family(values)
    if family is None:
        raise CheckpointError(
            f"This config has model_type {values.get('model_type')!r}, but of "
            f"MoE-LLaVA's decoders only these are supported: "
            f"{', '.join(f'moe_{kind}' for kind in _DECODERS)}."
        )
    own = values | {"model_type": family}
    if family == "stablelm":
        return stablelm.config(own)
    if family == "phi":
        return replace(phi.config(own), lm_head_bias=False)
    return llama.config(own)


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """tower: the config.json of the folder that mm_image_tower names.

    The checkpoint holds the tower's weights, but not its shape.
    """
    f = Fields(hub_config, _DEFAULTS, "MoE-LLaVA")
    f.refuse("mm_vision_select_feature", "patch")
    text = _decoder(hub_config)
    if (hub_config.get("moe") or {}).get("moe_enable"):
        moe = moe_config(hub_config["moe"], text.num_hidden_layers)
        text = replace(text, moe_config=moe)
    vision = find_tower(hub_config.get("mm_image_tower"), tower)
    return MM1Config(
        vision_config=replace(vision, feature_layer=f["mm_vision_select_layer"]),
        connector_config=mlp_connector(f["image_projector_type"]),
        text_config=text,
        image_token_id=outside_vocabulary(text),
        bos_token_id=f.get("bos_token_id"),
        eos_token_id=f.get("eos_token_id"),
        pad_token_id=f.get("pad_token_id"),
    )


ENTRY = Source(
    name="moe_llava",
    what="MoE-LLaVA with StableLM, Phi-2 or OpenChat",
    kind=MODEL,
    rules=rules,
    config=config,
    types=(*(f"moe_{kind}" for kind in _DECODERS), *_DECODERS),
    # Also LLaVA's authors write llava_mistral and llava_llama.
    is_it=lambda values, entries: "mm_image_tower" in values,
    tower=lambda values: values.get("mm_image_tower"),
    images=lambda values, *others: pads_to_square(
        values | {"mm_vision_tower": values.get("mm_image_tower")}, *others
    ),
    template="vicuna",
)
