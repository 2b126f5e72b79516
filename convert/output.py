"""The model folder that a conversion leaves: weights, config, processor, model card."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mm1_mlx._version import __version__
from mm1_mlx.checkpoint.folder import is_foreign, read_json, replacing, write_json
from mm1_mlx.config import EncoderConfig, MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.memory import bytes_text
from mm1_mlx.quantization.recipes import most_common, settings_for_config

from .pipeline import Conversion, write

CARD = "README.md"


def write_folder(
    out: Path,
    conversion: Conversion,
    config: MM1Config | EncoderConfig,
    settings: ImageSettings | None,
    tokenizer: Any,
    template: str | None = None,
    *,
    sources: Sequence[Path | None] = (),
    default_quantization: dict | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """Write a whole model folder, or nothing.

    template: the chat template, where the tokenizer brings none. sources: the folders
    that it is made of, which must not be replaced. CheckpointError where
    the disk is too small, before the work and during it.
    """
    chosen = {w.name: w.quantize for w in conversion.weights if w.quantize is not None}
    if chosen and isinstance(config, MM1Config):
        default = default_quantization or most_common(chosen.values())
        config = replace(config, quantization=settings_for_config(chosen, default))
    with making(out, conversion.nbytes, overwrite, progress, sources) as made:
        new, count = made
        write(conversion, new, progress=count)
        _write_processor(new, config, settings, tokenizer, template)
        (new / CARD).write_text(card(config), encoding="utf-8")
        write_json(new / "config.json", config.to_dict())


@contextmanager
def making(
    out: Path,
    nbytes: int,
    overwrite: bool,
    progress: Callable[[int, int], Any],
    sources: Sequence[Path | None] = (),
) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The folder to write into, which takes the place of `out` in the end, and what
    is to be told of bytes written. nbytes: how many there will be.

    CheckpointError where the disk is too small, before the work and during it, and
    where `out` is one of the `sources`, or holds a checkpoint of another project.
    """
    check_apart(out, sources)
    _check_room(out, nbytes)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, nbytes)

    with replacing(out, overwrite=overwrite) as new:
        try:
            yield new, count
        except OSError as error:
            raise CheckpointError(
                f"{out} could not be written: {error.strerror} after {done} of "
                f"{nbytes} bytes. Nothing was left there; make room and run it again."
            ) from error


def check_apart(out: Path, sources: Sequence[Path | None]) -> None:
    """CheckpointError where `out` is what is read, or was downloaded."""
    place = out.resolve()
    for source in sources:
        real = source.resolve() if source is not None else None
        if real is not None and (real == place or real.is_relative_to(place)):
            raise CheckpointError(
                f"{out} is, or holds, what would be read. Give another folder to write "
                f"to: the original is never replaced."
            )
    if out.is_dir() and is_foreign(out) and not _is_exported(out):
        raise CheckpointError(
            f"{out} holds a checkpoint of another project, which is never replaced. "
            f"Give another folder."
        )


def _is_exported(folder: Path) -> bool:
    """Whether `export` has written this folder."""
    path = folder / "config.json"
    return path.is_file() and isinstance(read_json(path).get("mm1_mlx"), dict)


def _check_room(out: Path, needed: int) -> None:
    """CheckpointError before the work where the disk is too small."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{out} needs {bytes_text(needed)}, but {bytes_text(free)} are free on its "
            f"disk. Make room, choose another place, or take fewer bits."
        )


def _write_processor(
    new: Path,
    config: MM1Config | EncoderConfig,
    settings: ImageSettings | None,
    tokenizer: Any,
    template: str | None,
) -> None:
    if tokenizer is not None and isinstance(config, MM1Config):
        from mm1_mlx.inputs.processor import Processor

        chat = tokenizer.chat_template or template
        Processor(tokenizer, settings, config, chat_template=chat).save(new)
    elif settings is not None:
        settings.write(new)


def with_extra(
    config: MM1Config | EncoderConfig, key: str, values: dict[str, Any]
) -> MM1Config | EncoderConfig:
    """The config with one more entry of provenance; the earlier ones stay.

    key: what was done, as "converted"; done again, it becomes "converted 2".
    """
    versions = {"mm1_mlx": __version__, "mlx": version("mlx")}
    count = sum(re.fullmatch(rf"{key}( \d+)?", k) is not None for k in config.extra)
    name = key if not count else f"{key} {count + 1}"
    return replace(config, extra=config.extra | {name: values | versions})


def public_name(name: str | Path) -> str:
    """What a model card calls a model: a hub id, or of a path its last part, because
    the rest is nobody's business."""
    place = Path(name).expanduser()
    if place.exists() or place.is_absolute():
        return place.resolve().name or str(name)
    return str(name)


def public_command(words: Sequence[str]) -> str:
    """A command line as a model card shows it: of every path its last part."""
    shown = []
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag.startswith("--"):
            shown.append(f"{flag}={public_name(value)}")
        else:
            shown.append(public_name(word) if "/" in word else word)
    return shlex.join(shown)


def licence_of(folder: Path) -> str | None:
    """The licence that a model card's front matter names, if there is one.

    "other (llama3)" where the hub's list does not have it; several with a comma.
    """
    if not (folder / CARD).is_file():
        return None
    try:
        from huggingface_hub import metadata_load

        values = metadata_load(folder / CARD) or {}
    except Exception:  # no package, or front matter that is no YAML
        return None
    found = values.get("license") or values.get("licence")
    names = found if isinstance(found, list) else [found]
    names = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    if names == ["other"] and isinstance(values.get("license_name"), str):
        return f"other ({values['license_name']})"
    return ", ".join(names) or None


def _front_of_licence(licence: str) -> list[str]:
    """Its lines in the front matter of a card."""
    kind, _, name = licence.partition(" (")
    if name:
        return [f"license: {kind}", f"license_name: {name.removesuffix(')')}"]
    if ", " in licence:
        return ["license:", *(f"- {one}" for one in licence.split(", "))]
    return [f"license: {licence}"]


def card(config: MM1Config | EncoderConfig, library: str = "mlx") -> str:
    """The folder's model card: what it is, what it was made from, and how.

    library: "mlx" for a folder of ours, "transformers" for an exported one.
    """
    licences = sorted(_licences(config.extra))
    front = ["---", f"library_name: {library}", "tags:", f"- {library}", "- mm1_mlx"]
    if len(licences) == 1:
        front[1:1] = _front_of_licence(licences[0])
    what = "An image encoder" if isinstance(config, EncoderConfig) else "A model"
    reader = "mm1_mlx" if library == "mlx" else library
    lines = [*front, "---", "", f"# {what} for {reader}", ""]
    for step, values in config.extra.items():
        if isinstance(values, dict):
            lines += [f"## {step.capitalize()}", "", *_bullets(values), ""]
    if not licences:
        lines += ["The licence of the original was not found: look it up there.", ""]
    elif len(licences) > 1:
        lines += [f"Licences of its parts: {', '.join(licences)}.", ""]
    return "\n".join(lines)


def _licences(extra: dict) -> set[str]:
    found = set()
    for key, value in extra.items():
        if key == "licence" and isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict):
            found |= _licences(value)
    return found


def _bullets(values: dict, indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {key}:", *_bullets(value, indent + "  ")]
        elif value is not None:
            lines.append(f"{indent}- {key}: {value}")
    return lines
