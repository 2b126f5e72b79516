"""The image encoder: one ViT with switches for CLIP/DFN, SigLIP, AIM, AIMv2, tamm."""

import math
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import VisionConfig
from mm1_mlx.models.layers import MLP, Attention, Mask, norm
from mm1_mlx.models.walk import LayerWalk


def patchify(pixel_values: mx.array, patch_size: int) -> mx.array:
    """Pixels cut into patches, each flattened as row, column, channel.

    A pixel beyond the last whole patch is dropped, as a strided convolution does.

    Shapes:
        pixel_values: (N, H, W, C)
        returns: (N, H//p, W//p, p*p*C)
    """
    N, H, W, C = pixel_values.shape
    p = patch_size
    rows, columns = H // p, W // p
    x = pixel_values[:, : rows * p, : columns * p]
    x = x.reshape(N, rows, p, columns, p, C).swapaxes(2, 3)
    return x.reshape(N, rows, columns, p * p * C)


def bicubic_matrix(size_in: int, size_out: int) -> list[list[float]]:
    """Weights (size_out, size_in) of antialiased bicubic resampling (a = -0.5).

    The same numbers as torch's interpolate(mode="bicubic", antialias=True,
    align_corners=False), which open_clip uses (open_clip/model.py).
    """

    def cubic(x: float) -> float:
        x = abs(x)
        if x < 1:
            return (1.5 * x - 2.5) * x * x + 1
        return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0

    scale = size_in / size_out
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size_out):
        centre = (i + 0.5) * scale
        start = max(int(centre - 2 * stretch + 0.5), 0)
        stop = min(int(centre + 2 * stretch + 0.5), size_in)
        row = [0.0] * size_in
        for j in range(start, stop):
            row[j] = cubic((j - centre + 0.5) / stretch)
        total = math.fsum(row)
        rows.append([w / total for w in row])
    return rows


@lru_cache(maxsize=64)
def _resampling(size_in: int, size_out: int) -> mx.array:
    """bicubic_matrix as an array, kept: it depends on the sizes alone."""
    return mx.array(bicubic_matrix(size_in, size_out))


def resize_grid(table: mx.array, rows: int, columns: int) -> mx.array:
    """A position table on a square grid, resampled to another grid.

    Only the matrices are kept between calls. The result is made anew, because nothing
    tells that a table was written in place (`table[0] = 5.0`); that is two products,
    0.01% of the arithmetic of a ViT-L that reads 672 pixels with a table of 336.

    Shapes:
        table: (G*G, D)
        returns: (rows*columns, D)
    """
    side = math.isqrt(table.shape[0])
    if (rows, columns) == (side, side):
        return table
    grid = table.astype(mx.float32).reshape(side, side, -1)
    grid = mx.einsum("rg,ghd->rhd", _resampling(side, rows), grid)
    grid = mx.einsum("ch,rhd->rcd", _resampling(side, columns), grid)
    return grid.reshape(rows * columns, -1).astype(table.dtype)


class EncoderLayer(nn.Module):
    """A pre-norm transformer block. (N, T, Dv) -> (N, T, Dv)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = config
        width, eps = c.hidden_size, c.norm_eps
        self.norm1 = norm(c.norm_type, width, eps, c.norm_bias)
        self.attn = Attention(
            width,
            c.num_attention_heads,
            c.size_per_head,
            qkv_bias=c.qkv_bias,
            out_bias=c.attention_out_bias,
        )
        self.norm2 = norm(c.norm_type, width, eps, c.norm_bias)
        self.mlp = MLP(
            width,
            c.intermediate_size,
            c.hidden_act,
            gated=c.gated_mlp,
            bias=c.mlp_bias,
        )

    def __call__(self, x: mx.array, mask: Mask = None) -> mx.array:
        x = x + self.attn(x, mask, before=self.norm1)
        return x + self.mlp(x, self.norm2)


class VisionEncoder(nn.Module):
    """Pictures to patch features, without the class token.

    Shapes:
        pixel_values: (N, H, W, 3), any H and W of at least one patch
        returns: (N, P, Dv), row by row
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        c = config
        width, eps = c.hidden_size, c.norm_eps
        inputs = c.patch_size**2 * c.num_channels
        self.patch_embed = nn.Linear(inputs, width, bias=c.patch_bias)
        positions = c.num_patches
        if c.class_token:
            self.class_embedding = mx.zeros((width,))
            positions += c.norm_in != "patches"  # tamm: the class token has no place
        self.position_embedding = mx.random.normal((positions, width)) * 0.02
        if c.norm_in is not None:
            self.norm_in = norm(c.norm_type, width, eps, c.norm_bias)
        self.layers = [EncoderLayer(c) for _ in range(c.num_hidden_layers)]
        if c.norm_out:
            self.norm_out = norm(c.norm_type, width, eps, c.norm_bias)

    def __call__(
        self, pixel_values: mx.array, *, walk: LayerWalk | None = None
    ) -> mx.array:
        stop = self.config.feature_layer
        states = self.hidden_states(pixel_values, stop=stop, walk=walk)
        x = states[-1]
        if self.config.feature_norm:
            x = self.norm_out(x)
        return x[:, 1:] if self.config.class_token else x

    @property
    def used_layers(self) -> int:
        """How many blocks the features come from: those after them change nothing."""
        return len(self.layers) + 1 + self.config.feature_layer

    def hidden_states(
        self,
        pixel_values: mx.array,
        *,
        stop: int = -1,
        mask: Mask = None,
        walk: LayerWalk | None = None,
    ) -> list[mx.array]:
        """Embeddings, then every block's output up to block `stop` (-1: the last).

        The class token, where there is one, stands first; no output norm is applied.
        mask: for AIM's prefix attention; None is full attention. walk: of a training
        step, which is given the last state alone: a list would hold all of them.

        Shapes:
            returns: each (N, P or P+1, Dv)
        """
        states = [self.embed(pixel_values)]
        for i, layer in enumerate(self.layers[: len(self.layers) + 1 + stop]):
            x = states[-1]
            if walk is None:
                states.append(layer(x, mask))
                continue

            def run(x: mx.array, _: list, layer=layer) -> mx.array:
                return layer(x, mask)

            states = [walk.through(f"vision.layers.{i}", layer, x, run)]
        return states

    def embed(self, pixel_values: mx.array) -> mx.array:
        """Patches, class token and positions. (N, H, W, 3) -> (N, P or P+1, Dv)."""
        c = self.config
        x = patchify(pixel_values, c.patch_size).astype(self.patch_embed.weight.dtype)
        N, rows, columns, _ = x.shape
        x = self.patch_embed(x.reshape(N, rows * columns, -1))  # (N, P, Dv)
        if c.norm_in == "embed":
            x = self.norm_in(x)
        positions = self._positions(rows, columns)
        if not c.class_token:
            x = x + positions
            return self.norm_in(x) if c.norm_in in ("all", "patches") else x
        first = mx.broadcast_to(self.class_embedding, (N, 1, c.hidden_size))
        if c.norm_in == "patches":
            x = self.norm_in(x + positions)
            return mx.concatenate([first.astype(x.dtype), x], axis=1)
        x = mx.concatenate([first.astype(x.dtype), x], axis=1) + positions
        return self.norm_in(x) if c.norm_in == "all" else x

    def _positions(self, rows: int, columns: int) -> mx.array:
        table = self.position_embedding
        if (rows, columns) == (self.config.grid, self.config.grid):
            return table
        extra = table.shape[0] - self.config.num_patches  # the class row is kept
        grid = resize_grid(table[extra:], rows, columns)
        return mx.concatenate([table[:extra], grid], axis=0) if extra else grid
