"""What the parity tests share: fixtures, strict loading through convert's tables."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from convert.rules import rename
from helpers import FIXTURES, need
from mm1_mlx.config import DecoderConfig, MM1Config, VisionConfig
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.mm1 import MM1, place_image_features
from mm1_mlx.models.vision import VisionEncoder


def expected(name: str) -> dict[str, np.ndarray]:
    """The reference arrays of a fixture."""
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        return dict(arrays)


def hub_config(folder: str, name: str = "config.json") -> dict:
    return json.loads((FIXTURES / folder / name).read_text())


def safetensors(folder: str, file: str = "model*.safetensors") -> dict[str, mx.array]:
    """All weights of a folder's shards, float32."""
    files = sorted((FIXTURES / folder).glob(file))
    assert files, f"no {file} in {folder}"
    weights: dict[str, mx.array] = {}
    for path in files:
        weights |= {k: as_float(v) for k, v in mx.load(str(path)).items()}
    return weights


def bins(folder: str, file: str = "*.bin") -> dict[str, np.ndarray]:
    """All weights of a folder's pickles, float32, read with torch."""
    torch = need("torch")
    files = sorted((FIXTURES / folder).glob(file))
    assert files, f"no {file} in {folder}"
    weights: dict[str, np.ndarray] = {}
    for path in files:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        weights |= {k: v.float().numpy() for k, v in loaded.items()}
    return weights


def as_float(array: mx.array) -> mx.array:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(mx.float32) if floating else array


def load(module, weights: dict):
    """`module` with renamed weights: no name or shape may be left over or missing."""
    arrays = [(name, mx.array(array)) for name, array in weights.items()]
    module.load_weights(arrays, strict=True)
    for (name, have), (_, given) in zip(
        sorted(tree_flatten(module.parameters())), sorted(arrays), strict=True
    ):
        assert have.shape == given.shape, name
    module.eval()
    return module


def build(config, weights: dict, rules):
    """The model of a config, its weights through a table, strictly."""
    kinds = {VisionConfig: VisionEncoder, DecoderConfig: Decoder, MM1Config: MM1}
    return load(kinds[type(config)](config), rename(weights, rules))


def pixels(array: np.ndarray) -> mx.array:
    """The fixtures' (N, 3, H, W) as our (N, H, W, 3)."""
    return mx.array(array.transpose(0, 2, 3, 1))


def spliced(ids: np.ndarray, marker: int, model: MM1) -> mx.array:
    """Reference ids as ours: each run of markers becomes one id per image token."""
    image, count = model.config.image_token_id, model.config.tokens_per_image
    runs = np.count_nonzero(ids == marker)
    assert runs in (1, count), "one marker per image, or one per token"
    repeat = count if runs == 1 else 1
    row = [[image] * repeat if i == marker else [int(i)] for i in ids[0]]
    return mx.array([[i for part in row for i in part]])


def embed(model: MM1, ids: mx.array, image_features: mx.array) -> mx.array:
    """Like model.embed; the slots' id may lie outside the vocabulary."""
    is_image = ids == model.config.image_token_id
    embeddings = model.decoder.embed_tokens(mx.where(is_image, 0, ids))
    return place_image_features(embeddings, image_features, is_image)


def greedy(decoder: Decoder, embeddings: mx.array, count: int) -> list[int]:
    """The most likely next ids, with a KV cache, eos ignored."""
    cache = decoder.make_cache()
    logits = decoder(None, cache, embeddings)
    ids = [int(logits[0, -1].argmax())]
    while len(ids) < count:
        logits = decoder(mx.array([ids[-1:]]), cache)
        ids.append(int(logits[0, -1].argmax()))
    return ids


def greedy_without_cache(decoder: Decoder, embeddings: mx.array, count: int) -> list:
    ids: list[int] = []
    for _ in range(count):
        new = decoder.embed_tokens(mx.array([ids])) if ids else embeddings[:, :0]
        logits = decoder(None, None, mx.concatenate([embeddings, new], axis=1))
        ids.append(int(logits[0, -1].argmax()))
    return ids


def up_to_last_block(config: VisionConfig) -> VisionConfig:
    return replace(config, feature_layer=-1)
