"""States of chosen places alone, as a loss asks for them: those of the whole."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE, random_array, small_config

from helpers import assert_close
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.walk import LayerWalk
from mm1_mlx.training.next_token import next_token_loss

PARALLEL = replace(DENSE, parallel_block=True)
DENSE_END = replace(
    SPARSE, moe_config=replace(SPARSE.moe_config, first_sparse_layer=1, sparse_step=2)
)
KINDS = {"dense": DENSE, "sparse": SPARSE, "parallel": PARALLEL, "both": DENSE_END}
ROWS = mx.array([3, 17, 17, 20, 0])  # flat places of (2, 11); one twice


def model_of(kind):
    mx.random.seed(0)
    return MM1(small_config(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("walks", [False, True], ids=["plain", "walk"])
def test_they_are_those_of_the_whole(kind, training, walks):
    model = model_of(kind)
    model.train(training)
    ids = mx.array(np.random.default_rng(0).integers(4, 90, (2, 11)))
    walk = {"walk": LayerWalk()} if walks else {}
    whole = model.decoder.hidden(ids)
    chosen = model.decoder.hidden(ids, rows=ROWS, **walk)
    assert chosen.shape == (5, 32)
    assert_close(chosen, whole.reshape(-1, 32)[ROWS], atol=1e-5)  # float32


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_loss_and_its_gradients_are_those_of_the_whole(kind):
    """By the library's loss, and by hand from the logits of all places."""
    model = model_of(kind)
    pairs = Target(pairs=PairSettings(rank=2, scale=2.0))
    parts = {"attention": pairs, "experts" if kind == "sparse" else "mlp": pairs}
    adapt(model, Plan(parts=parts))
    for name, module in model.named_modules():
        if name.rpartition(".pairs.")[1]:  # zeros would hide lora_a
            module.lora_b = 0.1 * random_array(*module.lora_b.shape)
    model.train()
    rng = np.random.default_rng(0)
    ids = mx.array(rng.integers(4, 90, (2, 11)).astype(np.int32))
    target = mx.array(rng.integers(4, 90, 5).astype(np.int32))
    weight = mx.array([1.0, 1.0, 0.5, 1.0, 0.0])
    zeros = mx.zeros((2, 11), mx.int32)
    position = mx.broadcast_to(mx.arange(11), (2, 11))
    document = mx.broadcast_to(mx.arange(2)[:, None], (2, 11))

    def ours(parameters):
        model.update(parameters)
        batch = (ids, document, zeros, position, None, ROWS, target, weight)
        loss, _ = next_token_loss(model, *batch, router_losses=False)
        return loss

    def by_hand(parameters):
        model.update(parameters)
        logits = model.decoder(ids).reshape(22, -1)[ROWS]
        losses = mx.logsumexp(logits, axis=-1) - logits[mx.arange(5), target]
        return (losses * weight).sum() / weight.sum()

    parameters = model.trainable_parameters()
    found, mine = mx.value_and_grad(ours)(parameters)
    wanted, theirs = mx.value_and_grad(by_hand)(parameters)
    assert_close(found, wanted, atol=1e-5)  # float32
    expected = dict(tree_flatten(theirs))
    for name, grad in tree_flatten(mine):
        assert_close(grad, expected[name], atol=2e-5)
    assert max(mx.abs(grad).max().item() for grad in expected.values()) > 1e-3
