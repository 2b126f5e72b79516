"""Adapters of mlx-lm, read and written: its own names of a decoder's layers.

Arrays have the shapes of ours (mm1_mlx.adapters.layers.Pair), because ours have those
of mlx-lm. A file of it has one rank and one scale, and either pairs or whole weights.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.adapters.folder import check_arrays, read_adapter, settings_by_part
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.errors import CheckpointError

from ..source import DECODER
from .arrays import Adapter, Base, Pair, even
from .names import Names, Site, folded_note, in_mlx_lm, lost, whole_weights

SOURCES = ("llama", "mixtral", "olmoe", "phi", "qwen_moe", "stablelm")
_KINDS = ("lora_a", "lora_b", "m")
_EMBEDDINGS = "decoder.embed_tokens.weight"


def _check(names: Names) -> None:
    if names.source.kind != DECODER or names.source.name not in SOURCES:
        raise CheckpointError(
            f"mlx-lm has no model of the kind {names.source.name}. Of a model with an "
            f"image encoder, the decoder's part alone can be exchanged: say of which "
            f"kind that is (--source; one of {', '.join(SOURCES)})."
        )


def _sites(names: Names) -> dict[str, Site]:
    """Module of mlx-lm -> what of ours it is."""
    return {
        site.module: site
        for site in names.sites
        if site.parameter is None and site.expert is None and len(site.parts) == 1
    }


# --- read ------------------------------------------------------------------------


def read(folder: Path, names: Names, base: Base) -> Adapter:
    """The adapter of a folder of mlx-lm; see peft.read."""
    _check(names)
    loaded, config = read_adapter(folder)
    arrays = {name: np.array(a.astype(mx.float32)) for name, a in loaded.items()}
    adapter = Adapter()
    if config.get("fine_tune_type") == "full":
        adapter.whole = whole_weights(names, arrays, str(folder))
        return adapter
    settings = settings_by_part(config)("")
    adapter.dropout = settings.dropout
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        module, _, kind = name.rpartition(".")
        if kind not in _KINDS:
            raise CheckpointError(
                f"The adapter {folder} has {name}, which is no part of a pair, though "
                f"its fine_tune_type is not 'full'."
            )
        modules.setdefault(module, {})[kind] = array
    sites = _sites(names)
    unknown = sorted(modules.keys() - sites.keys() - names.plain.keys())
    if unknown:
        what = lost(names, unknown, list(sites))
        raise CheckpointError(f"The adapter {folder} {what}.")
    folded = modules.keys() - sites.keys()
    for module, found in modules.items():
        where = f"{folder}: {module}"
        if module in folded:
            weight = names.plain[module]
            pair = _plain(weight, names, found, settings, where)
            adapter.whole[weight] = pair.merged(base(weight))
        else:
            (part,) = sites[module].parts
            adapter.pairs[part.name] = _pair(sites[module], found, settings, where)
    if folded:
        adapter.notes.append(folded_note(len(folded)))
    return adapter


def _pair(
    site: Site, found: dict[str, np.ndarray], settings: PairSettings, where: str
) -> Pair:
    shapes = {kind: array.shape for kind, array in found.items()}
    check_arrays(shapes, site.experts, site.rows, site.columns, settings.dora, where)
    a, b = found["lora_a"], found["lora_b"]
    if not site.experts:
        a, b = a.T, b.T
    return Pair(a, b, found.get("m"), settings.scale)


def _plain(
    weight: str,
    names: Names,
    found: dict[str, np.ndarray],
    settings: PairSettings,
    where: str,
) -> Pair:
    """The pair of a matrix that takes none here. Of embeddings lora_a has the rows."""
    rows, columns = names.shapes[weight]
    turned = weight == _EMBEDDINGS
    shapes = {kind: array.shape for kind, array in found.items() if kind != "m"}
    size = (columns, rows) if turned else (rows, columns)
    check_arrays(shapes, 0, *size, dora=False, where=where)
    m = found.get("m")
    if (m is not None) != settings.dora or (m is not None and m.shape != (rows,)):
        raise CheckpointError(
            f"{where}: DoRA's row lengths are there or not, against the fine_tune_type."
        )
    a, b = found["lora_a"], found["lora_b"]
    return Pair(*((b, a) if turned else (a.T, b.T)), m, settings.scale)


# --- write -----------------------------------------------------------------------


def made(adapter: Adapter, names: Names) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the adapter_config.json of an adapter, as mlx-lm's.

    CheckpointError for what mlx-lm has no form for. Ranks and scales that differ are
    made equal: with rows of zeros, and in lora_b.
    """
    _check(names)
    if not adapter.pairs:
        arrays: dict[str, mx.array] = {}
        for weight, array in adapter.whole.items():
            parts = names.split(weight, array, in_mlx_lm)
            arrays |= {name: mx.array(part) for name, part in parts.items()}
        return arrays, {"fine_tune_type": "full", "num_layers": -1}
    if adapter.whole:
        some = sorted(adapter.whole)[0]
        raise CheckpointError(
            f"This adapter has pairs and whole weights ({some}); mlx-lm has either. "
            f"Fuse it into the model (python -m mm1_mlx.fuse), or train pairs alone."
        )
    dora, alike = _is_dora(adapter), even(list(adapter.pairs.values()))
    rank, scale = alike[0].rank, alike[0].scale
    if any((p.scale, p.rank) != (scale, rank) for p in adapter.pairs.values()):
        adapter.notes.append(
            f"mlx-lm has one rank and one scale for all: they are {rank} and "
            f"{scale:g} now; smaller ranks got zeros, other scales went into lora_b"
        )
    arrays, modules = {}, []
    for site, pair in zip(_chosen(adapter, names, dora), alike, strict=True):
        a, b = (pair.a, pair.b) if site.experts else (pair.a.T, pair.b.T)
        arrays[f"{site.module}.lora_a"] = mx.array(a)
        arrays[f"{site.module}.lora_b"] = mx.array(b)
        if pair.m is not None:
            arrays[f"{site.module}.m"] = mx.array(pair.m)
        modules.append(site.module)
    layers, keys = _keys(modules, names.config.text_config.num_hidden_layers)
    settings = {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": keys}
    return arrays, {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": settings,
    }


def _chosen(adapter: Adapter, names: Names, dora: bool) -> list[Site]:
    """mlx-lm's module of every pair."""
    known: dict[str, list[Site]] = {}
    for site in _sites(names).values():
        known.setdefault(site.parts[0].name, []).append(site)
    found = []
    for name in adapter.pairs:
        if name not in known:
            raise CheckpointError(
                f"The adapter has a pair of {name}, but mlx-lm's model of the kind "
                f"{names.source.name} has no such layer."
            )
        site = min(known[name], key=lambda site: in_mlx_lm(f"{site.module}."))
        if site.experts and dora:
            raise CheckpointError(
                f"The adapter has DoRA on experts ({name}), which mlx-lm has not."
            )
        found.append(site)
    return found


def _is_dora(adapter: Adapter) -> bool:
    kinds = {pair.m is not None for pair in adapter.pairs.values()}
    if len(kinds) > 1:
        raise CheckpointError(
            "Some pairs of this adapter have DoRA's row lengths and some have none; "
            "mlx-lm has one kind for all."
        )
    return kinds.pop()


def _keys(modules: list[str], count: int) -> tuple[int, list[str]]:
    """num_layers and keys that name exactly these modules of a decoder.

    mlx-lm looks for keys inside its last layers, and in the whole model.
    """
    inside: dict[str, set[str]] = {}
    for module in modules:
        if module.startswith("model.layers."):
            number, _, rest = module.removeprefix("model.layers.").partition(".")
            inside.setdefault(number, set()).add(rest)
    beside = [m for m in modules if not m.startswith("model.layers.")]
    last = [str(number) for number in range(count - len(inside), count)]
    alike = len({frozenset(rest) for rest in inside.values()}) == 1
    if inside and alike and set(inside) == set(last):
        return len(inside), [*sorted(inside[last[0]]), *beside]
    return -1, modules  # by their whole paths, which no layer has inside
