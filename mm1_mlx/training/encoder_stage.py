"""The first stage: the encoder alone, by contrast with text or by reconstruction.

MM1 (section 3.1) compares CLIP's contrastive encoders with AIM's reconstructive ones;
both objectives are here. What is learned beside the encoder is thrown away after it.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mm1_mlx.config import VisionConfig
from mm1_mlx.models.layers import MLP
from mm1_mlx.models.vision import VisionEncoder, patchify
from mm1_mlx.training.documents import Region


def box_weights(
    box: tuple[float, float, float, float], width: int, height: int, grid: int
) -> np.ndarray:
    """How much of a box lies on each patch of the padded square; sums to 1. (G*G,)."""
    side = max(width, height)
    left, top = (side - width) // 2 / side, (side - height) // 2 / side
    x0, x1 = (left + box[i] * width / side for i in (0, 2))
    y0, y1 = (top + box[i] * height / side for i in (1, 3))
    edges = np.arange(grid + 1) / grid
    across = np.clip(np.minimum(x1, edges[1:]) - np.maximum(x0, edges[:-1]), 0, None)
    down = np.clip(np.minimum(y1, edges[1:]) - np.maximum(y0, edges[:-1]), 0, None)
    weights = np.outer(down, across).reshape(-1).astype(np.float32)
    return weights / max(weights.sum(), 1e-9)


def contrast_arrays(
    pictures: list[tuple[tuple[int, int], list[Region]]],
    encode,
    grid: int,
    per_picture: int = 6,
    max_texts: int = 128,
    text_length: int = 8,
    whole: bool = False,
) -> tuple[np.ndarray, ...]:
    """Arrays of a contrastive batch.

    pictures: ((width, height), regions) of each picture; N is their number.
    per_picture, max_texts, text_length: R, U and W, the room; what is over is left out.
    whole: one region per picture, all its texts joined (CLIP's own form).
    Shapes:
        boxes: (N, R, G*G) float32; label: (N, R) int32 into texts, -1 where unused
        tokens: (U, W) int32, -1 where unused; texts that occur twice are one
    """
    N = len(pictures)
    boxes = np.zeros((N, per_picture, grid * grid), np.float32)
    label = np.full((N, per_picture), -1, np.int32)
    known: dict[str, int] = {}
    for n, ((width, height), regions) in enumerate(pictures):
        if whole:
            text = "; ".join(sorted(region.text for region in regions))
            regions = [Region((0.0, 0.0, 1.0, 1.0), text)]
        for r, region in enumerate(regions[:per_picture]):
            if region.text not in known and len(known) == max_texts:
                continue
            if not encode(region.text):
                continue  # no tokens: nothing to be told apart by
            boxes[n, r] = box_weights(region.box, width, height, grid)
            label[n, r] = known.setdefault(region.text, len(known))
    tokens = np.full((max_texts, text_length), -1, np.int32)
    for text, u in known.items():
        ids = encode(text)[:text_length]
        tokens[u, : len(ids)] = ids
    return boxes, label, tokens


class RegionText(nn.Module):
    """CLIP's symmetric loss between parts of pictures and short texts.

    The text side is a bag of token embeddings and an MLP: the texts are two or three
    words. Several regions may carry one text; each is a positive of it.

    Shapes:
        features: (N, P, width); boxes: (N, R, P); label: (N, R); tokens: (U, W)
        returns: loss (), accuracy of region -> text ()
    """

    def __init__(self, width: int, vocab_size: int, dims: int = 128):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.image_proj = nn.Linear(width, dims, bias=False)
        self.embed = nn.Embedding(vocab_size, dims)
        self.text_mlp = MLP(dims, 2 * dims, "relu2", gated=False)
        self.log_scale = mx.array(2.6)  # CLIP starts at ln(1 / 0.07)

    def compare(self, features, boxes, label, tokens):
        """Loss and accuracy; shapes as above."""
        features = self.norm(features)
        regions = self.image_proj(boxes @ features).reshape(
            -1, self.embed.weight.shape[1]
        )
        used = tokens >= 0
        words = self.embed(mx.maximum(tokens, 0)) * used[..., None]
        bag = words.sum(axis=1) / mx.maximum(used.sum(axis=1, keepdims=True), 1)
        texts = bag + self.text_mlp(bag)
        is_text = used.any(axis=1)  # (U,)
        label = label.reshape(-1)
        is_region = label >= 0
        scale = mx.exp(mx.minimum(self.log_scale, 4.6))  # CLIP's limit of 100
        scores = scale * (_unit(regions) @ _unit(texts).T)  # (N*R, U)
        scores = mx.where(is_text, scores, -1e4)
        positive = (label[:, None] == mx.arange(texts.shape[0])) & is_region[:, None]
        to_text = mx.logsumexp(scores, axis=1) - mx.where(positive, scores, 0).sum(1)
        count = mx.maximum(is_region.sum(), 1)
        loss_text = mx.where(is_region, to_text, 0).sum() / count
        column = mx.where(is_region[:, None], scores, -1e4)
        per_pair = mx.logsumexp(column, axis=0) - column  # (N*R, U)
        matches = positive.sum(axis=0)
        per_text = mx.where(positive, per_pair, 0).sum(axis=0) / mx.maximum(matches, 1)
        loss_region = per_text.sum() / mx.maximum((matches > 0).sum(), 1)
        right = (mx.argmax(scores, axis=1) == label) & is_region
        return 0.5 * (loss_text + loss_region), right.sum() / count


class RegionContrast(RegionText):
    """An encoder with what it learns to describe regions by; see RegionText.

    Shapes:
        pixel_values: (N, H, W, 3); boxes: (N, R, P); label: (N, R); tokens: (U, W)
        returns: loss (), accuracy of region -> text ()
    """

    def __init__(self, encoder: VisionEncoder, vocab_size: int, dims: int = 128):
        super().__init__(encoder.config.hidden_size, vocab_size, dims)
        self.vision = encoder

    def __call__(self, pixel_values, boxes, label, tokens, *, walk=None):
        features = self.vision(pixel_values, walk=walk)
        return self.compare(features, boxes, label, tokens)


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + 1e-6)


class Reconstruction(nn.Module):
    """AIM's objective: patches in raster order, each predicted from those before.

    A prefix of random length sees itself in full (AIM section 3.2), so that the encoder
    can be used without a mask afterwards. Targets are patches, each normalised by
    itself; the loss is the mean squared error outside the prefix.

    Shapes:
        pixel_values: (N, H, W, 3); prefix: (N,) int32, at least 1
        returns: loss (), the same again
    """

    def __init__(self, encoder: VisionEncoder):
        super().__init__()
        c: VisionConfig = encoder.config
        self.vision = encoder
        self.norm = nn.RMSNorm(c.hidden_size)
        self.head = MLP(c.hidden_size, 2 * c.hidden_size, "relu2", gated=False)
        self.pixels = nn.Linear(c.hidden_size, c.patch_size**2 * c.num_channels)

    def __call__(self, pixel_values, prefix, *, walk=None):
        patches = patchify(pixel_values, self.vision.config.patch_size)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])  # (N, P, .)
        mean = patches.mean(axis=-1, keepdims=True)
        spread = mx.sqrt(patches.var(axis=-1, keepdims=True) + 1e-4)
        target = (patches - mean) / spread
        guess = self.guesses(pixel_values, prefix, walk=walk)[:, :-1]
        error = mx.square(guess - target[:, 1:]).mean(axis=-1)  # (N, P-1)
        column = mx.arange(1, patches.shape[1])
        counted = (column[None] >= prefix[:, None]).astype(error.dtype)
        loss = (error * counted).sum() / mx.maximum(counted.sum(), 1)
        return loss, loss

    def guesses(self, pixel_values, prefix, *, walk=None):
        """What each patch, and those that it sees, say about the next one.

        Shapes:
            returns: (N, P, patch_size^2 * 3); the last of an image is about nothing
        """
        c: VisionConfig = self.vision.config
        rows, columns = (side // c.patch_size for side in pixel_values.shape[1:3])
        column = mx.arange(rows * columns)
        causal = column[None, :] <= column[:, None]  # (P, P)
        mask = causal[None] | (column[None, None, :] < prefix[:, None, None])
        skip = int(c.class_token)
        if skip:  # all see it, so it may see no more than all do: the prefix
            row = (column[None, :] < prefix[:, None])[:, None]  # (N, 1, P)
            mask = mx.concatenate([row, mask], axis=1)
            mask = mx.pad(mask, [(0, 0), (0, 0), (1, 0)], constant_values=True)
        mask = mask[:, None]
        x = self.vision.hidden_states(pixel_values, mask=mask, walk=walk)[-1][:, skip:]
        x = self.norm(x)
        return self.pixels(x + self.head(x))
