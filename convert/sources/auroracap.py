"""AuroraCap: DFN's ViT-H, an MLP and Vicuna in three folders -> mm1_mlx.models.mm1.

Its token merging is left out: at ratio 1.0, which image captioning uses, it merges
nothing.
"""

from dataclasses import replace

from mm1_mlx.config import ConnectorConfig, MM1Config

from ..rules import Rule, Table, prefixed
from ..source import MODEL, Source
from . import hf_clip, llama
from .llava import outside_vocabulary

RULES: Table = [
    *prefixed(hf_clip.RULES, source="visual_encoder/", target="vision."),
    Rule("projector/model.{j}.{p}", "connector.linear.{j/2}.{p}"),  # GELU between
    *prefixed(llama.RULES, target="decoder."),
]


def config(hub_config: dict, tower: dict | None) -> MM1Config:
    """Of the decoder's config.json; tower: visual_encoder/config.json."""
    text = llama.config(hub_config)
    vision = hf_clip.config(tower or {})
    return MM1Config(
        vision_config=replace(vision, feature_layer=-2),
        connector_config=ConnectorConfig(
            type="mlp", num_query_tokens=None, mlp_depth=2, hidden_act="gelu"
        ),
        text_config=text,
        image_token_id=outside_vocabulary(text),
        bos_token_id=hub_config.get("bos_token_id", 1),
        eos_token_id=hub_config.get("eos_token_id", 2),
        pad_token_id=hub_config.get("pad_token_id"),
    )


ENTRY = Source(
    name="auroracap",
    what="AuroraCap: DFN ViT-H, MLP, Vicuna in three folders",
    kind=MODEL,
    rules=RULES,
    config=config,
    is_it=lambda values, entries: {"visual_encoder", "projector"} <= entries,
    folders=("visual_encoder", "projector"),
    template="vicuna",
)
