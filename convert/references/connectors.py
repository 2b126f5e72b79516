"""Connectors and experts that transformers does not have, small and plain.

Parameters are named as in the checkpoints: honeybee/projectors/projectors.py with
timm's regnet.py for the C-Abstractor; MoE-LLaVA with DeepSpeed's MoE layer, its noise
off; LLaVA's llava/model/multimodal_projector/builder.py.
"""

from itertools import pairwise
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """LLaVA's projector: linear layers with exact GELU between.

    names: of its linear layers, in order.
    """

    def __init__(self, sizes: list[int], names: list[str]):
        super().__init__()
        for name, (a, b) in zip(names, pairwise(sizes), strict=True):
            self.add_module(name, nn.Linear(a, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, P, Dv) -> (N, P, D)."""
        for k, linear in enumerate(self.children()):
            x = linear(F.gelu(x) if k else x)
        return x


class _Norm(nn.Module):
    """LayerNorm over the channels of a map. (N, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)
        return x.permute(0, 3, 1, 2)


class _Conv(nn.Module):
    def __init__(self, a: int, b: int, size: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(a, b, size, padding=size // 2, groups=groups, bias=False)
        self.bn = _Norm(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class _Squeeze(nn.Module):
    def __init__(self, width: int, reduced: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(mean))))


class _Block(nn.Module):
    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv1, self.conv2 = _Conv(a, b), _Conv(b, b, 3, b)
        self.se, self.conv3 = _Squeeze(b, round(a * 0.25)), _Conv(b, b)
        if a != b:
            self.downsample = _Conv(a, b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        y = self.conv3(self.se(y))
        return F.silu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor.

    positions: rows of its position table as stored, 0 for none. One more than a square
    has a row for the class token, which is dropped; another grid than the map's is
    resized, as 360VL does.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        queries: int,
        positions: int,
        depth: int = 3,
        mlp_depth: int = 2,
    ):
        super().__init__()
        self.queries, self.positions = queries, positions
        if positions:
            self.pos_emb = nn.Parameter(torch.zeros(1, positions, width))
        first = {
            f"b{i + 1}": _Block(hidden if i else width, hidden) for i in range(depth)
        }
        second = {f"b{i + 1}": _Block(hidden, hidden) for i in range(depth)}
        self.net = nn.ModuleDict(
            {"0": nn.ModuleDict(first), "2": nn.ModuleDict(second)}
        )
        sizes = [hidden] + [out] * mlp_depth
        self.readout = nn.ModuleDict(
            {str(2 * i): nn.Linear(sizes[i], sizes[i + 1]) for i in range(mlp_depth)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, P, Dv) -> (N, Q, D)."""
        side = isqrt(x.shape[1])
        if self.positions:
            x = x + self._table(side)
        x = x.transpose(1, 2).reshape(len(x), -1, side, side)
        for block in self.net["0"].values():  # type: ignore[operator]
            x = block(x)
        x = F.adaptive_avg_pool2d(x, isqrt(self.queries))
        for block in self.net["2"].values():  # type: ignore[operator]
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        for k, linear in enumerate(self.readout.values()):
            x = linear(F.silu(x) if k else x)
        return x

    def _table(self, side: int) -> torch.Tensor:
        table = self.pos_emb
        if isqrt(table.shape[1]) ** 2 != table.shape[1]:
            table = table[:, 1:]
        own = isqrt(table.shape[1])
        if own == side:
            return table
        grid = table.reshape(1, own, own, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic")
        return grid.flatten(2).transpose(1, 2)


class _Expert(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _PhiExpert(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DeepSpeedMoE(nn.Module):
    """MoE-LLaVA's experts: top-k of a softmax, the weights scaled to sum to 1.

    phi: two layers with biases and a GELU between, instead of three with a gate.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int, *, phi: bool = False
    ):
        super().__init__()
        one = _PhiExpert if phi else _Expert
        self.top_k = top_k
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(width, experts, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(
            [one(width, hidden) for _ in range(experts)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        flat = x.reshape(-1, x.shape[-1])
        chances = torch.softmax(self.deepspeed_moe.gate.wg(flat), dim=-1)  # type: ignore
        best, chosen = chances.topk(self.top_k, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        experts: nn.ModuleList = self.deepspeed_moe.experts.deepspeed_experts  # type: ignore
        for e, expert in enumerate(experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += best[rows, place, None] * expert(flat[rows])
        return out.reshape(x.shape)
