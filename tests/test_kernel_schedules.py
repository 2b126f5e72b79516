"""Every kernel and each of its variants: in all types, at an odd shape and at a limit,
under eight schedules of its threads, against the definition."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from kernel_inputs import (
    NEAR,
    attention_exactly,
    attention_inputs,
    experts_exactly,
    experts_inputs,
    norm_inputs,
    packed,
    tied_logits,
)
from kernel_kit import BOUND, FLOATS, our_kernels, share

from helpers import assert_equal
from metal_host import under_schedules
from metal_host.pytest_glue import needs_host
from mm1_mlx.kernels import add_norm as norms
from mm1_mlx.kernels import photo as photos
from mm1_mlx.kernels import quantized_attention as attention
from mm1_mlx.kernels import routed_experts as routed
from mm1_mlx.kernels import router as routers
from mm1_mlx.kernels.cases import KERNELS
from mm1_mlx.kernels.metal import forced, watched

SCHEDULES = 8
# One rounding to the type, and float32's exp and sums in another order.
ROUNDED = {mx.float32: 5e-6, mx.float16: 2**-11 + 5e-6, mx.bfloat16: 2**-8 + 5e-6}

Results = Sequence[Any]


@dataclass(frozen=True)
class Row:
    """A variant of a kernel, at one shape.

    kernel: its name in the settings. launches: the kernels that it runs, by name. make:
    of a type, the call of its chooser, what it should give, and how near, as a share of
    the largest value (0: the same bits).
    """

    label: str
    kernel: str
    launches: tuple[str, ...]
    make: Callable[[mx.Dtype], tuple[Callable[[], Any], Results, Sequence[float]]]


# --- the rows ------------------------------------------------------------------------


def _router() -> Iterator[Row]:
    """Shares in the type, as a model has them; logits in float32 as there, or in it."""
    for where, T, E, k, wide in [
        ("odd", 9, 33, 3, True),
        ("limit", 2, routers.MAX_EXPERTS, routers.MAX_CHOSEN, False),
    ]:
        for keyed in (False, True):
            for renormalise in (True, False):

                def make(dtype, T=T, E=E, k=k, wide=wide, keyed=keyed, n=renormalise):
                    logits = tied_logits(T, E, mx.float32 if wide else dtype)
                    exact = routers.route_reference(logits, k, n, keyed=keyed)
                    return (
                        lambda: routers.route(logits, k, n, dtype=dtype, keyed=keyed),
                        exact if keyed else exact[:2],
                        [ROUNDED[dtype], 0, 0],
                    )

                name = "mm1_router_keyed" if keyed else "mm1_router"
                label = f"{name}, {where}, {'best' if renormalise else 'all'}"
                yield Row(label, "router", (name,), make)


def _router_matvec() -> Iterator[Row]:
    """Of whole numbers: sums are exact in any order, and ties are many."""
    for where, T, D, E, k in [
        ("odd", 3, 31, 33, 3),
        (
            "limit",
            routers.MAX_TOKENS,
            130,
            routers.MAX_EXPERTS_INSIDE,
            routers.MAX_CHOSEN,
        ),
    ]:
        for renormalise in (True, False):

            def make(dtype, T=T, D=D, E=E, k=k, n=renormalise):
                x = (mx.random.randint(-3, 4, (T, D)) / 4).astype(dtype)
                weight = (mx.random.randint(-3, 4, (E, D)) / 4).astype(dtype)
                return (
                    lambda: routers.route_tokens(x, weight, k, n, dtype=dtype),
                    routers.tokens_reference(x, weight, k, n),
                    [ROUNDED[dtype], 0, 0],
                )

            label = f"router_matvec, {where}, {'best' if renormalise else 'all'}"
            yield Row(label, "router_matvec", ("mm1_router_matvec",), make)


def _add_norm() -> Iterator[Row]:
    # As wide as threads keep, and wider by one: read again.
    kept = norms.IN_REGISTERS * norms.THREADS
    for where, shape in [
        ("odd", (3, 31)),
        ("limit of what is kept", (1, kept)),
        ("limit that is passed", (1, kept + 1)),
    ]:
        for kind in ("RMSNorm", "LayerNorm", "LayerNorm with bias"):

            def make(dtype, shape=shape, kind=kind):
                biased, centred = "bias" in kind, kind != "RMSNorm"
                given: Any = norm_inputs(shape, dtype, biased)
                x, delta, weight, bias = given
                width = shape[-1]
                norm: Any = (
                    nn.LayerNorm(width, bias=biased) if centred else nn.RMSNorm(width)
                )
                norm.weight = weight
                if biased:
                    norm.bias = bias
                return (
                    lambda: norms.add_norm(x, delta, norm),
                    norms.add_norm_reference(*given, norm.eps, centred),
                    [0, NEAR[dtype]],
                )

            name = "mm1_add_norm_bias" if "bias" in kind else "mm1_add_norm"
            yield Row(f"add_norm, {where}, {kind}", "add_norm", (name,), make)


def _routed_experts() -> Iterator[Row]:
    T, K = routed.MAX_TOKENS, routed.MAX_CHOSEN
    # E, D, F, T, K, activation, gated, packing of up and of down
    plain = None, None
    four, eight = (packed(4, 32), packed(4, 32)), (packed(8, 64), packed(8, 32))
    for where, sizes, act, gated, how in [
        ("odd", (4, 31, 5, 3, 2), "silu", True, plain),
        ("odd", (4, 31, 5, 3, 2), "relu2", False, plain),
        ("odd", (5, 96, 32, 3, 3), "silu", True, four),
        ("odd", (5, 64, 32, 3, 3), "gelu_pytorch_tanh", False, eight),
        ("limit", (K, 33, 9, T, K), "quick_gelu", True, plain),
        ("limit", (2, 32, 32, T, 2), "silu", True, four),
        ("limit", (K, 64, 32, 1, K), "silu", True, eight),
    ]:

        def make(dtype, sizes=sizes, act=act, gated=gated, how=how):
            up, down = how
            given: Any = experts_inputs(*sizes, dtype, gated=gated, up=up, down=down)
            given[3] = given[3].astype(dtype)  # as the router gives them
            return (
                lambda: (routed.routed_experts(*given, act, gated),),
                (experts_exactly(given, act, gated),),
                [BOUND[dtype]],
            )

        kinds = ["plain" if each is None else "packed" for each in how]
        names = f"mm1_experts_up_{kinds[0]}", f"mm1_experts_down_{kinds[1]}"
        bits = [0 if each is None else each["bits"] for each in how]
        label = f"experts, {where}, {act}, {'gated, ' * gated}bits {bits}"
        yield Row(label, "routed_experts", names, make)


def _quantized_attention() -> Iterator[Row]:
    most = attention.COLUMNS_AT_ONCE
    for where, (B, H, KV, L, width), columns, bits, size in [
        ("odd", (1, 2, 1, 3, 20), 37, 4, 32),
        ("odd", (2, 1, 1, 1, 80), 33, 8, 32),
        ("limit", (1, 1, 1, attention.MAX_QUERIES, 32), most, 4, 32),
        ("limit", (1, 1, 1, 2, attention.MAX_WIDTH), most + 1, 8, 128),
    ]:
        for mask in (None, "causal", "bool") if L > 1 else (None, "bool"):

            def make(dtype, b=B, h=H, kv=KV, n=L, w=width, c=columns, **how):
                mask = how["mask"]
                if mask == "bool":
                    mask = mx.random.uniform(shape=(b, 1, n, c)) > 0.3
                given = attention_inputs(
                    b, h, kv, n, w, c, how["bits"], how["size"], dtype, mask
                )
                return (
                    lambda: (attention.attend_quantized(*given),),
                    (attention_exactly(given),),
                    [BOUND[dtype]],
                )

            name = "mm1_quantized_attention" + "_masked" * (mask == "bool")
            names = (name, *["mm1_quantized_attention_join"] * (columns > most))
            how = {"mask": mask, "bits": bits, "size": size}
            label = f"attention, {where}, {L} x {width} on {columns}, {mask}, {bits}"
            yield Row(
                label,
                "quantized_attention",
                names,
                lambda dtype, make=make, how=how: make(dtype, **how),
            )


def _photo() -> Iterator[Row]:
    side = photos.MAX_SIDE
    padded = photos.axis(9, 16, padded=30, left=10), photos.axis(30, 16)
    long = photos.axis(side, 64), photos.axis(3, 4, padded=5, left=1)
    tall = photos.axis(1, 2), photos.axis(side, 64)
    for where, (across, down), tile in [
        ("odd", padded, 8),
        ("limit", long, 4),
        ("limit", tall, 2),
    ]:

        def make(dtype, across=across, down=down, tile=tile):
            shape = (down.stop - down.start, across.stop - across.start, 3)
            picture = mx.random.randint(0, 256, shape).astype(mx.uint8)
            levels = mx.random.normal((256, 3)).astype(dtype)
            given = (picture, across, down, mx.array([122, 116, 104]), levels, tile)
            return (
                lambda: (photos.photo(*given),),
                (photos.photo_reference(*given),),
                [0],
            )

        names = "mm1_photo_across", "mm1_photo_down"
        label = f"photo, {where}, {across.size} x {down.size}"
        yield Row(label, "photo", names, make)


ROWS = [
    row
    for rows in (
        _router,
        _router_matvec,
        _add_norm,
        _routed_experts,
        _quantized_attention,
        _photo,
    )
    for row in rows()
]


# --- the tests -----------------------------------------------------------------------


def test_every_kernel_has_rows():
    assert {row.kernel for row in ROWS} == set(KERNELS)
    covered = {name for row in ROWS for name in row.launches}
    assert covered == {kernel.name for kernel in our_kernels()}
    for kernel in KERNELS:
        labels = [row.label for row in ROWS if row.kernel == kernel]
        assert len(set(labels)) == len(labels)
        for where in (", odd", ", limit"):
            assert any(where in label for label in labels), (kernel, where)


def assert_near(
    results: Any, expected: Results, near: Sequence[float], dtype: mx.Dtype
):
    found = [each for each in results if each is not None]
    for a, b, most in zip(found, expected, near[: len(expected)], strict=True):
        if most == 0:
            assert_equal(a.astype(b.dtype), b)
        else:
            assert a.dtype == dtype
            assert share(a, b) <= most


every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
in_type = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@needs_host
@in_type
@every
def test_kernel(row, dtype):
    run, expected, near = row.make(dtype)
    with forced(row.kernel), watched() as names:
        found = under_schedules(run, SCHEDULES)
    assert names == [*row.launches] * SCHEDULES  # or it declined, and all is alike
    for results in found:
        assert_near(results, expected, near, dtype)


@pytest.mark.metal
@in_type
@every
def test_on_a_mac(row, dtype):
    run, expected, near = row.make(dtype)
    with forced(row.kernel), watched() as names:
        found = run()
    assert names == [*row.launches]
    # Metal's own exp, and its norms and products in the definition.
    assert_near(found, expected, [4 * each for each in near], dtype)
