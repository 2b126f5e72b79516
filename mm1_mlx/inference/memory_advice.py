"""What to change where an answer would not fit into memory."""

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mm1_mlx import memory
from mm1_mlx.memory import bytes_text

if TYPE_CHECKING:
    from mm1_mlx.inference.memory_plan import GenerationPlan


def advice(plan: "GenerationPlan") -> str:
    """Single changes that make it fit, or what helps together."""
    ways = [*_for_the_answer(plan), *_for_pictures(plan)]
    if plan.draft and replace(plan, draft=0).fits:
        ways.append("no draft model")
    if not plan.work.packed:
        few = memory.weight_bytes(memory.count_parameters(plan.config), 4)
        if replace(plan, weights=few).fits:
            ways.append(
                f"4 bits ({bytes_text(few)} of weights): python -m mm1_mlx.quantize"
            )
    if ways:
        return f"What would fit: {'; or '.join(ways)}."
    return (
        "No single change would do: take a smaller or more quantized model, and "
        "lower max_tokens, kv_bits and prefill_step_size (flags of the same names)."
    )


def _for_the_answer(plan: "GenerationPlan") -> list[str]:
    work, ways = plan.work, []
    if plan.changed(answer=1).fits:
        most = bisect_right(
            range(1, work.answer + 1), False,
            key=lambda n: not plan.changed(answer=n).fits,
        )  # fmt: skip
        ways.append(_both("max_tokens", most))
    for bits in (8, 4):
        smaller = plan.changed(kv_bits=bits, quantized_kv_start=0)
        if work.kv_bits is None and smaller.fits:
            ways.append(_both("kv_bits", bits))
            break
    piece = min(work.piece, work.prompt)
    while piece > 64 and not plan.changed(piece=piece).fits:
        piece //= 2
    if piece < work.piece and plan.changed(piece=piece).fits:
        ways.append(_both("prefill_step_size", piece))
    return ways


def _for_pictures(plan: "GenerationPlan") -> list[str]:
    work, ways = plan.work, []
    tiling = plan.config.tiling_config
    apart = tiling is None or not tiling.arranges
    if apart and work.dynamic:
        for count in range(work.tiles - 2, 1, -1):  # 1 is "native", below
            if _with_tiles(plan, count).fits:
                ways.append(_both("max_tiles", count))
                break
    larger = work.side is not None or work.tiles > 1
    if apart and larger and _with_tiles(plan, 1, native=True).fits:
        ways.append("resolution='native' (--resolution native)")
    if work.pictures and plan.changed(pictures=0).fits:
        ways.append("fewer pictures")
    return ways


def _with_tiles(
    plan: "GenerationPlan", most: int, *, native: bool = False
) -> "GenerationPlan":
    """The plan with at most so many tiles, and an overview, for each picture."""
    work, vision = plan.work, plan.config.vision_config
    grid = None
    if vision is not None and work.side is not None:
        grid = work.side // vision.patch_size
    before = plan.config.image_tokens(grid=grid)
    after = plan.config.image_tokens() if native else before
    each = most + 1 if most > 1 else 1
    count = min(work.pictures, work.images * each)
    saved = work.pictures * before - count * after
    return plan.changed(
        pictures=count,
        tiles=min(each, work.tiles),
        prompt=max(work.prompt - max(saved, 0), 1),
        side=None if native else work.side,
    )


def _both(setting: str, value: Any) -> str:
    """A setting as Python and the command call it."""
    return f"{setting}={value} (--{setting.replace('_', '-')} {value})"
