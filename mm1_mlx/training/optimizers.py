"""MLX's optimizers by name, one for each learning rate."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

OPTIMIZERS = ("adamw", "adam", "adafactor", "lion", "sgd")

# Their states, in numbers for each one that is trained; adafactor's are of rows and
# columns, and MLX's sgd has momentum's even where there is none.
STATES = {"adamw": 2, "adam": 2, "adafactor": 0, "lion": 1, "sgd": 1}

# Which parameters, by name, and their rate as a part of the stage's.
Group = tuple[Callable[[str], bool], float]


class Optimizers:
    """One optimizer for each group of parameters, and one for all others.

    groups: the first that fits a name counts; others have the whole rate.
    """

    def __init__(
        self,
        kind: str,
        groups: list[Group],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        make = _maker(kind, betas, weight_decay)
        self.scales = [scale for _, scale in groups] + [1.0]
        filters = [lambda name, _, fits=fits: fits(name) for fits, _ in groups]
        self.together = optim.MultiOptimizer([make() for _ in self.scales], filters)

    @property
    def state(self) -> Any:
        """Of all of them, as MLX has it."""
        return self.together.state

    @state.setter
    def state(self, state: Any) -> None:
        self.together.state = state

    def init(self, parameters: Any) -> None:
        """Fresh states for these parameters."""
        self.together.init(parameters)

    def fits(self, state: Any) -> bool:
        """Whether a state has the arrays that this one's has, after `init`."""
        found, own = (
            {name: getattr(value, "shape", ()) for name, value in tree_flatten(tree)}
            for tree in (state, self.state)
        )
        return found == own

    def set_rate(self, rate: float) -> None:
        """The rate of the next step; groups take their part of it."""
        for optimizer, scale in zip(self.together.optimizers, self.scales, strict=True):
            optimizer.learning_rate = mx.array(rate * scale)

    def apply(self, grads: Any, parameters: Any) -> Any:
        """Parameters after a step."""
        return self.together.apply_gradients(grads, parameters)


def _maker(kind: str, betas: tuple[float, float], decay: float) -> Callable[[], Any]:
    pair = list(betas)
    made: dict[str, Callable[[], Any]] = {
        "adamw": lambda: optim.AdamW(
            1e-3, betas=pair, eps=1e-8, weight_decay=decay, bias_correction=True
        ),
        "adam": lambda: optim.Adam(1e-3, betas=pair, eps=1e-8, bias_correction=True),
        # MM1's fine-tuning (section 5.1); with our schedule instead of its own.
        "adafactor": lambda: optim.Adafactor(
            1e-3, scale_parameter=False, relative_step=False, weight_decay=decay
        ),
        "lion": lambda: optim.Lion(1e-3, betas=pair, weight_decay=decay),
        "sgd": lambda: optim.SGD(1e-3, weight_decay=decay),
    }
    return made[kind]
