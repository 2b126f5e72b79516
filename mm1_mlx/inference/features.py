"""Features of whole pictures: what the model's own encoder sees, as one vector each."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import CheckpointError, ImageError, PromptError
from mm1_mlx.inference.identity import (
    COMPUTATION,
    Numbered,
    fingerprint_of,
    settings_of,
    weights_of,
)
from mm1_mlx.inference.steps import generation_stream
from mm1_mlx.inputs.images import MAX_PIXELS, decoded, is_decoded, load_image, pixels
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.sources import read_source
from mm1_mlx.models.mm1 import MM1

_AT_ONCE = 8  # pictures that the encoder reads at a time


class Features:
    """Vectors of pictures, by what the files hold: each is computed once.

    A picture is read whole, in the encoder's own size; the vector is the mean of its
    patches' features, of length 1, so that a product of two is their cosine.

    file: where they are kept on the disk, too, for later runs; it is made if it is not
    there. Vectors of another encoder, or of other image settings, are dropped.
    """

    def __init__(self, file: str | Path | None = None):
        self._file = None if file is None else Path(file)
        self._known: dict[str, np.ndarray] = {}
        self._who: str | None = None
        self._encoders, self._encoder = Numbered(), -1
        self._seen: dict[tuple, str] = {}  # files by path, size and time

    def of(
        self,
        model: MM1,
        processor: Processor,
        images: Sequence[Any],
        *,
        max_pixels: int = MAX_PIXELS,
        allow_url: bool = False,
        progress: Callable[[int, int], None] | None = None,
        failed: dict[int, ImageError] | None = None,
    ) -> np.ndarray:
        """(N, Dv) float32, one row for each picture, in their order.

        images: what load_image takes. progress: called with how many are done, of all.
        failed: takes up by its place what is wrong with a picture, whose row is zero.
        Raises ImageError, PromptError for a model without an encoder, CheckpointError
        for a file that holds no features.
        """
        if model.config.vision_config is None or processor.image_settings is None:
            raise PromptError(
                "This model has no image encoder, so its pictures have no features."
            )
        self._use(model, processor)
        limits = {"max_pixels": max_pixels, "allow_url": allow_url}
        done = len(self._known)
        try:
            keys = self._add(model, processor, images, limits, progress, failed)
        finally:  # what is known when a user interrupts, too
            if self._file is not None and len(self._known) > done:
                self._write()
        width = model.config.vision_config.hidden_size
        nothing = np.zeros(width, np.float32)
        rows = [nothing if key is None else self._known[key] for key in keys]
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)

    def _add(
        self,
        model: MM1,
        processor: Processor,
        images: Sequence[Any],
        limits: dict[str, Any],
        progress: Callable[[int, int], None] | None,
        failed: dict[int, ImageError] | None,
    ) -> list[str | None]:
        """Compute what is not known; gives what tells each picture apart, or None."""
        keys: list[str | None] = []
        waiting: dict[str, np.ndarray] = {}
        for i, image in enumerate(images):
            try:
                key, load = self._opened(image, limits)
                if key not in self._known and key not in waiting:
                    settings: Any = processor.image_settings
                    waiting[key] = pixels(load(), settings)
                keys.append(key)
            except ImageError as error:
                if failed is None:
                    raise
                failed[i] = error
                keys.append(None)
            if len(waiting) == _AT_ONCE or i + 1 == len(images):
                self._encode(model, waiting)
                waiting = {}
            if progress:
                progress(i + 1, len(images))
        return keys

    def _opened(self, image: Any, limits: dict[str, Any]) -> tuple[str, Callable]:
        """What tells a picture apart, and what decodes it. A file that was read before
        and has not changed since is not read."""
        if is_decoded(image):
            picture = load_image(image, max_pixels=limits["max_pixels"])
            values = np.ascontiguousarray(np.asarray(picture))
            digest = hashlib.sha256(values.data).hexdigest()
            return f"pixels {values.shape} {digest}", lambda: picture
        mark = None
        if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
            info = os.stat(image)
            mark = os.path.abspath(image), info.st_size, info.st_mtime_ns
            if (key := self._seen.get(mark)) in self._known:
                return key, lambda: load_image(image, **limits)
        data, name = read_source(image, allow_url=limits["allow_url"])
        key = hashlib.sha256(data).hexdigest()
        if mark is not None:
            self._seen[mark] = key
        return key, lambda: decoded(data, name, limits["max_pixels"])

    def _use(self, model: MM1, processor: Processor) -> None:
        """Know which encoder the vectors are of; read the file once."""
        eyes = [pair for pair in weights_of(model) if pair[0].startswith("vision.")]
        settings = f"{COMPUTATION} {settings_of(model)[1]} {processor.image_settings}"
        number = self._encoders.number(eyes, settings)
        if number == self._encoder:
            return
        self._encoder = number
        who = hashlib.sha256(f"{settings} {fingerprint_of(eyes)}".encode()).hexdigest()
        if who != self._who:
            self._who, self._known = who, {}
            if self._file is not None and self._file.exists():
                self._read()

    def _encode(self, model: MM1, waiting: dict[str, np.ndarray]) -> None:
        if not waiting:
            return
        with mx.stream(generation_stream()):
            found = model.vision(mx.array(np.stack(list(waiting.values()))))
            found = found.astype(mx.float32).mean(axis=1)  # (N, P, Dv) -> (N, Dv)
            found = found / mx.maximum(
                mx.linalg.norm(found, axis=1, keepdims=True), 1e-12
            )
            mx.eval(found)
        self._known.update(zip(waiting, np.array(found), strict=True))

    def _read(self) -> None:
        try:
            path = str(self._file)
            found: Any = mx.load(path, "safetensors", return_metadata=True)
            arrays, about = found
            vectors, keys = np.array(arrays["features"]), json.loads(about["keys"])
            if about["encoder"] == self._who and len(keys) == len(vectors):
                self._known = dict(zip(keys, vectors, strict=True))
        except Exception as error:  # MLX raises nearly anything for a broken file
            raise CheckpointError(
                f"{self._file} is there already, and is no file of image features. "
                f"Name another file."
            ) from error

    def _write(self) -> None:
        """All at once: a file that is cut off would be refused by the next run."""
        assert self._file is not None and self._who is not None
        part = self._file.with_name(f".{self._file.name}.{os.getpid()}.safetensors")
        about = {"keys": json.dumps(list(self._known)), "encoder": self._who}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            arrays = {"features": mx.array(np.stack(list(self._known.values())))}
            mx.save_safetensors(str(part), arrays, about)
            os.replace(part, self._file)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self._file} cannot be written ({error}). Name a file in a folder "
                f"that you may write to."
            ) from error


def image_features(
    model: MM1, processor: Processor, images: Sequence[Any], **limits: Any
) -> np.ndarray:
    """What the encoder sees of each picture, as one vector of length 1. (N, Dv) float32

    images: a list of what load_image takes. A product of two vectors is the cosine of
    their angle: 1 for the same picture. See Features, which also keeps them.
    """
    if isinstance(images, (str, bytes, os.PathLike)):
        raise ImageError("image_features takes a list of pictures: put it into one.")
    return Features().of(model, processor, images, **limits)
