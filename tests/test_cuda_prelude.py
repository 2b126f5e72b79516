"""Every kernel's body, read by a second compiler, and run by a second machine.

NVRTC compiles them without a GPU: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime. CI
does without. Where MLX has its CUDA back end the kernels run as well, and must give
what their definitions give.
"""

import mlx.core as mx
import pytest
from kernel_kit import our_kernels

from helpers import assert_close
from metal_host import cuda
from metal_host.cuda import CudaError, CudaKernel, cuda_source, find_nvrtc, translated
from mm1_mlx.kernels.cases import FLOATS, Case, all_cases
from mm1_mlx.kernels.metal import forced, watched
from mm1_mlx.kernels.quantized_attention import attend_quantized

needs_nvrtc = pytest.mark.skipif(
    find_nvrtc() is None,
    reason="needs NVRTC: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime",
)
ROUNDING = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}


@pytest.fixture
def nvidia(monkeypatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", CudaKernel)


# --- the text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metal, expected",
    [
        ("const device float* x = a + 1;", "const  float* x = a + 1;"),
        ("threadgroup float s[4];", "__shared__ float s[4];"),
        ("threadgroup vec<half, 4> s[A][B];", "__shared__ vec<half, 4> s[A][B];"),
        ("threadgroup float* p = s;", " float* p = s;"),
        ("constant constexpr int N = 3;", " constexpr int N = 3;"),
        ("const thread float& x, device T *y", "const  float& x,  T *y"),
        (
            "threadgroup_barrier(mem_flags::mem_device);",
            "threadgroup_barrier(mem_flags::mem_device);",
        ),
        ("uint device_index = thread_index;", "uint device_index = thread_index;"),
    ],
)
def test_address_spaces(metal, expected):
    assert translated(metal) == expected


def test_the_text_by_hand():
    name, text, extras = cuda_source(
        "y[0] = T(x[N] * x_shape[1]);",
        "constant constexpr int A = 1;",
        [("x", mx.bfloat16)],
        [("y", mx.float32)],
        [("T", mx.float32), ("N", 2), ("B", True)],
    )
    assert extras == [("x", "shape")]
    x = "const __nv_bfloat16* x, const int32_t* x_shape"
    assert f"__global__ void {name}({x}, const int32_t* mm1_grid, float* y)" in text
    for line in ("using T = float;", "constexpr int N = 2;", "constexpr bool B = 1;"):
        assert line in text
    assert text.startswith(" constexpr int A = 1;")


def test_names_differ_where_the_texts_do():
    def name(dtype: mx.Dtype, body: str = "") -> str:
        return cuda_source(body, "", [("x", dtype)], [("y", dtype)], [])[0]

    names = {name(mx.float32), name(mx.float16), name(mx.float32, ";")}
    assert len(names) == 3


def test_part_of_a_threadgroup_cannot_work_together():
    kernel = CudaKernel("k", ["x"], ["y"], "y[0] = simd_sum(x[0]);")
    with pytest.raises(CudaError, match=r"grid \(40, 1, 1\).*\(32, 1, 1\).*simd_sum"):
        kernel(
            inputs=[mx.zeros(40)],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(40, 1, 1),
            threadgroup=(32, 1, 1),
        )


# --- the compiler --------------------------------------------------------------------


@needs_nvrtc
def test_what_does_not_compile_is_said():
    with pytest.raises(CudaError, match='"nothing" is undefined'):
        cuda.compiled("k", 'extern "C" __global__ void k() { nothing(); }')


# Most of what the prelude has, and each kind of argument.
_BODY = """
    threadgroup float shared[32];
    threadgroup float* all = shared;
    float v = static_cast<float>(x[thread_position_in_grid.x]);
    uint lane = thread_index_in_simdgroup;
    shared[lane] = simd_prefix_exclusive_sum(v) + simd_prefix_inclusive_sum(v);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    v = max(simd_max(v), metal::precise::tanh(metal::fast::exp(all[31 - lane])));
    if (simd_any(v > 3.0f) || simd_all(v < 2.0f)) v += simd_shuffle_down(v, 1);
    v += simd_broadcast(v, 3) + simd_broadcast_first(v) + metal::max(v, INFINITY);
    v += as_type<float>(clamp(1, 2, 3)) + popcount(7u) + metal::abs(-1);
    int size = min(x_shape[0], x_ndim) + int(x_strides[0]);
    T other = simd_shuffle_xor(x[lane], 1);
    y[thread_position_in_grid.x] = static_cast<T>(v + size) + simd_sum(other);
"""


@needs_nvrtc
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_the_prelude_knows(dtype):
    kernel = CudaKernel("k", ["x"], ["y"], _BODY)
    (y,) = kernel(
        inputs=[mx.zeros(64, dtype)],
        output_shapes=[(64,)],
        output_dtypes=[dtype],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        template=[("T", dtype)],
    )
    assert y.shape == (64,) and y.dtype == dtype


@needs_nvrtc
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kernel_compiles_for_nvidia(nvidia, dtype):
    compiled: set[str] = set()
    for case in [*all_cases(small=True), masked()]:
        arrays = in_type(case, dtype)
        with watched() as names, forced(case.kernel):
            found = list(case.work(*arrays))
        assert names, f"{case.kernel} declined {case.shape}"
        compiled.update(names)
        if mx.cuda.is_available():
            with forced():
                expected = list(case.work(*arrays))
            for a, b in zip(found, expected, strict=True):
                largest = float(mx.abs(b.astype(mx.float32)).max())
                share = 6 * ROUNDING[dtype] + 2e-5  # as `benchmark kernels` has it
                assert_close(a, b, atol=share * largest, what=case.kernel)
    missing = {kernel.name for kernel in our_kernels()} - compiled
    assert not missing, f"no case of kernels/cases.py runs {missing}"


def masked() -> Case:
    """What `benchmark kernels` has no small case of: a mask, and many keys."""

    def make() -> list[mx.array]:
        kv = mx.random.normal((2, 1, 1, 600, 64))
        packed = [mx.quantize(each, group_size=32, bits=8) for each in kv]
        return [mx.random.normal((1, 2, 1, 64)), *packed[0], *packed[1]]

    def work(q: mx.array, *kv: mx.array) -> list[mx.array]:
        mask = mx.arange(600) > 7
        return [attend_quantized(q, kv[:3], kv[3:], 0.125, mask, 32, 8)]

    return Case("quantized_attention", "with a mask", mx.float32, make, work)


def in_type(case: Case, dtype: mx.Dtype) -> list[mx.array]:
    arrays = [a.astype(dtype) if a.dtype in FLOATS else a for a in case.make()]
    mx.eval(arrays)
    return arrays
