"""What encoder, connectors and decoder share."""

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Norm(nn.Module):
    """LayerNorm, or RMSNorm, over the last axis, in float32."""

    def __init__(self, kind: str, width: int, eps: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.centred = kind == "layer_norm"
        if self.centred and bias:
            self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape, in the type of x."""
        wide = x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out = wide.to(x.dtype) * self.weight
        return out + self.bias if hasattr(self, "bias") else out


class MLP(nn.Module):
    """Two layers with an activation between, or three with a gate (SwiGLU)."""

    def __init__(self, width: int, inner: int, act: str, gated: bool, bias: bool):
        super().__init__()
        rows = 2 * inner if gated else inner
        self.add_module(
            "gate_up_proj" if gated else "up_proj", nn.Linear(width, rows, bias=bias)
        )
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.gated, self.act = gated, ACTIVATIONS[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)"""
        if not self.gated:
            return self.down_proj(self.act(self.up_proj(x)))  # type: ignore[operator]
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # type: ignore[operator]
        return self.down_proj(self.act(gate) * up)
