"""Moving values: scatter by atomics, bilinear gather, transposed copy, sort, scan."""

import mlx.core as mx

from .maker import groups, run

SCATTER = """
    uint i = thread_position_in_grid.x;
    if (i >= uint(index_shape[0])) return;
    atomic_fetch_add_explicit(&out[index[i]], values[i], memory_order_relaxed);
"""

# Bilinear, zero outside, coordinates -1..1 over the pixels' outer edges.
GATHER = """
    uint channel = thread_position_in_grid.x;
    uint point = thread_position_in_grid.y;
    int height = image_shape[0];
    int width = image_shape[1];
    int channels = image_shape[2];
    if (channel >= uint(channels) || point >= uint(where_shape[0])) return;
    float fx = ((where[point * 2] + 1.0f) * width - 1.0f) / 2.0f;
    float fy = ((where[point * 2 + 1] + 1.0f) * height - 1.0f) / 2.0f;
    int x0 = static_cast<int>(metal::floor(fx));
    int y0 = static_cast<int>(metal::floor(fy));
    float sum = 0.0f;
    for (int corner = 0; corner < 4; corner++) {
        int px = x0 + corner % 2;
        int py = y0 + corner / 2;
        if (px < 0 || px >= width || py < 0 || py >= height) continue;
        float share = (1.0f - metal::abs(fx - px)) * (1.0f - metal::abs(fy - py));
        auto pixel = image + (py * width + px) * channels;
        sum += share * static_cast<float>(pixel[channel]);
    }
    out[point * channels + channel] = static_cast<T>(sum);
"""

# The tile has one column more than it needs: on a GPU, columns then lie in other banks.
TRANSPOSE = """
    threadgroup T tile[32][33];
    uint2 here = thread_position_in_threadgroup.xy;
    uint2 corner = threadgroup_position_in_grid.xy * 32;
    uint rows = x_shape[0];
    uint columns = x_shape[1];
    for (uint r = here.y; r < 32; r += 8) {
        uint row = corner.y + r;
        uint column = corner.x + here.x;
        if (row < rows && column < columns) {
            tile[r][here.x] = x[row * columns + column];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = here.y; r < 32; r += 8) {
        uint row = corner.y + here.x;
        uint column = corner.x + r;
        if (row < rows && column < columns) {
            out[column * rows + row] = tile[here.x][r];
        }
    }
"""

# One threadgroup sorts N values, N a power of two and twice its threads.
SORT = """
    threadgroup T values[N];
    uint t = thread_position_in_threadgroup.x;
    values[t] = x[t];
    values[t + N / 2] = x[t + N / 2];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint length = 2; length <= uint(N); length *= 2) {
        for (uint apart = length / 2; apart > 0; apart /= 2) {
            uint low = t / apart * apart * 2 + t % apart;
            uint high = low + apart;
            bool rising = (low & length) == 0;
            T a = values[low];
            T b = values[high];
            if ((a > b) == rising) {
                values[low] = b;
                values[high] = a;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
    out[t] = values[t];
    out[t + N / 2] = values[t + N / 2];
"""

# A row of any length by one threadgroup: scans of simdgroups, then of their sums.
SCAN = """
    constexpr int THREADS = SIMDGROUPS * 32;
    threadgroup float sums[SIMDGROUPS];
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    int width = x_shape[1];
    size_t start = size_t(threadgroup_position_in_grid.x) * width;
    float carry = 0.0f;
    for (int first = 0; first < width; first += THREADS) {
        int i = first + thread_index_in_threadgroup;
        float value = i < width ? static_cast<float>(x[start + i]) : 0.0f;
        float within = simd_prefix_inclusive_sum(value);
        if (lane == 31) sums[simdgroup] = within;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float before = carry;
        for (uint s = 0; s < uint(SIMDGROUPS); s++) {
            if (s < simdgroup) before += sums[s];
            carry += sums[s];
        }
        if (i < width) out[start + i] = static_cast<T>(before + within);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
"""


def scatter_add(index: mx.array, values: mx.array, size: int) -> mx.array:
    """Zeros of `size`, with values added at index (n,) uint32."""
    count = index.shape[0]
    return run(
        "sample_scatter_add",
        SCATTER,
        {"index": index, "values": values},
        {"out": ((size,), values.dtype)},
        grid=(groups(count, 64), 1, 1),
        threadgroup=(64, 1, 1),
        init_value=0,
        atomic_outputs=True,
    )[0]


def bilinear_gather(image: mx.array, where: mx.array) -> mx.array:
    """Pixels of image (H, W, C) at where (P, 2), x first."""
    points, channels = where.shape[0], image.shape[2]
    return run(
        "sample_bilinear_gather",
        GATHER,
        {"image": image, "where": where},
        {"out": ((points, channels), image.dtype)},
        template=[("T", image.dtype)],
        grid=(groups(channels, 8), groups(points, 8), 1),
        threadgroup=(8, 8, 1),
    )[0]


def transpose(x: mx.array, source: str = TRANSPOSE) -> mx.array:
    """x.T, in tiles of 32x32 by 32x8 threads."""
    rows, columns = x.shape
    return run(
        "sample_transpose",
        source,
        {"x": x},
        {"out": ((columns, rows), x.dtype)},
        template=[("T", x.dtype)],
        grid=(groups(columns, 32), -(-rows // 32) * 8, 1),
        threadgroup=(32, 8, 1),
    )[0]


def sort(x: mx.array, source: str = SORT) -> mx.array:
    """x (n,) in rising order, n a power of two from 64 to 2048."""
    size = x.shape[0]
    return run(
        "sample_sort",
        source,
        {"x": x},
        {"out": (x.shape, x.dtype)},
        template=[("T", x.dtype), ("N", size)],
        grid=(size // 2, 1, 1),
        threadgroup=(size // 2, 1, 1),
    )[0]


def prefix_sum(x: mx.array, source: str = SCAN) -> mx.array:
    """mx.cumsum of each row of (rows, width)."""
    simdgroups = 3
    return run(
        "sample_prefix_sum",
        source,
        {"x": x},
        {"out": (x.shape, x.dtype)},
        template=[("T", x.dtype), ("SIMDGROUPS", simdgroups)],
        grid=(x.shape[0] * simdgroups * 32, 1, 1),
        threadgroup=(simdgroups * 32, 1, 1),
    )[0]
