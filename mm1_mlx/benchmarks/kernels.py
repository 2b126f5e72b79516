"""Each Metal kernel beside its definition on this machine's GPU: error, time, gain.

A call is timed in a chain, in which each one waits for the one before, as it is in
decoding: one call alone is mostly the start and the end of a command buffer. The graph
is built before the clock starts, and the clock stops when the GPU is done. What links
the calls is timed by itself and taken off.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mm1_mlx.benchmarks.machine import machine, machine_lines
from mm1_mlx.errors import MM1Error
from mm1_mlx.kernels.cases import Case, bound, difference
from mm1_mlx.kernels.metal import forced, has_metal, watched, write_choices
from mm1_mlx.kernels.trial import forget

CALLS = 20  # of a chain
WARM_UP = 2  # chains of each that are not counted
# A kernel is switched on where it gains more than this, off where it loses as much.
MARGIN = 0.02

_FASTEST = 1e-8  # seconds; what is measured below it is the clock's


@dataclass(frozen=True)
class Row:
    """One case. error: the largest difference, as a share of the largest value; of
    whole numbers, 0 or infinite. seconds: medians of one call; spread: least and most
    of the kernel's. gain: the definition's seconds over the kernel's. failure: why the
    kernel did not run, where MLX or Metal refused it; then it was not timed."""

    kernel: str
    shape: str
    dtype: str
    error: float
    bound: float
    definition_seconds: float
    kernel_seconds: float
    spread: tuple[float, float]
    gain: float
    failure: str = ""

    @property
    def right(self) -> bool:
        """Whether the kernel gives what its definition gives, up to the bound."""
        return self.error <= self.bound


def require_metal() -> None:
    """Raises MM1Error where arrays are not computed by Metal."""
    if not has_metal():
        raise MM1Error(
            "There is no Metal here, which these kernels are for: run this on a Mac "
            "with Apple silicon. (tests/metal_host checks them on any machine.)"
        )


def measure_kernels(
    cases: Sequence[Case],
    runs: int = 20,
    *,
    calls: int = CALLS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Run every case both ways. progress: called with (cases done, in all).

    Raises MM1Error where a kernel declined one of its cases: nothing was compared.
    """
    rows = []
    for done, case in enumerate(cases):
        if progress:
            progress(done, len(cases))
        rows.append(_measure(case, runs, calls))
        mx.clear_cache()
    if progress:
        progress(len(cases), len(cases))
    return rows


def _measure(case: Case, runs: int, calls: int) -> Row:
    arrays = case.make()
    mx.eval(arrays)
    with forced(case.kernel), watched() as names:
        try:
            found = list(case.work(*arrays))
            mx.eval(found)
        except (RuntimeError, ValueError) as error:  # Metal's compiler, a GPU's limit
            return _failed(case, str(error))
    if not names:
        raise MM1Error(
            f"The kernel {case.kernel} declined {case.shape} in {_name(case.dtype)}: "
            f"there is nothing to measure. Please report it."
        )
    with forced():
        expected = list(case.work(*arrays))
        mx.eval(expected)

    def chain(work: Callable[..., Sequence[mx.array]], *kernels: str) -> float:
        with forced(*kernels):
            return _chain(work, arrays, calls)

    seconds: dict[str, list[float]] = {"kernel": [], "definition": [], "link": []}
    for turn in range(WARM_UP + runs):
        now = {
            "definition": chain(case.work),
            "kernel": chain(case.work, case.kernel),
            "link": chain(lambda *_: found),
        }
        for name, took in now.items():
            if turn >= WARM_UP:
                seconds[name].append(took)
    link = statistics.median(seconds["link"])
    kernel = [max(took - link, _FASTEST) for took in seconds["kernel"]]
    definition = max(statistics.median(seconds["definition"]) - link, _FASTEST)
    return Row(
        kernel=case.kernel,
        shape=case.shape,
        dtype=_name(case.dtype),
        error=difference(found, expected),
        bound=bound(case.dtype),
        definition_seconds=definition,
        kernel_seconds=statistics.median(kernel),
        spread=(min(kernel), max(kernel)),
        gain=definition / statistics.median(kernel),
    )


def _failed(case: Case, why: str) -> Row:
    return Row(
        kernel=case.kernel,
        shape=case.shape,
        dtype=_name(case.dtype),
        error=math.inf,
        bound=0.0,
        definition_seconds=0.0,
        kernel_seconds=0.0,
        spread=(0.0, 0.0),
        gain=0.0,
        failure=why,
    )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _chain(
    work: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array], calls: int
) -> float:
    """Seconds of one of `calls` calls, each of which needs the result before."""
    given, *others = arrays
    always, first = mx.array(True), given
    for _ in range(calls):
        result = work(first, *others)[0]
        number = result.reshape(-1)[:1].reshape([1] * given.ndim)
        first = mx.where(always, given, number.astype(given.dtype))
    mx.synchronize()
    start = time.perf_counter()
    mx.eval(first)
    mx.synchronize()
    return (time.perf_counter() - start) / calls


def choices(rows: Sequence[Row]) -> dict[str, bool]:
    """Which kernels to switch on and which off; a kernel that is neither is left out.

    On: right in every case, and faster by the geometric mean of its gains. Off: wrong
    in any, or slower.
    """
    found = {}
    for name in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == name]
        if not all(row.right for row in own):
            found[name] = False
            continue
        gain = statistics.geometric_mean(row.gain for row in own)
        if abs(math.log(gain)) > math.log1p(MARGIN):
            found[name] = gain > 1
    return found


def apply_choices(rows: Sequence[Row]) -> str:
    """Write what is chosen into the user's settings; gives what to say of it."""
    found = choices(rows)
    if not found:
        return "Nothing to write: no kernel is clearly faster or slower."
    said = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in found.items())
    forget(*found)  # what was found wrong before is tried again
    return f"Wrote to {write_choices(found)}: {said}."


def as_object(rows: Sequence[Row], runs: int) -> dict[str, Any]:
    """All of it for JSON, fit for an issue: machine, settings, rows, choices."""
    return {
        "machine": machine(),
        "gpu": _gpu(),
        "runs": runs,
        "calls": CALLS,
        "rows": [
            # JSON knows no infinity.
            asdict(row) | {"right": row.right, "error": min(row.error, 1e30)}
            for row in rows
        ],
        "choices": choices(rows),
    }


def _gpu() -> dict[str, Any]:
    """What MLX knows of the device."""
    return {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)}


def as_table(rows: Sequence[Row], runs: int) -> str:
    """All of it as text, one line per case."""
    lines = machine_lines(_gpu())
    width = max([5, *(len(row.shape) for row in rows)])
    lines += [
        "",
        f"microseconds of one call, median of {runs} chains of {CALLS}; error: largest "
        f"difference, as a share of the largest value",
        f"{'kernel':20} {'shape':{width}} {'type':8} {'error':>8} "
        f"{'definition':>10} {'kernel':>8} {'gain':>6}",
    ]
    for r in rows:
        if r.failure:
            first = r.failure.strip().splitlines()[0]
            lines.append(f"{r.kernel:20} {r.shape:{width}} {r.dtype:8} FAILED {first}")
            continue
        lines.append(
            f"{r.kernel:20} {r.shape:{width}} {r.dtype:8} {r.error:8.1e} "
            f"{r.definition_seconds * 1e6:10.1f} {r.kernel_seconds * 1e6:8.1f} "
            f"{r.gain:5.2f}x{'' if r.right else '  WRONG'}"
        )
    said = [f"{name} {'on' if on else 'off'}" for name, on in choices(rows).items()]
    lines += ["", f"by these figures: {', '.join(said) or 'all as they are'}"]
    return "\n".join(lines)
