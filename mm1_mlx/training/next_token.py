"""The next token's loss in packed rows: of pretraining and of fine-tuning."""

from typing import Any

import mlx.core as mx

from mm1_mlx.config import MoEConfig
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.router_losses import (
    expert_load,
    load_balance_loss,
    router_z_loss,
)
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.training.losses import cross_entropy, output_layer
from mm1_mlx.training.packing import may_see


def next_token_loss(
    model: MM1,
    ids: mx.array,
    document: mx.array,
    branch: mx.array,
    position: mx.array,
    features: mx.array | None,
    source: mx.array,
    target: mx.array,
    weight: mx.array,
    *,
    chunk: int | None = None,
    router_losses: bool = True,
    walk: LayerWalk | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Weighted mean of the targets' losses with the routers' own, and what is reported.

    features: image tokens in reading order, or None for text. chunk: words of the
    vocabulary at a time, None for all. router_losses: whether load balance and z-loss
    are added, by the model's own coefficients. walk: of a training step. Shapes as in
    training.packing.Batch.
    """
    text = model.config.text_config
    routed: list = []
    is_token = document >= 0  # the rest of a row is padding
    states = model.decoder.hidden(
        None,
        None,
        model.embed(ids, image_features=features),
        mask=may_see(document, branch, mx),
        positions=position,
        router_outputs=routed,
        is_token=is_token,
        walk=walk,
        rows=source,
    )
    vocab = text.vocab_size
    losses, right = cross_entropy(
        states, target, output_layer(model.decoder), vocab, chunk or vocab, walk
    )
    total = mx.maximum(weight.sum(), 1e-6)
    loss = (losses * weight).sum() / total
    counted = weight > 0
    metrics: dict[str, Any] = {
        "text": loss,
        "accuracy": (right & counted).sum() / mx.maximum(counted.sum(), 1),
        "row_tokens": is_token.sum().astype(mx.float32),
    }
    if routed and text.moe_config is not None:
        added, told = _routing(text.moe_config, routed, is_token.reshape(-1))
        for term in added if router_losses else ():
            loss = loss + term
        metrics |= told
    return loss, metrics


def _routing(
    moe: MoEConfig, routed: list, tokens: mx.array
) -> tuple[tuple[Any, Any], dict[str, mx.array]]:
    """The routers' two losses, by the model's coefficients, and what is reported.

    routed: router logits (T, E) and chosen experts (T, K) of each layer. tokens: (T,)
    bool. "expert_tokens", how many tokens each expert gets, is (layers, E).
    """
    layers = len(routed)
    balance = sum(load_balance_loss(x, tokens) for x, _ in routed) / layers
    z = sum(router_z_loss(x, tokens) for x, _ in routed) / layers
    added = (
        layers * moe.router_aux_loss_coef * balance,
        layers * moe.router_z_loss_coef * z,
    )
    load: Any = mx.stack(
        [expert_load(e, moe.num_local_experts, tokens) for _, e in routed]
    )
    told: dict[str, Any] = {"balance": balance, "z": z, "max_load": load.max()}
    return added, told | {"expert_tokens": load * tokens.sum()}
