"""A foreign checkpoint on disk: its config.json, and its arrays by name.

Files are taken as the hub lays them out: an index with its shards, or whole files;
.safetensors before .bin, because both often hold the same. Names in sub-folders that a
source knows have the folder's name in front.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.folder import inside, read_json
from mm1_mlx.checkpoint.hub import of_one_layout
from mm1_mlx.errors import CheckpointError

from .readers import LazyArray, read_safetensors, read_torch

# In this order: the first that is there.
CONFIG_FILES = ("config.json", "open_clip_config.json")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Beside the weights of some, but no weights: optimizer states, training arguments.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "random_states")
_BESIDE = ("mm_projector.bin",)
_TORCH = (".bin", ".pt", ".pth")


@dataclass
class Origin:
    """What is converted. arrays: not read yet."""

    folder: Path
    config: dict[str, Any]
    arrays: dict[str, LazyArray]


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a foreign folder."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            return read_json(folder / name)
    raise CheckpointError(
        f"{folder} has no config.json (nor open_clip_config.json), so what its weights "
        f"are cannot be known. Copy it there from where the weights came from."
    )


def read_arrays(folder: Path, prefix: str = "") -> dict[str, LazyArray]:
    """All arrays of a folder by name, with `prefix` in front; nothing is read yet."""
    arrays: dict[str, LazyArray] = {}
    owner: dict[str, Path] = {}
    for path in weight_files(folder):
        for name, array in _read(path).items():
            if name in owner:
                raise CheckpointError(
                    f"{name!r} is both in {owner[name].name} and in {path.name} of "
                    f"{folder}. Which one counts cannot be known: remove one file."
                )
            owner[name] = path
            arrays[prefix + name] = array
    for path in _beside(folder):
        for name, array in _read(path).items():
            arrays.setdefault(prefix + name, array)
    return arrays


def _read(path: Path) -> dict[str, LazyArray]:
    return (read_safetensors if path.suffix == ".safetensors" else read_torch)(path)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, of one format."""
    for name in _INDEXES:
        if (folder / name).is_file():
            return _indexed(folder, name)
    for endings in ((".safetensors",), _TORCH):
        found = [
            inside(folder, path.name)
            for path in sorted(folder.iterdir())
            if path.suffix in endings
            and not path.name.startswith(_NO_WEIGHTS)
            and path.name not in _BESIDE
        ]
        names = of_one_layout(
            [path.name for path in found], (folder / "config.json").is_file()
        )
        found = [path for path in found if path.name in names]
        # AIMv2 has the same weights in model.safetensors and mlx_model.safetensors.
        plain = [path for path in found if path.name.startswith("model")]
        if found:
            return plain or found
    raise CheckpointError(
        f"{folder} has no weights: expected *.safetensors, *.bin or *.pt files."
    )


def _indexed(folder: Path, index: str) -> list[Path]:
    table = read_json(folder / index).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(name, str) for name in table.values()
    ):
        raise CheckpointError(f"{folder / index} has no weight_map of names to files.")
    paths = []
    for name in sorted(set(table.values())):
        path = inside(folder, name)
        if not path.is_file():
            raise CheckpointError(
                f"{folder / index} names {name!r}, but the folder lacks it. Download "
                f"it again."
            )
        paths.append(path)
    return paths


def _beside(folder: Path) -> list[Path]:
    """What original LLaVA puts beside its shards; the same is often in them."""
    return [folder / name for name in _BESIDE if (folder / name).is_file()]
