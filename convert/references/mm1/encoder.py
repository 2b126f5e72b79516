"""The image encoder: ViTs of CLIP, SigLIP, AIM, AIMv2 and tamm."""

from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F

from mm1_mlx.config import VisionConfig

from .layers import MLP, Norm


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
        self.norm1, self.norm2 = Norm(*norm), Norm(*norm)
        self.attn = _EncoderAttention(c)
        self.mlp = MLP(
            width, c.intermediate_size, c.hidden_act, c.gated_mlp, c.mlp_bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def resized(table: torch.Tensor, side: int) -> torch.Tensor:
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
            self.norm_in = Norm(*norm)
        self.layers = nn.ModuleList(
            [_EncoderLayer(c) for _ in range(c.num_hidden_layers)]
        )
        if c.norm_out:
            self.norm_out = Norm(*norm)

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
        table = resized(self.position_embedding[extra:], side)
        x = x + table
        if c.norm_in == "patches":
            x = self.norm_in(x)
        if c.class_token:
            first = self.class_embedding + self.position_embedding[:extra].sum(0)
            x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
        return self.norm_in(x) if c.norm_in == "all" else x

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last block's state. (N, 3, H, W) -> (N, P or P+1, Dv)"""
        x = self.embed(pixels)
        for layer in self.layers:
            x = layer(x)
        return x
