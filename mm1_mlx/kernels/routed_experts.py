"""The chosen experts of a few tokens in two launches, whose weights are read once.

First gate and up of all chosen experts with the activation, then down with the weighted
sum over them: 2 launches in place of 4 (two gathered matmuls, the activation with its
product, the sum). (T, K, F) is written and read once between them, in float32; what
comes before the activation (T, K, 2F) and the experts' answers (T, K, D) are not
written at all. For decoding: no gradient, and with more than 8 tokens weights are
better read once for several of them.

Off by default until it is measured: with experts as wide as MM1's, most of the time
goes to reading weights, which MLX's own kernels do well.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.expert_keys import row_numbers
from mm1_mlx.kernels.fused import fused, on_cpu
from mm1_mlx.kernels.metal import MetalKernel, chosen

MAX_TOKENS = 8
MAX_CHOSEN = 16
ROWS = 4  # of a SIMD-group: x is read once for them
GROUPS = 2  # SIMD-groups of a threadgroup
GROUP_SIZES = (32, 64, 128)
BITS = (4, 8)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)

# Their numbers stand in the source below.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
}


class Weights(NamedTuple):
    """A stack (E, out, in) as the kernels take it: its arrays, and how it is packed."""

    arrays: list[mx.array]
    shape: tuple[int, int, int]
    bits: int = 0  # 0: as it is
    group_size: int = 1


def unpack(stack: Any) -> Weights | None:
    """An array, or a module with packed weights (models.moe.QuantizedStack); else None.

    None, too, where there is more to it (an adapter), or it is packed in another way.
    """
    if isinstance(stack, mx.array):
        return Weights([stack], stack.shape) if stack.ndim == 3 else None  # type: ignore[arg-type]
    if not isinstance(stack, nn.Module):
        return None
    if {n for n in stack if not n.startswith("_")} != {"weight", "scales", "biases"}:
        return None
    bits, size = stack.bits, stack.group_size
    if stack.mode != "affine" or bits not in BITS or size not in GROUP_SIZES:
        return None
    arrays = [stack[name] for name in ("weight", "scales", "biases")]
    E, out, words = arrays[0].shape
    return Weights(arrays, (E, out, words * 32 // bits), bits, size)


def experts_reference(
    x: mx.array,
    up: Any,
    down: Any,
    weights: mx.array,
    experts: mx.array,
    act: str,
    gated: bool,
) -> mx.array:
    """Each token through its experts, weighted and summed.

    Shapes:
        x: (T, D); weights, experts: (T, K)
        up: (E, 2F, D), gate rows first, or not gated (E, F, D); down: (E, D, F);
            each an array or packed, see unpack
        returns: (T, D)
    """
    T, K = experts.shape
    x, dtype = x.reshape(T, 1, -1), x.dtype
    hidden = _gathered(x, up, experts, row_numbers(T, K))
    if gated:
        gate, hidden = mx.split(hidden, 2, axis=-1)
        hidden = _gate(act)(gate, hidden)
    else:
        hidden = ACTIVATIONS[act](hidden)
    out = _gathered(hidden, down, experts, row_numbers(T * K, 1)).reshape(T, K, -1)
    weights = weights.reshape(T, 1, K).astype(out.dtype)
    return (weights @ out).reshape(T, -1).astype(dtype)


@cache
def _gate(act: str) -> Callable[[mx.array, mx.array], mx.array]:
    return fused(lambda gate, up: ACTIVATIONS[act](gate) * up)


def _gathered(x: mx.array, stack: Any, experts: mx.array, rows: mx.array) -> mx.array:
    """Rows of x times their experts' matrices. (R, 1, in), T*K rows -> (T*K, 1, out).

    What is computed without the kernels, models.moe.Experts does in the same way.
    """
    found = unpack(stack)
    assert found is not None
    which: Any = {"lhs_indices": rows, "rhs_indices": experts.reshape(-1)}
    if found.bits:
        how: Any = {"group_size": found.group_size, "bits": found.bits}
        return mx.gather_qmm(x, *found.arrays, **which, transpose=True, **how)
    weight = found.arrays[0]
    if on_cpu():  # its gather_mm knows float32 alone
        x, weight = x.astype(mx.float32), weight.astype(mx.float32)
    return mx.gather_mm(x, weight.swapaxes(-1, -2), **which)


_HEADER = """
template <int ACT>
inline float mm1_activated(float x) {
    if (ACT == 0) return x / (1.0f + metal::precise::exp(-x));
    if (ACT == 1) {
        float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + metal::precise::tanh(inner));
    }
    if (ACT == 2) return x / (1.0f + metal::precise::exp(-1.702f * x));
    float kept = metal::max(x, 0.0f);
    return ACT == 3 ? kept : kept * kept;
}

// This lane's part of ROWS rows times x, of which `left` are there. weight: the first.
template <int IN, int ROWS, typename W, typename X>
inline void mm1_dots(W weight, X x, int left, uint lane, thread float* sums) {
    for (int i = int(lane) * 4; i < IN; i += 128) {
        for (int j = 0; j < 4; j++) {
            if (IN % 4 == 0 || i + j < IN) {
                float value = static_cast<float>(x[i + j]);
                for (int r = 0; r < ROWS; r++) {
                    int at = metal::min(r, left - 1) * IN + i + j;
                    sums[r] += value * static_cast<float>(weight[at]);
                }
            }
        }
    }
}

// The same of packed rows: 16 numbers a lane and step. A code is not shifted down to
// its place: x is divided by the power of two instead, once for all rows.
template <int BITS, int GROUP, int IN, int ROWS, typename W, typename S, typename X>
inline void mm1_packed_dots(
    W packed, S scales, S biases, X x, int left, uint lane, thread float* sums) {
    constexpr int PER_WORD = 32 / BITS;
    constexpr uint MASK = (1u << BITS) - 1u;
    for (int i = int(lane) * 16; i < IN; i += 512) {
        float values[16];
        float total = 0.0f;
        for (int j = 0; j < 16; j++) {
            float value = static_cast<float>(x[i + j]);
            total += value;
            values[j] = value * (1.0f / float(1u << (BITS * (j % PER_WORD))));
        }
        for (int r = 0; r < ROWS; r++) {
            int row = metal::min(r, left - 1);
            float sum = 0.0f;
            for (int w = 0; w < 16 / PER_WORD; w++) {
                uint word = packed[row * (IN / PER_WORD) + i / PER_WORD + w];
                for (int j = 0; j < PER_WORD; j++) {
                    float code = static_cast<float>(word & (MASK << (BITS * j)));
                    sum += code * values[w * PER_WORD + j];
                }
            }
            int group = row * (IN / GROUP) + i / GROUP;
            sums[r] += static_cast<float>(scales[group]) * sum;
            sums[r] += static_cast<float>(biases[group]) * total;
        }
    }
}
"""

_START = """
    uint lane = thread_index_in_simdgroup;
    int at = threadgroup_position_in_grid.x * GROUPS + simdgroup_index_in_threadgroup;
    int row = at * ROWS;
    int left = metal::min(ROWS, OUT - row);
    uint place = threadgroup_position_in_grid.y;
    if (left <= 0) return;
"""

# place: token * K + k. STRIDE: rows of an expert, gate ones first.
_UP = """
    size_t first = size_t(experts[place]) * STRIDE + row;
    auto values = x + size_t(place / K) * IN;
    float up[ROWS];
    float gate[ROWS];
    for (int r = 0; r < ROWS; r++) { up[r] = 0.0f; gate[r] = 0.0f; }
    MM1_DOTS(first + (GATED ? OUT : 0), up);
    if (GATED) { MM1_DOTS(first, gate); }
    for (int r = 0; r < ROWS; r++) {
        float value = simd_sum(up[r]);
        float through = GATED ? simd_sum(gate[r]) : value;
        float made = mm1_activated<ACT>(through) * (GATED ? value : 1.0f);
        if (lane == 0 && r < left) hidden[size_t(place) * OUT + row + r] = made;
    }
"""

# place: token.
_DOWN = """
    float sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
    for (int k = 0; k < K; k++) {
        size_t first = size_t(experts[place * K + k]) * OUT + row;
        auto values = hidden + size_t(place * K + k) * IN;
        float part[ROWS];
        for (int r = 0; r < ROWS; r++) part[r] = 0.0f;
        MM1_DOTS(first, part);
        float share = static_cast<float>(weights[place * K + k]);
        for (int r = 0; r < ROWS; r++) sums[r] += share * part[r];
    }
    for (int r = 0; r < ROWS; r++) {
        float sum = simd_sum(sums[r]);
        if (lane == 0 && r < left) {
            out[size_t(place) * OUT + row + r] = static_cast<T>(sum);
        }
    }
"""

# How a body reads the rows from one of the stack on.
_PLAIN = """
#define MM1_DOTS(row, sums) \\
    mm1_dots<IN, ROWS>(stack + (row) * IN, values, left, lane, sums)
"""
_PACKED = """
#define MM1_DOTS(row, sums) \\
    mm1_packed_dots<BITS, GROUP, IN, ROWS>( \\
        stack + (row) * (IN * BITS / 32), scales + (row) * (IN / GROUP), \\
        biases + (row) * (IN / GROUP), values, left, lane, sums)
"""


def _pair(name: str, body: str, inputs: list[str], output: str) -> list[MetalKernel]:
    """The kernel for weights as they are, and the one for packed ones."""
    return [
        MetalKernel(
            f"mm1_experts_{name}_{kind}",
            inputs=[*inputs, *arrays],
            outputs=[output],
            header=_HEADER + read,
            source=_START + body,
        )
        for kind, read, arrays in (
            ("plain", _PLAIN, ["stack"]),
            ("packed", _PACKED, ["stack", "scales", "biases"]),
        )
    ]


_UP_KERNELS = _pair("up", _UP, ["x", "experts"], "hidden")
_DOWN_KERNELS = _pair("down", _DOWN, ["hidden", "experts", "weights"], "out")


def experts_metal(
    x: mx.array,
    up: Any,
    down: Any,
    weights: mx.array,
    experts: mx.array,
    act: str,
    gated: bool,
) -> mx.array:
    """The same contract as experts_reference, within `fits`; without a gradient."""
    first, last = unpack(up), unpack(down)
    assert first is not None and last is not None
    T, K = experts.shape
    _, D, F = last.shape
    number = list(ACTIVATIONS).index(act)
    template = [("STRIDE", first.shape[1]), ("ACT", number), ("GATED", gated)]
    hidden = _run(
        _UP_KERNELS, first, [x, experts], [*template, ("K", K)],
        rows=F, places=T * K, dtype=mx.float32,
    )  # fmt: skip
    return _run(
        _DOWN_KERNELS, last, [hidden, experts, weights], [("T", x.dtype), ("K", K)],
        rows=D, places=T, dtype=x.dtype,
    )  # fmt: skip


def _run(
    pair: list[MetalKernel],
    stack: Weights,
    inputs: list[mx.array],
    template: list[tuple[str, Any]],
    *,
    rows: int,
    places: int,
    dtype: mx.Dtype,
) -> mx.array:
    template = [("IN", stack.shape[2]), ("OUT", rows), *template]
    template += [("ROWS", ROWS), ("GROUPS", GROUPS)]
    if stack.bits:
        template += [("BITS", stack.bits), ("GROUP", stack.group_size)]
    blocks = -(-rows // (ROWS * GROUPS))
    return pair[bool(stack.bits)](
        [*inputs, *stack.arrays],
        template=template,
        grid=(blocks * GROUPS * 32, places, 1),
        threadgroup=(GROUPS * 32, 1, 1),
        shapes=[(places, rows)],
        dtypes=[dtype],
    )[0]


def fits(
    x: mx.array,
    up: Any,
    down: Any,
    weights: mx.array,
    experts: mx.array,
    act: str,
    gated: bool,
) -> bool:
    """Whether the kernels can: their limits on shapes, types and packing."""
    first, last = unpack(up), unpack(down)
    if first is None or last is None or act not in ACTIVATIONS:
        return False
    if x.ndim != 2 or experts.ndim != 2 or weights.shape != experts.shape:
        return False
    (E, rows, D), (T, K) = first.shape, experts.shape
    F = rows // 2 if gated else rows
    floats = [x, weights, first.arrays[-1], last.arrays[-1]]
    return (
        all(array.dtype in FLOATS for array in floats)
        and 1 <= T <= MAX_TOKENS
        and 1 <= K <= MAX_CHOSEN
        and x.shape == (T, D)
        and rows == (2 * F if gated else F)
        and last.shape == (E, D, F)
        and experts.dtype == mx.uint32
    )


def routed_experts(
    x: mx.array,
    up: Any,
    down: Any,
    weights: mx.array,
    experts: mx.array,
    act: str,
    gated: bool,
) -> mx.array | None:
    """experts_reference by the kernels; None where they are off or do not apply."""
    given = (x, up, down, weights, experts, act, gated)
    if not chosen("routed_experts", default=False) or not fits(*given):
        return None
    return experts_metal(*given)
