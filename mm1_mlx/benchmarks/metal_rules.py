"""How many kernels MLX's Metal back end launches for an operation, copies included.

Read in MLX 0.32's mlx/backend/metal and mlx/backend/gpu, for an M3 or M4 that is no Max
or Ultra: others take another kernel for some shapes. An operation that is not known
here is an error, so that nothing is left out of a count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from mm1_mlx.benchmarks import metal_layout as lay
from mm1_mlx.benchmarks.metal_layout import Layout, fresh
from mm1_mlx.errors import MM1Error


@dataclass(frozen=True)
class Operation:
    """An operation of a graph: its name, arrays, and MLX's own arguments."""

    name: str
    inputs: Sequence[Layout]
    shapes: Sequence[lay.Shape]  # of the outputs
    itemsizes: Sequence[int]
    arguments: Sequence[Any] = ()

    def made(self) -> list[Layout]:
        """Outputs that are new arrays."""
        return [fresh(s, n) for s, n in zip(self.shapes, self.itemsizes, strict=True)]


@dataclass(frozen=True)
class Cost:
    """What an operation takes: its outputs, kernels, copies of inputs among them, and
    bytes read and written. merges: kernels beside these that add up what one kernel
    has left in parts."""

    outputs: list[Layout]
    launches: int = 0
    copies: int = 0
    nbytes: int = 0
    merges: int = 0


Rule = Callable[[Operation], Cost]


def cost(operation: Operation) -> Cost:
    """What Metal would do; MM1Error for an operation without a rule."""
    rule = _RULES.get(operation.name)
    if rule is None:
        raise MM1Error(
            f"The graph has an operation {operation.name}, of which is not known what "
            f"Metal makes of it. Add its rule to benchmarks/metal_rules.py."
        )
    return rule(operation)


def _launched(
    o: Operation, outputs: list[Layout] | None = None, *, copied: Sequence[Layout] = ()
) -> Cost:
    """One kernel, after a copy of each of `copied`."""
    outputs = o.made() if outputs is None else outputs
    moved = sum(x.nbytes for x in o.inputs) + sum(x.nbytes for x in outputs)
    again = sum(2 * x.nbytes for x in copied)
    return Cost(outputs, 1 + len(copied), len(copied), moved + again)


# --- Views ---------------------------------------------------------------------------


def _view(change: Callable[[Operation], Layout | None]) -> Rule:
    """A view, or where it cannot be one a copy."""

    def rule(o: Operation) -> Cost:
        out = change(o)
        if out is not None:
            return Cost([out])
        made = o.made()
        return Cost(made, 1, 1, 2 * made[0].nbytes)

    return rule


def _split(o: Operation) -> Cost:
    return Cost([lay.split(o.inputs[0], shape) for shape in o.shapes])


def _added_axes(o: Operation) -> Layout:
    return lay.expanded(o.inputs[0], o.shapes[0], o.arguments[0])


def _last_inputs(o: Operation) -> Cost:
    """Those whose outputs are some of their inputs."""
    return Cost(list(o.inputs[len(o.inputs) - len(o.shapes) :]))


def _first_inputs(o: Operation) -> Cost:
    return Cost(list(o.inputs[: len(o.shapes)]))


# --- One kernel ----------------------------------------------------------------------


def _elementwise(o: Operation) -> Cost:
    """Keeps the order of its input's memory where that has no holes."""
    first = o.inputs[0]
    out = o.made()
    alike = all(x.shape == first.shape and x.strides == first.strides for x in o.inputs)
    if alike and first.contiguous and len(out) == 1 and first.shape == o.shapes[0]:
        kept = replace(first, itemsize=o.itemsizes[0])
        return _launched(o, [kept])
    return _launched(o)


def _fused(o: Operation) -> Cost:
    """arguments: the kernels that MLX compiles it to."""
    return replace(_launched(o), launches=o.arguments[0])


def _norm(o: Operation) -> Cost:
    x = o.inputs[0]
    flat = x.contiguous and x.strides[-1] == 1
    if flat and len(x.shape) > 1:
        step = x.strides[-2]
        flat = step in (0, x.shape[-1]) or x.shape[-2] == 1
    return _launched(o, [x]) if flat else _launched(o, copied=[x])


def _softmax(o: Operation) -> Cost:
    x = o.inputs[0]
    flat = x.contiguous and x.strides[-1] == 1
    return _launched(o, [x] if flat else None, copied=[] if flat else [x])


def _rope(o: Operation) -> Cost:
    """arguments: dims."""
    x, dims = o.inputs[0], o.arguments[0]
    shape, strides = x.shape, x.strides
    *_, length, width = shape
    rank = len(shape)
    while shape[-rank] == 1 and rank > 3:
        rank -= 1
    heads = prod(shape[1:-2])
    swapped = len(shape) == 4 and strides[:3] == (
        length * heads * width,
        width,
        heads * width,
    )
    free = dims == width and (x.row_contiguous or rank == 3 or swapped)
    return _launched(o, copied=[] if free else [x])


def _attention(o: Operation) -> Cost:
    """arguments: whether there is a mask that is an array."""
    q, k, v = o.inputs[:3]
    if q.shape[-1] not in (64, 96, 128):
        raise MM1Error(f"heads of {q.shape[-1]} numbers have no attention kernel")
    if q.shape[2] <= 8:
        copied = [q] if not _fits_query(q) else []
        copied += [x for x in (k, v) if not _fits_keys(x)]
        long = k.shape[1] < q.shape[1] and k.shape[2] >= 4096
        return replace(_launched(o, copied=copied), merges=int(long))
    copied = [x for x in (q, k, v) if x.strides[-1] != 1]
    _, H, L, D = o.shapes[0]
    strides = (H * L * D, D, H * D, 1)
    out = replace(o.made()[0], strides=strides, row_contiguous=False)
    return _launched(o, [out], copied=copied)


def _fits_query(q: Layout) -> bool:
    if q.row_contiguous:
        return True
    if 1 not in q.shape[:2]:
        return False
    other = 1 if q.shape[0] == 1 else 0
    return (q.strides[3], q.strides[2], q.strides[other]) == (
        1,
        q.shape[3] * q.shape[other],
        q.shape[3],
    )


def _fits_keys(x: Layout) -> bool:
    if x.strides[-1] != 1:
        return False
    return 1 in x.shape[:2] or x.strides[0] == x.strides[1] * x.shape[1]


def _as_matrix(x: Layout, vector: bool) -> bool:
    """Whether a plain product reads it as it is."""
    rows, columns = x.strides[-2:]
    if columns == 1 and (not vector or rows == x.shape[-1]):
        return True
    return rows == 1 and (not vector or columns == x.shape[-2])


def _matmul(o: Operation) -> Cost:
    a, b = o.inputs[:2]
    copied = [] if _as_matrix(a, a.shape[-2] == 1) else [a]
    copied += [] if _as_matrix(b, b.shape[-1] == 1) else [b]
    return _in_parts(o, _launched(o, copied=copied), _parts_of_matmul(o), 4)


def _in_parts(o: Operation, whole: Cost, parts: int, itemsize: int) -> Cost:
    """A product whose sums are made in so many parts, then added up."""
    if parts == 1:
        return whole
    moved = 2 * parts * prod(o.shapes[0]) * itemsize
    return replace(whole, merges=1, nbytes=whole.nbytes + moved)


def _parts_of_matmul(o: Operation) -> int:
    """matmul.cpp: of long sums in few places, where there is one matrix and no vector;
    up to 15 rows in 16 bits have a kernel of their own (gemv_wide)."""
    a, b = o.inputs[:2]
    M, N, K = a.shape[-2], b.shape[-1], a.shape[-1]
    few = M <= 15 and o.itemsizes[0] == 2 and K % 4 == 0 and b.strides[-2] == 1
    down, across, deep = -(-M // 16), -(-N // 16), K // 16
    if prod(o.shapes[0][:-2]) > 1 or min(M, N) == 1 or few:
        return 1
    if down * across > 1024 or deep < 8 or max(M, N) > K:
        return 1
    blocks = -(-M // 32) * -(-N // 32)
    return min(max(2, _power_of_2(deep // blocks)), 32)


def _power_of_2(n: int) -> int:
    """The next one."""
    return 1 << max(n - 1, 0).bit_length()


def _parts_of_packed(o: Operation) -> int:
    """quantized.cpp: as many as give 512 threadgroups, of whole groups of a row."""
    x, weight, scales = o.inputs[:3]
    if len(weight.shape) != 2:
        return 1
    K, N = x.shape[-1], o.shapes[0][-1]
    M = x.size // K
    few = 15 if 2048 < max(K, N) <= 4096 else 13
    if few > M:
        return 1
    size = max(K // scales.shape[-1], 32)
    parts = min(512 // (-(-N // 32) * -(-M // 32)), K // size)
    while parts > 1 and K % (parts * size):
        parts -= 1
    return max(parts, 1)


def _packed_rows(x: Layout) -> bool:
    """Whether a quantized product reads it as it is."""
    return x.strides[-2:] == (x.shape[-1], 1)


def _quantized_matmul(o: Operation) -> Cost:
    whole = _launched(o, copied=[x for x in o.inputs if not _packed_rows(x)])
    return _in_parts(o, whole, _parts_of_packed(o), o.itemsizes[0])


def _gathered(o: Operation, weights: Sequence[Layout], copied: list[Layout]) -> Cost:
    """Of the weights only the chosen matrices are read."""
    chosen = o.inputs[-1].size
    count = prod(weights[0].shape[:-2])
    moved = sum(x.nbytes for x in o.inputs if x not in weights)
    moved += sum(x.nbytes for x in weights) * min(chosen, count) // count
    out = o.made()
    moved += out[0].nbytes + sum(2 * x.nbytes for x in copied)
    return Cost(out, 1 + len(copied), len(copied), moved)


def _gather_mm(o: Operation) -> Cost:
    a, b, rows, experts = o.inputs
    copied = [] if _as_matrix(a, a.shape[-2] == 1) else [a]
    copied += [] if _as_matrix(b, b.shape[-1] == 1) else [b]
    copied += [x for x in (rows, experts) if not x.row_contiguous]
    return _gathered(o, [b], copied)


def _gather_qmm(o: Operation) -> Cost:
    *arrays, rows, experts = o.inputs
    copied = [x for x in arrays if not _packed_rows(x)]
    copied += [x for x in (rows, experts) if not x.row_contiguous]
    return _gathered(o, arrays[1:], copied)


def _sort(o: Operation) -> Cost:
    """One kernel for a row that fits a threadgroup; else blocks are merged in pairs."""
    x = o.inputs[0]
    axis = int(o.arguments[-1])
    per_block = 512 * 4 if x.itemsize <= 4 else 256 * 4
    blocks = -(-x.shape[axis] // per_block)
    one = _launched(o)
    if blocks == 1:
        return one
    merges = (blocks - 1).bit_length()
    launches = 1 + 2 * merges + 1  # each merge has a partition, and a copy at the end
    return Cost(one.outputs, launches, 0, one.nbytes * (1 + merges))


def _gather(o: Operation) -> Cost:
    """Rows of a table: what it gives is what it reads of it."""
    out = o.made()
    moved = 2 * out[0].nbytes + sum(x.nbytes for x in o.inputs[1:])
    return Cost(out, 1, 0, moved)


def _concatenate(o: Operation) -> Cost:
    out = o.made()
    return Cost(out, len(o.inputs), 0, 2 * out[0].nbytes)


def _slice_update(o: Operation) -> Cost:
    """In place: the array's only owner is the cache that is written to."""
    return Cost([o.inputs[0]], 1, 0, 2 * o.inputs[1].nbytes)


def _metal_kernel(o: Operation) -> Cost:
    """One of mx.fast.metal_kernel: reads arrays that lie row by row, or any.

    arguments: its name, first; and the tenth is whether inputs that are not contiguous
    are copied. Of stacks of experts it reads the chosen ones.
    """
    copied = [x for x in o.inputs if o.arguments[9] and not x.row_contiguous]
    stacks = [x for x in o.inputs if len(x.shape) == 3 and "experts" in o.arguments[0]]
    if not stacks:
        return _launched(o, copied=copied)
    flat = [x for x in [*o.inputs, *o.made()] if len(x.shape) == 2]
    count, chosen = stacks[0].shape[0], max(x.shape[0] for x in flat)
    one, whole = _launched(o, copied=copied), sum(x.nbytes for x in stacks)
    unread = whole - whole * min(chosen, count) // count
    return replace(one, nbytes=one.nbytes - unread)


def _scatter(o: Operation) -> Cost:
    """The array is copied, then written to."""
    out = o.made()
    return Cost(out, 2, 1, 3 * out[0].nbytes)


# fmt: off
_ELEMENTWISE = [
    "Abs", "Add", "AsType", "BitwiseBinary", "Ceil", "Cos", "Divide", "Equal",
    "Erf", "Exp", "Floor", "FloorDivide", "Greater", "GreaterEqual", "Less",
    "LessEqual", "Log", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum",
    "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Remainder", "Rsqrt",
    "Select", "Sigmoid", "Sign", "Sin", "Sqrt", "Square", "Subtract", "Tanh",
]
# fmt: on
_MADE = ["Arange", "ArgReduce", "Full", "LogSumExp", "Quantize", "Reduce", "RandomBits"]

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_MADE, _launched),
    **dict.fromkeys(("Sort", "ArgSort", "Partition", "ArgPartition"), _sort),
    **dict.fromkeys(("Gather", "GatherAxis"), _gather),
    **dict.fromkeys(("Scatter", "ScatterAxis"), _scatter),
    **dict.fromkeys(("Matmul", "AddMM"), _matmul),
    **dict.fromkeys(("Copy", "StopGradient", "Depends"), _first_inputs),
    **dict.fromkeys(("rms_norm", "layer_norm"), _norm),
    "CustomTransforms": _last_inputs,
    "Broadcast": _view(lambda o: lay.broadcast(o.inputs[0], o.shapes[0])),
    "BroadcastAxes": _view(lambda o: lay.broadcast(o.inputs[0], o.shapes[0])),
    "Contiguous": _view(lambda o: o.inputs[0] if o.inputs[0].row_contiguous else None),
    "ExpandDims": _view(_added_axes),
    "Flatten": _view(lambda o: lay.reshaped(o.inputs[0], o.shapes[0])),
    "NumberOfElements": lambda o: Cost(o.made()),
    "Reshape": _view(lambda o: lay.reshaped(o.inputs[0], o.shapes[0])),
    "Slice": _view(lambda o: lay.sliced(o.inputs[0], o.shapes[0], o.arguments[2])),
    "Split": _split,
    "Squeeze": _view(lambda o: lay.squeezed(o.inputs[0], o.shapes[0], o.arguments[0])),
    "Transpose": _view(lambda o: lay.transposed(o.inputs[0], o.arguments[0])),
    "Unflatten": _view(lambda o: lay.reshaped(o.inputs[0], o.shapes[0])),
    "View": _view(lambda o: lay.viewed(o.inputs[0], o.shapes[0], o.itemsizes[0])),
    "Concatenate": _concatenate,
    "GatherMM": _gather_mm,
    "GatherQMM": _gather_qmm,
    "QuantizedMatmul": _quantized_matmul,
    "SliceUpdate": _slice_update,
    "Softmax": _softmax,
    "attention": _attention,
    "fused": _fused,
    "metal_kernel": _metal_kernel,
    "rope": _rope,
}
