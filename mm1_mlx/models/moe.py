"""A sparse feed-forward layer: the stacked experts, and the ways to apply them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.config import DecoderConfig
from mm1_mlx.kernels.expert_keys import row_numbers
from mm1_mlx.kernels.fused import on_cpu
from mm1_mlx.kernels.routed_experts import routed_experts
from mm1_mlx.models.layers import MLP, activation, gated_activation
from mm1_mlx.models.router import Router, by_expert, keys_of

# gather_qmm takes its grouped path from 4 rows per expert on (measured in MLX's
# sources): sorting costs six launches and pays only from there.
ROWS_PER_EXPERT_TO_SORT = 4
FEW_TOKENS = 64  # Experts.dense


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
        """E."""
        return self.weight.shape[0]

    # Under these names MLX's own quantized layers tell theirs.
    @property
    def group_size(self) -> int:
        """How many numbers share a scale."""
        return self._how["group_size"]

    @property
    def bits(self) -> int:
        """Of one number."""
        return self._how["bits"]

    @property
    def mode(self) -> str:
        """Of mx.quantize, such as "affine"."""
        return self._how["mode"]

    def whole(self) -> mx.array:
        """The numbers that it stands for. (E, out, in)."""
        return mx.dequantize(self.weight, self.scales, self.get("biases"), **self._how)

    def gather(
        self,
        x: mx.array,
        indices: mx.array,
        sorted_: bool,
        rows: mx.array | None = None,
    ) -> mx.array:
        """Rows times the matrices of their experts; see `gather`."""
        return mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"), lhs_indices=rows,
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
        self._name, self._act = act, activation(act)
        self._gate = gated_activation(act)

    @property
    def num_experts(self) -> int:
        """E."""
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
        return self._gate(gate, up)

    def routed(
        self,
        x: mx.array,
        weights: mx.array,
        experts: mx.array,
        residual: mx.array | None = None,
        keys: mx.array | None = None,
    ) -> mx.array:
        """Only the chosen experts run; dropless.

        Shapes:
            x: (T, D); weights, experts: (T, K); residual: (T, D), added
            keys: (T, K), see Routes; with them rows go through expert by expert
            returns: (T, D)
        """
        T, K = experts.shape
        D, dtype = x.shape[-1], x.dtype
        if on_cpu():  # gather_mm is float32 only on MLX's CPU back end
            x = x.astype(mx.float32)
        indices = mx.stop_gradient(experts.reshape(-1))  # (T*K,)
        up_bias, down_bias = self._biases()
        back = rows = None
        if keys is None and self.sorts(T * K):
            keys = keys_of(experts)
        if sorted_ := keys is not None:
            indices, tokens, order = by_expert(keys)
            back, x = mx.argsort(order), x[tokens]
        else:
            rows = row_numbers(T, K)
        # Reshaped, since MLX copies rows that [:, None] has made for its products.
        x = x.reshape(-1, 1, D)
        hidden = gather(x, self._up(), indices, sorted_, up_bias, rows)
        hidden = self._activate(hidden)  # (T*K, 1, F)
        out = gather(hidden, self.down_proj, indices, sorted_, down_bias)
        if back is not None:
            out = out[back]
        out, weights = out.reshape(T, K, D), weights.reshape(T, 1, K).astype(out.dtype)
        if residual is None or residual.dtype != out.dtype:
            out = (weights @ out).reshape(T, D).astype(dtype)
            return out if residual is None else residual + out
        return mx.addmm(residual.reshape(T, 1, D), weights, out).reshape(T, D)

    def dense(
        self,
        x: mx.array,
        weights: mx.array,
        experts: mx.array,
    ) -> mx.array:
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
        down = down.swapaxes(1, 2)  # (E, F, D)
        if T > FEW_TOKENS:
            out = hidden.reshape(T, -1) @ down.reshape(-1, x.shape[-1])
        else:  # that would copy all weights for them
            out = (hidden.swapaxes(0, 1) @ down).sum(axis=0)
        if down_bias is not None:
            out = out + share @ down_bias
        return out

    def sorts(self, rows: int) -> bool:
        """Whether so many rows are worth an order, see ROWS_PER_EXPERT_TO_SORT."""
        return rows >= ROWS_PER_EXPERT_TO_SORT * self.num_experts

    def __call__(
        self,
        x: mx.array,
        weights: mx.array,
        experts: mx.array,
        residual: mx.array | None = None,
        keys: mx.array | None = None,
    ) -> mx.array:
        plain = all(bias is None for bias in self._biases())
        if plain and not self.training and keys is None:
            given = (x, self._up(), self.down_proj, weights, experts)
            out = routed_experts(*given, self._name, self._gated)
            if out is not None:
                return out if residual is None else residual + out
        few = self.num_experts <= 4 * experts.shape[-1]
        plain = isinstance(self.down_proj, mx.array) and isinstance(
            self._up(), mx.array
        )
        if on_cpu() and plain and few and x.dtype == mx.float32 and x.shape[0] > 1:
            out = self.dense(x, weights, experts)
            return out if residual is None else residual + out
        return self.routed(x, weights, experts, residual, keys)


def gather(
    x: mx.array,
    stack: Any,
    indices: mx.array,
    sorted_: bool,
    bias: mx.array | None = None,
    rows: mx.array | None = None,
) -> mx.array:
    """Rows times the matrices of their experts, and their biases.

    stack: (E, out, in), or what knows how to do it itself: a QuantizedStack, or one
    with an adapter. bias: (E, out). sorted_: whether the indices are, which is faster
    for many rows of each expert; then rows is None.

    Shapes:
        x: (R, 1, in)
        indices: (M,) experts; rows: (M,) which row of x each takes; None: M = R, in
            order
        returns: (M, 1, out)
    """
    if rows is None and not sorted_:
        rows = row_numbers(x.shape[0], 1)
    if not isinstance(stack, mx.array):
        out = stack.gather(x, indices, sorted_, rows)
    else:
        if on_cpu():
            stack = stack.astype(mx.float32)
        out = mx.gather_mm(
            x,
            stack.swapaxes(-1, -2),
            lhs_indices=rows,
            rhs_indices=indices,
            sorted_indices=sorted_,
        )
    return out if bias is None else out + bias[indices][:, None].astype(out.dtype)


class MoE(nn.Module):
    """A sparse feed-forward layer, optionally with a shared expert (Qwen1.5-MoE).

    Shapes:
        x: (..., D)
        router_outputs: a list that receives (logits (T, E), experts (T, K))
        is_token: (...) bool, False on padding, or None
        residual: (..., D), what is added to the result, or None
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
        residual: mx.array | None = None,
    ) -> mx.array:
        shape = x.shape
        flat = x.reshape(-1, x.shape[-1])  # (T, D)
        if is_token is not None:
            is_token = is_token.reshape(-1)
        in_order = self.experts.sorts(flat.shape[0] * self.router.top_k)
        weights, experts, logits, keys = self.router.route(
            flat, is_token, in_order=in_order
        )
        if router_outputs is not None:
            router_outputs.append((logits, experts))
        if residual is not None:
            residual = residual.reshape(flat.shape)
        if self.group is None and not self._shared:
            out = self.experts(flat, weights, experts, residual, keys)
            return out.reshape(shape)
        out = self.experts(flat, weights, experts, None, keys)
        if self._shared:
            gate = mx.sigmoid(self.shared_expert_gate(flat))
            out = out + gate * self.shared_expert(flat)
        if self.group is not None:  # every expert's inner width is divided
            out = mx.distributed.all_sum(out, group=self.group)
        return (out if residual is None else residual + out).reshape(shape)
