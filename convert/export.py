"""A model folder of ours in the hub's layout, so that work done here is not locked in.

What transformers has a class for: decoders like Llama, Qwen2, Qwen3 and Mixtral, and
LLaVA around the first three, with LLaVA-NeXT's tiles or without; and 360VL, for its own
code. Import after export is the identity, what the folder knows
of its making included: it stands in config.json under "mm1_mlx".
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.checkpoint.folder import read_config, weight_files, write_json
from mm1_mlx.checkpoint.writer import Slot, WeightWriter
from mm1_mlx.config import DecoderConfig, MM1Config, TilingConfig, VisionConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import PREPROCESSOR_FILE, ImageSettings

from . import export_vl360, numbers
from .export_vl360 import Piece
from .output import CARD, card, making, with_extra
from .readers import LazyArray, read_safetensors

_TYPES = {name: key for key, name in numbers.BY_NAME.items()}


def export(
    folder: Path,
    out: Path,
    *,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the model of `folder` as transformers does; gives its config.json.

    provenance: kept in config.json and the model card, beside what the folder has.
    Raises CheckpointError for a model that transformers has no class for, and for a
    quantized one (its numbers are not those of the hub's format).
    """
    config = read_config(folder)
    if config.quantization is not None:
        raise CheckpointError(
            f"{folder} is quantized, which the hub's layout cannot hold. Export the "
            f"model that it was made from, or write 16 bit weights first "
            f"(python -m mm1_mlx.convert --hf-path {folder} -d)."
        )
    arrays: dict[str, LazyArray] = {}
    for path in weight_files(folder):
        arrays |= read_safetensors(path)
    values = hub_config(config)
    pieces = list(_pieces(config, values, arrays))
    slots = [Slot(p.name, arrays[p.source].dtype, p.shape) for p in pieces]
    values["torch_dtype"] = _TYPES[slots[-1].dtype]
    total = sum(slot.nbytes for slot in slots)
    made = with_extra(config, "exported", {"to": "hf"} | (provenance or {}))
    values["mm1_mlx"] = made.extra
    with making(out, total, overwrite, progress, [folder]) as (new, count):
        with WeightWriter(new, slots, metadata="pt") as writer:
            for piece in pieces:
                for block in numbers.rows(piece.take(arrays[piece.source].read())):
                    before = writer.written
                    writer.add(piece.name, block)
                    count(writer.written - before)
        _write_processor(folder, new, config)
        if values["model_type"] == "QH_360VL":
            export_vl360.write_tower(new, values, _vision_config(_encoder(config)))
        (new / CARD).write_text(card(made, "transformers"), encoding="utf-8")
        write_json(new / "config.json", values)
    return values


def _write_processor(folder: Path, new: Path, config: MM1Config) -> None:
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.inputs.tokenizer import has_tokenizer

    if has_tokenizer(folder):
        Processor.from_folder(folder, config).save(new)
    elif (file := folder / "preprocessor_config.json").is_file():
        (new / file.name).write_bytes(file.read_bytes())
    if config.tiling_config is not None and config.tiling_config.type == "anyres":
        shots = replace(ImageSettings.read(folder), resize_mode="crop").to_dict()
        del shots["resize_mode"]
        shots |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": _pinpoints(config.tiling_config, _encoder(config)),
        }
        write_json(new / PREPROCESSOR_FILE, shots)


def _encoder(config: MM1Config) -> VisionConfig:
    assert config.vision_config is not None
    return config.vision_config


# --- config.json -----------------------------------------------------------------


def hub_config(config: MM1Config) -> dict[str, Any]:
    """The config.json of transformers; CheckpointError where it has no class."""
    text = _decoder_config(config.text_config)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if config.vision_config is None or config.connector_config is None:
        return {**text, **ids}
    kind, architecture = "llava", "LlavaForConditionalGeneration"
    connector, tiling = config.connector_config, config.tiling_config
    if tiling is not None and tiling.type == "crops":
        tower = _vision_config(config.vision_config)
        return export_vl360.config_values(config, {**text, **ids}, tower)
    if tiling is not None and tiling.type != "anyres":
        _refuse(
            f"no layout there can say how it cuts pictures ({tiling.type}): only this "
            f"folder can"
        )
    if connector.type != "mlp" or connector.mlp_depth != 2 or connector.norm_output:
        _refuse("its connector is not LLaVA's MLP of two layers")
    if tiling is not None:
        if not tiling.unpad or tiling.overview != "squash" or any(tiling.pad_color):
            _refuse("its tiles are not padded as LLaVA-NeXT's are")
        kind, architecture = "llava_next", "LlavaNextForConditionalGeneration"
    if config.vision_config.feature_norm:
        _refuse("its encoder's output norm is applied")
    values = {
        "model_type": kind,
        "architectures": [architecture],
        "text_config": {**text, **ids},
        "vision_config": _vision_config(config.vision_config),
        "image_token_index": config.image_token_id,
        "projector_hidden_act": connector.hidden_act,
        "vision_feature_layer": config.vision_config.feature_layer,
        "vision_feature_select_strategy": "default",
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
    }
    if tiling is not None:
        values["image_grid_pinpoints"] = _pinpoints(tiling, config.vision_config)
    return values


def _pinpoints(tiling: TilingConfig, vision: VisionConfig) -> list[list[int]]:
    """The grids as LLaVA-NeXT has them: [height, width] in pixels."""
    return [[n * vision.image_size for n in grid] for grid in tiling.grids]


def _refuse(why: str) -> None:
    raise CheckpointError(
        f"This model cannot be written in the hub's layout: {why}. What can be written "
        f"are models of the shape of LLaVA, LLaVA-NeXT, 360VL, Llama, Qwen2, Qwen3 and "
        f"Mixtral."
    )


def _decoder_config(c: DecoderConfig) -> dict[str, Any]:
    if c.norm_type != "rms_norm" or c.parallel_block or not c.gated_mlp:
        _refuse("its decoder is not like Llama (RMSNorm, gated MLP)")
    if c.partial_rotary_factor != 1 or c.lm_head_bias:
        _refuse("its decoder has partial RoPE, or a bias in its head")
    kind, extra = _family(c)
    values = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.kv_heads,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "hidden_act": c.hidden_act,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    if c.head_dim is not None:
        values["head_dim"] = c.head_dim
    return values | extra


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def _family(c: DecoderConfig) -> tuple[str, dict[str, Any]]:
    """model_type, and the keys that only it has."""
    moe = c.moe_config
    if moe is not None:
        plain = not (c.qkv_bias or c.qk_norm or c.attention_out_bias or c.mlp_bias)
        regular = moe.sparse_step == 1 and moe.first_sparse_layer == 0
        same = moe.moe_intermediate_size in (None, c.intermediate_size)
        shared = moe.shared_expert_intermediate_size
        if not (plain and regular and same and moe.norm_topk_prob and not shared):
            _refuse(
                "its experts are not like Mixtral's (in every layer, as wide as the "
                "MLP, their weights summing to 1)"
            )
        return "mixtral", {
            "num_local_experts": moe.num_local_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "router_aux_loss_coef": moe.router_aux_loss_coef,
            "sliding_window": None,
        }
    if c.qk_norm == "head":
        if c.mlp_bias or c.qkv_bias != c.attention_out_bias:
            _refuse("its biases are not Qwen3's")
        return "qwen3", {"attention_bias": c.qkv_bias, "use_sliding_window": False}
    if c.qk_norm is not None:
        _refuse(f"its queries and keys are normalised otherwise ({c.qk_norm})")
    if c.qkv_bias and not c.attention_out_bias:
        if c.mlp_bias:
            _refuse("its MLP has biases and its attention only some")
        return "qwen2", {"use_sliding_window": False}
    return "llama", {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _vision_config(c: VisionConfig) -> dict[str, Any]:
    like_clip = (
        c.class_token
        and c.norm_in == "all"
        and c.norm_type == "layer_norm"
        and c.norm_bias
        and c.norm_out
        and not c.gated_mlp
        and not c.patch_bias
        and c.qkv_bias
        and c.attention_out_bias
        and c.mlp_bias
        and c.head_dim in (None, c.hidden_size // c.num_attention_heads)
    )
    if not like_clip:
        _refuse("its encoder is not a CLIP ViT")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_channels": c.num_channels,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_act": c.hidden_act,
        "layer_norm_eps": c.norm_eps,
        "projection_dim": c.hidden_size,
    }


# --- names -----------------------------------------------------------------------


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _rows(start: int, stop: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array[start:stop]


def _expert(e: int, start: int, stop: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array[e, start:stop]


def _pieces(
    config: MM1Config, values: dict[str, Any], arrays: dict[str, LazyArray]
) -> Iterator[Piece]:
    """Every array of the hub's layout."""
    if values["model_type"] == "QH_360VL":
        yield from export_vl360.pieces(config, values, arrays)
        return
    multi = config.vision_config is not None
    for name, array in arrays.items():
        part, _, rest = name.partition(".")
        if part == "decoder":
            prefix = "language_model." if multi else ""
            yield from _decoder(config.text_config, prefix, rest, name, array.shape)
        elif part == "vision":
            assert config.vision_config is not None
            yield from _vision(config.vision_config, rest, name, array.shape)
        elif part == "image_newline":
            yield Piece(name, array.shape, name, _same)
        else:
            _, number, kind = rest.split(".")
            linear = f"multi_modal_projector.linear_{int(number) + 1}.{kind}"
            yield Piece(linear, array.shape, name, _same)


_PLAIN = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.o_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.down_proj": "mlp.down_proj",
}


def _decoder(
    c: DecoderConfig, prefix: str, rest: str, name: str, shape: tuple[int, ...]
) -> Iterator[Piece]:
    if not rest.startswith("layers."):
        head = "" if rest.startswith("lm_head.") else "model."
        yield Piece(f"{prefix}{head}{rest}", shape, name, _same)
        return
    _, number, inner = rest.split(".", 2)
    layer = f"{prefix}model.layers.{number}"
    stem, _, kind = inner.rpartition(".")
    if stem in _PLAIN:
        yield Piece(f"{layer}.{_PLAIN[stem]}.{kind}", shape, name, _same)
    elif stem == "attn.qkv_proj":
        heads, d = c.num_attention_heads, c.size_per_head
        sizes = [("q", heads * d), ("k", c.kv_heads * d), ("v", c.kv_heads * d)]
        yield from _split(f"{layer}.self_attn", sizes, kind, shape, name)
    elif stem == "mlp.gate_up_proj":
        half = shape[0] // 2
        sizes = [("gate", half), ("up", half)]
        yield from _split(f"{layer}.mlp", sizes, kind, shape, name)
    elif inner == "moe.router.weight":
        yield Piece(f"{layer}.block_sparse_moe.gate.weight", shape, name, _same)
    else:
        yield from _experts(f"{layer}.block_sparse_moe", kind, shape, name)


def _split(
    where: str,
    sizes: list[tuple[str, int]],
    kind: str,
    shape: tuple[int, ...],
    name: str,
) -> Iterator[Piece]:
    start = 0
    for letter, size in sizes:
        target = f"{where}.{letter}_proj.{kind}"
        yield Piece(target, (size, *shape[1:]), name, _rows(start, start + size))
        start += size


def _experts(
    where: str, stack: str, shape: tuple[int, ...], name: str
) -> Iterator[Piece]:
    experts, rows, columns = shape
    names = ("w1", "w3") if stack == "gate_up_proj" else ("w2",)
    size = rows // len(names)
    for e in range(experts):
        for k, w in enumerate(names):
            target = f"{where}.experts.{e}.{w}.weight"
            take = _expert(e, k * size, (k + 1) * size)
            yield Piece(target, (size, columns), name, take)


_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "norm_in": "pre_layrnorm",  # sic
    "norm_out": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def _vision(
    c: VisionConfig, rest: str, name: str, shape: tuple[int, ...]
) -> Iterator[Piece]:
    tower = "vision_tower.vision_model."
    if rest == "patch_embed.weight":
        conv = (c.hidden_size, c.num_channels, c.patch_size, c.patch_size)

        def as_conv(array: np.ndarray) -> np.ndarray:
            p = c.patch_size
            return array.reshape(-1, p, p, c.num_channels).transpose(0, 3, 1, 2)

        target = tower + "embeddings.patch_embedding.weight"
        yield Piece(target, conv, name, as_conv)
        return
    if rest in _VISION:
        yield Piece(tower + _VISION[rest], shape, name, _same)
        return
    stem, _, kind = rest.rpartition(".")
    if stem in _VISION:
        yield Piece(f"{tower}{_VISION[stem]}.{kind}", shape, name, _same)
        return
    _, number, inner = stem.split(".", 2)
    layer = f"{tower}encoder.layers.{number}"
    if inner == "attn.qkv_proj":
        third = shape[0] // 3
        sizes = [(x, third) for x in "qkv"]
        yield from _split(f"{layer}.self_attn", sizes, kind, shape, name)
    else:
        yield Piece(f"{layer}.{_VISION[inner]}.{kind}", shape, name, _same)
