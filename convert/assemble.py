"""An MM1 from parts: a public encoder, a fresh connector, a public decoder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.checkpoint.folder import check_weights
from mm1_mlx.config import (
    ConnectorConfig,
    EncoderConfig,
    MM1Config,
    VisionConfig,
)
from mm1_mlx.errors import CheckpointError
from mm1_mlx.memory import weight_shapes

from . import numbers
from .conversion import (
    Opened,
    find_origin,
    open_checkpoint,
    origin_of,
    processor_of,
    stored_type,
)
from .origin import Origin, read_arrays, read_config
from .output import with_extra, write_folder
from .pipeline import Conversion, Weight, match, prepare, rows_of
from .source import CONNECTOR, Source, detect

_SAMPLE = 4096  # rows of the token table that its scale is measured on


def assemble(
    vision: Path,
    decoder: Path,
    out: Path,
    *,
    connector: ConnectorConfig | Path | None = None,
    feature_layer: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> MM1Config:
    """Write an MM1 of the encoder of `vision` and the decoder of `decoder`.

    Either may be a checkpoint of that part alone or a whole model. A new connector's
    output is normalised to the scale of the decoder's token embeddings, so that
    training starts from image tokens that look like text to the decoder.

    connector: of a new one, None for MM1's C-Abstractor with 144 tokens; or the folder
    of a trained one, alone (tamm's) or in a model. feature_layer: which block's output
    it reads; None for the encoder's own, or -2 for CLIP (LLaVA's choice). seed: of the
    connector. Raises CheckpointError, ConfigError.
    """
    eyes = open_checkpoint(vision, locate=find_origin)
    words = open_checkpoint(decoder, locate=find_origin)
    encoder = _encoder(eyes)
    if not isinstance(words.config, MM1Config):
        raise CheckpointError(f"{decoder} is an image encoder alone: no decoder.")
    if feature_layer is not None:
        encoder = replace(encoder, feature_layer=feature_layer, feature_norm=False)
    bridge = _bridge(connector, words, seed)
    config = replace(
        words.config,
        vision_config=encoder,
        connector_config=bridge.config,
        tiling_config=None,
        image_token_id=words.config.text_config.vocab_size,  # no text can contain it
        quantization=None,
    )
    kept = numbers.BY_NAME[dtype] if dtype else stored_type(words)
    seeing, reading = _part(eyes, "vision.", kept), _part(words, "decoder.", kept)
    plan = Conversion([*seeing, *bridge.weights(config, kept), *reading])
    made = {"vision": origin_of(eyes), "decoder": origin_of(words)}
    made["connector"] = bridge.made
    write_folder(
        out,
        plan,
        with_extra(config, "assembled", made | (provenance or {})),
        *processor_of(eyes, words, tell),
        sources=[vision, decoder, connector if isinstance(connector, Path) else None],
        overwrite=overwrite,
        progress=progress,
    )
    return config


def _bridge(
    connector: ConnectorConfig | Path | None, words: Opened, seed: int
) -> "_Trained | _Fresh":
    if isinstance(connector, Path):
        return _open_connector(connector)
    return _Fresh(connector or ConnectorConfig(type="c_abstractor"), words, seed)


def _encoder(opened: Opened) -> VisionConfig:
    found = opened.config.vision_config
    if found is None:
        raise CheckpointError(
            f"{opened.origin.folder} is a decoder alone: it has no image encoder."
        )
    return found


class _Fresh:
    """A connector to be trained, whose output norm has the scale of the text's."""

    def __init__(self, config: ConnectorConfig, words: Opened, seed: int):
        self.config = replace(config, norm_output=True)
        self.made = {"fresh": config.type, "seed": seed}
        self._words, self._seed = words, seed

    def weights(self, config: MM1Config, dtype: str) -> list[Weight]:
        """New ones, between the encoder and the decoder of `config`."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from mm1_mlx.models.connector import make_connector

        assert config.vision_config is not None
        mx.random.seed(self._seed)
        width = config.text_config.hidden_size
        fresh = make_connector(self.config, config.vision_config, width)
        found: Any = dict(tree_flatten(fresh.parameters()))
        found["norm_output.weight"] = mx.full((width,), embedding_scale(self._words))
        return [
            Weight(
                f"connector.{name}",
                tuple(array.shape),
                dtype,
                given=np.array(array.astype(mx.float32)),
            )
            for name, array in found.items()
        ]


@dataclass
class _Trained:
    """A connector that was trained elsewhere."""

    origin: Origin
    source: Source
    config: ConnectorConfig
    made: dict[str, Any]
    model: Opened | None = None

    def weights(self, config: MM1Config, dtype: str) -> list[Weight]:
        """CheckpointError where it does not fit between this encoder and decoder."""
        expected = {
            name: shape
            for name, shape in weight_shapes(config).items()
            if name.startswith("connector.")
        }
        if self.model is None:
            found = match(self.origin, self.source, self.config, expected, dtype)
            return found.weights
        weights = _part(self.model, "connector.", dtype)
        shapes = {weight.name: weight.shape for weight in weights}
        check_weights(shapes, expected, f"{self.origin.folder}'s connector")
        return weights


def _open_connector(folder: Path) -> _Trained:
    values = read_config(folder)
    entries = frozenset(path.name for path in folder.iterdir())
    source = detect(values, entries)
    if source.kind == CONNECTOR:
        config = source.config(values, None)
        assert isinstance(config, ConnectorConfig)
        origin = Origin(folder, values, read_arrays(folder))
        return _Trained(origin, source, config, {"source": source.name})
    opened = open_checkpoint(folder, locate=find_origin)
    found = opened.config
    if isinstance(found, EncoderConfig) or found.connector_config is None:
        raise CheckpointError(f"{folder} has no connector.")
    config = found.connector_config
    return _Trained(opened.origin, opened.source, config, origin_of(opened), opened)


def _part(opened: Opened, prefix: str, dtype: str) -> list[Weight]:
    """The weights of one part; those of a whole model's other parts are left."""
    every = prepare(opened.origin, opened.source, opened.config, dtype)
    return [weight for weight in every.weights if weight.name.startswith(prefix)]


def embedding_scale(opened: Opened) -> float:
    """The root mean square of the token embeddings, over a sample of their rows."""
    plan = prepare(opened.origin, opened.source, opened.config, "F32")
    (table,) = (w for w in plan.weights if w.name == "decoder.embed_tokens.weight")
    step = max(table.shape[0] // _SAMPLE, 1)
    sample = rows_of(table, step).astype(np.float64)
    return float(np.sqrt((sample**2).mean()))
