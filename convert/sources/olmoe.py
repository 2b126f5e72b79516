"""OLMoE -> names of mm1_mlx.models.decoder: experts in every layer, no bias.

Queries and keys are normalised over their full width, and the chosen experts' weights
are not scaled to sum to 1.
"""

from mm1_mlx.config import DecoderConfig, MoEConfig

from ..rules import Table
from ..source import DECODER, Source
from .fields import Fields
from .llama import ATTENTION, SOURCE
from .parts import expert_rules, experts_in_memory, experts_in_mlx

MLP = SOURCE + ".mlp"

EXPERTS: Table = [
    *expert_rules(
        MLP + ".gate",
        MLP + ".experts.{e}",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    ),
    *experts_in_memory(MLP),
    *experts_in_mlx(MLP),
]

RULES: Table = [*ATTENTION, *EXPERTS]

# Class defaults of OlmoeConfig.
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "clip_qkv": None,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}


def config(hub_config: dict) -> DecoderConfig:
    """Of an OLMoE checkpoint; transformers 5 may write num_local_experts."""
    experts = hub_config.get("num_local_experts")
    f = Fields(hub_config, _DEFAULTS | {"num_experts": experts or 64}, "olmoe")
    f.refuse("clip_qkv", None)
    moe = MoEConfig(
        num_local_experts=f["num_experts"],
        num_experts_per_tok=f["num_experts_per_tok"],
        sparse_step=1,
        first_sparse_layer=0,
        norm_topk_prob=f["norm_topk_prob"],
        router_aux_loss_coef=f["router_aux_loss_coef"],
    )
    return DecoderConfig(
        **f.decoder(),
        qkv_bias=f["attention_bias"],
        attention_out_bias=f["attention_bias"],
        qk_norm="full",
        moe_config=moe,
    )


ENTRY = Source(
    name="olmoe",
    what="OLMoE",
    kind=DECODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("olmoe",),
)
