"""Mixture of experts: router, experts, and the two losses that train the router.

MM1 (section 4) follows GShard and ST-MoE: top-2, load-balance loss 0.01, router z-loss
0.001. What it leaves open follows Apple's axlearn (common/mixture_of_experts.py).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import DecoderConfig, MoEConfig
from mm1_mlx.models.layers import MLP, activation

# gather_qmm takes its grouped path from 4 rows per expert on (measured in MLX's
# sources): sorting costs six launches and pays only from there.
ROWS_PER_EXPERT_TO_SORT = 4


def top_k(logits: mx.array, k: int) -> mx.array:
    """The k largest logits' indices, largest first; ties go to the lower index.

    The order is exact on every back end: each logit and its index become one integer
    whose order is the wanted order, so no sort needs to be stable.

    Shapes:
        logits: (T, E) float32
        returns: (T, k) uint32
    """
    E = logits.shape[-1]
    if k == 1:
        return mx.argmax(logits, axis=-1, keepdims=True)
    bits = (logits + 0.0).view(mx.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    keys = ordered * E + mx.arange(E - 1, -1, -1, dtype=mx.int64)
    best = mx.sort(keys, axis=-1)[..., ::-1][..., :k]
    return (E - 1 - best % E).astype(mx.uint32)


def expert_capacity(tokens: mx.array, num_experts: int, factor: float) -> mx.array:
    """How many tokens an expert takes, of so many: axlearn's rule. () int32 -> ().

    int(tokens * factor / E), above 1 rounded up to a multiple of 4, and at least 1.
    (axlearn: common/mixture_of_experts.py, _compute_expert_capacity.)
    """
    share = mx.floor(tokens.astype(mx.float32) * factor / num_experts)
    rounded = (4 * mx.ceil(share / 4)).astype(mx.int32)
    return mx.where(share > 1, rounded, 1)


def limit_capacity(
    weights: mx.array,
    experts: mx.array,
    num_experts: int,
    factor: float,
    is_token: mx.array | None = None,
) -> mx.array:
    """Weights with zeros where an expert is full (axlearn's rule, for training).

    Each expert takes as many tokens as expert_capacity says. All first choices, in
    token order, take their places before any second choice does; what overflows loses
    that expert only. The remaining weights are not scaled up again. Ours: the whole
    batch is one group, and padding takes no place, gets no expert and does not count
    as tokens (axlearn's gating does not know padding).

    Shapes:
        weights, experts: (T, K)
        is_token: (T,) bool, False on padding; None: all are tokens
        returns: (T, K)
    """
    T, K = experts.shape
    tokens = mx.array(T) if is_token is None else is_token.sum()
    capacity = expert_capacity(tokens, num_experts, factor)
    chosen = experts.swapaxes(0, 1).reshape(-1, 1) == mx.arange(num_experts)
    if is_token is not None:
        chosen = chosen & mx.tile(is_token, K)[:, None]  # K times the T tokens
    place = mx.cumsum(chosen.astype(mx.int32), axis=0)  # (K*T, E), counts from 1
    own = mx.sum(mx.where(chosen, place, 0), axis=-1).reshape(K, T).swapaxes(0, 1)
    return mx.where((own > 0) & (own <= capacity), weights, 0.0)  # 0: padding


def _over_tokens(values: mx.array, is_token: mx.array | None) -> mx.array:
    """Mean over the first axis, padding left out."""
    if is_token is None:
        return values.mean(axis=0)
    kept = is_token.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
    return (values * kept).sum(axis=0) / mx.maximum(kept.sum(), 1)


def load_balance_loss(logits: mx.array, is_token: mx.array | None = None) -> mx.array:
    """E * sum over experts of (share of tokens whose first choice it is) * (mean gate).

    1 when the load is even, E when one expert takes all (axlearn's Top2Gating; GShard
    section 2.2). Not yet multiplied by its coefficient. transformers' function of this
    name is the same with one layer's logits and top_k=1; it counts every choice (K when
    even) and multiplies means over all layers, where ours is added up over layers.

    Shapes:
        logits: (T, E) router logits, float32
        is_token: (T,) bool, False on padding; None: all are tokens
        returns: () float32
    """
    E = logits.shape[-1]
    gates = mx.softmax(logits, axis=-1)
    first = mx.stop_gradient(mx.argmax(logits, axis=-1))
    share = _over_tokens((first[:, None] == mx.arange(E)).astype(gates.dtype), is_token)
    return E * (share * _over_tokens(gates, is_token)).sum()


def router_z_loss(logits: mx.array, is_token: mx.array | None = None) -> mx.array:
    """Mean of logsumexp(logits)^2 (ST-MoE section 3). (T, E) -> ()."""
    return _over_tokens(mx.square(mx.logsumexp(logits, axis=-1)), is_token)


def expert_load(
    experts: mx.array, num_experts: int, is_token: mx.array | None = None
) -> mx.array:
    """Share of the routed tokens that each expert gets; sums to 1. (T, K) -> (E,)."""
    chosen = (experts[..., None] == mx.arange(num_experts)).astype(mx.float32)
    return _over_tokens(chosen.mean(axis=1), is_token)


class Router(nn.Module):
    """Chooses K experts per token, in float32 whatever the model's type.

    Shapes:
        x: (T, D)
        is_token: (T,) bool, False on padding, or None; capacity alone asks for it
        returns: weights (T, K) float32, experts (T, K) uint32, logits (T, E) float32
    """

    def __init__(self, dims: int, config: MoEConfig):
        super().__init__()
        self.weight = mx.random.normal((config.num_local_experts, dims)) * dims**-0.5
        self._config = config

    def quantize(self, how: dict) -> None:
        """Hold a packed weight, as some files of MLX's own tools have it."""
        self.weight, self.scales, *biases = mx.quantize(self.weight, **how)
        if biases:
            self.biases = biases[0]
        self._how = how

    def _weight(self) -> mx.array:
        """(E, D) float32."""
        if "scales" not in self:
            return self.weight.astype(mx.float32)
        whole = mx.dequantize(self.weight, self.scales, self.get("biases"), **self._how)
        return whole.astype(mx.float32)

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


def _on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


class QuantizedStack(nn.Module):
    """One projection of all experts, quantized.

    Shapes:
        weight: (E, out, in * bits / 32) uint32; scales, biases: (E, out, in / group)
    """

    def __init__(
        self, stack: mx.array, group_size: int = 64, bits: int = 4, mode: str = "affine"
    ):
        super().__init__()
        self._how = {"group_size": group_size, "bits": bits, "mode": mode}
        self.weight, self.scales, *biases = mx.quantize(stack, **self._how)
        if biases:
            self.biases = biases[0]
        self.freeze()

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    # Under these names MLX's own quantized layers tell theirs.
    @property
    def group_size(self) -> int:
        return self._how["group_size"]

    @property
    def bits(self) -> int:
        return self._how["bits"]

    @property
    def mode(self) -> str:
        return self._how["mode"]

    def whole(self) -> mx.array:
        """The numbers that it stands for. (E, out, in)."""
        return mx.dequantize(self.weight, self.scales, self.get("biases"), **self._how)

    def gather(self, x: mx.array, indices: mx.array, sorted_: bool) -> mx.array:
        """Each row times the matrix of its expert. (R, 1, in) -> (R, 1, out)."""
        return mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"),
            rhs_indices=indices, transpose=True, sorted_indices=sorted_, **self._how,
        )  # fmt: skip


class Experts(nn.Module):
    """All experts' weights stacked, and the two ways to apply them.

    Shapes:
        gate_up_proj: (E, 2F, D), gate rows first; or up_proj (E, F, D)
        down_proj: (E, D, F)
        gate_up_proj_bias (E, 2F) or up_proj_bias (E, F), and down_proj_bias (E, D):
            only with bias=True (MoE-LLaVA's Phi-2)
    The first two may be a QuantizedStack of that shape; see `quantize`.
    """

    def __init__(
        self,
        num_experts: int,
        dims: int,
        hidden: int,
        act: str,
        *,
        gated: bool,
        bias: bool = False,
    ):
        super().__init__()
        scale = dims**-0.5
        rows = 2 * hidden if gated else hidden
        up = mx.random.uniform(-scale, scale, (num_experts, rows, dims))
        if gated:
            self.gate_up_proj = up
        else:
            self.up_proj = up
        scale = hidden**-0.5
        self.down_proj = mx.random.uniform(-scale, scale, (num_experts, dims, hidden))
        if bias:
            first = "gate_up_proj_bias" if gated else "up_proj_bias"
            self[first] = mx.zeros((num_experts, rows))
            self.down_proj_bias = mx.zeros((num_experts, dims))
        self._gated = gated
        self._act = activation(act)

    @property
    def num_experts(self) -> int:
        down = self.down_proj
        return down.shape[0] if isinstance(down, mx.array) else down.num_experts

    @property
    def stacks(self) -> tuple[str, str]:
        """The names of its weights."""
        return ("gate_up_proj" if self._gated else "up_proj", "down_proj")

    def quantize(self, settings: dict[str, dict]) -> None:
        """Quantize weights in place: name -> group_size, bits and mode."""
        for name, how in settings.items():
            stack = self.pop(name)
            setattr(self, name, QuantizedStack(stack, **how))

    def _up(self) -> "mx.array | QuantizedStack":
        return self.gate_up_proj if self._gated else self.up_proj

    def _biases(self) -> tuple[mx.array | None, mx.array | None]:
        first, last = self.stacks
        return self.get(f"{first}_bias"), self.get(f"{last}_bias")

    def _activate(self, hidden: mx.array) -> mx.array:
        if not self._gated:
            return self._act(hidden)
        gate, up = mx.split(hidden, 2, axis=-1)
        return self._act(gate) * up

    def routed(self, x: mx.array, weights: mx.array, experts: mx.array) -> mx.array:
        """Only the chosen experts run; dropless.

        Shapes:
            x: (T, D); weights, experts: (T, K)
            returns: (T, D)
        """
        T, K = experts.shape
        D, E, dtype = x.shape[-1], self.num_experts, x.dtype
        if _on_cpu():  # gather_mm is float32 only on MLX's CPU back end
            x = x.astype(mx.float32)
        order = None
        indices = mx.stop_gradient(experts.reshape(-1))  # (T*K,)
        if T * K >= ROWS_PER_EXPERT_TO_SORT * E:
            order = mx.argsort(indices)
            indices = indices[order]
            rows = x[order // K][:, None]  # (T*K, 1, D)
        else:
            rows = mx.broadcast_to(x[:, None], (T, K, D)).reshape(T * K, 1, D)
        sorted_ = order is not None
        up_bias, down_bias = self._biases()
        hidden = gather(rows, self._up(), indices, sorted_, up_bias)
        hidden = self._activate(hidden)
        out = gather(hidden, self.down_proj, indices, sorted_, down_bias)[:, 0]
        if order is not None:
            out = out[mx.argsort(order)]
        out = out.reshape(T, K, D)
        return (weights[:, None].astype(out.dtype) @ out)[:, 0].astype(dtype)

    def dense(self, x: mx.array, weights: mx.array, experts: mx.array) -> mx.array:
        """Every expert runs on every token, as one wide MLP, and unchosen ones weigh 0.

        E/K times the arithmetic, but two plain matmuls: on the CPU back end, where
        gather_mm goes row by row, faster for few experts. Same shapes as `routed`.
        """
        T, E = x.shape[0], self.num_experts
        chosen = experts[..., None] == mx.arange(E)  # (T, K, E)
        share = mx.where(chosen, weights[..., None], 0.0).sum(axis=1)  # (T, E)
        up, down = self._up(), self.down_proj
        assert isinstance(up, mx.array) and isinstance(down, mx.array)
        hidden = (x @ up.reshape(-1, up.shape[-1]).T).reshape(T, E, -1)
        up_bias, down_bias = self._biases()
        if up_bias is not None:
            hidden = hidden + up_bias
        share = share.astype(hidden.dtype)
        hidden = self._activate(hidden) * share[..., None]
        down = down.swapaxes(1, 2).reshape(-1, x.shape[-1])  # (E*F, D)
        out = hidden.reshape(T, -1) @ down
        return out if down_bias is None else out + share @ down_bias

    def __call__(self, x: mx.array, weights: mx.array, experts: mx.array) -> mx.array:
        few = self.num_experts <= 4 * experts.shape[-1]
        plain = isinstance(self.down_proj, mx.array) and isinstance(
            self._up(), mx.array
        )
        if _on_cpu() and plain and few and x.dtype == mx.float32 and x.shape[0] > 1:
            return self.dense(x, weights, experts)
        return self.routed(x, weights, experts)


def gather(
    x: mx.array,
    stack: Any,
    indices: mx.array,
    sorted_: bool,
    bias: mx.array | None = None,
) -> mx.array:
    """Each row times the matrix of its expert, and its bias. (R, 1, in) -> (R, 1, out).

    stack: (E, out, in), or what knows how to do it itself: a QuantizedStack, or one
    with an adapter. bias: (E, out).
    """
    if not isinstance(stack, mx.array):
        out = stack.gather(x, indices, sorted_)
    else:
        if _on_cpu():
            stack = stack.astype(mx.float32)
        out = mx.gather_mm(
            x, stack.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_
        )
    return out if bias is None else out + bias[indices][:, None].astype(out.dtype)


class MoE(nn.Module):
    """A sparse feed-forward layer, optionally with a shared expert (Qwen1.5-MoE).

    Shapes:
        x: (..., D)
        router_outputs: a list that receives (logits (T, E), experts (T, K))
        is_token: (...) bool, False on padding, or None
        returns: (..., D)
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        moe = config.moe_config
        assert moe is not None
        dims, act, gated = config.hidden_size, config.hidden_act, config.gated_mlp
        hidden = moe.moe_intermediate_size or config.intermediate_size
        bias = config.mlp_bias
        self.router = Router(dims, moe)
        self.experts = Experts(
            moe.num_local_experts, dims, hidden, act, gated=gated, bias=bias
        )
        self._shared = moe.shared_expert_intermediate_size > 0
        if self._shared:
            width = moe.shared_expert_intermediate_size
            self.shared_expert = MLP(dims, width, act, gated=gated)
            self.shared_expert_gate = nn.Linear(dims, 1, bias=False)
        self.group: mx.distributed.Group | None = None  # see models.sharding

    def __call__(
        self,
        x: mx.array,
        router_outputs: list | None = None,
        is_token: mx.array | None = None,
    ) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])  # (T, D)
        if is_token is not None:
            is_token = is_token.reshape(-1)
        weights, experts, logits = self.router(flat, is_token)
        if router_outputs is not None:
            router_outputs.append((logits, experts))
        out = self.experts(flat, weights, experts)
        if self._shared:
            gate = mx.sigmoid(self.shared_expert_gate(flat))
            out = out + gate * self.shared_expert(flat)
        if self.group is not None:  # every expert's inner width is divided
            out = mx.distributed.all_sum(out, group=self.group)
        return out.reshape(x.shape)
