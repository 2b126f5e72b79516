"""What a model needs: its weights by name and shape, and the bytes they will take.

Everything is computed from the configuration: no array is made, and only `working_set`
imports MLX. A test holds the names and shapes equal to those of the real models.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mm1_mlx.config import (
    ConnectorConfig,
    DecoderConfig,
    EncoderConfig,
    MM1Config,
    VisionConfig,
)

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
    positions = config.num_patches
    if config.class_token and config.norm_in != "patches":
        positions += 1
    yield "position_embedding", (positions, width)
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
    up, rows = ("gate_up_proj", 2 * inner) if config.gated_mlp else ("up_proj", inner)
    yield f"{name}.experts.{up}", (experts, rows, width)
    yield f"{name}.experts.down_proj", (experts, width, inner)
    if config.mlp_bias:
        yield f"{name}.experts.{up}_bias", (experts, rows)
        yield f"{name}.experts.down_proj_bias", (experts, width)
    if shared := moe.shared_expert_intermediate_size:
        gated = config.gated_mlp
        yield from _mlp(f"{name}.shared_expert", width, shared, gated, False)
        yield f"{name}.shared_expert_gate.weight", (1, width)


def _block_shapes(config: ConnectorConfig, name: str, width_in: int) -> Shapes:
    """One bottleneck block of the C-Abstractor."""
    width, inner = config.hidden_size, config.inner_width(width_in)
    squeezed, bias = config.squeeze_width(width_in), config.norm_bias
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


def _c_abstractor_shapes(config: ConnectorConfig, width: int, dims: int) -> Shapes:
    hidden, depth = config.hidden_size, config.depth
    for i in range(depth):
        yield from _block_shapes(config, f"stage1.{i}", hidden if i else width)
    for i in range(depth):
        yield from _block_shapes(config, f"stage2.{i}", hidden)
    rows = hidden if depth else width
    for j in range(config.mlp_depth):
        last = j == config.mlp_depth - 1
        out = dims if last else config.readout_width(dims)
        yield from _linear(f"readout.{j}", out, rows, True)
        rows = out


def _attention_pool_shapes(config: ConnectorConfig, width: int, dims: int) -> Shapes:
    hidden = config.hidden_size
    yield "queries", (config.num_query_tokens or 0, hidden)
    yield from _linear("input_proj", hidden, width, True)
    yield from _norm("input_norm", hidden, True)
    for i in range(config.depth):
        layer = f"layers.{i}"
        yield from _norm(f"{layer}.norm1", hidden, True)
        yield from _linear(f"{layer}.q_proj", hidden, hidden, True)
        yield from _linear(f"{layer}.kv_proj", 2 * hidden, hidden, True)
        yield from _linear(f"{layer}.o_proj", hidden, hidden, True)
        yield from _norm(f"{layer}.norm2", hidden, True)
        yield from _mlp(f"{layer}.mlp", hidden, 4 * hidden, False, True)
    yield from _linear("proj", dims, hidden, True)


def connector_shapes(
    config: ConnectorConfig, width: int, dims: int, patches: int
) -> Shapes:
    """Names and shapes of a connector's weights, from encoder to decoder width."""
    if config.norm_input:
        yield from _norm("norm_input", width, True)
    if config.type in ("c_abstractor", "attention_pool") and config.position_embedding:
        yield "position_embedding", (patches, width)
    if config.type == "c_abstractor":
        yield from _c_abstractor_shapes(config, width, dims)
    elif config.type == "attention_pool":
        yield from _attention_pool_shapes(config, width, dims)
    elif config.type == "average_pool":
        yield from _linear("proj", dims, width, True)
    else:
        for j in range(config.mlp_depth):
            yield from _linear(f"linear.{j}", dims, dims if j else width, True)
    if config.norm_output:
        yield from _norm("norm_output", dims, False)
    if config.num_eos_tokens:
        yield "eos_tokens", (config.num_eos_tokens, dims)


def weight_shapes(
    config: MM1Config | EncoderConfig | VisionConfig | DecoderConfig,
) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, as in the model's folder, before quantization."""
    if isinstance(config, EncoderConfig):
        shapes = vision_shapes(config.vision_config)
        return {f"vision.{name}": shape for name, shape in shapes}
    if isinstance(config, VisionConfig):
        return dict(vision_shapes(config))
    if isinstance(config, DecoderConfig):
        return dict(decoder_shapes(config))
    text = config.text_config
    parts = {}
    if (vision := config.vision_config) and (connector := config.connector_config):
        size = vision.hidden_size, text.hidden_size, vision.num_patches
        parts["vision"] = vision_shapes(vision)
        parts["connector"] = connector_shapes(connector, *size)
        if config.tiling_config and config.tiling_config.type == "crops":
            ((rows, columns),) = config.tiling_config.grids
            patches = rows * columns * vision.num_patches
            parts["tile_connector"] = connector_shapes(connector, *size[:2], patches)
    parts["decoder"] = decoder_shapes(text)
    found = {f"{part}.{n}": s for part, shapes in parts.items() for n, s in shapes}
    if config.tiling_config and config.tiling_config.type == "anyres":
        found["image_newline"] = (text.hidden_size,)
    return found


# --- Parameters ------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """How many parameters a part has, and how many of them quantization can shrink.

    active: those that one token uses: all but the experts it is not sent to.
    """

    total: int = 0
    active: int = 0
    quantizable: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.total + other.total,
            self.active + other.active,
            self.quantizable + other.quantizable,
        )


@dataclass(frozen=True)
class Parts:
    """Parameters by part. `decoder` is without its embeddings and experts.

    embeddings: the token table, and the output table where it is not the same.
    experts: the routed experts; routers and shared experts belong to the decoder.
    """

    vision: Part
    connector: Part
    decoder: Part
    embeddings: Part
    experts: Part

    def items(self) -> list[tuple[str, Part]]:
        """Each part by name, in the order of a table."""
        names = ("vision", "connector", "decoder", "embeddings", "experts")
        return [(name, getattr(self, name)) for name in names]

    @property
    def all(self) -> Part:
        """The whole model."""
        return sum((part for _, part in self.items()), Part())

    @property
    def language_model(self) -> Part:
        """The decoder with its experts, without embeddings: the papers' sizes."""
        return self.decoder + self.experts


def _part_of(name: str) -> str:
    if ".experts." in name:
        return "experts"
    if name.split(".")[0] in ("embed_tokens", "lm_head"):
        return "embeddings"
    return "decoder"


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether 8- and 4-bit models hold this decoder weight in groups of GROUP_SIZE.

    Matrices whose rows divide into groups; the router stays as it is (it is tiny and
    decides which experts run). The encoder and the connector stay at 16 bits.
    """
    if len(shape) < 2 or name.endswith(("router.weight", "_bias")):
        return False
    *_, columns = shape
    return columns % GROUP_SIZE == 0


_BESIDE = ("tile_connector", "image_newline")  # 360VL's second one, LLaVA-NeXT's mark


def count_parameters(config: MM1Config | VisionConfig | DecoderConfig) -> Parts:
    """Parameters of a model, an encoder or a decoder, without making an array."""
    names = ("vision", "connector", "decoder", "embeddings", "experts")
    counts: dict[str, Part] = {name: Part() for name in names}
    text = config if isinstance(config, DecoderConfig) else None
    text = config.text_config if isinstance(config, MM1Config) else text
    moe = text.moe_config if text else None
    for full_name, shape in weight_shapes(config).items():
        if isinstance(config, VisionConfig):
            part, name = "vision", full_name
        elif isinstance(config, DecoderConfig):
            part, name = "decoder", full_name
        else:
            part, _, name = full_name.partition(".")
            part = "connector" if part in _BESIDE else part
        total = active = prod(shape)
        quantizable = 0
        if part == "decoder":
            part = _part_of(name)
            quantizable = total * is_quantizable(name, shape)
        if part == "experts" and moe:
            active = total * moe.num_experts_per_tok // moe.num_local_experts
        counts[part] += Part(total, active, quantizable)
    return Parts(**counts)


# --- Bytes -----------------------------------------------------------------------


def weight_bytes(parts: Parts, bits: int = 16) -> int:
    """Bytes of the weights at 16, 8 or 4 bits.

    A quantized weight takes `bits` and its share of one 16-bit scale and one 16-bit
    bias per group of 64: 8.5 and 4.5 bits. What cannot be quantized stays at 16.
    """
    part = parts.all
    if bits == 16:
        return 2 * part.total
    per_weight = bits + 32 / GROUP_SIZE
    kept = part.total - part.quantizable
    return round(2 * kept + part.quantizable * per_weight / 8)


def kv_bytes(config: DecoderConfig, tokens: int, bits: int = 16) -> int:
    """Bytes of keys and values of `tokens` tokens in every layer."""
    values = 2 * config.num_hidden_layers * config.kv_heads * config.size_per_head
    per_value = bits if bits == 16 else bits + 32 / GROUP_SIZE
    return round(tokens * values * per_value / 8)


def image_bytes(config: VisionConfig, images: int = 1) -> int:
    """Peak bytes while `images` pictures go through the encoder, at 16 bits.

    Per position: eight rows of the width (the residual, its normed copy, q, k and v,
    the attention's output and what is added), and the MLP's hidden rows before and
    after the activation. Attention scores are not stored: MLX's fused attention takes
    all these head widths on a GPU. On the CPU back end they are, and come on top.
    """
    pixels = config.patch_size**2 * config.num_channels
    hidden = config.intermediate_size * (3 if config.gated_mlp else 2)
    row = 8 * config.hidden_size + hidden + 2 * pixels
    return 2 * images * (config.num_patches + 1) * row


def prompt_bytes(config: DecoderConfig, tokens: int, chunk: int = 2048) -> int:
    """Peak bytes while a prompt is read in pieces of `chunk` tokens, at 16 bits.

    Per token seven rows of the width and the MLP's hidden rows; with experts, for each
    of the top_k its hidden rows and three of the width. A test holds these numbers to
    what MLX allocates. Logits are made for the last position only; the KV cache is not
    part of it.
    """
    width, moe = config.hidden_size, config.moe_config
    copies = 3 if config.gated_mlp else 2
    row = 7 * width + copies * config.intermediate_size
    if moe:
        inner = moe.moe_intermediate_size or config.intermediate_size
        routed = moe.num_experts_per_tok * (copies * inner + 3 * width)
        row = max(row, 5 * width + routed)
    return 2 * min(tokens, chunk) * row + 4 * config.vocab_size


def bytes_text(number: float) -> str:
    """ "7.2 GB", "3.4 MB" (10^9, 10^6 bytes): with the unit that fits."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def needed_bytes(
    config: MM1Config | VisionConfig | DecoderConfig,
    bits: int = 16,
    tokens: int = 2048,
    images: int = 1,
) -> int:
    """Weights, KV cache and the larger of the encoder's and the prompt's peak."""
    total = weight_bytes(count_parameters(config), bits)
    if isinstance(config, VisionConfig):
        return total + image_bytes(config, images)
    peaks = [0]
    text = config if isinstance(config, DecoderConfig) else config.text_config
    peaks.append(prompt_bytes(text, tokens))
    if isinstance(config, MM1Config) and config.vision_config:
        peaks.append(image_bytes(config.vision_config, images))
    return total + kv_bytes(text, tokens) + max(peaks)


# --- Machines --------------------------------------------------------------------


def mac_working_set(memory: int) -> int:
    """Bytes a Mac's GPU may keep in use, for `memory` bytes of unified memory.

    macOS decides and Apple documents no rule. Logs that programs print
    (recommendedMaxWorkingSetSize) show 2/3 at 16 and 32 GB and 3/4 at 64 and 96 GB;
    where the step lies is our assumption, on the safe side. Newer systems give more
    (84% of 128 GB was seen).
    """
    return memory * 2 // 3 if memory <= 36 * GIB else memory * 3 // 4


def fitting_macs(needed: int) -> list[int]:
    """The unified memory sizes (GiB) whose GPU working set holds `needed` bytes."""
    return [size for size in MAC_SIZES if needed <= mac_working_set(size * GIB)]


def machine_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimated_working_set() -> int:
    """working_set() without asking MLX: by the rule for Macs, or all memory."""
    memory = machine_memory()
    return mac_working_set(memory) if sys.platform == "darwin" else memory


def working_set() -> int:
    """Bytes that arrays may take here: what the GPU's driver says, or all memory.

    Imports MLX. On a machine without a GPU the bound is its memory.
    """
    import mlx.core as mx

    if mx.default_device().type == mx.cpu:
        return machine_memory()
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if key in info:
            return int(info[key])
    return machine_memory()
