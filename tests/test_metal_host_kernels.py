"""Sound kernels run under the host harness: right values, and no findings."""

import mlx.core as mx
import numpy as np
import pytest

from helpers import assert_close, assert_equal, need
from metal_host import host_kernels, under_schedules
from metal_host.pytest_glue import needs_host
from metal_host.samples import moves, products, rows
from metal_host.samples.maker import run

pytestmark = needs_host

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
# Values of about 1, computed in float32 and rounded once: half a step of each type.
ATOL = {mx.float32: 2e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}
floats = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16", "bf16"])


def random(*shape, dtype=mx.float32, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@floats
def test_softmax(dtype):
    x = random(5, 300, dtype=dtype)
    expected = mx.softmax(x.astype(mx.float32), axis=-1)
    for out in under_schedules(lambda: rows.softmax(x)):
        assert out.dtype == dtype
        assert_close(out, expected, atol=ATOL[dtype] / 4)  # values under 0.1


@floats
def test_rms_norm(dtype):
    x, weight = random(3, 130, dtype=dtype), random(130, dtype=dtype, seed=1)
    expected = mx.fast.rms_norm(x.astype(mx.float32), weight.astype(mx.float32), 1e-5)
    for out in under_schedules(lambda: rows.rms_norm(x, weight)):
        assert_close(out, expected, atol=ATOL[dtype], rtol=ATOL[dtype])


@floats
def test_tiled_matmul(dtype):
    a, b = random(13, 21, dtype=dtype), random(21, 10, dtype=dtype, seed=1)
    expected = a.astype(mx.float32) @ b.astype(mx.float32)
    for out in under_schedules(lambda: products.tiled_matmul(a, b)):
        assert_close(out, expected, atol=1e-5, rtol=ATOL[dtype])


@floats
def test_simdgroup_matmul(dtype):
    a, b = random(16, 24, dtype=dtype), random(24, 8, dtype=dtype, seed=1)
    expected = a.astype(mx.float32) @ b.astype(mx.float32)
    for out in under_schedules(lambda: products.simdgroup_matmul(a, b)):
        assert_close(out, expected, atol=1e-5)  # sums of 24 in float32


@floats
def test_quantized_matvec_reads_the_packing_of_mlx(dtype):
    x = random(2, 512, dtype=dtype)
    packed = mx.quantize(random(30, 512, seed=1), group_size=64, bits=4)
    w, scales, biases = packed[0], *(part.astype(dtype) for part in packed[1:])
    exact = [part.astype(mx.float32) for part in (x, scales, biases)]
    expected = mx.quantized_matmul(
        exact[0], w, scales=exact[1], biases=exact[2], group_size=64, bits=4
    )
    for out in under_schedules(lambda: products.quantized_matvec(x, w, scales, biases)):
        assert_close(out, expected, atol=2e-4, rtol=ATOL[dtype])  # sums of 512


def test_scatter_add():
    index = (mx.arange(500) * 7 % 13).astype(mx.uint32)
    values = (mx.arange(500) % 5).astype(mx.int32)
    expected = mx.zeros(16, mx.int32).at[index].add(values)
    for out in under_schedules(lambda: moves.scatter_add(index, values, 16)):
        assert_equal(out, expected)


def test_scatter_add_of_floats():
    index, values = mx.array([0, 2, 0] * 5, mx.uint32), mx.ones(15)
    for out in under_schedules(lambda: moves.scatter_add(index, values, 3)):
        assert_equal(out, mx.array([10.0, 0.0, 5.0]))


@floats
def test_bilinear_gather(dtype):
    torch = need("torch")
    image = random(6, 9, 5, dtype=dtype)
    where = mx.random.uniform(-1.3, 1.3, (40, 2), key=mx.random.key(2))  # some outside
    pixels = torch.tensor(np.array(image.astype(mx.float32))).permute(2, 0, 1)[None]
    points = torch.tensor(np.array(where))[None, None]
    sampled = torch.nn.functional.grid_sample(pixels, points, align_corners=False)
    for out in under_schedules(lambda: moves.bilinear_gather(image, where)):
        assert_close(out, sampled[0, :, 0].T, atol=1e-5, rtol=ATOL[dtype])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8])
def test_transpose(dtype):
    x = (random(45, 70) * 10).astype(mx.int32).astype(dtype)
    for out in under_schedules(lambda: moves.transpose(x)):
        assert_equal(out, x.T)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32])
def test_sort(dtype):
    x = (random(256) * 50).astype(dtype)
    for out in under_schedules(lambda: moves.sort(x)):
        assert_equal(out, mx.sort(x))


@pytest.mark.parametrize("dtype", [mx.float32, mx.int32])
def test_prefix_sum(dtype):
    x = (random(3, 250) * 10).astype(mx.int32).astype(dtype)  # sums are exact
    for out in under_schedules(lambda: moves.prefix_sum(x)):
        assert_equal(out, mx.cumsum(x, axis=1))


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_s_own_quantized_matvec(bits):
    """The function that MLX's GPU back end calls, out of the wheel's headers."""
    headers = ["quantized_utils.h", "steel/gemm/gemm.h", "quantized.h"]
    folder = "mlx/backend/metal/kernels"
    x = random(1, 512)
    w, scales, biases = mx.quantize(random(16, 512, seed=1), group_size=64, bits=bits)
    expected = mx.quantized_matmul(
        x, w, scales=scales, biases=biases, group_size=64, bits=bits
    )
    # Its constants come by reference; two simdgroups make four rows each.
    with host_kernels(lint=False):
        out = run(
            "mlx_qmv",
            "qmv_fast_impl<T, 64, BITS>(w, scales, biases, x, out, width, height, "
            "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, "
            "thread_index_in_simdgroup);",
            {
                **{"w": w, "scales": scales, "biases": biases, "x": x},
                **{"width": mx.array(512), "height": mx.array(16)},
            },
            {"out": ((1, 16), x.dtype)},
            header="".join(f'#include "{folder}/{name}"\n' for name in headers),
            template=[("T", x.dtype), ("BITS", bits)],
            grid=(32, 2 * 2, 1),
            threadgroup=(32, 2, 1),
        )[0]
    assert_close(out, expected, atol=2e-4)  # sums of 512


def test_the_fast_build_gives_the_same_numbers():
    x = random(4, 100)
    with host_kernels() as host:
        checked = rows.softmax(x)
    assert host.last.accesses > 0
    with host_kernels(checked=False) as host:
        fast = rows.softmax(x)
    assert host.last.accesses == 0
    assert_equal(fast, checked)
