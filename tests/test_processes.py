"""What two processes agree on: bits of the first, one error for all, no waiting."""

import pytest
from process_kit import run_two

from mm1_mlx import processes
from mm1_mlx.cli.run import explain
from mm1_mlx.errors import ConfigError, DatasetError

_BITS = """
import mlx.core as mx
import numpy as np
from mm1_mlx.processes import bytes_from_first, from_first, sums, tree_from_first, world
rank = world().rank()
for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint64, mx.uint8):
    values = np.array([-0.0, 1.5, -2, np.nan if "float" in str(dtype) else 3, 1e4])
    with np.errstate(invalid="ignore"):
        right = mx.array(abs(values) if "uint" in str(dtype) else values).astype(dtype)
    given = right if rank == 0 else mx.ones_like(right)
    found = from_first(given)
    assert found.dtype == dtype
    assert bytes(memoryview(found.view(mx.uint8))) == bytes(
        memoryview(right.view(mx.uint8))
    ), dtype
assert from_first(mx.array(7 - rank)).item() == 7
tree = {"b": [{"x": mx.array(1.0 - rank)}], "a": mx.array([rank])}
tree = tree_from_first(tree)
assert tree["b"][0]["x"].item() == 1 and tree["a"].item() == 0
picture = bytes(range(256)) * 4097
assert bytes_from_first(picture if rank == 0 else None) == picture
assert bytes_from_first(b"" if rank == 0 else None) == b""
assert sums([1, 2.5]) == [2, 5]
"""


def test_all_receive_the_bits_of_the_first(tmp_path):
    for end in run_two(tmp_path, "-c", _BITS):
        assert end.returncode == 0, end.stderr


_ERRORS = """
import sys
from mm1_mlx.errors import DatasetError, ToldElsewhere
from mm1_mlx.processes import together, world
rank, where = world().rank(), eval(sys.argv[1])
with together():
    pass
try:
    with together():
        if rank in where:
            raise (DatasetError if rank else OSError)(f"broken {rank}")
except Exception as error:
    print(type(error).__name__, error, error.agreed)
"""


@pytest.mark.parametrize(
    "where, first, second",
    [
        ([], r"^$", r"^$"),
        ([0], r"^OSError broken 0 True$", r"^ToldElsewhere OSError: broken 0 True$"),
        (
            [1],
            r"^MM1Error process 2 of 2 \(.+\): broken 1 True$",
            r"^ToldElsewhere process 2 of 2",
        ),
        ([0, 1], r"^OSError broken 0 True$", r"^ToldElsewhere OSError: broken 0 True$"),
    ],
)
def test_an_error_of_one_is_every_ones(tmp_path, where, first, second):
    import re

    ends = run_two(tmp_path, "-c", _ERRORS, str(where))
    for end, pattern in zip(ends, (first, second), strict=True):
        assert end.returncode == 0, end.stderr
        assert re.search(pattern, end.stdout.strip()), end.stdout


def test_a_single_process_meets_nobody():
    """And its errors are its own, with their traceback."""
    with pytest.raises(DatasetError, match="broken"), processes.together():
        raise DatasetError("broken")
    with pytest.raises(ConfigError, match="wrong"):
        processes.agree(ConfigError("wrong"))
    processes.agree(None)
    processes.meet()
    assert processes.bytes_from_first(b"x") == b"x" and processes.sums([1]) == [1]


def test_a_lost_process_is_told_in_words():
    lost = RuntimeError("[ring] connection to a peer was lost")
    assert "have lost each other" in explain(lost)
    assert "This is a bug" in explain(RuntimeError("other"))
