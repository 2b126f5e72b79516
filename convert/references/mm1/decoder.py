"""The decoder: dense, or with experts in some layers."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from mm1_mlx.config import DecoderConfig, MoEConfig

from .layers import ACTIVATIONS, MLP, Norm


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
                Norm("rms_norm", size, c.norm_eps, False) for size in sizes
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention. x, result: (B, T, D)"""
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
        self.act = ACTIVATIONS[c.hidden_act]

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
            self.shared_expert = MLP(
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
        self.norm1, self.attn = Norm(*norm), _Attention(c)
        if not c.parallel_block:
            self.norm2 = Norm(*norm)
        if c.moe_config is not None and c.moe_config.is_sparse(index):
            self.moe = _MoE(c, c.moe_config)
        else:
            self.mlp = MLP(
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
        self.norm = Norm(c.norm_type, c.hidden_size, c.norm_eps, c.norm_bias)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=c.lm_head_bias)

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embed_tokens

    def forward(
        self, inputs_embeds: torch.Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        """Logits in .logits. (B, L, D) -> (B, L, V)"""
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x)
        head = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens
        return SimpleNamespace(logits=head(self.norm(x)))
