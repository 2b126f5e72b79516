"""Adapters on disk, and fused into the weights."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE, random_array, small_model, step

from helpers import assert_close
from mm1_mlx import load_adapters, use_adapter
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.fuse import fuse_adapter, without_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.checkpoint.folder import write_folder
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_adapter, load_model
from mm1_mlx.quantization.modules import quantize_model

LORA = PairSettings(rank=4, scale=2.0)
DORA = PairSettings(rank=4, scale=2.0, dora=True)
EVERY = {part: Target(pairs=LORA) for part in ("attention", "mlp", "experts", "head")}
EVERY |= {"connector": Target(pairs=PairSettings(rank=2, scale=3.0, dora=True))}
EVERY |= {"encoder": Target(pairs=PairSettings(rank=3, scale=0.5)), "norms": Target()}
IDS = mx.array([[5, 9, 17, 33, 8]])


def trained_model(seed: int = 0, plan: Plan | None = None):
    """A model whose adapter says something; and its plan."""
    plan = plan or Plan(parts=EVERY)
    model = small_model(SPARSE, seed=seed)
    adapt(model, plan)
    model.train()
    step(model)
    model.eval()
    return model, plan


def saved(model, plan, folder):
    write_adapter(folder, adapter_weights(model), adapter_config(plan, "small"))
    return folder


def answers(model) -> mx.array:
    size = model.config.vision_config.image_size
    slots = [model.config.image_token_id] * model.config.tokens_per_image
    return model(mx.array([[5, 9, *slots, 17]]), random_array(1, size, size, 3))


def test_an_adapter_survives_its_folder(tmp_path):
    model, plan = trained_model()
    folder = saved(model, plan, tmp_path / "adapter")
    again = small_model(SPARSE, seed=0)
    assert not mx.allclose(answers(again), answers(model), atol=1e-3)
    load_adapter(again, folder)
    assert_close(answers(again), answers(model), atol=0)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    names = set(mx.load(str(folder / "adapters.safetensors")))
    assert "decoder.layers.0.attn.q_proj.lora_a" in names
    assert "decoder.layers.1.moe.experts.gate_proj.lora_b" in names
    assert "connector.readout.0.m" in names and "decoder.norm.weight" in names
    assert not any(".base." in name or ".pairs." in name for name in names)
    saved(model, plan, folder)  # over the old one
    assert without_adapter(again) > 5


def test_a_processor_reads_as_the_adapter_in_use(tmp_path):
    model, plan = trained_model()
    weights, reader = adapter_weights(model), SimpleNamespace()
    write_adapter(tmp_path / "a", weights, adapter_config(plan, "x", "dynamic", 3))
    write_adapter(tmp_path / "b", weights, adapter_config(plan, "x", 32))
    write_adapter(tmp_path / "c", weights, adapter_config(plan, "x"))

    def found():
        return reader.resolution, reader.max_tiles

    load_adapter(small_model(SPARSE), tmp_path / "a", reader)
    assert found() == ("dynamic", 3)
    both = small_model(SPARSE)
    load_adapters(both, {name: tmp_path / name for name in "abc"})
    for name, expected in [("b", (32, None)), ("c", (None, None)), ("a", found())]:
        use_adapter(both, name, reader)
        assert found() == expected
    use_adapter(both, None, reader)
    assert found() == (None, None)


@pytest.mark.parametrize(
    "key, value",
    [("resolution", "large"), ("resolution", True), ("max_tiles", "native"),
     ("max_tiles", 0)],
)  # fmt: skip
def test_a_resolution_that_is_none(tmp_path, key, value):
    model, plan = trained_model()
    config = adapter_config(plan, "x", **{key: value})
    write_adapter(tmp_path, adapter_weights(model), config)
    with pytest.raises(CheckpointError, match=f"{key} of .* cannot be {value!r}"):
        load_adapter(small_model(SPARSE), tmp_path)


def test_an_adapter_of_another_model(tmp_path):
    folder = saved(*trained_model(), tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"does not fit this model: \d+ of its wei"
    ):
        load_adapter(small_model(DENSE), folder)
    other = small_model(replace(SPARSE, hidden_size=64, num_attention_heads=8))
    with pytest.raises(CheckpointError, match=r"the adapter is of another model"):
        load_adapter(other, folder)


def respell(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def settings(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        parts = config["mm1_mlx"]["parts"]
        for part in parts:
            if isinstance(parts[part], dict):
                parts[part] |= values
        path.write_text(json.dumps(config))

    return change


def reshape(kind, how):
    def change(folder):
        path = str(folder / "adapters.safetensors")
        arrays = mx.load(path)
        made = {n: how(a) if n.endswith(kind) else a for n, a in arrays.items()}
        mx.eval(made)
        mx.save_safetensors(path, made)

    return change


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: shutil.rmtree(f), r"There is no adapter folder"),
        (lambda f: (f / "adapters.safetensors").unlink(), r"has no adapters\.safetens"),
        (
            lambda f: (f / "adapter_config.json").unlink(),
            r"has no adapter_config\.json",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), r"is not JSON"),
        (
            lambda f: (f / "adapters.safetensors").write_bytes(b"\x08" + b"\0" * 7),
            r"adapters\.safetensors",
        ),
        (respell(mm1_mlx={"parts": [1]}), r"parts of adapter_config\.json is \[1\]"),
        (respell(mm1_mlx={}, lora_parameters="big"), r"lora_parameters of .* 'big'"),
        (respell(mm1_mlx={}, lora_parameters={"scale": "2"}), r"scale of .* '2'"),
        (respell(mm1_mlx={}, lora_parameters={}), r"does not say the scale of its"),
        (settings(rank=10**400), r"rank of adapter_config\.json cannot be 1000"),
        (settings(alpha=3), r"a setting 'alpha', which is not known"),
        (settings(scale=math.nan), r"scale of adapter_config\.json cannot be nan"),
        (settings(rank=True), r"rank of adapter_config\.json cannot be True"),
        (settings(rank=5), r"pairs of rank \d, but adapter_config\.json says 5"),
        (
            respell(mm1_mlx={}, lora_parameters={"rank": 16, "scale": 2.0}),
            r"pairs of rank \d, but adapter_config\.json says 16: one of the two",
        ),
        (reshape("lora_a", lambda a: a.flatten()), r"is of another model"),
        (reshape("m", lambda m: m[:1]), r"is of another model"),
    ],
)
def test_a_broken_adapter_folder(spoil, message, tmp_path):
    folder = saved(*trained_model(), tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(small_model(SPARSE), folder)


def test_a_rank_that_is_not_said_is_that_of_the_arrays(tmp_path):
    """Nothing of what an adapter does depends on it."""
    plan = Plan(parts={"attention": Target(pairs=LORA), "experts": Target(pairs=LORA)})
    model, _ = trained_model(plan=plan)
    folder = saved(model, plan, tmp_path / "adapter")
    respell(mm1_mlx={}, lora_parameters={"scale": 2.0})(folder)
    again = small_model(SPARSE)
    load_adapter(again, folder)
    assert_close(answers(again), answers(model), atol=0)


def test_where_an_adapter_may_be_written(tmp_path):
    model, plan = trained_model()
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"is no adapter folder"):
        saved(model, plan, tmp_path)
    with pytest.raises(CheckpointError, match=r"is a file"):
        saved(model, plan, tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_fused_model_answers_as_with_its_adapter(packed):
    plan = Plan(parts={k: t for k, t in EVERY.items() if k != "norms"})
    model = small_model(SPARSE)
    if packed:
        how = {"group_size": 32, "bits": 8, "mode": "affine"}

        def settings_of(path: str) -> dict | None:
            own = path.startswith("decoder.layers") and "router" not in path
            return how if own and "down_proj" not in path else None

        quantize_model(model, settings_of)
    adapt(model, plan)
    model.train()
    step(model)
    model.eval()
    wanted = answers(model)
    assert fuse_adapter(model, dequantize=packed) > 5
    assert not any(".pairs." in name for name, _ in tree_flatten(model.parameters()))
    assert_close(answers(model), wanted, atol=1e-4 * float(mx.abs(wanted).max()))


def test_fusing_into_more_bits(tmp_path):
    """4 bits round most of what was learned off; 8 keep it, and a folder says so."""
    targets = {part: Target(pairs=LORA) for part in ("attention", "mlp", "experts")}
    how = {"group_size": 32, "bits": 4, "mode": "affine"}

    def settings_of(path: str) -> dict | None:
        fits = path.endswith(("qkv_proj", "gate_up_proj"))  # rows of 32 numbers
        return how if fits and path.startswith("decoder.") else None

    def made():
        model = small_model(SPARSE)
        quantize_model(model, settings_of)
        model.config = replace(model.config, quantization=dict(how))
        adapt(model, Plan(parts=targets))
        model.train()
        for _ in range(3):
            step(model)
        model.eval()
        return model

    wanted = answers(made())
    errors = {}
    for bits in (None, 8):
        model = made()
        fuse_adapter(model, bits=bits)
        own = [v for v in model.config.quantization.values() if isinstance(v, dict)]
        assert own == [how | {"bits": 8}] * (6 if bits else 0)
        write_folder(
            tmp_path / str(bits), model.config, dict(tree_flatten(model.parameters()))
        )
        again = load_model(tmp_path / str(bits))
        assert_close(answers(again), answers(model), atol=0)
        errors[bits] = float(mx.abs(answers(again) - wanted).max())
    assert errors[8] < 0.2 * errors[None]


def test_fusing_packs_again(tmp_path):
    model = small_model(SPARSE)
    how = {"group_size": 32, "bits": 8, "mode": "affine"}

    def settings_of(path: str) -> dict | None:
        fits = path.startswith("decoder.") and path.endswith(
            ("qkv_proj", "gate_up_proj")
        )
        return how if fits else None

    quantize_model(model, settings_of)
    before = {n: a.dtype for n, a in tree_flatten(model.parameters())}
    targets = {part: Target(pairs=LORA) for part in ("attention", "mlp", "experts")}
    adapt(model, Plan(parts=targets))
    model.train()
    step(model)
    model.eval()
    wanted = answers(model)
    fuse_adapter(model)
    assert {n: a.dtype for n, a in tree_flatten(model.parameters())} == before
    error = mx.abs(answers(model) - wanted).max() / mx.abs(wanted).max()
    assert 0 < error < 0.05  # 8 bits round what the adapter added


def test_weights_below_pairs_stay_where_norms_are_trained():
    """They lie one level deeper then, and were once taken for norms."""
    model = small_model(SPARSE)
    adapt(model, Plan(parts={"attention": Target(pairs=LORA), "norms": Target()}))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert not any(".base." in name for name in names)
