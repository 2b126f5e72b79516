"""Writes the weight files of a model folder while the arrays are being made.

Names, types and shapes are known before the first array is read: each file starts with
its whole header, and the bytes of an array go to their place as they come. Nothing is
kept in memory, and an array that is made in pieces is never whole in memory either.
"""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.disk import flush
from mm1_mlx.checkpoint.safetensors import ITEM_SIZES

SHARD_BYTES = 5_000_000_000  # as the hub's own tools cut
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slot:
    """What one array will be. dtype: as safetensors names it ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array in its file."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


def cut(slots: list[Slot], limit: int = SHARD_BYTES) -> list[list[Slot]]:
    """Slots in order, cut so that no part has more than `limit` bytes.

    One that is larger than that is a part of its own.
    """
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.nbytes
    return shards


class WeightWriter:
    """model*.safetensors and their index in a folder; used as a context.

    slots: every array of the model, in the order of the files. metadata: the format
    that the files name ("pt" for transformers). Arrays may come in any
    order, each from its first byte to its last. Leaving the context without an error
    closes the files (their bytes are on the disk then) and writes the index.
    """

    def __init__(
        self,
        folder: Path,
        slots: list[Slot],
        limit: int = SHARD_BYTES,
        *,
        metadata: str = "mlx",
    ) -> None:
        self._metadata = metadata
        self._folder = folder
        self._shards = cut(slots, limit)
        self._files: list[int] = []
        self._place: dict[str, tuple[int, int]] = {}  # name -> shard, next byte
        self._end: dict[str, int] = {}
        self.total = sum(slot.nbytes for slot in slots)
        self.written = 0

    def __enter__(self) -> "WeightWriter":
        for number, shard in enumerate(self._shards):
            path = self._folder / self._name(number)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._files.append(file)
            header = _header(shard, self._metadata)
            _write(file, header, 0)
            at = len(header)
            for slot in shard:
                self._place[slot.name] = (number, at)
                at += slot.nbytes
                self._end[slot.name] = at
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files:
                os.close(file)

    def add(self, name: str, data: Any) -> None:
        """The next bytes of an array: anything with the buffer protocol, in order."""
        view = memoryview(data).cast("B")
        number, at = self._place[name]
        assert at + len(view) <= self._end[name], f"{name} has more bytes than its slot"
        _write(self._files[number], view, at)
        self._place[name] = number, at + len(view)
        self.written += len(view)

    def _name(self, number: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _finish(self) -> None:
        short = [name for name, (_, at) in self._place.items() if at < self._end[name]]
        assert not short, f"not all bytes of {short[:5]} were written"
        for file in self._files:
            flush(file)
        table = {
            slot.name: self._name(number)
            for number, shard in enumerate(self._shards)
            for slot in shard
        }
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": {name: table[name] for name in sorted(table)},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _header(shard: list[Slot], metadata: str) -> bytes:
    """Length and JSON, padded so that the arrays begin at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": metadata}}
    offset = 0
    for slot in shard:
        header[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.nbytes],
        }
        offset += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: int, data: bytes | memoryview, at: int) -> None:
    """All of it: one call may write less than it was given, and never above 2 GB."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done : done + (64 << 20)], at + done)
