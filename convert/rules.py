"""Tables that turn another checkpoint's weight names into ours, strictly.

Each source name must match exactly one rule, and each target be filled exactly once and
completely; everything else is a CheckpointError that names the first five. A loader
that skips unknown names hides a wrong table: the model runs and answers nonsense.

A pattern is a name with placeholders: {p} is weight or bias, {rest} anything, every
other one ({i}, {e}, {j}, ...) a number. A target may shift a number: {b-1}, {j/2}.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import isqrt
from typing import Any

from mm1_mlx.errors import CheckpointError

Array = Any  # mlx.core.array or numpy.ndarray: both transpose, reshape and slice

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SHIFTED = re.compile(r"\{(\w+)([-/])(\d+)\}")
_MEANING = {"p": "weight|bias", "rest": ".+"}

SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Rule:
    """source (a pattern, or several that become one weight) -> target.

    transform: called with the source array, or all of them in the order of `source`.
    numeric: whether the transform reads the numbers; it is given float32 then, and
        gives float32, where it else moves numbers of any type.
    stack: the placeholder over which results are stacked on a new first axis, such as
        "e" for experts; its numbers must be 0, 1, 2, ... without a gap.
    """

    source: str | tuple[str, ...]
    target: str
    transform: Callable[..., Array] | None = None
    stack: str | None = None
    numeric: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """The patterns of all that becomes one weight."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Drop:
    """Names that our model does not need, and why."""

    pattern: str
    why: str = field(kw_only=True)


Table = list[Rule | Drop]


def prefixed(rules: Iterable[Rule | Drop], source: str = "", target: str = "") -> Table:
    """The same rules with something in front of their source and target names."""
    table: Table = []
    for rule in rules:
        if isinstance(rule, Drop):
            table.append(Drop(source + rule.pattern, why=rule.why))
        else:
            names = tuple(source + name for name in rule.sources)
            table.append(replace(rule, source=names, target=target + rule.target))
    return table


@dataclass(frozen=True)
class Job:
    """One target and the names it is made of: a tuple per stacked piece."""

    target: str
    pieces: tuple[tuple[str, ...], ...]
    rule: Rule

    @property
    def names(self) -> tuple[str, ...]:
        """All source names."""
        return tuple(name for piece in self.pieces for name in piece)

    def run(self, read: Callable[[str], Array]) -> Array:
        """The target's array; `read` gives one source array by name."""
        arrays = [self._piece([read(name) for name in names]) for names in self.pieces]
        return _stack(arrays) if self.rule.stack else arrays[0]

    def segments(
        self, read: Callable[[str], Array]
    ) -> Iterator[tuple[Array, tuple[str, ...]]]:
        """The target's array in pieces, and the names that each one is made of.

        In order they are its bytes, row by row. What is only put under each other (q,
        k, v; experts) is never copied.
        """
        for names in self.pieces:
            if self.rule.transform is concatenate:
                for name in names:
                    yield read(name), (name,)
            elif self.rule.transform is concatenate_each:
                arrays = [read(name) for name in names]
                for one in zip(*arrays, strict=True):
                    yield from (
                        (part, (n,)) for part, n in zip(one, names, strict=True)
                    )
            else:
                yield self._piece([read(name) for name in names]), names

    @property
    def keeps_rows(self) -> bool:
        """Whether rows are only put into another order, so that they may be packed."""
        return self.rule.transform in (None, concatenate, concatenate_each)

    def shape(self, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """The target's shape, from those of its sources; CheckpointError if none fits.

        No number is read: the transforms see arrays of one number, repeated.
        """
        shapes = set()
        for names in self.pieces:
            if self.rule.transform is concatenate:
                shapes.add(self._concatenated([tuple(shape_of(n)) for n in names]))
            elif self.rule.transform is concatenate_each:
                all_shapes = [tuple(shape_of(n)) for n in names]
                if len({shape[:1] for shape in all_shapes}) != 1:
                    raise CheckpointError(
                        f"{self.target}: its parts have different numbers of experts: "
                        f"{all_shapes}."
                    )
                one = self._concatenated([shape[1:] for shape in all_shapes])
                shapes.add((all_shapes[0][0], *one))
            else:
                made = self._piece([_repeated(shape_of(name)) for name in names])
                shapes.add(tuple(made.shape))
        if len(shapes) != 1:
            raise CheckpointError(
                f"{self.target}: its parts have different shapes: {sorted(shapes)}."
            )
        shape = shapes.pop()
        return (len(self.pieces), *shape) if self.rule.stack else shape

    def _concatenated(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        if len({shape[1:] for shape in shapes}) != 1 or not all(shapes):
            raise CheckpointError(
                f"{self.target}: the weights that become its rows have the shapes "
                f"{shapes}, but must have rows of one length."
            )
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _piece(self, arrays: list[Array]) -> Array:
        transform = self.rule.transform
        try:
            return transform(*arrays) if transform else arrays[0]
        except CheckpointError as error:
            raise CheckpointError(f"{self.target}: {error}") from error


@dataclass(frozen=True)
class Plan:
    """What becomes of every name: jobs, and dropped names with their reasons."""

    jobs: tuple[Job, ...]
    dropped: dict[str, str]


def plan(names: Iterable[str], rules: Iterable[Rule | Drop]) -> Plan:
    """Match names with rules; no array is needed yet.

    Raises CheckpointError for names that no rule or two rules know, targets that two
    rules fill, and targets whose parts are incomplete.
    """
    entries = [
        (_compiled(pattern), rule, part)
        for rule in rules
        for part, pattern in enumerate(
            [rule.pattern] if isinstance(rule, Drop) else rule.sources
        )
    ]
    unknown: list[str] = []
    twice: list[str] = []
    dropped: dict[str, str] = {}
    # (target, rule) -> {stacked index: {part: name}}
    found: dict[tuple[str, int], dict[int, dict[int, str]]] = {}
    owner: dict[int, Rule] = {}
    for name in names:
        hits = [(m, r, part) for regex, r, part in entries if (m := regex.match(name))]
        if len(hits) != 1:
            (twice if hits else unknown).append(name)
            continue
        match, rule, part = hits[0]
        if isinstance(rule, Drop):
            dropped[name] = rule.why
        else:
            index = int(match[rule.stack]) if rule.stack else 0
            target = _fill(rule.target, match.groupdict())
            owner[id(rule)] = rule
            pieces = found.setdefault((target, id(rule)), {}).setdefault(index, {})
            if part in pieces:
                twice.append(name)
            pieces[part] = name
    _refuse(unknown, "no rule knows", "Is this another kind of checkpoint?")
    _refuse(twice, "two rules use", "The table must be corrected.")
    return Plan(tuple(_jobs(found, owner)), dropped)


def _jobs(found: dict, owner: dict[int, Rule]) -> Iterable[Job]:
    targets = [target for target, _ in found]
    double = sorted({t for t in targets if targets.count(t) > 1}) if targets else []
    _refuse(double, "more than one rule fills", "The checkpoint has a weight twice.")
    incomplete = []
    jobs = []
    for (target, key), pieces in found.items():
        rule = owner[key]
        parts = len(rule.sources)
        whole = all(len(piece) == parts for piece in pieces.values())
        if not whole or sorted(pieces) != list(range(len(pieces))):
            incomplete.append(target)
            continue
        ordered = (pieces[i] for i in range(len(pieces)))
        names = tuple(tuple(piece[k] for k in range(parts)) for piece in ordered)
        jobs.append(Job(target, names, rule))
    _refuse(incomplete, "lacking a part", "Is a file of the checkpoint missing?")
    return jobs


def rename(weights: Mapping[str, Array], rules: Iterable[Rule | Drop]) -> dict:
    """The weights under our names. Arrays may be lazy; each is read once."""
    return {
        job.target: job.run(weights.__getitem__) for job in plan(weights, rules).jobs
    }


def missing(target_names: Iterable[str], model: Any) -> list[str]:
    """The names of a model's parameters that are not among `target_names`, sorted."""
    from mlx.utils import tree_flatten

    needed = {name for name, _ in tree_flatten(model.parameters())}
    return sorted(needed - set(target_names))


def _refuse(names: list[str], what: str, advice: str) -> None:
    if names:
        first = ", ".join(sorted(names)[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        count = f"{len(names)} weights" if len(names) > 1 else "1 weight"
        raise CheckpointError(f"{count} {what}: {first}{more}. {advice}")


@cache
def _compiled(pattern: str) -> re.Pattern:
    out, end = "", 0
    for match in _PLACEHOLDER.finditer(pattern):
        name = match[1]
        out += re.escape(pattern[end : match.start()])
        out += f"(?P<{name}>{_MEANING.get(name, '[0-9]+')})"
        end = match.end()
    return re.compile(out + re.escape(pattern[end:]) + r"\Z")


def _fill(target: str, values: dict[str, str]) -> str:
    def shifted(match: re.Match) -> str:
        value, by = int(values[match[1]]), int(match[3])
        return str(value - by if match[2] == "-" else value // by)

    return _PLACEHOLDER.sub(lambda m: values[m[1]], _SHIFTED.sub(shifted, target))


# --- Transforms ------------------------------------------------------------------


def library(array: Array) -> Any:
    """mlx.core or numpy, whichever the array is of."""
    if type(array).__module__.startswith("mlx"):
        import mlx.core as mx

        return mx
    import numpy as np

    return np


def _repeated(shape: tuple[int, ...]) -> Array:
    import numpy as np

    return np.broadcast_to(np.zeros((), np.uint8), shape)


def _stack(arrays: list[Array]) -> Array:
    return library(arrays[0]).stack(arrays)


def _expect(fits: bool, array: Array, wanted: str) -> None:
    if not fits:
        raise CheckpointError(
            f"the weight has shape {tuple(array.shape)}, but must be {wanted}."
        )


def concatenate(*arrays: Array) -> Array:
    """Rows of several Linear weights or biases under each other: q, k, v."""
    return library(arrays[0]).concatenate(list(arrays), axis=0)


def concatenate_each(*arrays: Array) -> Array:
    """Rows of each expert under each other. (E, F, D) each -> (E, sum of F, D)."""
    return library(arrays[0]).concatenate(list(arrays), axis=1)


def flatten_patches(weight: Array) -> Array:
    """A patch convolution as one matmul weight. (D, C, p, p) -> (D, p*p*C).

    Our pixels lie in the order row, column, channel.
    """
    shape = weight.shape
    square = len(shape) == 4 and shape[2] == shape[3]
    _expect(square, weight, "(width, channels, patch, patch)")
    return weight.transpose(0, 2, 3, 1).reshape(shape[0], -1)


def flatten_patches_either(weight: Array) -> Array:
    """flatten_patches, also of a weight that is channels-last already.

    AIMv2 publishes both under one name; only the shape tells them apart, and only when
    the number of channels is not the patch size.
    """
    shape = weight.shape
    last = len(shape) == 4 and shape[1] == shape[2] != shape[3]
    return weight.reshape(shape[0], -1) if last else flatten_patches(weight)


def oihw_to_ohwi(weight: Array) -> Array:
    """A convolution from PyTorch's layout to MLX's. (O, I, h, w) -> (O, h, w, I)."""
    _expect(len(weight.shape) == 4, weight, "(out, in, height, width)")
    return weight.transpose(0, 2, 3, 1)


def squeeze_1x1(weight: Array) -> Array:
    """A 1x1 convolution as a Linear weight. (O, I, 1, 1) -> (O, I)."""
    shape = tuple(weight.shape)
    _expect(len(shape) == 4 and shape[2:] == (1, 1), weight, "(out, in, 1, 1)")
    return weight.reshape(shape[:2])


def flatten_patches_or_flat(weight: Array) -> Array:
    """flatten_patches of a convolution; a matrix as it is."""
    return weight if len(weight.shape) == 2 else flatten_patches(weight)


def squeeze_1x1_or_flat(weight: Array) -> Array:
    """squeeze_1x1 of a convolution; a matrix as it is."""
    return weight if len(weight.shape) == 2 else squeeze_1x1(weight)


def oihw_or_ohwi(weight: Array) -> Array:
    """A depthwise 3x3 convolution in MLX's layout, from that or PyTorch's.

    (C, 1, 3, 3) or (C, 3, 3, 1) -> (C, 3, 3, 1).
    """
    shape = tuple(weight.shape)
    _expect(len(shape) == 4 and 1 in (shape[1], shape[3]), weight, "(C, 1, 3, 3)")
    return weight if shape[3] == 1 else oihw_to_ohwi(weight)


def flattened(array: Array) -> Array:
    """As one row. (1, 1, D) -> (D,)."""
    return array.reshape(-1)


def squeeze_first(array: Array) -> Array:
    """Drop a first axis of length 1. (1, ...) -> (...)."""
    shape = tuple(array.shape)
    _expect(len(shape) > 1 and shape[0] == 1, array, "(1, ...)")
    return array.reshape(shape[1:])


def drop_cls_row(table: Array) -> Array:
    """A position table of the grid alone. (1, P or P+1, D) -> (P, D).

    Old Honeybee files and 360VL keep a first row for the class token, which the
    C-Abstractor never sees. P is a square and P + 1 never is, so the shape decides.
    """
    shape = tuple(table.shape)
    _expect(len(shape) == 3 and shape[0] == 1, table, "(1, positions, width)")
    rows = shape[1]
    extra = 0 if isqrt(rows) ** 2 == rows else 1
    fits = isqrt(rows - extra) ** 2 == rows - extra
    _expect(fits, table, "a square number of positions, or one more")
    return table.reshape(shape[1:])[extra:]


def spatial_to_rows(table: Array) -> Array:
    """A position table per channel as rows. (D, H, W) -> (H*W, D)."""
    _expect(len(table.shape) == 3, table, "(width, rows, columns)")
    return table.transpose(1, 2, 0).reshape(-1, table.shape[0])


def swap_last(array: Array) -> Array:
    """Experts stored [in, out] instead of [out, in]. (..., a, b) -> (..., b, a)."""
    return array.swapaxes(-1, -2)
