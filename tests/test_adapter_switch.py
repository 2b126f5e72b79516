"""Several adapters beside each other: each answers as if it were alone, and so does the
base; nothing is copied, and no cache of one is read by another."""

import gc
import json
import threading

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE, random_array, small_model, step

from helpers import assert_equal
from mm1_mlx import drop_adapter, load_adapters, use_adapter
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.fuse import fuse_adapter, without_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.switch import AdapterMark
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.inference.generation import (
    batch_generate,
    generate,
    generate_step,
    stream_generate,
)
from mm1_mlx.inference.prompt_cache import load_cache, save_cache
from mm1_mlx.loading import load_adapter, save
from mm1_mlx.quantization.modules import quantize_model

LORA = Target(pairs=PairSettings(rank=4, scale=2.0))
DORA = Target(pairs=PairSettings(rank=3, scale=1.5, dora=True))
PLANS = {
    "cats": Plan(parts={"attention": LORA, "experts": LORA}),
    "art": Plan(
        parts={"attention": DORA, "connector": DORA, "encoder": LORA, "mlp": DORA},
        projections=None,
    ),
    "whole": Plan(parts={"connector": Target(), "norms": Target(), "experts": DORA}),
    "late": Plan(parts={"attention": LORA, "router": Target()}, layers=2),
}
HOW = {"group_size": 32, "bits": 8, "mode": "affine"}


def base_model(packed: bool = False):
    """A model with experts, its decoder's matrices in 8 bits where packed."""
    model = small_model(SPARSE)
    if packed:

        def settings_of(path: str) -> dict | None:
            fits = path.startswith("decoder.layers") and "router" not in path
            return HOW if fits and "down_proj" not in path else None

        quantize_model(model, settings_of)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "packed"])
def packed(request):
    return request.param


@pytest.fixture(scope="module")
def folders(packed, tmp_path_factory):
    """A trained adapter of every plan: name -> folder."""
    made = {}
    for number, (name, plan) in enumerate(PLANS.items()):
        model = base_model(packed)
        adapt(model, plan, seed=number)
        model.train()
        step(model)
        made[name] = tmp_path_factory.mktemp("adapters") / name
        weights = {
            name: 8 * array if name.endswith("lora_b") else array
            for name, array in adapter_weights(model).items()
        }
        write_adapter(made[name], weights, adapter_config(plan, "x"))
    return made


def logits(model) -> mx.array:
    slots = [model.config.image_token_id] * model.config.tokens_per_image
    return model(mx.array([[5, 9, *slots, 17, 33]]), random_array(1, 16, 16, 3))


def alone(folder, packed: bool):
    """The model with this adapter and no other."""
    model = base_model(packed)
    load_adapter(model, folder)
    return model


@pytest.fixture(scope="module")
def known(folders, packed):
    """What each gives alone; None: the base."""
    given = {name: logits(alone(folder, packed)) for name, folder in folders.items()}
    return given | {None: logits(base_model(packed))}


@pytest.fixture
def switched(folders, packed):
    """A model with all of them, none in use."""
    model = base_model(packed)
    load_adapters(model, folders)
    return model


# --- each as if it were alone --------------------------------------------------------


def test_each_is_what_it_is_alone_bit_for_bit(switched, known):
    for name in ("cats", "art", None, "whole", "late", "cats", "whole", "art", None):
        use_adapter(switched, name)
        assert switched.adapters.in_use == name
        assert_equal(logits(switched), known[name], what=str(name))
    values = list(known.values())
    for i, one in enumerate(values):
        assert not any(mx.allclose(one, other, atol=1e-4) for other in values[:i])


def test_answers_after_a_switch_are_the_other_adapters(
    switched, folders, packed, processor
):
    prompts, images = ["5 <image> 9", "17 33", "8 <image> 40 41"], [[1], None, [2]]

    def answers(model):
        one = generate(model, processor, prompts[0], images[0], max_tokens=8)
        rows = batch_generate(model, processor, prompts, images, max_tokens=8)
        return [one.token_ids, *(row.token_ids for row in rows)]

    wanted = {name: answers(alone(folder, packed)) for name, folder in folders.items()}
    wanted[None] = answers(base_model(packed))
    assert len({str(tokens) for tokens in wanted.values()}) == len(wanted)
    for name in ("art", "cats", None, "late", "whole", "art"):
        use_adapter(switched, name)
        assert answers(switched) == wanted[name], name


def test_in_16_bits(folders, packed):
    model, one = base_model(packed), base_model(packed)
    for each in (model, one):
        each.set_dtype(mx.bfloat16)
    load_adapters(model, folders)
    use_adapter(model, "cats")
    use_adapter(model, "whole")
    load_adapter(one, folders["whole"])
    assert_equal(logits(model), logits(one))


def test_loaded_switched_and_asked_in_other_threads(folders, packed, known):
    """In MLX, what is left lazy in one thread cannot be computed in another."""
    model, given = base_model(packed), []
    mx.eval(model.parameters())
    for call in (
        lambda: load_adapters(model, folders),
        lambda: use_adapter(model, "art"),
        lambda: given.append(logits(model)) or mx.eval(given),
    ):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert_equal(given[0], known["art"])


def test_a_model_in_training_stays_so(switched, known):
    switched.train()
    use_adapter(switched, "cats")
    assert switched.decoder.layers[0].attn.qkv_proj.training
    switched.eval()
    assert_equal(logits(switched), known["cats"])


# --- memory --------------------------------------------------------------------------


def test_the_base_is_there_once(switched, folders):
    before = {name: id(array) for name, array in tree_flatten(switched.parameters())}
    use_adapter(switched, "cats")
    during = {id(array) for _, array in tree_flatten(switched.parameters())}
    assert set(before.values()) <= during  # cats trains no weight of the base
    for name in ("whole", "art", "late", None):
        use_adapter(switched, name)
    after = {name: id(array) for name, array in tree_flatten(switched.parameters())}
    assert after == before


def stored_bytes(folder) -> int:
    return sum(a.nbytes for a in mx.load(str(folder / "adapters.safetensors")).values())


def test_bytes(folders, packed):
    """In use: the adapters, and what is stacked of the one in use."""
    model = base_model(packed)
    mx.eval(model.parameters())
    base = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    logits(model)
    gc.collect()
    start = mx.get_active_memory()
    load_adapters(model, folders)
    held = sum(stored_bytes(folder) for folder in folders.values())
    assert 0 < held < 1.5 * base  # so that a second base would be seen below
    slack = 256 * 1024 if mx.metal.is_available() else 16 * 1024  # buffers' rounding
    assert mx.get_active_memory() - start < held + slack
    for name in ("whole", "cats", "art", "late", "whole", None):
        use_adapter(model, name)
        stacked = 3 * stored_bytes(folders[name]) if name else 0
        assert mx.get_active_memory() - start < held + stacked + slack
    for name in folders:
        drop_adapter(model, name)
    gc.collect()
    assert mx.get_active_memory() - start < slack


# --- caches --------------------------------------------------------------------------

IDS = mx.array([[1, 5, 17, 33, 8]])


def filled(model, **settings):
    cache = model.make_cache(**settings)
    model.decoder.hidden(IDS, cache)
    return cache


def test_a_cache_of_another_adapter_is_refused(switched):
    use_adapter(switched, "cats")
    cache = filled(switched)
    list(generate_step(switched, IDS, cache=cache, max_tokens=2))  # goes on
    use_adapter(switched, "late")
    message = r"begun with the adapter 'cats', but the adapter 'late' is in use now"
    with pytest.raises(MM1Error, match=message):
        next(generate_step(switched, IDS, cache=cache, max_tokens=2))
    with pytest.raises(MM1Error, match=message):
        switched(IDS, cache=cache)
    use_adapter(switched, None)
    with pytest.raises(MM1Error, match=r"'cats', but the base model is in use now"):
        switched.decoder(IDS, cache)
    plain = filled(switched)
    use_adapter(switched, "cats")
    switched.decoder(IDS, cache)  # its own again
    quantized = [entry.to_quantized(32, 8) for entry in cache]
    with pytest.raises(MM1Error, match=r"begun with the base model, but the adapt"):
        switched.decoder(IDS, plain)
    use_adapter(switched, None)
    switched.decoder(IDS, plain)
    with pytest.raises(MM1Error, match=r"begun with the adapter 'cats', but the base"):
        switched.decoder(IDS, quantized)


def test_an_empty_cache_belongs_to_nobody(switched):
    use_adapter(switched, "cats")
    cache = filled(switched)
    for entry in cache:
        entry.trim(5)
    use_adapter(switched, None)
    switched.decoder(IDS, cache)
    assert cache[0].adapter is None


def test_an_answer_that_was_begun_with_another_is_refused(switched, processor):
    use_adapter(switched, "cats")
    pieces = stream_generate(switched, processor, "5 9 17", max_tokens=9)
    next(pieces)
    use_adapter(switched, "art")
    with pytest.raises(MM1Error, match=r"answer was begun with the adapter 'cats'"):
        list(pieces)


def test_a_saved_cache_knows_its_adapter(switched, folders, packed, tmp_path):
    use_adapter(switched, "cats")
    save_cache(tmp_path / "c.safetensors", filled(switched))
    cache, _ = load_cache(tmp_path / "c.safetensors")
    use_adapter(switched, "art")
    with pytest.raises(MM1Error, match=r"begun with the adapter 'cats'"):
        switched.decoder(IDS, cache)
    # By the weights, not the name: another name for the same, the same for others.
    same, other = base_model(packed), base_model(packed)
    load_adapter(same, folders["cats"])
    same.decoder(IDS, load_cache(tmp_path / "c.safetensors")[0])
    load_adapters(other, {"cats": folders["late"]})
    for name in ("cats", None):
        use_adapter(other, name)
        with pytest.raises(MM1Error, match=r"begun with the adapter 'cats'"):
            other.decoder(IDS, load_cache(tmp_path / "c.safetensors")[0])


def test_a_cache_of_a_model_in_training_fits_no_other(packed, tmp_path):
    model = base_model(packed)
    adapt(model, PLANS["cats"])
    model.eval()
    save_cache(tmp_path / "c.safetensors", filled(model))
    another = base_model(packed)
    adapt(another, PLANS["cats"])
    for other in (another, base_model(packed)):
        with pytest.raises(MM1Error, match=r"begun with the adapter 'in training'"):
            other.decoder(IDS, load_cache(tmp_path / "c.safetensors")[0])


def test_marks_of_other_settings_differ(tmp_path, folders):
    """The same arrays at another scale are another adapter, and so are others."""
    weights = mx.load(str(folders["cats"] / "adapters.safetensors"))
    config = json.loads((folders["cats"] / "adapter_config.json").read_text())
    name = min(name for name in weights if name.endswith("lora_b"))
    marks = []
    for scale, more in ((2.0, 0), (3.0, 0), (2.0, 1e-6), (2.0, 0)):
        for part in config["mm1_mlx"]["parts"].values():
            part["scale"] = scale
        folder = tmp_path / f"{len(marks)}"
        write_adapter(folder, weights | {name: weights[name] + more}, config)
        model = base_model()
        load_adapter(model, folder)
        marks.append(model.decoder.adapter)
    assert marks[0] == marks[3] and marks[0] not in marks[1:3]
    assert AdapterMark("a", "1") == AdapterMark("b", "1") != AdapterMark("a", "2")


# --- what is refused leaves all as it was --------------------------------------------


def spoiled(folder, tmp_path):
    """An adapter whose last pair has another shape."""
    weights = mx.load(str(folder / "adapters.safetensors"))
    last = max(name for name in weights if name.endswith("lora_b"))
    config = json.loads((folder / "adapter_config.json").read_text())
    weights[last] = weights[last][..., :-1]
    write_adapter(tmp_path / "spoiled", weights, config)
    return tmp_path / "spoiled"


@pytest.mark.parametrize("in_use", [None, "cats", "whole"])
def test_an_adapter_of_another_model_changes_nothing(
    switched, folders, known, in_use, packed, tmp_path
):
    use_adapter(switched, in_use)
    names = [name for name, _ in tree_flatten(switched.parameters())]
    dense = small_model(DENSE)
    adapt(dense, Plan(parts={"mlp": LORA}))
    weights, config = adapter_weights(dense), adapter_config(Plan(), "x")
    foreign = tmp_path / "foreign"
    write_adapter(foreign, weights, config | {"lora_parameters": {"scale": 1.0}})
    bad = {
        foreign: r"does not fit this model: \d+ of its weights",
        spoiled(folders["cats"], tmp_path): r"is of another model",
        tmp_path / "none": r"There is no adapter folder",
    }
    for folder, message in bad.items():
        with pytest.raises(CheckpointError, match=message) as error:
            load_adapters(switched, {"good": folders["late"], "bad": folder})
        assert "\n" not in str(error.value)
        assert switched.adapters.names == tuple(folders)
        assert switched.adapters.in_use == in_use
        assert [name for name, _ in tree_flatten(switched.parameters())] == names
        assert_equal(logits(switched), known[in_use])
    single = base_model(packed)
    with pytest.raises(CheckpointError, match=r"is of another model"):
        load_adapter(single, tmp_path / "spoiled")
    assert_equal(logits(single), known[None])  # not half of it


def test_a_weight_is_trained_whole_or_with_pairs(folders, packed, tmp_path):
    """Not both: which of the two came first would not be known."""
    weights = mx.load(str(folders["cats"] / "adapters.safetensors"))
    config = json.loads((folders["cats"] / "adapter_config.json").read_text())
    model = base_model()
    name = "decoder.layers.0.attn.qkv_proj.weight"
    weights[name] = model.decoder.layers[0].attn.qkv_proj.weight
    write_adapter(tmp_path / "both", weights, config)
    with pytest.raises(CheckpointError, match=r"1 of its weights have no place here"):
        load_adapters(model, {"both": tmp_path / "both"})


def test_names(switched, folders):
    with pytest.raises(MM1Error, match=r"no adapter 'dogs' on this model. It has: 'ca"):
        use_adapter(switched, "dogs")
    with pytest.raises(MM1Error, match=r"There is no adapter 'dogs'"):
        drop_adapter(switched, "dogs")
    with pytest.raises(MM1Error, match=r"an adapter 'cats' already. Give another name"):
        load_adapters(switched, {"cats": folders["art"]})
    with pytest.raises(MM1Error, match=r"name is 3, but must be a text"):
        load_adapters(switched, {3: folders["art"]})
    with pytest.raises(MM1Error, match=r"name is '', but must be a text"):
        load_adapters(switched, {"": folders["art"]})
    with pytest.raises(MM1Error, match=r"must be folders by name, such as"):
        load_adapters(switched, str(folders["art"]))
    with pytest.raises(MM1Error, match=r"It has: none; load_adapters loads some"):
        use_adapter(base_model(), "cats")
    use_adapter(base_model(), None)  # is what it is


def test_more_may_come_and_go(packed, folders, known):
    model = base_model(packed)
    adapters = load_adapters(model, {"cats": folders["cats"]})
    use_adapter(model, "cats")
    assert load_adapters(model, {"art": folders["art"]}) is adapters
    assert adapters.names == ("cats", "art") and adapters.in_use == "cats"
    assert repr(adapters) == "Adapters(cats, art; in use: cats)"
    assert_equal(logits(model), known["cats"])
    drop_adapter(model, "cats")
    assert adapters.names == ("art",) and adapters.in_use is None
    assert_equal(logits(model), known[None])
    load_adapters(model, {"cats": folders["whole"]})  # the name is free again
    use_adapter(model, "cats")
    assert_equal(logits(model), known["whole"])


def test_an_adapter_for_good_and_several_do_not_mix(switched, folders, packed):
    for name in ("cats", "whole"):
        with pytest.raises(MM1Error, match=r"has the adapter '.*' for good"):
            load_adapters(alone(folders[name], packed), folders)
        with pytest.raises(CheckpointError, match=r"has an adapter already, so"):
            load_adapter(alone(folders[name], packed), folders["art"])
    for name in ("cats", None):
        use_adapter(switched, name)
        with pytest.raises(CheckpointError, match=r"has an adapter already, so"):
            load_adapter(switched, folders["art"])
    use_adapter(switched, "cats")
    with pytest.raises(ConfigError, match=r"has an adapter already, on it or beside"):
        adapt(switched, PLANS["cats"])
    use_adapter(switched, None)
    with pytest.raises(ConfigError, match=r"has an adapter already, on it or beside"):
        adapt(switched, PLANS["cats"])


def test_a_model_folder_holds_no_adapter(switched, processor, tmp_path):
    use_adapter(switched, "cats")
    with pytest.raises(CheckpointError, match=r"has an adapter on it, which a model"):
        save(switched, processor, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- fused, and taken off ------------------------------------------------------------


def test_fusing_takes_the_one_in_use(switched, folders, packed):
    use_adapter(switched, "cats")
    one = alone(folders["cats"], packed)
    assert fuse_adapter(switched) == fuse_adapter(one) > 0
    assert switched.adapters is None and switched.decoder.adapter is None
    assert_equal(logits(switched), logits(one))
    with pytest.raises(MM1Error, match=r"It has: none"):
        use_adapter(switched, "art")  # it was made for the weights before


def test_without_adapter_is_the_base(switched, known):
    use_adapter(switched, "whole")
    without_adapter(switched)
    assert_equal(logits(switched), known[None])


def test_a_bias_trained_whole_beside_pairs_is_not_lost(tmp_path):
    """It lies one level deeper below pairs, and was once dropped without a word."""
    import dataclasses

    text = dataclasses.replace(DENSE, qkv_bias=True)
    model = small_model(text)
    adapt(model, Plan(parts={"attention": LORA}))
    name = "decoder.layers.0.attn.qkv_proj.bias"
    bias = model.decoder.layers[0].attn.qkv_proj.base.bias
    weights = adapter_weights(model) | {name: bias + 1.0}
    plan = Plan(parts={"attention": LORA})
    write_adapter(tmp_path / "a", weights, adapter_config(plan, "x"))
    one = small_model(text)
    plain = logits(one)
    load_adapters(one, {"a": tmp_path / "a"})
    use_adapter(one, "a")
    wanted = small_model(text)
    wanted.decoder.layers[0].attn.qkv_proj.bias += 1.0
    assert_equal(logits(one), logits(wanted))
    use_adapter(one, None)
    assert_equal(logits(one), plain)
