"""Llama, Vicuna, Mistral, Qwen2 and Qwen3 -> names of mm1_mlx.models.decoder.

They share their names; biases (Qwen2) and q_norm, k_norm (Qwen3) are there or not.
"""

from mm1_mlx.config import DecoderConfig
from mm1_mlx.errors import CheckpointError

from ..rules import Drop, Rule, Table
from ..source import DECODER, Source
from .fields import Fields
from .parts import LAYER, fused_gate_up, fused_qkv

SOURCE = "model.layers.{i}"

# Without the feed-forward part: the sparse families share this much.
ATTENTION: Table = [
    Rule("model.embed_tokens.weight", "embed_tokens.weight"),
    Rule(SOURCE + ".input_layernorm.{p}", LAYER + ".norm1.{p}"),
    fused_qkv(SOURCE + ".self_attn"),
    Rule(SOURCE + ".self_attn.o_proj.{p}", LAYER + ".attn.o_proj.{p}"),
    Rule(SOURCE + ".self_attn.q_norm.weight", LAYER + ".attn.q_norm.weight"),
    Rule(SOURCE + ".self_attn.k_norm.weight", LAYER + ".attn.k_norm.weight"),
    Drop(SOURCE + ".self_attn.rotary_emb.inv_freq", why="computed from rope_theta"),
    Drop("model.rotary_emb.inv_freq", why="computed from rope_theta"),
    Rule(SOURCE + ".post_attention_layernorm.{p}", LAYER + ".norm2.{p}"),
    Rule("model.norm.{p}", "norm.{p}"),
    Rule("lm_head.{p}", "lm_head.{p}"),
]

MLP: Table = [
    fused_gate_up(SOURCE + ".mlp", LAYER + ".mlp"),
    Rule(SOURCE + ".mlp.down_proj.{p}", LAYER + ".mlp.down_proj.{p}"),
]

RULES: Table = [*ATTENTION, *MLP]

_SHARED = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}

_QWEN = _SHARED | {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
}

# Class defaults of LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config.
_DEFAULTS = {
    "llama": _SHARED
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": _SHARED
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "use_sliding_window": True,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}


def config(hub_config: dict) -> DecoderConfig:
    """Of any of the four families; a config without model_type is Llama's."""
    family = hub_config.get("model_type") or "llama"
    if family not in _DEFAULTS:
        raise CheckpointError(
            f"This config has model_type {family!r}, but must be one of "
            f"{', '.join(_DEFAULTS)} to be read as a Llama-like decoder."
        )
    f = Fields(hub_config, _DEFAULTS[family], family)
    bias = f["attention_bias"] if family in ("llama", "qwen3") else False
    return DecoderConfig(
        **f.decoder(windowed=bool(f.get("use_sliding_window"))),
        head_dim=f.get("head_dim"),
        qkv_bias=family == "qwen2" or bias,
        attention_out_bias=bias,
        mlp_bias=f["mlp_bias"] if family == "llama" else False,
        qk_norm="head" if family == "qwen3" else None,
    )


ENTRY = Source(
    name="llama",
    what="Llama, Vicuna, Mistral, Qwen2, Qwen2.5 and Qwen3",
    kind=DECODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=tuple(_DEFAULTS),
    is_it=lambda values, entries: "visual_encoder" not in entries,  # else AuroraCap
)
