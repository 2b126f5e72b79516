"""How far the encoder is with the pictures of a call, for who waits for it."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import VisionConfig
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.walk import LayerWalk

# Operations between two reports: a second or so of a slow machine, and a few hundredths
# of one with a GPU, which a wait in between does not slow.
REPORTED = 5e10

Report = Callable[[int, int], None]  # done, and all


class ToldWalk(LayerWalk):
    """A walk through the encoder that tells how many layers are done.

    A layer counts once for each tile. The states are the same as without it; they are
    evaluated here and there, so that what is told is done.
    """

    def __init__(self, config: VisionConfig, report: Report, total: int):
        super().__init__()
        self._config, self._report, self._total = config, report, total
        self._done = 0
        self._waiting = 0.0  # operations since the last report

    def through(
        self,
        name: str,
        layer: nn.Module,
        x: mx.array,
        run: Callable[[mx.array, Any], mx.array],
        routed: Any = None,
    ) -> mx.array:
        """As a LayerWalk, for a forward pass alone. x: (N, T, Dv)"""
        x = run(x, [])
        if not name.startswith("vision."):  # a connector: little beside the encoder
            return x
        tiles, positions, _ = x.shape
        self._done += tiles
        self._waiting += tiles * _operations(self._config, positions)
        if self._waiting >= REPORTED and self._done < self._total:
            self._waiting = 0.0
            mx.eval(x)
            self._report(self._done, self._total)
        return x

    def end(self) -> None:
        """All pictures are encoded."""
        self._report(self._total, self._total)


def told_walk(
    model: MM1, shapes: Sequence[tuple[int, ...]], report: Report | None
) -> ToldWalk | None:
    """The walk that tells `report` of pictures that will be encoded, or None: for one
    that is no larger than the encoder's own size nobody waits.

    shapes: (n, H, W, 3) of the tiles of each.
    """
    vision = model.config.vision_config
    if report is None or vision is None:
        return None
    tiles = sum(shape[0] for shape in shapes)
    side = max((shape[1] for shape in shapes), default=0)
    if tiles < 2 and side <= vision.image_size:
        return None
    total = tiles * model.vision.used_layers
    report(0, total)
    return ToldWalk(vision, report, total)


def _operations(config: VisionConfig, positions: int) -> float:
    """Of one layer and one tile: two for each weight and position, attention's scores
    and sums on top."""
    width = config.num_attention_heads * config.size_per_head
    mlp = (3 if config.gated_mlp else 2) * config.intermediate_size
    weights = config.hidden_size * (4 * width + mlp)
    return 2.0 * positions * weights + 4.0 * positions**2 * width
