"""LLaVA 1.5, original and as transformers writes it -> names of mm1_mlx.models.mm1.

Both say model_type "llava"; the original has mm_vision_tower, transformers text_config.
The original v1.5 has no tower inside: its weights come from the folder that
mm_vision_tower names, through hf_clip's rules. In v1.6 the tower was trained and lies
inside; the any-resolution tiling of v1.6 (model.image_newline) is not in this table.
"""

import re
from dataclasses import replace

from mm1_mlx.config import ConnectorConfig, DecoderConfig, MM1Config, VisionConfig
from mm1_mlx.config_boxes import BoxFormat
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.presets import ENCODERS

from ..rules import Rule, Table, prefixed
from ..source import MODEL, Source
from . import hf_clip, llama
from .fields import Fields


def tower_rules(source: str) -> Table:
    """The CLIP tower under a prefix, in both spellings of transformers."""
    inside = prefixed(hf_clip.TOWER, source="vision_model.")
    return prefixed([*inside, *hf_clip.TOWER], source=source, target="vision.")


HF: Table = [
    *tower_rules("vision_tower."),
    Rule("multi_modal_projector.linear_{j}.{p}", "connector.linear.{j-1}.{p}"),
    *prefixed(llama.RULES, source="language_model.", target="decoder."),
]

# As transformers 5 holds them in memory.
HF_IN_MEMORY: Table = [
    *tower_rules("model.vision_tower."),
    Rule("model.multi_modal_projector.linear_{j}.{p}", "connector.linear.{j-1}.{p}"),
    *prefixed(
        [
            Rule(
                tuple(name.removeprefix("model.") for name in rule.sources),
                rule.target,
                rule.transform,
            )
            for rule in llama.RULES
            if isinstance(rule, Rule) and not rule.target.startswith("lm_head")
        ],
        source="model.language_model.",
        target="decoder.",
    ),
]
# Beside them; original checkpoints have the same name.
HEAD_IN_MEMORY = Rule("lm_head.{p}", "decoder.lm_head.{p}")

ORIGINAL: Table = [
    *tower_rules("model.vision_tower.vision_tower."),
    Rule("model.mm_projector.{j}.{p}", "connector.linear.{j/2}.{p}"),  # GELUs between
    Rule("model.mm_projector.{p}", "connector.linear.0.{p}"),  # projector "linear"
    *prefixed(llama.RULES, target="decoder."),
]

RULES: Table = [*HF, *HF_IN_MEMORY, *ORIGINAL]

# Its training data writes [0.12, 0.30, 0.45, 0.60], parts of the padded square (issue
# 606 of its repository).
_BOXES = BoxFormat(style="llava")

# Class defaults of LlavaConfig.
_DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "pad_token_id": None,
}

_ORIGINAL_DEFAULTS = {
    "mm_projector_type": "linear",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# Towers that original checkpoints name without describing them.
TOWERS = {
    "openai/clip-vit-large-patch14": "vit-l-14-224",
    "openai/clip-vit-large-patch14-336": "vit-l-14-336",
}


def find_tower(name: str | None, tower: dict | None) -> VisionConfig:
    """The encoder of a checkpoint that only names it: by its config, or a known one."""
    if tower is not None:
        return hf_clip.config(tower)
    if name in TOWERS:
        return ENCODERS[TOWERS[name]]
    raise CheckpointError(
        f"This checkpoint uses the vision tower {name!r}, whose shape is not in its "
        f"config. Give the tower's own folder as well."
    )


def mlp_connector(kind: str) -> ConnectorConfig:
    """Of mm_projector_type: "linear", or "mlp2x_gelu" for two with a GELU between."""
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not match and kind != "linear":
        raise CheckpointError(
            f"This checkpoint has the projector {kind!r}, which is not supported; only "
            f"'linear' and 'mlp2x_gelu'."
        )
    depth = int(match[1]) if match else 1
    return ConnectorConfig(
        type="mlp", num_query_tokens=None, mlp_depth=depth, hidden_act="gelu"
    )


def _last_layers(layer: object, where: str) -> int:
    if isinstance(layer, int) and layer < 0:
        return layer
    raise CheckpointError(
        f"This checkpoint has {where} = {layer!r}, which is not supported; only one "
        f"layer, counted from the end (-1, -2, ...)."
    )


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """Of either layout. tower: the tower's own config.json, for the original."""
    if "text_config" in hub_config or "vision_config" in hub_config:
        return _hf(hub_config)
    return _original(hub_config, tower)


def _hf(hub_config: dict) -> MM1Config:
    f = Fields(hub_config, _DEFAULTS, "LLaVA")
    f.refuse("vision_feature_select_strategy", "default")  # drops the class token
    f.refuse("multimodal_projector_bias", True)
    text = hub_config.get("text_config") or {}
    given = hub_config.get("vision_config")
    # LlavaConfig's own default is CLIP ViT-L/14-336; a given one has CLIP's defaults.
    vision = hf_clip.config(given) if given else ENCODERS["vit-l-14-336"]
    layer = _last_layers(f["vision_feature_layer"], "vision_feature_layer")
    return MM1Config(
        vision_config=replace(vision, feature_layer=layer),
        connector_config=replace(
            mlp_connector("mlp2x_gelu"), hidden_act=f.activation("projector_hidden_act")
        ),
        text_config=llama.config(text),
        image_token_id=f["image_token_index"],
        # Class defaults of LlamaConfig: 1 and 2.
        bos_token_id=text.get("bos_token_id", 1),
        eos_token_id=text.get("eos_token_id", 2),
        pad_token_id=f.get("pad_token_id"),
        box_config=_BOXES,
    )


def _original(hub_config: dict, tower: dict | None) -> MM1Config:
    f = Fields(hub_config, _ORIGINAL_DEFAULTS, "LLaVA")
    f.refuse("mm_vision_select_feature", "patch")
    f.refuse("mm_patch_merge_type", "flat")
    f.refuse("mm_use_im_start_end", False)
    f.refuse("mm_use_im_patch_token", False)
    text = llama.config(_decoder_part(hub_config))
    vision = find_tower(hub_config.get("mm_vision_tower"), tower)
    layer = _last_layers(f["mm_vision_select_layer"], "mm_vision_select_layer")
    return MM1Config(
        vision_config=replace(vision, feature_layer=layer),
        connector_config=mlp_connector(f["mm_projector_type"]),
        text_config=text,
        image_token_id=outside_vocabulary(text),
        bos_token_id=f["bos_token_id"],
        eos_token_id=f["eos_token_id"],
        pad_token_id=f.get("pad_token_id"),
        # The first version, which does not pad, never saw boxes.
        box_config=_BOXES if hub_config.get("image_aspect_ratio") == "pad" else None,
    )


def _decoder_part(hub_config: dict) -> dict:
    """The same keys under the decoder's own model_type."""
    kind = hub_config.get("model_type")
    family = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    if kind not in family:
        raise CheckpointError(
            f"This config has model_type {kind!r}, but must be one of "
            f"{', '.join(family)} to be read as LLaVA."
        )
    return hub_config | {"model_type": family[kind]}


def outside_vocabulary(text: DecoderConfig) -> int:
    """The image slots' id where the original code splices features in without one.

    The first id behind the vocabulary: no text can contain it.
    """
    return text.vocab_size


def pads_to_square(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    """How the original code reads a picture, for a tower of OpenAI's CLIP."""
    mode = "pad" if values.get("image_aspect_ratio") == "pad" else "crop"
    vision = find_tower(values.get("mm_vision_tower"), tower)
    return ImageSettings(size=vision.image_size, resize_mode=mode)


def _is_original(values: dict, entries: frozenset[str]) -> bool:
    tiled = "unpad" in str(values.get("mm_patch_merge_type"))
    return "mm_vision_tower" in values and not tiled


ENTRIES = (
    Source(
        name="llava",
        what="LLaVA 1.5 as transformers 4 and 5 write it",
        kind=MODEL,
        rules=[*HF, *HF_IN_MEMORY, HEAD_IN_MEMORY],
        config=config,
        types=("llava",),
        is_it=lambda values, entries: "mm_vision_tower" not in values,
        template="llava-hf",
    ),
    Source(
        name="llava_original",
        what="LLaVA 1.5 of its authors",
        kind=MODEL,
        rules=[
            *ORIGINAL,
            *prefixed(hf_clip.RULES, source="tower/", target="vision."),
        ],
        config=config,
        types=("llava", "llava_llama", "llava_mistral"),
        is_it=_is_original,
        tower=lambda values: values["mm_vision_tower"],
        images=pads_to_square,
        template="llava-v1",
    ),
)
