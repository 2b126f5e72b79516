"""convert_adapter(): an adapter of PEFT, mlx-lm or ours in another one's form."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.adapters.about import READING_FILE, kept_reading, reading_of
from mm1_mlx.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, form_of
from mm1_mlx.checkpoint.folder import write_json
from mm1_mlx.config import EncoderConfig, MM1Config
from mm1_mlx.errors import CheckpointError

from ..conversion import Opened, find_origin, open_checkpoint
from ..export import hub_config
from ..output import public_name
from ..packed import Packed
from ..pipeline import prepare, rows_of
from ..source import Source, find_source, sources
from . import mlx_lm, ours, peft, peft_write
from .arrays import Adapter, Base
from .names import Names

FORMS = ("mm1", "peft", "mlx-lm")
# model_type of an export -> whose names it has; Llama's else.
_SOURCES = {name: name for name in ("llava", "llava_next", "mixtral")}
_SOURCES["QH_360VL"] = "vl360"
_FILES = {"mm1": WEIGHTS_FILE, "mlx-lm": WEIGHTS_FILE, "peft": peft.FILES[0]}


def convert_adapter(
    folder: Path,
    out: Path,
    model: str | Path,
    to: str = "mm1",
    *,
    source: str | None = None,
    transformers: int = 5,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the adapter of `folder` in another form: all of it, or nothing.

    model: name, folder or hub id of what it was trained on, ours or public. to: one of
    FORMS. source: whose names PEFT's modules have, where the model does not tell.
    transformers: 5 or 4, by whose names PEFT's modules are written. overwrite: replace
    an adapter at `out`. tell: receives lines for people.

    Returns "from", "to", "source", "pairs" and "whole" (how many). Raises
    CheckpointError for an adapter of another model, and for what the new form has no
    place for.
    """
    form = form_of(folder)
    if form == to == "mm1":
        raise CheckpointError(f"{folder} is an adapter of mm1_mlx already.")
    _check_target(out, folder, overwrite)
    place = find_origin(model)
    opened = open_checkpoint(place, locate=find_origin)
    if isinstance(opened.config, EncoderConfig):
        raise CheckpointError(f"{model} is an image encoder alone, which has no form.")
    names = Names(opened.config, *_source(opened, source))
    base = _base(opened)
    adapter = _read(form, folder, names, base)
    if to == "mm1":
        origin = {"from": form, "adapter": public_name(folder)} | (provenance or {})
        arrays, config = ours.made(adapter, names, public_name(model), origin)
    elif to == "peft":
        known = _original(opened, public_name(model))
        arrays, config = peft_write.made(adapter, names, base, known, transformers)
    else:
        arrays, config = mlx_lm.made(adapter, names)
    with _making(out, overwrite) as new:
        _write(new, to, arrays, config)
        if to != "mm1":
            _keep_reading(new, adapter, to)
    for line in adapter.notes:
        tell(line)
    return {
        "from": form,
        "to": to,
        "source": names.source.name,
        "pairs": len(adapter.pairs),
        "whole": len(adapter.whole),
    }


def foreign_adapter(
    folder: Path, config: MM1Config, base: Base
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the configuration, as ours, of an adapter of PEFT or mlx-lm.

    config: of the model that it is for, which says what it was converted from.
    """
    names = Names(config, source_of(config))
    adapter = _read(form_of(folder), folder, names, base)
    return ours.made(adapter, names, "", {})


def _read(form: str, folder: Path, names: Names, base: Base) -> Adapter:
    if form == "mm1":
        return ours.read(folder, names)
    adapter = (peft if form == "peft" else mlx_lm).read(folder, names, base)
    adapter.reading = reading_of(kept_reading(folder, {}))
    return adapter


def _keep_reading(folder: Path, adapter: Adapter, form: str) -> None:
    """Write the adapter's resolution in a file of its own: these forms have no place
    for it, and PEFT warns of keys that it does not know."""
    reading = {key: value for key, value in adapter.reading.items() if value}
    if not reading:
        return
    write_json(folder / READING_FILE, {"mm1_mlx": reading})
    said = ", ".join(f"{key} {value}" for key, value in reading.items())
    name = "PEFT" if form == "peft" else form
    adapter.notes.append(
        f"the adapter was trained with {said}: {READING_FILE} keeps that for mm1_mlx, "
        f"{name} does not know of it and reads pictures as its processor says"
    )


# --- the model -------------------------------------------------------------------


def source_of(config: MM1Config) -> Source:
    """Whose names a model's original has: what it was converted from, or else as what
    it is exported, or else MM1 in PyTorch (convert.references.mm1)."""
    for values in config.extra.values():
        name = values.get("source") if isinstance(values, dict) else None
        if name != "mm1" and name in sources():
            return find_source(name)
    try:
        kind = hub_config(config)["model_type"]
    except CheckpointError:
        return find_source("mm1_torch")
    return find_source(_SOURCES.get(kind, "llama"))


def _source(opened: Opened, name: str | None) -> tuple[Source, dict]:
    """The source of the adapter's names, and the config.json that it read."""
    if name is not None:
        return find_source(name), {}
    if opened.source.name == "mm1":
        assert isinstance(opened.config, MM1Config)
        return source_of(opened.config), {}
    return opened.source, opened.origin.config


def _original(opened: Opened, model: str) -> str:
    """What a model was converted from, as PEFT's base_model_name_or_path."""
    for values in opened.config.extra.values():
        if isinstance(values, dict) and isinstance(values.get("path"), str):
            return values["path"]
    return model


def _base(opened: Opened) -> Base:
    """Weights of the model by our names, read when they are asked for."""
    weights: dict[str, Any] = {}

    def read(name: str) -> np.ndarray:
        if not weights:
            plan = prepare(opened.origin, opened.source, opened.config, "F32")
            weights.update({weight.name: weight for weight in plan.weights})
        weight = weights[name]
        names = weight.job.names if weight.job else ()
        if any(isinstance(weight.arrays[n], Packed) for n in names):
            raise CheckpointError(
                f"The adapter changes {name} itself, which is quantized in "
                f"{opened.origin.folder}. Give the model of 16 bits."
            )
        return rows_of(weight, 1)

    return read


# --- the folder ------------------------------------------------------------------


def _write(
    folder: Path, form: str, arrays: dict[str, mx.array], config: dict[str, Any]
) -> None:
    kind = "pt" if form == "peft" else "mlx"
    path = folder / _FILES[form]
    try:
        mx.save_safetensors(str(path), arrays, {"format": kind})
    except RuntimeError as error:
        raise CheckpointError(f"{path.name} could not be written: {error}.") from error
    write_json(folder / CONFIG_FILE, config)


def _check_target(out: Path, source: Path, overwrite: bool) -> None:
    """CheckpointError where `out` is what is read, or in use for anything else."""
    place, read = out.resolve(), source.resolve()
    if read == place or read.is_relative_to(place):
        raise CheckpointError(f"{out} is, or holds, what is read. Give another folder.")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file. Give a folder to write to.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{out} exists and is no adapter folder (it has no {CONFIG_FILE}). Give "
            f"another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{out} holds an adapter already. Give another folder, or --overwrite."
        )


@contextmanager
def _making(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of `out` if all goes well, else vanishes."""
    place = out.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=place.parent)
        with beside as name:
            new, old = Path(name) / "new", Path(name) / "old"
            new.mkdir()
            yield new
            if place.exists():
                _keep_other_files(place, new)
                place.rename(old)
            try:
                new.rename(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                raise
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written: {error.strerror}. Nothing was changed."
        ) from error


def _keep_other_files(place: Path, new: Path) -> None:
    """What a user put beside an adapter stays; the old adapter does not."""
    ours = {CONFIG_FILE, WEIGHTS_FILE, READING_FILE, *peft.FILES, peft.BESIDE}
    for entry in place.iterdir():
        if entry.name in ours or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)
