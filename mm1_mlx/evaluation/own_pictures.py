"""Which shots of a user's file are the question itself, by their pictures."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mm1_mlx.errors import MM1Error
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.inputs.examples import Example
from mm1_mlx.inputs.images import is_decoded
from mm1_mlx.inputs.sources import read_source


class OwnPictures:
    """Knows the pictures of shots by their bytes, so that copies are found, too."""

    def __init__(self, shots: Sequence[Example]):
        self._shots = shots
        self._sizes = {_size(image) for shot in shots for image in shot.images}
        self._by_pictures: dict[tuple, set[int]] = {}
        for shot in shots:
            key = self._key(shot.images, shot.prompt or "")
            if key is not None:
                self._by_pictures.setdefault(key, set()).add(shot.number)

    def numbers(self, sample: Sample) -> set[int]:
        """The shots with all of a question's pictures; without pictures, those that ask
        the same."""
        key = self._key(sample.images, sample.question)
        return set() if key is None else self._by_pictures.get(key, set())

    def _key(self, images: Sequence[Any], text: str) -> tuple | None:
        """None where no shot can be alike."""
        if not images:
            return ("text", text.strip())
        found = [self._digest(image) for image in images]
        return None if None in found else tuple(found)

    def _digest(self, image: Any) -> str | None:
        """Of a file's bytes; a file of a size that no shot has is not read."""
        size = _size(image)
        if size is not None and size not in self._sizes:
            return None
        if is_decoded(image):
            return None
        with suppress(MM1Error):  # what is wrong with it is told when it is asked about
            return hashlib.sha256(read_source(image)[0]).hexdigest()
        return None

    def digest(self) -> str:
        """Changes with what the shots say and with their picture files."""
        whole = [
            [
                *(s.prompt, s.answer, s.reasoning),
                dict(s.fields),
                [*map(_stamp, s.images)],
            ]
            for s in self._shots
        ]
        text = json.dumps(whole, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _size(image: Any) -> int | None:
    """Bytes of a picture file, or None where it is none."""
    if not isinstance(image, (str, os.PathLike)):
        return None
    try:
        return os.stat(image).st_size
    except (OSError, ValueError):  # an address
        return None


def _stamp(image: Any) -> Any:
    """What changes with a picture file; of an address, itself."""
    try:
        info = os.stat(image)
    except (OSError, ValueError, TypeError):
        return str(image) if isinstance(image, str) else ""
    return [str(image), info.st_size, info.st_mtime_ns]
