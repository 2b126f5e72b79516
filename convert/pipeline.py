"""A foreign checkpoint to a model folder: read, rename, cast, check, quantize, write.

One array at a time, and a large one in parts: what is in memory does not grow with the
model. Everything that can be checked is checked before the first byte is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.checkpoint.folder import check_weights
from mm1_mlx.checkpoint.writer import SHARD_BYTES, Slot, WeightWriter
from mm1_mlx.config import EncoderConfig, MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.memory import weight_shapes
from mm1_mlx.quantization.recipes import Recipe

from . import numbers
from .origin import Origin
from .packed import Packed, bundle, settings_of
from .readers import LazyArray
from .rules import Job, Plan, plan, prefixed
from .source import CONNECTOR, DECODER, ENCODER, Source

PART = {DECODER: "decoder.", ENCODER: "vision.", CONNECTOR: "connector."}


@dataclass
class Weight:
    """One array of the model: how it is made, and how it is kept.

    job: None for an array that the checkpoint does not hold (`given`).
    arrays: what the job's names stand for, of LazyArray or Packed.
    quantize: its quantization settings, or None. packed: whether the checkpoint has it
    in them already.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    job: Job | None = None
    given: np.ndarray | None = None
    arrays: Mapping[str, Any] = field(default_factory=dict, repr=False)
    quantize: dict | None = None
    packed: bool = False

    def slots(self) -> list[Slot]:
        """The arrays that it will be in the file: several where it is quantized."""
        if self.quantize is None:
            return [Slot(self.name, self.dtype, self.shape)]
        stem = self.name.removesuffix(".weight")
        parts = numbers.quantized_slots(self.shape, self.dtype, self.quantize)
        return [
            Slot(f"{stem}.{part}", dtype, shape)
            for part, (dtype, shape) in parts.items()
        ]


@dataclass
class Conversion:
    """What is going to be written, all checked; nothing is read yet.

    groups, lost_groups: when it is written, how many groups of weights nvfp4 has
    rounded, and how many of them to nothing. infinities: how many weights were finite
    and are beyond float16.
    """

    weights: list[Weight]
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    groups: int = 0
    lost_groups: int = 0
    infinities: int = 0

    @property
    def slots(self) -> list[Slot]:
        """The arrays of all weights, in order."""
        return [slot for weight in self.weights for slot in weight.slots()]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(slot.nbytes for slot in self.slots)

    @property
    def bits_per_weight(self) -> float:
        """On average, with the scales of what is quantized."""
        return 8 * self.nbytes / sum(prod(weight.shape) for weight in self.weights)

    @property
    def bytes_before(self) -> int:
        """Bytes that the same weights take in the checkpoint."""
        every = {
            (id(weight.arrays), name): weight.arrays[name].nbytes
            for weight in self.weights
            if weight.job
            for name in weight.job.names
        }
        return sum(every.values())

    def quantize(self, recipe: Recipe, num_layers: int) -> None:
        """Have a recipe's weights packed when they are written.

        CheckpointError where the checkpoint has packed weights already.
        """
        if any(weight.packed for weight in self.weights):
            raise CheckpointError(
                "This checkpoint is quantized already: rounding it again would lose "
                "twice. Take the one that is not quantized, or convert this one to 16 "
                "bits first (mm1_mlx convert -d)."
            )
        choose = recipe.chooser(num_layers)
        for weight in self.weights:
            weight.quantize = choose(weight.name, weight.shape)
        if not any(weight.quantize for weight in self.weights):
            size = recipe.default["group_size"]
            raise CheckpointError(
                f"Nothing of this model would be quantized: no matrix that the recipe "
                f"names has rows that divide into groups of {size}. Take a smaller "
                f"--q-group-size, or name the parts (--q-part)."
            )


def prepare(
    origin: Origin,
    source: Source,
    config: MM1Config | EncoderConfig,
    dtype: str,
    *,
    dequantize: bool = False,
) -> Conversion:
    """Match every name, check every shape.

    dtype: of the floating-point weights, as safetensors names it. dequantize: unpack
    what is packed.

    Raises CheckpointError for names that are left over on either side, and shapes that
    do not fit the config.
    """
    given = {}
    if source.additions is not None:
        assert config.vision_config is not None
        given = source.additions(config.vision_config)
    conversion = match(origin, source, config, weight_shapes(config), dtype, given)
    for weight in conversion.weights if not dequantize else ():
        _keep_packed(weight, conversion.notes)
    return conversion


def match(
    origin: Origin,
    source: Source,
    config: Any,
    expected: dict[str, tuple[int, ...]],
    dtype: str,
    given: Mapping[str, np.ndarray] | None = None,
) -> Conversion:
    """Every weight of `expected` (name -> shape) from the arrays of a checkpoint.

    given: arrays that the file does not hold, under the names of the source's part.
    """
    part = PART.get(source.kind, "")
    arrays = bundle(origin.arrays, settings_of(origin.config))
    rules = source.rules
    if callable(rules):
        rules = rules(config, origin.config)
    found = plan(arrays, prefixed(rules, target=part))
    shapes = {
        job.target: job.shape(lambda name: arrays[name].shape) for job in found.jobs
    }
    given = {part + name: array for name, array in (given or {}).items()}
    shapes |= {name: tuple(array.shape) for name, array in given.items()}
    _drop_tied(found, shapes, expected)
    check_weights(
        shapes,
        expected,
        f"{origin.folder} (read as {source.name})",
        "Are config.json and the weights of the same checkpoint?",
    )
    jobs = {job.target: job for job in found.jobs}
    _check_types(jobs, arrays)
    return Conversion(
        [
            Weight(name, shape, dtype, jobs.get(name), given.get(name), arrays)
            for name, shape in expected.items()
        ],
        found.dropped,
    )


def _keep_packed(weight: Weight, notes: list[str]) -> None:
    """Take over a packed weight as it is, where all its parts were packed alike."""
    if weight.job is None:
        return
    sources = {name: weight.arrays[name] for name in weight.job.names}
    packed = {n: a for n, a in sources.items() if isinstance(a, Packed)}
    if not packed:
        return
    if is_table(weight.name):  # looked up by position, never multiplied
        notes.append(f"{weight.name} is unpacked: it is no matrix")
        return
    ways = {json.dumps(a.settings, sort_keys=True) for a in packed.values()}
    kinds = {a.dtype for a in packed.values()}
    if len(packed) < len(sources) or len(ways) > 1 or len(kinds) > 1:
        raise CheckpointError(
            f"{weight.name} is one matrix here, but its parts are quantized in "
            f"different ways: {_ways(sources)}. Take the checkpoint that is not "
            f"quantized, and -q (--quant-predicate for mixed bits), or -d to write "
            f"16 bit weights."
        )
    if not weight.job.keeps_rows:
        raise CheckpointError(
            f"{weight.name} cannot be made of a quantized {next(iter(packed))}. Use -d "
            f"to write 16 bit weights."
        )
    (weight.quantize,) = (json.loads(way) for way in ways)
    weight.dtype, weight.packed = kinds.pop(), True


def _ways(sources: dict[str, Any]) -> str:
    """ "q_proj 4 bits, v_proj 6 bits" """
    shown = []
    for name, array in list(sources.items())[:4]:
        bits = f"{array.settings['bits']} bits" if isinstance(array, Packed) else "not"
        shown.append(f"{name.removesuffix('.weight').rpartition('.')[2]} {bits}")
    return ", ".join(shown)


def same(one: LazyArray, two: LazyArray) -> bool:
    """Whether two arrays of one shape and type have the same numbers."""
    blocks = zip(numbers.rows(one.read()), numbers.rows(two.read()), strict=True)
    return all(np.array_equal(a, b) for a, b in blocks)


def is_table(name: str) -> bool:
    """Whether a weight of ours is a table of positions, and no linear layer."""
    return name.endswith("position_embedding")


def _drop_tied(found: Plan, shapes: dict, expected: dict) -> None:
    """Some files hold the output table although it is the token table (tied)."""
    for job in found.jobs:
        if job.target == "decoder.lm_head.weight" and job.target not in expected:
            del shapes[job.target]
            found.dropped.update(dict.fromkeys(job.names, "the token table (tied)"))


def _check_types(jobs: dict[str, Job], arrays: dict[str, Any]) -> None:
    for job in jobs.values():
        for name in job.names:
            if arrays[name].dtype not in numbers.FLOATS:
                raise CheckpointError(
                    f"{name} has the type {arrays[name].dtype}, but weights of a type "
                    f"like float16 were expected. Is the checkpoint quantized? Take "
                    f"the one that is not."
                )


def write(
    conversion: Conversion,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Write the weight files into an empty folder. progress: told of bytes written."""
    with WeightWriter(folder, conversion.slots, shard_bytes) as writer:
        for weight in conversion.weights:
            if weight.packed:
                _copy_packed(weight, writer, progress)
                continue
            names = [slot.name for slot in weight.slots()]
            for array, dtype in _segments(weight):
                for block in numbers.rows(array):
                    before = writer.written
                    made = _made(weight, block, dtype)
                    _count_groups(conversion, weight, block, dtype, made)
                    if weight.dtype == "F16" != dtype and weight.quantize is None:
                        conversion.infinities += _infinities(made[0])
                        conversion.infinities -= _infinities(block, dtype)
                    for name, data in zip(names, made, strict=True):
                        writer.add(name, data)
                    progress(writer.written - before)


def rows_of(weight: Weight, step: int) -> np.ndarray:
    """Every `step`-th row of a weight, float32; the rest is not read."""
    parts = []
    for array, dtype in _segments(weight):
        parts.append(numbers.to_float32(np.ascontiguousarray(array[::step]), dtype))
    return np.concatenate(parts)


def _copy_packed(
    weight: Weight, writer: WeightWriter, progress: Callable[[int], Any]
) -> None:
    """Bytes as they are: weight, scales and biases each in their order."""
    assert weight.job is not None
    arrays = weight.arrays
    for slot in weight.slots():
        part = slot.name.rpartition(".")[2]
        for array, _ in weight.job.segments(
            lambda n, p=part: arrays[n].parts[p].read()
        ):
            for block in numbers.rows(array):
                writer.add(slot.name, block)
                progress(block.nbytes)


def _segments(weight: Weight) -> Iterator[tuple[np.ndarray, str]]:
    """The numbers of a weight in order, in as many parts as the checkpoint has."""
    arrays = weight.arrays
    if weight.job is None:
        assert weight.given is not None
        yield weight.given, "F32"
        return
    if weight.job.rule.numeric:
        for array, _ in weight.job.segments(lambda name: _float32(arrays[name])):
            yield array, "F32"
        return

    def read(name: str) -> np.ndarray:
        array = arrays[name]
        return unpack(array) if isinstance(array, Packed) else array.read()

    for array, names in weight.job.segments(read):
        kinds = {
            "F32" if isinstance(arrays[name], Packed) else arrays[name].dtype
            for name in names
        }
        if len(kinds) > 1:
            raise CheckpointError(
                f"{weight.name} is made of {', '.join(names)}, which have different "
                f"types: {', '.join(sorted(kinds))}."
            )
        yield array, kinds.pop()


def unpack(array: Packed) -> np.ndarray:
    """The numbers that a packed weight stands for, float32."""
    parts = {name: part.read() for name, part in array.parts.items()}
    return numbers.dequantize(parts, array.parts["scales"].dtype, array.settings)


def _float32(array: LazyArray) -> np.ndarray:
    return numbers.to_float32(array.read(), array.dtype)


def _count_groups(
    conversion: Conversion,
    weight: Weight,
    block: np.ndarray,
    dtype: str,
    made: list[np.ndarray],
) -> None:
    """Count the groups that have numbers, and those whose scale has become zero.

    nvfp4's scales have 8 bits with 2^-9 as the smallest above zero, and MLX's kernels
    take no second scale for the whole matrix, so small weights vanish.
    """
    if weight.quantize is None or weight.quantize.get("mode") != "nvfp4":
        return
    values = numbers.to_float32(block, dtype)
    groups = values.reshape(*made[1].shape, -1).any(axis=-1)
    conversion.groups += int(groups.sum())
    conversion.lost_groups += int((groups & (made[1] == 0)).sum())


def _infinities(block: np.ndarray, dtype: str = "F16") -> int:
    if dtype == "F16":  # by their bits: faster than asking for each number
        return int(((block.view(np.uint16) & 0x7FFF) == 0x7C00).sum())
    return int(np.isinf(numbers.to_float32(block, dtype)).sum())


def _made(weight: Weight, block: np.ndarray, dtype: str) -> list[np.ndarray]:
    made = numbers.cast(block, dtype, weight.dtype)
    if weight.quantize is None:
        return [made]
    return numbers.quantize(made, weight.dtype, weight.quantize)
