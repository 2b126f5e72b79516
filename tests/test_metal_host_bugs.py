"""Seeded bugs: each must be found, with the right kind, at the right line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from helpers import assert_equal, max_difference
from metal_host import KernelError, host_kernels, schedules
from metal_host.pytest_glue import needs_host
from metal_host.samples import moves, products, rows
from metal_host.samples.maker import run
from metal_host.samples.small import SMALL, SOUND, N, small

pytestmark = needs_host

FENCE = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LOOP = "j < {}; j++) {{\n            v["


@dataclass
class Bug:
    """A change to a sound kernel, and the kind of finding that it must lead to."""

    name: str
    kind: str
    old: str
    new: str
    lint: bool = False  # whether only the lint can find it
    dtype: mx.Dtype = mx.float32


def planted(source: str, bug: Bug) -> str:
    """The source with the bug: exactly one place is changed, or every like one."""
    assert bug.old in source, bug.name
    return source.replace(bug.old, bug.new)


def findings(function: Callable[[], Any], **settings: Any) -> KernelError:
    """What the harness raises for a function."""
    with pytest.raises(KernelError) as caught, host_kernels(**settings):
        mx.eval(function())
    return caught.value


# --- in the 4-bit product

PRODUCT = [
    Bug("no barrier", "race", FENCE, ""),
    Bug("a barrier that orders nothing", "race", "mem_threadgroup", "mem_none"),
    Bug("a barrier for other memory", "race", "mem_threadgroup", "mem_device"),
    Bug("no guard of rows", "out-of-bounds", "if (row < uint(HEIGHT)) {", "{"),
    Bug(
        "no guard of the store", "out-of-bounds", " && first + lane < uint(HEIGHT)", ""
    ),
    Bug("one element too far", "out-of-bounds", "word * 8 + j]", "word * 8 + j + 1]"),
    Bug("writable pointer to an input", "compile", "const device T* v", "device T* v"),
    Bug(
        "lost address space", "address-space", "const device T*", "const T*", lint=True
    ),
    Bug(
        "wrong address space",
        "address-space",
        "const device T*",
        "const threadgroup T*",
        lint=True,
    ),
    Bug(
        "float to bfloat by itself",
        "compile",
        "static_cast<T>(sum)",
        "sum",
        dtype=mx.bfloat16,
    ),
    Bug("double", "compile", "float v_sum = 0.0f", "double v_sum = 0.0"),
    Bug("std", "compile", "float dot = 0.0f", "float dot = std::fabs(0.0f)"),
    Bug(
        "simd_sum of some lanes",
        "divergence",
        "float sum = simd_sum(sums[r]);",
        "float sum = 0.0f; if (lane < 20) sum = simd_sum(sums[r]);",
    ),
    Bug("barrier of some threads", "divergence", FENCE, f"if (simdgroup < 3) {FENCE}"),
    Bug(
        "return before a barrier",
        "divergence",
        FENCE,
        f"if (simdgroup == 3 && lane > 4) return; {FENCE}",
    ),
    Bug("private array overrun", "undefined", LOOP.format(8), LOOP.format(9)),
    Bug("threadgroup overrun", "out-of-bounds", "part[s][lane]", "part[s + 1][lane]"),
    Bug(
        "not all set", "uninitialised", "if (lane == 0)", "if (lane == 0 && simdgroup)"
    ),
    Bug(
        "misaligned vector",
        "undefined",
        "float v_sum = 0.0f;",
        "float4 q = *(const device float4*)(x + 1); float v_sum = q.x * 0.0f;",
    ),
    Bug("missing store", "never-written", "lane < uint(ROWS)", "lane < uint(ROWS) - 1"),
    Bug(
        "two groups write one cell",
        "race",
        "HEIGHT + first + lane]",
        "HEIGHT + (first + lane) % 8]",
    ),
    Bug("shift too far", "undefined", "bits >>= 4;", "bits >>= 32 + j;"),
]


@pytest.mark.parametrize("bug", PRODUCT, ids=[bug.name for bug in PRODUCT])
def test_a_bug_in_a_quantized_product_is_found(bug):
    packed = mx.quantize(mx.random.normal((30, 512)), group_size=64, bits=4)
    x, w = mx.random.normal((2, 512)).astype(bug.dtype), packed[0]
    scales, biases = (part.astype(bug.dtype) for part in packed[1:])
    source = planted(products.QUANTIZED, bug)

    error = findings(
        lambda: products.quantized_matvec(x, w, scales, biases, source=source),
        lint=bug.lint,
    )

    assert bug.kind in error.kinds, error
    first = next(finding for finding in error.findings if finding.kind == bug.kind)
    assert first.place is not None or bug.kind == "never-written"


# --- in other samples

OTHER: list[tuple[Bug, str, Callable[[str], Any]]] = [
    (
        # The second barrier of the loop: tiles are rewritten while others still read.
        Bug(
            "tiles rewritten early", "race", f"[here.x];\n        {FENCE}", "[here.x];"
        ),
        products.TILED,
        lambda source: products.tiled_matmul(
            mx.ones((16, 32)), mx.ones((32, 16)), source
        ),
    ),
    (
        Bug("wrong stride", "out-of-bounds", "column * rows +", "column * columns +"),
        moves.TRANSPOSE,
        lambda source: moves.transpose(mx.ones((40, 70)), source),
    ),
    (
        Bug("loops of different length", "divergence", "apart > 0;", "apart > t % 2;"),
        moves.SORT,
        lambda source: moves.sort(mx.ones(128), source),
    ),
    (
        Bug("sums reused early", "race", f"within);\n        {FENCE}", "within);"),
        moves.SCAN,
        lambda source: moves.prefix_sum(mx.ones((1, 300)), source),
    ),
    (
        Bug(
            "reads its output", "uninitialised", "= static_cast<T>", "+= static_cast<T>"
        ),
        rows.SOFTMAX,
        lambda source: rows.softmax(mx.ones((2, 70)), source=source),
    ),
]


@pytest.mark.parametrize("bug, source, call", OTHER, ids=[b.name for b, _, _ in OTHER])
def test_a_bug_in_another_sample_is_found(bug, source, call):
    error = findings(lambda: call(planted(source, bug)), lint=False)
    assert bug.kind in error.kinds, error


# --- small bodies of their own


@pytest.mark.parametrize("name", SMALL)
def test_a_bug_in_a_small_kernel_is_found(name):
    kind, body, settings = SMALL[name]
    error = findings(lambda: small(body, **settings), lint=False)
    assert kind in error.kinds, error
    first = next(finding for finding in error.findings if finding.kind == kind)
    in_body = first.place is not None and first.place.part == "body"
    assert in_body or "stack" in name  # that is met before the first line


def test_a_variable_that_is_never_set_is_found_by_the_lint():
    error = findings(lambda: small("    float sum; sum += x[i]; out[i] = sum;"))
    assert "uninitialised" in error.kinds
    branch = "    float v; if (x[i] > 5) v = 1.0f; out[i] = v;"
    assert "uninitialised" in findings(lambda: small(branch)).kinds


def test_an_array_that_is_never_set_holds_nan():
    body = "    float v[4]; v[1] = x[i]; out[i] = v[int(x[i]) % 4];"
    with host_kernels():
        out = small(body)
    set_ones = mx.arange(N) % 4 == 1
    assert_equal(mx.isnan(out), mx.logical_not(set_ones))


def test_more_threads_than_a_gpu_has():
    error = findings(lambda: small("    out[i % 64] = 1.0f;", threads=2048, group=2048))
    assert error.kinds == {"limit"}


# --- what is no bug


@pytest.mark.parametrize("name", SOUND)
def test_what_is_no_bug_is_not_reported(name):
    body, settings = SOUND[name]
    for seed in schedules(8):
        with host_kernels(seed=seed, lint=seed == 0) as host:
            mx.eval(small(body, **settings))
        assert host.last.remarks == []


# --- what the schedules are for

RACE = """
    threadgroup float t[64];
    t[i] = x[i];
    out[i] = t[i ^ 32];
"""


def test_a_race_that_lockstep_hides_is_reported_and_shows_in_other_schedules():
    """In step the values are right: only the shadow memory objects."""
    expected = mx.arange(N).astype(mx.float32)
    expected = mx.concatenate([expected[32:], expected[:32]])
    wrong = []
    for seed in schedules(8):
        with host_kernels(seed=seed, strict=False, lint=False) as host:
            # A load of x between the two keeps all threads together in seed 0.
            out = small(RACE.replace("out[i]", "simd_sum(1.0f); out[i]"))
        assert "race" in {finding.kind for finding in host.last.findings}
        if max_difference(mx.nan_to_num(out, nan=-1.0), expected) != 0:
            wrong.append(seed)
    assert 0 not in wrong and len(wrong) >= 4


def test_threadgroups_run_in_random_order_except_in_schedule_0():
    """Which group comes when, by an atomic counter in the last element."""
    body = """
    uint i = thread_position_in_grid.x;
    float rank = atomic_fetch_add_explicit(&out[8], 1.0f, memory_order_relaxed);
    atomic_store_explicit(&out[i / 32], rank, memory_order_relaxed);
    """
    orders = []
    for seed in schedules(4):
        with host_kernels(seed=seed, lint=False):
            ranks = run(
                "ranks",
                body,
                {"x": mx.zeros(8)},
                {"out": ((9,), mx.float32)},
                grid=(8 * 32, 1, 1),
                threadgroup=(32, 1, 1),
                init_value=0,
                atomic_outputs=True,
            )[0]
        orders.append(mx.argsort(ranks[:8]).tolist())
    assert orders[0] == list(range(8))
    assert len({tuple(order) for order in orders}) == 4


def test_one_schedule_is_always_the_same():
    runs = []
    for _ in range(2):
        with host_kernels(seed=1001, strict=False, lint=False) as host:
            out = small(RACE)
        runs.append((mx.nan_to_num(out, nan=-1.0).tolist(), host.last.findings))
    assert runs[0] == runs[1]


def test_a_finding_names_both_places():
    error = findings(lambda: small(RACE), lint=False)
    races = [finding for finding in error.findings if finding.kind == "race"]
    lines = {(f.place.line, f.other.line) for f in races if f.place and f.other}
    assert lines <= {(5, 6), (6, 5)} and lines
    assert "kernel 'small' (schedule 0): race: " in str(error)
    assert "line 6 of the body: out[i] = t[i ^ 32];" in str(error)
