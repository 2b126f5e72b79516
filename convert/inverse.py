"""Tables of names read backwards: from a weight of ours to what it was made of."""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from .rules import (
    Rule,
    concatenate,
    concatenate_each,
    flatten_patches,
    flatten_patches_either,
    flatten_patches_or_flat,
    flattened,
    oihw_or_ohwi,
    oihw_to_ohwi,
    squeeze_1x1,
    squeeze_1x1_or_flat,
    squeeze_first,
)

_TOKEN = re.compile(r"\{(\w+)(?:([-/])(\d+))?\}")
_MEANING = {"p": "weight|bias", "rest": ".+"}
_PATCHES = (flatten_patches, flatten_patches_either)
# What was taken as it is, or may have been: MM1 in PyTorch has matrices.
AS_IT_IS = (None, flattened, flatten_patches_or_flat, squeeze_1x1_or_flat)


@cache
def _compiled(target: str) -> tuple[re.Pattern, dict[str, tuple[str, int]]]:
    out, end, shifts = "", 0, {}
    for match in _TOKEN.finditer(target):
        name, how, by = match.groups()
        out += re.escape(target[end : match.start()])
        out += f"(?P<{name}>{_MEANING.get(name, '[0-9]+')})"
        if how:
            shifts[name] = (how, int(by))
        end = match.end()
    return re.compile(out + re.escape(target[end:]) + r"\Z"), shifts


def sources_of(rule: Rule, target: str) -> tuple[str, ...] | None:
    """The names that a rule makes a weight of ours of; None where it makes another.

    The placeholder over which the rule stacks is left as it is. Of the two names that a
    target like {j/2} may stand for, the even one.
    """
    pattern, shifts = _compiled(rule.target)
    match = pattern.match(target)
    if match is None:
        return None
    values = match.groupdict()
    for name, (how, by) in shifts.items():
        number = int(values[name])
        values[name] = str(number + by if how == "-" else number * by)
    filled = tuple(
        _TOKEN.sub(lambda m: values.get(m[1], m[0]), source) for source in rule.sources
    )
    left = {m[1] for source in filled for m in _TOKEN.finditer(source)}
    return filled if left <= {rule.stack} else None


def undo(
    rule: Rule, array: np.ndarray, sizes: Sequence[int], patch: int
) -> list[np.ndarray] | None:
    """The arrays that a rule makes one of ours of, in the order of its sources.

    sizes: rows of each, where it puts several under each other. patch: side of a patch.
    None where the rule cannot be undone. Without its stacking: of one expert.
    """
    transform, shape = rule.transform, array.shape
    if transform in (concatenate, concatenate_each):
        axis = 0 if transform is concatenate else 1
        if len(sizes) != len(rule.sources) or sum(sizes) != shape[axis]:
            return None
        return np.split(array, np.cumsum(sizes)[:-1], axis=axis)
    if transform in AS_IT_IS:
        return [array]
    if transform in _PATCHES and len(shape) == 2:
        square = array.reshape(shape[0], patch, patch, -1)
        return [square.transpose(0, 3, 1, 2)]
    if transform is squeeze_1x1:
        return [array[..., None, None]]
    if transform in (oihw_to_ohwi, oihw_or_ohwi):
        return [array.transpose(0, 3, 1, 2)]
    if transform is squeeze_first:
        return [array[None]]
    return None
