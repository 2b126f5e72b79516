"""A model folder: config.json, model*.safetensors with its index, and the processor's.

Reading trusts nothing: no code is run, paths stay in the folder, headers are checked
before MLX sees a file, and names and shapes must be the model's, all of them.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mm1_mlx.checkpoint.disk import flush, flush_folder
from mm1_mlx.checkpoint.json_file import read_json
from mm1_mlx.checkpoint.safetensors import TensorInfo, read_header
from mm1_mlx.config import EncoderConfig, MM1Config, VisionConfig
from mm1_mlx.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as the hub's own tools cut


def is_foreign(folder: Path) -> bool:
    """Whether a folder's config.json is another project's: it must be converted.

    A folder without one is not: reading it will say what is wrong.
    """
    if not (folder / CONFIG_FILE).is_file():
        return (folder / "open_clip_config.json").is_file()
    kind = read_json(folder / CONFIG_FILE).get("model_type", "mm1")
    return kind not in ("mm1", "mm1_vision")


def is_complete(folder: Path) -> bool:
    """Whether a model stands there: config.json is written last."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path) -> MM1Config:
    """The folder's config.json; CheckpointError or ConfigError says what is wrong."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    if "model_type" not in values:
        raise ConfigError(f"{path} has no model_type, so it is not a model's config.")
    return MM1Config.from_dict(values)


def read_encoder_config(folder: Path) -> VisionConfig:
    """The encoder's part of a folder's config.json, of an encoder or a whole model."""
    values = read_json(folder / CONFIG_FILE)
    if values.get("model_type") == "mm1_vision":
        return EncoderConfig.from_dict(values).vision_config
    found = read_config(folder).vision_config
    if found is None:
        raise CheckpointError(f"{folder} is a decoder alone: it has no image encoder.")
    return found


def weight_files(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    """The folder's weight files and what each holds; every header is checked.

    By the index if there is one, else all model*.safetensors.
    """
    if (folder / INDEX_FILE).exists():
        return _indexed_files(folder)
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} has no model*.safetensors: no weights.")
    files = {path: read_header(inside(folder, path.name)) for path in paths}
    owner: dict[str, Path] = {}
    for path, infos in files.items():
        for name in infos:
            if name in owner:
                raise CheckpointError(
                    f"'{name}' is both in {owner[name].name} and in {path.name} of "
                    f"{folder}, and no index says which one counts. Remove one file."
                )
            owner[name] = path
    return files


def _indexed_files(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    path = folder / INDEX_FILE
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(file, str) for file in table.values()
    ):
        raise CheckpointError(f"{path} has no weight_map of names to files.")
    names: dict[str, set[str]] = {}
    for name, file in table.items():
        names.setdefault(file, set()).add(name)
    files = {}
    for file in sorted(names):
        shard = inside(folder, file)
        if not shard.is_file():
            raise CheckpointError(f"{path} names {file!r}, but the folder lacks it.")
        infos = read_header(shard)
        if different := sorted(names[file] ^ infos.keys()):
            raise CheckpointError(
                f"{path} and {file} do not hold the same names; first: "
                f"{_first(different)}."
            )
        files[shard] = infos
    return files


def inside(folder: Path, name: str) -> Path:
    """folder/name, unless that would read something elsewhere.

    A link may lead to the hub's own store (models--X/blobs), which holds the files of
    models--X/snapshots/Y.
    """
    unsafe = not name or name in (".", "..") or set(name) & set("/\\:\0")
    path = folder / ("-" if unsafe else name)
    if not unsafe:
        real, home = path.resolve(), folder.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            there = "outside of the folder" if real.exists() else "which is not there"
            raise CheckpointError(
                f"{name!r} in {folder} is a link to {real}, {there}. Links out of a "
                f"checkpoint are not followed: put the file itself there, or give the "
                f"folder that holds it."
            )
    if unsafe:
        raise CheckpointError(
            f"{folder} refers to {name!r}, which is outside of it. Only plain file "
            f"names inside the folder are read."
        )
    return path


def _first(names: list[str], n: int = 5) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All arrays of the folder by name; lazy: MLX reads one when it is evaluated."""
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        weights.update(mx.load(str(path)))  # type: ignore[arg-type]
    return weights


def check_weights(
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    where: str,
    advice: str = "Convert it again, or correct config.json.",
) -> None:
    """CheckpointError unless names and shapes are equal; names the first five of each.

    found, expected: name to shape. where: what the found ones come from, for the
    message. advice: what to do, its last sentence.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshaped = [
        f"{name} is {tuple(found[name])} but must be {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    parts = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshaped", misshaped),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            f"The weights of {where} do not fit its config.json. {'; '.join(parts)}. "
            f"{advice}"
        )


def make_shards(
    weights: dict[str, mx.array], limit: int = SHARD_BYTES
) -> list[dict[str, mx.array]]:
    """The weights in order, cut so that no part has more than `limit` bytes.

    An array that is larger than that is a part of its own.
    """
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, array in weights.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def write_folder(
    folder: Path,
    config: MM1Config,
    weights: dict[str, mx.array],
    write_more: Callable[[Path], None] | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a whole model folder, or nothing.

    It is written beside its place and then moved there, so that a reader never sees
    half of it and the files that the weights are still read from stay as they are.
    write_more: called with the new folder, for tokenizer and picture settings.
    overwrite: replace a model folder that is there; its other files are kept.
    """
    with replacing(Path(folder), overwrite=overwrite) as new:
        _write_weights(new, weights, shard_bytes)
        if write_more is not None:
            write_more(new)
        write_json(new / CONFIG_FILE, config.to_dict())


def write_json(path: Path, values: dict) -> None:
    """An object, for people to read."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _write_weights(folder: Path, weights: dict[str, mx.array], limit: int) -> None:
    shards = make_shards(weights, limit)
    table = {}
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
        table.update(dict.fromkeys(shard, name))
    total = sum(array.nbytes for array in weights.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: table[name] for name in sorted(table)},
    }
    write_json(folder / INDEX_FILE, index)


def check_target(folder: Path, overwrite: bool) -> None:
    """CheckpointError where `folder` is in use: see `replacing`."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Give a folder to write to.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} exists and is not empty. Give another folder, or overwrite it "
            f"(--overwrite; in Python overwrite=True)."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is not a model folder (it has no {CONFIG_FILE}), so it will not "
            f"be overwritten. Give another folder."
        )


@contextmanager
def replacing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that takes the place of `folder` if all goes well, else vanishes.

    CheckpointError where `folder` is in use: for a model unless overwrite, or for
    anything else.
    """
    import shutil  # here, because reading a model should not wait for it
    import tempfile

    check_target(folder, overwrite)
    place = Path(os.path.abspath(folder))
    start = f".{place.name}.{os.getpid()}."
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(place)
        new = Path(tempfile.mkdtemp(prefix=start, dir=place.parent))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error.strerror} ({error.filename}). Give a "
            f"place that you can write to."
        ) from error
    try:
        yield new
        new.chmod(0o777 & ~_umask())  # mkdtemp's is private
        if not place.exists():
            new.rename(place)
            flush_folder(place.parent)
            return
        _keep_other_files(place, new)
        old = new.with_name(new.name + ".old")
        place.rename(old)
        new.rename(place)
        flush_folder(place.parent)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` if all goes well, else vanishes.

    Its bytes are on the disk before the old file goes. CheckpointError where the disk
    does not take them; the old file is whole then.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            flush(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"{path} could not be written: {reason.rstrip('.')}. What was there before "
            f"is whole."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _clear_up(place: Path) -> None:
    """Remove what a killed process left beside a folder that it was writing.

    Was it killed while the new folder took the old one's place, the old one comes back.
    """
    import shutil

    pattern = re.compile(re.escape(f".{place.name}.") + r"(\d+)\.\w+(\.old)?")
    for path in list(place.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or _is_running(int(match[1])):
            continue
        if match[2] and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _keep_other_files(place: Path, new: Path) -> None:
    """Copy what a user put beside the model; its old weights are not that."""
    import shutil

    for entry in place.iterdir():
        stale = entry.name == INDEX_FILE or entry.match("model*.safetensors")
        if stale or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
