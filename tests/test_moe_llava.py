"""MoE-LLaVA's Phi-2 and OpenChat variants, which have no stored checkpoint.

Their checkpoints are put together here: the tower and the projector of the stored
StableLM one, around a decoder of transformers with the torch reference of DeepSpeed's
experts (convert/references/connectors.py), which the stored one proves.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from parity import hub_config, safetensors

from convert.conversion import convert
from convert.sources import moe_llava
from convert.upcycle import upcycle
from convert.verify import verify
from helpers import FIXTURES, assert_close, need
from mm1_mlx import load
from mm1_mlx.checkpoint.folder import read_weights
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_model, quantize
from mm1_mlx.quantization.recipes import Recipe

TOWER = FIXTURES / "moe_llava_stablelm/tower"
KINDS = {
    "moe_llava_phi": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.0,
    },
    "moe_llava_mistral": {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "sliding_window": 4096,
        "head_dim": 16,
    },
}


def values_of(kind: str) -> dict:
    """Its config.json, after the stored StableLM one."""
    kept = (
        *("moe", "vocab_size", "max_position_embeddings", "intermediate_size"),
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "rope_theta"),
        *("mm_image_tower", "image_projector_type", "mm_vision_select_layer"),
        *("mm_vision_select_feature", "image_aspect_ratio", "tie_word_embeddings"),
    )
    values = hub_config("moe_llava_stablelm")
    own = {key: values[key] for key in kept} | KINDS[kind]
    return own | {"model_type": kind, "torch_dtype": "float32", "eos_token_id": 2}


def checkpoint(kind: str, place, *, dense: bool = False, vocab: int = 320):
    """A folder in MoE-LLaVA's layout with random decoder weights."""
    torch = need("torch")
    need("transformers")
    from convert.references.parts import moe_llava_decoder

    values = values_of(kind) | {"vocab_size": vocab}
    if dense:  # the parent that its experts are copied from
        values = {k: v for k, v in values.items() if k != "moe"}
        values["model_type"] = kind.removeprefix("moe_")
    torch.manual_seed(0)
    decoder = moe_llava_decoder(values)
    arrays = {
        name: array
        for name, array in safetensors("moe_llava_stablelm").items()
        if name.startswith(("model.image_tower", "model.mm_projector"))
    }
    rng = np.random.default_rng(0)
    for name, tensor in decoder.state_dict().items():
        array = rng.standard_normal(tuple(tensor.shape)) * 0.1
        arrays[name] = mx.array(array + 1.0 * ("norm" in name), mx.float32)
    place.mkdir()
    mx.save_safetensors(str(place / "model.safetensors"), arrays)
    (place / "config.json").write_text(json.dumps(values))
    return place


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_reference(kind, dense, tmp_path):
    source = checkpoint(kind, tmp_path / "theirs", dense=dense)
    convert(source, tmp_path / "ours", dtype="float32", tower=TOWER)
    image = "examples/shapes.png"
    found = verify(
        source, tmp_path / "ours", "1 5 <image> 7 9", [image], tokens=6, tower=TOWER
    )
    assert found.passed, found.first_difference
    assert max(stage.relative for stage in found.stages) < 5e-5
    assert found.stages[-1].scale > 0.1  # the logits are not near nothing


def test_biases_of_experts_are_used(tmp_path):
    source = checkpoint("moe_llava_phi", tmp_path / "theirs")
    convert(source, tmp_path / "ours", dtype="float32", tower=TOWER)
    weights = read_weights(tmp_path / "ours")
    layer = "decoder.layers.2.moe.experts."
    assert weights[layer + "up_proj_bias"].shape == (4, 80)
    assert weights[layer + "down_proj_bias"].shape == (4, 64)
    model, ids = load_model(tmp_path / "ours"), mx.array([[5, 9, 17, 200]])
    before = model(ids)
    experts = model.decoder.layers[2].moe.experts
    for name in ("up_proj_bias", "down_proj_bias"):
        kept = experts[name]
        experts[name] = mx.zeros_like(kept)
        assert mx.abs(model(ids) - before).max() > 0.01, name
        experts[name] = kept


def test_both_ways_to_run_experts_with_biases(tmp_path):
    source = checkpoint("moe_llava_phi", tmp_path / "theirs")
    convert(source, tmp_path / "ours", dtype="float32", tower=TOWER)
    experts = load_model(tmp_path / "ours").decoder.layers[0].moe.experts
    rng = np.random.default_rng(1)
    for tokens in (1, 3, 40):  # unsorted and sorted
        x = mx.array(rng.standard_normal((tokens, 64)), mx.float32)
        chosen = mx.array(rng.integers(0, 4, (tokens, 2)), mx.uint32)
        chosen[:, 1] = (chosen[:, 0] + 1) % 4  # never the same expert twice
        share = mx.softmax(mx.array(rng.standard_normal((tokens, 2)), mx.float32))
        dense = experts.dense(x, share, chosen)
        assert_close(experts.routed(x, share, chosen), dense, atol=1e-5)


def test_experts_with_biases_are_packed_and_kept(tmp_path):
    source = checkpoint("moe_llava_phi", tmp_path / "theirs")
    convert(source, tmp_path / "ours", dtype="float32", tower=TOWER)
    recipe = Recipe(bits=8, group_size=32, parts={"experts": 8})
    quantize(tmp_path / "ours", tmp_path / "packed", recipe)
    packed, plain = read_weights(tmp_path / "packed"), read_weights(tmp_path / "ours")
    name = "decoder.layers.0.moe.experts.up_proj"
    assert packed[name + ".weight"].dtype == mx.uint32
    assert mx.array_equal(packed[name + "_bias"], plain[name + "_bias"])
    ids = mx.array([[5, 9, 17, 200]])
    model = load_model(tmp_path / "packed")
    before = load_model(tmp_path / "ours")(ids)
    error = mx.sqrt(mx.square(model(ids) - before).mean() / mx.square(before).mean())
    assert error < 0.03
    convert(tmp_path / "packed", tmp_path / "again")  # a folder of ours, as it is
    assert_close(load_model(tmp_path / "again")(ids), model(ids), atol=0)


def test_its_dense_phi_can_be_upcycled(tmp_path):
    source = checkpoint("moe_llava_phi", tmp_path / "theirs", dense=True)
    convert(source, tmp_path / "ours", dtype="float32", tower=TOWER)
    upcycle(tmp_path / "ours", tmp_path / "sparse", num_experts=4)
    ids = mx.array([[5, 9, 17, 200, 33]])
    child = load_model(tmp_path / "sparse")
    assert "moe" in child.decoder.layers[1]
    assert_close(child(ids), load_model(tmp_path / "ours")(ids), atol=1e-4)


def test_settings_of_its_decoders(tmp_path):
    tower = hub_config("moe_llava_stablelm/tower")
    phi = moe_llava.config(values_of("moe_llava_phi"), tower).text_config
    assert phi.parallel_block and phi.mlp_bias and not phi.lm_head_bias
    assert phi.moe_config is not None and phi.moe_config.num_local_experts == 4
    chat = moe_llava.config(values_of("moe_llava_mistral"), tower).text_config
    assert chat.norm_type == "rms_norm" and chat.kv_heads == 2
    assert chat.max_position_embeddings == 4096  # its attention's window
    with pytest.raises(CheckpointError, match=r"'moe_llava_qwen', but of MoE-LLaVA"):
        moe_llava.config({"model_type": "moe_llava_qwen"})


def test_prompts_are_its_own(tmp_path):
    """The system line and turns of moellava/conversation.py (conv_phi, conv_openchat),
    ended by the vocabulary's own end mark."""
    from small_tokenizers import write_merges

    source = checkpoint("moe_llava_phi", tmp_path / "theirs", vocab=512)
    write_merges(source)
    convert(source, tmp_path / "ours", dtype="float32", tower=TOWER)
    _, processor = load(tmp_path / "ours")
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "Why")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = processor.tokenizer.decode(
        processor(messages).input_ids[0].tolist(), skip_special=False
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions."
        " USER: Hi ASSISTANT: Yes<|endoftext|>USER: Why ASSISTANT:"
    )
