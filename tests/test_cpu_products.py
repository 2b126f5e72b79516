"""One row times a wide matrix in parts: against the whole, and when it is done."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from small import random_array

from helpers import assert_close, assert_equal
from mm1_mlx.kernels import cpu_products
from mm1_mlx.kernels.cpu_products import fits, linear, linear_cpu, linear_reference
from mm1_mlx.kernels.fused import replaced


def layer(rows: int, width: int = 24, bias: bool = False) -> nn.Linear:
    made = nn.Linear(width, rows, bias=bias)
    made.weight = random_array(rows, width)
    return made


@pytest.mark.parametrize("rows", [2048, 2049, 5504])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
def test_parts_are_the_whole(rows, shape):
    x, wide = random_array(*shape), layer(rows)
    expected = linear_reference(wide, x)
    # Sums of 24 products, in another order.
    assert_close(linear_cpu(wide, x), expected, atol=1e-5)


def test_only_one_row_of_a_plain_wide_float32_matrix(monkeypatch):
    row, rows = random_array(1, 24), random_array(2, 24)
    wide = layer(2048)
    assert fits(wide, row)
    assert not fits(wide, rows)
    assert not fits(layer(2047), row)
    assert not fits(layer(2048, bias=True), row)
    assert not fits(wide, row.astype(mx.float16))
    assert not fits(nn.QuantizedLinear(64, 2048, bias=False), random_array(1, 64))
    called = []
    monkeypatch.setattr(
        cpu_products, "linear_cpu", lambda *given: called.append(given) or row
    )
    with replaced(lambda chain, arrays: chain(*arrays)):  # as on a GPU
        assert_equal(linear(wide, row), wide(row))
    assert not called
    if mx.default_device() == mx.Device(mx.cpu):
        linear(wide, row)
        assert called
