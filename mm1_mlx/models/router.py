"""Which experts a token goes to: top-k, its shares, and the experts' reading order.

MM1 (section 4) follows GShard: top-2. What it leaves open follows Apple's axlearn
(common/mixture_of_experts.py).
"""

from operator import is_
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import MoEConfig
from mm1_mlx.kernels.expert_keys import keys_of, place_bits
from mm1_mlx.kernels.fused import fused, tied
from mm1_mlx.kernels.router import logits_of, route, route_tokens, top_k
from mm1_mlx.models.router_losses import limit_capacity


@fused
def _from_places(
    keys: mx.array,
    low: mx.array,
    both: mx.array,
    choices: mx.array,
    tokens: mx.array,
    times: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    expert, token = keys >> both, (keys >> low) & tokens
    return expert, token, tied(token * times + (keys & choices), expert)


def by_expert(keys: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Experts in order, whose token each is, and from which place it comes.

    (T, K) keys of Routes -> three of (T*K,) uint32.
    """
    T, K = keys.shape
    low, both = place_bits(T, K)
    numbers = [low, both, (1 << low) - 1, (1 << (both - low)) - 1, K]
    return _from_places(
        mx.sort(keys.reshape(-1)), *(mx.array(n, mx.uint32) for n in numbers)
    )


class Routes(NamedTuple):
    """Which experts each token goes to.

    Shapes:
        weights: (T, K); experts: (T, K) uint32; logits: (T, E) float32
        keys: (T, K) uint32, or None: expert, token and choice as one number, which
            sorted give the experts' order
    """

    weights: mx.array
    experts: mx.array
    logits: mx.array
    keys: mx.array | None


class Router(nn.Module):
    """Chooses K experts per token, in float32 whatever the model's type.

    To answer it keeps a float32 copy of a weight of another type. A weight that is put
    in its place is noticed, but not what is written into it (weight[3] = 0): call the
    model's eval() after that.

    Shapes:
        x: (T, D)
        is_token: (T,) bool, False on padding, or None; capacity alone asks for it
        returns: weights (T, K) float32, experts (T, K) uint32, logits (T, E) float32
    """

    def __init__(self, dims: int, config: MoEConfig):
        super().__init__()
        self.weight = mx.random.normal((config.num_local_experts, dims)) * dims**-0.5
        self._config = config
        # What the float32 weight was made of, and it.
        self._wide: tuple[list[mx.array], mx.array] | None = None

    @property
    def top_k(self) -> int:
        """How many experts a token goes to."""
        return self._config.num_experts_per_tok

    def quantize(self, how: dict) -> None:
        """Hold a packed weight, as some files of MLX's own tools have it."""
        self.weight, self.scales, *biases = mx.quantize(self.weight, **how)
        if biases:
            self.biases = biases[0]
        self._how = how

    def _set_training_mode(self, mode: bool) -> None:  # what train() and eval() call
        super()._set_training_mode(mode)
        self._wide = None
        if not mode and ("scales" in self or self.weight.dtype != mx.float32):
            self._wide = self._made_of(), self._whole()
            mx.eval(self._wide[1])

    def _weight(self) -> mx.array:
        """(E, D) float32; kept to answer, where MLX would make it for every token."""
        if self._wide is not None and all(map(is_, self._wide[0], self._made_of())):
            return self._wide[1]
        return self._whole()

    def _made_of(self) -> list[mx.array]:
        return [self[name] for name in ("weight", "scales", "biases") if name in self]

    def _whole(self) -> mx.array:
        if "scales" not in self:
            return self.weight.astype(mx.float32)
        whole = mx.dequantize(self.weight, self.scales, self.get("biases"), **self._how)
        return whole.astype(mx.float32)

    def route(
        self, x: mx.array, is_token: mx.array | None = None, *, in_order: bool = False
    ) -> "Routes":
        """What is chosen, with weights in x's type. in_order: also in which order the
        experts read it, see Routes."""
        c = self._config
        if self.training:
            weights, experts, logits = self(x, is_token)
            keys = keys_of(experts) if in_order else None
            return Routes(weights.astype(x.dtype), experts, logits, keys)
        k, plain = c.num_experts_per_tok, "scales" not in self
        if plain and not in_order:
            found = route_tokens(
                x,
                self.weight,
                k,
                c.norm_topk_prob,
                dtype=x.dtype,
                wide=self._weight(),
                trainable=True,
            )
            return Routes(*found, None)
        logits = logits_of(x, self._weight())
        weights, experts, keys = route(
            logits,
            k,
            c.norm_topk_prob,
            dtype=x.dtype,
            keyed=in_order,
            trainable=True,
        )
        return Routes(weights, experts, logits, keys)

    def __call__(
        self, x: mx.array, is_token: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        c = self._config
        logits = x.astype(mx.float32) @ self._weight().T
        experts = top_k(mx.stop_gradient(logits), c.num_experts_per_tok)
        best = mx.take_along_axis(logits, experts, axis=-1)
        if c.norm_topk_prob:  # the same as softmax over all, then dividing by the sum
            weights = mx.softmax(best, axis=-1)
        else:
            weights = mx.exp(best - mx.logsumexp(logits, axis=-1, keepdims=True))
        if self.training and c.capacity_factor is not None:
            weights = limit_capacity(
                weights, experts, c.num_local_experts, c.capacity_factor, is_token
            )
        return weights, experts, logits
