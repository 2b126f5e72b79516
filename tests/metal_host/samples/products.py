"""Matrix products: tiles in threadgroup memory, 8x8 simdgroup matrices, 4-bit rows."""

import mlx.core as mx

from .maker import groups, run

TILED = """
    threadgroup float left[TILE][TILE];
    threadgroup float right[TILE][TILE];
    uint2 here = thread_position_in_threadgroup.xy;
    int rows = a_shape[0];
    int inner = a_shape[1];
    int columns = b_shape[1];
    int row = threadgroup_position_in_grid.y * TILE + here.y;
    int column = threadgroup_position_in_grid.x * TILE + here.x;
    float sum = 0.0f;
    for (int start = 0; start < inner; start += TILE) {
        int k = start + here.x;
        bool inside = row < rows && k < inner;
        left[here.y][here.x] = inside ? static_cast<float>(a[row * inner + k]) : 0.0f;
        k = start + here.y;
        inside = k < inner && column < columns;
        right[here.y][here.x] =
            inside ? static_cast<float>(b[k * columns + column]) : 0.0f;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int j = 0; j < TILE; j++) sum += left[here.y][j] * right[j][here.x];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (row < rows && column < columns) {
        out[row * columns + column] = static_cast<T>(sum);
    }
"""

# One simdgroup for each 8x8 tile of the output; all sizes are multiples of 8.
SIMDGROUP = """
    int inner = a_shape[1];
    int columns = b_shape[1];
    uint row = threadgroup_position_in_grid.y * 8;
    uint column = threadgroup_position_in_grid.x * 8;
    simdgroup_matrix<T, 8, 8> left;
    simdgroup_matrix<T, 8, 8> right;
    simdgroup_matrix<float, 8, 8> sum = simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < inner; k += 8) {
        simdgroup_load(left, a + row * inner + k, inner);
        simdgroup_load(right, b + k * columns + column, columns);
        simdgroup_multiply_accumulate(sum, left, right, sum);
    }
    simdgroup_store(sum, out + row * columns + column, columns);
"""

# MLX packs eight 4-bit values in a word, the first lowest; value = q * scale + bias.
# SIMDGROUPS simdgroups share the words of ROWS rows.
QUANTIZED = """
    threadgroup float part[SIMDGROUPS][ROWS];
    uint lane = thread_index_in_simdgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint first = threadgroup_position_in_grid.y * ROWS;
    uint line = threadgroup_position_in_grid.z;
    constexpr int WORDS = WIDTH / 8;
    float sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
    const device T* values = x + size_t(line) * WIDTH;
    for (int word = simdgroup * 32 + lane; word < WORDS; word += SIMDGROUPS * 32) {
        float v[8];
        float v_sum = 0.0f;
        for (int j = 0; j < 8; j++) {
            v[j] = static_cast<float>(values[word * 8 + j]);
            v_sum += v[j];
        }
        for (int r = 0; r < ROWS; r++) {
            uint row = first + r;
            if (row < uint(HEIGHT)) {
                uint bits = w[size_t(row) * WORDS + word];
                float dot = 0.0f;
                for (int j = 0; j < 8; j++) {
                    dot += static_cast<float>(bits & 15u) * v[j];
                    bits >>= 4;
                }
                size_t at = size_t(row) * (WIDTH / GROUP) + word * 8 / GROUP;
                sums[r] += static_cast<float>(scales[at]) * dot;
                sums[r] += static_cast<float>(biases[at]) * v_sum;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float sum = simd_sum(sums[r]);
        if (lane == 0) part[simdgroup][r] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && lane < uint(ROWS) && first + lane < uint(HEIGHT)) {
        float sum = 0.0f;
        for (int s = 0; s < SIMDGROUPS; s++) sum += part[s][lane];
        out[size_t(line) * HEIGHT + first + lane] = static_cast<T>(sum);
    }
"""


def tiled_matmul(a: mx.array, b: mx.array, source: str = TILED) -> mx.array:
    """a @ b for any sizes, in tiles of 8x8 (two simdgroups)."""
    tile, (rows, columns) = 8, (a.shape[0], b.shape[1])
    return run(
        "sample_tiled_matmul",
        source,
        {"a": a, "b": b},
        {"out": ((rows, columns), a.dtype)},
        template=[("T", a.dtype), ("TILE", tile)],
        grid=(groups(columns, tile), groups(rows, tile), 1),
        threadgroup=(tile, tile, 1),
    )[0]


def simdgroup_matmul(a: mx.array, b: mx.array) -> mx.array:
    """a @ b in float32 for sizes that are multiples of 8."""
    rows, columns = a.shape[0], b.shape[1]
    return run(
        "sample_simdgroup_matmul",
        SIMDGROUP,
        {"a": a, "b": b},
        {"out": ((rows, columns), mx.float32)},
        template=[("T", a.dtype)],
        grid=(columns // 8 * 32, rows // 8, 1),
        threadgroup=(32, 1, 1),
    )[0]


def quantized_matvec(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int = 64,
    source: str = QUANTIZED,
) -> mx.array:
    """mx.quantized_matmul of a few rows x (lines, width), 4 bits, transposed."""
    simdgroups, rows = 4, 4
    lines, width = x.shape
    height = w.shape[0]
    sizes = {"WIDTH": width, "HEIGHT": height, "GROUP": group_size}
    sizes |= {"SIMDGROUPS": simdgroups, "ROWS": rows}
    return run(
        "sample_quantized_matvec",
        source,
        {"x": x, "w": w, "scales": scales, "biases": biases},
        {"out": ((lines, height), x.dtype)},
        template=[("T", x.dtype), *sizes.items()],
        grid=(32 * simdgroups, -(-height // rows), lines),
        threadgroup=(32 * simdgroups, 1, 1),
    )[0]
