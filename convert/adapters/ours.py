"""Adapters of our own: see mm1_mlx.adapters.folder."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.adapters.about import reading_of
from mm1_mlx.adapters.folder import (
    adapter_config,
    check_arrays,
    read_adapter,
    settings_by_part,
)
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, part_of_weight
from mm1_mlx.errors import CheckpointError

from .arrays import Adapter, Pair, most_common
from .names import Names


def read(folder: Path, names: Names) -> Adapter:
    """The adapter of a folder of ours, for the model of `names`."""
    arrays, config = read_adapter(folder)
    settings_of = settings_by_part(config)
    left = {name: _numpy(array) for name, array in arrays.items()}
    adapter = Adapter(reading=reading_of(config))
    for name, path in names.path_of.items():
        found = {
            key: left.pop(f"{name}.{key}")
            for key in ("lora_a", "lora_b", "m")
            if f"{name}.{key}" in left
        }
        if not found:
            continue
        settings = settings_of(part_of_weight(f"{path}.weight"))
        shapes = {key: array.shape for key, array in found.items()}
        where = f"{folder}: {name}"
        check_arrays(shapes, *names.part_of(name), settings.dora, where)
        a, b, m = found["lora_a"], found["lora_b"], found.get("m")
        if not names.part_of(name)[0]:
            a, b = a.T, b.T
        adapter.pairs[name] = Pair(a, b, m, settings.scale)
        adapter.dropout = max(adapter.dropout, settings.dropout)
    lost = [n for n, array in left.items() if names.shapes.get(n) != array.shape]
    if lost:
        raise CheckpointError(
            f"The adapter {folder} does not fit this model: {len(lost)} of its weights "
            f"have no place here, or another shape, first {lost[0]}. Give the model "
            f"that it was trained on."
        )
    adapter.whole = left
    return adapter


def made(
    adapter: Adapter, names: Names, base: str, origin: dict[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the adapter_config.json of an adapter, as ours.

    base: what the model is called. origin: kept in the file. Each part has one scale
    and is DoRA or not as a whole; scales that differ from their part's most frequent
    one go into lora_b.
    """
    by_part: dict[str, dict[str, Pair]] = {}
    for name, pair in adapter.pairs.items():
        part = part_of_weight(f"{names.path_of[name]}.weight")
        by_part.setdefault(part, {})[name] = pair
    targets, arrays = {}, {}
    for part, pairs in by_part.items():
        scale: Any = most_common(pair.scale for pair in pairs.values())
        other = Counter(pair.scale != scale for pair in pairs.values())[True]
        if other:
            adapter.notes.append(
                f"{other} of {len(pairs)} pairs of the {part} have another scale than "
                f"{scale:g}: what is between them was put into lora_b"
            )
        kinds = {pair.m is not None for pair in pairs.values()}
        if len(kinds) > 1:
            raise CheckpointError(
                f"Some pairs of the {part} have DoRA's row lengths and some have none; "
                f"here a part has one kind."
            )
        ranks = {pair.rank for pair in pairs.values()}
        rank = ranks.pop() if len(ranks) == 1 else 0  # 0: each pair has its own
        settings = PairSettings(
            rank=rank, scale=scale, dropout=adapter.dropout, dora=kinds.pop()
        )
        targets[part] = Target(pairs=settings)
        for name, pair in pairs.items():
            arrays |= _named(name, pair.with_scale(scale))
    for name, array in adapter.whole.items():
        targets.setdefault(part_of_weight(name), Target())
        arrays[name] = mx.array(array)
    config = adapter_config(Plan(parts=targets), base, **adapter.reading)
    config["mm1_mlx"]["converted"] = origin
    return arrays, config


def _named(name: str, pair: Pair) -> dict[str, mx.array]:
    a, b = pair.a, pair.b
    if a.ndim == 2:
        a, b = a.T, b.T
    found = {f"{name}.lora_a": mx.array(a), f"{name}.lora_b": mx.array(b)}
    if pair.m is not None:
        found[f"{name}.m"] = mx.array(pair.m)
    return found


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
