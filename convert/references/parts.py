"""The original of a checkpoint, put together: encoder, connectors, decoder.

Encoders and decoders are those of transformers, read with the checkpoint's own names;
what it does not have stands in connectors.py. Only one block's weights are in memory at
a time, in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mm1_mlx.errors import CheckpointError

from .. import numbers
from ..conversion import Opened
from ..packed import Packed, bundle, settings_of
from ..pipeline import Weight, prepare, rows_of, unpack
from ..source import DECODER
from . import clip_names, mm1
from .connectors import MLP, CAbstractor, DeepSpeedMoE
from .lazy import attach, without_weights


@dataclass
class Original:
    """The parts of a checkpoint in PyTorch; None where it lacks one.

    connectors: for whole pictures; for crops first where there are two ("crops",
    "overview"). output_norm: of the encoder, where the connector reads what it gives.
    what: whose code it is, for people.
    """

    encoder: nn.Module | None
    feature_layer: int
    drops_class: bool
    connectors: dict[str, nn.Module]
    newline: Callable[[], torch.Tensor] | None
    decoder: nn.Module | None
    output_norm: nn.Module | None = None
    what: str = "transformers, and our own code for what it lacks"


class Arrays:
    """The checkpoint's numbers by name, float32; some names have several spellings."""

    def __init__(self, opened: Opened):
        config = opened.origin.config
        self._arrays = bundle(opened.origin.arrays, settings_of(config))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def read(self, name: str) -> np.ndarray:
        """The numbers of one array; CheckpointError if the checkpoint lacks it."""
        if name not in self._arrays:
            raise CheckpointError(f"The original has no weight {name!r}.")
        array = self._arrays[name]
        if isinstance(array, Packed):
            return unpack(array)
        return numbers.to_float32(np.asarray(array.read()), array.dtype)

    def under(self, *prefixes: str) -> Callable[[str], np.ndarray]:
        """A reader of names below the first prefix that has them."""

        def read(name: str) -> np.ndarray:
            for prefix in prefixes:
                if prefix + name in self:
                    return self.read(prefix + name)
            return self.read(prefixes[0] + name)

        return read


# Where each source has its parts: encoder, connectors, decoder.
_HF_TOWER = ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.")
_ENCODER = {
    "llava": _HF_TOWER,
    "llava_next": _HF_TOWER,
    "llava_original": (
        "tower/vision_model.",
        "tower/",
        "model.vision_tower.vision_tower.vision_model.",
    ),
    "llava_next_original": ("model.vision_tower.vision_tower.vision_model.",),
    "auroracap": ("visual_encoder/vision_model.", "visual_encoder/"),
    "moe_llava": ("model.image_tower.image_tower.vision_model.",),
    "honeybee": ("vision_model.vision_model.", "vision_model."),
    "vl360": ("model.vision_tower.vision_tower.vision_model.",),
    "hyperclovax": ("vision_model.vision_model.", "vision_model."),
    "hf_clip": ("vision_model.", ""),
    "siglip": ("vision_model.", ""),
    "aimv2": ("vision_model.", ""),
    "open_clip_vit": ("",),
    "timm_vit": ("",),
}
_PROJECTOR = {
    "llava": ("multi_modal_projector.", ["linear_1", "linear_2"]),
    "llava_next": ("multi_modal_projector.", ["linear_1", "linear_2"]),
    "llava_original": ("model.mm_projector.", ["0", "2"]),
    "llava_next_original": ("model.mm_projector.", ["0", "2"]),
    "auroracap": ("projector/model.", ["0", "2"]),
    "moe_llava": ("model.mm_projector.image_spatial_proj.", ["0", "2"]),
}
_ABSTRACTOR = {
    "honeybee": {"overview": "abstractor."},
    "vl360": {
        "crops": "model.mm_projector_ctt.",
        "overview": "model.mm_projector_ori.",
    },
    "hyperclovax": {"overview": "mm_projector."},
}
_DECODER = {
    "llava": "language_model.",
    "llava_next": "language_model.",
    "honeybee": "language_model.",
    "hyperclovax": "language_model.",
}
_NOT_IN_TRANSFORMERS = ("tamm_text", "tamm_moe")
_NEWLINE = ("model.image_newline", "image_newline")


def original(opened: Opened) -> Original:
    """The original in PyTorch: transformers' where it has the parts, else our own."""
    name, values = opened.source.name, opened.origin.config
    if opened.source.kind != DECODER and name not in _ENCODER:
        return _own(opened)
    if opened.source.kind == DECODER and name in _NOT_IN_TRANSFORMERS:
        return _own(opened)
    arrays = Arrays(opened)
    config = opened.config
    vision = config.vision_config
    encoder = None
    if vision is not None:
        encoder = _encoder(opened, arrays)
    text = getattr(config, "text_config", None)
    decoder = None if text is None else _decoder(name, values, arrays)
    newline = next((n for n in _NEWLINE if n in arrays), None)
    return Original(
        encoder=encoder,
        feature_layer=vision.feature_layer if vision else -1,
        drops_class=bool(vision and vision.class_token),
        connectors=_connectors(opened, arrays) if vision and text else {},
        newline=(lambda: torch.from_numpy(arrays.read(newline))) if newline else None,
        decoder=decoder,
    )


def _own(opened: Opened) -> Original:
    """Our own code in PyTorch (mm1/); the weights go through the source's table."""
    config: Any = opened.config
    plan = prepare(opened.origin, opened.source, config, "F32", dequantize=True)
    weights = {weight.name: weight for weight in plan.weights}

    def with_weights(name: str, module: nn.Module) -> nn.Module:
        attach(module, lambda inner: _numbers(weights[f"{name}.{inner}"]))
        return module

    vision: Any = config.vision_config
    text: Any = getattr(config, "text_config", None)
    encoder = decoder = None
    connectors = {}
    with without_weights():
        if vision is not None:
            encoder = mm1.Encoder(vision)
        if text is not None:
            decoder = mm1.Decoder(text)
        if vision is not None and text is not None:
            for part, tiles in _own_connectors(config):
                size = vision.hidden_size, text.hidden_size, tiles * vision.num_patches
                connectors[part] = mm1.Connector(config.connector_config, *size)
    ours = {"crops": "tile_connector", "overview": "connector"}
    newline = weights.get("image_newline")
    normed = vision is not None and vision.feature_norm
    return Original(
        encoder=encoder and with_weights("vision", encoder),
        feature_layer=vision.feature_layer if vision else -1,
        drops_class=bool(vision and vision.class_token),
        connectors={k: with_weights(ours[k], v) for k, v in connectors.items()},
        newline=(lambda: torch.from_numpy(_numbers(newline))) if newline else None,
        decoder=decoder and with_weights("decoder", decoder),
        output_norm=encoder.norm_out if encoder and normed else None,
        what="our own code in PyTorch, through the source's table of names",
    )


def _own_connectors(config: Any) -> list[tuple[str, int]]:
    """Which there are, and how many pictures' patches each reads as one map."""
    tiling = config.tiling_config
    if tiling is None or tiling.type != "crops":
        return [("overview", 1)]
    ((rows, columns),) = tiling.grids
    return [("crops", rows * columns), ("overview", 1)]


def _numbers(weight: Weight) -> np.ndarray:
    return rows_of(weight, 1).reshape(weight.shape)


def _encoder(opened: Opened, arrays: Arrays) -> nn.Module:
    import transformers

    name = opened.source.name
    values = opened.origin.config
    given = opened.tower_config or values.get("vision_config") or values
    given = dict(given.get("vision_config") or given)
    kinds = {
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "aimv2": (transformers.Aimv2VisionConfig, transformers.Aimv2VisionModel),
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    }
    kind = next((k for k in kinds if k in str(given.get("model_type", name))), "clip")
    renamed = name in ("open_clip_vit", "timm_vit")
    if renamed or not {"hidden_size", "num_hidden_layers"} <= given.keys():
        given = _shape(opened) if renamed else given | _shape(opened)
    given.pop("model_type", None)
    make_config, make_model = kinds[kind]
    with without_weights():
        model = make_model(make_config(**given))
    read = arrays.under(*_ENCODER[name])
    if renamed:
        read = clip_names.reader(read, timm=name == "timm_vit")
    attach(model, read)
    return model


def _shape(opened: Opened) -> dict[str, Any]:
    """Of a CLIP tower whose config is not transformers'."""
    vision = opened.config.vision_config
    assert vision is not None
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    keys += ("intermediate_size", "image_size", "patch_size", "hidden_act")
    return {key: getattr(vision, key) for key in keys}


def _connectors(opened: Opened, arrays: Arrays) -> dict[str, nn.Module]:
    name, config = opened.source.name, opened.config
    vision, text = config.vision_config, config.text_config  # type: ignore[union-attr]
    assert vision is not None
    width, out = vision.hidden_size, text.hidden_size
    found: dict[str, nn.Module] = {}
    if name in _PROJECTOR:
        prefix, names = _PROJECTOR[name]
        with without_weights():
            found["overview"] = MLP([width] + [out] * len(names), names)
        attach(found["overview"], arrays.under(prefix, "model." + prefix))
        return found
    if name not in _ABSTRACTOR:
        raise CheckpointError(f"There is no PyTorch reference for {name}'s connector.")
    connector = config.connector_config  # type: ignore[union-attr]
    assert connector is not None and connector.num_query_tokens is not None
    for part, prefix in _ABSTRACTOR[name].items():
        table = prefix + "pos_emb"
        rows = arrays.read(table).shape[1] if table in arrays else 0
        with without_weights():
            module = CAbstractor(
                width,
                connector.hidden_size,
                out,
                connector.num_query_tokens,
                rows,
                connector.depth,
                connector.mlp_depth,
            )
        attach(module, arrays.under(prefix))
        found[part] = module
    return found


# transformers' model_type of decoders that hide behind another one.
_TEXT_TYPES = {
    "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral",
    "QH_360VL": "llama", "hyperclovax": "llama", "llava_stablelm": "stablelm",
    "llava_phi": "phi",
}  # fmt: skip


def _decoder(name: str, values: dict, arrays: Arrays) -> nn.Module:
    with without_weights():
        model = _empty_decoder(name, values)
    attach(model, _renamed(arrays, _DECODER.get(name, "")))
    return model


def moe_llava_decoder(values: dict) -> nn.Module:
    """The decoder of a MoE-LLaVA config with random weights."""
    return _empty_decoder("moe_llava", values)


def _empty_decoder(name: str, values: dict) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    text = dict(values.get("text_config") or values)
    kind = (text.pop("model_type", None) or "llama").removeprefix("moe_")
    kind = _TEXT_TYPES.get(kind, kind)
    if kind == "stablelm" and "rope_pct" in text:  # the spelling of its first code
        text["partial_rotary_factor"] = text["rope_pct"]
        text["layer_norm_eps"] = text.get("norm_eps", 1e-5)
    text.pop("architectures", None)
    config = AutoConfig.for_model(kind, **text)
    model = AutoModelForCausalLM.from_config(config)
    if name == "moe_llava":
        _add_experts(model, values, kind)
    return model


def _add_experts(model: nn.Module, values: dict, kind: str) -> None:
    """Make a decoder of transformers what MoE-LLaVA's code makes of it."""
    if kind == "phi":  # its own class has no bias there
        head = nn.Linear(values["hidden_size"], values["vocab_size"], bias=False)
        model.lm_head = head
    moe = values.get("moe") or {}
    if not moe.get("moe_enable"):
        return
    for layer, experts in zip(moe["moe_layers_idx"], moe["num_experts"], strict=True):
        block = model.model.layers[layer]  # type: ignore[union-attr,index]
        block.mlp = DeepSpeedMoE(  # type: ignore[union-attr]
            values["hidden_size"],
            values["intermediate_size"],
            experts,
            moe.get("top_k_experts", 2),
            phi=kind == "phi",
        )


def _renamed(arrays: Arrays, prefix: str) -> Callable[[str], np.ndarray]:
    """transformers' parameter names in memory to those of the files."""
    plain = arrays.under(prefix, "model." + prefix)

    def read(name: str) -> np.ndarray:
        if name == "lm_head.weight" and prefix + name not in arrays:
            if "lm_head.weight" in arrays:
                return arrays.read("lm_head.weight")
            return plain("model.embed_tokens.weight")  # tied
        if ".mlp.experts." in name:
            return _stacked(plain, arrays, prefix, name)
        sparse = name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")
        return plain(sparse if prefix + sparse in arrays else name)

    return read


def _stacked(
    plain: Callable[[str], np.ndarray], arrays: Arrays, prefix: str, name: str
) -> np.ndarray:
    """transformers 5 holds all experts in two arrays; files have one per expert."""
    if prefix + name in arrays:
        return plain(name)
    layer, _, stack = name.partition(".mlp.experts.")
    mixtral = f"{layer}.block_sparse_moe.experts.0.w1.weight"
    where, parts = f"{layer}.mlp.experts", ("gate_proj", "up_proj", "down_proj")
    if prefix + mixtral in arrays:
        where, parts = f"{layer}.block_sparse_moe.experts", ("w1", "w3", "w2")
    gate, up, down = parts
    wanted = (gate, up) if stack == "gate_up_proj" else (down,)
    for mlp in (f"{layer}.block_sparse_moe", f"{layer}.mlp"):  # mlx-lm's stacks
        stacks = [
            f"{mlp}.switch_mlp.{part}_proj.weight" for part in ("gate", "up", "down")
        ]
        if prefix + stacks[0] in arrays:
            chosen = stacks[:2] if stack == "gate_up_proj" else stacks[2:]
            return np.concatenate([plain(name) for name in chosen], axis=1)
    experts = []
    while f"{prefix}{where}.{len(experts)}.{wanted[0]}.weight" in arrays:
        e = len(experts)
        rows = [plain(f"{where}.{e}.{part}.weight") for part in wanted]
        experts.append(np.concatenate(rows))
    return np.stack(experts)
