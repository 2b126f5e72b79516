"""The loss in chunks of words, against the loss over whole logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from small import DENSE, random_array, small_decoder

from helpers import assert_close
from mm1_mlx.adapters.layers import AdaptedLinear, PairSettings, Rows
from mm1_mlx.training.losses import cross_entropy, output_layer

WORDS, WIDTH, STATES = 90, 64, 11
TARGET = mx.array(np.random.default_rng(3).integers(0, WORDS, STATES), mx.int32)


def heads() -> dict:
    plain = nn.Linear(WIDTH, WORDS, bias=False)
    biased = nn.Linear(WIDTH, WORDS)
    biased.bias = random_array(WORDS, seed=5)
    packed = nn.QuantizedLinear.from_linear(biased, 32, 4)
    found = {"plain": plain, "biased": biased, "packed": packed}
    for name, dora in (("lora", False), ("dora", True)):
        base = packed if dora else nn.Linear(WIDTH, WORDS)
        settings = PairSettings(rank=3, scale=2.0, dora=dora)
        layer = AdaptedLinear(base, [Rows("lm_head", 0, WORDS)], settings)
        layer.add_pair("lm_head", mx.random.key(0))
        pair = layer.pairs["lm_head"]
        pair.lora_b = 0.3 * mx.random.normal(pair.lora_b.shape, key=mx.random.key(1))
        found[name] = layer
    found["table"] = nn.Embedding(WORDS, WIDTH)
    return found


def whole_logits(head, states):
    return head.as_linear(states) if isinstance(head, nn.Embedding) else head(states)


@pytest.mark.parametrize("chunk", [1000, 90, 32, 7])
@pytest.mark.parametrize("kind", list(heads()))
def test_loss_and_gradients_are_those_of_whole_logits(kind, chunk):
    head, states = heads()[kind], random_array(STATES, WIDTH)
    weights = random_array(STATES, seed=9)

    def by_chunks(parameters, states):
        head.update(parameters)
        losses, _ = cross_entropy(states, TARGET, head, WORDS, chunk)
        return (losses * weights).sum()

    def by_all(parameters, states):
        head.update(parameters)
        losses = nn.losses.cross_entropy(whole_logits(head, states), TARGET)
        return (losses * weights).sum()

    parameters = head.trainable_parameters()
    losses, right = cross_entropy(states, TARGET, head, WORDS, chunk)
    logits = whole_logits(head, states)
    assert_close(losses, nn.losses.cross_entropy(logits, TARGET), atol=2e-5)
    assert right.tolist() == (mx.argmax(logits, axis=-1) == TARGET).tolist()
    found = mx.grad(by_chunks, argnums=(0, 1))(parameters, states)
    wanted = mx.grad(by_all, argnums=(0, 1))(parameters, states)
    assert_close(found[1], wanted[1], atol=2e-5)
    known = dict(tree_flatten(wanted[0]))
    for name, grad in tree_flatten(found[0]):
        assert_close(grad, known[name], atol=5e-5)
    assert known or kind == "packed"


def test_right_answers_are_counted():
    head = nn.Linear(4, 6, bias=False)
    head.weight = mx.eye(6)[:, :4]
    states = mx.eye(4) * 5
    _, right = cross_entropy(states, mx.array([0, 2, 2, 5]), head, 6, 2)
    assert right.tolist() == [True, False, True, False]


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoders_own_output_layer(tied):
    from dataclasses import replace

    decoder = small_decoder(replace(DENSE, tie_word_embeddings=tied))
    states = random_array(5, decoder.config.hidden_size)
    target = mx.array([1, 2, 3, 4, 5])
    losses, _ = cross_entropy(
        states, target, output_layer(decoder), decoder.config.vocab_size, 16
    )
    wanted = nn.losses.cross_entropy(decoder.head(states), target)
    assert_close(losses, wanted, atol=2e-5)


def test_logits_of_all_words_are_never_held():
    """Forwards and backwards at once less than one (M, V) array in float32."""
    states, words, width = 512, 20_000, 32
    head = nn.Linear(width, words, bias=False)
    head.freeze()
    x = random_array(states, width)
    target = mx.zeros((states,), mx.int32)
    mx.eval(head.parameters(), x, target)

    def peak(chunk: int) -> int:
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        value, grad = mx.value_and_grad(
            lambda x: cross_entropy(x, target, head, words, chunk)[0].mean()
        )(x)
        mx.eval(value, grad)
        return mx.get_peak_memory() - before

    whole = 4 * states * words
    assert peak(words) > 1.5 * whole
    assert peak(500) < 0.5 * whole


def test_trainable_parameters_stay_arrays():
    """mx.checkpoint traces them; afterwards the module has its own again."""
    head = nn.Linear(WIDTH, WORDS)
    before = tree_map(lambda a: a.tolist(), head.parameters())
    mx.eval(cross_entropy(random_array(STATES, WIDTH), TARGET, head, WORDS, 16)[0])
    assert tree_map(lambda a: a.tolist(), head.parameters()) == before
