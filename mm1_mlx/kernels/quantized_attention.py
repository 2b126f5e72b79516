"""Attention over a quantized cache for one token or a few, in one launch or two.

The definition's launches for one token in 16 bits: scaling the query, the scores, their
cast to float32, softmax, the cast back, the weighted sum: 6 (one more with a mask, two
more where a head is no multiple of the group, and MLX does the weighted sum of a long
cache in 2) become 1, or 2 with more than 512 keys, which several threadgroups share.
Scores are never written: 24 bytes a head and key less, which is a quarter of the
traffic with 8 bits, 32 heads on 8, and heads of 128. Queries that MLX would copy
because they are a slice are read where they lie.
"""

from typing import Any

import mlx.core as mx

from mm1_mlx.kernels.metal import MetalKernel, bits_of, chosen

MAX_QUERIES = 8
MAX_COLUMNS = 1 << 16
COLUMNS_AT_ONCE = 512  # of a threadgroup: more are shared out to several
GROUPS = 16  # SIMD-groups of a threadgroup: 512 threads may have 100 registers each
MAX_WIDTH = 256
GROUP_SIZES = (32, 64, 128)
BITS = (4, 8)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)

Mask = mx.array | str | None
Packed = tuple[mx.array, ...]  # data, scales, biases


def fill_last_axis(x: mx.array, multiple: int) -> mx.array:
    """x with zeros behind its last axis, up to a multiple."""
    missing = -x.shape[-1] % multiple
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def attention_reference(
    q: mx.array,
    keys: Packed,
    values: Packed,
    scale: float,
    mask: Mask,
    group_size: int,
    bits: int,
) -> mx.array:
    """Softmax attention whose keys and values stay quantized; the softmax in float32.

    Query heads that share a key head are one matmul.

    Shapes:
        q: (B, H, L, head_dim)
        keys, values: (data, scales, biases), each (B, KV, columns, .), of heads with
            zeros behind them up to a whole group
        mask: None, "causal", or bool/additive, broadcastable to (B, H, L, columns)
        returns: (B, H, L, head_dim)
    """
    B, H, L, width = q.shape
    KV, columns = keys[0].shape[1:3]
    how: dict[str, Any] = {"group_size": group_size, "bits": bits}
    rows = (q * scale).reshape(B, KV, (H // KV) * L, width)  # heads in order: a view
    rows = fill_last_axis(rows, group_size)
    scores = mx.quantized_matmul(rows, *keys, transpose=True, **how)
    scores = scores.reshape(B, H, L, columns).astype(mx.float32)
    if isinstance(mask, str):  # "causal": the last query sees everything
        mask = mx.arange(columns) <= mx.arange(columns - L, columns)[:, None]
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, -mx.inf)
    elif mask is not None:
        scores = scores + mask
    weights = mx.softmax(scores, axis=-1).astype(q.dtype)
    weights = weights.reshape(B, KV, (H // KV) * L, columns)
    out = mx.quantized_matmul(weights, *values, transpose=False, **how)
    return out[..., :width].reshape(B, H, L, width)


_HEADER = """
// Where a head begins, and what is `i` of its row there.
template <typename P, typename S>
inline P mm1_head(P data, S strides, size_t batch, size_t head) {
    return data + batch * strides[0] + head * strides[1];
}

template <typename S>
inline int mm1_at(S strides, int row, int i) {
    return row * int(strides[2]) + i * int(strides[3]);
}
"""

# A threadgroup does one query of one head; its SIMD-groups take keys in turn. LANES
# lanes share a key, so that each reads a word of it, and a SIMD-group reads 32 / LANES
# keys at once; each such stream keeps the largest score so far, the sum of exp and the
# weighted sum, which are brought together at the end. A code is not shifted down to its
# place: what it is multiplied with is divided by the power of two instead.
_SOURCE = """
    constexpr int PER_WORD = 32 / BITS;
    constexpr int WORDS = WIDTH / PER_WORD;  // of a key, with what fills it up
    constexpr int LANES = WORDS > 16 ? 32 : (WORDS > 8 ? 16 : (WORDS > 4 ? 8 : 4));
    constexpr int TURNS = (WORDS + LANES - 1) / LANES;  // words of a lane
    constexpr int STREAMS = 32 / LANES;
    constexpr uint CODE = (1u << BITS) - 1u;
    threadgroup float tops[GROUPS];
    threadgroup float totals[GROUPS];
    threadgroup float sums[GROUPS * WIDTH];
    int lane = thread_index_in_simdgroup;
    int group = simdgroup_index_in_threadgroup;
    int part = lane % LANES;
    size_t head = threadgroup_position_in_grid.y;
    size_t batch = threadgroup_position_in_grid.z / QUERIES;
    int query = threadgroup_position_in_grid.z % QUERIES;
    size_t shared = head / SHARE;
    int columns = key_data_shape[2];
    int seen = CAUSAL ? columns - QUERIES + query + 1 : columns;
    // This threadgroup's share of them.
    int share = (columns + int(threadgroups_per_grid.x) - 1) / threadgroups_per_grid.x;
    int begin = threadgroup_position_in_grid.x * share;
    int end = min(begin + share, seen);

    auto from = mm1_head(q, q_strides, batch, head);
    float asked[TURNS * PER_WORD];
    float asked_sum[TURNS];
    float found[TURNS * PER_WORD];
    float found_bias[TURNS];
    for (int t = 0; t < TURNS; t++) {
        asked_sum[t] = 0.0f;
        found_bias[t] = 0.0f;
        for (int j = 0; j < PER_WORD; j++) {
            int i = (part + t * LANES) * PER_WORD + j;
            float value = 0.0f;
            if (i < HEAD) value = from[mm1_at(q_strides, query, i)];
            value *= as_type<float>(SCALE);
            asked_sum[t] += value;
            asked[t * PER_WORD + j] = value * (1.0f / float(1u << (BITS * j)));
            found[t * PER_WORD + j] = 0.0f;
        }
    }
    auto k = mm1_head(key_data, key_data_strides, batch, shared);
    auto ks = mm1_head(key_scales, key_scales_strides, batch, shared);
    auto kb = mm1_head(key_biases, key_biases_strides, batch, shared);
    auto v = mm1_head(value_data, value_data_strides, batch, shared);
    auto vs = mm1_head(value_scales, value_scales_strides, batch, shared);
    auto vb = mm1_head(value_biases, value_biases_strides, batch, shared);

    float top = -INFINITY;
    float total = 0.0f;
    for (int at = begin + group * STREAMS; at < end; at += GROUPS * STREAMS) {
        bool live = at + lane / LANES < end;
        int column = min(at + lane / LANES, end - 1);
        MASKED
        float score = 0.0f;
        for (int t = 0; t < TURNS; t++) {
            int word = part + t * LANES;
            if (word < WORDS) {
                uint codes = k[mm1_at(key_data_strides, column, word)];
                float dot = 0.0f;
                for (int j = 0; j < PER_WORD; j++) {
                    float code = static_cast<float>(codes & (CODE << (BITS * j)));
                    dot += code * asked[t * PER_WORD + j];
                }
                int g = word * PER_WORD / GROUP;
                float by = ks[mm1_at(key_scales_strides, column, g)];
                float add = kb[mm1_at(key_biases_strides, column, g)];
                score += dot * by + asked_sum[t] * add;
            }
        }
        for (int step = 1; step < LANES; step *= 2) {
            score += simd_shuffle_xor(score, static_cast<ushort>(step));
        }
        if (live) {
            float higher = max(top, score);
            float keep = metal::precise::exp(top - higher);
            float weight = metal::precise::exp(score - higher);
            top = higher;
            total = total * keep + weight;
            for (int t = 0; t < TURNS; t++) {
                int word = part + t * LANES;
                if (word < WORDS) {
                    uint codes = v[mm1_at(value_data_strides, column, word)];
                    int g = word * PER_WORD / GROUP;
                    float by = vs[mm1_at(value_scales_strides, column, g)];
                    float add = vb[mm1_at(value_biases_strides, column, g)];
                    by *= weight;
                    add *= weight;
                    found_bias[t] = found_bias[t] * keep + add;
                    for (int j = 0; j < PER_WORD; j++) {
                        float code = static_cast<float>(codes & (CODE << (BITS * j)));
                        found[t * PER_WORD + j] =
                            found[t * PER_WORD + j] * keep + code * by;
                    }
                }
            }
        }
    }

    float most = top;  // of the SIMD-group's streams
    for (int step = LANES; step < 32; step *= 2) {
        most = max(most, simd_shuffle_xor(most, static_cast<ushort>(step)));
    }
    float keep = top == most ? 1.0f : metal::precise::exp(top - most);
    total *= keep;
    for (int step = LANES; step < 32; step *= 2) {
        total += simd_shuffle_xor(total, static_cast<ushort>(step));
    }
    for (int t = 0; t < TURNS; t++) {
        int word = part + t * LANES;
        for (int j = 0; j < PER_WORD; j++) {
            float value = found[t * PER_WORD + j] * (1.0f / float(1u << (BITS * j)));
            value = (value + found_bias[t]) * keep;
            for (int step = LANES; step < 32; step *= 2) {
                value += simd_shuffle_xor(value, static_cast<ushort>(step));
            }
            if (lane < LANES && word < WORDS) {
                sums[group * WIDTH + word * PER_WORD + j] = value;
            }
        }
    }
    if (lane == 0) {
        tops[group] = most;
        totals[group] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    most = tops[0];
    for (int g = 1; g < GROUPS; g++) most = max(most, tops[g]);
    // Nothing seen: parts that see something outweigh it; if none does, 0 / 0 is NaN.
    float base = most == -INFINITY ? 0.0f : most;
    size_t place = (batch * HEADS + head) * QUERIES + query;
    if (PARTS) place = place * threadgroups_per_grid.x + threadgroup_position_in_grid.x;
    for (int i = group * 32 + lane; i < HEAD; i += GROUPS * 32) {
        float sum = 0.0f;
        float whole = 0.0f;
        for (int g = 0; g < GROUPS; g++) {
            float part_of_it = metal::precise::exp(tops[g] - base);
            whole += part_of_it * totals[g];
            sum += part_of_it * sums[g * WIDTH + i];
        }
        if (PARTS) {
            out[place * (HEAD + 2) + i] = static_cast<T>(sum);
            if (i == 0) {
                out[place * (HEAD + 2) + HEAD] = static_cast<T>(whole);
                out[place * (HEAD + 2) + HEAD + 1] = static_cast<T>(most);
            }
        } else {
            out[place * HEAD + i] = static_cast<T>(sum / whole);
        }
    }
"""
_MASKED = """
        auto shown = mm1_head(mask, mask_strides, batch, head);
        live = live && shown[mm1_at(mask_strides, query, column)];
"""
_INPUTS = [
    "q", "key_data", "key_scales", "key_biases",
    "value_data", "value_scales", "value_biases",
]  # fmt: skip
_KERNEL = MetalKernel(
    "mm1_quantized_attention",
    inputs=_INPUTS,
    outputs=["out"],
    header=_HEADER,
    source=_SOURCE.replace("MASKED", ""),
    contiguous=False,  # the cache has room behind what is stored
)
# Brings the parts of a query's sum together, one thread a number.
_JOIN = MetalKernel(
    "mm1_quantized_attention_join",
    inputs=["parts"],
    outputs=["out"],
    source="""
    int i = thread_position_in_grid.x;
    size_t row = thread_position_in_grid.y;
    int count = parts_shape[1];
    auto own = parts + row * count * (HEAD + 2);
    float most = -INFINITY;
    for (int p = 0; p < count; p++) most = max(most, own[p * (HEAD + 2) + HEAD + 1]);
    float base = most == -INFINITY ? 0.0f : most;
    float sum = 0.0f;
    float whole = 0.0f;
    for (int p = 0; p < count; p++) {
        auto part = own + p * (HEAD + 2);
        float share = metal::precise::exp(part[HEAD + 1] - base);
        whole += share * part[HEAD];
        sum += share * part[i];
    }
    out[row * HEAD + i] = static_cast<T>(sum / whole);
""",
)
_MASKED_KERNEL = MetalKernel(
    "mm1_quantized_attention_masked",
    inputs=[*_INPUTS, "mask"],
    outputs=["out"],
    header=_HEADER,
    source=_SOURCE.replace("MASKED", _MASKED),
    contiguous=False,
)


def attention_metal(
    q: mx.array,
    keys: Packed,
    values: Packed,
    scale: float,
    mask: Mask,
    group_size: int,
    bits: int,
) -> mx.array:
    """The same contract as attention_reference, within `fits`; without a gradient."""
    B, H, L, width = q.shape
    KV, columns, words = keys[0].shape[1:]
    filled = words * 32 // bits
    arrays, kernel = [q, *keys, *values], _KERNEL
    if isinstance(mask, mx.array):
        arrays.append(mx.broadcast_to(mask, (B, H, L, columns)))
        kernel = _MASKED_KERNEL
    parts = -(-columns // COLUMNS_AT_ONCE)
    dtype = q.dtype if parts == 1 else mx.float32
    (out,) = kernel(
        arrays,
        template=[
            ("T", dtype), ("BITS", bits), ("GROUP", group_size), ("WIDTH", filled),
            ("HEAD", width), ("HEADS", H), ("SHARE", H // KV), ("QUERIES", L),
            ("CAUSAL", isinstance(mask, str)), ("SCALE", bits_of(scale)),
            ("GROUPS", GROUPS), ("PARTS", parts > 1),
        ],
        grid=(32 * GROUPS * parts, H, B * L),
        threadgroup=(32 * GROUPS, 1, 1),
        shapes=[q.shape if parts == 1 else (B * H * L, parts, width + 2)],
        dtypes=[dtype],
    )  # fmt: skip
    if parts == 1:
        return out
    return _JOIN(
        [out],
        template=[("T", q.dtype), ("HEAD", width)],
        grid=(width, B * H * L, 1),
        threadgroup=(width, 1, 1),
        shapes=[q.shape],
        dtypes=[q.dtype],
    )[0]


def fits(
    q: mx.array, keys: Packed, values: Packed, mask: Mask, group_size: int, bits: int
) -> bool:
    """Whether the kernel can: its limits on shapes, types and masks."""
    if bits not in BITS or group_size not in GROUP_SIZES or len(keys) != 3:
        return False
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        return False
    B, H, L, width = q.shape
    KV, columns, words = keys[0].shape[1:]
    filled = words * 32 // bits
    return (
        all(x.dtype in FLOATS for x in (q, *keys[1:], *values[1:]))
        and all(a.shape == b.shape for a, b in zip(keys, values, strict=True))
        and 1 <= L <= min(MAX_QUERIES, columns)
        and columns <= MAX_COLUMNS
        and H % KV == 0
        and keys[0].shape[0] == B
        and filled == width + (-width % group_size)
        and keys[1].shape[-1] * group_size == filled
        and filled <= MAX_WIDTH
    )


def attend_quantized(
    q: mx.array,
    keys: Packed,
    values: Packed,
    scale: float,
    mask: Mask,
    group_size: int,
    bits: int,
) -> mx.array:
    """Attention over quantized keys and values, by the kernel where it applies.

    For inference: the kernel has no gradient.
    """
    given = (q, keys, values, scale, mask, group_size, bits)
    apply = chosen("quantized_attention")
    if apply and fits(q, keys, values, mask, group_size, bits):
        return attention_metal(*given)
    return attention_reference(*given)
