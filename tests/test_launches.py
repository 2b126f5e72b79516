"""Launches on Metal, counted from graphs: the layouts, the rules, and the counts."""

import importlib.util
import math
import random

import mlx.core as mx
import mlx.nn as nn
import pytest

from helpers import need
from mm1_mlx.benchmarks import metal_layout as lay
from mm1_mlx.benchmarks.launches import count_launches, count_layer
from mm1_mlx.benchmarks.metal_rules import Operation, cost
from mm1_mlx.cli.subjects import launches as subject
from mm1_mlx.errors import MM1Error

# --- Layouts -------------------------------------------------------------------------


def strides_of(array: mx.array) -> tuple[int, ...]:
    """Where MLX itself has put the numbers."""
    mx.eval(array)
    view = memoryview(array)
    assert view.strides is not None
    return tuple(stride // view.itemsize for stride in view.strides)


def step(x: mx.array, layout: lay.Layout, rng: random.Random):
    """A random view of an array, by MLX and by the rules; None where MLX copies."""
    kind = rng.choice(["transpose", "slice", "split", "expand", "squeeze", "reshape"])
    rank = x.ndim
    if kind == "transpose":
        axes = rng.sample(range(rank), rank)
        return x.transpose(axes), lay.transposed(layout, axes)
    if kind == "slice":
        starts = [rng.randrange(n) for n in x.shape]
        steps = [rng.choice((1, 1, 2)) for _ in x.shape]
        parts = tuple(slice(a, None, s) for a, s in zip(starts, steps, strict=True))
        out = x[parts]
        return out, lay.sliced(layout, tuple(out.shape), steps)
    axis = rng.randrange(rank)
    if kind == "split" and x.shape[axis] % 2 == 0:
        out = mx.split(x, 2, axis)[rng.randrange(2)]
        return out, lay.split(layout, tuple(out.shape))
    if kind == "squeeze" and x.shape[axis] == 1 and rank > 1:
        out = x.squeeze(axis)
        return out, lay.squeezed(layout, tuple(out.shape), [axis])
    if kind == "reshape":
        cuts = [n for n in range(2, 7) if x.shape[axis] % n == 0]
        shape = list(x.shape)
        if cuts and rng.random() < 0.5:
            cut = rng.choice(cuts)
            shape[axis : axis + 1] = [cut, x.shape[axis] // cut]
        elif axis + 1 < rank:
            shape[axis : axis + 2] = [math.prod(shape[axis : axis + 2])]
        out = x.reshape(shape)
        return out, lay.reshaped(layout, tuple(shape))
    out = mx.expand_dims(x, axis)
    return out, lay.expanded(layout, tuple(out.shape), [axis])


@pytest.mark.parametrize("seed", range(40))
def test_views_lie_as_mlx_lays_them(seed):
    """Chains of random views; where the rules say that MLX must copy, it has."""
    rng = random.Random(seed)
    shape = tuple(rng.choice((1, 2, 3, 4, 6, 8)) for _ in range(rng.randint(2, 4)))
    x = mx.arange(math.prod(shape), dtype=mx.float32).reshape(shape)
    layout = lay.fresh(shape, 4)
    for _ in range(8):
        x, changed = step(x, layout, rng)
        if not x.size:
            return
        layout = changed or lay.fresh(tuple(x.shape), 4)
        wanted = [s for n, s in zip(x.shape, strides_of(x), strict=True) if n > 1]
        found = [s for n, s in zip(layout.shape, layout.strides, strict=True) if n > 1]
        assert found == wanted
        rows = mx.contiguous(x)
        same = all(
            n == 1 or a == b
            for n, a, b in zip(x.shape, strides_of(x), strides_of(rows), strict=True)
        )
        assert layout.row_contiguous == same


def test_views_by_hand():
    x = lay.fresh((2, 3, 4), 2)
    assert (x.strides, x.size, x.nbytes) == ((12, 4, 1), 24, 48)
    turned = lay.transposed(x, [1, 0, 2])
    assert turned.strides == (4, 12, 1) and not turned.row_contiguous
    assert lay.reshaped(turned, (6, 4)) is None
    assert lay.reshaped(turned, (3, 2, 2, 2)).strides == (4, 12, 2, 1)  # type: ignore
    assert lay.broadcast(lay.fresh((1, 4), 2), (3, 4)).strides == (0, 1)
    narrow = lay.viewed(x, (2, 3, 8), 1)
    assert narrow is not None and narrow.strides == (24, 8, 1)
    assert lay.viewed(lay.transposed(x, [2, 1, 0]), (4, 3, 1), 4) is None


# --- Rules ---------------------------------------------------------------------------


def launches(name, *inputs, arguments=(), shape=None) -> tuple[int, int]:
    shape = inputs[0].shape if shape is None else shape
    found = cost(Operation(name, inputs, [shape], [2], arguments))
    return found.launches, found.copies


def heads(rows: int, every: int, taken: int) -> lay.Layout:
    """(rows, taken, 1, 64), cut from a projection with `every` heads."""
    whole = lay.fresh((rows, 1, every * 64), 2)
    cut = lay.split(whole, (rows, 1, taken * 64))
    apart = lay.reshaped(cut, (rows, 1, taken, 64))
    assert apart is not None
    return lay.transposed(apart, [0, 2, 1, 3])


def test_what_is_copied_first():
    """One case of each rule of MLX's Metal files, as they stand in 0.32."""
    assert launches("rope", heads(1, 12, 8), arguments=[64]) == (1, 0)
    assert launches("rope", heads(8, 12, 8), arguments=[64]) == (2, 1)
    assert launches("rope", heads(8, 12, 12), arguments=[64]) == (1, 0)
    assert launches("rope", heads(1, 12, 12), arguments=[32]) == (2, 1)
    rows = lay.fresh((8, 12, 1, 64), 2)
    q, k = lay.split(rows, (8, 8, 1, 64)), lay.fresh((8, 4, 256, 64), 2)
    assert launches("attention", q, k, k) == (2, 1)
    one = lay.split(lay.fresh((1, 12, 1, 64), 2), (1, 8, 1, 64))
    both = lay.fresh((1, 8, 256, 64), 2)
    half = lay.split(both, (1, 4, 256, 64))
    assert launches("attention", one, half, half) == (1, 0)
    wide = lay.split(lay.fresh((8, 8, 256, 64), 2), (8, 4, 256, 64))
    assert launches("attention", rows, wide, wide) == (3, 2)
    part = lay.split(lay.fresh((8, 512), 2), (8, 256))
    assert launches("rms_norm", part, lay.fresh((256,), 2)) == (2, 1)
    flat, packed = lay.fresh((8, 64), 2), lay.fresh((32, 8), 4)
    scales = lay.fresh((32, 1), 2)
    assert launches("QuantizedMatmul", flat, packed, scales, shape=(8, 32)) == (1, 0)
    new_axis = lay.expanded(flat, (8, 1, 64), [1])
    weights, index = lay.fresh((4, 32, 8), 4), lay.fresh((8,), 4)
    given = (weights, lay.fresh((4, 32, 1), 2), index, index)
    assert launches("GatherQMM", new_axis, *given, shape=(8, 1, 32)) == (2, 1)
    reshaped = lay.reshaped(flat, (8, 1, 64))
    assert launches("GatherQMM", reshaped, *given, shape=(8, 1, 32)) == (1, 0)
    assert launches("Sort", lay.fresh((4, 64), 8), arguments=[1]) == (1, 0)
    assert launches("Sort", lay.fresh((4096,), 8), arguments=[0])[0] == 6
    assert launches("Concatenate", flat, flat, shape=(16, 64)) == (2, 0)
    turned = lay.transposed(flat, [1, 0])
    assert launches("Reshape", turned, shape=(512,)) == (1, 1)
    for copies, found in [(True, (2, 1)), (False, (1, 0))]:
        arguments = ["custom_kernel_mm1_router", *[0] * 8, copies]
        named = {"arguments": arguments, "shape": (64, 8)}
        assert launches("metal_kernel", turned, **named) == found


def merges(rows: int, width: int, out: int, *, size: int = 2, bits: int = 0) -> int:
    """Of rows times (out, width), in numbers of so many bytes or packed."""
    x = lay.fresh((rows, width), size)
    if bits:
        weights = (
            lay.fresh((out, width * bits // 32), 4),
            lay.fresh((out, width // 64), 2),
        )
        name = "QuantizedMatmul"
    else:
        weights = (lay.transposed(lay.fresh((out, width), size), [1, 0]),)
        name = "Matmul"
    found = cost(Operation(name, [x, *weights], [(rows, out)], [size]))
    parts = (
        found.nbytes
        - cost(Operation("Add", [x, *weights], [(rows, out)], [size])).nbytes
    )
    one = 2 * rows * out * (size if bits else 4)  # written and read
    assert bool(parts) == bool(found.merges) and parts % one == 0
    return parts // one


def test_long_sums_are_made_in_parts():
    """matmul.cpp and quantized.cpp of 0.32, by hand; 0: one kernel does it all."""
    assert merges(1, 3072, 64, size=4) == 0  # a vector
    assert merges(8, 3072, 64) == 0  # a few rows of 16 bits
    assert merges(8, 3072, 64, size=4) == 32  # 192 blocks deep, 2 of 32 x 32
    assert merges(64, 3072, 3072) == 2  # 192 of them
    assert merges(64, 3072, 3073) == 0  # wider than long
    assert merges(64, 16384, 3072) == 8  # 1024 deep on 192: the next power of two
    assert merges(64, 100, 64) == 0  # short
    assert merges(8, 8064, 3072, bits=4) == 0  # below 13 rows
    assert merges(14, 3072, 3072, bits=4) == 0  # below 15
    assert merges(64, 3072, 3072, bits=4) == 2  # 192 of 512 threadgroups
    assert merges(64, 3072, 9216, bits=4) == 0  # 576 already
    assert merges(64, 640, 64, bits=4) == 10  # of one group of 64 each


def test_a_long_cache_is_read_in_two_passes():
    def passes(keys: int, heads: int) -> int:
        q, k = lay.fresh((1, 8, 1, 64), 2), lay.fresh((1, heads, keys, 64), 2)
        return cost(Operation("attention", [q, k, k], [q.shape], [2])).merges

    assert [passes(4095, 4), passes(4096, 4), passes(4096, 8)] == [0, 1, 0]


def test_bytes_of_the_chosen_experts_alone():
    x, index = lay.fresh((2, 1, 64), 2), lay.fresh((2,), 4)
    weights = lay.fresh((8, 64, 128), 2)
    found = cost(Operation("GatherMM", [x, weights, index, index], [(2, 1, 128)], [2]))
    assert found.nbytes == 256 + 2 * 64 * 128 * 2 + 2 * 8 + 512


def test_an_operation_without_a_rule():
    with pytest.raises(MM1Error, match=r"operation FFT, .* Add its rule"):
        count_launches(lambda x: mx.fft.fft(x), mx.zeros((4,)))


def test_a_graph_by_hand():
    weight, norm = mx.zeros((16, 8)), nn.RMSNorm(8)
    mx.eval(weight, norm.parameters())

    def run(x):
        return nn.softmax(norm(x) @ weight.T) * 2

    found = count_launches(run, mx.zeros((4, 8)))
    assert dict(found.by_name) == {
        "rms_norm": 1,
        "Matmul": 1,
        "Softmax": 1,
        "Multiply": 1,
    }
    read = 4 * (4 * 8 + 8) + 4 * (4 * 8 + 16 * 8) + 4 * (4 * 16) + 4 * (4 * 16 + 1)
    assert found.nbytes == read + 4 * (4 * 8 + 3 * 4 * 16)


# --- Layers --------------------------------------------------------------------------

# Launches of a layer that decodes alone, in a batch of 8, that reads 64; copies of
# inputs among them. The last reads with two merges more, see Count.
COUNTS = {
    ("no kernels", "dense", 16): (10, 11, 11),
    ("no kernels", "dense", 4): (12, 13, 13),
    ("no kernels", "moe", 16): (17, 18, 25),
    ("no kernels", "moe", 4): (18, 19, 26),
    ("mm1_mlx", "dense", 16): (10, 11, 11),
    ("mm1_mlx", "dense", 4): (10, 11, 11),
    ("mm1_mlx", "moe", 16): (14, 15, 22),
    ("mm1_mlx", "moe", 4): (14, 15, 22),
    ("all kernels", "moe", 16): (10, 11, 22),
    ("all kernels", "moe", 4): (10, 11, 22),
}
THEIRS = {"dense": (17, 17, 17), "moe": (29, 32, 34)}  # at 16 bits
# Most to decode, and to read. With experts 22 to read takes the router's kernel:
# of MLX's own operations, an order of rows takes two launches and its way back two, and
# each product of ordered rows numbers them again. 13 to decode are reached with all
# kernels, of which the experts' are off until a Mac has measured them.
GOALS = {
    ("no kernels", "dense"): (13, 22),
    ("no kernels", "moe"): (19, 26),
    ("mm1_mlx", "dense"): (11, 22),
    ("mm1_mlx", "moe"): (19, 22),
    ("all kernels", "moe"): (13, 22),
}


def counted(program: str, kind: str, bits: int) -> tuple[tuple[int, ...], list[int]]:
    """Launches, and merges."""
    settings = ((1, 1), (8, 1), (1, 64))
    found = [count_layer(program, kind, bits, *s) for s in settings]
    return tuple(x.launches for x in found), [x.merges for x in found]


@pytest.mark.parametrize("program, kind, bits", COUNTS)
def test_launches_of_our_layers(program, kind, bits):
    found, merged = counted(program, kind, bits)
    assert found == COUNTS[program, kind, bits]
    assert merged == [0, 0, 2]
    decode, read = GOALS[program, kind]
    assert max(found[:2]) <= decode and found[2] <= read


@pytest.mark.parametrize("rows", [1, 8])
def test_a_long_context_takes_a_second_pass_and_no_copy(rows):
    short = count_layer("no kernels", "dense", 16, rows)
    long = count_layer("no kernels", "dense", 16, rows, context=5000)
    assert (long.launches, long.copies) == (short.launches, short.copies)
    assert (short.merges, long.merges) == (0, 1)
    kept = 2 * 8 * 128 * 2  # bytes of a token: keys and values of 8 heads
    read = long.nbytes - short.nbytes  # the cache's room is counted, not what is in it
    assert abs(read - rows * 5000 * kept) < rows * 256 * kept


@pytest.mark.parametrize("kind", THEIRS)
def test_launches_of_mlx_lm(kind):
    need("mlx_lm")
    assert counted("mlx-lm", kind, 16) == (THEIRS[kind], [0, 0, 5])


def test_without_mlx_lm_its_absence_is_told(monkeypatch, capsys):
    find, counted = importlib.util.find_spec, []

    def found(name):
        return None if name == "mlx_lm" else find(name)

    def count(programs, context):
        counted.append(programs)
        return []

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr("mm1_mlx.benchmarks.launches.measure_launches", count)
    for flags in ([], ["--json"]):
        subject.run(subject.parser().parse_args(flags))
        told = capsys.readouterr()
        assert told.err == (
            "note: counted without mlx-lm, which is not installed: pip install mlx-lm\n"
        )
        assert "note" not in told.out
    assert all(len(names) == 3 and "mlx-lm" not in names for names in counted)
