"""MM1: image encoder, connector and decoder as one model (arXiv 2403.09611)."""

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import MM1Config
from mm1_mlx.models.connector import make_connector
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.vision import VisionEncoder


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
    """Pictures and text to next-token logits.

    Shapes:
        input_ids: (B, L), config.image_token_id once per image token
        pixel_values: (N, H, W, 3), all pictures of the batch in reading order, or None
        returns: (B, L, V) float32
    """

    def __init__(self, config: MM1Config):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision_config)
        self.connector = make_connector(
            config.connector_config,
            config.vision_config,
            config.text_config.hidden_size,
        )
        self.decoder = Decoder(config.text_config)

    def __call__(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        cache: list | None = None,
        **settings,
    ) -> mx.array:
        embeddings = self.embed(input_ids, pixel_values)
        return self.decoder(None, cache, embeddings, **settings)

    def encode_images(self, pixel_values: mx.array) -> mx.array:
        """Image tokens for the decoder. (N, H, W, 3) -> (N, Q, D)."""
        return self.connector(self.vision(pixel_values))

    def embed(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        image_features: mx.array | None = None,
    ) -> mx.array:
        """What the decoder reads: token embeddings with the image tokens placed.

        image_features: (N, Q, D) from encode_images, when they are known already.
        (B, L) -> (B, L, D)
        """
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        if image_features is None:
            return self.decoder.embed_tokens(input_ids)
        is_image = input_ids == self.config.image_token_id
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            # LLaVA's own files splice images in without an id: no row to read for it.
            input_ids = mx.where(is_image, 0, input_ids)
        embeddings = self.decoder.embed_tokens(input_ids)
        return place_image_features(embeddings, image_features, is_image)

    @property
    def layers(self) -> list:
        return self.decoder.layers

    def make_cache(self, **settings) -> list:
        """An empty cache entry per decoder layer; settings as cache.make_cache."""
        return self.decoder.make_cache(**settings)
