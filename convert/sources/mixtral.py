"""Mixtral -> names of mm1_mlx.models.decoder: top-2 experts in every layer."""

from mm1_mlx.config import DecoderConfig, MoEConfig

from ..rules import Rule, Table, concatenate
from .fields import Fields
from .llama import ATTENTION, LAYER, SOURCE

SPARSE = SOURCE + ".block_sparse_moe"
EXPERT = SPARSE + ".experts.{e}"

RULES: Table = [
    *ATTENTION,
    Rule(SPARSE + ".gate.weight", LAYER + ".moe.router.weight"),
    Rule(
        (EXPERT + ".w1.weight", EXPERT + ".w3.weight"),  # gate, up
        LAYER + ".moe.experts.gate_up_proj",
        concatenate,
        stack="e",
    ),
    Rule(EXPERT + ".w2.weight", LAYER + ".moe.experts.down_proj", stack="e"),
    # As transformers 5 holds them in memory.
    Rule(SOURCE + ".mlp.gate.weight", LAYER + ".moe.router.weight"),
    Rule(SOURCE + ".mlp.experts.gate_up_proj", LAYER + ".moe.experts.gate_up_proj"),
    Rule(SOURCE + ".mlp.experts.down_proj", LAYER + ".moe.experts.down_proj"),
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
        hidden_size=f["hidden_size"],
        num_hidden_layers=f["num_hidden_layers"],
        num_attention_heads=f["num_attention_heads"],
        intermediate_size=f["intermediate_size"],
        vocab_size=f["vocab_size"],
        num_key_value_heads=f["num_key_value_heads"],
        head_dim=f.get("head_dim"),
        max_position_embeddings=f.context(True),
        hidden_act=f.activation(),
        norm_eps=f["rms_norm_eps"],
        tie_word_embeddings=f["tie_word_embeddings"],
        moe_config=moe,
        **f.rope(),
    )
