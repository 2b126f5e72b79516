"""Text models of Apple's tamm, dense and with experts, through the command."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from test_parity_tamm import random_weights

from convert.__main__ import main
from convert.conversion import convert
from convert.sources import tamm_text
from helpers import FIXTURES, assert_close, need
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_model

IDS = [[5, 9, 17, 60, 33, 8, 1, 2]]
TEXT = {
    "vocab_size": 64,
    "hidden_dim": 32,
    "num_layers": 3,
    "num_kv_reuse_layers": 0,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_theta": 1000.0,
}
MOE = {
    "vocab_size": 64,
    "num_tracks": 1,
    "num_layers_per_track": 4,
    "num_layers_per_track_per_sync_point": 2,
    "hidden_dim": 32,
    "attention_hidden_dim": 48,
    "dense_feed_forward_hidden_dim": 40,
    "sparse_feed_forward_hidden_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_experts": 4,
    "attention_layer_pattern": ["local_rope"],
    "experts_router_logits_cap": None,
}


def library_model(kind: str, values: dict):
    """tamm's own model; its configs are classes or builders' arguments."""
    need("tamm")
    if kind == "tamm_text":
        from tamm.models.afm_text import AFMTextV7

        return AFMTextV7.create_basic_builder(**values).build()
    from tamm.models.afm_text.afm_pt_moe import AFMParallelTrackMoEConfig

    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return AFMParallelTrackMoEConfig(**fields).create_basic_builder().build()


@pytest.mark.parametrize(
    "kind, values",
    [
        ("tamm_text", TEXT),
        ("tamm_moe", MOE),
        ("tamm_moe", MOE | {"feed_forward_layer_pattern": ["sparse"]}),
        ("tamm_moe", MOE | {"num_experts_per_token": 1, "num_kv_heads": None}),
    ],
)
def test_a_text_model_of_the_library(kind, values, tmp_path):
    torch = need("torch")
    theirs = library_model(kind, values)
    weights = random_weights(theirs)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values | {"model_type": kind}))
    torch.save(theirs.state_dict(), folder / "model.pt")
    assert len(weights) > 20
    out = tmp_path / "ours"
    flags = ["--hf-path", str(folder), "--mlx-path", str(out), "--dtype", "float32"]
    assert main(flags) == 0
    with torch.no_grad():
        wanted = theirs(torch.tensor(IDS)).logits.numpy()
    assert np.std(wanted) > 0.1
    model = load_model(out)
    sparse = ["moe" in layer for layer in model.decoder.layers]
    assert any(sparse) == (kind == "tamm_moe")
    assert_close(model(mx.array(IDS)), wanted, atol=2e-5)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("tamm_text", {"num_kv_reuse_layers": 1}, r"num_kv_reuse_layers = 1"),
        ("tamm_moe", {"num_tracks": 2}, r"num_tracks = 2"),
        ("tamm_moe", {"experts_router_logits_cap": 50.0}, r"caps the router's logits"),
        (
            "tamm_moe",
            {"attention_layer_pattern": ["local_rope", "global_nope"]},
            r"only 'local_rope'",
        ),
        (
            "tamm_moe",
            {"feed_forward_layer_pattern": ["sparse", "sparse", "dense"]},
            r"only every k-th layer sparse",
        ),
    ],
)
def test_what_has_no_place_here(kind, change, message):
    read = tamm_text.config if kind == "tamm_text" else tamm_text.moe_config
    with pytest.raises(CheckpointError, match=message):
        read((TEXT if kind == "tamm_text" else MOE) | change)


def test_its_window_limits_the_context():
    assert tamm_text.moe_config(MOE).max_position_embeddings == 4096
    short = tamm_text.moe_config(MOE | {"local_attention_window_size": 99})
    assert short.max_position_embeddings == 100


def test_another_name_is_read_as_the_source_that_was_named(tmp_path):
    """--source counts, whatever model_type says."""
    values = json.loads((FIXTURES / "decoder_qwen2/config.json").read_text())
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in (FIXTURES / "decoder_qwen2").glob("*.safetensors"):
        shutil.copy(path, folder)
    renamed = values | {"model_type": "my_own", "attention_bias": False}
    (folder / "config.json").write_text(json.dumps(renamed))
    with pytest.raises(CheckpointError, match=r"'my_own', which is not supported; kn"):
        convert(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"qkv_proj\.bias"):  # Llama has none
        convert(folder, tmp_path / "out", source="llama")
    renamed["model_type"] = "qwen2"
    (folder / "config.json").write_text(json.dumps(renamed))
    convert(folder, tmp_path / "out", source="llama")
