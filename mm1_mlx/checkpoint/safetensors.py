"""The header of a safetensors file, checked before anything of it is trusted.

The format (https://github.com/huggingface/safetensors): 8 bytes N, little endian; N
bytes JSON {name: {dtype, shape, data_offsets}}; the data.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the format's own limit

# The types that MLX reads, with the bytes of one number.
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """One array of a file: its type's name, shape, and bytes from start to stop."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, by name; CheckpointError if it cannot be so.

    Checked: the sizes fit the file, each shape fits its bytes, nothing overlaps.
    """
    header, size = _read_json(path)
    header.pop("__metadata__", None)
    infos = {name: _info(path, name, entry) for name, entry in header.items()}
    last = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        if info.start < last:
            raise _broken(path, f"'{name}' overlaps another array")
        if info.start > last:
            gap = info.start - last
            raise _broken(path, f"{gap} bytes before '{name}' belong to no array")
        last = max(last, info.stop)
    if last > size:
        raise _broken(
            path,
            f"its arrays need {last} bytes but {size} are there; it was cut off, so "
            f"download or copy it again",
        )
    if last < size:
        raise _broken(path, f"{size - last} bytes at its end belong to no array")
    return infos


def read_metadata(path: Path) -> dict[str, str]:
    """The text that stands beside the arrays of a safetensors file; often none.

    CheckpointError where the file has no header; its arrays are not looked at.
    """
    found = _read_json(path)[0].get("__metadata__", {})
    if not isinstance(found, dict):
        raise _broken(path, "its metadata is not a JSON object")
    return {str(key): str(value) for key, value in found.items()}


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it is written, and how many bytes follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _broken(path, _why_no_header(path))
            text = file.read(length)
            header = json.loads(text, object_pairs_hook=_unique(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    return header, size - 8 - length


def _unique(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Objects of a header as dictionaries; of two equal names JSON keeps the last."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _broken(path, f"its header has '{twice[:80]}' twice")
        return values

    return made


def _why_no_header(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; run `git lfs pull` in its folder"
    return "its header does not fit into the file"


def _info(path: Path, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        start, stop = entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"'{name}' lacks dtype, shape or data_offsets") from error
    if dtype not in ITEM_SIZES:
        raise _broken(path, f"'{name}' has the type {dtype!r}, which MLX cannot read")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _broken(path, f"'{name}' has a shape or offsets that are not whole sizes")
    needed = prod(shape) * ITEM_SIZES[dtype]
    if stop - start != needed:
        raise _broken(
            path,
            f"'{name}' has {stop - start} bytes, but {dtype} {tuple(shape)} takes "
            f"{needed}",
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound safetensors file: {why}.")
