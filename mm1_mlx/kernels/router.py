"""Which experts a token goes to, and with what weights: one launch in place of many.

Two kernels. `router`: the tail behind the router's matmul, one SIMD-group a token. The
definition takes 4 launches (keys, their sort, shares, indices), the kernel 1; what lies
between, 40 bytes a logit, is not written. `router_matvec`: the matmul as well, for a
few tokens: the casts of x and of the weight to float32, the matmul and the tail are 1
launch. One threadgroup does a token's whole matmul there, at what one core can read:
off by default until it is measured.
"""

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from mm1_mlx.kernels.expert_keys import keys_of, place_bits, places, row_numbers
from mm1_mlx.kernels.fused import Chain, counting, fused, on_cpu
from mm1_mlx.kernels.metal import MetalKernel, chosen

MAX_EXPERTS = 512  # a lane keeps a 32nd of a token's logits in registers
MAX_CHOSEN = 16
# With the matmul inside: 512 threads of a group may have 100 registers each.
MAX_EXPERTS_INSIDE = 256
GROUPS = 16
MAX_TOKENS = 8  # more read the weight too often: a matmul shares it
FLOATS = (mx.float32, mx.float16, mx.bfloat16)

# Weights, experts, and keys or None.
Routed = tuple[mx.array, mx.array, mx.array | None]


def top_k(logits: mx.array, k: int) -> mx.array:
    """The k largest logits' indices, largest first; ties go to the lower index.

    NaN stands below everything.

    Shapes:
        logits: (T, E) float32
        returns: (T, k) uint32
    """
    if k == 1:
        return mx.argmax(logits, axis=-1, keepdims=True)
    return mx.imag(_best(logits, k)).astype(mx.uint32)


def _best(logits: mx.array, k: int) -> mx.array:
    """The k largest logits, negated, with their indices as imaginary parts.

    Complex numbers are sorted by their first part and then by the other, so the order
    is exact on every back end, whether its sort is stable or not. (T, E) float32 ->
    (T, k) complex64.
    """
    keys = _negated(_imaginary(logits.shape[-1]), logits)
    return mx.sort(keys, axis=-1)[..., :k]


@lru_cache(maxsize=64)
def _imaginary(count: int) -> mx.array:
    """0, i, 2i, ... (count,) complex64."""
    return mx.array([complex(0, n) for n in range(count)], mx.complex64)


@fused
def _negated(ids: mx.array, logits: mx.array) -> mx.array:
    return ids - logits.astype(mx.complex64)


@lru_cache
def _shares(dtype: mx.Dtype) -> tuple[Chain, Chain]:
    """Two functions of what _best gives, (T, k), and of its columns, (T, 1) each.

    They give the softmax over the chosen logits, in this type, and their indices, both
    (T, k). As the columns come one by one, a row's sum needs no reduction: MLX makes a
    kernel of the shares and one of the indices. The second takes places and a shift
    before, and gives keys as well.
    """

    def plain(best: mx.array, *each: mx.array) -> tuple[mx.array, ...]:
        first = mx.real(each[0])
        terms = [mx.exp(first - mx.real(column)) for column in each]
        while len(terms) > 1:  # in pairs: MLX fuses chains up to a length
            pairs = zip(terms[::2], terms[1::2], strict=False)
            odd = terms[-1:] if len(terms) % 2 else []
            terms = [a + b for a, b in pairs] + odd
        weights = mx.exp(first - mx.real(best)) / terms[0]
        experts = mx.imag(mx.stop_gradient(best)).astype(mx.uint32)
        return weights.astype(dtype), experts

    def sorting(
        places: mx.array, shift: mx.array, *best: mx.array
    ) -> tuple[mx.array, ...]:
        weights, experts = plain(*best)
        return weights, experts, (experts << shift) | places

    return fused(plain), fused(sorting)


# --- The definition ------------------------------------------------------------------


def route_reference(
    logits: mx.array,
    k: int,
    renormalise: bool,
    dtype: mx.Dtype = mx.float32,
    keyed: bool = False,
) -> Routed:
    """Weights (T, k) in dtype and experts (T, k) uint32, largest first.

    Weights are the softmax over all experts; renormalise: divided by their sum. keyed:
    also keys_of the experts.

    Shapes:
        logits: (T, E)
    """
    logits = logits.astype(mx.float32)
    # The same as softmax over the chosen, in four launches. Where chains are not fused,
    # they are three times as many operations as softmax below.
    if renormalise and k > 1 and not on_cpu():
        plain, sorting = _shares(dtype)
        best = _best(logits, k)
        columns = (best, *mx.split(best, k, axis=-1))
        if not keyed:
            return *plain(*columns), None
        shift = mx.array(place_bits(logits.shape[0], k)[1], mx.uint32)
        return sorting(places(logits.shape[0], k), shift, *columns)
    experts = top_k(mx.stop_gradient(logits), k)
    best = mx.take_along_axis(logits, experts, axis=-1)
    if renormalise:
        weights = mx.softmax(best, axis=-1)
    else:
        weights = mx.exp(best - mx.logsumexp(logits, axis=-1, keepdims=True))
    return weights.astype(dtype), experts, keys_of(experts) if keyed else None


def tokens_reference(
    x: mx.array,
    weight: mx.array,
    k: int,
    renormalise: bool,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array, mx.array]:
    """Weights and experts as route_reference's, and the logits (T, E) float32.

    Shapes:
        x: (T, D); weight: (E, D), both in any type: the product is in float32
    """
    logits = logits_of(x, weight.astype(mx.float32))
    weights, experts, _ = route_reference(logits, k, renormalise, dtype)
    return weights, experts, logits


def logits_of(x: mx.array, weight: mx.array) -> mx.array:
    """x times a router's weight in float32: (T, D), (E, D) -> (T, E).

    A few tokens one by one: of several, MLX makes such long sums in parts, which takes
    a second launch.
    """
    x, T = x.astype(mx.float32), x.shape[0]
    if on_cpu() or not 1 < T <= MAX_TOKENS:
        return x @ weight.T
    logits = mx.gather_mm(
        x.reshape(T, 1, -1),
        weight[None].swapaxes(-1, -2),
        lhs_indices=row_numbers(T, 1),
        rhs_indices=_first(T),
    )
    return logits.reshape(T, -1)


@lru_cache(maxsize=MAX_TOKENS)
def _first(times: int) -> mx.array:
    return mx.array([0] * times, mx.uint32)


_CHOOSE = """
constant constexpr int MM1_NONE = -2147483647 - 1;  // below every logit

// A logit as an integer of the same order, zeros equal, NaN below the others.
inline int mm1_order(float logit) {
    if (metal::isnan(logit)) return MM1_NONE + 1;
    int bits = logit == 0.0f ? 0 : as_type<int>(logit);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

inline float mm1_logit(int order) {
    return as_type<float>(order < 0 ? order ^ 0x7fffffff : order);
}

// What a SIMD-group finds for one token. logits: this lane's, of experts lane,
// lane + 32, and so on.
template <typename W, int E, int K, bool RENORMALISE>
inline void mm1_choose(
    const thread float* logits,
    uint lane,
    device W* weights,
    device uint32_t* experts) {
    constexpr int PER_LANE = (E + 31) / 32;
    int order[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) {
        order[i] = int(lane) + 32 * i < E ? mm1_order(logits[i]) : MM1_NONE;
    }
    float best[K];
    int found[K];
    for (int k = 0; k < K; k++) {
        int most = order[0];
        int expert = lane;
        for (int i = 1; i < PER_LANE; i++) {
            if (order[i] > most) {
                most = order[i];
                expert = int(lane) + 32 * i;
            }
        }
        int top = simd_max(most);
        found[k] = simd_min(most == top ? expert : E);
        best[k] = mm1_logit(top);
        for (int i = 0; i < PER_LANE; i++) {
            if (int(lane) + 32 * i == found[k]) order[i] = MM1_NONE;
        }
    }
    float total = 0.0f;
    if (RENORMALISE) {
        for (int k = 0; k < K; k++) total += metal::precise::exp(best[k] - best[0]);
    } else {
        bool none = false;  // NaN
        for (int i = 0; i < PER_LANE; i++) {
            if (int(lane) + 32 * i < E) {
                total += metal::precise::exp(logits[i] - best[0]);
                none = none || metal::isnan(logits[i]);
            }
        }
        total = simd_sum(total);
        if (metal::isinf(best[0])) total = 1.0f;  // as logsumexp has it
        if (simd_any(none)) total = NAN;
    }
    if (lane == 0) {
        for (int k = 0; k < K; k++) {
            float share = metal::precise::exp(best[k] - best[0]) / total;
            weights[k] = static_cast<W>(share);
            experts[k] = static_cast<uint32_t>(found[k]);
        }
    }
}
"""

_TAIL_SOURCE = """
    constexpr int PER_LANE = (E + 31) / 32;
    uint lane = thread_index_in_simdgroup;
    size_t token = thread_position_in_grid.x / 32;
    auto row = logits + token * E;
    float mine[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) {
        int e = int(lane) + 32 * i;
        mine[i] = e < E ? static_cast<float>(row[e]) : 0.0f;
    }
    mm1_choose<W, E, K, RENORMALISE>(
        mine, lane, weights + token * K, experts + token * K);
"""
_TAIL = MetalKernel(
    "mm1_router",
    inputs=["logits"],
    outputs=["weights", "experts"],
    header=_CHOOSE,
    source=_TAIL_SOURCE,
)
_TAIL_KEYED = MetalKernel(
    "mm1_router_keyed",
    inputs=["logits"],
    outputs=["weights", "experts", "keys"],
    header=_CHOOSE,
    source=_TAIL_SOURCE
    + """
    if (lane == 0) {
        for (int k = 0; k < K; k++) {
            uint place = (uint(token) << LOW) | uint(k);
            keys[token * K + k] = (experts[token * K + k] << BOTH) | place;
        }
    }
""",
)

# Each SIMD-group takes ROWS experts at a time, so that x is read once for them.
_MATVEC = MetalKernel(
    "mm1_router_matvec",
    inputs=["x", "weight"],
    outputs=["weights", "experts", "logits"],
    header=_CHOOSE,
    source="""
    constexpr int PER_LANE = (E + 31) / 32;
    threadgroup float shared[E];
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    size_t token = threadgroup_position_in_grid.y;
    auto row = x + token * D;
    for (int first = int(group) * ROWS; first < E; first += GROUPS * ROWS) {
        float sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
        for (int i = int(lane) * 4; i < D; i += 128) {
            for (int j = 0; j < 4; j++) {
                if (D % 4 == 0 || i + j < D) {
                    float value = static_cast<float>(row[i + j]);
                    for (int r = 0; r < ROWS; r++) {
                        size_t e = min(first + r, E - 1);
                        sums[r] += value * static_cast<float>(weight[e * D + i + j]);
                    }
                }
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float sum = simd_sum(sums[r]);
            if (lane == 0 && first + r < E) {
                shared[first + r] = sum;
                logits[token * E + first + r] = sum;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        float mine[PER_LANE];
        for (int i = 0; i < PER_LANE; i++) {
            int e = int(lane) + 32 * i;
            mine[i] = e < E ? shared[e] : 0.0f;
        }
        mm1_choose<W, E, K, RENORMALISE>(
            mine, lane, weights + token * K, experts + token * K);
    }
""",
)


def route_metal(
    logits: mx.array,
    k: int,
    renormalise: bool,
    dtype: mx.Dtype = mx.float32,
    keyed: bool = False,
) -> Routed:
    """The same contract as route_reference, within `fits`; without a gradient."""
    T, E = logits.shape
    low, both = place_bits(T, k) if keyed else (0, 0)
    sizes = [("W", dtype), ("E", E), ("K", k), ("RENORMALISE", renormalise)]
    found = (_TAIL_KEYED if keyed else _TAIL)(
        [logits],
        template=sizes + ([("LOW", low), ("BOTH", both)] if keyed else []),
        grid=(32 * T, 1, 1),
        threadgroup=(32 * min(T, 8), 1, 1),
        shapes=[(T, k)] * (2 + keyed),
        dtypes=[dtype, mx.uint32, mx.uint32][: 2 + keyed],
    )
    return found[0], found[1], found[2] if keyed else None


def tokens_metal(
    x: mx.array,
    weight: mx.array,
    k: int,
    renormalise: bool,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array, mx.array]:
    """The same contract as tokens_reference, within `fits_tokens`; no gradient."""
    (T, D), E = x.shape, weight.shape[0]
    rows = min(4, -(-E // 32))
    groups = min(GROUPS, -(-E // rows))
    weights, experts, logits = _MATVEC(
        [x, weight],
        template=[
            ("W", dtype), ("E", E), ("D", D), ("K", k), ("RENORMALISE", renormalise),
            ("ROWS", rows), ("GROUPS", groups),
        ],
        grid=(32 * groups, T, 1),
        threadgroup=(32 * groups, 1, 1),
        shapes=[(T, k), (T, k), (T, E)],
        dtypes=[dtype, mx.uint32, mx.float32],
    )  # fmt: skip
    return weights, experts, logits


def fits(logits: mx.array, k: int) -> bool:
    """Whether the tail's kernel can: its limits on shapes and types."""
    if logits.ndim != 2 or logits.dtype not in FLOATS or not logits.shape[0]:
        return False
    E = logits.shape[1]
    return 1 <= k <= min(E, MAX_CHOSEN) and E <= MAX_EXPERTS


def fits_tokens(x: mx.array, weight: mx.array, k: int) -> bool:
    """Whether the kernel with the matmul inside can."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        return False
    floats = x.dtype in FLOATS and weight.dtype in FLOATS
    E, sized = weight.shape[0], x.size > 0 and x.shape[0] <= MAX_TOKENS
    return floats and sized and 1 <= k <= min(E, MAX_CHOSEN) and E <= MAX_EXPERTS_INSIDE


def _to_logits(
    logits: mx.array,
    weights: mx.array,
    experts: mx.array,
    cotangent: mx.array,
    renormalise: bool,
) -> mx.array:
    """The gradient of the weights, taken to the logits. (T, k) -> (T, E) float32."""
    share = weights * cotangent
    total = share.sum(axis=-1, keepdims=True)
    if renormalise:
        share, others = share - weights * total, mx.zeros(logits.shape)
    else:
        others = -mx.softmax(logits.astype(mx.float32), axis=-1) * total
    at = mx.take_along_axis(others, experts, axis=-1) + share
    return mx.put_along_axis(others, experts, at, axis=-1)


@cache
def _trainable_tail(k: int, renormalise: bool, dtype: mx.Dtype, keyed: bool) -> Any:
    def forwards(logits: mx.array) -> list[mx.array]:
        found = route_metal(logits, k, renormalise, dtype, keyed)
        return [array for array in found if array is not None]

    run: Any = mx.custom_function(forwards)

    @run.vjp
    def backwards(logits: Any, cotangents: Any, outputs: Any) -> mx.array:
        weights, experts = outputs[0].astype(mx.float32), outputs[1]
        slope = cotangents[0].astype(mx.float32)
        found = _to_logits(logits, weights, experts, slope, renormalise)
        return found.astype(logits.dtype)

    return run


@cache
def _trainable_tokens(k: int, renormalise: bool, dtype: mx.Dtype) -> Any:
    run: Any = mx.custom_function(
        lambda x, weight: tokens_metal(x, weight, k, renormalise, dtype)
    )

    @run.vjp
    def backwards(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        x, weight = primals
        weights, experts, logits = outputs
        to_weights, _, to_logits = cotangents
        weights, to_weights = (a.astype(mx.float32) for a in (weights, to_weights))
        found = _to_logits(logits, weights, experts, to_weights, renormalise)
        found = found + to_logits
        to_x = found @ weight.astype(mx.float32)
        to_weight = found.T @ x.astype(mx.float32)
        return to_x.astype(x.dtype), to_weight.astype(weight.dtype)

    return run


def route(
    logits: mx.array,
    k: int,
    renormalise: bool,
    *,
    dtype: mx.Dtype = mx.float32,
    keyed: bool = False,
    trainable: bool = False,
) -> Routed:
    """route_reference by the kernel where it applies.

    trainable: with a gradient. (Not while launches are counted: MLX cannot export what
    has a gradient of its own.)
    """
    if not (chosen("router") and fits(logits, k)):
        return route_reference(logits, k, renormalise, dtype, keyed)
    if not trainable or counting():
        return route_metal(logits, k, renormalise, dtype, keyed)
    found = _trainable_tail(k, renormalise, dtype, keyed)(logits)
    return found[0], found[1], found[2] if keyed else None


def route_tokens(
    x: mx.array,
    weight: mx.array,
    k: int,
    renormalise: bool,
    *,
    dtype: mx.Dtype = mx.float32,
    wide: mx.array | None = None,
    trainable: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """tokens_reference by the kernels, where they apply.

    wide: the weight in float32, where that is kept.
    """
    if not (chosen("router_matvec", default=False) and fits_tokens(x, weight, k)):
        wide = weight.astype(mx.float32) if wide is None else wide
        logits = logits_of(x, wide)
        weights, experts, _ = route(
            logits, k, renormalise, dtype=dtype, trainable=trainable
        )
        return weights, experts, logits
    if not trainable or counting():
        return tokens_metal(x, weight, k, renormalise, dtype)
    return _trainable_tokens(k, renormalise, dtype)(x, weight)
