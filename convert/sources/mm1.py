"""Our own model folders, quantized or not: nothing is renamed.

For `quantize`, `upcycle` and `assemble`, which take a folder of ours or a foreign one.
"""

from mm1_mlx.config import EncoderConfig, MM1Config
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import Rule, Table
from ..source import MODEL, Source

_LAYER = "decoder.layers.{i}"
_SAME = (
    "vision.{rest}",
    "connector.{rest}",
    "tile_connector.{rest}",
    "image_newline",
    "decoder.embed_tokens.{rest}",
    "decoder.norm.{rest}",
    "decoder.lm_head.{rest}",
    _LAYER + ".norm1.{rest}",
    _LAYER + ".norm2.{rest}",
    _LAYER + ".attn.{rest}",
    _LAYER + ".mlp.{rest}",
    _LAYER + ".moe.router.weight",
    _LAYER + ".moe.shared_expert.{rest}",
    _LAYER + ".moe.shared_expert_gate.weight",
)
_STACKS = [
    f"{_LAYER}.moe.experts.{name}" for name in ("gate_up_proj", "up_proj", "down_proj")
]
_BIASES = [f"{name}_bias" for name in _STACKS]

RULES: Table = [
    *(Rule(name, name) for name in (*_SAME, *_STACKS, *_BIASES)),
    *(Rule(f"{name}.weight", name) for name in _STACKS),  # packed
]


def config(values: dict, tower: dict | None = None) -> MM1Config | EncoderConfig:
    """Of a folder of ours, without what quantization changed in it."""
    kind = EncoderConfig if values.get("model_type") == "mm1_vision" else MM1Config
    return kind.from_dict({k: v for k, v in values.items() if k != "quantization"})


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings | None:
    return None if preprocessor is None else ImageSettings.from_dict(preprocessor)


ENTRY = Source(
    name="mm1",
    what="model folders of mm1_mlx itself",
    kind=MODEL,
    rules=RULES,
    config=config,
    types=("mm1", "mm1_vision"),
    images=_images,
)
