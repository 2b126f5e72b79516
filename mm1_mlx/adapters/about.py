"""What an adapter folder holds, from its headers alone: no weights, no MLX."""

import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mm1_mlx.adapters.parts import PARTS, part_of_weight
from mm1_mlx.checkpoint.json_file import read_json
from mm1_mlx.checkpoint.safetensors import TensorInfo, read_header
from mm1_mlx.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
READING_FILE = "mm1_mlx.json"  # beside an adapter in another form; see kept_reading
_ROOTS = ("decoder", "vision", "connector", "tile_connector", "image_newline")
# Ends of what belongs to a pair: here and in mlx-lm, then in PEFT.
_PAIR = re.compile(r"(.+)\.(lora_a|lora_b|m|lora_A|lora_B|lora_magnitude_vector)\b.*")


@dataclass
class _Part:
    """What is found of one part: the projections with pairs, and of whole weights."""

    projections: dict[str, None] = field(default_factory=dict)  # in order
    ranks: set[int] = field(default_factory=set)
    dora: bool = False
    layers: set[int] = field(default_factory=set)
    pairs: int = 0
    whole: int = 0


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What an adapter is, for JSON.

    "kind" (LoRA, DoRA, full, or several with "+"), "form" (mm1_mlx, mlx-lm or PEFT),
    "base" (what it was trained on, or None), "parts" (a row for each: how, rank, scale,
    projections, decoder layers, parameters), "parameters", "types", "resolution" and
    "max_tiles" (see reading_of), "steps" and "steps_planned" (or None), "bytes" of the
    adapter, and "other_bytes" of the files beside it, such as those that lora --resume
    goes on from.

    CheckpointError for a folder that holds no adapter, or a broken one.
    """
    config, weights = _open(folder)
    infos = read_header(weights)
    if not infos:
        raise CheckpointError(f"{weights} holds no weights: nothing was trained.")
    found: dict[str, _Part] = {}
    for name, info in infos.items():
        _count(found, name, info)
    order = {part: number for number, part in enumerate((*PARTS, "other"))}
    rows = [
        _row(part, found[part], config) for part in sorted(found, key=order.__getitem__)
    ]
    steps, planned = _steps(folder, config)
    kinds = [kind for row in rows for kind in row["how"].split("+")]
    files = (folder / CONFIG_FILE, weights)
    beside = [path for path in folder.iterdir() if path not in files]
    return {
        "kind": "+".join(dict.fromkeys(kinds)),
        "form": _form(config, infos),
        "base": _base(config),
        "parts": rows,
        "parameters": sum(row["parameters"] for row in rows),
        "types": sorted({info.dtype for info in infos.values()}),
        **reading_of(config | kept_reading(folder, config)),
        "steps": steps,
        "steps_planned": planned,
        "bytes": sum(path.stat().st_size for path in files),
        "other_bytes": sum(p.stat().st_size for p in beside if p.is_file()),
    }


def config_of(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of an adapter that is whole; CheckpointError."""
    config = _open(folder)[0]
    return config | kept_reading(folder, config)


def kept_reading(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a folder of PEFT or mlx-lm, whose config has no place for it, keeps of how
    its adapter reads pictures, as reading_of takes it; {} where there is nothing.

    config: of the folder; one of ours says it itself. CheckpointError.
    """
    file = folder / READING_FILE
    if "mm1_mlx" in config or not file.is_file():
        return {}
    kept = read_json(file)
    reading_of(kept, READING_FILE)
    return kept


def reading_of(config: dict[str, Any], file: str = CONFIG_FILE) -> dict[str, Any]:
    """The "resolution" and "max_tiles" that an adapter was trained with, as Processor
    takes them; None is the model's own. config: of adapter_config.json.

    file: what messages call it. CheckpointError for what is neither.
    """
    own = _object(config, "mm1_mlx", file)
    found = {key: own.get(key) for key in ("resolution", "max_tiles")}
    for key, value in found.items():
        words = ("native", "dynamic") if key == "resolution" else ()
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value is not None and value not in words and not whole:
            raise CheckpointError(f"{key} of {file} cannot be {value!r}.")
    return found


def read_as_trained(processor: Any, reading: dict[str, Any]) -> None:
    """Have a processor read pictures as reading_of says, where a call does not."""
    processor.resolution = reading.get("resolution")
    processor.max_tiles = reading.get("max_tiles")


def added_bytes(folder: str | Path) -> int:
    """Bytes of what an adapter puts beside a model's weights, from its file's header.

    What it puts in their place (parts that were trained whole) adds nothing.
    """
    _, path = _open(Path(folder))
    return sum(
        info.stop - info.start
        for name, info in read_header(path).items()
        if _PAIR.fullmatch(name)
    )


def _open(folder: Path) -> tuple[dict[str, Any], Path]:
    """The configuration, and the file with the weights."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no adapter folder {folder}.")
    if not (folder / CONFIG_FILE).is_file():
        model = (folder / "config.json").is_file()
        hint = " It is a model folder: give it with --model." if model else ""
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}: it holds no adapter.{hint}"
        )
    config = read_json(folder / CONFIG_FILE)
    for name in (WEIGHTS_FILE, PEFT_WEIGHTS_FILE):
        if (folder / name).is_file():
            return config, folder / name
    if (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"The weights of {folder} are in adapter_model.bin, a pickle, which is not "
            f"opened here. Save it with safetensors."
        )
    raise CheckpointError(
        f"{folder} has a {CONFIG_FILE}, but no {WEIGHTS_FILE}: the adapter is not "
        f"whole."
    )


def _count(found: dict[str, _Part], name: str, info: TensorInfo) -> None:
    """Add one array to what is known of its part."""
    pair = _PAIR.fullmatch(name)
    path = pair[1] if pair else name
    ours = name.split(".")[0] in _ROOTS
    weight = path + ".weight" if pair else path
    part = found.setdefault(part_of_weight(weight) if ours else "other", _Part())
    if layer := re.match(r"decoder\.layers\.(\d+)\.", path):
        part.layers.add(int(layer[1]))
    if pair is None:
        part.whole += prod(info.shape)
        return
    part.pairs += prod(info.shape)
    owner, _, last = path.rpartition(".")
    short = f"{owner.rpartition('.')[2]}.{last}" if last.isdigit() else last
    part.projections[short] = None
    part.dora |= pair[2] in ("m", "lora_magnitude_vector")
    if not ours and ".experts" in path:
        return  # PEFT lays the pairs of all experts into one matrix
    if pair[2] in ("lora_a", "lora_A") and len(info.shape) >= 2:
        first = pair[2] == "lora_A" or len(info.shape) == 3  # (r, in) or (E, r, in)
        part.ranks.add(info.shape[-2] if first else info.shape[-1])


def _row(name: str, part: _Part, config: dict[str, Any]) -> dict[str, Any]:
    """A part's line."""
    kinds = ["DoRA" if part.dora else "LoRA"] if part.pairs else []
    if part.whole:
        kinds.append("full")
    return {
        "part": name,
        "how": "+".join(kinds),
        "ranks": sorted(part.ranks),
        "scale": _scale(name, config) if part.pairs else None,
        "projections": list(part.projections),
        "layers": sorted(part.layers),
        "parameters": part.pairs + part.whole,
    }


def _scale(part: str, config: dict[str, Any]) -> float | None:
    """What the pairs of a part are multiplied by; None where it differs, or is not
    said."""
    own = _object(_object(config, "mm1_mlx"), "parts").get(part)
    usual = _object(config, "lora_parameters")
    if isinstance(own, dict) and "scale" in own:
        return _number(own["scale"], "scale")
    if "scale" in usual:
        return _number(usual["scale"], "scale")
    by_module = config.get("alpha_pattern") or config.get("rank_pattern")
    if "lora_alpha" not in config or by_module:
        return None
    alpha, rank = (_number(config.get(key), key) for key in ("lora_alpha", "r"))
    if rank <= 0:
        raise CheckpointError(f"r of {CONFIG_FILE} cannot be {rank:g}.")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _object(
    values: dict[str, Any], key: str, file: str = CONFIG_FILE
) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{key} of {file} is {found!r}, but no object.")
    return found


def _number(value: Any, key: str) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not abs(value) < 1e9:
        raise CheckpointError(f"{key} of {CONFIG_FILE} cannot be {value!r}.")
    return float(value)


def _form(config: dict[str, Any], infos: dict[str, TensorInfo]) -> str:
    if "peft_type" in config:
        return "PEFT"
    ours = any(name.split(".")[0] in _ROOTS for name in infos)
    return "mm1_mlx" if ours or "mm1_mlx" in config else "mlx-lm"


def _base(config: dict[str, Any]) -> str | None:
    """What it was trained on, as the command called it."""
    own = _object(config, "mm1_mlx").get("base")
    for value in (own, config.get("base_model_name_or_path"), config.get("model")):
        if isinstance(value, str) and value:
            return value
    return None


def _steps(folder: Path, config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Updates that were made and that were planned, where the run's files say so."""
    done = planned = None
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        done = int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not of lora, or killed while it wrote: the adapter is whole
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        planned = int(run["settings"]["steps"])
    except (OSError, ValueError, LookupError, TypeError):
        iters = config.get("iters")  # mlx-lm's
        planned = iters if isinstance(iters, int) else None
    return done, planned
