"""The connectors that MM1 section 3.2 compares, and LLaVA's MLP."""

from itertools import pairwise
from math import ceil, isqrt

import torch
from torch import nn
from torch.nn import functional as F

from mm1_mlx.config import ConnectorConfig

from .encoder import resized
from .layers import ACTIVATIONS, MLP, Norm


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
        self.act = ACTIVATIONS[act]

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

        def norm(size: int) -> Norm:
            return Norm("layer_norm", size, c.norm_eps, c.norm_bias)

        self.conv1, self.norm1 = nn.Linear(width_in, inner, bias=False), norm(inner)
        self.conv2, self.norm2 = _Depthwise(inner), norm(inner)
        self.se = _Squeeze(inner, reduced, c.hidden_act, c.squeeze_bias)
        self.conv3, self.norm3 = nn.Linear(inner, width, bias=False), norm(width)
        if width_in != width:
            self.shortcut = nn.Linear(width_in, width, bias=False)
            self.shortcut_norm = norm(width)
        self.act = ACTIVATIONS[c.hidden_act]

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
        hidden, self.act = c.hidden_size, ACTIVATIONS[c.hidden_act]
        if c.norm_input:
            self.norm_input = Norm("layer_norm", width, c.norm_eps, True)
        if c.norm_output:
            self.norm_output = Norm("rms_norm", dims, c.norm_eps, False)
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
            self.input_norm = Norm("layer_norm", hidden, c.norm_eps, True)
            self.layers = nn.ModuleList([_Reader(c) for _ in range(c.depth)])
            self.proj = nn.Linear(hidden, dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image tokens of patch features. (N, P, Dv) -> (N, Q, D)"""
        c = self.config
        if c.norm_input:
            x = self.norm_input(x)
        if hasattr(self, "position_embedding"):
            x = x + resized(self.position_embedding, isqrt(x.shape[1]))
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
        self.norm1 = Norm("layer_norm", width, c.norm_eps, True)
        self.norm2 = Norm("layer_norm", width, c.norm_eps, True)
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.o_proj = nn.Linear(width, width)
        self.mlp = MLP(width, 4 * width, c.hidden_act, False, True)

    def forward(self, x: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        def split(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.kv_proj(patches).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(
            split(self.q_proj(self.norm1(x))), split(k), split(v)
        )
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
