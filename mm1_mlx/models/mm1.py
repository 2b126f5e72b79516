"""MM1: image encoder, connector and decoder as one model (arXiv 2403.09611)."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import MM1Error
from mm1_mlx.grids import Layout
from mm1_mlx.models.cache import KVCache
from mm1_mlx.models.connector import make_connector
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.tiles import arrange, split_tiles, tile_map
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.models.walk import LayerWalk


def place_image_features(
    embeddings: mx.array, image_features: mx.array, is_image: mx.array
) -> mx.array:
    """Embeddings with the image slots filled, in reading order over the whole batch.

    Differentiable in both arrays, for any number of images per row. Whoever calls has
    checked that N * Q equals the number of slots: counting here would force MLX to
    evaluate.

    Shapes:
        embeddings: (B, L, D)
        image_features: (N, Q, D)
        is_image: (B, L) bool
        returns: (B, L, D)
    """
    B, L, D = embeddings.shape
    if image_features.size == 0:
        return embeddings
    features = image_features.reshape(-1, D).astype(embeddings.dtype)
    # The k-th slot of the batch takes row k; text positions read an unused row.
    slot = mx.maximum(mx.cumsum(is_image.reshape(-1).astype(mx.int32)) - 1, 0)
    placed = features[slot].reshape(B, L, D)
    return mx.where(is_image[..., None], placed, embeddings)


class MM1(nn.Module):
    """Pictures and text to next-token logits; of a decoder alone, text only.

    Rows of unequal length are padded on the left (Processor does so), and their
    left_padding must be given: then each row gives what it gives alone, and the logits
    of the padding mean nothing. A cache has its own, from make_cache(left_padding=...).

    Shapes:
        input_ids: (B, L), config.image_token_id once per image token
        pixel_values: (N, H, W, 3), all pictures of the batch in reading order, or None;
            a list of such where they differ in height and width
        left_padding: (B,) ids in front of each row that are padding, or None for none
        returns: (B, L, V) float32
    """

    adapters: Any = None  # of load_adapters: their names, and which is in use
    reuse: Any = None  # what generate keeps between answers; False keeps nothing

    def __init__(self, config: MM1Config):
        super().__init__()
        self.config = config
        if config.vision_config is not None and config.connector_config is not None:
            self.vision = VisionEncoder(config.vision_config)
            self.connector = make_connector(
                config.connector_config,
                config.vision_config,
                config.text_config.hidden_size,
            )
            self._add_tiling(config)
        self.decoder = Decoder(config.text_config)

    def _add_tiling(self, config: MM1Config) -> None:
        tiling, vision = config.tiling_config, config.vision_config
        width = config.text_config.hidden_size
        if tiling is None or vision is None or config.connector_config is None:
            return
        if not tiling.arranges:  # each tile is a picture: nothing is learned for it
            return
        if tiling.type == "anyres":
            self.image_newline = mx.random.normal((width,)) * width**-0.5
        elif tiling.type == "crops":
            ((rows, columns),) = tiling.grids
            self.tile_connector = make_connector(
                config.connector_config, vision, width, rows * columns
            )

    def __call__(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | Sequence[mx.array] | None = None,
        cache: list | None = None,
        *,
        layouts: Sequence[Layout] = (),
        left_padding: mx.array | Sequence[int] | None = None,
        **settings,
    ) -> mx.array:
        if left_padding is not None:
            if cache is not None:
                raise MM1Error(
                    "A cache knows its own padding: give left_padding to make_cache, "
                    "not to the call."
                )
            settings |= _padded(left_padding, *input_ids.shape)
        embeddings = self.embed(input_ids, pixel_values, layouts=layouts)
        return self.decoder(None, cache, embeddings, **settings)

    def encode_images(
        self,
        pixel_values: mx.array | Sequence[mx.array],
        layouts: Sequence[Layout] = (),
        *,
        walk: LayerWalk | None = None,
    ) -> mx.array:
        """Image tokens for the decoder. (N, H, W, 3) -> (N, Q, D).

        N counts tiles. Where the model puts the tiles of a picture together ("anyres",
        "crops") layouts has one entry for each picture, and the result is all their
        tokens in order: (1, T, D). So it is for a list of arrays, which may differ in
        height and width. walk: of a training step.
        """
        if not self.config.reads_images:
            raise MM1Error("This model is a decoder alone: it cannot read images.")
        tiling = self.config.tiling_config
        if not isinstance(pixel_values, mx.array):
            if tiling is not None and tiling.arranges:
                raise MM1Error("Tiles of this model are of one size: give one array.")
            parts = [self.encode_images(each, walk=walk) for each in pixel_values]
            return mx.concatenate([x.reshape(1, -1, x.shape[-1]) for x in parts], 1)
        features = self.vision(pixel_values, walk=walk)
        if tiling is None or not tiling.arranges:
            return self._connect("connector", features, walk)
        if tiling.type == "crops":
            return self._crops(features, layouts, walk)
        tokens = self._connect("connector", features, walk)
        pictures = [
            arrange(tokens, layout, self.image_newline, tiling)
            for tokens, layout in zip(
                split_tiles(tokens, layouts), layouts, strict=True
            )
        ]
        return mx.concatenate(pictures)[None]

    def _connect(self, name: str, x: mx.array, walk: LayerWalk | None) -> mx.array:
        connector = self[name]
        if walk is None:
            return connector(x)
        return walk.through(name, connector, x, lambda x, _: connector(x))

    def _crops(
        self, features: mx.array, layouts: Sequence[Layout], walk: LayerWalk | None
    ) -> mx.array:
        """Each picture's crops, then its overview. (N, P, Dv) -> (1, T, D).

        All pictures have as many, so they go through the connectors together.
        """
        tiles = split_tiles(features, layouts)
        maps = [
            tile_map(own[:-1], layout.rows, layout.columns)
            for own, layout in zip(tiles, layouts, strict=True)
        ]
        width = features.shape[-1]
        whole = mx.stack([one.reshape(-1, width) for one in maps])
        crops = self._connect("tile_connector", whole, walk)
        overviews = mx.stack([own[-1] for own in tiles])
        overviews = self._connect("connector", overviews, walk)
        tokens = mx.concatenate([crops, overviews], axis=1)
        return tokens.reshape(1, -1, tokens.shape[-1])

    def embed(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | Sequence[mx.array] | None = None,
        image_features: mx.array | None = None,
        *,
        layouts: Sequence[Layout] = (),
    ) -> mx.array:
        """What the decoder reads: token embeddings with the image tokens placed.

        image_features: (N, Q, D) from encode_images, when they are known already.
        layouts: the tiles of each picture, where the model puts them together.
        (B, L) -> (B, L, D)
        """
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values, layouts)
        slot = self.config.image_token_id
        if image_features is None or slot is None:
            return self.decoder.embed_tokens(input_ids)
        is_image = input_ids == slot
        if slot >= self.config.text_config.vocab_size:
            # LLaVA's own files splice images in without an id: no row to read for it.
            input_ids = mx.where(is_image, 0, input_ids)
        embeddings = self.decoder.embed_tokens(input_ids)
        return place_image_features(embeddings, image_features, is_image)

    @property
    def layers(self) -> list:
        """The decoder's, as mlx-lm looks for them."""
        return self.decoder.layers

    def make_cache(self, **settings) -> list:
        """An empty cache entry per decoder layer; settings as cache.make_cache."""
        return self.decoder.make_cache(**settings)


def _padded(
    left_padding: mx.array | Sequence[int], rows: int, length: int
) -> dict[str, Any]:
    """Mask (B, 1, L, L) and positions (B, L) of padded rows, for the decoder.

    They are those of a cache that read nothing yet, so that the model and generation
    cannot disagree. Nothing when no row is padded.
    """
    starts = [int(start) for start in mx.array(left_padding).tolist()]  # type: ignore
    if len(starts) != rows or not all(0 <= start < length for start in starts):
        raise MM1Error(
            f"left_padding is {starts}, but must be {rows} numbers from 0 to "
            f"{length - 1}: one for each row of {length} ids."
        )
    cache = KVCache(starts)
    if cache.left_padding is None:
        return {}
    mask = cache.make_mask(length, return_array=True)
    positions = cache.positions[:, None] + mx.arange(length)  # type: ignore[index]
    return {"mask": mask, "positions": positions}
