"""What a model needs: its weights by name and shape, and the bytes they will take.

Everything is computed from the configuration; no array is made and MLX is not imported
(only `working_set` asks it). A test holds the names and shapes equal to the real models.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mm1_mlx.config import ConnectorConfig, DecoderConfig, MM1Config, VisionConfig

GIB = 2**30

Shapes = Iterator[tuple[str, tuple[int, ...]]]

GROUP_SIZE = 64  # weights that share one scale and one bias when quantized

# Unified memory sizes that Apple sells or sold with its own chips, in GiB.
MAC_SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)


# --- Names and shapes ------------------------------------------------------------


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, width: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _mlp(name: str, width: int, inner: int, gated: bool, bias: bool) -> Shapes:
    if gated:
        yield from _linear(f"{name}.gate_up_proj", 2 * inner, width, bias)
    else:
        yield from _linear(f"{name}.up_proj", inner, width, bias)
    yield from _linear(f"{name}.down_proj", width, inner, bias)


def vision_shapes(config: VisionConfig) -> Shapes:
    """Names and shapes of a VisionEncoder's weights."""
    width, head = config.hidden_size, config.size_per_head
    inner = config.num_attention_heads * head
    norm_bias = config.norm_bias and config.norm_type == "layer_norm"
    pixels = config.patch_size**2 * config.num_channels
    yield from _linear("patch_embed", width, pixels, config.patch_bias)
    if config.class_token:
        yield "class_embedding", (width,)
    yield "position_embedding", (config.num_patches + config.class_token, width)
    if config.norm_in:
        yield from _norm("norm_in", width, norm_bias)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        yield from _norm(f"{layer}.norm1", width, norm_bias)
        yield from _linear(f"{layer}.attn.qkv_proj", 3 * inner, width, config.qkv_bias)
        bias = config.attention_out_bias
        yield from _linear(f"{layer}.attn.o_proj", width, inner, bias)
        yield from _norm(f"{layer}.norm2", width, norm_bias)
        yield from _mlp(
            f"{layer}.mlp",
            width,
            config.intermediate_size,
            config.gated_mlp,
            config.mlp_bias,
        )
    if config.norm_out:
        yield from _norm("norm_out", width, norm_bias)


def decoder_shapes(config: DecoderConfig) -> Shapes:
    """Names and shapes of a Decoder's weights."""
    width = config.hidden_size
    norm_bias = config.norm_bias and config.norm_type == "layer_norm"
    yield "embed_tokens.weight", (config.vocab_size, width)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        yield from _norm(f"{layer}.norm1", width, norm_bias)
        yield from _attention_shapes(config, f"{layer}.attn")
        if not config.parallel_block:
            yield from _norm(f"{layer}.norm2", width, norm_bias)
        if config.is_sparse(i):
            yield from _moe_shapes(config, f"{layer}.moe")
        else:
            yield from _mlp(
                f"{layer}.mlp",
                width,
                config.intermediate_size,
                config.gated_mlp,
                config.mlp_bias,
            )
    yield from _norm("norm", width, norm_bias)
    if not config.tie_word_embeddings:
        yield from _linear("lm_head", config.vocab_size, width, config.lm_head_bias)


def _attention_shapes(config: DecoderConfig, name: str) -> Shapes:
    width, head = config.hidden_size, config.size_per_head
    queries, keys = config.num_attention_heads * head, config.kv_heads * head
    yield from _linear(f"{name}.qkv_proj", queries + 2 * keys, width, config.qkv_bias)
    yield from _linear(f"{name}.o_proj", width, queries, config.attention_out_bias)
    if config.qk_norm:
        full = config.qk_norm == "full"
        yield f"{name}.q_norm.weight", (queries if full else head,)
        yield f"{name}.k_norm.weight", (keys if full else head,)


def _moe_shapes(config: DecoderConfig, name: str) -> Shapes:
    moe = config.moe_config
    assert moe is not None
    width, experts = config.hidden_size, moe.num_local_experts
    inner = moe.moe_intermediate_size or config.intermediate_size
    yield f"{name}.router.weight", (experts, width)
    if config.gated_mlp:
        yield f"{name}.experts.gate_up_proj", (experts, 2 * inner, width)
    else:
        yield f"{name}.experts.up_proj", (experts, inner, width)
    yield f"{name}.experts.down_proj", (experts, width, inner)
    if shared := moe.shared_expert_intermediate_size:
        gated = config.gated_mlp
        yield from _mlp(f"{name}.shared_expert", width, shared, gated, False)
        yield f"{name}.shared_expert_gate.weight", (1, width)


def _block_shapes(
    config: ConnectorConfig, name: str, width_in: int, width: int
) -> Shapes:
    """One bottleneck block of the C-Abstractor."""
    bias = config.norm_bias
    inner, squeezed = config.block_widths(width_in)
    yield f"{name}.conv1.weight", (inner, width_in)
    yield from _norm(f"{name}.norm1", inner, bias)
    yield f"{name}.conv2.weight", (inner, 3, 3, 1)  # depthwise
    yield from _norm(f"{name}.norm2", inner, bias)
    yield from _linear(f"{name}.se.fc1", squeezed, inner, config.squeeze_bias)
    yield from _linear(f"{name}.se.fc2", inner, squeezed, config.squeeze_bias)
    yield f"{name}.conv3.weight", (width, inner)
    yield from _norm(f"{name}.norm3", width, bias)
    if width_in != width:
        yield f"{name}.shortcut.weight", (width, width_in)
        yield from _norm(f"{name}.shortcut_norm", width, bias)
