"""Conversions without a stored fixture: against transformers or torch, made here."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from parity import expected, pixels
from test_parity_transformers import make, randomize

from convert.__main__ import main
from convert.conversion import convert
from convert.export import export
from convert.origin import read_arrays
from helpers import FIXTURES, assert_close, assert_equal, need
from mm1_mlx import load
from mm1_mlx.checkpoint.folder import read_weights
from mm1_mlx.errors import CheckpointError
from mm1_mlx.loading import load_encoder, load_model

# float32, logits or states of order 1; independent codes agree to 5e-6
ATOL = 5e-5

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def write(folder, config: dict, arrays: dict) -> None:
    """A folder as the hub has it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: mx.contiguous(mx.array(array)) for name, array in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)


# --- With transformers ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name, more",
    [
        ("StableLm", {"use_qkv_bias": True}),
        ("Mistral", {"sliding_window": None}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Phi", {}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_a_decoder_that_transformers_saved(name, more, tmp_path):
    torch = need("torch")
    theirs = make(name, **TEXT | more)
    theirs.save_pretrained(tmp_path / "theirs")
    args = ["--hf-path", str(tmp_path / "theirs"), "--mlx-path", str(tmp_path / "ours")]
    assert main([*args, "--dtype", "float32"]) == 0
    ids = np.random.default_rng(0).integers(3, 320, (1, 20))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    assert_close(load_model(tmp_path / "ours")(mx.array(ids)), wanted, atol=ATOL)


@pytest.mark.parametrize("size", [(50, 30), (28, 28), (20, 90)], ids=str)
def test_llava_next_with_tiles(size, tmp_path):
    """The whole way: a picture of any shape, its tiles, and logits."""
    torch = need("torch")
    module = need("transformers.models.llava_next.image_processing_pil_llava_next")
    transformers = need("transformers")
    tile, grids = 28, [[1, 2], [2, 1], [2, 2], [3, 1]]
    pinpoints = [[tile * rows, tile * columns] for rows, columns in grids]
    torch.manual_seed(0)
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_grid_pinpoints=pinpoints,
        image_token_index=319,
        vision_feature_layer=-2,
    )
    config._attn_implementation = "eager"
    theirs = transformers.LlavaNextForConditionalGeneration(config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    reader = module.LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
    )
    reader.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", dtype="float32")
    model, processor = load(tmp_path / "ours")
    noise = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8)
    inputs = processor("5 9 <image> 17 4", images=[noise], use_template=False)
    logits = model(inputs.input_ids, inputs.pixel_values, layouts=inputs.layouts)
    # Our own pixels for both: test_tiling.py compares those.
    shots = np.array(inputs.pixel_values).transpose(0, 3, 1, 2)[None]
    shown = reader(noise, return_tensors="pt")
    assert shown["pixel_values"].shape == shots.shape
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(np.array(inputs.input_ids).astype(np.int64)),
            pixel_values=torch.tensor(shots),
            image_sizes=shown["image_sizes"],
        ).logits.numpy()
    assert inputs.input_ids.shape[1] == wanted.shape[1]
    assert_close(logits, wanted, atol=ATOL)
    # And back: what is exported is the same model, and reads the same pixels.
    export(tmp_path / "ours", tmp_path / "back")
    again, info = type(theirs).from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.image_grid_pinpoints == pinpoints
    for name, array in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], array), name
    reread = type(reader).from_pretrained(tmp_path / "back")(noise, return_tensors="pt")
    assert torch.equal(reread["pixel_values"], shown["pixel_values"])


# --- Encoders in other spellings -----------------------------------------------------


def test_an_encoder_of_timm(tmp_path):
    """The same encoder under open_clip's and timm's names gives the same folder."""
    folder = FIXTURES / "openclip_vit_h/open_clip"
    convert(folder, tmp_path / "one", dtype="float32")
    named = {
        r"visual\.conv1\.": "patch_embed.proj.",
        r"visual\.class_embedding": "cls_token",
        r"visual\.positional_embedding": "pos_embed",
        r"visual\.ln_pre": "norm_pre",
        r"visual\.ln_post": "norm",
        r"visual\.transformer\.resblocks": "blocks",
        r"\.ln_(\d)": r".norm\1",
        r"attn\.in_proj_": "attn.qkv.",
        r"attn\.out_proj": "attn.proj",
        r"mlp\.c_fc": "mlp.fc1",
        r"mlp\.c_proj": "mlp.fc2",
        r"visual\.proj": "head.weight",
    }
    arrays = {}
    for name, lazy in read_arrays(folder).items():
        array = lazy.read()
        if not name.startswith("visual."):
            continue
        for pattern, text in named.items():
            name = re.sub(pattern, text, name)
        lead = {"cls_token": (1, 1), "pos_embed": (1,)}.get(name, ())
        arrays[name] = np.array(array).reshape(*lead, *array.shape)
    config = {
        "architecture": "vit_huge_patch14_clip_quickgelu_70",
        "model_args": {"embed_dim": 160, "depth": 3, "num_heads": 2, "mlp_ratio": 0.25},
        "pretrained_cfg": {"crop_mode": "squash"},
    }
    write(tmp_path / "timm", config, arrays)
    convert(tmp_path / "timm", tmp_path / "two", dtype="float32")
    values = expected("openclip_vit_h")
    shots = pixels(values["pixel_values"])
    (first, one), (second, two) = (load_encoder(tmp_path / n) for n in ("one", "two"))
    assert_equal(second(shots), first(shots))
    assert (one.size, one.resize_mode) == (two.size, two.resize_mode)
    config["architecture"] = "vit_base_patch16_siglip_224"
    write(tmp_path / "other", config, arrays)
    with pytest.raises(CheckpointError, match=r"vit_base_patch16_siglip_224"):
        convert(tmp_path / "other", tmp_path / "three", source="timm_vit")


def test_aim_version_1(tmp_path):
    """Its position table is computed: it is not in the file, which is a .pt."""
    torch = need("torch")
    from reference.aim import AIM

    torch.manual_seed(0)
    reference = AIM(width=48, blocks=3, heads=3, side=5, patch=9)
    randomize(reference)
    hub = {"img_size": 45, "patch_size": 9, "embed_dim": 48}
    folder = tmp_path / "aim"
    folder.mkdir()
    config = {"config": hub | {"num_blocks": 3, "num_heads": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(reference.state_dict(), folder / "model.pt")
    convert(folder, tmp_path / "ours", dtype="float32")
    encoder, _ = load_encoder(tmp_path / "ours")
    x = np.random.default_rng(0).standard_normal((2, 3, 45, 45), np.float32)
    with torch.no_grad():
        states, _ = reference(torch.tensor(x))
    assert_close(encoder.hidden_states(pixels(x))[-1], states[-1], atol=ATOL)


# --- From a PyTorch training run -----------------------------------------------------


def torch_spelling(arrays: dict, patch: int) -> dict:
    """Our weights as a torch module may hold them (convert/sources/mm1_torch.py)."""
    found = {}
    for name, array in arrays.items():
        array = np.array(array)
        if name == "vision.patch_embed.weight":
            grid = array.reshape(len(array), patch, patch, 3)
            found[name] = grid.transpose(0, 3, 1, 2)
        elif re.search(r"stage\d\.\d+\.conv2\.weight", name):
            found[name] = array.transpose(0, 3, 1, 2)
        elif re.search(r"stage\d.*(conv1|conv3|shortcut|se\.fc\d)\.weight", name):
            found[name] = array[..., None, None]
        elif ".experts.gate_up_proj" in name:
            start = name.removesuffix("gate_up_proj")
            for e, both in enumerate(array):
                for part, half in zip(("gate", "up"), np.split(both, 2), strict=True):
                    found[f"{start}{e}.{part}_proj.weight"] = half
        elif ".experts.down_proj" in name:
            start = name.removesuffix("down_proj")
            found |= {f"{start}{e}.down_proj.weight": x for e, x in enumerate(array)}
        elif ".mlp.gate_up_proj." in name:
            for part, half in zip(("gate", "up"), np.split(array, 2), strict=True):
                found[name.replace("gate_up", part)] = half
        else:
            found[name] = array
    return found


@pytest.mark.parametrize(
    "folder, tower",
    [
        ("honeybee/last", None),
        ("moe_llava_stablelm", "moe_llava_stablelm/tower"),
        ("vl360", "vl360/tower"),
    ],
)
def test_an_mm1_from_torch(folder, tower, tmp_path):
    ours = tmp_path / "ours"
    convert(
        FIXTURES / folder,
        ours,
        dtype="float32",
        tower=FIXTURES / tower if tower else None,
    )
    config = json.loads((ours / "config.json").read_text())
    known = read_weights(ours)
    arrays = torch_spelling(known, config["vision_config"]["patch_size"])
    assert arrays.keys() != known.keys()
    write(tmp_path / "torch", config | {"model_type": "mm1_torch"}, arrays)
    convert(tmp_path / "torch", tmp_path / "again", dtype="float32")
    found = read_weights(tmp_path / "again")
    assert found.keys() == known.keys()
    for name in known:
        assert_equal(found[name], known[name])


# --- Without any original code -------------------------------------------------------


def test_hyperclovax_by_structure(tmp_path):
    """Its tower, connector and decoder, put together from other codes: every weight
    finds its place, and the states are those of the torch references."""
    need("torch")
    transformers = need("transformers")
    from convert.references.connectors import CAbstractor

    vision = transformers.SiglipVisionConfig(**TOWER)
    text = transformers.LlamaConfig(**TEXT)
    tower = transformers.SiglipVisionModel(vision)
    decoder = transformers.LlamaForCausalLM(text)
    bridge = CAbstractor(48, 48, 64, queries=4, positions=16)
    arrays = {}
    for start, module in (
        ("vision_model.vision_model.", tower),
        ("mm_projector.", bridge),
        ("language_model.", decoder),
    ):
        randomize(module)
        for name, weight in module.state_dict().items():
            name = name.removeprefix("vision_model.")
            arrays[start + name] = weight.numpy()
    arrays["image_newline"] = np.zeros(64, np.float32)
    config = {
        "model_type": "hyperclovax_vlm",
        "vision_config": vision.to_dict(),
        "text_config": text.to_dict(),
        "num_queries_vis_abstractor_image": 4,
        "img_start_id": 318,
        "use_nth_layer": -1,
        "max_num_grids": 4,
    }
    write(tmp_path / "theirs", config, arrays)
    convert(tmp_path / "theirs", tmp_path / "ours", dtype="float32")
    model, processor = load(tmp_path / "ours")
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    inputs = processor("5 <image> 9", images=[picture], use_template=False)
    logits = model(inputs.input_ids, inputs.pixel_values, layouts=inputs.layouts)
    assert np.isfinite(np.array(logits)).all()
    import torch

    shots = torch.tensor(np.array(inputs.pixel_values).transpose(0, 3, 1, 2))
    with torch.no_grad():
        states = tower(shots, output_hidden_states=True).hidden_states[-1]
        tokens = bridge(states).numpy()
    assert_close(model.connector(model.vision(inputs.pixel_values)), tokens, atol=ATOL)
