"""A cache in one file: read a long prompt once, answer many questions about it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.adapters.switch import AdapterMark
from mm1_mlx.checkpoint.safetensors import read_header
from mm1_mlx.errors import CheckpointError
from mm1_mlx.models.cache import QUANTIZED_BITS, KVCache, QuantizedKVCache

_FORMAT = "mm1_mlx cache 1"

Cache = list[KVCache | QuantizedKVCache]


def save_cache(
    path: str | Path,
    cache: Sequence[KVCache | QuantizedKVCache],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a cache to a .safetensors file, whole or not at all.

    metadata: what the caller wants to know again, such as the model and the tokens
    that were read; load_cache gives it back. The adapter that was in use is kept, too:
    a model with another one, or none, refuses the cache.
    """
    path = _file(path)
    arrays: dict[str, mx.array] = {}
    entries = []
    for i, entry in enumerate(cache):
        arrays |= {f"{i}.{j}": array for j, array in enumerate(entry.state)}
        about: dict[str, Any] = {"left_padding": entry.left_padding}
        if isinstance(entry, QuantizedKVCache):
            about |= {"bits": entry.bits, "group_size": entry.group_size}
        entries.append(about)
    text = {
        "format": _FORMAT,
        "entries": json.dumps(entries),
        "metadata": json.dumps(metadata or {}),
        "adapter": json.dumps(_mark_to_dict(cache)),
    }
    # Beside its place and with the ending that MLX would add, then moved there.
    new = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(new), arrays, metadata=text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def load_cache(path: str | Path) -> tuple[Cache, dict[str, str]]:
    """The cache of a file, and the metadata that was saved with it.

    Raises CheckpointError for a file that save_cache did not write.
    """
    path = _file(path)
    read_header(path)  # sound, before MLX reads it
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, text = loaded
    if text.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a saved cache of this version ('{_FORMAT}'). Read the "
            f"prompt again and save it with save_cache."
        )
    try:
        entries = json.loads(text["entries"])
        cache = [_entry(about, i, arrays) for i, about in enumerate(entries)]
        metadata = json.loads(text["metadata"])
        about = json.loads(text.get("adapter", "null"))
        if about is not None:
            mark = AdapterMark(str(about["name"]), str(about["digest"]))
            for entry in cache:
                entry.adapter = mark
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is a broken cache ({type(error).__name__}: {error}). Read the "
            f"prompt again and save it with save_cache."
        ) from error
    mx.eval(arrays)
    return cache, metadata


def _mark_to_dict(cache: Sequence[Any]) -> dict[str, str] | None:
    """The adapter that filled a cache, for JSON."""
    mark = cache[0].adapter if cache else None
    return None if mark is None else {"name": mark.name, "digest": mark.digest}


def _entry(
    about: dict[str, Any], i: int, arrays: dict[str, mx.array]
) -> KVCache | QuantizedKVCache:
    bits = about.get("bits")
    entry = KVCache(about["left_padding"])
    count = 2
    if bits is not None:
        if bits not in QUANTIZED_BITS:
            raise ValueError(f"{bits} bits")
        size = about["group_size"]
        entry = QuantizedKVCache(about["left_padding"], group_size=size, bits=bits)
        count = 6
    if f"{i}.0" in arrays:  # else nothing was read yet
        state = [arrays[f"{i}.{j}"] for j in range(count)]
        if len({array.shape[:3] for array in state}) != 1 or state[0].ndim != 4:
            raise ValueError(f"the arrays of layer {i} do not fit together")
        entry.state = state
    return entry


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} does not end in .safetensors, as a cache file must."
        )
    return path
