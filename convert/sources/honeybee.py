"""Honeybee (kakaobrain/honeybee): CLIP, C-Abstractor, Vicuna -> mm1_mlx.models.mm1.

The names of its C-Abstractor are those of every public one (360VL, HyperCLOVAX).
"""

from dataclasses import replace

from mm1_mlx.config import ConnectorConfig, MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import (
    Rule,
    Table,
    drop_cls_row,
    oihw_to_ohwi,
    prefixed,
    squeeze_1x1,
    squeeze_first,
)
from ..source import MODEL, Source
from . import llama
from .fields import Fields
from .hf_clip import config as clip_config
from .llava import find_tower, outside_vocabulary, tower_rules


def _stage(source: str, target: str) -> Table:
    """One stage of three blocks; Honeybee counts blocks from 1, we from 0."""
    block, ours = source + ".b{b}", target + ".{b-1}"
    table: Table = []
    for k in (1, 2, 3):
        layout = oihw_to_ohwi if k == 2 else squeeze_1x1  # the second is depthwise 3x3
        weight = f"{block}.conv{k}.conv.weight"
        table.append(Rule(weight, f"{ours}.conv{k}.weight", layout))
        table.append(Rule(f"{block}.conv{k}.bn.{{p}}", f"{ours}.norm{k}.{{p}}"))
    for k in (1, 2):
        excite = f"{block}.se.fc{k}"
        table.append(Rule(excite + ".weight", f"{ours}.se.fc{k}.weight", squeeze_1x1))
        table.append(Rule(excite + ".bias", f"{ours}.se.fc{k}.bias"))
    shortcut = block + ".downsample"
    return [
        *table,
        Rule(shortcut + ".conv.weight", ours + ".shortcut.weight", squeeze_1x1),
        Rule(shortcut + ".bn.{p}", ours + ".shortcut_norm.{p}"),
    ]


ABSTRACTOR: Table = [
    Rule("pos_emb", "position_embedding", drop_cls_row),
    Rule("prenorm.{p}", "norm_input.{p}"),
    *_stage("net.0", "stage1"),
    *_stage("net.2", "stage2"),  # net.1 is the pool
    Rule("readout.{j}.{p}", "readout.{j/2}.{p}"),  # activations between
    Rule("eos_tokens", "eos_tokens", squeeze_first),
]

RULES: Table = [
    *tower_rules("vision_model."),
    *prefixed(ABSTRACTOR, source="abstractor.", target="connector."),
    *prefixed(llama.RULES, source="language_model.", target="decoder."),
]

# configs/model_config/c-abs.yaml
_PROJECTOR = {
    "projector_type": "c-abs",
    "depth": 3,
    "mlp_depth": 2,
    "hidden_size": 1024,
    "num_eos_tokens": 0,
    "pos_emb": True,
    "prenorm": False,
    "feature_layer_index": -1,
}


def abstractor_config(values: dict) -> ConnectorConfig:
    """Of a projector_config with num_query_tokens (or num_queries) in it."""
    f = Fields(values, _PROJECTOR, "Honeybee projector")
    f.refuse("projector_type", "c-abs")
    return ConnectorConfig(
        type="c_abstractor",
        num_query_tokens=values.get("num_queries") or f["num_query_tokens"],
        hidden_size=f["hidden_size"],
        depth=f["depth"],
        mlp_depth=f["mlp_depth"],
        position_embedding=f["pos_emb"],
        norm_input=f["prenorm"],
        num_eos_tokens=f["num_eos_tokens"],
    )


def config(hub_config: dict, tower: dict | None = None) -> MM1Config:
    """Of a Honeybee folder, new or old spelling.

    Old files write visual_projector_config, and num_query_tokens beside it. A
    vision_config without layers names the tower in pretrained_vision_name_or_path.
    """
    projector = hub_config.get("projector_config")
    if projector is None:
        projector = hub_config.get("visual_projector_config")
    if projector is None or "text_config" not in hub_config:
        raise CheckpointError(
            "This config has no projector_config and text_config. Is it Honeybee's?"
        )
    queries = projector.get("num_query_tokens") or hub_config.get("num_query_tokens")
    vision_values = hub_config.get("vision_config") or {}
    if "num_hidden_layers" in vision_values:
        vision = clip_config(vision_values)
    else:
        name = vision_values.get("pretrained_vision_name_or_path")
        vision = find_tower(name, tower)
    text_values = hub_config["text_config"]
    text = llama.config(text_values)
    return MM1Config(
        vision_config=replace(
            vision, feature_layer=projector.get("feature_layer_index", -1)
        ),
        connector_config=abstractor_config(projector | {"num_query_tokens": queries}),
        text_config=text,
        image_token_id=outside_vocabulary(text),
        # Class defaults of LlamaConfig: 1 and 2. Honeybee pads with <unk>, which is 0.
        bos_token_id=text_values.get("bos_token_id", 1),
        eos_token_id=text_values.get("eos_token_id", 2),
        pad_token_id=text_values.get("pad_token_id") or 0,
    )


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings:
    size = config(values, tower).vision_config.image_size  # type: ignore[union-attr]
    return ImageSettings(size=size, resize_mode="squash")


def _is_it(values: dict, entries: frozenset[str]) -> bool:
    projector = "projector_config" in values or "visual_projector_config" in values
    return projector and "lm_config" in values


ENTRY = Source(
    name="honeybee",
    what="Honeybee: CLIP, C-Abstractor, Vicuna",
    kind=MODEL,
    rules=RULES,
    config=config,
    is_it=_is_it,
    images=_images,
    template="honeybee",
)
