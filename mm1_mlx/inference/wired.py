"""Keep the model's memory resident while it runs: for commands, not for the library."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mm1_mlx.inference.steps import generation_stream


@contextmanager
def wired_limit() -> Iterator[None]:
    """On Metal, let MLX wire as much memory as macOS recommends; restored at the end.

    Without it macOS may page out weights between steps (mlx-lm does the same). It is
    process-wide, so a command decides, never the library. Elsewhere it does nothing.
    """
    if not mx.metal.is_available():
        yield
        return
    info = getattr(mx, "device_info", None) or mx.metal.device_info
    before = mx.set_wired_limit(int(info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        try:
            mx.synchronize(generation_stream())  # a step may be running ahead
        finally:  # also after a second Ctrl-C
            mx.set_wired_limit(before)
