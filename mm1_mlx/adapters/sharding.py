"""A model divided over several processes, with its adapter.

A pair is cut as its weight is. Beside rows (q, k, v, gate, up) each process has all of
lora_a and its part of lora_b; beside columns (o, down) it is the other way round, and
what the pairs give is summed with what the weight gives.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.adapters.folder import adapted_layers
from mm1_mlx.adapters.fuse import without_adapter
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack, Pair, Rows
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.sharding import Group, shard_decoder
from mm1_mlx.quantization.modules import replace_module

_COLUMNS = ("o_proj", "down_proj")


def shard_model(model: MM1, group: Group) -> None:
    """Leave a model this process's share of the decoder, in place.

    ConfigError where so many processes cannot share it; see models.sharding.
    """
    layers = adapted_layers(model)
    # DoRA's lengths are of whole rows: of columns alone they could not be known.
    lengths = {
        path: layer.row_scales()
        for path, layer in layers.items()
        if layer.settings.dora and path.endswith(_COLUMNS)
    }
    mark = model.decoder.adapter
    without_adapter(model)
    shard_decoder(model.decoder, group)
    modules: Any = dict(model.named_modules())
    for path, layer in layers.items():
        owner, _, last = path.rpartition(".")
        if path.startswith("decoder.layers."):  # else it is not divided
            base = modules[owner][last]
            if last in _COLUMNS:
                layer = _columns(layer, base, lengths.get(path), group)
            else:
                layer = _rows(layer, base, group)
        replace_module(model, path, layer)
    model.decoder.adapter = mark


def _own(size: int, group: Group) -> slice:
    part = size // group.size()
    return slice(group.rank() * part, (group.rank() + 1) * part)


def _rows(layer: Any, base: Any, group: Group) -> Any:
    """The layer around this process's rows of every projection."""
    parts, start = [], 0
    for part in layer.projections:
        size = (part.stop - part.start) // group.size()
        parts.append(Rows(part.name, start, start + size))
        start += size
    kind = AdaptedStack if isinstance(layer, AdaptedStack) else AdaptedLinear
    own = kind(base, parts, layer.settings)
    for name, pair in layer.pairs.items():
        b, m = pair.lora_b, pair.get("m")
        cut = _own(b.shape[1], group)  # lora_b: (r, out), of a stack (E, out, r)
        m = None if m is None else m[..., cut]
        own.pairs[name] = Pair(pair.lora_a, b[:, cut], m)
    return own


def _columns(layer: Any, base: Any, lengths: mx.array | None, group: Group) -> Any:
    """The layer around this process's columns; with the sum, where its owner has none.

    lengths: DoRA's, of the whole rows.
    """
    stack = isinstance(layer, AdaptedStack)
    kind = _StackColumns if stack else _LinearColumns
    own = kind(base if stack else _part(base), layer.projections, layer.settings)
    own._scales = lengths
    for name, pair in layer.pairs.items():
        a = pair.lora_a  # (in, r), of a stack (E, r, in)
        cut = _own(a.shape[-1 if stack else 0], group)
        own.pairs[name] = Pair(a[..., cut] if stack else a[cut], pair.lora_b, None)
    if stack or not _sums(base):
        return own
    return SummedLinear(own, base.get("bias"), group)


class _LinearColumns(AdaptedLinear):
    _scales: Any

    def row_scales(self) -> mx.array:
        return self._scales


class _StackColumns(AdaptedStack):
    _scales: Any

    def row_scales(self) -> mx.array:
        return self._scales


class SummedLinear(nn.Module):
    """What a layer gives with this process's columns, summed over all processes.

    bias: added once. (..., own) -> (..., out)
    """

    def __init__(self, part: nn.Module, bias: mx.array | None, group: Group):
        super().__init__()
        self.part = part
        if bias is not None:
            self.bias = bias
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self.part(x), group=self._group)
        return y + self.bias if "bias" in self else y


def _sums(base: nn.Module) -> bool:
    """Whether a layer is MLX's own that sums over its group."""
    return isinstance(base, nn.ShardedToAllLinear | nn.QuantizedShardedToAllLinear)


def _part(base: Any) -> Any:
    """A layer of this process's columns that does not sum, and has no bias."""
    if isinstance(base, nn.ShardedToAllLinear):
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = base.weight
        return plain
    if not isinstance(base, nn.QuantizedShardedToAllLinear):
        return base
    packed = nn.QuantizedLinear(
        base.group_size, 1, False, base.group_size, base.bits, base.mode
    )
    packed.weight, packed.scales = base.weight, base.scales
    if base.get("biases") is not None:
        packed.biases = base.biases
    else:
        packed.pop("biases", None)
    return packed
