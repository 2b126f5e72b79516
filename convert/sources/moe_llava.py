"""MoE-LLaVA with StableLM -> names of mm1_mlx.models.mm1.

Its own code picks the second expert at random even when it answers (DeepSpeed's
sampling). With that noise off it equals a plain, dropless top-2, which is what we run:
eval_capacity_factor 2.0 with 4 experts never drops a token.
"""

from dataclasses import replace

from mm1_mlx.config import MM1Config, MoEConfig
from mm1_mlx.errors import CheckpointError

from ..rules import Rule, Table, prefixed
from ..source import MODEL, Source, model_type
from . import stablelm
from .fields import Fields
from .llama import SOURCE
from .llava import (
    find_tower,
    mlp_connector,
    outside_vocabulary,
    pads_to_square,
    tower_rules,
)
from .parts import expert_rules

SPARSE = SOURCE + ".mlp.deepspeed_moe"
EXPERT = SPARSE + ".experts.deepspeed_experts.{e}"

EXPERTS: Table = expert_rules(
    SPARSE + ".gate.wg", EXPERT, gate="gate_proj", up="up_proj", down="down_proj"
)

RULES: Table = [
    *tower_rules("model.image_tower.image_tower."),
    Rule("model.mm_projector.image_spatial_proj.{j}.{p}", "connector.linear.{j/2}.{p}"),
    *prefixed([*stablelm.RULES, *EXPERTS], target="decoder."),
]

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


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """tower: the config.json of the folder that mm_image_tower names.

    The checkpoint holds the tower's weights, but not its shape.
    """
    if (kind := hub_config.get("model_type", "moe_llava_stablelm")) not in (
        "moe_llava_stablelm",
        "llava_stablelm",
    ):
        raise CheckpointError(
            f"This config has model_type {kind!r}; of MoE-LLaVA's decoders only "
            f"StableLM ('moe_llava_stablelm') is supported."
        )
    f = Fields(hub_config, _DEFAULTS, "MoE-LLaVA")
    f.refuse("mm_vision_select_feature", "patch")
    text = stablelm.config(hub_config)
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
    what="MoE-LLaVA with StableLM",
    kind=MODEL,
    rules=RULES,
    config=config,
    is_it=model_type("moe_llava_stablelm", "llava_stablelm"),
    tower=lambda values: values.get("mm_image_tower"),
    images=lambda values, *others: pads_to_square(
        values | {"mm_vision_tower": values.get("mm_image_tower")}, *others
    ),
    template="vicuna",
)
