"""Gradients of fine-tuning against torch's, on the same weights, pairs and samples."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from torch_tuning import Twins, gradient_of, write_data

from helpers import assert_close, need
from mm1_mlx.adapters.folder import adapted_layers

torch = need("torch")
need("transformers")

# Of an array's norm, and of its largest gradient. 4e-6 is the most that was seen:
# float32 sums in another order.
RELATIVE = 1e-5
DENSE, SPARSE = ("attention", "mlp"), ("attention", "experts")
WHOLE = ("attention", "embeddings", "head", "norms")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def our_gradients(trainer) -> tuple[dict, dict]:
    stage = trainer.stage
    stage.module.train()
    batches, _ = stage.host_step(0, 0, 1)
    grads, metrics = trainer._gradients(stage.module.trainable_parameters(), batches)
    return dict(tree_flatten(grads)), metrics


def assert_same(ours: dict, theirs: dict, unread: tuple[str, ...] = ()) -> None:
    """Gradients by name. unread: starts of the names that no answer depends on."""
    assert ours.keys() == theirs.keys() and ours
    for name, wanted in theirs.items():
        found = np.array(ours[name])
        largest, norm = np.abs(wanted).max(), np.linalg.norm(wanted)
        assert (largest == 0) == name.startswith(unread), name
        assert_close(found, wanted, atol=RELATIVE * largest, what=name)
        assert np.linalg.norm(found - wanted) <= RELATIVE * norm, name


def check(twins: Twins, trainer, unread: tuple[str, ...] = ()) -> None:
    """The loss of a batch, and the gradient of every trained array."""
    grads, metrics = our_gradients(trainer)
    loss = twins.theirs(**twins.batch(trainer.stage, 0)).loss
    assert_close(metrics["text"], loss, atol=0, rtol=1e-6)
    loss.backward()
    assert_same(grads, twins.as_ours(gradient_of), unread)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("pack", [False, True], ids=["rows", "packed_rows"])
def test_pairs_beside_a_llama(data, tmp_path, kind, pack):
    need("peft")
    twins = Twins("Llama", data, tmp_path)
    twins.train((*DENSE, "head"), kind=kind)
    check(twins, twins.trainer(tmp_path, pack=pack, max_tokens=128))


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("pack", [False, True], ids=["rows", "packed_rows"])
def test_pairs_beside_a_mixtral(data, tmp_path, kind, pack):
    """PEFT has a pair for each expert, too."""
    need("peft")
    twins = Twins("Mixtral", data, tmp_path)
    twins.train(SPARSE, kind=kind)
    check(twins, twins.trainer(tmp_path, pack=pack, max_tokens=128))


@pytest.mark.parametrize(
    "name, parts, kind",
    [("Llama", DENSE, "lora"), ("Llama", DENSE, "dora"), ("Mixtral", SPARSE, "lora")],
)
def test_pairs_beside_weights_of_4_bits(data, tmp_path, name, parts, kind):
    """Against torch with the numbers that the packed weights stand for."""
    need("peft")
    twins = Twins(name, data, tmp_path, packed=True)
    twins.train(parts, kind=kind)
    if name == "Llama":
        assert "scales" in twins.ours.decoder.layers[0].attn.qkv_proj.base
    check(twins, twins.trainer(tmp_path))


def test_dora_of_a_mixtrals_attention_and_its_whole_router(data, tmp_path):
    need("peft")
    twins = Twins("Mixtral", data, tmp_path)
    twins.train(["attention"], kind="dora", whole=["router"])
    check(twins, twins.trainer(tmp_path))


def test_dora_of_experts(data, tmp_path):
    """PEFT has none. W' = m (W + s B A) / |W + s B A|, the length a constant (section
    4.3 of DoRA), expert by expert, in torch's autograd."""
    twins = Twins("Mixtral", data, tmp_path)
    twins.train(["experts"], kind="dora", peft=False)
    leaves, weights = {}, {}
    for path, layer in adapted_layers(twins.ours).items():
        halves = []
        for rows in layer.projections:
            start = f"{path}.pairs.{rows.name}."
            pair = {
                key: torch.tensor(np.array(value), requires_grad=True)
                for key, value in layer.pairs[rows.name].items()
            }
            leaves |= {start + key: leaf for key, leaf in pair.items()}
            frozen = torch.tensor(np.array(layer.weight[:, rows.start : rows.stop]))
            whole = frozen + layer.settings.scale * pair["lora_b"] @ pair["lora_a"]
            length = whole.norm(dim=-1, keepdim=True).detach()
            halves.append(pair["m"][..., None] * whole / length)
        name = path.replace("decoder.", "model.").replace(".moe.", ".mlp.")
        weights[name] = torch.cat(halves, dim=1)
    trainer = twins.trainer(tmp_path)
    grads, metrics = our_gradients(trainer)
    batch = twins.batch(trainer.stage, 0)
    loss = torch.func.functional_call(twins.theirs, weights, kwargs=batch).loss
    assert_close(metrics["text"], loss, atol=0, rtol=1e-6)
    loss.backward()
    assert_same(grads, {name: leaf.grad.numpy() for name, leaf in leaves.items()})


@pytest.mark.parametrize(
    "name, parts",
    [("Llama", ("mlp",)), ("Mixtral", ("experts", "router"))],
    ids=["llama", "mixtral"],
)
def test_full_training(data, tmp_path, name, parts):
    twins = Twins(name, data, tmp_path)
    twins.train(whole=(*WHOLE, *parts))
    trained = {name for name, _ in tree_flatten(twins.ours.trainable_parameters())}
    assert trained == {name for name, _ in tree_flatten(twins.ours.parameters())}
    check(twins, twins.trainer(tmp_path))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_llava(data, tmp_path, kind):
    """Through pictures: the connector whole, pairs beside the encoder."""
    need("peft")
    twins = Twins("Llava", data, tmp_path)
    twins.train(["encoder"], kind=kind, whole=["connector"])
    trainer = twins.trainer(tmp_path, "images.jsonl")
    check(twins, trainer, ("vision.layers.2.",))  # LLaVA reads the states before it


def test_router_losses_of_a_mixtral(data, tmp_path):
    """Load balance and z-loss, added up over layers.

    transformers' own load_balancing_loss_func is ours where it is given one layer and
    top_k=1: it counts all choices (top_k where the load is even, not 1) and multiplies
    the means over all layers, which does not see that layers are uneven in turns.
    """
    module = need("transformers.models.mixtral.modeling_mixtral")
    twins = Twins("Mixtral", data, tmp_path)
    twins.train(whole=("experts", "router", "attention"))
    moe = twins.ours.config.text_config.moe_config
    assert (moe.router_aux_loss_coef, moe.router_z_loss_coef) == (0.05, 0.001)
    # A router's loss is no sum over tokens: micro-batches have others of their own.
    trainer = twins.trainer(tmp_path, router_losses=True, accumulate=1)
    grads, metrics = our_gradients(trainer)
    batch = twins.batch(trainer.stage, 0)
    out = twins.theirs(**batch, output_router_logits=True)
    mask = batch["attention_mask"]
    balances = [
        module.load_balancing_loss_func((logits,), 4, 1, mask)
        for logits in out.router_logits
    ]
    read = mask.reshape(-1) > 0
    zs = [(logits.logsumexp(-1)[read] ** 2).mean() for logits in out.router_logits]
    assert_close(metrics["balance"], sum(balances) / 2, atol=1e-6)
    assert_close(metrics["z"], sum(zs) / 2, atol=0, rtol=1e-6)
    text = out.loss - moe.router_aux_loss_coef * out.aux_loss
    assert_close(metrics["text"], text, atol=0, rtol=1e-6)
    (text + 0.05 * sum(balances) + 0.001 * sum(zs)).backward()
    assert_same(grads, twins.as_ours(gradient_of))


def test_a_wrong_scale_would_be_seen(data, tmp_path):
    need("peft")
    twins = Twins("Llama", data, tmp_path)
    twins.train(DENSE)
    layer = twins.ours.decoder.layers[1].attn.qkv_proj
    pair = layer.pairs["v_proj"]
    pair.lora_b = pair.lora_b * mx.array(1 + 1e-3)
    with pytest.raises(pytest.fail.Exception, match=r"v_proj|differ"):
        check(twins, twins.trainer(tmp_path))
