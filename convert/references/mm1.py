"""MM1 in PyTorch, of any of our configurations, under our own names.

The other side of `verify` for what neither transformers nor its authors' code can run
here: an MM1 trained in PyTorch, Apple's tamm, AIM. Written from the papers and the
originals, not from mm1_mlx.models, and plain: every expert sees every token, attention
is written out by torch. Whoever trains an MM1 in PyTorch may start from it: what
`state_dict()` gives is what the source mm1_torch reads.
"""

from itertools import pairwise
from math import ceil, isqrt
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from mm1_mlx.config import ConnectorConfig, DecoderConfig, MoEConfig, VisionConfig

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class _LayerNorm(nn.Module):
    """LayerNorm, or RMSNorm, over the last axis, in float32."""

    def __init__(self, kind: str, width: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.centred = kind == "layer_norm"
        if self.centred and bias:
            self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out = wide.to(x.dtype) * self.weight
        return out + self.bias if hasattr(self, "bias") else out


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int, act: str, gated: bool, bias: bool):
        super().__init__()
        rows = 2 * inner if gated else inner
        self.add_module(
            "gate_up_proj" if gated else "up_proj", nn.Linear(width, rows, bias=bias)
        )
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.gated, self.act = gated, _ACTIVATIONS[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.down_proj(self.act(self.up_proj(x)))  # type: ignore[operator]
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # type: ignore[operator]
        return self.down_proj(self.act(gate) * up)


# --- Encoder -------------------------------------------------------------------------


class _EncoderAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        inner = c.num_attention_heads * c.size_per_head
        self.heads = c.num_attention_heads
        self.qkv_proj = nn.Linear(c.hidden_size, 3 * inner, bias=c.qkv_bias)
        self.o_proj = nn.Linear(inner, c.hidden_size, bias=c.attention_out_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, T, _ = x.shape
        q, k, v = (
            self.qkv_proj(x).reshape(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(N, T, -1))


class _EncoderLayer(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        width, norm = (
            c.hidden_size,
            (c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias),
        )
        self.norm1, self.norm2 = _LayerNorm(*norm), _LayerNorm(*norm)
        self.attn = _EncoderAttention(c)
        self.mlp = _MLP(
            width, c.intermediate_size, c.hidden_act, c.gated_mlp, c.mlp_bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _resized(table: torch.Tensor, side: int) -> torch.Tensor:
    """A position table of a square grid for another one. (G*G, D) -> (side*side, D)."""
    own = isqrt(len(table))
    if own == side:
        return table
    grid = table.reshape(1, own, own, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return grid.flatten(2)[0].T


class Encoder(nn.Module):
    """Pixels (N, 3, H, H) to states (N, P or P+1, Dv), the class token first."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = self.config = config
        patch = c.patch_size**2 * c.num_channels
        self.patch_embed = nn.Linear(patch, c.hidden_size, bias=c.patch_bias)
        apart = c.class_token and c.norm_in == "patches"
        if c.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        rows = c.num_patches + int(c.class_token and not apart)
        self.position_embedding = nn.Parameter(torch.randn(rows, c.hidden_size) * 0.02)
        norm = (c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        if c.norm_in:
            self.norm_in = _LayerNorm(*norm)
        self.layers = nn.ModuleList(
            [_EncoderLayer(c) for _ in range(c.num_hidden_layers)]
        )
        if c.norm_out:
            self.norm_out = _LayerNorm(*norm)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the first block reads."""
        c, p = self.config, self.config.patch_size
        whole = pixels.shape[-1] // p * p
        x = F.unfold(pixels[..., :whole, :whole], p, stride=p)  # channel, row, column
        x = x.reshape(len(x), c.num_channels, p * p, -1).permute(0, 3, 2, 1).flatten(2)
        x = self.patch_embed(x)
        if c.norm_in == "embed":
            x = self.norm_in(x)
        side = whole // p
        extra = len(self.position_embedding) - c.num_patches
        table = _resized(self.position_embedding[extra:], side)
        x = x + table
        if c.norm_in == "patches":
            x = self.norm_in(x)
        if c.class_token:
            first = self.class_embedding + self.position_embedding[:extra].sum(0)
            x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
        return self.norm_in(x) if c.norm_in == "all" else x

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embed(pixels)
        for layer in self.layers:
            x = layer(x)
        return x


# --- Connectors ----------------------------------------------------------------------


class _Depthwise(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 1, 3, 3) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(
            x.permute(0, 3, 1, 2), self.weight, padding=1, groups=len(self.weight)
        )
        return x.permute(0, 2, 3, 1)


class _Squeeze(nn.Module):
    def __init__(self, width: int, reduced: int, act: str, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, reduced, bias=bias)
        self.fc2 = nn.Linear(reduced, width, bias=bias)
        self.act = _ACTIVATIONS[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2), keepdim=True)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(mean))))


class _Bottleneck(nn.Module):
    def __init__(self, width_in: int, c: ConnectorConfig):
        super().__init__()
        tamm, width = c.variant == "tamm", c.hidden_size
        inner = width_in if tamm else width
        share = c.squeeze_ratio * width_in
        reduced = ceil(share) if tamm else round(share)

        def norm(size: int) -> _LayerNorm:
            return _LayerNorm("layer_norm", size, c.norm_eps, c.norm_bias)

        self.conv1, self.norm1 = nn.Linear(width_in, inner, bias=False), norm(inner)
        self.conv2, self.norm2 = _Depthwise(inner), norm(inner)
        self.se = _Squeeze(inner, reduced, c.hidden_act, c.squeeze_bias)
        self.conv3, self.norm3 = nn.Linear(inner, width, bias=False), norm(width)
        if width_in != width:
            self.shortcut = nn.Linear(width_in, width, bias=False)
            self.shortcut_norm = norm(width)
        self.act = _ACTIVATIONS[c.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.act(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(self.se(y)))
        if hasattr(self, "shortcut"):
            x = self.shortcut_norm(self.shortcut(x))
        return self.act(y + x)


class Connector(nn.Module):
    """Patch features (N, P, Dv) to tokens (N, Q, D), of any type.

    patches: P of the position table.
    """

    def __init__(self, config: ConnectorConfig, width: int, dims: int, patches: int):
        super().__init__()
        c = self.config = config
        hidden, self.act = c.hidden_size, _ACTIVATIONS[c.hidden_act]
        if c.norm_input:
            self.norm_input = _LayerNorm("layer_norm", width, c.norm_eps, True)
        if c.norm_output:
            self.norm_output = _LayerNorm("rms_norm", dims, c.norm_eps, False)
        if c.num_eos_tokens:
            self.eos_tokens = nn.Parameter(torch.randn(c.num_eos_tokens, dims) * 0.02)
        if c.type in ("c_abstractor", "attention_pool") and c.position_embedding:
            self.position_embedding = nn.Parameter(torch.randn(patches, width) * 0.02)
        if c.type == "average_pool":
            self.proj = nn.Linear(width, dims)
        elif c.type == "mlp":
            sizes = [width] + [dims] * c.mlp_depth
            self.linear = _linears(sizes)
        elif c.type == "c_abstractor":
            widths = [width, *[hidden] * c.depth][: c.depth]
            self.stage1 = nn.ModuleList([_Bottleneck(w, c) for w in widths])
            self.stage2 = nn.ModuleList([_Bottleneck(hidden, c) for _ in widths])
            inner = hidden if c.variant == "tamm" else dims
            rows = hidden if c.depth else width
            self.readout = _linears([rows, *[inner] * (c.mlp_depth - 1), dims])
        else:
            self.queries = nn.Parameter(torch.randn(c.num_query_tokens or 0, hidden))
            self.input_proj = nn.Linear(width, hidden)
            self.input_norm = _LayerNorm("layer_norm", hidden, c.norm_eps, True)
            self.layers = nn.ModuleList([_Reader(c) for _ in range(c.depth)])
            self.proj = nn.Linear(hidden, dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        if c.norm_input:
            x = self.norm_input(x)
        if hasattr(self, "position_embedding"):
            x = x + _resized(self.position_embedding, isqrt(x.shape[1]))
        if c.type == "average_pool":
            x = self.proj(self._pool(_grid(x)).flatten(1, 2))
        elif c.type == "mlp":
            x = self._chain(self.linear, x)
        elif c.type == "c_abstractor":
            x = self._abstract(x)
        else:
            patches = self.input_norm(self.input_proj(x))
            x = self.queries.expand(len(x), -1, -1)
            for layer in self.layers:
                x = layer(x, patches)
            x = self.proj(x)
        if c.norm_output:
            x = self.norm_output(x)
        if c.num_eos_tokens:
            x = torch.cat([x, self.eos_tokens.expand(len(x), -1, -1)], dim=1)
        return x

    def _abstract(self, x: torch.Tensor) -> torch.Tensor:
        x = _grid(x)
        for block in self.stage1:
            x = block(x)
        x = self._pool(x)
        for block in self.stage2:
            x = block(x)
        return self._chain(self.readout, x.flatten(1, 2))

    def _chain(self, linears: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for k, linear in enumerate(linears):
            x = linear(self.act(x) if k else x)
        return x

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """(N, G, G, C) -> (N, S, S, C)."""
        side = isqrt(self.config.num_query_tokens or 0)
        x = x.permute(0, 3, 1, 2)
        if self.config.pooling == "adaptive":
            x = F.adaptive_avg_pool2d(x, side)
        else:
            stride = x.shape[-1] // side
            x = F.avg_pool2d(x, x.shape[-1] - (side - 1) * stride, stride)
        return x.permute(0, 2, 3, 1)


def _linears(sizes: list[int]) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])


def _grid(x: torch.Tensor) -> torch.Tensor:
    side = isqrt(x.shape[1])
    return x.reshape(len(x), side, side, -1)


class _Reader(nn.Module):
    """Queries that read patches, then an MLP."""

    def __init__(self, c: ConnectorConfig):
        super().__init__()
        width = c.hidden_size
        self.heads = c.num_attention_heads
        self.norm1 = _LayerNorm("layer_norm", width, c.norm_eps, True)
        self.norm2 = _LayerNorm("layer_norm", width, c.norm_eps, True)
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.o_proj = nn.Linear(width, width)
        self.mlp = _MLP(width, 4 * width, c.hidden_act, False, True)

    def forward(self, x: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        def split(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.kv_proj(patches).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(
            split(self.q_proj(self.norm1(x))), split(k), split(v)
        )
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


# --- Decoder -------------------------------------------------------------------------


def _angles(c: DecoderConfig, length: int) -> torch.Tensor:
    """Of every position and pair of a head. (L, rotary / 2)."""
    steps = torch.arange(0, c.rotary_dims, 2).double() / c.rotary_dims
    speed = c.rope_theta**-steps
    scaling, positions = c.rope_scaling, torch.arange(length).double()
    if scaling and scaling["rope_type"] == "linear":
        positions = positions / scaling["factor"]
    elif scaling:  # llama3: slow turns slower, fast ones as they are
        turns = scaling["original_max_position_embeddings"] * speed / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (share + (1 - share) / scaling["factor"])
    return (positions[:, None] * speed).float()


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + half) of each head turned; what is beyond stays."""
    half = angles.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class _Attention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.config, head = c, c.size_per_head
        self.heads, self.groups = c.num_attention_heads, c.kv_heads
        rows = (self.heads + 2 * self.groups) * head
        self.qkv_proj = nn.Linear(c.hidden_size, rows, bias=c.qkv_bias)
        self.o_proj = nn.Linear(
            self.heads * head, c.hidden_size, bias=c.attention_out_bias
        )
        if c.qk_norm:
            wide = c.qk_norm == "full"
            sizes = [(n * head if wide else head) for n in (self.heads, self.groups)]
            self.q_norm, self.k_norm = (
                _LayerNorm("rms_norm", size, c.norm_eps, False) for size in sizes
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, head = self.config, self.config.size_per_head
        sizes = [n * head for n in (self.heads, self.groups, self.groups)]
        q, k, v = self.qkv_proj(x).split(sizes, dim=-1)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, head)).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        angles = _angles(c, x.shape[1])
        q, k = _rotated(q, angles), _rotated(k, angles)
        if c.qk_norm == "rotated_head":
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _Router(nn.Module):
    """Weights of every expert for every token, 0 for those not chosen. (T, E)."""

    def __init__(self, width: int, moe: MoEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(moe.num_local_experts, width))
        self.moe = moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(x.float() @ self.weight.float().T, dim=-1)
        best, chosen = chances.topk(self.moe.num_experts_per_tok, dim=-1)
        if self.moe.norm_topk_prob:
            best = best / best.sum(dim=-1, keepdim=True)
        return torch.zeros_like(chances).scatter(-1, chosen, best)


class _Experts(nn.Module):
    def __init__(self, c: DecoderConfig, moe: MoEConfig):
        super().__init__()
        count, width = moe.num_local_experts, c.hidden_size
        inner = moe.moe_intermediate_size or c.intermediate_size
        self.first = "gate_up_proj" if c.gated_mlp else "up_proj"
        rows = 2 * inner if c.gated_mlp else inner
        shapes = {self.first: (count, rows, width), "down_proj": (count, width, inner)}
        if c.mlp_bias:
            shapes |= {f"{n}_bias": shape[:2] for n, shape in list(shapes.items())}
        for name, shape in shapes.items():
            empty = torch.randn(shape) * shape[-1] ** -0.5
            self.register_parameter(name, nn.Parameter(empty))
        self.gated, self.bias = c.gated_mlp, c.mlp_bias
        self.act = _ACTIVATIONS[c.hidden_act]

    def forward(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in range(shares.shape[-1]):
            hidden = self._one(self.first, e, x)
            if self.gated:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = self.act(gate) * up
            else:
                hidden = self.act(hidden)
            one = self._one("down_proj", e, hidden)
            out = out + shares[:, e, None].to(x.dtype) * one
        return out

    def _one(self, name: str, e: int, x: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[e] if self.bias else None
        return F.linear(x, getattr(self, name)[e], bias)


class _MoE(nn.Module):
    def __init__(self, c: DecoderConfig, moe: MoEConfig):
        super().__init__()
        self.router, self.experts = _Router(c.hidden_size, moe), _Experts(c, moe)
        if inner := moe.shared_expert_intermediate_size:
            self.shared_expert = _MLP(
                c.hidden_size, inner, c.hidden_act, c.gated_mlp, False
            )
            self.shared_expert_gate = nn.Linear(c.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        out = self.experts(flat, self.router(flat))
        if hasattr(self, "shared_expert"):
            gate = torch.sigmoid(self.shared_expert_gate(flat))
            out = out + gate * self.shared_expert(flat)
        return out.reshape(x.shape)


class _DecoderLayer(nn.Module):
    def __init__(self, c: DecoderConfig, index: int):
        super().__init__()
        norm = (c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        self.norm1, self.attn = _LayerNorm(*norm), _Attention(c)
        if not c.parallel_block:
            self.norm2 = _LayerNorm(*norm)
        if c.moe_config is not None and c.moe_config.is_sparse(index):
            self.moe = _MoE(c, c.moe_config)
        else:
            self.mlp = _MLP(
                c.hidden_size,
                c.intermediate_size,
                c.hidden_act,
                c.gated_mlp,
                c.mlp_bias,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        feed = self.moe if hasattr(self, "moe") else self.mlp
        h = self.norm1(x)
        if not hasattr(self, "norm2"):
            return x + self.attn(h) + feed(h)
        x = x + self.attn(h)
        return x + feed(self.norm2(x))


class _Table(nn.Embedding):
    """Token embeddings; also the output layer, where it is tied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return F.linear(x, self.weight)
        return super().forward(x)


class Decoder(nn.Module):
    """Embeddings (B, L, D) to logits (B, L, V), called as transformers' models are."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = self.config = config
        self.embed_tokens = _Table(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            [_DecoderLayer(c, i) for i in range(c.num_hidden_layers)]
        )
        self.norm = _LayerNorm(c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=c.lm_head_bias)

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embed_tokens

    def forward(
        self, inputs_embeds: torch.Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x)
        head = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens
        return SimpleNamespace(logits=head(self.norm(x)))
