"""What a source is: a table of names, a reader of its config, and how it is known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mm1_mlx.config import (
    ConnectorConfig,
    DecoderConfig,
    EncoderConfig,
    MM1Config,
    VisionConfig,
)
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings

from .rules import Table

MODEL, DECODER, ENCODER, CONNECTOR = "model", "decoder", "encoder", "connector"


AnyConfig = MM1Config | EncoderConfig | DecoderConfig | VisionConfig | ConnectorConfig
Images = Callable[[dict, dict | None, dict | None], ImageSettings | None]


def no_tower(_: dict) -> None:
    """Of a source that never names an encoder outside of it."""
    return None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of foreign checkpoint.

    name: as --source takes it. what: for people. kind: MODEL, DECODER, ENCODER, or
        CONNECTOR, which `assemble` alone takes.
    rules: its table, or what makes it from our configuration and config.json; targets
        are without the part's own "decoder.", "vision." or "connector." where kind is
        that part.
    config: (config.json, the tower's config.json or None) -> our configuration.
    types: the values of model_type that it has, the usual one first; () where only
        is_it tells.
    is_it: (config.json, names of the folder's entries) -> whether they are of this
        kind, where model_type alone does not tell. The names of the weights confirm it.
    folders: sub-folders with weights of their own; "projector" makes the names
        "projector/...".
    tower: (config.json) -> hub id or path of an encoder that the checkpoint only
        names, or None. Its weights get the names "tower/...", unless the checkpoint
        holds them itself.
    images: (config.json, tower's config.json, preprocessor_config.json) -> how its
        pictures become pixels, where the last alone does not tell.
    template: the built-in chat template, where the tokenizer brings none.
    additions: (configuration) -> arrays that the file does not hold.
    """

    name: str
    what: str
    kind: str
    rules: Table | Callable[[Any, dict], Table] = field(repr=False)
    config: Callable[[dict, dict | None], AnyConfig]
    types: tuple[str, ...] = ()
    is_it: Callable[[dict, frozenset[str]], bool] | None = None
    folders: tuple[str, ...] = ()
    tower: Callable[[dict], str | None] = no_tower
    images: Callable[[dict, dict | None, dict | None], ImageSettings | None] | None = (
        None
    )
    template: str | None = None
    additions: Callable[[Any], dict[str, Any]] | None = None

    def fits(self, config: dict, entries: frozenset[str]) -> bool:
        """Whether a folder's config.json, and what lies beside it, are of this kind."""
        if self.types and config.get("model_type") not in self.types:
            return False
        return self.is_it is None or self.is_it(config, entries)


@cache
def sources() -> dict[str, Source]:
    """All sources by name: what the modules of convert.sources call ENTRY or ENTRIES.

    A new module there is found by itself.
    """
    from . import sources as room

    found: dict[str, Source] = {}
    for module in sorted(info.name for info in iter_modules(room.__path__)):
        loaded = import_module(f".{module}", room.__name__)
        for source in (*getattr(loaded, "ENTRIES", ()), getattr(loaded, "ENTRY", None)):
            if source is not None:
                found[source.name] = source
    return found


def find_source(name: str) -> Source:
    """The source of this name; CheckpointError lists them all."""
    if name not in sources():
        raise CheckpointError(
            f"There is no source named {name!r}. The sources are: "
            f"{', '.join(sources())}."
        )
    return sources()[name]


def detect(config: dict, entries: frozenset[str] = frozenset()) -> Source:
    """The source whose config.json this is; CheckpointError if none or several fit."""
    fitting = [s for s in sources().values() if s.fits(config, entries)]
    if len(fitting) == 1:
        return fitting[0]
    kind = config.get("model_type")
    said = f"model_type {kind!r}" if kind else "no model_type"
    if fitting:
        names = ", ".join(source.name for source in fitting)
        raise CheckpointError(
            f"This config.json has {said}, which may be {names}. Say which: --source."
        )
    types = {kind for source in sources().values() for kind in source.types}
    known = sorted(types, key=str.lower)
    raise CheckpointError(
        f"This config.json has {said}, which is not supported; known are: "
        f"{', '.join(known)}. If it is one of them under another name, say which "
        f"source reads it (--source; --list-sources)."
    )


def read_as(source: Source, config: dict) -> dict:
    """The config.json of a checkpoint that is to be read as this source, whatever its
    model_type says: an unknown one becomes the source's first."""
    if not source.types or config.get("model_type") in source.types:
        return config
    return config | {"model_type": source.types[0]}
