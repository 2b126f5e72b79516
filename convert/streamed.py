"""One of our models, run with one block's weights in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.checkpoint.folder import (
    CONFIG_FILE,
    check_weights,
    read_config,
    read_encoder_config,
    read_json,
    weight_files,
)
from mm1_mlx.config import VisionConfig
from mm1_mlx.grids import Layout
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.quantization.modules import quantize_model, settings_by_name

Emit = Callable[[str, np.ndarray], None]


def _ignore(name: str, values: np.ndarray) -> None:
    pass


class _EncoderAlone(nn.Module):
    """An encoder under the name that it has in a model."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config)


def make(folder: Path) -> nn.Module:
    """The model of a folder, or its encoder alone, without its weights."""
    if read_json(folder / CONFIG_FILE).get("model_type") == "mm1_vision":
        return _EncoderAlone(read_encoder_config(folder))
    return MM1(read_config(folder))


class Streamed:
    """A model folder whose parts are read from disk when they run.

    The encoder, the connectors and each decoder layer are in memory one after the
    other. dtype: floating-point weights are cast to it; None keeps the stored types.
    """

    def __init__(self, folder: Path, dtype: mx.Dtype | None):
        self._files = weight_files(folder)
        self._dtype = dtype
        self.in_float32 = dtype == mx.float32
        stored = {n: i for infos in self._files.values() for n, i in infos.items()}
        self.types = {info.dtype for info in stored.values()}
        self.model: Any = make(folder)
        self.config = self.model.config
        if getattr(self.config, "quantization", None) is not None:
            settings = settings_by_name(self.config.quantization, set(stored))
            quantize_model(self.model, settings)
        expected: Any = dict(tree_flatten(self.model.parameters()))
        check_weights(
            {name: info.shape for name, info in stored.items()},
            {name: array.shape for name, array in expected.items()},
            str(folder),
        )
        self.model.eval()

    @contextmanager
    def _part(self, *paths: str) -> Iterator[None]:
        """Parts of the model with their weights, which they lose again."""
        modules = dict(self.model.named_modules())
        for path in paths:
            modules[path].load_weights(list(self._weights(path + ".")))
        try:
            yield
        finally:  # arrays that nobody computes take no memory
            for path in paths:
                _empty(modules[path])

    def _weights(self, start: str) -> Iterator[tuple[str, mx.array]]:
        """What lies below a name; lazy, so only what is used is read."""
        for file, infos in self._files.items():
            if not any(name.startswith(start) for name in infos):
                continue
            arrays: Any = mx.load(str(file))
            for name, array in arrays.items():
                if name.startswith(start):
                    yield name.removeprefix(start), self._cast(array)

    def _cast(self, array: mx.array) -> mx.array:
        if self._dtype is None or not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array.astype(self._dtype)

    def encode(
        self, pixel_values: mx.array, layouts: Sequence[Layout], emit: Emit = _ignore
    ) -> mx.array:
        """Image tokens of all pictures, (N, Q, D) or (1, T, D); stages go to `emit`."""
        vision = self.model.vision
        with self._part("vision"):
            states = vision.hidden_states(pixel_values)
            mx.eval(states)
            emit("patch embedding", _numbers(states[0]))
            for number, state in enumerate(states[1:]):
                emit(f"encoder layer {number}", _numbers(state))
        if "connector" not in self.model:
            return states[-1]
        names = [name for name in ("connector", "tile_connector") if name in self.model]
        with self._part("vision", *names):
            if "image_newline" in self.model:
                ((_, newline),) = self._weights("image_newline")
                self.model.image_newline = newline
            tokens = self.model.encode_images(pixel_values, layouts)
            mx.eval(tokens)
        emit("connector", _numbers(tokens).reshape(-1, tokens.shape[-1]))
        return tokens

    def decode(
        self,
        input_ids: mx.array,
        image_features: mx.array | None,
        cache: list | None = None,
        emit: Emit = _ignore,
    ) -> mx.array:
        """Logits (L, V) of a row of ids. (1, L)."""
        decoder = self.model.decoder
        with self._part("decoder.embed_tokens"):
            x = self.model.embed(input_ids, image_features=image_features)
            mx.eval(x)
        emit("embeddings", _numbers(x))
        caches = cache if cache is not None else [None] * len(decoder.layers)
        for number, layer in enumerate(decoder.layers):
            with self._part(f"decoder.layers.{number}"):
                x = layer(x, "causal" if x.shape[1] > 1 else None, caches[number])
                mx.eval(x)
            emit(f"decoder layer {number}", _numbers(x))
        tied = self.config.text_config.tie_word_embeddings
        head = "decoder.embed_tokens" if tied else "decoder.lm_head"
        with self._part("decoder.norm", head):
            logits = decoder.head(decoder.norm(x))[0]
            mx.eval(logits)
        return logits

    def greedy(
        self, input_ids: mx.array, image_features: mx.array | None, count: int
    ) -> list[int]:
        """The likeliest next ids, with a cache; ends are not looked for."""
        cache = self.model.make_cache()
        logits = self.decode(input_ids, image_features, cache)
        ids = [int(mx.argmax(logits[-1]))]
        while len(ids) < count:
            logits = self.decode(mx.array([ids[-1:]]), None, cache)
            ids.append(int(mx.argmax(logits[-1])))
        return ids


def _empty(module: nn.Module) -> None:
    module.update(tree_map(lambda a: mx.zeros(a.shape, a.dtype), module.parameters()))


def _numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
