"""An adapter on disk, in mlx-lm's form: adapters.safetensors and adapter_config.json.

Names are those of the model with one entry for each projection, such as
"decoder.layers.3.attn.q_proj.lora_a". Weights that were trained whole stand under their
own names. What mlx-lm's keys cannot say is under the key "mm1_mlx".
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mm1_mlx._version import __version__
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack, Pair, PairSettings
from mm1_mlx.adapters.targets import Plan, add_adapter, part_of_weight, projections
from mm1_mlx.checkpoint.folder import read_json, replacing_file
from mm1_mlx.checkpoint.safetensors import read_header
from mm1_mlx.errors import CheckpointError

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
_ARRAYS = ("lora_a", "lora_b", "m")


def stored_name(path: str, projection: str) -> str:
    """The name of a projection in a file: "decoder.layers.3.attn.q_proj"."""
    owner, _, last = path.rpartition(".")
    return path if last.isdigit() or last == projection else f"{owner}.{projection}"


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """What is trainable of a model, under the names of a file."""
    found = {}
    flat: Any = tree_flatten(model.trainable_parameters())
    for name, array in flat:
        path, inside, rest = name.partition(".pairs.")
        if inside:
            projection, _, last = rest.partition(".")
            found[f"{stored_name(path, projection)}.{last}"] = array
        else:
            found[name.replace(".base.", ".")] = array
    return found


def adapter_config(plan: Plan, base: str) -> dict[str, Any]:
    """The adapter_config.json of a plan. base: what the model is called.

    mlx-lm's own keys hold the first part with pairs; "mm1_mlx" holds every part.
    """
    pairs = [t.pairs for t in plan.parts.values() if t.pairs is not None]
    first = pairs[0] if pairs else None
    kind = "full" if first is None else "dora" if first.dora else "lora"
    own = {
        "version": __version__,
        "base": base,
        "parts": {
            part: "full" if target.pairs is None else asdict(target.pairs)
            for part, target in plan.parts.items()
        },
        "layers": plan.layers,
        "first": plan.first,
        "projections": plan.projections,
    }
    values = {
        "fine_tune_type": kind,
        "num_layers": -1 if plan.layers is None else plan.layers,
        "mm1_mlx": own,
    }
    if first is not None:
        values["lora_parameters"] = {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": first.dropout,
        }
    return values


def write_adapter(folder: Path, weights: dict[str, mx.array], config: dict) -> None:
    """Write an adapter into a folder, made if missing; one that is there is replaced.

    Either file is the old one or the new one, whatever happens meanwhile.
    """
    check_adapter_target(folder, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with replacing_file(folder / WEIGHTS_FILE) as path:
        mx.save_safetensors(str(path), weights, {"format": "mlx"})


def check_adapter_target(folder: Path, overwrite: bool) -> None:
    """CheckpointError where an adapter cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Give a folder to write to.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} exists and is no adapter folder (it has no {CONFIG_FILE}). Give "
            f"another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{folder} holds an adapter already. Give another folder, or go on with "
            f"it (--resume)."
        )


def read_adapter(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Weights and configuration of an adapter folder, in our form or mlx-lm's."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no adapter folder {folder}.")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it holds no adapter.")
    config = read_json(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_FILE}: it is no adapter of mm1_mlx or mlx-lm."
        )
    read_header(path)
    return dict(mx.load(str(path))), config  # type: ignore[arg-type]


def settings_by_part(config: dict) -> Callable[[str], PairSettings]:
    """Part -> the settings of its pairs, as an adapter_config.json has them."""
    own = _object(_object(config, "mm1_mlx"), "parts")
    usual = _object(config, "lora_parameters")
    dora = config.get("fine_tune_type") == "dora"
    usual = {key: usual[key] for key in ("rank", "scale") if key in usual}
    default = _settings(usual | {"dora": dora})
    known = {p: _settings(v) for p, v in own.items() if isinstance(v, dict)}

    def settings_of(part: str) -> PairSettings:
        if part not in known and "scale" not in usual:
            raise CheckpointError(
                f"{CONFIG_FILE} does not say the scale of its pairs, though there are "
                f"some of '{part}': write it under lora_parameters."
            )
        return known.get(part, default)

    return settings_of


def _object(values: dict, key: str) -> dict:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{key} of {CONFIG_FILE} is {found!r}, but no object.")
    return found


def _settings(values: dict) -> PairSettings:
    kinds = {"rank": int, "scale": int | float, "dropout": int | float, "dora": bool}
    for key, value in values.items():
        if key not in kinds:
            raise CheckpointError(
                f"{CONFIG_FILE} has a setting '{key}', which is not known. Is it of a "
                f"newer version?"
            )
        wrong = isinstance(value, bool) is not (key == "dora")
        if wrong or not isinstance(value, kinds[key]) or not abs(value) < 1e9:
            raise CheckpointError(f"{key} of {CONFIG_FILE} cannot be {value!r}.")
    return PairSettings(**values)


def apply_adapter(
    model: nn.Module, weights: dict[str, mx.array], config: dict, where: str
) -> None:
    """Put an adapter onto a model without one, in place.

    where: its folder, for messages. CheckpointError where a name or shape is not the
    model's: the adapter is of another model.
    """
    settings_of = settings_by_part(config)
    left = dict(weights)
    flat: Any = tree_flatten(model.parameters())
    plain = dict(flat)
    for path, rows in list(projections(model)):
        pairs = {}
        for part in rows:
            name = stored_name(path, part.name)
            arrays = {
                key: left.pop(f"{name}.{key}")
                for key in _ARRAYS
                if f"{name}.{key}" in left
            }
            if arrays:
                pairs[part.name] = arrays
        if not pairs:
            continue
        settings = settings_of(part_of_weight(path + ".weight"))
        layer = add_adapter(model, path, rows, settings)
        for name, arrays in pairs.items():
            _check_pair(layer, name, arrays, f"{where}: {stored_name(path, name)}")
            layer.pairs[name] = Pair(
                arrays["lora_a"], arrays["lora_b"], arrays.get("m")
            )
    fitting = {n for n in left if n in plain and left[n].shape == plain[n].shape}
    lost = sorted(left.keys() - fitting)
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if lost[5:] else "")
        raise CheckpointError(
            f"The adapter {where} does not fit this model: {len(lost)} of its weights "
            f"have no place here, or another shape: {shown}. Load the model that it "
            f"was trained on."
        )
    kept = [(name, left[name].astype(plain[name].dtype)) for name in fitting]
    model.load_weights(kept, strict=False)


def _check_pair(layer: Any, name: str, arrays: dict, where: str) -> None:
    (part,) = (rows for rows in layer.projections if rows.name == name)
    if {"lora_a", "lora_b"} - arrays.keys():
        raise CheckpointError(f"{where} lacks its lora_a or lora_b.")
    rows, columns = part.stop - part.start, layer.input_dims
    a, b = arrays["lora_a"].shape, arrays["lora_b"].shape
    rank = a[1] if len(a) > 1 else 0
    if isinstance(layer, AdaptedStack):
        count = layer.num_experts
        fits = a == (count, rank, columns) and b == (count, rows, rank)
        lengths = (count, rows)
    else:
        fits = a == (columns, rank) and b == (rank, rows)
        lengths = (rows,)
    if not fits or not rank or arrays.get("m", mx.zeros(lengths)).shape != lengths:
        kind = "experts" if isinstance(layer, AdaptedStack) else "a weight"
        raise CheckpointError(
            f"{where} has pairs of {a} and {b}, but belongs to {kind} of "
            f"{rows} x {columns}: the adapter is of another model."
        )
    if layer.settings.dora != ("m" in arrays):
        raise CheckpointError(
            f"{where}: DoRA's row lengths are there or not, against what "
            f"{CONFIG_FILE} says."
        )


def adapted_layers(model: nn.Module) -> "dict[str, AdaptedLinear | AdaptedStack]":
    """The adapted layers of a model by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear | AdaptedStack)
    }
