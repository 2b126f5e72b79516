"""Foreign checkpoints that `load` was given by name, converted once and kept."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm1_mlx._version import __version__
from mm1_mlx.checkpoint.folder import is_complete

from .conversion import convert, find_origin
from .source import sources

_NEVER = ("optimizer", "scheduler", "rng_state")


def cache_folder() -> Path:
    """Where converted models are kept: $MM1_MLX_CACHE, else the user's cache."""
    if named := os.environ.get("MM1_MLX_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mm1_mlx"


def fingerprint(folder: Path) -> str:
    """Changes when a file of the checkpoint does, by names, sizes and times."""
    facts: list[Any] = [__version__.partition(".")[0], sorted(sources())]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(_NEVER):
            real = path.resolve().stat()
            name = str(path.relative_to(folder))
            facts.append([name, real.st_size, real.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def place_of(folder: Path, name: str) -> Path:
    """Where the model folder of a foreign checkpoint is kept, there or not yet."""
    label = "".join(c if c.isalnum() or c in "-._" else "-" for c in name)[-60:]
    return cache_folder() / f"{label.strip('-.')}-{fingerprint(folder)}"


def converted(
    folder: Path,
    name: str,
    *,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Path:
    """The model folder of a foreign checkpoint: made now, or found in the cache.

    name: what the user called it, for the folder's name.
    """
    place = place_of(folder, name)
    if is_complete(place):
        return place
    tell(f"converting {name} once into {place}")
    convert(
        folder,
        place,
        locate=find_origin,
        tell=tell,
        progress=progress,
    )
    return place
