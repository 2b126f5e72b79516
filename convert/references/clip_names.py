"""CLIP towers of open_clip and timm under the names that transformers gives them."""

import re
from collections.abc import Callable

import numpy as np

Read = Callable[[str], np.ndarray]

# transformers' name -> open_clip's, timm's
_NAMES = {
    r"embeddings\.class_embedding": ("visual.class_embedding", "cls_token"),
    r"embeddings\.patch_embedding\.(\w+)": (
        r"visual.conv1.\1",
        r"patch_embed.proj.\1",
    ),
    r"embeddings\.position_embedding\.weight": (
        "visual.positional_embedding",
        "pos_embed",
    ),
    r"pre_layrnorm\.(\w+)": (r"visual.ln_pre.\1", r"norm_pre.\1"),
    r"post_layernorm\.(\w+)": (r"visual.ln_post.\1", r"norm.\1"),
    r"self_attn\.[qkv]_proj\.(\w+)": (r"attn.in_proj_\1", r"attn.qkv.\1"),
    r"self_attn\.out_proj\.(\w+)": (r"attn.out_proj.\1", r"attn.proj.\1"),
    r"layer_norm(\d)\.(\w+)": (r"ln_\1.\2", r"norm\1.\2"),
    r"mlp\.fc1\.(\w+)": (r"mlp.c_fc.\1", r"mlp.fc1.\1"),
    r"mlp\.fc2\.(\w+)": (r"mlp.c_proj.\1", r"mlp.fc2.\1"),
}
_BLOCKS = ("visual.transformer.resblocks.", "blocks.")


def reader(read: Read, *, timm: bool) -> Read:
    """A reader of transformers' names in a checkpoint of open_clip or timm."""
    column = 1 if timm else 0

    def renamed(name: str) -> np.ndarray:
        block, start = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name), ""
        if block:
            start, name = f"{_BLOCKS[column]}{block[1]}.", block[2]
        for pattern, names in _NAMES.items():
            if match := re.fullmatch(pattern, name):
                array = read(start + match.expand(names[column]))
                part = re.match(r"self_attn\.([qkv])_proj", name)
                if part:  # the three are one matrix there
                    return np.split(array, 3)["qkv".index(part[1])]
                return array
        raise KeyError(name)

    return renamed
