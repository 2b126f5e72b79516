"""An MM1 that was trained in PyTorch with our names -> mm1_mlx.models.mm1.

For whoever writes an MM1 in torch and wants to bring it. config.json is ours
(MM1Config.to_dict()) with model_type "mm1_torch". The names are those of our weights
(`python -m mm1_mlx.convert --hf-path FOLDER --dry-run` lists them); linear layers are
torch's own [out, in], which is ours too. These may have torch's layout:

- vision.patch_embed.weight: a convolution [Dv, 3, p, p];
- C-Abstractor blocks: conv2.weight a depthwise convolution [C, 1, 3, 3]; conv1, conv3,
  shortcut, se.fc1 and se.fc2 linear layers or 1x1 convolutions;
- attn.q_proj, k_proj, v_proj apart, or fused in attn.qkv_proj (rows q, k, v);
- mlp.gate_proj, up_proj apart, or fused in mlp.gate_up_proj (rows gate, up);
- experts one by one, moe.experts.{e}.{gate,up,down}_proj.weight [out, in], or stacked
  in moe.experts.gate_up_proj [E, 2F, D] and down_proj [E, D, F]; biases likewise, in
  moe.experts.{e}.{...}_proj.bias or moe.experts.gate_up_proj_bias and down_proj_bias.
"""

from mm1_mlx.config import MM1Config
from mm1_mlx.inputs.settings import ImageSettings

from ..rules import (
    Rule,
    Table,
    concatenate,
    flatten_patches_or_flat,
    oihw_or_ohwi,
    prefixed,
    squeeze_1x1_or_flat,
)
from ..source import MODEL, Source

LAYER = "layers.{i}"


def _same(*names: str) -> Table:
    return [Rule(name, name) for name in names]


def _attention(where: str) -> Table:
    fused = f"{where}.qkv_proj"
    parts = tuple(f"{where}.{x}_proj.{{p}}" for x in "qkv")
    return [
        Rule(f"{fused}.{{p}}", f"{fused}.{{p}}"),
        Rule(parts, f"{fused}.{{p}}", concatenate),
        *_same(f"{where}.o_proj.{{p}}"),
    ]


def _stack(where: str, parts: tuple[str, ...], stack: str) -> Table:
    """A projection of the experts, and its bias: stacked, or one by one."""
    table: Table = []
    for last, end in (("weight", ""), ("bias", "_bias")):
        one = tuple(f"{where}.{{e}}.{part}.{last}" for part in parts)
        fused = concatenate if len(parts) > 1 else None
        target = f"{where}.{stack}{end}"
        table += [Rule(target, target), Rule(one, target, fused, stack="e")]
    return table


def _mlp(where: str, gated: bool) -> Table:
    if not gated:
        return _same(f"{where}.up_proj.{{p}}", f"{where}.down_proj.{{p}}")
    fused = f"{where}.gate_up_proj"
    parts = (f"{where}.gate_proj.{{p}}", f"{where}.up_proj.{{p}}")
    return [
        Rule(f"{fused}.{{p}}", f"{fused}.{{p}}"),
        Rule(parts, f"{fused}.{{p}}", concatenate),
        *_same(f"{where}.down_proj.{{p}}"),
    ]


def _block(where: str) -> Table:
    """A block of the C-Abstractor."""
    flat = [f"{where}.{name}.weight" for name in ("conv1", "conv3", "shortcut")]
    flat += [f"{where}.se.fc1.weight", f"{where}.se.fc2.weight"]
    kept = [f"{where}.norm{k}.{{p}}" for k in (1, 2, 3)]
    kept += [f"{where}.shortcut_norm.{{p}}"]
    kept += [f"{where}.se.fc1.bias", f"{where}.se.fc2.bias"]
    return [
        *(Rule(name, name, squeeze_1x1_or_flat) for name in flat),
        Rule(f"{where}.conv2.weight", f"{where}.conv2.weight", oihw_or_ohwi),
        *_same(*kept),
    ]


_VISION: Table = [
    Rule("patch_embed.weight", "patch_embed.weight", flatten_patches_or_flat),
    *_same("patch_embed.bias", "class_embedding", "position_embedding"),
    *_same("norm_in.{p}", "norm_out.{p}", LAYER + ".norm1.{p}", LAYER + ".norm2.{p}"),
    *_attention(LAYER + ".attn"),
]

_CONNECTOR: Table = [
    *_same("position_embedding", "queries", "eos_tokens", "norm_output.weight"),
    *_same("norm_input.{p}", "proj.{p}", "linear.{j}.{p}", "readout.{j}.{p}"),
    *_same("input_proj.{p}", "input_norm.{p}"),
    *_same(*(f"{LAYER}.{x}_proj.{{p}}" for x in ("q", "kv", "o"))),
    *_same(LAYER + ".norm1.{p}", LAYER + ".norm2.{p}"),
    *_same(LAYER + ".mlp.up_proj.{p}", LAYER + ".mlp.down_proj.{p}"),
    *_block("stage1.{b}"),
    *_block("stage2.{b}"),
]

_MOE = LAYER + ".moe"
_DECODER: Table = [
    *_same("embed_tokens.weight", "norm.{p}", "lm_head.{p}"),
    *_same(LAYER + ".norm1.{p}", LAYER + ".norm2.{p}"),
    *_same(LAYER + ".attn.q_norm.weight", LAYER + ".attn.k_norm.weight"),
    *_attention(LAYER + ".attn"),
    *_same(_MOE + ".router.weight", _MOE + ".shared_expert_gate.weight"),
    *_stack(_MOE + ".experts", ("down_proj",), "down_proj"),
]


def _experts(gated: bool) -> Table:
    """What goes into the experts."""
    if not gated:
        return _stack(_MOE + ".experts", ("up_proj",), "up_proj")
    parts = ("gate_proj", "up_proj")
    return _stack(_MOE + ".experts", parts, "gate_up_proj")


def rules(config: MM1Config, values: dict | None = None) -> Table:
    """The table for a config: an up_proj alone is half of a gated MLP, or all of one
    without a gate."""
    vision, gated = config.vision_config, config.text_config.gated_mlp
    table: Table = [
        *prefixed(_DECODER, "decoder.", "decoder."),
        *prefixed(_mlp(LAYER + ".mlp", gated), "decoder.", "decoder."),
        *prefixed(_mlp(_MOE + ".shared_expert", gated), "decoder.", "decoder."),
        *prefixed(_experts(gated), "decoder.", "decoder."),
    ]
    if vision is not None:
        tower = [*_VISION, *_mlp(LAYER + ".mlp", vision.gated_mlp)]
        table += prefixed(tower, "vision.", "vision.")
        table += prefixed(_CONNECTOR, "connector.", "connector.")
        table += prefixed(_CONNECTOR, "tile_connector.", "tile_connector.")
        table += _same("image_newline")
    return table


def config(values: dict, tower: dict | None = None) -> MM1Config:
    """Ours, under another model_type."""
    return MM1Config.from_dict(values | {"model_type": "mm1"})


def _images(
    values: dict, tower: dict | None, preprocessor: dict | None
) -> ImageSettings | None:
    if preprocessor is not None:
        return ImageSettings.from_dict(preprocessor)
    vision = config(values).vision_config
    return None if vision is None else ImageSettings(size=vision.image_size)


ENTRY = Source(
    name="mm1_torch",
    what="an MM1 that was trained in PyTorch with our names",
    kind=MODEL,
    rules=rules,
    config=config,
    types=("mm1_torch",),
    images=_images,
)
