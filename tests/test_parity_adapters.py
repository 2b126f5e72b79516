"""Adapters against PEFT and mlx-lm themselves: the same logits, both ways."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from adapter_kit import (
    DORA,
    IDS,
    LORA,
    THIN,
    WHOLE,
    answers,
    arrays_of,
    assert_answers,
    assert_same_arrays,
    converted,
    respell,
    trained,
)
from mlx.utils import tree_flatten, tree_map
from small import small_model

from helpers import FIXTURES, need, to_numpy
from mm1_mlx.adapters.folder import write_adapter
from mm1_mlx.checkpoint.folder import write_folder
from mm1_mlx.convert.adapters import peft_write
from mm1_mlx.convert.adapters.interchange import convert_adapter
from mm1_mlx.convert.conversion import convert
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_adapter

LAYERS = r".*layers\.[12]\..*(q_proj|k_proj|up_proj)"
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def torch_model(fixture):
    torch, transformers = need("torch"), need("transformers")
    multi = "llava" in fixture
    auto = "AutoModelForImageTextToText" if multi else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(
        FIXTURES / fixture, dtype=torch.float32
    )
    return model.eval()


def logits_of(model) -> np.ndarray:
    return to_numpy(model(need("torch").tensor(IDS)).logits)


def peft_adapter(fixture, folder, **settings) -> np.ndarray:
    """Random numbers in an adapter that PEFT saves; the logits with it."""
    peft, torch = need("peft"), need("torch")
    config = peft.LoraConfig(r=4, lora_alpha=6, **settings)
    model = peft.get_peft_model(torch_model(fixture), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, array in model.named_parameters():
        noise = 0.05 * torch.randn(array.shape, generator=generator)
        if "magnitude" in name:
            array.data *= 1 + noise
        elif ".lora_" in name:
            array.data = noise
        elif "modules_to_save" in name:
            array.data += noise
    model.save_pretrained(folder)
    return logits_of(model)


def with_peft(fixture, folder) -> np.ndarray:
    """The logits of the original with an adapter that PEFT loads."""
    with warnings.catch_warnings():
        # of patterns for parameters, although it applies them; of other layers
        warnings.simplefilter("ignore")
        model = need("peft").PeftModel.from_pretrained(torch_model(fixture), folder)
    return logits_of(model.eval())


IMPORTS = {
    "llama": ("decoder_llama3/config5", {"target_modules": ["q_proj", "down_proj"]}),
    "llama regex": ("decoder_llama3/config5", {"target_modules": LAYERS}),
    "llama all": (
        "decoder_llama3/config5",
        {
            "target_modules": "all-linear",
            "use_dora": True,
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
        },
    ),
    "llama patterns": (
        "decoder_llama3/config5",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "rank_pattern": {"k_proj": 6, r"layers\.0\.self_attn\.v_proj": 2},
            "alpha_pattern": {"o_proj": 9, "k_proj": 9, r"0\.self_attn\.v_proj": 3},
        },
    ),
    "mixtral": (
        "decoder_mixtral",
        {"target_modules": ["q_proj"], "target_parameters": STACKS},
    ),
    "olmoe gate and up": (
        "decoder_olmoe",
        {"target_modules": [], "target_parameters": STACKS[:1], "use_rslora": True},
    ),
    "qwen down": (
        "decoder_qwen15_moe",
        {"target_modules": ["v_proj"], "target_parameters": STACKS[1:]},
    ),
    "llava": (
        "llava15/hf5",
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("which", IMPORTS)
def test_what_peft_saved_answers_here_as_there(which, tmp_path, tmp_path_factory):
    need("peft")
    fixture, settings = IMPORTS[which]
    model = converted(fixture, tmp_path_factory)
    wanted = peft_adapter(fixture, tmp_path / "peft", **settings)
    assert np.abs(wanted - answers(model)).max() > 0.02 * np.abs(wanted).max()

    convert_adapter(tmp_path / "peft", tmp_path / "ours", model)
    assert_answers(answers(model, tmp_path / "ours"), wanted)
    assert_answers(answers(model, tmp_path / "peft"), wanted)  # without the command

    convert_adapter(tmp_path / "ours", tmp_path / "again", model, "peft")
    if which == "llama patterns":  # scales went into lora_b, by powers of two or not
        assert arrays_of(tmp_path / "again").keys() == (
            arrays_of(tmp_path / "peft").keys()
        )
    else:
        assert_same_arrays(tmp_path / "peft", tmp_path / "again")
    assert_answers(with_peft(fixture, tmp_path / "again"), wanted)


def test_routers_with_pairs_become_whole_weights(tmp_path, tmp_path_factory):
    """PEFT's "all-linear" trains them, and here they take no pairs."""
    need("peft")
    model = converted("decoder_mixtral", tmp_path_factory)
    wanted = peft_adapter(
        "decoder_mixtral", tmp_path / "peft", target_modules="all-linear"
    )
    notes = []
    done = convert_adapter(
        tmp_path / "peft", tmp_path / "ours", model, tell=notes.append
    )
    assert done["whole"] == 3 and "3 matrices that take no pairs" in notes[0]
    assert_answers(answers(model, tmp_path / "ours"), wanted)
    convert_adapter(tmp_path / "ours", tmp_path / "again", model, "peft")
    assert_answers(with_peft("decoder_mixtral", tmp_path / "again"), wanted)


def test_embeddings_with_pairs_become_whole_weights(tmp_path, tmp_path_factory):
    need("peft")
    model = converted("decoder_mixtral", tmp_path_factory)
    wanted = peft_adapter(
        "decoder_mixtral", tmp_path / "peft", target_modules=["embed_tokens", "lm_head"]
    )
    done = convert_adapter(tmp_path / "peft", tmp_path / "ours", model)
    assert (done["pairs"], done["whole"]) == (1, 1)
    assert_answers(answers(model, tmp_path / "ours"), wanted)


def test_eva_only_chose_the_first_numbers(tmp_path, tmp_path_factory):
    need("peft")
    model = converted("decoder_llama3/config5", tmp_path_factory)
    wanted = peft_adapter(
        "decoder_llama3/config5", tmp_path / "peft", target_modules=["q_proj"]
    )
    respell(tmp_path / "peft", init_lora_weights="eva", eva_config={"rho": 2.0})
    assert_answers(with_peft("decoder_llama3/config5", tmp_path / "peft"), wanted)
    assert_answers(answers(model, tmp_path / "peft"), wanted)


MOE = {"attention": THIN, "experts": LORA}
LLAVA = {"attention": LORA, "mlp": LORA, "encoder": THIN}
EXPORTS = {
    "llama, DoRA": ("decoder_llama3/config5", 5, {"attention": DORA, "mlp": DORA}),
    "mixtral": ("decoder_mixtral", 5, MOE),
    "mixtral, a module each": ("decoder_mixtral", 4, MOE),
    "olmoe, a module each": ("decoder_olmoe", 4, MOE),
    "mixtral, whole": (
        "decoder_mixtral",
        5,
        {"experts": WHOLE, "router": WHOLE, "attention": LORA, "norms": WHOLE},
    ),
    "mixtral, only whole": ("decoder_mixtral", 5, {"head": WHOLE, "norms": WHOLE}),
    "qwen2, tied": ("decoder_qwen2", 5, {"attention": WHOLE, "embeddings": WHOLE}),
    "phi": ("decoder_phi2", 5, {"attention": LORA, "mlp": THIN, "head": LORA}),
    "llava": ("llava15/hf5", 5, LLAVA | {"connector": WHOLE, "head": LORA}),
    "llava, whole encoder": ("llava15/hf5", 5, {"mlp": LORA, "encoder": WHOLE}),
}


@pytest.mark.parametrize("which", EXPORTS)
def test_peft_loads_what_was_trained_here(which, tmp_path, tmp_path_factory):
    need("peft")
    fixture, version, parts = EXPORTS[which]
    model = converted(fixture, tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts=parts)
    wanted = answers(model, ours)
    convert_adapter(ours, tmp_path / "peft", model, "peft", transformers=version)
    assert_answers(with_peft(fixture, tmp_path / "peft"), wanted)
    convert_adapter(tmp_path / "peft", tmp_path / "again", model)
    assert_same_arrays(ours, tmp_path / "again")


@pytest.mark.parametrize("version", [4, 5])
def test_peft_loads_pairs_of_some_layers(version, tmp_path, tmp_path_factory):
    need("peft")
    model = converted("decoder_mixtral", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts=MOE, layers=1, first=True)
    convert_adapter(ours, tmp_path / "peft", model, "peft", transformers=version)
    wanted = answers(model, ours)
    assert_answers(with_peft("decoder_mixtral", tmp_path / "peft"), wanted)


PARTS = {"attention": LORA, "mlp": LORA, "encoder": THIN, "connector": LORA}


@pytest.mark.parametrize(
    "parts",
    [PARTS | {"experts": THIN}, {"connector": WHOLE, "encoder": WHOLE, "head": LORA}],
    ids=["pairs", "whole"],
)
def test_an_mm1_of_ours_is_mm1_in_torch(parts, tmp_path):
    """What nobody else has a class for goes to convert.references.mm1, by our names."""
    peft, torch = need("peft"), need("torch")
    from convert.references.mm1 import Connector, Decoder, Encoder

    model = small_model(seed=1)
    config, arrays = model.config, dict(tree_flatten(model.parameters()))
    write_folder(tmp_path / "model", config, arrays)
    vision, text = config.vision_config, config.text_config
    net = torch.nn.Module()
    net.vision, net.decoder = Encoder(vision), Decoder(text)
    size = (vision.hidden_size, text.hidden_size, vision.num_patches)
    net.connector = Connector(config.connector_config, *size)
    layout = {
        name: np.array(array).transpose(0, 3, 1, 2) if array.ndim == 4 else array
        for name, array in arrays.items()
    }
    net.load_state_dict({n: torch.tensor(np.array(a)) for n, a in layout.items()})
    ours = trained(tmp_path / "model", tmp_path / "ours", parts=parts)
    convert_adapter(ours, tmp_path / "peft", tmp_path / "model", "peft")
    net = peft.PeftModel.from_pretrained(net, tmp_path / "peft").eval().base_model.model
    load_adapter(model, ours)
    pixels = np.random.default_rng(0).standard_normal((1, 16, 16, 3), np.float32)
    with torch.no_grad():
        channels_first = torch.tensor(pixels).permute(0, 3, 1, 2)
        features = net.vision(channels_first)[:, 1:]  # without the class token
        tokens = net.connector(features)
        words = net.decoder.embed_tokens(torch.tensor(IDS + 9))
        logits = net.decoder(torch.cat([tokens, words], dim=1)).logits
    mine = model.connector(model.vision(mx.array(pixels)))
    assert_answers(mine, to_numpy(tokens))
    # ids from 10 on: none of them is the image token
    slots = [config.image_token_id] * config.tokens_per_image
    ids = mx.array([[*slots, *(IDS[0] + 9).tolist()]])
    assert_answers(model(ids, mx.array(pixels)), to_numpy(logits))
    convert_adapter(tmp_path / "peft", tmp_path / "again", tmp_path / "model")
    again = small_model(seed=1)
    load_adapter(again, tmp_path / "again")
    assert_answers(again(ids, mx.array(pixels)), to_numpy(logits))


def test_a_1x1_convolution_has_pairs_as_convolutions(tmp_path, tmp_path_factory):
    """Honeybee's C-Abstractor: linear here, nn.Conv2d there."""
    peft, torch = need("peft"), need("torch")
    model = converted("honeybee/last", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts={"connector": LORA})
    convert_adapter(ours, tmp_path / "peft", model, "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "again", model)
    assert_same_arrays(ours, tmp_path / "again")
    name, mine = "abstractor.net.0.b1.conv1.conv", "connector.stage1.0.conv1"
    arrays = arrays_of(tmp_path / "peft")
    a, b = (arrays[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    net = torch.nn.Sequential(torch.nn.Conv2d(a.shape[1], b.shape[0], 1))
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["0"])
    layer = peft.get_peft_model(net, config).base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor(a)
    layer.lora_B["default"].weight.data = torch.tensor(b)
    delta = to_numpy(layer.get_delta_weight("default"))[..., 0, 0]
    stored = arrays_of(ours)
    product = 2.5 * (stored[f"{mine}.lora_a"] @ stored[f"{mine}.lora_b"]).T
    assert_answers(product, delta)


def test_llavas_own_training_leaves_the_connector_beside(tmp_path, tmp_path_factory):
    """non_lora_trainables.bin of its authors' code: not in PEFT's file."""
    torch = need("torch")
    model = converted("llava15/original", tmp_path_factory)
    parts = {"attention": LORA, "mlp": LORA, "connector": WHOLE}
    ours = trained(model, tmp_path / "ours", parts=parts)
    folder = tmp_path / "peft"
    convert_adapter(ours, folder, model, "peft")
    arrays = {n: torch.tensor(a) for n, a in arrays_of(folder).items()}
    beside = {n: arrays.pop(n) for n in list(arrays) if "mm_projector" in n}
    assert len(beside) == 4 and "base_model.model.model.mm_projector.2.bias" in beside
    torch.save(beside, folder / "non_lora_trainables.bin")
    torch.save(arrays, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    respell(folder, modules_to_save=None)
    convert_adapter(folder, tmp_path / "again", model)
    assert_same_arrays(ours, tmp_path / "again")


# --- mlx-lm --------------------------------------------------------------------------


def with_mlx_lm(fixture, folder) -> np.ndarray:
    """The logits of mlx-lm's own model with an adapter that it loads."""
    utils, tuner = need("mlx_lm.utils"), need("mlx_lm.tuner.utils")
    model, _ = utils.load_model(FIXTURES / fixture)
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    tuner.load_adapters(model, str(folder))
    model.eval()
    return np.array(model(mx.array(IDS)))


DENSE = {"attention": LORA, "mlp": LORA}
# mlx-lm does not read the RoPE of transformers 5, so configs are those of version 4.
MLX = {
    "llama": ("decoder_llama3/config4", {"parts": DENSE}),
    "llama, DoRA, first layers": (
        "decoder_llama3/config4",
        {"parts": {"attention": DORA, "mlp": DORA}, "layers": 2, "first": True},
    ),
    "llama, whole": ("decoder_llama3/config4", {"parts": {"attention": WHOLE}}),
    "qwen2, last layers": (
        "decoder_qwen2",
        {"parts": DENSE, "layers": 2, "projections": ("q_proj", "down_proj")},
    ),
    "phi": ("decoder_phi2", {"parts": {**DENSE, "head": LORA}}),
    "mixtral": (
        "decoder_mixtral",
        {"parts": {"attention": LORA, "experts": LORA}},
    ),
    "mixtral, whole": (
        "decoder_mixtral",
        {"parts": {"experts": WHOLE, "router": WHOLE}},
    ),
    "olmoe": ("decoder_olmoe", {"parts": {"experts": LORA}, "layers": 1}),
    "qwen_moe": ("decoder_qwen15_moe", {"parts": {"experts": LORA, "mlp": LORA}}),
}


@pytest.mark.parametrize("which", MLX)
def test_mlx_lm_loads_what_was_trained_here(which, tmp_path, tmp_path_factory):
    need("mlx_lm")
    fixture, plan = MLX[which]
    model = converted(fixture, tmp_path_factory)
    ours = trained(model, tmp_path / "ours", **plan)
    wanted = answers(model, ours)
    convert_adapter(ours, tmp_path / "mlx", model, "mlx-lm")
    assert_answers(with_mlx_lm(fixture, tmp_path / "mlx"), wanted, 3e-5)  # its RoPE
    assert_answers(answers(model, tmp_path / "mlx"), wanted)
    convert_adapter(tmp_path / "mlx", tmp_path / "again", model)
    assert_same_arrays(ours, tmp_path / "again")


def test_mlx_lm_has_one_rank_and_one_scale(tmp_path, tmp_path_factory):
    need("mlx_lm")
    model = converted("decoder_mixtral", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts=MOE)
    notes = []
    convert_adapter(ours, tmp_path / "mlx", model, "mlx-lm", tell=notes.append)
    assert "one rank and one scale" in notes[0]
    wanted = answers(model, ours)
    assert_answers(with_mlx_lm("decoder_mixtral", tmp_path / "mlx"), wanted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "fixture, keys, whole",
    [
        ("decoder_mixtral", ["model.embed_tokens", "block_sparse_moe.gate"], 3),
        ("decoder_qwen2", ["model.embed_tokens"], 1),  # the head, too
    ],
)
def test_what_takes_no_pairs_here(
    kind, fixture, keys, whole, tmp_path, tmp_path_factory
):
    """Routers and embeddings that mlx-lm trains with pairs become whole weights."""
    utils, tuner = need("mlx_lm.utils"), need("mlx_lm.tuner.utils")
    there, _ = utils.load_model(FIXTURES / fixture)
    settings = {"rank": 3, "scale": 1.5, "dropout": 0.0, "keys": keys}
    there.freeze()
    tuner.linear_to_lora_layers(there, 2, settings, use_dora=kind == "dora")
    arrays = {}
    for k, (name, array) in enumerate(tree_flatten(there.trainable_parameters())):
        noise = 0.1 * mx.random.normal(array.shape, key=mx.random.key(k))
        arrays[name] = array * (1 + noise) if name.endswith(".m") else noise
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}
    write_adapter(tmp_path / "mlx", arrays, config)
    model = converted(fixture, tmp_path_factory)
    done = convert_adapter(tmp_path / "mlx", tmp_path / "ours", model)
    assert (done["pairs"], done["whole"]) == (0, whole)
    wanted = with_mlx_lm(fixture, tmp_path / "mlx")
    assert np.abs(wanted - answers(model)).max() > 0.02 * np.abs(wanted).max()
    assert_answers(answers(model, tmp_path / "ours"), wanted)


def test_from_mlx_lm_to_peft(tmp_path, tmp_path_factory):
    need("peft")
    model = converted("decoder_mixtral", tmp_path_factory)
    there = FIXTURES / "adapters" / "mlx_mixtral"
    convert_adapter(there, tmp_path / "peft", model, "peft")
    wanted = np.load(there / "logits.npy")
    assert_answers(with_peft("decoder_mixtral", tmp_path / "peft"), wanted)


# --- what PEFT would load wrongly -----------------------------------------------------


def test_peft_drops_dense_layers_of_qwen3_moe(tmp_path, monkeypatch):
    """The reason of a refusal: where PEFT learns to keep these pairs, it can go."""
    peft, transformers, torch = need("peft"), need("transformers"), need("torch")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    )
    torch.manual_seed(0)
    original = transformers.Qwen3MoeForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "model")
    model, ours = tmp_path / "model", tmp_path / "ours"
    trained(model, ours, parts={"mlp": LORA, "attention": LORA})
    with pytest.raises(CheckpointError, match=r"takes for one of the experts"):
        convert_adapter(ours, tmp_path / "peft", model, "peft")
    monkeypatch.setattr(peft_write, "_TAKEN", ())
    convert_adapter(ours, tmp_path / "peft", model, "peft")
    loaded = peft.PeftModel.from_pretrained(original, tmp_path / "peft").eval()
    kept = [name for name, _ in loaded.named_parameters() if "mlp.gate_proj" in name]
    assert not any("lora_A" in name for name in kept)


def test_peft_loads_pairs_of_a_shared_expert(tmp_path, tmp_path_factory):
    need("peft")
    model = converted("decoder_qwen15_moe", tmp_path_factory)
    ours = trained(model, tmp_path / "ours", parts={"mlp": LORA, "experts": THIN})
    convert_adapter(ours, tmp_path / "peft", model, "peft")
    wanted = answers(model, ours)
    assert_answers(with_peft("decoder_qwen15_moe", tmp_path / "peft"), wanted)
