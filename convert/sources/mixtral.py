"""Mixtral -> names of mm1_mlx.models.decoder: top-2 experts in every layer."""

from mm1_mlx.config import DecoderConfig, MoEConfig

from ..rules import Rule, Table
from ..source import DECODER, Source
from .fields import Fields
from .llama import ATTENTION, LAYER, SOURCE
from .parts import expert_rules, experts_in_memory, experts_in_mlx

SPARSE = SOURCE + ".block_sparse_moe"
EXPERT = SPARSE + ".experts.{e}"

RULES: Table = [
    *ATTENTION,
    *expert_rules(SPARSE + ".gate", EXPERT, gate="w1", up="w3", down="w2"),
    # As transformers 5 holds them in memory.
    Rule(SOURCE + ".mlp.gate.weight", LAYER + ".moe.router.weight"),
    *experts_in_memory(SOURCE + ".mlp"),
    *experts_in_mlx(SPARSE),
]

# Class defaults of MixtralConfig; its default theta is not Llama's.
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
}


def config(hub_config: dict) -> DecoderConfig:
    """Of a Mixtral checkpoint."""
    f = Fields(hub_config, _DEFAULTS, "mixtral")
    moe = MoEConfig(
        num_local_experts=f["num_local_experts"],
        num_experts_per_tok=f["num_experts_per_tok"],
        sparse_step=1,
        first_sparse_layer=0,
        norm_topk_prob=True,
        router_aux_loss_coef=f["router_aux_loss_coef"],
    )
    return DecoderConfig(
        **f.decoder(windowed=True),
        head_dim=f.get("head_dim"),
        moe_config=moe,
    )


ENTRY = Source(
    name="mixtral",
    what="Mixtral",
    kind=DECODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("mixtral",),
)
