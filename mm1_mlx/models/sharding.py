"""A decoder divided over the processes of mlx.launch, for models that exceed one Mac.

Every process keeps its heads of each attention and its part of each MLP's and expert's
inner width, and their cache; two sums over all processes make a layer whole
(Megatron-LM, arXiv 1909.08053). Embeddings, norms, router and head stand on each, and
so do encoder and connector: they are small beside the decoder.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from mm1_mlx.config import DecoderConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.layers import MLP, Attention
from mm1_mlx.models.moe import Experts, MoE

Group = mx.distributed.Group


def shard_decoder(decoder: Decoder, group: Group) -> None:
    """Leave a decoder this process's share, in place; ConfigError where it cannot be.

    Weights that are still lazy are cut before they are computed. The decoder then gives
    the whole logits, if all processes call it with the same.
    """
    check_shares(decoder, group.size())
    for layer in decoder.layers:
        _shard_attention(layer.attn, group)
        if "moe" in layer:
            _shard_moe(layer.moe, group)
        else:
            _shard_mlp(layer.mlp, group)
    decoder.group = group


def check_shares(decoder: Decoder, processes: int) -> None:
    """ConfigError unless so many processes can share a decoder."""
    found = _units(decoder)
    wrong = [f"{n} {what}" for what, n in found.items() if n % processes]
    if not wrong:
        return
    fitting = [
        str(count)
        for count in range(2, min(found.values()) + 1)
        if not any(n % count for n in found.values())
    ]
    start = f"{' or '.join(fitting)} processes" if fitting else "a single process"
    raise ConfigError(
        f"{processes} processes cannot share this decoder: each would have a part of "
        f"its {' and its '.join(wrong[:3])}, which cannot be divided by {processes}. "
        f"Start {start}."
    )


def _units(decoder: Decoder) -> dict[str, int]:
    """What is divided, and into how many parts it can be at most."""
    c: DecoderConfig = decoder.config
    found = {"heads": c.num_attention_heads, "key-value heads": c.kv_heads}
    for layer in decoder.layers:
        found |= _columns("attention's o_proj", layer.attn.o_proj)
        if "moe" not in layer:
            found |= _columns("MLP's down_proj", layer.mlp.down_proj)
            continue
        found |= _columns("experts' down_proj", layer.moe.experts.down_proj)
        if "shared_expert" in layer.moe:
            shared = layer.moe.shared_expert.down_proj
            found |= _columns("shared expert's down_proj", shared)
    return found


def _columns(name: str, weight: Any) -> dict[str, int]:
    """The columns of a weight, or the groups that a packed one can be cut between."""
    if not isinstance(weight, mx.array) and "scales" in weight:
        size = weight.group_size
        return {f"quantized groups of {size} in {name}": weight.scales.shape[-1]}
    array: Any = weight if isinstance(weight, mx.array) else weight.weight
    return {f"columns of {name}": array.shape[-1]}


def _shard_attention(attention: Attention, group: Group) -> None:
    a: Any = attention
    size = group.size()
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    parts = [queries, queries + keys]  # where k and v begin
    shard_inplace(a.qkv_proj, "all-to-sharded", segments=parts, group=group)
    a.o_proj = shard_linear(a.o_proj, "sharded-to-all", group=group)
    a.num_heads //= size
    a.num_kv_heads //= size
    if a.norms_all_heads:
        a.q_norm = DividedRMSNorm(a.q_norm, group)
        a.k_norm = DividedRMSNorm(a.k_norm, group)


class DividedRMSNorm(nn.Module):
    """RMSNorm over numbers that lie on all processes. (..., own) -> (..., own)."""

    def __init__(self, whole: nn.RMSNorm, group: Group):
        super().__init__()
        own = whole.weight.shape[0] // group.size()
        start = group.rank() * own
        self.weight = mx.contiguous(whole.weight[start : start + own])
        self._eps, self._group = whole.eps, group

    def __call__(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        squares = mx.square(wide).mean(axis=-1, keepdims=True)
        squares = mx.distributed.all_sum(squares, group=self._group)
        wide = wide * mx.rsqrt(squares / self._group.size() + self._eps)
        return wide.astype(x.dtype) * self.weight


def _shard_mlp(mlp: MLP, group: Group, *, sums: bool = True) -> None:
    """sums: whether down_proj gives the sum over all processes, or its part."""
    if "gate_up_proj" in mlp:
        up = mlp.gate_up_proj
        shard_inplace(up, "all-to-sharded", segments=2, group=group)
    else:
        shard_inplace(mlp.up_proj, "all-to-sharded", group=group)
    if sums:
        mlp.down_proj = shard_linear(mlp.down_proj, "sharded-to-all", group=group)
    else:
        shard_inplace(mlp.down_proj, "sharded-to-all", group=group)


def _shard_moe(moe: MoE, group: Group) -> None:
    """Every expert is divided, so each process has as much to do, whoever is chosen."""
    _shard_experts(moe.experts, group)
    if "shared_expert" in moe:  # it has no bias, which would count once per process
        _shard_mlp(moe.shared_expert, group, sums=False)
    moe.group = group  # which sums both at once


def _shard_experts(experts: Experts, group: Group) -> None:
    segments = 2 if "gate_up_proj" in experts else 1

    def cut(path: str, weight: mx.array):
        if path == "down_proj_bias":
            return None
        if path.startswith("down_proj"):
            return -1
        return (-1 if path.endswith("_bias") else 1), segments

    shard_inplace(experts, cut, group=group)
    if "down_proj_bias" in experts and group.rank():  # added once, by the first
        experts.down_proj_bias = mx.zeros_like(experts.down_proj_bias)
