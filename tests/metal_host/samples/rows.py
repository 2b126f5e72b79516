"""A threadgroup for each row: softmax and RMS norm."""

import mlx.core as mx

from .maker import run

# Adds or compares over all threads of a threadgroup; each gets the result. The second
# barrier lets the caller use `part` again.
_HEADER = """
template <int SIMDGROUPS>
inline float total(float value, threadgroup float* part, uint lane, uint simdgroup) {
    value = simd_sum(value);
    if (lane == 0) part[simdgroup] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0.0f;
    for (int s = 0; s < SIMDGROUPS; s++) sum += part[s];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return sum;
}

template <int SIMDGROUPS>
inline float largest(float value, threadgroup float* part, uint lane, uint simdgroup) {
    value = simd_max(value);
    if (lane == 0) part[simdgroup] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float top = part[0];
    for (int s = 1; s < SIMDGROUPS; s++) top = metal::max(top, part[s]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return top;
}
"""

SOFTMAX = """
    constexpr int THREADS = SIMDGROUPS * 32;
    threadgroup float part[SIMDGROUPS];
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint thread_in_row = thread_index_in_threadgroup;
    int width = x_shape[1];
    auto row = x + size_t(threadgroup_position_in_grid.x) * width;
    float top = -INFINITY;
    for (int i = thread_in_row; i < width; i += THREADS) {
        top = metal::max(top, static_cast<float>(row[i]));
    }
    top = largest<SIMDGROUPS>(top, part, lane, simdgroup);
    float sum = 0.0f;
    for (int i = thread_in_row; i < width; i += THREADS) {
        sum += metal::precise::exp(static_cast<float>(row[i]) - top);
    }
    sum = total<SIMDGROUPS>(sum, part, lane, simdgroup);
    size_t start = size_t(threadgroup_position_in_grid.x) * width;
    for (int i = thread_in_row; i < width; i += THREADS) {
        float share = metal::precise::exp(static_cast<float>(row[i]) - top) / sum;
        out[start + i] = static_cast<T>(share);
    }
"""

RMS_NORM = """
    constexpr int THREADS = SIMDGROUPS * 32;
    threadgroup float part[SIMDGROUPS];
    uint thread_in_row = thread_index_in_threadgroup;
    int width = x_shape[1];
    size_t start = size_t(threadgroup_position_in_grid.x) * width;
    float squares = 0.0f;
    for (int i = thread_in_row; i < width; i += THREADS) {
        float value = static_cast<float>(x[start + i]);
        squares += value * value;
    }
    squares = total<SIMDGROUPS>(
        squares, part, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    float scale = metal::precise::rsqrt(squares / width + eps);
    for (int i = thread_in_row; i < width; i += THREADS) {
        float value = static_cast<float>(x[start + i]) * scale;
        out[start + i] = static_cast<T>(value * static_cast<float>(weight[i]));
    }
"""


def softmax(x: mx.array, simdgroups: int = 4, source: str = SOFTMAX) -> mx.array:
    """Softmax over the last axis of (rows, width)."""
    return run(
        "sample_softmax",
        source,
        {"x": x},
        {"out": (x.shape, x.dtype)},
        header=_HEADER,
        template=[("T", x.dtype), ("SIMDGROUPS", simdgroups)],
        grid=(x.shape[0] * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
    )[0]


def rms_norm(x: mx.array, weight: mx.array, eps: float = 1e-5) -> mx.array:
    """mx.fast.rms_norm of (rows, width)."""
    simdgroups = 4
    return run(
        "sample_rms_norm",
        RMS_NORM,
        {"x": x, "weight": weight, "eps": mx.array(eps)},
        {"out": (x.shape, x.dtype)},
        header=_HEADER,
        template=[("T", x.dtype), ("SIMDGROUPS", simdgroups)],
        grid=(x.shape[0] * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
    )[0]
