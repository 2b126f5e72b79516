"""Whether weights are the same: in this process by their arrays, elsewhere by value."""

import hashlib
import json
import weakref
from dataclasses import asdict
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx.models.mm1 import MM1

SAMPLED = 64  # numbers of each weight that a model is known by
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

Weights = list[tuple[str, mx.array]]


def weights_of(model: MM1) -> Weights:
    """Every weight by name, those of an adapter that is on the model among them."""
    found: Any = tree_flatten(model.parameters())
    return found


class Numbered:
    """A number for each set of arrays: the same objects have the same number.

    They are not kept alive. Training, loading and switching adapters put other arrays
    into a model, and so give it another number; what is written into an array in
    place is not noticed.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[weakref.ref]] = {}
        self._next = 0
        self._lock = Lock()

    def number(self, weights: Weights) -> int:
        """Theirs, a new one where they were not seen before."""
        arrays = [array for _, array in weights]
        with self._lock:
            for number, refs in self._known.items():
                if len(refs) == len(arrays) and all(
                    ref() is array for ref, array in zip(refs, arrays, strict=True)
                ):
                    return number
            self._next += 1
            self._known[self._next] = [weakref.ref(array) for array in arrays]
            return self._next

    def forget(self) -> None:
        """The same arrays get another number from now on."""
        with self._lock:
            self._known.clear()

    def gone(self) -> list[int]:
        """The numbers whose arrays are no longer there; they are told once."""
        with self._lock:
            dead = [
                number
                for number, refs in self._known.items()
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
    flat = weights_of(model)
    some = {}
    for name, array in sorted(flat):
        part = array.reshape(-1)[:: -(-array.size // SAMPLED)]
        if mx.issubdtype(part.dtype, mx.floating):
            part = part.astype(mx.float32)  # as it was stored, or widened: the same
        some[name] = part
    mx.eval(some)
    digest = hashlib.sha256()
    for name, array in sorted(flat):
        digest.update(f"{name} {array.shape}".encode() + np.array(some[name]).tobytes())
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "weights": digest.hexdigest()[:16],
    }


def identity(model: MM1) -> str:
    """What a model is known by on the disk: 32 letters that no other one has.

    The fingerprint, types, the share of this process, and the sum of the bits of every
    row of every weight: one number changed by hand changes it. Reads all weights once.
    """
    sums = {}
    for name, array in sorted(weights_of(model)):
        bits = array.view(_BITS[array.dtype.size]) if array.ndim else array
        sums[name] = bits if array.ndim < 2 else bits.sum(axis=-1)
    mx.eval(sums)
    digest = hashlib.sha256(json.dumps(fingerprint(model)).encode())
    group = model.decoder.group
    if group is not None:
        digest.update(f"{group.rank()} of {group.size()}".encode())
    for name, array in weights_of(model):
        digest.update(f"{name} {array.dtype}".encode() + np.array(sums[name]).tobytes())
    return digest.hexdigest()[:32]
