"""Prefixes on the disk: what one run has read, another one need not compute.

A file holds some columns of a prompt's cache, from `start` on, and the keys of all
columns up to its end, so that prompts that begin alike share what they can.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.checkpoint.safetensors import read_metadata
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inference.prefix_tree import Columns, columns, shared_length
from mm1_mlx.inference.prompt_cache import load_cache, save_cache
from mm1_mlx.models.cache import KVCache

_BITS = {2: mx.uint16, 4: mx.uint32}
LEAST_PART = 8  # one column of so many in a file must be of use
_MOST = 10_000_000  # keys that a file may name
_STALE = 3600  # seconds after which nobody is writing a file any more


@dataclass(frozen=True)
class Kind:
    """Whose prefixes they are. who: the model's identity; the rest is what each of
    `layers` entries holds: keys and values (1, heads, columns, width) of a type."""

    who: str
    layers: int
    heads: int
    width: int
    dtype: Any


@dataclass(frozen=True)
class _File:
    """What a file says of itself: the keys of all columns up to its end."""

    path: Path
    start: int
    keys: list[int]


class PrefixFolder:
    """A folder of prefixes; may be used by several processes and models at once.

    limit: bytes of all files; those that were not used for longest are deleted.
    problem: why the last prefix was not written, or None.
    """

    def __init__(self, folder: str | Path, limit: int):
        self._folder = Path(folder).expanduser()
        self._limit = limit
        self._seen: dict[str, tuple[tuple[int, int], _File | None]] = {}
        self.problem: str | None = None
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(0, "Permission denied")
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot hold prefixes: {error.strerror}. Give another "
                f"folder."
            ) from error

    def find(
        self, kind: Kind, keys: Sequence[int], known: int
    ) -> tuple[int, list[Columns]]:
        """How far the files reach beyond `known` columns, and the columns from there.

        Files that are broken, of another model or gone are passed over. A broken one is
        deleted, or it would never be written anew; one that could not be read now (no
        memory, too many open files) stays.
        """
        wanted, files, pieces = list(keys), self._files(kind), []
        while (best := _best(files, wanted, known)) is not None:
            file, stop = best
            files.remove(file)
            with suppress(OSError, RuntimeError, MemoryError):
                arrays = _arrays_of(file, kind)
                if arrays is None:
                    file.path.unlink()
                    continue
                pieces.append(columns(arrays, known - file.start, stop - file.start))
                known = stop
                # What was used last stays, and the beginning longest.
                when = time.time_ns() - file.start
                os.utime(file.path, ns=(when, when))
        return known, pieces

    def add(self, kind: Kind, keys: Sequence[int], arrays: Columns) -> None:
        """Write the columns of these keys that no file has. arrays: of all of them."""
        self.problem = None
        wanted = list(keys)
        known = self._covered(kind, wanted)
        if known == len(wanted):
            return
        parts = [mx.contiguous(a) for a in columns(arrays, known, len(wanted))]
        mx.eval(parts)
        if sum(part.nbytes for part in parts) > self._limit:
            self.problem = "it is larger than all that the folder may hold"
            return
        cache = []
        for i in range(0, len(parts), 2):
            cache.append(KVCache())
            cache[-1].state = parts[i : i + 2]
        text = json.dumps(_packed(wanted))
        about = {"who": kind.who, "start": str(known), "keys": text}
        name = hashlib.sha256(f"{known} {text}".encode()).hexdigest()[:32]
        path = self._folder / f"prefix-{kind.who}-{name}.safetensors"
        try:
            save_cache(path, cache, about | {"sha256": _digest(parts)})
            self._shrink()
        except (OSError, RuntimeError) as error:  # the disk is full, or read-only
            self.problem = getattr(error, "strerror", None) or str(error)

    def _covered(self, kind: Kind, wanted: list[int]) -> int:
        """The columns that files have, by what they say of themselves."""
        known, files = 0, self._files(kind)
        while (best := _best(files, wanted, known)) is not None:
            known = best[1]
        return known

    def _files(self, kind: Kind) -> list[_File]:
        """This model's files; each is opened once, unless it changes."""
        found = []
        for path in self._folder.glob(f"prefix-{kind.who}-*.safetensors"):
            with suppress(OSError):
                stat = path.stat()
                state = (stat.st_ino, stat.st_size)
                if self._seen.get(path.name, (None,))[0] != state:
                    self._seen[path.name] = (state, _read(path, kind))
                found.append(self._seen[path.name][1])
        return [file for file in found if file is not None]

    def _shrink(self) -> None:
        """Delete what is too much, and what a killed process left."""
        now, kept = time.time(), []
        for path in self._folder.glob(".prefix-*.safetensors"):
            with suppress(OSError):
                if now - path.stat().st_mtime > _STALE:
                    path.unlink()
        for path in self._folder.glob("prefix-*.safetensors"):
            with suppress(OSError):
                stat = path.stat()
                kept.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _best(
    files: Sequence[_File], wanted: list[int], known: int
) -> tuple[_File, int] | None:
    """The file that takes a prompt furthest beyond its known columns, and how far.

    None where that is little of the file: all of it is read for them.
    """
    best, most = None, known
    for file in files:
        if file.start > known or len(file.keys) <= most:
            continue
        reach = shared_length(file.keys, wanted[: len(file.keys)])
        useful = (reach - known) * LEAST_PART >= len(file.keys) - file.start
        if useful and reach > most:
            best, most = file, reach
    return None if best is None else (best, most)


def _read(path: Path, kind: Kind) -> _File | None:
    """What a file says of itself, None where that cannot be so.

    OSError where it cannot be opened now.
    """
    try:
        about = read_metadata(path)
        values = json.loads(about["metadata"])
        keys = _unpacked(json.loads(values["keys"]))
        start = int(values["start"])
        if values["who"] != kind.who or not 0 <= start < len(keys):
            return None
        return _File(path, start, keys)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    except OverflowError:  # of Infinity, which Python's JSON may hold
        return None


def _arrays_of(file: _File, kind: Kind) -> Columns | None:
    """Its columns; None unless they are whole and this model's.

    OSError, RuntimeError or MemoryError where that cannot be told now.
    """
    try:
        cache, about = load_cache(file.path)
    except CheckpointError as error:  # cut off, spoiled, or not to be opened
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return None
    if len(cache) != kind.layers or not all(type(x) is KVCache for x in cache):
        return None
    arrays = [array for entry in cache for array in entry.state]
    shape = (1, kind.heads, len(file.keys) - file.start, kind.width)
    if len(arrays) != 2 * kind.layers or any(x.left_padding for x in cache):
        return None
    if any(x.shape != shape or x.dtype != kind.dtype for x in arrays):
        return None
    return arrays if about.get("sha256") == _digest(arrays) else None


def _digest(arrays: Columns) -> str:
    """A SHA-256 of their bytes: a disk may give other ones than it was given."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.array(array.view(_BITS[array.dtype.size]), copy=False).data)
    return digest.hexdigest()


def _packed(keys: Sequence[int]) -> list[int | list[int]]:
    """Keys for JSON. Those of a picture fall by one, and become [first, count]."""
    packed: list[int | list[int]] = []
    before = 0
    for key in keys:
        if key < 0 and before == key + 1 and isinstance(packed[-1], list):
            packed[-1][1] += 1
        else:
            packed.append([key, 1] if key < 0 else key)
        before = key
    return packed


def _unpacked(packed: Any) -> list[int]:
    keys: list[int] = []
    for entry in packed:
        first, count = entry if isinstance(entry, list) else (entry, 1)
        if type(first) is not int or type(count) is not int:
            raise TypeError("keys are whole numbers")
        if not 0 < count <= _MOST - len(keys):
            raise ValueError("too many keys")
        keys.extend(range(first, first - count, -1))
    return keys
