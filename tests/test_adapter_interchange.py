"""Adapters of PEFT and mlx-lm without either: stored ones, refusals, the folder."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from adapter_kit import (
    DORA,
    LORA,
    WHOLE,
    answers,
    arrays_of,
    assert_answers,
    assert_same_arrays,
    converted,
    respell,
    trained,
)
from small import DENSE, small_model

from helpers import FIXTURES, assert_fails, run_cli, run_here
from mm1_mlx.adapters.folder import form_of, read_adapter
from mm1_mlx.convert.adapters.arrays import Pair, join_rows, split_rows
from mm1_mlx.convert.adapters.interchange import convert_adapter, source_of
from mm1_mlx.convert.adapters.peft_config import PeftConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_adapter, load_model, quantize
from mm1_mlx.quantization.recipes import Recipe

EMBEDDINGS = "base_model.model.model.embed_tokens"
STORED = FIXTURES / "adapters"
MODELS = {
    "peft4_mixtral": "decoder_mixtral",
    "peft5_mixtral": "decoder_mixtral",
    "peft5_llava": "llava15/hf5",
    "mlx_mixtral": "decoder_mixtral",
    "mlx_qwen2": "decoder_qwen2",
}


@pytest.mark.parametrize("stored", MODELS)
def test_a_stored_adapter_answers_as_its_original(stored, tmp_path, tmp_path_factory):
    model = converted(MODELS[stored], tmp_path_factory)
    wanted = np.load(STORED / stored / "logits.npy")
    assert np.abs(answers(model) - wanted).max() > 0.05 * np.abs(wanted).max()
    convert_adapter(STORED / stored, tmp_path / "ours", model)
    assert form_of(tmp_path / "ours") == "mm1"
    assert_answers(answers(model, tmp_path / "ours"), wanted)
    assert_answers(answers(model, STORED / stored), wanted)  # without the command


@pytest.mark.parametrize("stored", ["peft4_mixtral", "peft5_llava", "mlx_qwen2"])
def test_there_and_back_is_the_same(stored, tmp_path, tmp_path_factory):
    model = converted(MODELS[stored], tmp_path_factory)
    form = form_of(STORED / stored)
    version = 4 if "peft4" in stored else 5
    convert_adapter(STORED / stored, tmp_path / "ours", model)
    convert_adapter(
        tmp_path / "ours", tmp_path / "again", model, form, transformers=version
    )
    if stored != "peft5_llava":  # its scales differ inside a part: lora_b has them
        assert_same_arrays(STORED / stored, tmp_path / "again")
    wanted = np.load(STORED / stored / "logits.npy")
    assert_answers(answers(model, tmp_path / "again"), wanted)


def test_an_adapter_fits_the_public_checkpoint_itself(tmp_path, tmp_path_factory):
    """--model may be what was converted; its folder is read as the source says."""
    model = converted("decoder_mixtral", tmp_path_factory)
    for k, base in enumerate([model, FIXTURES / "decoder_mixtral"]):
        convert_adapter(STORED / "peft4_mixtral", tmp_path / str(k), base)
    assert_same_arrays(tmp_path / "0", tmp_path / "1")


def test_experts_have_one_pair_for_each_projection(tmp_path, tmp_path_factory):
    model = converted("decoder_mixtral", tmp_path_factory)
    convert_adapter(STORED / "peft4_mixtral", tmp_path / "ours", model)
    arrays = arrays_of(tmp_path / "ours")
    layer = "decoder.layers.1"
    shapes = {
        name.removeprefix(f"{layer}."): array.shape
        for name, array in arrays.items()
        if name.startswith(layer)
    }
    experts = {
        f"moe.experts.{name}_proj.{kind}": shape
        for name in ("gate", "up")
        for kind, shape in (
            ("lora_a", (4, 2, 64)),
            ("lora_b", (4, 64, 2)),
            ("m", (4, 64)),
        )
    }
    attention = {"lora_a": (64, 2), "lora_b": (2, 64), "m": (64,)}
    assert shapes == experts | {
        f"attn.q_proj.{kind}": shape for kind, shape in attention.items()
    }


def test_authors_modules_are_named_as_theirs(tmp_path, tmp_path_factory):
    """MoE-LLaVA: every expert is a module, the projector a list."""
    model = converted("moe_llava_stablelm", tmp_path_factory)
    parts = {"experts": DORA, "attention": DORA, "connector": WHOLE, "router": WHOLE}
    ours = trained(model, tmp_path / "ours", parts=parts)
    convert_adapter(ours, tmp_path / "peft", model, "peft")
    found = arrays_of(tmp_path / "peft")
    names = {name.removeprefix("base_model.model.") for name in found}
    each = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.3.up_proj"
    assert f"{each}.lora_A.weight" in names
    assert f"{each}.lora_magnitude_vector" in names
    assert "model.layers.0.mlp.deepspeed_moe.gate.wg.weight" in names
    assert "model.mm_projector.image_spatial_proj.2.bias" in names
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "model.mm_projector.image_spatial_proj.2" in config["modules_to_save"]
    convert_adapter(tmp_path / "peft", tmp_path / "again", model)
    assert_same_arrays(ours, tmp_path / "again")


def test_llava_is_named_as_its_version_has_it(tmp_path, tmp_path_factory):
    model = converted("llava15/hf5", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts={"mlp": LORA, "encoder": LORA})
    found = {}
    for version in (4, 5):
        out = tmp_path / str(version)
        convert_adapter(ours, out, model, "peft", transformers=version)
        found[version] = arrays_of(out).keys()
        convert_adapter(out, tmp_path / f"again{version}", model)
        assert_same_arrays(ours, tmp_path / f"again{version}")
    tower = "base_model.model.model.vision_tower."
    ends = "encoder.layers.0.mlp.fc1.lora_A.weight"
    assert {f"{tower}{ends}"} == {n for n in found[5] if n.endswith(ends)}
    assert {f"{tower}vision_model.{ends}"} == {n for n in found[4] if n.endswith(ends)}
    # before transformers 4.52; only read
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "4", old)
    arrays = {
        name.replace(
            "model.model.language_model.", "model.language_model.model."
        ).replace("model.model.vision", "model.vision"): mx.array(array)
        for name, array in arrays_of(old).items()
    }
    assert not any("base_model.model.model." in name for name in arrays)
    mx.save_safetensors(str(old / "adapter_model.safetensors"), arrays)
    convert_adapter(old, tmp_path / "again", model)
    assert_same_arrays(ours, tmp_path / "again")


def test_the_decoder_of_a_whole_model_alone(tmp_path, tmp_path_factory):
    """An adapter of a Llama fits a LLaVA around it; of more, it cannot be one."""
    model = converted("llava15/hf5", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts={"attention": LORA, "mlp": LORA})
    for form in ("peft", "mlx-lm"):
        out = tmp_path / form
        done = convert_adapter(ours, out, model, form, source="llama")
        assert done["source"] == "llama"
        assert any("model.layers.0.self_attn.q_proj" in n for n in arrays_of(out))
        again = tmp_path / f"again-{form}"
        convert_adapter(out, again, model, source="llama")
        assert_same_arrays(ours, again)
    with pytest.raises(CheckpointError, match=r"mlx-lm has no model of the kind llava"):
        convert_adapter(ours, tmp_path / "x", model, "mlx-lm")
    more = trained(model, tmp_path / "more", parts={"encoder": LORA})
    with pytest.raises(CheckpointError, match=r"a pair of vision\.layers.*kind llama"):
        convert_adapter(more, tmp_path / "x", model, "peft", source="llama")


def test_a_model_that_was_made_here_has_the_names_of_its_export():
    config = small_model(DENSE).config
    assert source_of(config).name == "mm1_torch"  # no other library has its connector
    alone = replace(
        config, vision_config=None, connector_config=None, image_token_id=None
    )
    assert source_of(alone).name == "llama"


# --- arrays --------------------------------------------------------------------------


def pair(rng, rank, rows, scale=1.0, experts=()):
    a = rng.standard_normal((*experts, rank, 6)).astype(np.float32)
    b = rng.standard_normal((*experts, rows, rank)).astype(np.float32)
    return Pair(a, b, None, scale)


@pytest.mark.parametrize("experts", [(), (3,)], ids=["matrix", "experts"])
def test_projections_in_one_module(rng, experts):
    """Apart they are blocks; together they share lora_a. Either way the same sum."""
    one, two = (pair(rng, r, rows, 2.0, experts) for r, rows in ((2, 5), (3, 4)))
    joined = join_rows([one, two])
    assert joined.a.shape == (*experts, 5, 6) and joined.b.shape == (*experts, 9, 5)
    weight = np.zeros((*experts, 9, 6), np.float32)
    whole = joined.merged(weight)
    np.testing.assert_allclose(whole[..., :5, :], 2 * one.b @ one.a, atol=1e-5)
    np.testing.assert_allclose(whole[..., 5:, :], 2 * two.b @ two.a, atol=1e-5)
    for found, wanted in zip(split_rows(joined, [5, 4]), (one, two), strict=True):
        assert np.array_equal(found.a, wanted.a) and np.array_equal(found.b, wanted.b)
    shared = Pair(one.a, pair(rng, 2, 9, 2.0, experts).b, None, 2.0)
    parts = split_rows(shared, [5, 4])
    assert all(np.array_equal(part.a, one.a) for part in parts)
    assert np.array_equal(join_rows(parts).b, shared.b)


def test_projections_that_were_not_trained_yet_come_apart_again(rng):
    fresh = [replace(pair(rng, 2, rows), b=np.zeros((rows, 2))) for rows in (5, 4)]
    for found, wanted in zip(split_rows(join_rows(fresh), [5, 4]), fresh, strict=True):
        assert np.array_equal(found.a, wanted.a) and found.b.shape == wanted.b.shape


def test_another_rank_or_scale_is_the_same_sum(rng):
    one = pair(rng, 2, 5, 3.0)
    weight = rng.standard_normal((5, 6)).astype(np.float32)
    other = one.with_scale(1.5).with_rank(4)
    assert (other.rank, other.scale) == (4, 1.5)
    assert np.array_equal(other.b[:, :2], 2 * one.b)  # a power of two: exact
    np.testing.assert_allclose(other.merged(weight), one.merged(weight), atol=1e-6)


@pytest.mark.parametrize(
    "key, rank, scale",
    [
        ("model.layers.0.self_attn.q_proj", 4, 2.0),
        ("model.layers.1.self_attn.q_proj", 16, 0.5),
        ("model.layers.11.self_attn.q_proj", 4, 2.0),  # no "1.", but "11."
        ("model.layers.0.self_attn.k_proj", 8, 3.0),
        ("model.layers.0.self_attn.qk_proj", 4, 2.0),
    ],
)
def test_patterns_end_a_path_as_in_peft(key, rank, scale):
    config = PeftConfig(
        {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 16, "k_proj": 8},
            "alpha_pattern": {"k_proj": 24},
        },
        "x",
    )
    assert (config.rank(key), config.scale(key)) == (rank, scale)


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"peft_type": "LOHA"}, r"adapter of the kind LOHA; only LORA"),
        ({"peft_type": "IA3"}, r"adapter of the kind IA3; only LORA"),
        ({"peft_type": "PROMPT_TUNING"}, r"kind PROMPT_TUNING; only LORA"),
        ({"bias": "all"}, r"bias = 'all'.*not supported"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out = True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication"),
        ({"lora_bias": True}, r"lora_bias = True"),
        ({"use_qalora": True}, r"use_qalora = True"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices = \[3\]"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, r"started with pissa_niter_4, which"),
        ({"init_lora_weights": "olora"}, r"started with olora, which changed the base"),
        ({"r": 3}, r"pairs of \(2, 64\) and \(64, 2\).*says the rank 3"),
        ({"r": "big"}, r"r of .* cannot be 'big'"),
        ({"lora_alpha": True}, r"lora_alpha of .* cannot be True"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern of .* has '\('"),
        ({"rank_pattern": [3]}, r"rank_pattern of .* is no object"),
        ({"use_dora": False}, r"DoRA's row lengths .* against what adapter_config"),
    ],
)
def test_a_configuration_that_is_not_read(values, message, tmp_path, tmp_path_factory):
    model = converted("decoder_mixtral", tmp_path_factory)
    shutil.copytree(STORED / "peft4_mixtral", tmp_path / "peft")
    respell(tmp_path / "peft", **values)
    with pytest.raises(CheckpointError, match=message):
        convert_adapter(tmp_path / "peft", tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def renamed(old, new):
    def change(arrays):
        return {name.replace(old, new): array for name, array in arrays.items()}

    return change


def without(end):
    def change(arrays):
        return {name: a for name, a in arrays.items() if not name.endswith(end)}

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (renamed("layers.2.", "layers.7."), r"9 of its modules have no place here: mo"),
        (renamed("self_attn", "attention"), r"does not fit.*Read as mixtral"),
        (without("0.w1.lora_B.weight"), r"experts\.0\.w1 without its lora_A or lora_B"),
        (without("0.w1.lora_magnitude_vector"), r"DoRA's row lengths of model\.layers"),
        (renamed("lora_A", "lora_C"), r"lora_C\.weight, which is no part of LoRA"),
        (renamed("experts.0.w1", "experts.9.w1"), r"have no place here"),
        (renamed("0.self_attn.q_proj", "0.input_layernorm"), r"what takes none here"),
        (lambda arrays: {}, r"holds nothing"),
        (
            lambda arrays: {n: a.astype(mx.int32) for n, a in arrays.items()},
            r"in the type I32, which is no float",
        ),
        (
            lambda a: a | {"base_model.model.lm_head.weight": mx.zeros((4, 4))},
            r"trained whole and do not fit.*lm_head\.weight is \(4, 4\) there",
        ),
        (
            lambda a: a | {"base_model.model.score.weight": mx.zeros((4, 4))},
            r"trained whole and do not fit.*no rule knows: score\.weight",
        ),
        (
            lambda a: a | {f"{EMBEDDINGS}.base_layer.weight": mx.ones((304, 64))},
            r"trained on another model\.embed_tokens\.weight than this model's",
        ),
    ],
)
def test_arrays_of_another_model(change, message, tmp_path, tmp_path_factory):
    model = converted("decoder_mixtral", tmp_path_factory)
    shutil.copytree(STORED / "peft4_mixtral", tmp_path / "peft")
    path = str(tmp_path / "peft" / "adapter_model.safetensors")
    arrays = change(mx.load(path))
    mx.eval(arrays)
    mx.save_safetensors(path, arrays)
    with pytest.raises(CheckpointError, match=message):
        convert_adapter(tmp_path / "peft", tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
def test_an_adapter_of_ours_for_another_model(form, tmp_path, tmp_path_factory):
    model = converted("decoder_mixtral", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts={"experts": LORA})
    other = converted("decoder_olmoe", tmp_path_factory)
    with pytest.raises(CheckpointError, match=r"adapter is of another model|not fit"):
        convert_adapter(ours, tmp_path / "out", other, form)


@pytest.mark.parametrize(
    "fixture, parts, form, message",
    [
        ("decoder_mixtral", {"experts": DORA}, "peft", r"DoRA on experts.*--transform"),
        (
            "decoder_mixtral",
            {"experts": DORA},
            "mlx-lm",
            r"DoRA on experts.*mlx-lm",
        ),
        (
            "decoder_mixtral",
            {"experts": LORA, "attention": DORA},
            "peft",
            r"Some pairs .* PEFT has one kind for all",
        ),
        (
            "decoder_mixtral",
            {"experts": LORA, "attention": DORA},
            "mlx-lm",
            r"Some pairs .* mlx-lm has one kind for all",
        ),
        (
            "decoder_mixtral",
            {"experts": LORA, "norms": WHOLE},
            "mlx-lm",
            r"has pairs and whole weights .* mlx-lm has either",
        ),
    ],
)
def test_what_the_others_cannot_say(
    fixture, parts, form, message, tmp_path, tmp_path_factory
):
    model = converted(fixture, tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts=parts)
    with pytest.raises(CheckpointError, match=message):
        convert_adapter(ours, tmp_path / "out", model, form)
    assert not (tmp_path / "out").exists()


def test_a_tied_table_is_trained_with_its_head(tmp_path, tmp_path_factory):
    model = converted("decoder_qwen2", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts={"embeddings": WHOLE})
    convert_adapter(ours, tmp_path / "peft", model, "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    arrays = dict(mx.load(str(path)))
    start = "base_model.model."
    names = [f"{start}model.embed_tokens.weight", f"{start}lm_head.weight"]
    assert sorted(arrays) == sorted(names)
    for kept, message in zip(
        names,
        (r"trains the embeddings and not the head", r"the head apart from the embed"),
        strict=True,
    ):
        mx.eval(arrays)
        mx.save_safetensors(str(path), {kept: arrays[kept]})
        with pytest.raises(CheckpointError, match=message):
            convert_adapter(tmp_path / "peft", tmp_path / "out", model)
    mx.save_safetensors(str(path), {names[0]: arrays[names[0]]})
    respell(tmp_path / "peft", ensure_weight_tying=True)
    convert_adapter(tmp_path / "peft", tmp_path / "out", model)
    assert_same_arrays(ours, tmp_path / "out")


# --- the folder and the command ------------------------------------------------------


def test_where_an_adapter_is_written(tmp_path, tmp_path_factory):
    model = converted("decoder_mixtral", tmp_path_factory)
    source, out = STORED / "mlx_mixtral", tmp_path / "out"
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"is no adapter folder"):
        convert_adapter(source, tmp_path, model)
    with pytest.raises(CheckpointError, match=r"is a file"):
        convert_adapter(source, tmp_path / "mine.txt", model)
    with pytest.raises(CheckpointError, match=r"is, or holds, what is read"):
        convert_adapter(source, source, model, overwrite=True)
    convert_adapter(source, out, model)
    (out / "notes.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"holds an adapter already.*--overwrite"):
        convert_adapter(source, out, model)
    with pytest.raises(CheckpointError, match=r"is an adapter of mm1_mlx already"):
        convert_adapter(out, tmp_path / "x", model)
    convert_adapter(source, out, model, "peft", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]
    other = converted("decoder_olmoe", tmp_path_factory)
    with pytest.raises(CheckpointError):  # the old one stays
        convert_adapter(source, out, other, overwrite=True)
    assert form_of(out) == "peft"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "out"]


def test_a_quantized_model_takes_foreign_pairs(tmp_path, tmp_path_factory):
    """But no whole weights in place of packed ones."""
    model = converted("decoder_mixtral", tmp_path_factory)
    packed = tmp_path / "packed"
    quantize(model, packed, Recipe(bits=8, group_size=32))
    wanted = np.load(STORED / "peft4_mixtral" / "logits.npy")
    found = answers(packed, STORED / "peft4_mixtral")
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()  # 8 bits


def test_reading_peft_as_ours_names_the_command():
    with pytest.raises(CheckpointError, match=r"of PEFT: python -m mm1_mlx\.convert a"):
        read_adapter(STORED / "peft4_mixtral")


def test_load_refuses_an_adapter_of_another_model():
    with pytest.raises(CheckpointError, match=r"Read as mm1_torch, this model has mod"):
        load_adapter(small_model(DENSE), STORED / "peft5_llava")


def test_the_command(tmp_path, tmp_path_factory):
    model = converted("decoder_mixtral", tmp_path_factory)
    out = tmp_path / "ours"
    given = ["mm1_mlx.convert", "adapter", STORED / "mlx_mixtral", out]
    done = run_cli(*given, "--model", model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 14 pairs, 2 whole weights, from mlx-lm to m")
    assert done.stderr.startswith("note: 2 matrices that take no pairs here")
    assert_fails(run_here(*given, "--model", model), "holds an adapter already")
    again = ["mm1_mlx.convert", "adapter", out, tmp_path / "x", "--model", model]
    assert_fails(run_here(*again, "--transformers", "4"), "--to peft", code=2)
    assert_fails(run_here(*again, "--to", "pfet"), "did you mean 'peft'", code=2)
    done = run_here(*again, "--to", "peft", "--json")
    assert json.loads(done.stdout)["to"] == "peft"
    config = json.loads((out / "adapter_config.json").read_text())
    made = config["mm1_mlx"]["converted"]
    assert made["from"] == "mlx-lm" and "/" not in made["command"]
    assert load_model(model)  # the model was only read
