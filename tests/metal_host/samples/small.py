"""Small bodies with one bug each, and sound ones that look as if they had one."""

from typing import Any

import mlx.core as mx

from .maker import run

N = 64


def small(
    body: str,
    *,
    threads: int = N,
    group: int = N,
    out: int = N,
    header: str = "",
    **settings: Any,
) -> mx.array:
    """Run a body over x = 0..63 in float32 and out (N,) float32."""
    return run(
        "small",
        f"\n    uint i = thread_position_in_grid.x;\n{body}\n",
        {"x": mx.arange(N).astype(mx.float32)},
        {"out": ((out,), mx.float32)},
        header=header,
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        **settings,
    )[0]


# Name: the kind of finding, the body, how it is launched.
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lanes of a simdgroup without simdgroup_barrier": (
        "race",
        """threadgroup float t[32];
        t[i] = x[i];
        out[i] = t[31 - i];""",
        {"threads": 32, "group": 32, "out": 32},
    ),
    "simdgroup_barrier between two simdgroups": (
        "race",
        """threadgroup float t[64];
        t[i] = x[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = t[63 - i];""",
        {},
    ),
    "simdgroup_barrier of other memory": (
        "race",
        """threadgroup float t[32];
        t[i] = x[i];
        simdgroup_barrier(mem_flags::mem_device);
        out[i] = t[31 - i];""",
        {"threads": 32, "group": 32, "out": 32},
    ),
    "shift in place": (
        "race",
        """threadgroup float t[64];
        t[i] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        t[i] = t[(i + 1) % 64];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = t[i];""",
        {},
    ),
    "the same value by two threads": ("race", "out[i / 2] = 1.0f;", {"out": 32}),
    "atomic and plain access": (
        "race",
        """threadgroup atomic_uint count;
        if (i == 0) *(threadgroup uint*)&count = 0;
        atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
        out[i] = 1.0f;""",
        {},
    ),
    "plain read before an atomic": (
        "race",
        """threadgroup atomic_uint count;
        if (i == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = *(threadgroup uint*)&count;
        atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);""",
        {},
    ),
    "plain read after another thread's atomic": (
        "race",
        """threadgroup atomic_uint count;
        if (i == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
        out[i] = *(threadgroup uint*)&count;""",
        {},
    ),
    "a flag does not order other memory": (
        "race",
        """threadgroup atomic_uint ready;
        threadgroup float data;
        if (i == 0) atomic_store_explicit(&ready, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 0) data = 5.0f;
        if (i == 0) atomic_store_explicit(&ready, 1u, memory_order_relaxed);
        bool go = atomic_load_explicit(&ready, memory_order_relaxed) != 0;
        out[i] = go ? data : 0.0f;""",
        {},
    ),
    "groups through device memory": (
        "race",
        """out[i] = x[i];
        threadgroup_barrier(mem_flags::mem_device);
        out[i] = out[i] + out[(i + 32) % 64];""",
        {"group": 32},
    ),
    "threadgroup memory of another group": (
        "uninitialised",
        """threadgroup float t[32];
        if (i < 32) t[i] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = t[i % 32];""",
        {"group": 32},
    ),
    "the last group is cut": (
        "uninitialised",
        """threadgroup float part[2];
        uint s = simdgroup_index_in_threadgroup;
        float sum = simd_sum(x[i]);
        if (thread_index_in_simdgroup == 0) part[s] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = part[0] + part[1];""",
        {"threads": 32, "group": 64, "out": 32},
    ),
    "an index below zero": ("out-of-bounds", "out[i] = x[int(i) - 1];", {}),
    "an unsigned index below zero": ("out-of-bounds", "out[i] = x[i - 1];", {}),
    "an index that overflows": (
        "undefined",
        """int row = 70000 + int(x[i]);
        out[i] = x[(row * 70000) & 63];""",
        {},
    ),
    "division by zero": ("undefined", "out[i] = 10 / int(x[i]);", {}),
    "shuffle from a lane that is not there": (
        "divergence",
        "out[i] = simd_shuffle(x[i], 31);",
        {"threads": 20, "group": 20, "out": 20},
    ),
    "shuffle from a lane over 31": (
        "divergence",
        "out[i] = simd_shuffle(x[i], 40);",
        {},
    ),
    "lanes at different functions": (
        "divergence",
        """if (i % 2) out[i] = simd_sum(x[i]);
        else out[i] = simd_max(x[i]);""",
        {},
    ),
    "threads at different barriers": (
        "divergence",
        """if (i < 32) threadgroup_barrier(mem_flags::mem_none);
        else threadgroup_barrier(mem_flags::mem_none);
        out[i] = 1.0f;""",
        {},
    ),
    "a matrix product of half a simdgroup": (
        "divergence",
        """simdgroup_matrix<float, 8, 8> a = simdgroup_matrix<float, 8, 8>(1.0f);
        simdgroup_multiply_accumulate(a, a, a, a);
        out[i] = a.thread_elements()[0];""",
        {"threads": 16, "group": 16, "out": 16},
    ),
    "a write past const": (
        "address-space",
        "((device float*)x)[i] = 1.0f; out[i] = 1.0f;",
        {},
    ),
    "too much threadgroup memory": (
        "limit",
        """threadgroup float t[9000];
        t[i] = x[i];
        out[i] = t[i];""",
        {},
    ),
    "a stack that is too deep": (
        "limit",
        """float big[100000];
        for (int k = 0; k < 100000; k++) big[k] = x[(k + i) % 64];
        out[i] = big[int(x[i]) * 1000];""",
        {},
    ),
    "waiting for another thread": (
        "deadlock",
        """threadgroup atomic_uint ready;
        if (i == 0) atomic_store_explicit(&ready, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 63) atomic_store_explicit(&ready, 1u, memory_order_relaxed);
        while (atomic_load_explicit(&ready, memory_order_relaxed) == 0) {}
        out[i] = 1.0f;""",
        {},
    ),
}


# Name: the body, how it is launched.
SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "simdgroup_barrier between lanes of a simdgroup": (
        """threadgroup float t[64];
        t[i] = x[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = t[i ^ 31];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        t[i ^ 1] = 1.0f;""",
        {},
    ),
    "atomic and atomic": (
        """threadgroup atomic_uint count;
        if (i == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = atomic_load_explicit(&count, memory_order_relaxed);""",
        {},
    ),
    "device memory of the own group": (
        """out[i] = x[i];
        threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
        float other = out[i ^ 31];
        threadgroup_barrier(mem_flags::mem_device);
        out[i] = other;""",
        {"group": 32},
    ),
    "a whole simdgroup in a branch": (
        """float v = 0.0f;
        if (i < 32) v = simd_sum(x[i]);
        out[i] = v;""",
        {},
    ),
    "half overflow": ("out[i] = static_cast<half>(x[i] * 70000.0f);", {}),
    "unsigned wrap": ("uint h = (i + 7u) * 2654435761u; out[i] = h >> 9;", {}),
    "a constant table": (
        "out[i] = table[i % 3];",
        {"header": "constant float table[3] = {1.0f, 2.0f, 3.0f};"},
    ),
    "many lanes read, one writes after simdgroup_barrier": (
        """threadgroup float t[32];
        t[i] = x[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = t[0] + t[1];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 0) t[0] = t[1] = 0.0f;""",
        {"threads": 32, "group": 32, "out": 32},
    ),
}
