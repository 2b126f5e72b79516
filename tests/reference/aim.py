"""AIM, version 1, in PyTorch, written from its description (arXiv 2401.08541).

Patches through a convolution and a LayerNorm, plus sine and cosine positions; pre-norm
blocks without bias in the linear layers; LayerNorms with eps 1e-6; exact GELU. Weights
carry the public names, so that convert's table can be checked on them.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention


def positions(side: int, width: int) -> torch.Tensor:
    """(side*side, width): for each patch, four quarters: sin x, cos x, sin y, cos y."""
    quarter = width // 4
    table = torch.zeros(side * side, width)
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                frequency = 10000 ** (-k / quarter)
                for place, coordinate in ((0, column), (2 * quarter, row)):
                    angle = coordinate * frequency
                    table[row * side + column, place + k] = math.sin(angle)
                    table[row * side + column, place + quarter + k] = math.cos(angle)
    return table


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return self.proj(
            scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class AIM(nn.Module):
    """(N, 3, side*patch, side*patch) -> states after each block, and after the norm."""

    def __init__(self, width: int, blocks: int, heads: int, side: int, patch: int):
        super().__init__()
        self.table = positions(side, width)
        patchifier = nn.ModuleDict(
            {
                "proj": nn.Conv2d(3, width, patch, patch),
                "norm": nn.LayerNorm(width, eps=1e-6),
            }
        )
        self.preprocessor = nn.ModuleDict({"patchifier": patchifier})
        self.trunk = nn.ModuleDict(
            {
                "blocks": nn.ModuleList(Block(width, heads) for _ in range(blocks)),
                "post_trunk_norm": nn.LayerNorm(width, eps=1e-6),
            }
        )
        self.head = nn.Linear(width, 5)  # public files have one; the table drops it

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        patchifier = self.preprocessor["patchifier"]
        x = patchifier["proj"](x).flatten(2).transpose(1, 2)
        x = patchifier["norm"](x) + self.table
        states = []
        for block in self.trunk["blocks"]:
            x = block(x)
            states.append(x)
        return states, self.trunk["post_trunk_norm"](x)
