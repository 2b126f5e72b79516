"""What a record says of a sample's pictures: their path, or their hash and a copy."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mm1_mlx.errors import MM1Error
from mm1_mlx.inputs.images import is_decoded, load_image
from mm1_mlx.inputs.sources import read_source

FOLDER = "pictures"
_SIDE = 256  # pixels of a small copy
_TINY = 128  # up to here it is the picture itself, without loss


def reference(source: Any, folder: Path | None) -> dict[str, str]:
    """Of one picture: {"path": ...}, or {"sha256": ..., "copy": ...}.

    The hash is of a file's bytes, or of the pixels where there is no file. folder: of
    the results, in which a small copy is kept; None keeps none.
    """
    if isinstance(source, (str, os.PathLike)) and not _is_data(source):
        return {"path": os.fspath(source)}
    try:
        digest = _digest(source)
        found = {"sha256": digest}
        if folder is not None:
            found["copy"] = _copy(source, digest, folder)
        return found
    except MM1Error as error:  # a broken one, which its record's error says, too
        return {"broken": str(error)}


def _is_data(source: Any) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _digest(source: Any) -> str:
    if is_decoded(source):
        array = np.asarray(load_image(source))
        head = f"{array.shape} {array.dtype}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
    return hashlib.sha256(read_source(source)[0]).hexdigest()


def _copy(source: Any, digest: str, folder: Path) -> str:
    """The small copy's path in the folder of the results; made where it is missing."""
    for kind in ("png", "jpg"):
        if (folder / FOLDER / f"{digest[:16]}.{kind}").exists():
            return f"{FOLDER}/{digest[:16]}.{kind}"
    image = load_image(source)
    kind = "png" if max(image.size) <= _TINY else "jpg"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    place = folder / FOLDER / f"{digest[:16]}.{kind}"
    place.parent.mkdir(exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        image.save(partial, "PNG" if kind == "png" else "JPEG", quality=85)
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
    return f"{FOLDER}/{place.name}"
