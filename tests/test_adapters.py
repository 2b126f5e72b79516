"""Adapters: their layers against mlx-lm's and by hand, and what is trained."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE, VISION, random_array, small_model, step

from helpers import assert_close, need
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack, PairSettings, Rows
from mm1_mlx.adapters.targets import (
    PARTS,
    Plan,
    Target,
    adapt,
    part_of_weight,
    summary,
    table,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.moe import Experts, QuantizedStack
from mm1_mlx.quantization.modules import quantize_model

LORA = PairSettings(rank=4, scale=2.0)
DORA = PairSettings(rank=4, scale=2.0, dora=True)
QKV = [Rows("q_proj", 0, 32), Rows("k_proj", 32, 48), Rows("v_proj", 48, 64)]


def filled(layer, *names: str):
    """The layer with pairs of these projections that add something."""
    for k, name in enumerate(names):
        layer.add_pair(name, mx.random.key(k))
        pair = layer.pairs[name]
        pair.lora_b = mx.random.normal(pair.lora_b.shape, key=mx.random.key(50 + k))
        if "m" in pair:
            pair.m = pair.m * 1.1
    return layer


# --- Linear layers -------------------------------------------------------------------


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "packed"])
def test_a_linear_layer_is_mlx_lms(settings, bits):
    """Of one projection: the same forward and gradients as mlx-lm's own layer."""
    lora = need("mlx_lm.tuner.lora")
    dora = need("mlx_lm.tuner.dora")
    base = nn.Linear(64, 32)
    if bits:
        base = nn.QuantizedLinear.from_linear(base, 32, bits)
    ours = filled(AdaptedLinear(base, [Rows("o_proj", 0, 32)], settings), "o_proj")
    kind = dora.DoRALinear if settings.dora else lora.LoRALinear
    theirs = kind.from_base(base, r=4, scale=2.0)
    pair = ours.pairs["o_proj"]
    theirs.lora_a, theirs.lora_b = pair.lora_a, pair.lora_b
    if settings.dora:
        theirs.m = pair.m
    x = random_array(3, 5, 64)
    assert_close(ours(x), theirs(x), atol=1e-5)

    def loss(module, x):
        return mx.square(module(x)).mean()

    for module in (ours, theirs):
        module.freeze()
    ours.pairs["o_proj"].unfreeze()
    theirs.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    _, mine = nn.value_and_grad(ours, loss)(ours, x)
    _, known = nn.value_and_grad(theirs, loss)(theirs, x)
    mine = mine["pairs"]["o_proj"]
    for name in ("lora_a", "lora_b", *(("m",) if settings.dora else ())):
        assert_close(mine[name], known[name], atol=1e-5)


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
def test_projections_of_a_fused_weight_are_apart(settings):
    """q and v with pairs, k without: as three layers beside each other."""
    base = nn.Linear(24, 64)
    layer = filled(AdaptedLinear(base, QKV, settings), "q_proj", "v_proj")
    x = random_array(2, 3, 24)
    outputs = []
    for part in QKV:
        alone = nn.Linear(24, part.stop - part.start)
        alone.weight = base.weight[part.start : part.stop]
        alone.bias = base.bias[part.start : part.stop]
        rows = [Rows(part.name, 0, part.stop - part.start)]
        one = AdaptedLinear(alone, rows, settings)
        if part.name in layer.pairs:
            one.pairs[part.name] = layer.pairs[part.name]
        outputs.append(one(x))
    assert_close(layer(x), mx.concatenate(outputs, axis=-1), atol=1e-5)


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 8], ids=["plain", "packed"])
def test_merged_weights_give_the_same(settings, bits):
    base = nn.Linear(64, 64)
    if bits:
        base = nn.QuantizedLinear.from_linear(base, 64, bits)
    layer = filled(AdaptedLinear(base, QKV, settings), "q_proj", "v_proj")
    plain = nn.Linear(64, 64)
    plain.weight, plain.bias = layer.merged(), base.bias
    x = random_array(5, 64)
    assert_close(layer(x), plain(x), atol=2e-5)


@pytest.mark.parametrize(
    "names", [("q_proj", "k_proj", "v_proj"), ("v_proj",)], ids=len
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_training_is_the_formula(names, dtype, compiled):
    """Values, and the gradients of x and of all pairs, of different ranks."""
    base = nn.Linear(24, 64)
    base.set_dtype(dtype)
    layer = filled(AdaptedLinear(base, QKV, LORA), *names)
    pair = layer.pairs["v_proj"]
    pair.lora_a, pair.lora_b = random_array(24, 7), random_array(7, 16, seed=1)
    for one in layer.pairs.values():
        one.unfreeze()
    x, into = random_array(2, 5, 24).astype(dtype), random_array(2, 5, 64, seed=2)

    def formula(x):
        y, deltas = layer.base(x), []
        for rows in QKV:
            found = layer.pairs.get(rows.name)
            size = rows.stop - rows.start
            delta = mx.zeros((*x.shape[:-1], size)) if found is None else None
            if found is not None:
                delta = 2.0 * (x @ found.lora_a @ found.lora_b)
            deltas.append(delta)
        return y + mx.concatenate(deltas, axis=-1).astype(dtype)

    def both(function):
        def loss(parameters, x):
            layer.update(parameters)
            return (function(x) * into).sum()

        found = mx.value_and_grad(loss, argnums=(0, 1))
        kept = layer.trainable_parameters()
        value, grads = (mx.compile(found) if compiled else found)(kept, x)
        layer.update(kept)  # in place of what was traced
        return value, grads[1], dict(tree_flatten(grads[0]))

    layer.train()
    mine, theirs = both(layer), both(formula)
    # 16 bits: sums are rounded in another order
    tolerance = 1e-4 if dtype == mx.float32 else 0.5
    assert_close(mine[0], theirs[0], atol=tolerance)
    assert_close(mine[1], theirs[1], atol=tolerance / 10, rtol=0.02)
    assert len(mine[2]) == 2 * len(names)
    for name, grad in theirs[2].items():
        assert_close(mine[2][name], grad, atol=tolerance, rtol=0.02)


def test_a_fresh_adapter_changes_nothing():
    base = nn.Linear(24, 64)
    layer = AdaptedLinear(base, QKV, DORA)
    x = random_array(2, 3, 24)
    assert_close(layer(x), base(x), atol=0)
    layer.add_pair("k_proj", mx.random.key(0))
    assert_close(layer(x), base(x), atol=2e-6)  # m / |W| is 1 up to rounding


def test_dropout_has_its_own_key():
    settings = PairSettings(rank=4, scale=2.0, dropout=0.5)
    layer = filled(AdaptedLinear(nn.Linear(24, 64), QKV, settings), "q_proj")
    x = random_array(200, 24)
    layer.eval()
    whole = layer(x)
    layer.train()
    assert mx.array_equal(layer(x), whole)  # without a key nothing is dropped
    layer.set_dropout_key(mx.random.key(1))
    first = layer(x)
    assert not mx.allclose(first, whole)
    assert mx.array_equal(layer(x), first)  # the same key, the same numbers
    layer.set_dropout_key(mx.random.key(2))
    assert not mx.allclose(layer(x), first)
    means = []
    for seed in range(300):
        layer.set_dropout_key(mx.random.key(seed))
        means.append(layer(x[:1]))
    spread = mx.abs(whole[:1]).max()
    assert_close(mx.stack(means).mean(axis=0), whole[:1], atol=0.25 * float(spread))


# --- Experts -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_with_pairs_are_experts_with_other_weights(settings, packed, tokens):
    experts = Experts(4, 64, 96, "silu", gated=True)
    if packed:
        how = {"group_size": 32, "bits": 8, "mode": "affine"}
        experts.quantize(dict.fromkeys(experts.stacks, how))
    plain = Experts(4, 64, 96, "silu", gated=True)
    rows = {
        "gate_up_proj": [Rows("gate_proj", 0, 96), Rows("up_proj", 96, 192)],
        "down_proj": [Rows("down_proj", 0, 64)],
    }
    for name, parts in rows.items():
        stack = filled(AdaptedStack(experts.pop(name), parts, settings), parts[0].name)
        plain[name] = stack.merged()
        setattr(experts, name, stack)
    rng = np.random.default_rng(0)
    x = random_array(tokens, 64)
    chosen = mx.array(rng.integers(0, 4, (tokens, 2)), mx.uint32)
    chosen[:, 1] = (chosen[:, 0] + 1) % 4
    share = mx.softmax(random_array(tokens, 2), axis=-1)
    known = plain.routed(x, share, chosen)
    scale = float(mx.abs(known).max())
    assert_close(experts(x, share, chosen), known, atol=2e-5 * max(scale, 1))
    assert experts.num_experts == 4


def test_pairs_of_experts_are_mlx_lms():
    lora = need("mlx_lm.tuner.lora")
    layers = need("mlx_lm.models.switch_layers")
    base = layers.SwitchLinear(24, 32, 4, bias=False)
    ours = filled(AdaptedStack(base.weight, [Rows("up_proj", 0, 32)], LORA), "up_proj")
    theirs = lora.LoRASwitchLinear.from_base(base, r=4, scale=2.0)
    pair = ours.pairs["up_proj"]
    theirs.lora_a, theirs.lora_b = pair.lora_a, pair.lora_b
    x, indices = random_array(6, 1, 24), mx.array([0, 3, 1, 1, 2, 0])
    wanted = theirs(x[:, None], indices[:, None])[:, 0]
    assert_close(ours.gather(x, indices, False), wanted, atol=1e-5)


def test_gradients_of_experts_pairs_are_those_of_their_weights():
    """d/dB of a pair = scale * (d/dW) A^T, expert by expert."""
    stack = mx.random.normal((4, 32, 24), key=mx.random.key(9))
    layer = filled(AdaptedStack(stack, [Rows("up_proj", 0, 32)], LORA), "up_proj")
    x, indices = random_array(7, 1, 24), mx.array([0, 0, 1, 2, 2, 2, 3])
    target = random_array(7, 1, 32)

    def by_pair(lora_b):
        layer.pairs["up_proj"].lora_b = lora_b
        return mx.square(layer.gather(x, indices, False) - target).sum()

    def by_weight(weight):
        y = (weight[indices] @ x.swapaxes(1, 2)).swapaxes(1, 2)
        return mx.square(y - target).sum()

    pair = layer.pairs["up_proj"]
    lora_a, lora_b, whole = pair.lora_a, pair.lora_b, layer.merged()
    found = mx.grad(by_pair)(lora_b)
    wanted = 2.0 * mx.grad(by_weight)(whole) @ lora_a.swapaxes(1, 2)
    assert_close(found, wanted, atol=1e-3 * float(mx.abs(wanted).max()))


# --- What is trained -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, part",
    [
        ("vision.patch_embed.weight", "encoder"),
        ("vision.layers.0.norm1.bias", "encoder"),
        ("vision.position_embedding", "encoder"),
        ("connector.stage1.0.conv2.weight", "connector"),
        ("tile_connector.readout.0.bias", "connector"),
        ("image_newline", "connector"),
        ("decoder.embed_tokens.weight", "embeddings"),
        ("decoder.lm_head.weight", "head"),
        ("decoder.lm_head.bias", "head"),
        ("decoder.layers.0.attn.qkv_proj.weight", "attention"),
        ("decoder.layers.0.attn.qkv_proj.bias", "attention"),
        ("decoder.layers.0.attn.q_norm.weight", "norms"),
        ("decoder.layers.0.norm1.weight", "norms"),
        ("decoder.norm.bias", "norms"),
        ("decoder.layers.0.mlp.down_proj.weight", "mlp"),
        ("decoder.layers.1.moe.experts.gate_up_proj", "experts"),
        ("decoder.layers.1.moe.experts.gate_up_proj.weight", "experts"),
        ("decoder.layers.1.moe.experts.down_proj_bias", "experts"),
        ("decoder.layers.1.moe.router.weight", "router"),
        ("decoder.layers.1.moe.shared_expert_gate.weight", "router"),
        ("decoder.layers.1.moe.shared_expert.down_proj.weight", "mlp"),
    ],
)
def test_parts_of_weights(name, part):
    assert part_of_weight(name) == part


def arrays_of(model) -> dict[str, mx.array]:
    """Every weight under the name that it has without adapters, and every pair."""
    flat = tree_flatten(model.parameters())
    return {name.replace(".base.", "."): mx.array(value) for name, value in flat}


@pytest.mark.parametrize("how", ["lora", "dora", "full"])
@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_moves(part, how):
    whole = how == "full"
    if not whole and part in ("embeddings", "router", "norms"):
        with pytest.raises(ConfigError, match=rf"'{part}' takes no low-rank pairs"):
            Plan(parts={part: Target(pairs=LORA)})
        return
    pairs = None if whole else DORA if how == "dora" else LORA
    model = small_model(SPARSE)
    adapt(model, Plan(parts={part: Target(pairs=pairs)}))
    model.train()
    before = arrays_of(model)
    step(model)
    after = arrays_of(model)
    moved = {n for n in before if not mx.array_equal(before[n], after[n])}
    assert moved, "nothing moved"
    for name in moved:
        path, inside, _ = name.partition(".pairs.")
        assert part_of_weight(path + ".weight" if inside else name) == part, name
        assert bool(inside) != whole
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    idle = {n for n in trained if n.replace(".base.", ".") not in moved}
    # Layers beyond the one that is read, and experts that nobody chose, do not move.
    assert len(idle) < len(trained) / 2, sorted(idle)[:5]


@pytest.mark.parametrize(
    "plan, layers",
    [
        (Plan(parts={"attention": Target(pairs=LORA)}, layers=1), {2}),
        (Plan(parts={"attention": Target(pairs=LORA)}, layers=2, first=True), {0, 1}),
        (Plan(parts={"attention": Target(pairs=LORA)}), {0, 1, 2}),
    ],
)
def test_first_and_last_layers(plan, layers):
    model = small_model(SPARSE)
    adapt(model, plan)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert {int(name.split(".")[2]) for name in names} == layers


@pytest.mark.parametrize("pairs", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("feature_layer, layers", [(-1, {0, 1}), (-2, {0})])
def test_blocks_after_the_features_are_left_out(feature_layer, layers, pairs):
    """LLaVA reads the last but one: what comes after it has no gradient."""
    vision = replace(VISION, feature_layer=feature_layer)
    model = small_model(DENSE, vision_config=vision)
    adapt(model, Plan(parts={"encoder": Target(pairs=pairs)}))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    found = {int(n.split(".")[2]) for n in names if n.startswith("vision.layers.")}
    assert found == layers


def test_named_projections():
    model = small_model(SPARSE)
    target = Target(pairs=LORA)
    plan = Plan(parts={"attention": target}, projections=("q_proj", "v_proj"))
    adapt(model, plan)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert {name.split(".")[-2] for name in names} == {"q_proj", "v_proj"}


def test_a_projection_that_is_not_there():
    """One wrong name among right ones is refused, too, and what there is is named."""
    target = Target(pairs=LORA)
    plan = Plan(parts={"attention": target}, projections=("q_proj", "w_proj"))
    message = r"no projection 'w_proj'.*\(attention\).*: k_proj, o_proj, q_proj, v_proj"
    with pytest.raises(ConfigError, match=message):
        adapt(small_model(SPARSE), plan)
    both = {"attention": target, "experts": target, "connector": Target()}
    adapt(small_model(SPARSE), Plan(parts=both, projections=("q_proj", "up_proj")))
    plan = Plan(parts={"attention": target}, projections=("up_proj",))
    with pytest.raises(ConfigError, match=r"no projection 'up_proj'"):
        adapt(small_model(SPARSE), plan)
    plan = Plan(parts={"attention": Target()}, projections=("q_proj",))
    with pytest.raises(ConfigError, match=r"no projection 'q_proj'.* has: none\."):
        adapt(small_model(SPARSE), plan)


@pytest.mark.parametrize(
    "part, most, first",
    [
        ("attention", 16, r"k_proj of decoder\.layers\.\d\.attn\.qkv_proj is 16 x 32"),
        ("experts", 24, r"gate_proj of .*experts\.gate_up_proj is 24 x 32"),
    ],
)
def test_a_rank_that_is_more_than_a_matrix_has(part, most, first):
    def target(rank):
        return Plan(parts={part: Target(pairs=PairSettings(rank=rank))})

    adapt(small_model(SPARSE), target(most))
    message = rf"The rank is {most + 1}, but {first} and can have {most} at most"
    with pytest.raises(ConfigError, match=message):
        adapt(small_model(SPARSE), target(most + 1))


def test_packed_weights_take_pairs_but_are_not_trained_whole():
    model = small_model(SPARSE)
    how = {"group_size": 32, "bits": 4, "mode": "affine"}

    def settings_of(path: str) -> dict | None:
        fits = path.startswith("decoder.layers") and "down_proj" not in path
        return how if fits and "router" not in path else None

    quantize_model(model, settings_of)
    experts = model.decoder.layers[1].moe.experts
    assert isinstance(experts.gate_up_proj, QuantizedStack)
    with pytest.raises(ConfigError, match=r"is quantized: it cannot be trained whole"):
        adapt(model, Plan(parts={"attention": Target()}))
    targets = {part: Target(pairs=LORA) for part in ("attention", "mlp", "experts")}
    adapt(model, Plan(parts=targets))
    before = arrays_of(model)
    model.train()
    step(model)
    after = arrays_of(model)
    moved = [n for n in before if not mx.array_equal(before[n], after[n])]
    assert moved and all(".pairs." in name for name in moved)


def test_a_plan_that_names_nothing():
    with pytest.raises(ConfigError, match=r"no part 'brain'.*attention"):
        Plan(parts={"brain": Target()})
    with pytest.raises(ConfigError, match="the plan names no weight"):
        adapt(small_model(SPARSE), Plan())
    with pytest.raises(ConfigError, match=r"no part 'experts' to train. It has: encod"):
        adapt(small_model(DENSE), Plan(parts={"experts": Target(pairs=LORA)}))


def test_the_table_adds_up():
    model = small_model(SPARSE)
    adapt(
        model,
        Plan(parts={"attention": Target(pairs=LORA), "connector": Target()}),
    )
    lines = {line.part: line for line in summary(model, model.config)}
    assert lines["connector"].trained == lines["connector"].total
    assert lines["connector"].how == "full" and lines["mlp"].how == "frozen"
    assert lines["attention"].how == "LoRA, rank 4, scale 2"
    every = sum(v.size for _, v in tree_flatten(small_model(SPARSE).parameters()))
    assert sum(line.total for line in lines.values()) == every
    trained = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
    assert f"{trained:,}" in table(list(lines.values())).splitlines()[-1]
