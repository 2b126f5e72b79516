"""Checkpoints of a run: complete, atomic, and exact to resume from."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mm1_mlx.checkpoint.folder import check_weights, replacing_file
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.models.mm1 import MM1


def save_state(path: Path, trees: dict[str, dict], facts: dict) -> None:
    """Write named trees of arrays and a few facts into one file, all or nothing.

    The bytes are on the disk before the old file is replaced, so a run that is cut off
    at any moment leaves the last whole checkpoint.
    """
    arrays: dict[str, Any] = {
        f"{name}:{key}": value
        for name, tree in trees.items()
        for key, value in tree_flatten(tree)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        mx.save_safetensors(str(temporary), arrays, {"facts": json.dumps(facts)})


def load_state(path: Path) -> tuple[dict[str, dict], dict]:
    """The trees and facts of a file that save_state wrote."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        facts = json.loads(metadata["facts"])
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of a run, or is damaged. Remove it to start "
            f"anew, or name another folder."
        ) from error
    flat: dict[str, list] = {}
    for key, value in arrays.items():
        name, _, rest = key.partition(":")
        flat.setdefault(name, []).append((rest, value))
    return {name: tree_unflatten(items) for name, items in flat.items()}, facts


def check_fit(found: Any, expected: Any, path: Path) -> None:
    """CheckpointError unless a checkpoint's tree has the names and shapes expected."""
    flat: list[Any] = [tree_flatten(tree) for tree in (found, expected)]
    have, want = ({name: array.shape for name, array in items} for items in flat)
    names = sorted(have.keys() | want.keys())
    if other := [name for name in names if have.get(name) != want.get(name)]:
        first = other[0]
        raise CheckpointError(
            f"{path} holds other trained arrays than this run's: {len(other)} of "
            f"{len(names)} differ, such as {first}, {have.get(first, 'missing')} there "
            f"and {want.get(first, 'missing')} here. Train the same parts of the same "
            f"model at the same ranks, or start anew in another folder."
        )


def set_weights(module: nn.Module, weights: dict[str, mx.array], path: Path) -> None:
    """Give a module all its weights; CheckpointError if names or shapes differ.

    path: where they come from, for the message.
    """
    expected: dict[str, Any] = dict(tree_flatten(module.parameters()))
    check_weights(
        {name: array.shape for name, array in weights.items()},
        {name: array.shape for name, array in expected.items()},
        str(path),
    )
    module.load_weights(list(weights.items()))


def load_model_state(path: Path, config: MM1Config) -> MM1:
    """The model in a checkpoint of a joint stage, ready to answer, in float32.

    CheckpointError if it is another file, or of another model than the config's.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    trees, _ = load_state(path)
    model = MM1(config)
    weights: dict[str, Any] = dict(tree_flatten(trees.get("parameters", {})))
    weights = {  # what the region contrast needed is no part of the model
        name: array
        for name, array in weights.items()
        if not name.startswith("contrast.")
    }
    set_weights(model, weights, path)
    model.eval()
    mx.eval(model.parameters())
    return model
