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
from mm1_mlx.adapters.about import CONFIG_FILE, WEIGHTS_FILE, reading_of
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack, Pair, PairSettings
from mm1_mlx.adapters.switch import Adapter
from mm1_mlx.adapters.targets import Plan, adapted, part_of_weight, projections
from mm1_mlx.checkpoint.folder import read_json, replacing_file
from mm1_mlx.checkpoint.safetensors import read_header
from mm1_mlx.errors import CheckpointError
from mm1_mlx.models.mm1 import MM1

_ARRAYS = ("lora_a", "lora_b", "m")
# How names of ours begin; those of mlx-lm begin with "model.".
_ROOTS = ("decoder.", "vision.", "connector.", "tile_connector.", "image_newline")


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


def adapter_config(
    plan: Plan, base: str, resolution: Any = None, max_tiles: int | None = None
) -> dict[str, Any]:
    """The adapter_config.json of a plan. base: what the model is called. resolution,
    max_tiles: how it was trained to read pictures; None: as the model does.

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
    reading = {"resolution": resolution, "max_tiles": max_tiles}
    own |= {key: value for key, value in reading.items() if value is not None}
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
    config = _read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        hint = ""
        if "peft_type" in config:
            hint = (
                f" It is one of PEFT: python -m mm1_mlx.convert adapter {folder} "
                f"FOLDER --model NAME makes one of mm1_mlx of it."
            )
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_FILE}: it is no adapter of mm1_mlx or mlx-lm."
            + hint
        )
    read_header(path)
    return dict(mx.load(str(path))), config  # type: ignore[arg-type]


def form_of(folder: Path) -> str:
    """Whose form an adapter folder has: "mm1", "mlx-lm" or "peft"."""
    config = _read_config(folder)
    if "peft_type" in config:
        return "peft"
    path = folder / WEIGHTS_FILE
    if "mm1_mlx" in config or not path.is_file():
        return "mm1"
    names = read_header(path)
    return "mm1" if any(name.startswith(_ROOTS) for name in names) else "mlx-lm"


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"There is no adapter folder {folder}.")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it holds no adapter.")
    return read_json(folder / CONFIG_FILE)


def settings_by_part(config: dict) -> Callable[[str], PairSettings]:
    """Part -> the settings of its pairs, as an adapter_config.json has them.

    A rank of 0 is one that it does not say.
    """
    own = _object(_object(config, "mm1_mlx"), "parts")
    usual = _object(config, "lora_parameters")
    dora = config.get("fine_tune_type") == "dora"
    usual = {key: usual[key] for key in ("rank", "scale") if key in usual}
    default = _settings({"rank": 0} | usual | {"dora": dora})
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
    model: MM1, weights: dict[str, mx.array], config: dict, where: str
) -> None:
    """Put an adapter onto a model without one, in place; errors as fit_adapter."""
    if model.decoder.adapter is not None or (model.adapters and model.adapters.names):
        raise _not_alone(where)
    fit_adapter(model, weights, config, where).put_on(model)


def fit_adapter(
    model: MM1,
    weights: dict[str, mx.array],
    config: dict,
    where: str,
    name: str | None = None,
) -> Adapter:
    """The adapter as it fits a model that has none, which is left as it is.

    where: its folder, for messages. name: its own; None takes the folder. Raises
    CheckpointError where a name or shape is not the model's: the adapter is of another
    model.
    """
    if adapted_layers(model):
        raise _not_alone(where)
    layers = {}
    settings_of = settings_by_part(config)
    left = dict(weights)
    flat: Any = tree_flatten(model.parameters())
    plain = dict(flat)
    for path, rows in list(projections(model)):
        pairs = {}
        for part in rows:
            stored = stored_name(path, part.name)
            arrays = {
                key: left.pop(f"{stored}.{key}")
                for key in _ARRAYS
                if f"{stored}.{key}" in left
            }
            if arrays:
                pairs[part.name] = arrays
        if not pairs:
            continue
        settings = settings_of(part_of_weight(path + ".weight"))
        layers[path] = layer = adapted(model, path, rows, settings)
        for of, arrays in pairs.items():
            _check_pair(layer, of, arrays, f"{where}: {stored_name(path, of)}")
            _check_rank(arrays["lora_b"], settings.rank, f"{where}: {of} of {path}")
            layer.pairs[of] = Pair(arrays["lora_a"], arrays["lora_b"], arrays.get("m"))
    below = {f"{path}.weight" for path in layers} | layers.keys()  # frozen under pairs
    fitting = {n for n in left if n in plain and left[n].shape == plain[n].shape}
    fitting -= below
    lost = sorted(left.keys() - fitting)
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if lost[5:] else "")
        raise CheckpointError(
            f"The adapter {where} does not fit this model: {len(lost)} of its weights "
            f"have no place here, or another shape: {shown}. Load the model that it "
            f"was trained on."
        )
    whole = {name: left[name].astype(plain[name].dtype) for name in sorted(fitting)}
    return Adapter(layers, whole, name or where, reading_of(config))


def _not_alone(where: str) -> CheckpointError:
    return CheckpointError(
        f"The model has an adapter already, so {where} cannot be put on it. "
        f"load_adapters holds several beside each other, on a model that was loaded "
        f"without one."
    )


def _check_pair(layer: Any, name: str, arrays: dict, where: str) -> None:
    (part,) = (rows for rows in layer.projections if rows.name == name)
    experts = layer.num_experts if isinstance(layer, AdaptedStack) else 0
    shapes = {key: array.shape for key, array in arrays.items()}
    rows, columns = part.stop - part.start, layer.input_dims
    check_arrays(shapes, experts, rows, columns, layer.settings.dora, where)


def check_arrays(
    shapes: dict[str, tuple[int, ...]],
    experts: int,
    rows: int,
    columns: int,
    dora: bool,
    where: str,
) -> None:
    """CheckpointError unless lora_a, lora_b and m are those of a projection.

    shapes: of those that are there. experts: 0 for a matrix. where: for the message.
    """
    if {"lora_a", "lora_b"} - shapes.keys():
        raise CheckpointError(f"{where} lacks its lora_a or lora_b.")
    a, b = shapes["lora_a"], shapes["lora_b"]
    rank = a[1] if len(a) > 1 else 0
    if experts:
        fits = a == (experts, rank, columns) and b == (experts, rows, rank)
        lengths: tuple[int, ...] = (experts, rows)
    else:
        fits = a == (columns, rank) and b == (rank, rows)
        lengths = (rows,)
    if not fits or not rank or shapes.get("m", lengths) != lengths:
        kind = "experts" if experts else "a weight"
        raise CheckpointError(
            f"{where} has pairs of {a} and {b}, but belongs to {kind} of "
            f"{rows} x {columns}: the adapter is of another model."
        )
    if dora != ("m" in shapes):
        raise CheckpointError(
            f"{where}: DoRA's row lengths are there or not, against what "
            f"{CONFIG_FILE} says."
        )


def _check_rank(lora_b: mx.array, rank: int, where: str) -> None:
    found = lora_b.shape[0 if lora_b.ndim == 2 else -1]
    if rank not in (0, found):
        raise CheckpointError(
            f"{where} has pairs of rank {found}, but {CONFIG_FILE} says {rank}: one of "
            f"the two files is of another adapter."
        )


def adapted_layers(model: nn.Module) -> "dict[str, AdaptedLinear | AdaptedStack]":
    """The adapted layers of a model by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear | AdaptedStack)
    }
