"""StableLM -> names of mm1_mlx.models.decoder: LayerNorms, partial RoPE, qkv bias."""

from mm1_mlx.config import DecoderConfig

from ..rules import Table
from ..source import DECODER, Source
from .fields import Fields
from .llama import ATTENTION, MLP

RULES: Table = [*ATTENTION, *MLP]

# Class defaults of StableLmConfig.
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}


def config(hub_config: dict) -> DecoderConfig:
    """Of a StableLM checkpoint, also in the spelling of its first own code.

    That code, and MoE-LLaVA's copy of it, writes rope_pct and norm_eps.
    """
    values = dict(hub_config)
    for old, new in (
        ("rope_pct", "partial_rotary_factor"),
        ("norm_eps", "layer_norm_eps"),
    ):
        if values.get(new) is None and old in values:
            values[new] = values[old]
    f = Fields(values, _DEFAULTS, "stablelm")
    f.refuse("qk_layernorm", False)
    return DecoderConfig(
        **f.decoder("layer_norm_eps"),
        norm_type="layer_norm",
        qkv_bias=f["use_qkv_bias"],
        parallel_block=f["use_parallel_residual"],
    )


ENTRY = Source(
    name="stablelm",
    what="StableLM 2",
    kind=DECODER,
    rules=RULES,
    config=lambda values, tower: config(values),
    types=("stablelm", "stablelm_epoch"),
)
