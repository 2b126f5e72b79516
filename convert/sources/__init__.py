"""One module per source: RULES, and a reader of its config.json.

A reader takes the hub's dictionary in the spelling of transformers 4 or 5 and gives our
configuration. What it cannot represent is a CheckpointError, never a silent default;
where a file leaves a value out, the family's class default (transformers 5.23) is used
and stands in the module.
"""

from importlib import import_module
from types import ModuleType

from mm1_mlx.errors import CheckpointError

# name: what it reads
SOURCES = {
    "open_clip_vit": "vision tower of an open_clip file (Apple's DFN)",
    "hf_clip": "CLIP vision tower of transformers 4 or 5",
    "siglip": "SigLIP vision tower of transformers",
    "aim": "Apple's AIM, version 1",
    "aimv2": "Apple's AIMv2: original, channels-last and transformers files",
    "tamm": "vision transformer, C-Abstractor and experts of Apple's tamm",
    "llama": "Llama, Vicuna, Mistral, Qwen2, Qwen2.5 and Qwen3",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "qwen_moe": "Qwen1.5-MoE and Qwen3-MoE",
    "stablelm": "StableLM 2",
    "phi": "Phi-1.5 and Phi-2",
    "llava": "LLaVA 1.5: original and transformers files",
    "honeybee": "Honeybee: CLIP, C-Abstractor, Vicuna",
    "moe_llava": "MoE-LLaVA with StableLM",
}


def load_source(name: str) -> ModuleType:
    """The module of a source."""
    if name not in SOURCES:
        raise CheckpointError(
            f"There is no source named {name!r}. The sources are: {', '.join(SOURCES)}."
        )
    return import_module(f".{name}", __name__)
