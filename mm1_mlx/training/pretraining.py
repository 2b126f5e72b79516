"""MM1's pretraining in small: an encoder stage, then everything together.

The recipe is a dictionary (a JSON file, see examples/mm1_tiny/recipe.json). Every batch
is a function of (seed, stage, step, rank) alone, so a run that was interrupted goes on
exactly as it would have.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.inputs.images import pixels
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.training import encoder_stage as first
from mm1_mlx.training.next_token import next_token_loss
from mm1_mlx.training.optimizers import Group
from mm1_mlx.training.packing import (
    Batch,
    DocumentEncoder,
    DocumentMixer,
    Marks,
    collate,
    distinct,
)
from mm1_mlx.training.recipe import Recipe, StageSettings, data_source
from mm1_mlx.training.trainer import Trainer


def initialize(module: nn.Module, seed: int, keep: str = "") -> None:
    """Fresh weights: truncated normals, residual outputs small, embeddings of std 0.5.

    Image tokens leave the connector with unit scale (norm_output); text embeddings of
    std 0.5 are near that scale, which decided success in small runs. Biases are zero.
    All is decided by the seed, so several processes start from the same weights.

    keep: parameters whose names start with it stay as they are.
    """
    key = mx.random.key(seed)
    new = []
    flat: Any = tree_flatten(module.parameters())
    for name, value in flat:
        if keep and name.startswith(keep):
            continue
        if name.endswith("bias"):
            new.append((name, mx.zeros_like(value)))
        if value.ndim < 2:
            continue
        key, own = mx.random.split(key)
        fan_in = value.shape[-1] if value.ndim < 4 else value[0].size
        std = fan_in**-0.5
        if name.endswith("embed_tokens.weight"):
            std = 0.5
        elif name.endswith("position_embedding"):
            std = 0.3
        elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            std = 0.02
        noise = mx.random.truncated_normal(-2, 2, value.shape, key=own)
        new.append((name, std * noise))
    module.load_weights(new, strict=False)


class _Together(nn.Module):
    """A model's three parts, by their own names, with the region contrast."""

    def __init__(self, model: MM1, contrast: first.RegionText):
        super().__init__()
        self.vision, self.connector = model.vision, model.connector
        self.decoder, self.contrast = model.decoder, contrast


class JointStage:
    """Encoder, connector and decoder together, next token on text (MM1 section 4).

    With settings.contrast the encoder also goes on with its first stage's loss, on the
    pictures of the documents: text alone teaches it what answers need, and it forgets
    how to tell apart what was never asked together (our choice, as in CoCa).

    With a vision_rate of 0 the encoder stays as it is, and its features are made while
    the step before them runs.
    """

    name = "joint"
    law_parameters = "decoder.layers."  # no embeddings

    def __init__(
        self,
        model: MM1,
        settings: StageSettings,
        source: Any,
        encoder: DocumentEncoder,
        images: ImageSettings,
    ):
        self.module: nn.Module = model
        self.contrast: first.RegionText | None = None
        if settings.contrast:
            c = model.config
            assert c.vision_config is not None
            width, vocabulary = c.vision_config.hidden_size, c.text_config.vocab_size
            self.contrast = first.RegionText(width, vocabulary)
            self.module = _Together(model, self.contrast)
        self._model = model
        self.words = model.config.text_config.vocab_size
        self.settings = settings
        for mix in (settings.mix, *(a.get("mix", {}) for a in settings.alternates)):
            _check_kinds(source, mix)
        self._source = source
        self._encoder = encoder
        self._tokens_per_image = encoder.marks.tokens_per_image
        self._features_ahead: _FeaturesAhead | None = None
        if settings.vision_rate == 0 and self.contrast is None:
            self._features_ahead = _FeaturesAhead(model)
        self._images = images

    def rate_groups(self) -> list[Group]:
        """Encoder and decoder may learn at rates of their own; at 0 they stay."""
        s = self.settings
        parts = (("vision.", s.vision_rate), ("decoder.", s.decoder_rate))
        return [
            (lambda name, part=part: name.startswith(part), rate)
            for part, rate in parts
            if rate != 1.0
        ]

    def resumed(self) -> None:
        """The trainer has put a checkpoint's weights into the module."""
        if self._features_ahead is not None:
            self._features_ahead.take(self._model)

    def host_batch(
        self,
        rng: random.Random,
        count: int,
        progress: float,
        settings: StageSettings | None = None,
    ):
        """Arrays of a step, as NumPy, for `loss`, and how many documents they hold.

        settings: of this step, where the stage has alternates. A picture that stands in
        several documents goes through the encoder once.
        """
        s = settings or self.settings
        room = round(count * s.images_per_row)
        rows = DocumentMixer(self._source.document, s.mix).rows(
            rng, count, s.row_length, self._encoder, progress, max_images=room
        )
        targets = count * s.targets_per_row
        batch = collate(rows, s.row_length, self._encoder.marks.pad, targets)
        first_of, which = distinct(batch.images)
        shots = _pixel_array([batch.images[i] for i in first_of], self._images, room)
        if self._features_ahead is not None:
            shots = self._features_ahead(shots, len(first_of))
        shown = np.zeros(count * s.row_length, np.int32)
        places = self._places(which, batch.kept)
        shown[: len(places)] = places
        arrays = (
            batch.ids, batch.document, batch.branch, batch.position, shots, shown,
            batch.source, batch.target, batch.weight,
        )  # fmt: skip
        if self.contrast is not None:
            arrays += self._contrast_arrays(batch, first_of, room)
        return arrays, batch.documents

    def _places(self, which: list[int], kept: list[list[int] | None]) -> list[int]:
        """Which of all pictures' tokens stands in each image slot. which: the picture
        of each image."""
        Q = self._tokens_per_image
        return [
            Q * picture + number
            for picture, numbers in zip(which, kept, strict=True)
            for number in (range(Q) if numbers is None else numbers)
        ]

    def _contrast_arrays(
        self, batch: Batch, first_of: list[int], room: int
    ) -> tuple[np.ndarray, ...]:
        pictures = [(batch.images[i].size, batch.regions[i]) for i in first_of]
        pictures += [((1, 1), [])] * (room - len(pictures))
        vision = self._model.config.vision_config
        assert vision is not None
        return first.contrast_arrays(pictures, self._encoder.encode, vision.grid)

    def loss(
        self, ids, document, branch, position, shots, shown, source, target, weight,
        *regions, walk: LayerWalk | None = None,
    ):  # fmt: skip
        """The whole loss and what is reported. Shapes as in training.packing.Batch.

        shown: (R * L,) int32, which token of `shots` stands in each image slot, in
        reading order. regions: with settings.contrast, what
        encoder_stage.contrast_arrays makes.
        """
        model = self._model
        features = shots
        if self._features_ahead is None:
            features = model.vision(shots, walk=walk)
        loss, metrics = next_token_loss(
            model,
            ids,
            document,
            branch,
            position,
            _chosen(model.connector(features), shown),
            source,
            target,
            weight,
            walk=walk,
        )
        if self.contrast is not None:
            apart, right = self.contrast.compare(features, *regions)
            loss = loss + self.settings.contrast * apart
            metrics |= {"contrast": apart, "regions": right}
        return loss, metrics


def _chosen(tokens: mx.array, places: mx.array) -> mx.array:
    """Image tokens by their places among all. (N, Q, D) -> (1, T, D)."""
    return tokens.reshape(-1, tokens.shape[-1])[places][None]


class _FeaturesAhead:
    """Patch features of a frozen encoder, made on a stream of their own.

    Batches are made in a thread beside the steps; a stream of its own lets a second
    processor core work there.
    """

    def __init__(self, model: MM1):
        config = model.config.vision_config
        assert config is not None
        self._shape = config.num_patches, config.hidden_size
        # The model's own arrays come and go while a step is compiled.
        self._vision = VisionEncoder(config)
        self.take(model)
        self._own = threading.local()

    def take(self, model: MM1) -> None:
        """Use the encoder that the model has now."""
        self._vision.update(model.vision.parameters())
        mx.eval(self._vision.parameters())  # another thread cannot

    def __call__(self, shots: np.ndarray, used: int) -> np.ndarray:
        """(N, H, W, 3) -> (N, P, Dv); zeros after the first `used` pictures."""
        found = np.zeros((len(shots), *self._shape), np.float32)
        if not used:
            return found
        if not hasattr(self._own, "stream"):  # a stream is of the thread that made it
            self._own.stream = mx.new_stream(mx.default_device())
        with mx.stream(self._own.stream):
            features = self._vision(mx.array(shots[:used])).astype(mx.float32)
            mx.eval(features)
        found[:used] = np.array(features)
        return found


def _check_kinds(source: Any, mix: dict[str, float]) -> None:
    """A folder of files may lack a kind; that must not be found out after hours."""
    counts = getattr(source, "counts", None)
    if counts is None:
        return
    if lacking := sorted(kind for kind in mix if mix[kind] and not counts[kind]):
        there = {kind: n for kind, n in counts.items() if n}
        raise DatasetError(
            f"The data has no documents of the kinds {lacking}, but stages.joint.mix "
            f"asks for them. There are {there}: give weights to these only."
        )


class EncoderStage:
    """The encoder before it is connected: contrast with text, or reconstruction."""

    name = "encoder"
    law_parameters = "vision.layers."

    def __init__(
        self,
        model: MM1,
        settings: StageSettings,
        source: Any,
        encoder: DocumentEncoder,
        images: ImageSettings,
    ):
        if not hasattr(source, "region_picture"):
            raise DatasetError(
                "The data module has no region_picture(rng, progress), which the "
                "encoder stage learns from. Add it, or take the encoder stage out."
            )
        self.settings = settings
        self._source, self._images = source, images
        self._encode = encoder.encode
        assert model.config.vision_config is not None
        self._grid = model.config.vision_config.grid
        if settings.objective == "reconstruction":
            self.module: nn.Module = first.Reconstruction(model.vision)
        else:
            vocabulary = model.config.text_config.vocab_size
            self.module = first.RegionContrast(model.vision, vocabulary)

    def rate_groups(self) -> list[Group]:
        """One rate for all; `vision_rate` counts here as it does in a joint stage."""
        rate = self.settings.vision_rate
        return [] if rate == 1.0 else [(lambda n: n.startswith("vision."), rate)]

    def host_batch(
        self,
        rng: random.Random,
        count: int,
        progress: float,
        settings: StageSettings | None = None,
    ):
        """Arrays of a step, as NumPy, for `loss`, and how many pictures they hold."""
        made = [self._source.region_picture(rng, progress) for _ in range(count)]
        shots = _pixel_array([image for image, _ in made], self._images, count)
        if self.settings.objective == "reconstruction":
            patches = self._grid**2
            prefix = [rng.randint(1, patches // 2) for _ in made]
            return (shots, np.array(prefix, np.int32)), count
        pictures = [(image.size, regions) for image, regions in made]
        room: dict[str, Any] = {}
        if self.settings.objective == "global":  # one long text for each picture
            room = {"max_texts": count, "text_length": 32, "whole": True}
        arrays = first.contrast_arrays(pictures, self._encode, self._grid, **room)
        return (shots, *arrays), count

    def loss(self, *arrays, walk: LayerWalk | None = None):
        """The objective's loss and what is reported."""
        loss, accuracy = self.module(*arrays, walk=walk)
        return loss, {"loss": loss, "accuracy": accuracy}


def _pixel_array(images: list, settings: ImageSettings, room: int):
    """Pixels of the pictures, padded with blank ones to `room`."""
    shots = np.zeros((room, settings.size, settings.size, 3), np.float32)
    for i, image in enumerate(images):
        shots[i] = pixels(image, settings)
    return shots


_STAGES = {"encoder": EncoderStage, "joint": JointStage}


def document_encoder(
    config: MM1Config, encode: Callable, image_counts_as: int = 0
) -> DocumentEncoder:
    """The encoder of documents for a model's special tokens."""
    eos = config.eos_token_ids
    if config.bos_token_id is None or not eos or config.pad_token_id is None:
        raise ConfigError("Pretraining needs bos_token_id, eos_token_id, pad_token_id.")
    if config.image_token_id is None:
        raise ConfigError(
            "Pretraining needs a model that reads pictures: vision_config, "
            "connector_config and image_token_id."
        )
    if 0 < image_counts_as < config.tokens_per_image:
        raise ConfigError(
            f"image_counts_as is {image_counts_as}, but a picture takes "
            f"{config.tokens_per_image} tokens: rows would be too long. Raise it, or "
            f"leave it out."
        )
    marks = Marks(
        bos=config.bos_token_id,
        eos=eos[0],
        pad=config.pad_token_id,
        image=config.image_token_id,
        tokens_per_image=config.tokens_per_image,
        counts_as=image_counts_as,
    )
    return DocumentEncoder(encode, marks)


def make_trainer(
    recipe: Recipe, stage: str, model: MM1, encode: Callable, folder: Path
) -> Trainer:
    """The trainer of one stage of a recipe."""
    source = data_source(recipe.data)
    counts_as = recipe.stages[stage].image_counts_as
    encoder = document_encoder(recipe.model, encode, counts_as)
    work = _STAGES[stage](model, recipe.stages[stage], source, encoder, recipe.images)
    if stage == "encoder":  # what a stage has beside the model
        initialize(work.module, recipe.seed + 1, keep="vision.")
    elif work.contrast is not None:
        initialize(work.contrast, recipe.seed + 1)
    facts = {"recipe": {**recipe.source, "stages": recipe.source["stages"][stage]}}
    return Trainer(work, folder, recipe.seed, facts)
