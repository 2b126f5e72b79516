"""Qwen1.5-MoE (model_type qwen2_moe) and Qwen3-MoE -> names of mm1_mlx.models.decoder.

Qwen1.5-MoE adds a shared expert with its own sigmoid gate; its q, k and v have biases.
Qwen3-MoE normalises queries and keys per head.
"""

from mm1_mlx.config import DecoderConfig, MoEConfig
from mm1_mlx.errors import CheckpointError

from ..rules import Rule, Table
from ..source import DECODER, Source
from .fields import Fields
from .llama import ATTENTION, LAYER, MLP, SOURCE
from .olmoe import EXPERTS
from .parts import fused_gate_up

SHARED = SOURCE + ".mlp.shared_expert"

RULES: Table = [
    *ATTENTION,
    *EXPERTS,
    *MLP,  # of dense layers, where decoder_sparse_step is above 1
    fused_gate_up(SHARED, LAYER + ".moe.shared_expert", "weight"),
    Rule(
        SHARED + ".down_proj.weight",
        LAYER + ".moe.shared_expert.down_proj.weight",
    ),
    Rule(
        SOURCE + ".mlp.shared_expert_gate.weight",
        LAYER + ".moe.shared_expert_gate.weight",
    ),
]

_BOTH = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "head_dim": None,
    "attention_bias": False,
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
}

# Class defaults of Qwen2MoeConfig and Qwen3MoeConfig.
_DEFAULTS = {
    "qwen2_moe": _BOTH
    | {
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    "qwen3_moe": _BOTH
    | {
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
}


def config(hub_config: dict) -> DecoderConfig:
    """Of either; transformers 5 writes num_experts as num_local_experts."""
    family = hub_config.get("model_type") or ""
    if family not in _DEFAULTS:
        raise CheckpointError(
            f"This config has model_type {family!r}, but must be one of "
            f"{', '.join(_DEFAULTS)}."
        )
    f = Fields(hub_config, _DEFAULTS[family], family)
    f.refuse("mlp_only_layers", None, [])
    step, new = f["decoder_sparse_step"], family == "qwen3_moe"
    moe = MoEConfig(
        num_local_experts=hub_config.get("num_local_experts") or f["num_experts"],
        num_experts_per_tok=f["num_experts_per_tok"],
        sparse_step=step,
        first_sparse_layer=step - 1,  # layer i is sparse where step divides i + 1
        norm_topk_prob=f["norm_topk_prob"],
        router_aux_loss_coef=f["router_aux_loss_coef"],
        moe_intermediate_size=f["moe_intermediate_size"],
        shared_expert_intermediate_size=(
            0 if new else f["shared_expert_intermediate_size"]
        ),
    )
    return DecoderConfig(
        **f.decoder(windowed=f["use_sliding_window"]),
        head_dim=f.get("head_dim"),
        qkv_bias=f["attention_bias"] if new else f["qkv_bias"],
        attention_out_bias=f["attention_bias"] if new else False,
        qk_norm="head" if new else None,
        moe_config=moe,
    )


ENTRY = Source(
    name="qwen_moe",
    what="Qwen1.5-MoE and Qwen3-MoE",
    kind=DECODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("qwen2_moe", "qwen3_moe"),
)
