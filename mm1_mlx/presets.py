"""Every size of the MM1 and MM1.5 papers, and the encoders they compare.

Apple published the sizes (3B, 7B, 30B), the experts (64 every 2nd layer, 32 every 4th)
and the encoders, but not the language models' dimensions. A value marked "ours" below
is this project's choice, never Apple's. Sources are in brackets:

- [MM1] arXiv 2403.09611, [MM1.5] arXiv 2409.20566, as quoted by published summaries.
- [axlearn] Apple's public training library: gala.py and honeycrisp.py.
- [open_clip], [ml-aim], [siglip]: the public configurations of those encoders.
"""

from dataclasses import replace

from mm1_mlx.config import (
    ConnectorConfig,
    DecoderConfig,
    MM1Config,
    MoEConfig,
    VisionConfig,
)
from mm1_mlx.errors import ConfigError


def _clip(width: int, layers: int, heads: int, image_size: int) -> VisionConfig:
    """CLIP's ViT with patches of 14. quick_gelu: as the public DFN ViT-L and ViT-H."""
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image_size,
        norm_in="all",
        hidden_act="quick_gelu",
    )


def _aim(width: int, heads: int) -> VisionConfig:
    """AIM, version 1: LayerNorm, GELU, no class token, no bias in the linear layers.

    Every AIM below 7B has 24 layers and a four times wider MLP [ml-aim].
    """
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=24,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=224,
        hidden_act="gelu",
        norm_eps=1e-6,
        class_token=False,
        norm_in="embed",
        patch_bias=True,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
    )


def _aimv2(width: int, heads: int, ffn: int, image_size: int) -> VisionConfig:
    """AIMv2: RMSNorm, SwiGLU, no class token; every size has 24 layers [ml-aim]."""
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=24,
        num_attention_heads=heads,
        intermediate_size=ffn,
        image_size=image_size,
        hidden_act="silu",
        gated_mlp=True,
        norm_type="rms_norm",
        norm_eps=1e-5,
        class_token=False,
        norm_in="embed",
        patch_bias=True,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
    )


ENCODERS: dict[str, VisionConfig] = {
    # [MM1] section 3: ViT-L at 336 is the ablations' encoder, ViT-H at 378 the final
    # one. Dimensions: [open_clip]. 672 is [MM1.5]'s tile, by interpolated positions.
    "vit-l-14-224": _clip(1024, 24, 16, 224),
    "vit-l-14-336": _clip(1024, 24, 16, 336),
    "vit-h-14-378": _clip(1280, 32, 16, 378),
    "vit-h-14-672": _clip(1280, 32, 16, 672),
    "aim-600m": _aim(1536, 12),
    "aim-1b": _aim(2048, 16),
    "aim-3b": _aim(3072, 24),
    "siglip-so400m": VisionConfig(
        hidden_size=1152,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=4304,
        image_size=384,  # 27 patches of 14 a side; the last 6 pixels are not used
        hidden_act="gelu_pytorch_tanh",
        norm_eps=1e-6,
        class_token=False,
        patch_bias=True,
    ),
}
for _size in (224, 336, 448):
    ENCODERS[f"aimv2-l-{_size}"] = _aimv2(1024, 8, 2816, _size)
    ENCODERS[f"aimv2-h-{_size}"] = _aimv2(1536, 12, 4096, _size)
    ENCODERS[f"aimv2-1b-{_size}"] = _aimv2(2048, 16, 5632, _size)
    ENCODERS[f"aimv2-3b-{_size}"] = _aimv2(3072, 24, 8192, _size)


def _decoder(
    width: int, layers: int, heads: int, kv_heads: int, ffn: int
) -> DecoderConfig:
    """A decoder in the style of [axlearn]'s models; all but the context is ours.

    Style: pre-norm RMSNorm with eps 1e-5, SwiGLU, RoPE, normalised queries and keys, no
    bias. The context of 4096 tokens is [MM1] section 4.
    """
    return DecoderConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=49152,  # ours: Honeycrisp's; MM1's tokenizer is not published
        max_position_embeddings=4096,
        qk_norm="head",  # ours
        tie_word_embeddings=False,  # ours
    )


# Ours, all of them. 1.2B has Gala 1B's dimensions [axlearn]. The others are fitted to
# the published totals: 2.9B and 6.4B dense without embeddings, 64B and 47B with experts
# (tests hold these within 1%). Other dimensions reach the same totals.
_DECODERS = {
    "1.2b": _decoder(2048, 24, 32, 32, 5632),
    "3b": _decoder(3072, 26, 24, 24, 8064),
    "7b": _decoder(4096, 32, 32, 4, 13312),
    "30b": _decoder(7168, 48, 56, 7, 23296),
}

# [MM1] section 3.2: a C-Abstractor with 144 tokens. Its widths and depth are Honeybee's
# (2312.06742), which MM1 cites; the norm on the output is ours.
_CONNECTOR = ConnectorConfig(
    type="c_abstractor",
    num_query_tokens=144,
    hidden_size=1024,
    depth=3,
    mlp_depth=2,
    norm_output=True,
)


def _mm1(
    decoder: DecoderConfig, encoder: str, moe: MoEConfig | None = None
) -> MM1Config:
    """One model. Ours: the special ids, the encoder layer that is read (the last,
    before its norm) and the first sparse layer (MoEConfig says from where)."""
    return MM1Config(
        vision_config=ENCODERS[encoder],
        connector_config=_CONNECTOR,
        text_config=replace(decoder, moe_config=moe),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        image_token_id=3,
    )


def _experts(experts: int, every: int) -> MoEConfig:
    """Top-2 experts in every `every`-th layer [MM1] section 4. The first sparse layer
    is ours: the last of each group, so that the first layers stay dense [axlearn]."""
    return MoEConfig(
        num_local_experts=experts, sparse_step=every, first_sparse_layer=every - 1
    )


MODELS: dict[str, MM1Config] = {
    # The ablations' model: 1.2B with ViT-L at 336 [MM1] section 3.
    "mm1-1.2b": _mm1(_DECODERS["1.2b"], "vit-l-14-336"),
    "mm1-3b": _mm1(_DECODERS["3b"], "vit-h-14-378"),
    "mm1-7b": _mm1(_DECODERS["7b"], "vit-h-14-378"),
    "mm1-30b": _mm1(_DECODERS["30b"], "vit-h-14-378"),
    "mm1-3b-moe": _mm1(_DECODERS["3b"], "vit-h-14-378", _experts(64, 2)),
    "mm1-7b-moe": _mm1(_DECODERS["7b"], "vit-h-14-378", _experts(32, 4)),
    # [MM1.5] sections 3.5 and 4: tiles of 672, 144 tokens each, 64 experts every 2nd
    # layer. That its decoders have MM1's dimensions, and its 1B the 1.2B's, is ours.
    "mm1.5-1b": _mm1(_DECODERS["1.2b"], "vit-h-14-672"),
    "mm1.5-3b": _mm1(_DECODERS["3b"], "vit-h-14-672"),
    "mm1.5-7b": _mm1(_DECODERS["7b"], "vit-h-14-672"),
    "mm1.5-30b": _mm1(_DECODERS["30b"], "vit-h-14-672"),
    "mm1.5-1b-moe": _mm1(_DECODERS["1.2b"], "vit-h-14-672", _experts(64, 2)),
    "mm1.5-3b-moe": _mm1(_DECODERS["3b"], "vit-h-14-672", _experts(64, 2)),
}

PRESETS: dict[str, MM1Config | VisionConfig] = {**MODELS, **ENCODERS}


def preset(name: str) -> MM1Config | VisionConfig:
    """The configuration of this name; an unknown name is a ConfigError with a list."""
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset named {name!r}. The presets are: {', '.join(PRESETS)}."
        )
    return PRESETS[name]
