"""Presets and mm1_mlx.memory: published sizes, counts without arrays, bytes, Macs."""

import gc
import math

import pytest

from mm1_mlx import memory
from mm1_mlx.config import (
    ConnectorConfig,
    DecoderConfig,
    MM1Config,
    MoEConfig,
    VisionConfig,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import ENCODERS, MODELS, PRESETS, preset

GB = memory.GIB


# --- What the papers say -----------------------------------------------------------

# Decoder without embeddings, dense (arXiv 2405.15052; mm1-facts 1.1) and with experts.
DENSE = {"mm1-3b": 2.9e9, "mm1-7b": 6.4e9, "mm1-30b": 29.6e9}
SPARSE = {"mm1-3b-moe": 64e9, "mm1-7b-moe": 47e9}


@pytest.mark.parametrize("name", DENSE)
def test_dense_sizes_are_the_published_ones(name):
    count = memory.count_parameters(MODELS[name]).language_model
    assert count.total == pytest.approx(DENSE[name], rel=0.01)
    assert count.active == count.total


@pytest.mark.parametrize("name", SPARSE)
def test_sizes_with_experts_are_the_published_ones(name):
    count = memory.count_parameters(MODELS[name]).language_model
    assert count.total == pytest.approx(SPARSE[name], rel=0.01)


def test_experts_of_the_papers():
    for name, experts, layers in [
        ("mm1-3b-moe", 64, list(range(1, 26, 2))),
        ("mm1-7b-moe", 32, list(range(3, 32, 4))),
        ("mm1.5-1b-moe", 64, list(range(1, 24, 2))),
        ("mm1.5-3b-moe", 64, list(range(1, 26, 2))),
    ]:
        text = MODELS[name].text_config
        assert text.moe_config is not None
        assert text.moe_config.num_local_experts == experts
        assert text.moe_config.num_experts_per_tok == 2
        assert [i for i in range(text.num_hidden_layers) if text.is_sparse(i)] == layers


def test_a_sparse_model_and_its_dense_sister_differ_in_the_experts_only():
    for size in ("mm1-3b", "mm1-7b", "mm1.5-1b", "mm1.5-3b"):
        dense = memory.count_parameters(MODELS[size]).all
        sparse = memory.count_parameters(MODELS[f"{size}-moe"]).all
        assert sparse.total > 4 * dense.total
        # Two experts instead of one MLP in some layers, and the routers.
        assert dense.total < sparse.active < 1.35 * dense.total


def test_every_model_gives_144_tokens_per_image():
    assert {config.tokens_per_image for config in MODELS.values()} == {144}


def test_the_encoders_grids():
    grids = {name: config.grid for name, config in ENCODERS.items()}
    assert grids["vit-l-14-336"] == 24
    assert grids["vit-h-14-378"] == grids["siglip-so400m"] == 27
    assert grids["vit-h-14-672"] == 48
    assert grids["aimv2-3b-448"] == 32


def test_counts_that_stand_in_public_files():
    vit_h = memory.count_parameters(ENCODERS["vit-h-14-378"]).vision.total
    assert vit_h == pytest.approx(631.4e6, rel=1e-4)  # DFN5B ViT-H without its head
    # Honeybee's C-Abstractor from ViT-H at 378 into 3072 (mm1-facts 2.1); ours has one
    # norm of 3072 weights more.
    connector = memory.count_parameters(MODELS["mm1-3b"]).connector.total
    assert connector == 31_056_704 + 3072
    for name, size in {"aim-600m": 0.68e9, "aim-1b": 1.2e9, "aim-3b": 2.7e9}.items():
        count = memory.count_parameters(ENCODERS[name]).vision.total
        assert count == pytest.approx(size, rel=0.02)


def test_every_encoder_has_heads_that_mlx_fuses():
    assert {c.size_per_head for c in ENCODERS.values()} <= {64, 72, 80, 128}


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match=r"no preset named 'mm1-8b'.*mm1-7b-moe"):
        preset("mm1-8b")
    assert preset("mm1-3b") is PRESETS["mm1-3b"]


# --- Counting equals the real modules ----------------------------------------------


def vision(**changes):
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 70,
    }
    return VisionConfig(**values | changes)


def text(**changes):
    values = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "vocab_size": 128,
    }
    return DecoderConfig(**values | changes)


def mm1(connector, **text_changes):
    return MM1Config(
        vision_config=vision(norm_in="all"),
        connector_config=ConnectorConfig(**connector),
        text_config=text(**text_changes),
        image_token_id=3,
    )


MOE = MoEConfig(num_local_experts=4, moe_intermediate_size=32)
KINDS = {
    "clip": vision(norm_in="all"),
    "siglip": vision(class_token=False, patch_bias=True),
    "aimv2": vision(
        class_token=False,
        norm_in="embed",
        norm_type="rms_norm",
        gated_mlp=True,
        hidden_act="silu",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        patch_bias=True,
    ),
    "tamm": vision(norm_in="patches", norm_bias=False),
    "no_norm_out": vision(norm_out=False, head_dim=12),
    "llama": text(num_key_value_heads=2),
    "qwen2": text(qkv_bias=True, tie_word_embeddings=True),
    "qwen3": text(head_dim=24, qk_norm="head", num_key_value_heads=2),
    "olmoe": text(qk_norm="full", moe_config=MOE, num_key_value_heads=2),
    "shared": text(
        moe_config=MoEConfig(num_local_experts=6, shared_expert_intermediate_size=40)
    ),
    "phi": text(
        gated_mlp=False,
        hidden_act="gelu_pytorch_tanh",
        norm_type="layer_norm",
        parallel_block=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
    ),
    "ungated_experts": text(gated_mlp=False, hidden_act="relu2", moe_config=MOE),
    "average": mm1({"type": "average_pool", "num_query_tokens": 4}),
    "attention": mm1(
        {
            "type": "attention_pool",
            "num_query_tokens": 5,
            "hidden_size": 32,
            "depth": 2,
            "num_attention_heads": 4,
            "norm_output": True,
        }
    ),
    "mlp": mm1({"type": "mlp", "num_query_tokens": None, "norm_input": True}),
    "c_abstractor": mm1(
        {
            "type": "c_abstractor",
            "num_query_tokens": 9,
            "hidden_size": 48,
            "depth": 2,
            "mlp_depth": 3,
            "num_eos_tokens": 2,
            "norm_output": True,
        },
        moe_config=MOE,
    ),
    "c_abstractor_same_width": mm1(
        {
            "type": "c_abstractor",
            "num_query_tokens": 4,
            "hidden_size": 32,
            "depth": 1,
            "position_embedding": False,
            "norm_bias": False,
            "squeeze_bias": False,
        }
    ),
    "c_abstractor_without_blocks": mm1(
        {"type": "c_abstractor", "num_query_tokens": 4, "depth": 0}
    ),
    "c_abstractor_tamm": mm1(
        {
            "type": "c_abstractor",
            "variant": "tamm",
            "num_query_tokens": 4,
            "hidden_size": 40,
            "squeeze_ratio": 1 / 16,
        }
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_the_modules(kind):
    from mlx.utils import tree_flatten

    from mm1_mlx.models.decoder import Decoder
    from mm1_mlx.models.mm1 import MM1
    from mm1_mlx.models.vision import VisionEncoder

    config = KINDS[kind]
    modules = {VisionConfig: VisionEncoder, DecoderConfig: Decoder, MM1Config: MM1}
    model = modules[type(config)](config)
    expected = {name: array.shape for name, array in tree_flatten(model.parameters())}

    assert memory.weight_shapes(config) == expected

    count = memory.count_parameters(config).all
    assert count.total == sum(math.prod(shape) for shape in expected.values())


# --- Bytes -------------------------------------------------------------------------


def test_parts_by_hand():
    parts = memory.count_parameters(KINDS["olmoe"])
    # Layer 1 of 3 is sparse: 4 experts of 3 matrices 32 x 64.
    assert parts.experts.total == 4 * 3 * 32 * 64
    assert parts.experts.active == parts.experts.total // 2
    assert parts.embeddings.total == 2 * 128 * 64
    attention = 64 * (64 + 2 * 32) + 64 * 64 + 64 + 32  # qkv, o, q_norm, k_norm
    norms, router, mlp = 2 * 64, 4 * 64, 3 * 80 * 64
    assert parts.decoder.total == 3 * (attention + norms) + 2 * mlp + router + 64
    assert parts.vision.total == parts.connector.total == 0
    # Rows of 80 do not divide into groups of 64: the dense down_proj stays at 16 bit.
    assert parts.decoder.quantizable == 3 * 12288 + 2 * 2 * 80 * 64
    # Nor do rows of 32: the experts' down_proj.
    assert parts.experts.quantizable == parts.experts.total * 2 // 3


def test_bits_per_weight():
    part = memory.Part(total=1000, active=1000, quantizable=640)
    none = memory.Part()
    parts = memory.Parts(none, none, part, none, none)
    assert memory.weight_bytes(parts, 16) == 2000
    assert memory.weight_bytes(parts, 8) == 2 * 360 + 640 * 8.5 / 8
    assert memory.weight_bytes(parts, 4) == 2 * 360 + 640 * 4.5 / 8


def test_quantized_bytes_are_what_mlx_stores():
    """The 4.5 and 8.5 bits, measured on an array."""
    import mlx.core as mx

    weight = mx.zeros((64, 128), mx.float16)
    none = memory.Part()
    part = memory.Part(weight.size, weight.size, weight.size)
    for bits in (4, 8):
        stored = mx.quantize(weight, group_size=memory.GROUP_SIZE, bits=bits)
        expected = sum(array.nbytes for array in stored)
        parts = memory.Parts(none, none, part, none, none)
        assert memory.weight_bytes(parts, bits) == expected


def test_the_router_the_encoder_and_the_connector_are_not_quantized():
    parts = memory.count_parameters(MODELS["mm1-3b-moe"])
    assert parts.vision.quantizable == parts.connector.quantizable == 0
    assert not memory.is_quantizable("layers.1.moe.router.weight", (64, 3072))
    assert memory.is_quantizable("layers.1.moe.experts.down_proj", (64, 3072, 8064))


def test_kv_bytes_are_those_of_a_cache():
    import mlx.core as mx

    from mm1_mlx.models.cache import KVCache

    config = text(num_key_value_heads=2)
    keys = mx.zeros((1, 2, 256, 16), mx.float16)
    stored = 0
    for _ in range(config.num_hidden_layers):
        cache = KVCache()
        stored += sum(a.nbytes for a in cache.update_and_fetch(keys, keys))
    assert memory.kv_bytes(config, 256) == stored
    assert memory.kv_bytes(config, 256, bits=8) == stored * 8.5 / 16


def test_what_is_needed_grows_with_tokens_images_and_bits():
    config = MODELS["mm1-3b"]
    base = memory.needed_bytes(config, 16)
    kv = memory.kv_bytes(config.text_config, 1000)
    # From the second piece of the prompt on only the cache grows.
    assert memory.needed_bytes(config, 16, tokens=3048) == base + kv
    assert memory.needed_bytes(config, 16, images=64) > base
    assert memory.needed_bytes(config, 8) < base
    assert memory.needed_bytes(config, 4) < memory.needed_bytes(config, 8)
    weights = memory.weight_bytes(memory.count_parameters(config))
    assert weights < base < 1.2 * weights


def peak_of(run, times: int = 30) -> int:
    """The highest peak of several runs: how far MLX allocates ahead of the threads that
    compute, and so what is alive at once, differs from run to run."""
    import mlx.core as mx

    peaks = []
    gc.collect()  # what other tests left must not be freed in the middle
    for _ in range(times):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(run())
        peaks.append(mx.get_peak_memory() - before)
    return max(peaks)


@pytest.mark.parametrize("experts", [0, 2])
def test_a_prompt_takes_what_was_estimated(experts):
    """How the peak grows with each width, so that attention's scores, which only the
    CPU back end stores, cancel out. Measured in float32, estimated in 16 bits."""
    import mlx.core as mx

    from mm1_mlx.models.decoder import Decoder

    def sizes(width: int, inner: int) -> tuple[int, int]:
        moe = None
        if experts:  # so many that the CPU back end does not run all of them
            moe = MoEConfig(
                num_local_experts=5 * experts,
                num_experts_per_tok=experts,
                sparse_step=1,
                first_sparse_layer=0,
            )
        config = text(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=64,
            moe_config=moe,
        )
        model = Decoder(config)
        model.eval()
        ids = mx.zeros((1, 512), mx.int32)
        mx.eval(model.parameters(), ids)
        measured = peak_of(lambda: model.hidden(ids))
        return measured, 2 * memory.prompt_bytes(config, 512)

    small = sizes(128, 128)
    for wide in (sizes(512, 128), sizes(128, 512)):
        measured, estimate = (w - s for w, s in zip(wide, small, strict=True))
        assert estimate == pytest.approx(measured, rel=0.3)


def test_an_image_takes_what_was_estimated():
    import mlx.core as mx

    from mm1_mlx.models.vision import VisionEncoder

    def sizes(width: int, inner: int) -> tuple[int, int]:
        config = vision(
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=1,
            head_dim=64,
            image_size=112,
        )
        model = VisionEncoder(config)
        model.eval()
        pixels = mx.zeros((1, 112, 112, 3))
        mx.eval(model.parameters(), pixels)
        measured = peak_of(lambda: model(pixels))
        return measured, 2 * memory.image_bytes(config)

    small = sizes(256, 256)
    for wide in (sizes(512, 256), sizes(256, 1024)):
        measured, estimate = (w - s for w, s in zip(wide, small, strict=True))
        # MLX's attention on the CPU copies queries, keys and values beside.
        assert estimate == pytest.approx(measured, rel=0.35)


# --- Machines ----------------------------------------------------------------------


def test_macs_by_the_logs_they_print():
    """recommendedMaxWorkingSetSize, from the logs that llama.cpp's users posted."""
    for memory_gb, printed_mib in [
        (16, 10922.67),
        (32, 21845.34),
        (64, 49152.0),
        (96, 73728.0),
    ]:
        assert memory.mac_working_set(memory_gb * GB) / 2**20 == pytest.approx(
            printed_mib, abs=0.01
        )


def test_which_macs_fit():
    assert memory.fitting_macs(0) == list(memory.MAC_SIZES)
    assert memory.fitting_macs(24 * GB) == [36, 48, 64, 96, 128, 192, 256, 512]
    assert memory.fitting_macs(384 * GB) == [512]
    assert memory.fitting_macs(385 * GB) == []


def test_this_machine():
    import mlx.core as mx

    assert memory.machine_memory() > 2**28
    assert 0 < memory.estimated_working_set() <= memory.machine_memory()
    assert memory.working_set() > 0
    if mx.default_device() == mx.cpu:
        assert memory.working_set() == memory.machine_memory()
