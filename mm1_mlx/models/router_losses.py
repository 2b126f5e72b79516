"""What trains a router: how full an expert may be, and the two losses.

MM1 (section 4) follows GShard and ST-MoE: load-balance loss 0.01, router z-loss 0.001.
"""

import mlx.core as mx


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
