"""The host harness itself: what it takes from MLX, and how it is used."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import metal_host
from helpers import ROOT, assert_equal
from metal_host import (
    KINDS,
    HostError,
    KernelError,
    build,
    fresh_import,
    host_kernels,
    schedules,
    toolchain,
    under_schedules,
    why_not,
)
from metal_host.lint_rules import RULES
from metal_host.pytest_glue import needs_host
from metal_host.rewrite import rewrite
from metal_host.session import active_session
from metal_host.tokens import tokenize

HERE = Path(metal_host.__file__).parent


def make(source, inputs=("x",), outputs=("out",), **settings) -> Any:
    return mx.fast.metal_kernel(
        name="probe",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        **settings,
    )


def call(
    kernel, *inputs: Any, shape=(8,), dtype=mx.float32, threads=8, **settings
) -> mx.array:
    return kernel(
        inputs=list(inputs),
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        **settings,
    )[0]


COPY = "uint i = thread_position_in_grid.x; out[i] = x[i];"
X = mx.arange(8).astype(mx.float32)


# --- what MLX promises a kernel


@needs_host
@pytest.mark.parametrize(
    "dtype",
    [
        *(mx.float32, mx.float16, mx.bfloat16, mx.bool_, mx.int8, mx.uint8, mx.int16),
        *(mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64),
    ],
)
def test_every_dtype_goes_in_and_out(dtype):
    x = (mx.arange(8) % 2 if dtype == mx.bool_ else mx.arange(8) * 15).astype(dtype)
    with host_kernels(lint=False):
        out = call(make(COPY), x, dtype=dtype)
    assert out.dtype == dtype
    assert_equal(out, x)


@needs_host
def test_small_and_0d_inputs_follow_mlx_s_signature():
    """Under 8 elements an input is constant memory, and a number has no index."""
    body = COPY + " out[i] = x[i] * few[1] + number;"
    with host_kernels() as host:
        kernel = make(body, inputs=("x", "few", "number"))
        out = call(kernel, X, mx.array([1.0, 2.0]), 3)
    assert_equal(out, X * 2 + 3)
    assert "const constant float* few" in host.last.source
    assert "const constant int32_t& number" in host.last.source


@needs_host
def test_init_value_fills_the_output_first():
    body = "uint i = thread_position_in_grid.x; if (i < 3) out[i] = x[i];"
    with host_kernels():
        out = call(make(body), X, init_value=7)
        assert_equal(out, mx.where(X < 3, X, 7))
        with pytest.raises(KernelError, match=r"20 of 32 bytes .* 'out' are never"):
            call(make(body), X)


@needs_host
def test_atomic_outputs():
    body = "atomic_fetch_add_explicit(&out[0], x[thread_position_in_grid.x], "
    body += "memory_order_relaxed);"
    for dtype in (mx.float32, mx.int32, mx.uint32):
        with host_kernels():
            kernel = make(body, atomic_outputs=True)
            out = call(kernel, X.astype(dtype), shape=(1,), dtype=dtype, init_value=0)
        assert_equal(out, mx.array([28]))


SHAPED = """
    uint i = thread_position_in_grid.x;
    out[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)];
"""
LAYOUTS = {
    "transposed": lambda x: x.T,
    "reversed": lambda x: x[::-1],
    "every other": lambda x: x[:, ::2],
    "broadcast": lambda x: mx.broadcast_to(x[:1], (3, 4)),
    "offset": lambda x: x[1:],
}


@needs_host
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_come_as_they_lie_or_copied(layout, dtype):
    x = LAYOUTS[layout](mx.arange(12).reshape(3, 4).astype(dtype))
    size = {"threads": x.size, "shape": x.shape, "dtype": dtype}
    for contiguous in (True, False):
        with host_kernels():
            kernel = make(SHAPED, ensure_row_contiguous=contiguous)
            assert_equal(call(kernel, x, **size), x)
    with host_kernels():
        assert_equal(call(make(COPY), x, **size), x)


@needs_host
def test_template_values_are_types_numbers_and_truths():
    body = "uint i = thread_position_in_grid.x; out[i] = FLAG ? T(x[i]) + N : 0;"
    template = [("T", mx.int32), ("N", 5), ("FLAG", True)]
    with host_kernels():
        out = call(make(body), X + 0.5, template=template)
        assert_equal(out, X + 5)
        template[2] = ("FLAG", False)
        assert_equal(call(make(body), X, template=template), X * 0)


@needs_host
def test_all_thread_attributes():
    names = ["position_in_grid", "position_in_threadgroup"]
    body = "uint g = thread_position_in_grid.x + 6 * thread_position_in_grid.y;\n"
    values = [
        *(f"thread_{name}.x * 10 + thread_{name}.y" for name in names),
        "threadgroup_position_in_grid.x * 10 + threadgroup_position_in_grid.y",
        "threads_per_threadgroup.x * 10 + threads_per_threadgroup.y",
        "threads_per_grid.x * 10 + threads_per_grid.y",
        "threadgroups_per_grid.x * 10 + threadgroups_per_grid.y",
        "thread_index_in_threadgroup",
        "thread_index_in_simdgroup + simdgroup_index_in_threadgroup * 100",
        "simdgroups_per_threadgroup + threads_per_simdgroup * 100",
    ]
    for k, value in enumerate(values):
        body += f"out[g * {len(values)} + {k}] = {value};\n"
    with host_kernels(lint=False):
        out = make(body)(
            inputs=[X],
            output_shapes=[(12, len(values))],
            output_dtypes=[mx.uint32],
            grid=(6, 2, 1),
            threadgroup=(4, 2, 1),
        )[0]
    # Groups of 4x2 and 2x2 threads, because a grid counts threads.
    assert out[6 + 5].tolist() == [51, 11, 10, 22, 62, 21, 3, 3, 3201]
    assert out[6 + 1].tolist() == [11, 11, 0, 42, 62, 21, 5, 5, 3201]


@needs_host
def test_verbose_prints_mlx_s_source(capfd):
    with host_kernels():
        call(make(COPY), X, verbose=True)
    assert "[[kernel]] void custom_kernel_probe" in capfd.readouterr().out


# --- how it is used


@needs_host
def test_outside_the_context_kernels_are_mlx_s_own():
    before = mx.fast.metal_kernel
    with host_kernels():
        assert mx.fast.metal_kernel is not before
        kernel = make(COPY)
        call(kernel, X)
    assert mx.fast.metal_kernel is before
    if not mx.metal.is_available():
        with pytest.raises(RuntimeError, match="No Metal back-end"):
            mx.eval(call(kernel, X))
    with host_kernels():
        assert_equal(call(kernel, X), X)


@needs_host
def test_the_session_records_every_run():
    body = COPY + " threadgroup_barrier(mem_flags::mem_none); out[i] += simd_sum(1.0f);"
    with host_kernels(seed=3, lint=False) as host:
        with pytest.raises(LookupError):
            _ = host.last
        kernel = make(body)
        call(kernel, X)
        call(kernel, X)
    first = host.runs[0]
    assert len(host.runs) == 2 and host.findings == []
    assert (first.kernel, first.seed, first.grid) == ("probe", 3, (8, 1, 1))
    assert (first.barriers, first.simd_functions) == (1, 1)
    assert first.switches == 3 * 8 and first.seconds > 0
    assert first.build_seconds > 0 and host.last.build_seconds == 0


@needs_host
def test_not_strict_records_and_allow_ignores():
    body = "out[0] = x[thread_position_in_grid.x];"
    with host_kernels(strict=False) as host:
        call(make(body), X)
    assert {finding.kind for finding in host.findings} == {"race", "never-written"}
    with host_kernels(allow=("race", "never-written")):
        call(make(body), X)
    with pytest.raises(KernelError) as caught, host_kernels(allow=("race",)):
        call(make(body), X)
    assert caught.value.kinds == {"never-written"}
    with pytest.raises(ValueError, match="unknown kinds \\['sloth'\\]"):
        host_kernels(allow=("sloth",)).__enter__()


@needs_host
def test_sessions_nest():
    with host_kernels(seed=1) as outer:
        kernel = make(COPY)
        with host_kernels(seed=2, checked=False) as inner:
            call(kernel, X)
        call(kernel, X)
    assert [run.seed for run in inner.runs] == [2]
    assert [run.seed for run in outer.runs] == [1]


@needs_host
def test_gradients_go_through_custom_functions():
    square = "uint i = thread_position_in_grid.x; out[i] = x[i] * x[i];"
    slope = "uint i = thread_position_in_grid.x; out[i] = 2 * x[i] * c[i];"

    f: Any = mx.custom_function(lambda x: call(make(square), x))

    @f.vjp
    def f_vjp(x, cotangent, _):
        return call(make(slope, inputs=("x", "c")), x, cotangent)

    with host_kernels():
        slopes = mx.grad(lambda x: mx.sum(f(x) * X))(X)
        assert_equal(slopes, 2 * X * X)


@needs_host
def test_compiled_functions_run_uncompiled_and_vmap_is_refused():
    with host_kernels():
        kernel = make(COPY)
        assert_equal(mx.compile(lambda x: call(kernel, x) + 1)(X), X + 1)
        with pytest.raises(HostError, match="'probe' is called while MLX traces"):
            mx.vmap(lambda x: call(kernel, x))(mx.stack([X, X]))
    assert_equal(mx.compile(lambda x: x + 1)(X), X + 1)


def test_schedules_begin_in_step_and_end_with_shuffled_lanes():
    assert schedules(8) == [0, 1, 2, 3, 4, 5, 1001, 1002]
    assert schedules(1) == [0]


@needs_host
def test_under_schedules_returns_one_result_for_each():
    seeds = []

    def note():
        session = active_session()
        seeds.append(session.seed if session else None)
        return call(make(COPY), X)

    results = under_schedules(note, 4)
    assert seeds == schedules(4) and len(results) == 4


@needs_host
def test_fresh_import_leaves_the_known_module_alone(tmp_path, monkeypatch):
    (tmp_path / "makes_kernels.py").write_text(
        "import mlx.core as mx\n"
        "K = mx.fast.metal_kernel(name='k', input_names=['x'], output_names=['out'],"
        f" source={COPY!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    known = __import__("makes_kernels")
    with host_kernels():
        fresh = fresh_import("makes_kernels")
        assert_equal(call(fresh.K, X), X)
    assert sys.modules.pop("makes_kernels") is known and fresh is not known


@needs_host
def test_a_fault_in_the_fast_build_ends_the_kernel_and_not_python():
    with host_kernels(checked=False):
        with pytest.raises(KernelError, match=r"out-of-bounds: .* past the end of 'x'"):
            call(make(COPY.replace("x[i]", "x[i + 4000]")), X)
        assert_equal(call(make(COPY), X), X)


@needs_host
def test_headers_of_mlx_can_be_included():
    body = "uint i = thread_position_in_grid.x; out[i] = erf(x[i]);"
    header = ""
    for name in ("erf.h", "sdpa_vector.h", "gemv.h", "softmax.h", "sort.h"):
        header += f'#include "mlx/backend/metal/kernels/{name}"\n'
    with host_kernels(lint=False):
        out = call(make(body, header=header), X)
    assert mx.allclose(out, mx.erf(X), atol=1e-6)


def test_why_not_says_what_is_missing(tmp_path):
    code = "import metal_host; print(metal_host.why_not())"
    old = tmp_path / "clang++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    cases = {
        str(tmp_path / "none"): "which is not there: install clang 17",
        str(old): "cannot compute with _Float16 and __bf16: install clang 17",
    }
    for compiler, expected in cases.items():
        env = os.environ | {"MSL_HOST_CLANG": compiler}
        env["PYTHONPATH"] = str(ROOT / "tests")
        env["MSL_HOST_CACHE"] = str(tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert expected in done.stdout and done.stdout.count("\n") == 1, done


def test_ci_never_skips_on_linux():
    code = "from metal_host.pytest_glue import needs_host; print(needs_host.args[0])"
    for ci, skipped in (("true", sys.platform == "darwin"), ("", True)):
        env = os.environ | {"MSL_HOST_CLANG": "/none", "CI": ci}
        env["PYTHONPATH"] = str(ROOT / "tests")
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(skipped), done


# --- its parts


REWRITES = {
    "float4(1, x.yz, 2)": "msl_make<float4>(1, x.yz, 2)",
    "vec<T, 4>(a, b)": "msl_make<vec<T, 4>>(a, b)",
    "float4 v; v.xy": "float4 v; v.xy",
    "1.5h + 2h + 1.0bf": "half(1.5f) + half(2) + bfloat(1.0f)",
    "0x1h": "0x1h",
    "uint i [[thread_position_in_grid]], j": "uint i , j",
    "a[b[0]]": "a[b[0]]",
    "threadgroup float* p = q;": "threadgroup float* p = q;",
    "void f(threadgroup float* p);": "void f(threadgroup float* p);",
    "// threadgroup float t[4];": "// threadgroup float t[4];",
}


@pytest.mark.parametrize("source", REWRITES)
def test_rewriting(source):
    assert rewrite(source) == REWRITES[source]


def test_threadgroup_variables_become_references_and_keep_their_lines():
    source = "{\n  threadgroup vec<T, 4> a[N == 0 ? 1 : N][2],\n    b;\n  int c;\n}"
    out = rewrite(source)
    assert "typedef vec<T,4> msl_type_a[N==0?1:N][2];" in out
    assert "msl_type_b& b = *(msl_type_b*)msl_threadgroup_memory(" in out
    assert out.count("\n") == source.count("\n")
    assert out.split("\n")[3] == "  int c;"
    lint = rewrite(source, spaces=True)
    assert "extern threadgroup vec<T,4> a[N==0?1:N][2], b;" in lint


def test_tokens_are_the_whole_source():
    for file in (HERE / "samples").glob("*.py"):
        text = file.read_text("utf-8")
        assert "".join(token.text for token in tokenize(text)) == text


def test_files_are_short_and_the_folder_stands_alone():
    """It is meant to be copied into other projects."""
    allowed = {"mlx", "numpy", "pytest", *sys.stdlib_module_names}
    files = [p for p in HERE.rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    assert len(files) > 20
    for file in files:
        text = file.read_text("utf-8")
        assert len(text.splitlines()) < 500, file
        if file.suffix == ".py":
            found = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
            assert set(found) <= allowed, file


@needs_host
def test_the_arm64_switch_compiles(tmp_path):
    """No arm64 machine is needed to see that its assembly is right in form."""
    clang = toolchain.find_clang()
    targets = subprocess.run([clang, "--print-targets"], capture_output=True, text=True)
    if "aarch64" not in targets.stdout:
        pytest.skip("this clang has no arm64 target")
    unit = tmp_path / "switch.cpp"
    text = (HERE / "runtime" / "context.h").read_text("utf-8")
    text = re.sub(r"#include <c\w+>", "", text)
    unit.write_text(text.replace("size_t", "__SIZE_TYPE__"))
    flags = ["--target=aarch64-linux-gnu", "-std=c++17", "-nostdinc", "-c"]
    done = subprocess.run(
        [clang, *flags, str(unit), "-o", str(tmp_path / "switch.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@needs_host
def test_lines_are_found_by_either_tool(monkeypatch):
    """llvm-symbolizer is not always installed with clang; binutils are."""
    body = "threadgroup float t[32];\nuint i = thread_position_in_grid.x;\nt[i] = 1;\n"
    body += "out[i] = t[i ^ 1];"
    found = {}
    for tool in ("llvm-symbolizer", "llvm-symbolizer-19", "addr2line"):
        if path := shutil.which(tool):
            build.source_line.cache_clear()
            monkeypatch.setattr(build, "_symbolizer", lambda path=path: [path])
            with pytest.raises(KernelError) as caught, host_kernels():
                call(make(body), X)
            place = caught.value.findings[0].place
            found[tool] = place.line if place else None
    build.source_line.cache_clear()
    if sys.platform.startswith("linux"):
        assert found and set(found.values()) == {4}


@needs_host
def test_the_example_of_the_readme_runs(capsys):
    text = (HERE / "README.md").read_text("utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[] ")


def test_the_readme_names_all_rules_kinds_and_settings():
    text = (HERE / "README.md").read_text("utf-8")
    words = set(re.findall(r"[\w-]+", text))
    settings = inspect.signature(host_kernels).parameters
    assert {*RULES, *KINDS, *settings, "group-size"} <= words


@needs_host
def test_builds_are_shared_and_named_by_their_content():
    assert why_not() is None
    with host_kernels():
        call(make(COPY), X)
    folder = toolchain.cache_folder()
    assert list(folder.glob("kernel_*.so")) and list(folder.glob("runtime_*.so"))
    assert shutil.which(toolchain.find_clang())
