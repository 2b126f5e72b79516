"""Phi-1.5 and Phi-2 -> names of mm1_mlx.models.decoder.

One LayerNorm per block, attention beside the MLP, biases everywhere, partial RoPE.
"""

from mm1_mlx.config import DecoderConfig

from ..rules import Drop, Rule, Table
from ..source import DECODER, Source
from .fields import Fields
from .llama import LAYER, SOURCE
from .parts import fused_qkv

RULES: Table = [
    Rule("model.embed_tokens.weight", "embed_tokens.weight"),
    Rule(SOURCE + ".input_layernorm.{p}", LAYER + ".norm1.{p}"),
    fused_qkv(SOURCE + ".self_attn"),
    Rule(SOURCE + ".self_attn.dense.{p}", LAYER + ".attn.o_proj.{p}"),
    Drop(SOURCE + ".self_attn.rotary_emb.inv_freq", why="computed from rope_theta"),
    Rule(SOURCE + ".mlp.fc1.{p}", LAYER + ".mlp.up_proj.{p}"),
    Rule(SOURCE + ".mlp.fc2.{p}", LAYER + ".mlp.down_proj.{p}"),
    Rule("model.final_layernorm.{p}", "norm.{p}"),
    Rule("lm_head.{p}", "lm_head.{p}"),
]

# Class defaults of PhiConfig.
_DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "qk_layernorm": False,
}


def config(hub_config: dict) -> DecoderConfig:
    """Of a Phi-1.5 or Phi-2 checkpoint."""
    f = Fields(hub_config, _DEFAULTS, "phi")
    f.refuse("qk_layernorm", False)
    f.refuse("tie_word_embeddings", False)
    return DecoderConfig(
        **f.decoder("layer_norm_eps"),
        gated_mlp=False,
        norm_type="layer_norm",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        parallel_block=True,
        lm_head_bias=True,
    )


ENTRY = Source(
    name="phi",
    what="Phi-1.5 and Phi-2",
    kind=DECODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("phi",),
)
