"""What each kernel is compared with its definition on: shapes of MM1 and of others.

For `benchmark kernels`, for the trial before a kernel's first use (small ones), and for
tests. A new kernel adds a function of its own to KERNELS.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.kernels.add_norm import add_norm
from mm1_mlx.kernels.photo import Axis, axis, photo
from mm1_mlx.kernels.quantized_attention import attend_quantized, fill_last_axis
from mm1_mlx.kernels.routed_experts import experts_reference, routed_experts
from mm1_mlx.kernels.router import route, route_tokens, tokens_reference

_ROUNDING = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}
FLOATS = tuple(_ROUNDING)


_seeds = count()  # MLX's own state is the user's


def _normal(shape: Sequence[int], dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, dtype, key=mx.random.key(next(_seeds)))


def _picture(height: int, width: int) -> mx.array:
    key = mx.random.key(next(_seeds))
    return mx.random.randint(0, 256, (height, width, 3), key=key).astype(mx.uint8)


@dataclass(frozen=True)
class Case:
    """One call of a chooser, with and without its kernel.

    kernel: the name in the settings. make: its arrays, of which the first is one that
    work's result depends on. work: the call; of several results, the one that is made
    last comes first. Lists of results are compared one by one. quantized: its 8-bit
    results may each be one off.
    """

    kernel: str
    shape: str
    dtype: mx.Dtype
    make: Callable[[], list[mx.array]]
    work: Callable[..., Sequence[mx.array]]


def _router(small: bool) -> Iterator[Case]:
    sizes = [(1, 64), (8, 64), (1, 32), (588, 64), (1, 128)]
    kinds = [(T, E, mx.float32, T > 64, True) for T, E in sizes]
    if small:
        kinds = [
            (3, 40, dtype, keyed, renormalise)
            for dtype in FLOATS
            for keyed in (False, True)
            for renormalise in (False, True)
        ]
        kinds.append((1, 512, mx.bfloat16, False, True))
    for T, E, dtype, keyed, renormalise in kinds:
        k = 8 if E >= 128 else 2
        more = ", in order" * keyed + ", shares of all" * (not renormalise)
        yield Case(
            "router",
            f"{T} x {E}, best {k}{more}",
            dtype,
            lambda T=T, E=E: [_normal((T, E))],
            lambda logits, how=(k, renormalise), dtype=dtype, keyed=keyed: [
                found
                for found in route(logits, *how, dtype=dtype, keyed=keyed)
                if found is not None
            ],
        )


def _router_matvec(small: bool) -> Iterator[Case]:
    sizes = [(1, 3072, 64), (8, 3072, 64), (1, 4096, 32), (1, 2048, 128)]
    for T, D, E in [(2, 100, 40), (1, 256, 256)] if small else sizes:
        for dtype in FLOATS:
            yield Case(
                "router_matvec",
                f"{T} x {D} to {E}, best 2",
                dtype,
                lambda T=T, D=D, E=E, dtype=dtype: [
                    _normal((T, D), dtype),
                    (_normal((E, D)) * D**-0.5).astype(dtype),
                ],
                lambda x, weight: (
                    route_tokens(x, weight, 2, True)
                    or tokens_reference(x, weight, 2, True)
                ),
            )


def _types(small: bool, *types: tuple[int, mx.Dtype]) -> list[tuple[int, mx.Dtype]]:
    """Small cases without Metal in float32: packed products are rough there in 16."""
    wide = small and not mx.metal.is_available()
    return [(bits, mx.float32 if wide else dtype) for bits, dtype in types]


class _Packed(nn.Module):
    """A stack of experts with packed weights, as models.moe.QuantizedStack has it."""

    def __init__(self, arrays: Sequence[mx.array], bits: int):
        super().__init__()
        self.weight, self.scales, self.biases = arrays
        self.bits, self.group_size, self.mode = bits, 64, "affine"


def _routed_experts(small: bool) -> Iterator[Case]:
    # MM1's 3B and 7B with few of their experts, and a model with many small ones.
    sizes = [(1, 4, 2, 3072, 8064), (1, 4, 2, 4096, 13312), (1, 64, 8, 2048, 768)]
    for T, E, K, D, F in (
        [(2, 4, 2, 128, 64)] if small else [*sizes, (8, *sizes[0][1:])]
    ):
        types = [(4, mx.float16), (4, mx.bfloat16), (0, mx.bfloat16)]
        for bits, dtype in _types(small, *types):
            yield Case(
                "routed_experts",
                f"{T} x {D} to {F}, {K} experts, {bits or 16} bits",
                dtype,
                lambda T=T, E=E, K=K, D=D, F=F, bits=bits, dtype=dtype: [
                    _normal((T, D), dtype),
                    *_stack(E, 2 * F, D, bits, dtype),
                    *_stack(E, D, F, bits, dtype),
                    mx.softmax(_normal((T, K)), axis=-1),
                    mx.argsort(_normal((T, E)), axis=-1)[:, :K],
                ],
                lambda x, *arrays, bits=bits: [_experts(x, list(arrays), bits)],
            )


def _stack(E: int, rows: int, width: int, bits: int, dtype: mx.Dtype) -> list[mx.array]:
    stack = (_normal((E, rows, width), dtype) * width**-0.5).astype(dtype)
    return list(mx.quantize(stack, group_size=64, bits=bits)) if bits else [stack]


def _experts(x: mx.array, arrays: list[mx.array], bits: int) -> mx.array:
    *arrays, weights, experts = arrays
    if bits:
        stacks: list[Any] = [_Packed(arrays[:3], bits), _Packed(arrays[3:], bits)]
    else:
        stacks = arrays
    given = (x, stacks[0], stacks[1], weights, experts, "silu", True)
    found = routed_experts(*given)
    return experts_reference(*given) if found is None else found


def _add_norm(small: bool) -> Iterator[Case]:
    for shape in (
        [(2, 100), (1, 4096), (1, 8200)]
        if small
        else [(1, 3072), (1, 4096), (8, 3072), (588, 3072)]
    ):
        for dtype in FLOATS:
            for kind in (nn.RMSNorm, nn.LayerNorm):
                yield Case(
                    "add_norm",
                    f"{shape[0]} x {shape[1]}, {kind.__name__}",
                    dtype,
                    lambda shape=shape, dtype=dtype, kind=kind: [
                        *(_normal(shape, dtype) for _ in range(2)),
                        _normal(shape[1:], dtype),
                        _normal(shape[1:], dtype),
                    ],
                    lambda x, delta, *weights, kind=kind: _add(x, delta, kind, weights),
                )


def _add(
    x: mx.array, delta: mx.array, kind: Any, weights: Sequence[mx.array]
) -> list[mx.array]:
    norm = kind(1)
    norm.weight = weights[0]
    if "bias" in norm:
        norm.bias = weights[1]
    return list(add_norm(x, delta, norm))[::-1]


def _quantized_attention(small: bool) -> Iterator[Case]:
    heads = [(1, 24, 24, 128), (1, 32, 4, 128), (8, 32, 4, 128)]
    sizes = [(*head, keys, 1, "") for head in heads for keys in (256, 1024, 4096)]
    if small:
        kinds = [(40, 1, ""), (600, 1, ""), (40, 3, "causal"), (40, 3, "masked")]
        sizes = [(1, 2, 1, 80, *kind) for kind in kinds]
    for B, H, KV, width, columns, L, mask in sizes:
        for bits, dtype in _types(small, (8, mx.float16), (4, mx.bfloat16)):
            named = f"{B} x {H} heads on {KV}, {columns} keys of {width}, {bits} bits"
            yield Case(
                "quantized_attention",
                named + f", {L} queries {mask}" * (L > 1),
                dtype,
                lambda B=B, H=H, KV=KV, w=width, n=columns, L=L, bits=bits, t=dtype: [
                    _normal((B, H, L, w), t),
                    *_cached((B, KV, n, w), bits, t),
                    *_cached((B, KV, n, w), bits, t),
                ],
                lambda q, *kv, mask=mask, bits=bits: [_attend(q, kv, mask, bits)],
            )


def _attend(q: mx.array, kv: Sequence[mx.array], mask: str, bits: int) -> mx.array:
    seen: Any = {"": None, "causal": "causal"}.get(mask, mask)
    if mask == "masked":  # every other key
        columns = kv[0].shape[2]
        seen = mx.broadcast_to(mx.arange(columns) % 2 == 0, (1, 1, q.shape[2], columns))
    scale = q.shape[-1] ** -0.5
    return attend_quantized(q, kv[:3], kv[3:], scale, seen, 32, bits)  # type: ignore[arg-type]


def _cached(shape: tuple[int, ...], bits: int, dtype: mx.Dtype) -> list[mx.array]:
    x = fill_last_axis(_normal(shape, dtype), 32)
    return list(mx.quantize(x, group_size=32, bits=bits))


def _photo(small: bool) -> Iterator[Case]:
    photos = [(4032, 3024, 336), (4032, 3024, 378), (4032, 3024, 672), (640, 480, 378)]
    for width, height, size in [(40, 30, 16)] if small else photos:
        for dtype in FLOATS if small else FLOATS[:1]:
            yield Case(
                "photo",
                f"{width} x {height} to {size}",
                dtype,
                lambda w=width, h=height, dtype=dtype: [
                    mx.array([122, 116, 104]),
                    _picture(h, w),
                    _normal((256, 3), dtype),
                ],
                # Padded by a twentieth on each side.
                lambda colour, picture, levels, size=size: [
                    photo(
                        picture,
                        _padded(picture.shape[1], size),
                        _padded(picture.shape[0], size),
                        colour,
                        levels,
                        size,
                    )
                ],
            )


def _padded(length: int, size: int) -> Axis:
    pad = length // 20
    return axis(length, size, padded=length + 2 * pad, left=pad)


# Name in the settings -> its cases; small: a few that take no time, in a test on a CPU
# or before the first use.
KERNELS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "router": _router,
    "router_matvec": _router_matvec,
    "routed_experts": _routed_experts,
    "add_norm": _add_norm,
    "quantized_attention": _quantized_attention,
    "photo": _photo,
}


def all_cases(small: bool = False) -> list[Case]:
    """Every case of every kernel."""
    return [case for cases in KERNELS.values() for case in cases(small)]


def bound(dtype: mx.Dtype) -> float:
    """The difference that is allowed: six roundings to the type, and float32's sums."""
    return 6 * _ROUNDING[dtype] + 2e-5


def difference(found: Sequence[mx.array], expected: Sequence[mx.array]) -> float:
    """The largest of all results, as a share of the largest expected value.

    Of whole numbers 0 or infinite; infinite, too, for other shapes or types and NaN.
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if not mx.issubdtype(a.dtype, mx.floating):
            worst = worst if mx.array_equal(a, b).item() else math.inf
            continue
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        share: Any = (mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-30)).item()
        worst = max(worst, share if math.isfinite(share) else math.inf)
    return worst
