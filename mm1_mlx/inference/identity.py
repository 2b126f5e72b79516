"""Whether weights are the same: in this process by their arrays, elsewhere by value."""

import hashlib
import json
import weakref
from dataclasses import asdict, replace
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx._version import __version__
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack
from mm1_mlx.models.mm1 import MM1

SAMPLED = 64  # numbers of each weight that a run's base model is known by
# Raise it where a change makes a model compute other keys and values (a fix in RoPE, a
# norm, the connector): files of before are then not used any more.
COMPUTATION = 1
_AT_ONCE = 2**24  # numbers of an array that are summed at a time
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

Weights = list[tuple[str, mx.array]]


def weights_of(model: MM1) -> Weights:
    """Every weight by name, those of an adapter that is on the model among them."""
    found: Any = tree_flatten(model.parameters())
    return found


class Numbered:
    """A number for arrays and settings: the same objects and text have the same one.

    The arrays are not kept alive. Training, loading and switching adapters put other
    arrays into a model, and so give it another number; what is written into an array
    in place is not noticed.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, list[weakref.ref]]] = {}
        self._next = 0
        self._lock = Lock()

    def number(self, weights: Weights, settings: str) -> int:
        """Theirs, a new one where they were not seen before."""
        arrays = [array for _, array in weights]
        with self._lock:
            for number, (known, refs) in self._known.items():
                if (
                    known == settings
                    and len(refs) == len(arrays)
                    and all(
                        ref() is array for ref, array in zip(refs, arrays, strict=True)
                    )
                ):
                    return number
            self._next += 1
            refs = [weakref.ref(array) for array in arrays]
            self._known[self._next] = settings, refs
            return self._next

    def knows(self, number: int) -> bool:
        """Whether it is still of use. Waits for nothing."""
        return number in self._known

    def forget(self) -> None:
        """The same arrays get another number from now on."""
        with self._lock:
            self._known.clear()

    def gone(self) -> list[int]:
        """The numbers whose arrays are no longer there; they are told once."""
        with self._lock:
            dead = [
                number
                for number, (_, refs) in self._known.items()
                if any(ref() is None for ref in refs)
            ]
            for number in dead:
                del self._known[number]
            return dead


def fingerprint(model: MM1) -> dict[str, str]:
    """What tells whether a run goes on with the same base model.

    Its config without provenance, and of each weight its name, its shape and 64 of its
    numbers, evenly spread: a hash of all would read gigabytes.
    """
    config = {k: v for k, v in asdict(model.config).items() if k != "extra"}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "weights": fingerprint_of(weights_of(model)),
    }


def fingerprint_of(weights: Weights) -> str:
    """A digest of names, shapes, and 64 numbers of each weight, evenly spread."""
    some = {}
    for name, array in sorted(weights, key=lambda pair: pair[0]):
        part = array.reshape(-1)[:: -(-array.size // SAMPLED)]
        if mx.issubdtype(part.dtype, mx.floating):
            part = part.astype(mx.float32)  # as it was stored, or widened: the same
        some[name] = part
    mx.eval(some)
    digest = hashlib.sha256()
    for name, array in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name} {array.shape}".encode() + np.array(some[name]).tobytes())
    return digest.hexdigest()[:16]


def settings_of(model: MM1) -> tuple[str, str]:
    """What a model computes with beside its arrays, and so does what reads pictures.

    As text: the config without provenance, and of each adapted layer its scale and its
    kind.
    """
    config = replace(model.config, extra={})
    eyes = config.vision_config, config.connector_config, config.tiling_config
    layers = {
        path: (layer.settings.scale, layer.settings.dora)
        for path, layer in model.named_modules()
        if isinstance(layer, (AdaptedLinear, AdaptedStack))
    }
    before = {k: v for k, v in layers.items() if not k.startswith("decoder.")}
    return repr((config, layers)), repr((eyes, before))


def identity(model: MM1) -> str:
    """What a model is known by on the disk: 32 letters, other ones for another model.

    Of its arrays, of its settings, and of what computes: the share of this process, the
    versions of this package and of MLX. Of each array its name, its type, its shape and
    a sum of 32 bits for each row, in which every number counts another time: one number
    that is another one always changes it, several (or an order) all but surely. No
    proof against one who wants two models to be alike. Reads all weights once.
    """
    versions = COMPUTATION, __version__, mx.__version__  # type: ignore[attr-defined]
    group = model.decoder.group
    share = None if group is None else (group.rank(), group.size())
    digest = hashlib.sha256(repr((versions, share, settings_of(model)[0])).encode())
    for name, array in sorted(weights_of(model)):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(_row_sums(array).data)
    return digest.hexdigest()[:32]


def _row_sums(array: mx.array) -> np.ndarray:
    """A sum of each row's bits, in which a place counts an odd number of times.

    Odd: so many times another number is another sum, modulo 2^32. (..., n) -> (rows,)
    """
    if array.size == 0:
        return np.zeros(0, np.uint32)
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    size = rows.dtype.size
    wide = mx.uint32 if rows.shape[1] * size % 4 == 0 else _BITS[size]
    times = mx.array(_odd(rows.shape[1] * size // wide.size))
    step = max(1, _AT_ONCE // rows.shape[1])
    sums = []
    for start in range(0, rows.shape[0], step):  # a copy of all might not fit
        part = rows[start : start + step].view(wide).astype(mx.uint32)
        sums.append((part * times).sum(axis=-1))
        mx.eval(sums[-1])
    return np.concatenate([np.array(each) for each in sums])


def _odd(count: int) -> np.ndarray:
    """Odd numbers without a pattern, always the same. (count,) uint32."""
    mixed = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x85EBCA77)
    return (mixed ^ (mixed >> 13)) | 1
