"""convert(): a foreign checkpoint, on disk or on the hub, to a model folder of ours."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.folder import read_json
from mm1_mlx.checkpoint.hub import find_folder
from mm1_mlx.config import (
    ConnectorConfig,
    EncoderConfig,
    MM1Config,
    VisionConfig,
)
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import (
    PREPROCESSOR_FILE,
    ImageSettings,
    read_preprocessor,
)
from mm1_mlx.quantization.recipes import Recipe

from . import numbers
from .origin import Origin, read_arrays, read_config
from .output import licence_of, public_name, with_extra, write_folder
from .pipeline import Conversion, prepare, same
from .source import (
    DECODER,
    ENCODER,
    AnyConfig,
    Source,
    detect,
    find_source,
    no_tower,
    read_as,
)
from .sources.fields import names_theta


@dataclass
class Opened:
    """A foreign checkpoint with everything that is known of it before weights move.

    config: ours. tower_config: of the encoder that it only names, or of its folder.
    """

    origin: Origin
    source: Source
    config: MM1Config | EncoderConfig
    tower_config: dict | None
    tower: Path | None = None
    warnings: list[str] = field(default_factory=list)


def open_checkpoint(
    folder: Path,
    *,
    source: str | None = None,
    tower: str | Path | None = None,
    locate: Callable[[str], Path] = Path,
) -> Opened:
    """Read configs and headers of a folder, and find out what it is.

    source: its name, where the config does not tell. tower: the folder of the encoder
    that an original LLaVA only names. locate: turns the name of a tower (a hub id)
    into a folder.
    """
    values = read_config(folder)
    entries = frozenset(path.name for path in folder.iterdir())
    kind = find_source(source) if source else detect(values, entries)
    values = read_as(kind, values) if source else values
    arrays = read_arrays(folder)
    for name in kind.folders:
        arrays |= read_arrays(folder / name, name + "/")
    tower_folder, tower_config = None, None
    if kind.folders:
        tower_config = read_config(folder / kind.folders[0])
    elif tower is not None and kind.tower is no_tower:
        raise CheckpointError(
            f"{folder} was read as {kind.name}, which has its image encoder inside or "
            f"none at all: leave out --vision-tower."
        )
    elif named := tower or kind.tower(values):
        inside = any("vision_tower" in name or "image_tower" in name for name in arrays)
        if tower is not None or not inside:
            tower_folder = _find_tower(str(named), tower is not None, locate)
            tower_config = read_config(tower_folder)
        if tower_folder is not None and not inside:
            arrays |= read_arrays(tower_folder, "tower/")
    config = _whole(kind, kind.config(values, tower_config), values)
    if isinstance(known := values.get("mm1_mlx"), dict):  # what `export` wrote
        config = replace(config, extra=known)
    if isinstance(config, MM1Config):
        config = _untied(_with_generation_ids(config, folder), arrays)
    origin = Origin(folder, values, arrays)
    return Opened(origin, kind, config, tower_config, tower_folder)


def _with_generation_ids(config: MM1Config, folder: Path) -> MM1Config:
    """With the end marks of generation_config.json, which transformers answers by."""
    path = folder / "generation_config.json"
    ids = _id(read_json(path).get("eos_token_id")) if path.is_file() else None
    return config if ids is None else replace(config, eos_token_id=ids)


def _untied(config: MM1Config, arrays: dict[str, Any]) -> MM1Config:
    """Without tying, where the file has an output table that is not the token table.

    transformers 5 keeps such a table, whatever tie_word_embeddings says.
    """
    if not config.text_config.tie_word_embeddings:
        return config
    tables = [
        [array for name, array in arrays.items() if name.endswith(end)]
        for end in ("embed_tokens.weight", "lm_head.weight")
    ]
    if any(len(found) != 1 for found in tables):
        return config
    (tokens,), (head,) = tables
    if tokens.shape == head.shape and tokens.dtype == head.dtype and same(tokens, head):
        return config
    text = replace(config.text_config, tie_word_embeddings=False)
    return replace(config, text_config=text)


def _find_tower(name: str, given: bool, locate: Callable[[str], Path]) -> Path:
    """The folder of an encoder; CheckpointError says how to give another one."""
    try:
        return locate(name)
    except CheckpointError as error:
        if given:
            raise
        raise CheckpointError(
            f"This checkpoint does not hold its image encoder, it only names {name!r}. "
            f"Give the encoder's folder (--vision-tower), or let it be downloaded: "
            f"{error}"
        ) from error


def find_origin(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a path or hub id; of the hub only what a conversion needs."""
    return find_folder(name, revision=revision, foreign=True)


def _whole(
    source: Source, config: AnyConfig, values: dict
) -> MM1Config | EncoderConfig:
    """The configuration of a folder, around that of a decoder or an encoder alone."""
    if isinstance(config, ConnectorConfig):
        raise CheckpointError(
            f"This is a connector alone ({source.name}): no model. Build one around it "
            f"with convert assemble --connector."
        )
    if isinstance(config, VisionConfig):
        return EncoderConfig(vision_config=config)
    if isinstance(config, (MM1Config, EncoderConfig)):
        return config
    ids = {
        key: _id(values.get(key))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return MM1Config(text_config=config, **ids)


def _id(value: Any) -> Any:
    """A special token's id; some files write -1 for none."""
    if isinstance(value, list):
        return [i for i in value if i >= 0] or None
    return None if value is not None and value < 0 else value


def stored_type(opened: Opened) -> str:
    """The type of number to keep: what the config says, else what most weights have.

    As mlx-lm does it, so float32 files whose config says float16 become float16.
    """
    values = opened.origin.config
    parts = [values, values.get("text_config") or {}, values.get("vision_config") or {}]
    for part in parts:
        named = part.get("torch_dtype") or part.get("dtype")
        if isinstance(named, str):
            named = named.removeprefix("torch.")
            if named in numbers.BY_NAME:
                return numbers.BY_NAME[named]
    size: dict[str, int] = {}
    for array in opened.origin.arrays.values():
        size[array.dtype] = size.get(array.dtype, 0) + array.nbytes
    most = max(size, key=lambda dtype: size[dtype])
    return most if most in numbers.BY_NAME.values() else "F32"


def image_settings(opened: Opened) -> ImageSettings | None:
    """How pictures become pixels; None for a decoder alone."""
    source, folder = opened.source, opened.origin.folder
    if source.kind == DECODER or opened.config.vision_config is None:
        return None
    places = [folder, *(folder / name for name in source.folders), opened.tower]
    read = [read_preprocessor(place) for place in places if place is not None]
    found = next((values for values in read if values is not None), None)
    if source.images is not None:
        return source.images(opened.origin.config, opened.tower_config, found)
    if found is not None:
        return ImageSettings.from_dict(found)
    vision = opened.config.vision_config
    assert vision is not None
    opened.warnings.append(
        f"{folder} has no {PREPROCESSOR_FILE}: pictures are squashed to "
        f"{vision.image_size} x {vision.image_size} and normalised as CLIP's"
    )
    return ImageSettings(size=vision.image_size)


def convert(
    folder: Path,
    out: Path,
    *,
    source: str | None = None,
    dtype: str | None = None,
    tower: str | Path | None = None,
    quantize: Recipe | None = None,
    dequantize: bool = False,
    provenance: dict[str, Any] | None = None,
    step: str = "converted",
    overwrite: bool = False,
    locate: Callable[[str], Path] = Path,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Conversion:
    """Write the model folder `out` from a foreign checkpoint: all of it, or nothing.

    source, tower, locate: see open_checkpoint. dtype: "float16", "bfloat16" or
    "float32"; None: stored_type's. quantize: pack weights; dequantize: unpack those
    that are packed. provenance: kept in the folder, beside what is known here, as
    what was done in this `step`. tell: receives lines for people. progress: told of
    the bytes written, and of all.

    Raises CheckpointError, ConfigError.
    """
    opened = open_checkpoint(folder, source=source, tower=tower, locate=locate)
    kept = numbers.BY_NAME[dtype] if dtype else stored_type(opened)
    plan = prepare(
        opened.origin, opened.source, opened.config, kept, dequantize=dequantize
    )
    config = opened.config
    if quantize is not None and not isinstance(config, MM1Config):
        raise CheckpointError(
            f"{folder} is an image encoder alone, which keeps its 16 bits: leave out "
            f"-q."
        )
    if quantize is not None and isinstance(config, MM1Config):
        plan.quantize(quantize, config.text_config.num_hidden_layers)
    for line in plan.notes:
        tell(f"warning: {line}")
    made = origin_of(opened) | {"dtype": kept} | (provenance or {})
    write_folder(
        out,
        plan,
        with_extra(config, step, made),
        *processor_of(opened, opened, tell),
        sources=[folder, opened.tower],
        default_quantization=quantize.default if quantize else None,
        overwrite=overwrite,
        progress=progress,
    )
    _tell_losses(plan, tell)
    return plan


def _tell_losses(plan: Conversion, tell: Callable[[str], None]) -> None:
    """Say what another type of number could not hold."""
    if plan.infinities:
        tell(
            f"warning: {plan.infinities} weights are beyond the range of float16 and "
            f"have become infinite. Take --dtype bfloat16."
        )
    if plan.lost_groups:
        share = plan.lost_groups / plan.groups
        tell(
            f"warning: nvfp4 has rounded {share:.1%} of the groups of weights to zero, "
            f"because they are smaller than its scales can say. Take mxfp4 or affine."
        )


def processor_of(
    eyes: Opened, words: Opened, tell: Callable[[str], None]
) -> tuple[ImageSettings | None, Any, str | None]:
    """Picture settings, tokenizer and chat template of a new folder; tells warnings.

    eyes, words: what the encoder and the decoder come from.
    """
    settings, tokenizer = image_settings(eyes), find_tokenizer(words)
    _check_theta(words)
    both = [eyes] if eyes is words else [eyes, words]
    for line in (line for opened in both for line in opened.warnings):
        tell(f"warning: {line}")
    return settings, tokenizer, words.source.template


def _check_theta(opened: Opened) -> None:
    """A warning where a sparse config leaves RoPE's theta to the class default."""
    config = opened.config
    if isinstance(config, MM1Config) and not names_theta(opened.origin.config):
        theta = f"{config.text_config.rope_theta:g}"
        opened.warnings.append(
            f"{opened.origin.folder} names no rope_theta: {theta}, the default of its "
            f"family, is taken"
        )


def origin_of(opened: Opened) -> dict[str, Any]:
    """What a folder keeps of where it came from."""
    found = {"source": opened.source.name, "path": public_name(opened.origin.folder)}
    commit = opened.origin.folder.name
    if opened.origin.folder.parent.name == "snapshots":  # the hub's cache
        found["revision"] = commit
        repo = opened.origin.folder.parent.parent.name
        found["path"] = repo.removeprefix("models--").replace("--", "/")
    if licence := licence_of(opened.origin.folder):
        found["licence"] = licence
    return found


def find_tokenizer(opened: Opened) -> Any:
    """The checkpoint's tokenizer, or None with a warning where it has none."""
    if opened.source.kind == ENCODER or isinstance(opened.config, EncoderConfig):
        return None
    from mm1_mlx.inputs.tokenizer import has_tokenizer, load_tokenizer

    if has_tokenizer(opened.origin.folder):
        return load_tokenizer(opened.origin.folder)
    opened.warnings.append(
        f"{opened.origin.folder} has no tokenizer: the model will take token ids"
    )
    return None
