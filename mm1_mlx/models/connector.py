"""From encoder patches to decoder tokens: the connectors that MM1 section 3.2 compares.

MM1 found the number of tokens and the resolution to matter, the type not; it uses the
C-Abstractor with 144 tokens.
"""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import ConnectorConfig, VisionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.layers import MLP, activation
from mm1_mlx.models.vision import resize_grid


def adaptive_bins(size_in: int, size_out: int) -> list[tuple[int, int]]:
    """Windows of torch.nn.AdaptiveAvgPool2d along one axis: (start, stop) each.

    size_in need not divide by size_out (27 -> 12 does not): windows then overlap.
    """
    return [
        (i * size_in // size_out, -(-(i + 1) * size_in // size_out))
        for i in range(size_out)
    ]


def strided_bins(size_in: int, size_out: int) -> list[tuple[int, int]]:
    """Windows of Apple's tamm (layers/pooler.py): equal stride and width.

    ConfigError where size_out is larger: the stride would be 0.
    """
    if size_out > size_in:
        raise ConfigError(
            f"connector_config.pooling is 'strided', which cannot make {size_out} "
            f"windows of {size_in} patches: use 'adaptive', or fewer query tokens."
        )
    stride = size_in // size_out
    width = size_in - (size_out - 1) * stride
    return [(i * stride, i * stride + width) for i in range(size_out)]


class GridPool(nn.Module):
    """Average-pool a grid of patches to a smaller square grid.

    Shapes:
        x: (N, rows, columns, D)
        returns: (N, S, S, D)
    """

    def __init__(self, grid_out: int, rule: str = "adaptive"):
        super().__init__()
        self.grid_out = grid_out
        self._rule = adaptive_bins if rule == "adaptive" else strided_bins
        self._matrices: dict[int, mx.array] = {}

    def _matrix(self, size_in: int) -> mx.array:
        if size_in not in self._matrices:
            rows = []
            for start, stop in self._rule(size_in, self.grid_out):
                row = [0.0] * size_in
                row[start:stop] = [1 / (stop - start)] * (stop - start)
                rows.append(row)
            self._matrices[size_in] = mx.array(rows)  # a constant, not a weight
        return self._matrices[size_in]

    def __call__(self, x: mx.array) -> mx.array:
        down = self._matrix(x.shape[1]).astype(x.dtype)
        across = self._matrix(x.shape[2]).astype(x.dtype)
        x = mx.einsum("sg,nghd->nshd", down, x)  # rows
        return mx.einsum("th,nshd->nstd", across, x)  # columns


def to_grid(x: mx.array) -> mx.array:
    """(N, P, D) -> (N, G, G, D); P must be a square."""
    N, P, D = x.shape
    side = math.isqrt(P)
    if side * side != P:
        raise ValueError(f"{P} patches are not a square grid.")
    return x.reshape(N, side, side, D)


def depthwise_conv3x3(x: mx.array, weight: mx.array) -> mx.array:
    """A 3x3 convolution of each channel by itself, zero padding 1.

    On the CPU back end as nine shifted products: its grouped convolution is 30 times
    slower. Same sums, same gradient.

    Shapes:
        x: (N, G, G, C); weight: (C, 3, 3, 1)
        returns: (N, G, G, C)
    """
    if mx.default_device().type != mx.cpu:
        return mx.conv2d(x, weight, padding=1, groups=x.shape[-1])
    rows, columns = x.shape[1:3]
    padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    taps = [
        padded[:, i : i + rows, j : j + columns] * weight[:, i, j, 0]
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps[1:], taps[0])


class SqueezeExcite(nn.Module):
    """Weighs channels by what the whole picture holds. (N, G, G, C) -> the same."""

    def __init__(self, dims: int, reduced: int, act: str, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(dims, reduced, bias=bias)
        self.fc2 = nn.Linear(reduced, dims, bias=bias)
        self._act = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        mean = x.mean(axis=(1, 2), keepdims=True)
        return x * mx.sigmoid(self.fc2(self._act(self.fc1(mean))))


class BottleneckBlock(nn.Module):
    """One block of the C-Abstractor: timm's RegNet bottleneck with LayerNorms.

    1x1, norm, act; depthwise 3x3, norm, act; squeeze-excite; 1x1, norm; add the
    shortcut; act. (Honeybee: honeybee/projectors/projectors.py; timm: regnet.py.)

    Shapes:
        x: (N, G, G, C_in)
        returns: (N, G, G, C)
    """

    def __init__(self, dims_in: int, config: ConnectorConfig):
        super().__init__()
        c, dims = config, config.hidden_size
        inner = c.inner_width(dims_in)

        def layer_norm(width: int) -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=c.norm_eps, bias=c.norm_bias)

        self.conv1 = nn.Linear(dims_in, inner, bias=False)
        self.norm1 = layer_norm(inner)
        self.conv2 = DepthwiseConv(inner)
        self.norm2 = layer_norm(inner)
        reduced = c.squeeze_width(dims_in)
        self.se = SqueezeExcite(inner, reduced, c.hidden_act, c.squeeze_bias)
        self.conv3 = nn.Linear(inner, dims, bias=False)
        self.norm3 = layer_norm(dims)
        self._resized = dims_in != dims
        if self._resized:
            self.shortcut = nn.Linear(dims_in, dims, bias=False)
            self.shortcut_norm = layer_norm(dims)
        self._act = activation(c.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        y = self._act(self.norm1(self.conv1(x)))
        y = self._act(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(self.se(y)))
        shortcut = self.shortcut_norm(self.shortcut(x)) if self._resized else x
        return self._act(y + shortcut)


class DepthwiseConv(nn.Module):
    """The weight of depthwise_conv3x3."""

    def __init__(self, dims: int):
        super().__init__()
        self.weight = mx.random.uniform(-1 / 3, 1 / 3, (dims, 3, 3, 1))

    def __call__(self, x: mx.array) -> mx.array:
        return depthwise_conv3x3(x, self.weight)


class Connector(nn.Module):
    """What all connectors share: an optional norm before and after.

    norm_output puts image tokens on the scale of text embeddings (our choice; off for
    Honeybee's and LLaVA's weights). Subclasses define `project`.

    Shapes:
        x: (N, P, Dv)
        returns: (N, Q, D)
    """

    def __init__(self, config: ConnectorConfig, width: int, dims: int):
        super().__init__()
        self.config = config
        if config.norm_input:
            self.norm_input = nn.LayerNorm(width, eps=config.norm_eps)
        if config.norm_output:
            self.norm_output = nn.RMSNorm(dims, eps=config.norm_eps)
        if config.num_eos_tokens:
            self.eos_tokens = mx.random.normal((config.num_eos_tokens, dims)) * 0.02

    def __call__(self, x: mx.array) -> mx.array:
        if self.config.norm_input:
            x = self.norm_input(x)
        x = self.project(x)
        if self.config.norm_output:
            x = self.norm_output(x)
        if self.config.num_eos_tokens:
            ends = self.eos_tokens.astype(x.dtype)
            ends = mx.broadcast_to(ends, (x.shape[0], *ends.shape))
            x = mx.concatenate([x, ends], axis=1)
        return x

    def project(self, x: mx.array) -> mx.array:
        """(N, P, Dv) -> (N, Q, D)."""
        raise TypeError(f"{type(self).__name__} does not define project().")


class AveragePool(Connector):
    """Pool the grid, then one linear layer (MM1 section 3.2, as in Emu2)."""

    def __init__(self, config: ConnectorConfig, width: int, dims: int, patches: int):
        super().__init__(config, width, dims)
        side = math.isqrt(config.num_query_tokens or 0)
        self._pool = GridPool(side, config.pooling)
        self.proj = nn.Linear(width, dims)

    def project(self, x: mx.array) -> mx.array:
        """(N, P, Dv) -> (N, Q, D)."""
        x = self._pool(to_grid(x))
        return self.proj(x.reshape(x.shape[0], -1, x.shape[-1]))


class CAbstractor(Connector):
    """Convolution blocks, a pool to the wanted grid, blocks again, an MLP (Honeybee).

    Apple's tamm differs by config: variant "tamm" (widths inside), hidden_act "relu",
    norm_bias and squeeze_bias False, pooling "strided".
    """

    def __init__(self, config: ConnectorConfig, width: int, dims: int, patches: int):
        super().__init__(config, width, dims)
        c, hidden = config, config.hidden_size
        if c.position_embedding:
            self.position_embedding = mx.random.normal((patches, width)) * 0.02
        side = math.isqrt(c.num_query_tokens or 0)
        widths = [width] + [hidden] * max(c.depth - 1, 0)
        self.stage1 = [BottleneckBlock(w, c) for w in widths[: c.depth]]
        self._pool = GridPool(side, c.pooling)
        after = hidden if c.depth else width
        self.stage2 = [BottleneckBlock(hidden, c) for _ in range(c.depth)]
        between = [c.readout_width(dims)] * (c.mlp_depth - 1)
        rows = [after, *between, dims]
        self.readout = [nn.Linear(a, b) for a, b in pairwise(rows)]
        self._act = activation(c.hidden_act)

    def project(self, x: mx.array) -> mx.array:
        """(N, P, Dv) -> (N, Q, D)."""
        if self.config.position_embedding:
            side = math.isqrt(x.shape[1])
            x = x + resize_grid(self.position_embedding, side, side)
        x = to_grid(x)
        for block in self.stage1:
            x = block(x)
        x = self._pool(x)
        for block in self.stage2:
            x = block(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, Q, C), row by row
        for j, linear in enumerate(self.readout):
            x = linear(self._act(x) if j else x)
        return x


class CrossAttentionLayer(nn.Module):
    """Queries read the patches, then an MLP; both pre-norm with a residual."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        c, dims = config, config.hidden_size
        self.num_heads = c.num_attention_heads
        self.norm1 = nn.LayerNorm(dims, eps=c.norm_eps)
        self.q_proj = nn.Linear(dims, dims)
        self.kv_proj = nn.Linear(dims, 2 * dims)
        self.o_proj = nn.Linear(dims, dims)
        self.norm2 = nn.LayerNorm(dims, eps=c.norm_eps)
        self.mlp = MLP(dims, 4 * dims, c.hidden_act, gated=False, bias=True)

    def __call__(self, queries: mx.array, patches: mx.array) -> mx.array:
        N, Q, D = queries.shape
        heads, hd = self.num_heads, D // self.num_heads

        def split(x: mx.array) -> mx.array:
            return x.reshape(N, -1, heads, hd).swapaxes(1, 2)  # (N, heads, ., hd)

        k, v = mx.split(self.kv_proj(patches), 2, axis=-1)
        out = mx.fast.scaled_dot_product_attention(
            split(self.q_proj(self.norm1(queries))), split(k), split(v), scale=hd**-0.5
        )
        x = queries + self.o_proj(out.swapaxes(1, 2).reshape(N, Q, D))
        return x + self.mlp(self.norm2(x))


class AttentionPool(Connector):
    """Learned queries that read the patches (MM1 section 3.2; depth and widths ours).

    MM1 gives only the number of queries. Pre-norm cross-attention with a 4x MLP follows
    axlearn's AttentionPooling (common/poolings.py).
    """

    def __init__(self, config: ConnectorConfig, width: int, dims: int, patches: int):
        super().__init__(config, width, dims)
        c, hidden = config, config.hidden_size
        if c.position_embedding:
            self.position_embedding = mx.random.normal((patches, width)) * 0.02
        self.queries = mx.random.normal((c.num_query_tokens or 0, hidden)) * 0.02
        self.input_proj = nn.Linear(width, hidden)
        self.input_norm = nn.LayerNorm(hidden, eps=c.norm_eps)
        self.layers = [CrossAttentionLayer(c) for _ in range(c.depth)]
        self.proj = nn.Linear(hidden, dims)

    def project(self, x: mx.array) -> mx.array:
        """(N, P, Dv) -> (N, Q, D)."""
        if self.config.position_embedding:
            side = math.isqrt(x.shape[1])
            x = x + resize_grid(self.position_embedding, side, side)
        patches = self.input_norm(self.input_proj(x))
        queries = self.queries.astype(patches.dtype)
        queries = mx.broadcast_to(queries, (x.shape[0], *queries.shape))
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.proj(queries)


class MLPConnector(Connector):
    """LLaVA's projector: every patch through an MLP (mlp_depth linears)."""

    def __init__(self, config: ConnectorConfig, width: int, dims: int, patches: int):
        super().__init__(config, width, dims)
        self.linear = [
            nn.Linear(width if j == 0 else dims, dims) for j in range(config.mlp_depth)
        ]
        self._act = activation(config.hidden_act)

    def project(self, x: mx.array) -> mx.array:
        """(N, P, Dv) -> (N, P, D)."""
        for j, linear in enumerate(self.linear):
            x = linear(self._act(x) if j else x)
        return x


_KINDS = {
    "average_pool": AveragePool,
    "attention_pool": AttentionPool,
    "c_abstractor": CAbstractor,
    "mlp": MLPConnector,
}


def make_connector(
    config: ConnectorConfig, vision: VisionConfig, dims: int, tiles: int = 1
) -> Connector:
    """The connector of a config, from this encoder to decoder width `dims`.

    tiles: how many pictures' patches it reads as one map.
    """
    kind = _KINDS[config.type]
    return kind(config, vision.hidden_size, dims, tiles * vision.num_patches)
