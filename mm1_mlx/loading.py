"""From a name, folder or hub id to a model and its processor, and back to a folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mm1_mlx.checkpoint.folder import (
    check_weights,
    is_complete,
    is_foreign,
    read_config,
    read_encoder_config,
    read_weights,
    write_folder,
)
from mm1_mlx.checkpoint.hub import find_folder, local_snapshot
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, MM1Error
from mm1_mlx.memory import bytes_text, machine_memory
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.quantization.modules import quantize_model, settings_by_name
from mm1_mlx.quantization.recipes import Recipe

if TYPE_CHECKING:
    from mm1_mlx.adapters.switch import Adapters
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.inputs.settings import ImageSettings

_READ_AT_ONCE = 64 << 20  # bytes
_DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


def load(
    name_or_path: str | Path,
    *,
    adapter_path: str | Path | None = None,
    dtype: mx.Dtype | str | None = None,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> "tuple[MM1, Processor]":
    """The model and the processor of a name ("mm1-tiny"), a folder or a hub id.

    A public checkpoint in another project's layout (LLaVA, Llama, ...) is converted
    once into a cache; `tell` receives where, `progress` the bytes written and all.

    adapter_path: a folder with an adapter (of mm1_mlx.lora, mlx-lm or PEFT), which is
    put onto the model; pictures are then read in the resolution that it was trained
    with, where a call asks for no other. dtype: the floating-point type of the weights.
    None keeps the stored one, except on MLX's CPU back end, whose 16-bit arithmetic is
    slow and coarse: there it is float32, at twice the memory. lazy: leave the weights
    on disk until they are used; then only the thread that loaded may use them. group:
    the processes that share the decoder (mx.distributed.init() under mlx.launch); each
    keeps its part, and all must make the same calls. See models.sharding.

    Raises CheckpointError for a model that cannot be found or does not fit its config,
    ConfigError for a config that makes no sense.
    """
    from mm1_mlx.inputs.processor import Processor

    wanted = _wanted_type(dtype)
    folder = find_model(name_or_path, tell=tell, progress=progress)
    config = read_config(folder)
    processor = Processor.from_folder(folder, config)
    processor.names = str(name_or_path), None
    if group is not None and group.size() > 1:
        model = load_model(folder, config, wanted, lazy=True)
        _take_share(model, adapter_path, group, folder, lazy, processor)
        return model, processor
    model = load_model(folder, config, wanted, lazy=lazy)
    if adapter_path is not None:
        _put_adapter(model, adapter_path, processor)
        model.eval()
        if not lazy:
            mx.eval(_all_arrays(model))
    return model, processor


def _take_share(
    model: MM1,
    adapter_path: str | Path | None,
    group: mx.distributed.Group,
    folder: Path,
    lazy: bool,
    processor: "Processor",
) -> None:
    """Cut a lazy model to this process's share, and only then read it."""
    from mm1_mlx.adapters.sharding import shard_model

    if adapter_path is not None:
        _put_adapter(model, adapter_path, processor)
    shard_model(model, group)
    model.eval()
    if lazy:
        return
    arrays = _all_arrays(model)
    _check_memory(sum(array.nbytes for array in arrays), folder)
    # One by one: MLX reads a whole array before it is cut, and reading all at once
    # would take the memory of the whole model.
    for array in arrays:
        mx.eval(array)
    mx.clear_cache()


def load_adapter(
    model: MM1, folder: str | Path, processor: "Processor | None" = None
) -> None:
    """Put the adapter of a folder onto a model that has none, in place.

    processor: reads pictures in the resolution that the adapter was trained with.
    One of PEFT or mlx-lm is read by the names of what the model was converted from.
    CheckpointError where it is of another model, or not an adapter.
    """
    if model.decoder.group is not None:
        raise MM1Error(
            "This model is shared by several processes: give the adapter to load() "
            "with the model."
        )
    _put_adapter(model, folder, processor)
    model.eval()
    mx.eval(_all_arrays(model))


def _put_adapter(
    model: MM1, folder: str | Path, processor: "Processor | None" = None
) -> None:
    from mm1_mlx.adapters.about import read_as_trained, reading_of
    from mm1_mlx.adapters.folder import apply_adapter

    place = Path(folder).expanduser()
    weights, config = _read_adapter(model, place)
    reading = reading_of(config)
    apply_adapter(model, weights, config, str(place))
    if processor is not None:
        read_as_trained(processor, reading)
        processor.names = getattr(processor, "names", (None,))[0], str(folder)


def load_adapters(model: MM1, folders: Mapping[str, str | Path]) -> "Adapters":
    """Load adapters beside each other onto one model; which are there.

        adapters = load_adapters(model, {"cats": "cats-adapter", "art": "art-adapter"})
        use_adapter(model, "cats")
        adapters.names, adapters.in_use  # ("cats", "art"), "cats"

    folders: a name for each, and its folder. They share the model's weights, and may
    differ in everything else: ranks, parts, DoRA, weights trained whole. The one in use
    stays (none at first); `use_adapter` switches. Later calls add more.

    Raises CheckpointError for a folder that is no adapter, or one of another model,
    MM1Error for a name that is taken or a model that has an adapter for good; then
    nothing is changed.
    """
    from mm1_mlx.adapters.folder import fit_adapter
    from mm1_mlx.adapters.switch import adapters_of

    if not isinstance(folders, Mapping):
        raise MM1Error(
            f"The adapters are {folders!r}, but must be folders by name, such as "
            f'{{"cats": "cats-adapter"}}.'
        )
    held = adapters_of(model)
    held.check_new(folders)
    fitted = {}
    with held.set_aside(model):
        for name, folder in folders.items():
            place = Path(folder).expanduser()
            adapter = fit_adapter(model, *_read_adapter(model, place), str(place), name)
            mx.eval([array for _, array in adapter.arrays()])
            fitted[name] = adapter
    held.add(fitted)
    return held


def _read_adapter(
    model: MM1, place: Path
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """An adapter's arrays under the model's names, and its config."""
    from mm1_mlx.adapters.folder import form_of, read_adapter

    if form_of(place) == "mm1":
        return read_adapter(place)
    from mm1_mlx.convert.adapters.interchange import foreign_adapter

    own = _named(model)
    return foreign_adapter(place, model.config, lambda name: _as_numbers(own, name))


def _as_numbers(weights: dict[str, mx.array], name: str) -> Any:
    """A weight of a model in float32, for NumPy."""
    import numpy as np

    if f"{name.removesuffix('.weight')}.scales" in weights:
        raise CheckpointError(
            f"The adapter changes {name} itself, which is quantized in this model. "
            f"Load the model of 16 bits."
        )
    return np.array(weights[name].astype(mx.float32))


def find_model(
    name_or_path: str | Path,
    *,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Path:
    """The model folder of a name, folder or hub id; see `load`."""
    before = local_snapshot(str(name_or_path))
    if before is not None and is_foreign(before):
        from mm1_mlx.convert.cache import place_of

        if is_complete(place := place_of(before, str(name_or_path))):
            return place  # converted already: the hub is not asked
    folder = find_folder(name_or_path, foreign=True)
    if not is_foreign(folder):
        return folder
    from mm1_mlx.convert.cache import converted  # only where it is needed

    return converted(folder, str(name_or_path), tell=tell, progress=progress)


def quantize(
    name_or_path: str | Path,
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a model folder with fewer bits per weight; what it takes, before and after.

    recipe: None for 4 bits in groups of 64. provenance: kept in the folder. One array
    at a time is in memory. Raises CheckpointError, ConfigError.
    """
    from mm1_mlx.convert.conversion import convert

    source = find_model(name_or_path, tell=tell, progress=progress)
    recipe = recipe or Recipe()
    done = convert(
        source,
        Path(folder).expanduser(),
        source="mm1",
        quantize=recipe,
        overwrite=overwrite,
        provenance=provenance,
        step="quantized",
        tell=tell,
        progress=progress,
    )
    return {
        "bytes_before": done.bytes_before,
        "bytes": done.nbytes,
        "bits_per_weight": done.bits_per_weight,
        "quantized": sum(weight.quantize is not None for weight in done.weights),
    }


def damage_report(
    original: str | Path,
    quantized: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """What quantization changed: two models on the same questions.

    original, quantized: names, folders or hub ids, loaded one after the other. prompts,
    images: every prompt is asked about every image; None for built-in ones. progress:
    told of the questions done, and all, of both.

    Returns "kl" (mean and max, nats), "top1" (share of positions with the same
    likeliest token), "parts" (relative error after each stage), "questions" and
    "positions"; mm1_mlx.quantization.damage.table shows it. Raises CheckpointError,
    PromptError, ImageError; MM1Error where the two are not the same model with other
    weights.
    """
    from mm1_mlx.quantization.damage import compare, record

    traces = []
    for number, name in enumerate((original, quantized)):
        model, processor = load(name, tell=tell)

        def step(done: int, total: int, before: int = number) -> None:
            progress(before * total + done, 2 * total)

        traces.append(record(model, processor, prompts, images, progress=step))
        del model, processor
    return compare(*traces)


def load_model(
    folder: Path,
    config: MM1Config | None = None,
    dtype: mx.Dtype | None = None,
    *,
    lazy: bool = False,
) -> MM1:
    """The model of a folder, without its processor; dtype None keeps the stored types.

    Names and shapes must be exactly those of the config's model.
    """
    folder = Path(folder)
    config = config or read_config(folder)
    weights = read_weights(folder)
    model = _empty_model(config, weights)
    check_weights(_shapes(weights), _shapes(_named(model)), str(folder))
    weights = {name: _as_type(array, dtype) for name, array in weights.items()}
    if not lazy:
        _check_memory(sum(array.nbytes for array in weights.values()), folder)
    model.load_weights(list(weights.items()), strict=False)  # checked above
    del weights
    model.eval()
    if not lazy:
        _read_in_turn(_all_arrays(model))
    return model


def load_encoder(
    name_or_path: str | Path, *, dtype: mx.Dtype | str | None = None
) -> "tuple[VisionEncoder, ImageSettings]":
    """An image encoder alone, and how pictures become its pixels.

    name_or_path: a folder or hub id of an encoder (DFN, CLIP, SigLIP, AIMv2) or of a
    whole model. dtype: as in `load`. Raises CheckpointError, ConfigError.
    """
    from mm1_mlx.inputs.settings import ImageSettings

    wanted = _wanted_type(dtype)
    folder = find_model(name_or_path)
    config = read_encoder_config(folder)
    encoder, start = VisionEncoder(config), "vision."
    found = {
        name.removeprefix(start): array
        for name, array in read_weights(folder).items()
        if name.startswith(start)
    }
    check_weights(_shapes(found), _shapes(_named(encoder)), str(folder))
    encoder.load_weights([(n, _as_type(a, wanted)) for n, a in found.items()])
    del found
    encoder.eval()
    _read_in_turn(_all_arrays(encoder))
    return encoder, ImageSettings.read(folder)


def _check_memory(needed: int, folder: Path) -> None:
    """CheckpointError, before anything is read, where weights exceed the machine."""
    there = machine_memory()
    if needed > there:
        raise CheckpointError(
            f"The weights of {folder} take {bytes_text(needed)} of memory here, but "
            f"this machine has {bytes_text(there)}. Take fewer bits (python -m "
            f"mm1_mlx.quantize), or a smaller model."
        )


def _shapes(arrays: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _as_type(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """A floating-point array in another type; others, and packed ones, as they are."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(dtype)


def _wanted_type(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    if dtype is None:
        on_cpu = mx.default_device().type == mx.cpu
        return mx.float32 if on_cpu else None
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype, dtype)
    if dtype not in _DTYPES.values():
        raise MM1Error(f"dtype is {dtype!r}, but must be one of {', '.join(_DTYPES)}.")
    return dtype  # type: ignore[return-value]


def _empty_model(config: MM1Config, weights: dict[str, mx.array]) -> MM1:
    """The model with weights that nobody will compute: MLX's are made when used."""
    model = MM1(config)
    if config.quantization is not None:
        quantize_model(model, settings_by_name(config.quantization, set(weights)))
    return model


def _named(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def _read_in_turn(arrays: list[mx.array]) -> None:
    """Evaluate lazy weights a few at a time.

    Where they are cast, MLX would else read ahead of the casts, and hold nearly the
    stored weights beside the cast ones: 1.4 times the model, measured from 16 bits to
    32. So it is the model and at most _READ_AT_ONCE, or one array.
    """
    some: list[mx.array] = []
    size = 0
    for array in arrays:
        if some and size + array.nbytes > _READ_AT_ONCE:
            mx.eval(some)
            some, size = [], 0
        some.append(array)
        size += array.nbytes
    mx.eval(some)
    mx.clear_cache()  # what was cast from


def _all_arrays(model: nn.Module) -> list[mx.array]:
    """Weights and constants. All must be evaluated here: in MLX, what is left lazy in
    one thread cannot be computed in another."""
    return [
        value
        for module in model.modules()
        for value in module.values()
        if isinstance(value, mx.array)
    ]


def save(
    model: MM1, processor: "Processor", folder: str | Path, *, overwrite: bool = False
) -> None:
    """Write a model folder that `load` reads: all of it, or nothing.

    overwrite: replace a model folder that is there (also the one that the model was
    loaded from). Raises CheckpointError for a folder that is in use for other things.
    """
    if model.decoder.group is not None:
        raise MM1Error(
            "This process has only its share of the model, so it cannot be saved. Load "
            "it without a group."
        )
    weights = _named(model)
    if any(".pairs." in name for name in weights):
        raise CheckpointError(
            "The model has an adapter on it, which a model folder cannot hold: fuse it "
            "(python -m mm1_mlx.fuse), or take it off (use_adapter(model, None))."
        )
    write_folder(
        Path(folder).expanduser(),
        model.config,
        weights,
        processor.save,
        overwrite=overwrite,
    )
