"""What the modules of an original are called, and which weights of ours they are."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mm1_mlx.adapters.folder import stored_name
from mm1_mlx.adapters.layers import Rows
from mm1_mlx.adapters.targets import projections
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.memory import weight_shapes

from ..inverse import AS_IT_IS, sources_of, undo
from ..pipeline import PART
from ..rules import (
    SHOWN,
    Rule,
    Table,
    concatenate,
    concatenate_each,
    prefixed,
    rename,
    squeeze_1x1,
)
from ..source import Source

Order = Callable[[str], tuple[bool, ...]]
_SWITCH = "switch_mlp."  # mlx-lm's stacks of experts
_EACH = re.compile(r"experts\.\d+\.")  # a module for each of them
# Their modules are named otherwise since transformers 5, as MM1 in PyTorch is; the
# others are of authors who wrote for transformers 4.
_RENAMED = ("llava", "llava_next", "mixtral", "olmoe", "qwen_moe", "mm1_torch")


@dataclass(frozen=True)
class Part:
    """A projection of ours: its name in an adapter's file, and its rows."""

    name: str
    rows: int


@dataclass(frozen=True)
class Site:
    """A module of an original that can have a pair.

    parts: ours, in the order of its rows. columns: of what it reads. experts: how many
    it holds in one array, 0 for a matrix; that array is `parameter`, or in mlx-lm the
    module's weight. expert: which one, where each is a module. is_conv: 1 x 1.
    """

    module: str
    parts: tuple[Part, ...]
    columns: int
    experts: int = 0
    parameter: str | None = None
    expert: int | None = None
    is_conv: bool = False

    @property
    def rows(self) -> int:
        """How wide what it gives is."""
        return sum(part.rows for part in self.parts)

    @property
    def key(self) -> str:
        """What a pattern of PEFT is matched with."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


@dataclass(frozen=True)
class Piece:
    """One array of an original. weight: ours that it is a part of, made by `rule`."""

    name: str
    weight: str
    rule: Rule
    index: int
    expert: int | None = None


class Names:
    """The names of a model in the layout of a source, both ways.

    values: the config.json that the source read, where it is known. A source of a
    decoder or an encoder alone names that part of the model.
    """

    def __init__(self, config: MM1Config, source: Source, values: dict | None = None):
        self.config, self.source = config, source
        rules = source.rules
        if callable(rules):
            try:
                rules = rules(config, values or {})
            except (AttributeError, KeyError, TypeError):  # of another kind of model
                raise CheckpointError(
                    f"This model has no names of the kind {source.name}: it is not of "
                    f"that kind."
                ) from None
        self.rules: Table = prefixed(rules, target=PART.get(source.kind, ""))
        self._used = [rule for rule in self.rules if isinstance(rule, Rule)]
        self.shapes = weight_shapes(config)

    @cached_property
    def rows(self) -> dict[str, list[Rows]]:
        """Path of what can have pairs -> the projections inside it."""
        from mm1_mlx.models.mm1 import MM1

        return dict(projections(MM1(self.config)))  # its weights are never computed

    @cached_property
    def path_of(self) -> dict[str, str]:
        """Name of a projection in an adapter's file -> path of the weight with it."""
        return {
            stored_name(path, part.name): path
            for path, rows in self.rows.items()
            for part in rows
        }

    def part_of(self, name: str) -> tuple[int, int, int]:
        """Experts (0: a matrix), rows and columns of a projection of ours."""
        path = self.path_of[name]
        shape = self.shapes.get(path) or self.shapes[f"{path}.weight"]
        (rows,) = (r for r in self.rows[path] if stored_name(path, r.name) == name)
        experts = shape[0] if len(shape) == 3 else 0
        return experts, rows.stop - rows.start, shape[-1]

    @cached_property
    def sites(self) -> list[Site]:
        """Every module that can have a pair, under every name that it may have."""
        return [site for path in self.rows for site in self._sites_of(path)]

    def _sites_of(self, path: str) -> Iterator[Site]:
        rows = self.rows[path]
        parts = tuple(
            Part(stored_name(path, row.name), row.stop - row.start) for row in rows
        )
        is_stack = path in self.shapes
        name = path if is_stack else f"{path}.weight"
        if name not in self.shapes:
            return
        columns = self.shapes[name][-1]
        make = _stacks if is_stack else _matrices
        for rule in self._used:
            if (names := sources_of(rule, name)) is not None:
                yield from make(rule, names, parts, columns, self.shapes[name][0])

    @cached_property
    def pieces(self) -> dict[str, list[Piece]]:
        """Weight of ours -> the arrays that it may be made of, by every rule."""
        found: dict[str, list[Piece]] = {}
        for weight, shape in self.shapes.items():
            for rule in self._used:
                for index, name in enumerate(sources_of(rule, weight) or ()):
                    experts = range(shape[0]) if rule.stack else (None,)
                    found.setdefault(weight, []).extend(
                        Piece(_of_expert(name, rule, e), weight, rule, index, e)
                        for e in experts
                    )
        return found

    @cached_property
    def plain(self) -> dict[str, str]:
        """Module -> our matrix that takes no pairs; what a pair adds is folded in."""
        taken = set(self.path_of.values())
        return {
            piece.name.removesuffix(".weight"): weight
            for weight, pieces in self.pieces.items()
            if len(self.shapes[weight]) == 2
            and weight.removesuffix(".weight") not in taken
            for piece in pieces
            if piece.name.endswith(".weight") and piece.rule.transform is None
        }

    def split(self, weight: str, array: np.ndarray, order: Order) -> dict[str, Any]:
        """The arrays of an original that one of ours is made of, by name.

        order: of the names to choose from, see `order`. CheckpointError where the
        original has no such array.
        """
        pieces = self.pieces.get(weight, [])
        if not pieces:
            raise CheckpointError(
                f"{weight} is trained whole, but a model of the kind "
                f"{self.source.name} has no such weight."
            )
        rule = min(pieces, key=lambda piece: order(piece.name)).rule
        vision = self.config.vision_config
        patch = vision.patch_size if vision is not None else 1
        found = {}
        for piece in (piece for piece in pieces if piece.rule is rule):
            one = array if piece.expert is None else array[piece.expert]
            arrays = undo(rule, one, self.sizes(weight), patch)
            if arrays is None:
                raise CheckpointError(
                    f"{weight} is trained whole, but cannot be written as "
                    f"{self.source.name} has it ({piece.name})."
                )
            found[piece.name] = arrays[piece.index]
        return found

    def sizes(self, weight: str) -> list[int]:
        """Rows of the projections inside a weight or bias of ours."""
        path = re.sub(r"(\.weight|\.bias|_bias)\Z", "", weight)
        return [row.stop - row.start for row in self.rows.get(path, [])]

    def order(self, transformers: int) -> Order:
        """Sorts the names of one array, first what this version of transformers has.

        What the code of other authors names was written for version 4.
        """
        return _order(new=transformers >= 5 and self.source.name in _RENAMED)


def _order(new: bool) -> Order:
    def rank(name: str) -> tuple[bool, ...]:
        return (
            _SWITCH in name,
            (_EACH.search(name) is not None) == new,
            ("vision_model." in name) == new,
            ("block_sparse_moe." in name) == new,
            not name.startswith("model."),
            name.startswith("language_model."),
        )

    return rank


def in_mlx_lm(name: str) -> tuple[bool, ...]:
    """Sorts the names of one array, first that of mlx-lm."""
    return (_SWITCH not in name, *_order(new=False)(name))


def _of_expert(name: str, rule: Rule, expert: int | None) -> str:
    return name if expert is None else name.replace(f"{{{rule.stack}}}", str(expert))


def _matrices(
    rule: Rule, names: tuple[str, ...], parts: tuple[Part, ...], columns: int, _: int
) -> Iterator[Site]:
    """Of a linear layer of ours: a module for each projection, or one for all."""
    is_conv = rule.transform is squeeze_1x1
    usual = rule.transform in (*AS_IT_IS, concatenate) and not rule.stack
    if not (usual or is_conv) or not all(name.endswith(".weight") for name in names):
        return
    groups = [parts] if len(names) == 1 else [(part,) for part in parts]
    if len(groups) == len(names):
        for name, group in zip(names, groups, strict=True):
            module = name.removesuffix(".weight")
            yield Site(module, group, columns, is_conv=is_conv)


def _stacks(
    rule: Rule,
    names: tuple[str, ...],
    parts: tuple[Part, ...],
    columns: int,
    experts: int,
) -> Iterator[Site]:
    """Of a stack of experts: a module for each, or an array with all of them."""
    groups = [parts] if len(names) == 1 else [(part,) for part in parts]
    if len(groups) != len(names):
        return
    ends = all(name.endswith(".weight") for name in names)
    for name, group in zip(names, groups, strict=True):
        module = name.removesuffix(".weight")
        if rule.stack and ends and rule.transform in (None, concatenate):
            for e in range(experts):
                yield Site(_of_expert(module, rule, e), group, columns, expert=e)
        elif not rule.stack and _SWITCH in name and ends:
            if rule.transform in (None, concatenate_each):
                yield Site(module, group, columns, experts)
        elif not rule.stack and rule.transform is None and not ends:
            module, _, parameter = name.rpartition(".")
            yield Site(module, group, columns, experts, parameter)


def lost(names: Names, unknown: list[str], known: list[str]) -> str:
    """What to say of modules that an adapter has pairs of and a model has not."""
    first = ", ".join(unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    arrays = {piece.name for pieces in names.pieces.values() for piece in pieces}
    if all(f"{module}.weight" in arrays for module in unknown):
        return (
            f"has pairs of what takes none here (a convolution, a norm or a fused "
            f"weight): {first}{more}"
        )
    inside = [name for name in known if "layers" in name] or known
    example = f"modules like {inside[0]}" if inside else "no such modules"
    return (
        f"does not fit this model: {len(unknown)} of its modules have no place here: "
        f"{first}{more}. Read as {names.source.name}, this model has {example}. Give "
        f"the model that it was trained on, or say what names it has (--source)"
    )


def whole_weights(
    names: Names, arrays: dict[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
    """Weights of ours from those of an original; all of it used, shapes checked.

    where: the adapter's folder, for messages.
    """
    try:
        found = rename(arrays, names.rules)
        check_whole(names, found)
    except CheckpointError as error:
        raise CheckpointError(
            f"The adapter {where} has weights that were trained whole and do not fit "
            f"this model, read as {names.source.name}: {error}"
        ) from error
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def check_whole(names: Names, arrays: dict[str, np.ndarray]) -> None:
    """CheckpointError for a weight that the model has not, or in another shape."""
    for name, array in arrays.items():
        shape = names.shapes.get(name)
        if shape is None:
            raise CheckpointError(f"it has no {name}. Give the model of the adapter.")
        if shape != array.shape:
            raise CheckpointError(
                f"{name} is {array.shape} there, but must be {shape}. Give the model "
                f"that it was trained on."
            )


def folded_note(count: int) -> str:
    """What to tell of pairs that were added to the weights themselves."""
    return (
        f"{count} matrices that take no pairs here (routers, embeddings) were trained "
        f"with pairs, which are now in whole weights"
    )
