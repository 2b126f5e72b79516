"""The pictures of a prompt: what tells them apart, and their image tokens."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.grids import Layout
from mm1_mlx.inference.picture_progress import Report, told_walk
from mm1_mlx.inference.steps import encode_images, generation_stream
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.walk import LayerWalk


@dataclass
class Picture:
    """One picture, as the encoder reads it.

    pixels: (n, H, W, 3), n its tiles, 1 without tiles. layout: how they lie, or None.
    tokens: how many it takes; 0 where that is not known before it is encoded.
    """

    pixels: mx.array
    layout: Layout | None
    tokens: int

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of what the encoder reads, wherever the picture came from."""
        values: Any = np.array(self.pixels, copy=False)
        head = f"{values.shape} {values.dtype} {self.layout}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(values).data).hexdigest()


def pictures_of(inputs: Any, slots: int) -> list[Picture]:
    """The pictures of what a processor gave for one prompt with so many image slots."""
    pixels = inputs.pixel_values
    if pixels is None or len(pixels) == 0:
        return []
    layouts = list(inputs.layouts) or [None] * len(pixels)
    known = list(getattr(inputs, "image_tokens", ()))
    if len(known) != len(layouts):  # of another processor: they are all alike
        each = 0 if slots % len(layouts) else slots // len(layouts)
        known = [each] * len(layouts)
    if isinstance(pixels, tuple):  # of several sizes: picture by picture
        each = zip(pixels, layouts, known, strict=True)
        return [Picture(*one) for one in each]
    found, start = [], 0
    for layout, tokens in zip(layouts, known, strict=True):
        stop = start + (1 if layout is None else layout.tiles)
        found.append(Picture(pixels[start:stop], layout, tokens))
        start = stop
    return found


def largest_side(pictures: Sequence[Picture], usual: int) -> int | None:
    """The side of the largest tile in pixels; None where that is the usual one."""
    side = max((picture.pixels.shape[1] for picture in pictures), default=usual)
    return None if side == usual else side


def image_tokens(
    model: MM1,
    pictures: Sequence[Picture],
    find: Callable[[str], mx.array | None] | None = None,
    keep: Callable[[str, mx.array], None] | None = None,
    report: Report | None = None,
) -> list[mx.array]:
    """Image tokens of each picture, evaluated, (T, D).

    find, keep: by a picture's digest. With them a picture is encoded once, however
    often it is there; without, every one of them is. report: is told what is done of
    those that are encoded, and all; see picture_progress.
    """
    keys = [p.digest if find else str(i) for i, p in enumerate(pictures)]
    found: dict[str, mx.array] = {}
    missing: dict[str, Picture] = {}
    for key, picture in zip(keys, pictures, strict=True):
        known = find(key) if find else None
        if known is None:
            missing[key] = picture
        else:
            found[key] = known
    walk = told_walk(model, [p.pixels.shape for p in missing.values()], report)
    together: dict[Any, list[str]] = {}
    for key, picture in missing.items():  # tiles: picture by picture, each has many
        alone = key if picture.layout is not None else None
        together.setdefault((picture.pixels.shape, alone), []).append(key)
    for some in together.values():
        made = _encode(model, [missing[key] for key in some], walk)
        for key, tokens in zip(some, made, strict=True):
            found[key] = tokens
            if keep:
                keep(key, tokens)
    if walk is not None:
        walk.end()
    return [found[key] for key in keys]


def _encode(
    model: MM1, pictures: list[Picture], walk: LayerWalk | None
) -> list[mx.array]:
    """Of whole pictures of one size, or of one picture in tiles."""
    with mx.stream(generation_stream()):
        first = pictures[0]
        if len(pictures) == 1:
            layouts = [] if first.layout is None else [first.layout]
            found = encode_images(model, first.pixels, layouts, walk)
            return [found.reshape(-1, found.shape[-1])]
        pixels = mx.concatenate([p.pixels for p in pictures])
        features = encode_images(model, pixels, walk=walk)
        parts = [mx.contiguous(each) for each in features]  # kept alone, or not
        mx.eval(parts)
        return parts
