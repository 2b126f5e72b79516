"""Pictures that were read before, known by the bytes of their file."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import mlx.core as mx

from mm1_mlx.inputs.images import decoded, is_decoded, load_image
from mm1_mlx.inputs.shelf import Shelf
from mm1_mlx.inputs.sources import read_source


def read_once(
    source: Any,
    make: Callable[[Any], Any],
    known: Shelf | None,
    how: str,
    *,
    max_pixels: int,
    allow_url: bool,
) -> Any:
    """What `make` makes of a picture, from `known` where its file was read before.

    how: what tells apart what is made; make gives (array, ...). Hashing a file takes a
    few milliseconds, decoding a photo a hundred. Pixels that are given are not hashed:
    that takes as long as resizing them.
    """
    if known is None or is_decoded(source):
        return make(load_image(source, max_pixels=max_pixels, allow_url=allow_url))
    data, name = read_source(source, allow_url=allow_url)
    key = sha256(data).hexdigest(), how, max_pixels
    found = known.get(key)
    if found is None:
        found = make(decoded(data, name, max_pixels))
        if isinstance(found[0], mx.array):
            mx.eval(found[0])  # another thread may ask for it
        known.put(key, found, found[0].nbytes)
    return found
