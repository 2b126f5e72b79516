"""Which weight gets how many bits: by part, or by a mixed recipe.

Only plain Python here. Settings of one weight are a dictionary as mlx-lm's config.json
has it: {"group_size": 64, "bits": 4, "mode": "affine"}.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mm1_mlx.config_checks import QUANTIZATION_MODES, check_quantization
from mm1_mlx.errors import ConfigError

PARTS = ("encoder", "connector", "attention", "mlp", "experts", "embeddings", "head")
_KEPT = ("encoder", "connector")  # 16 bit unless they are named

# Low and high bits. Which layers get the high ones is mlx-lm's choice, after
# llama.cpp's Q4_K_M (mlx_lm/convert.py).
MIXED = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}

Choose = Callable[[str, tuple[int, ...]], dict | None]


def part_of(name: str) -> str | None:
    """The part that a weight belongs to; None for what is never quantized.

    Routers decide which experts run, and the gate of a shared expert has one row: both
    are tiny, so they stay as they are. So do norms, biases, convolutions and position
    tables.
    """
    where, _, rest = name.partition(".")
    if name.endswith(("router.weight", "shared_expert_gate.weight", "_bias", ".bias")):
        return None
    if where == "vision":
        return "encoder" if _is_matrix(rest) else None
    if where == "connector":
        return "connector" if _is_matrix(rest) else None
    if where != "decoder":
        return None
    if rest.startswith("embed_tokens."):
        return "embeddings"
    if rest.startswith("lm_head."):
        return "head"
    if ".experts." in rest:
        return "experts"
    if ".attn." in rest:
        return "attention" if rest.endswith("_proj.weight") else None
    return "mlp" if rest.endswith("_proj.weight") else None


def _is_matrix(name: str) -> bool:
    """Weights of linear layers: the names of convolutions and tables are others."""
    return bool(re.search(r"(_proj|\bproj|linear\.\d+|readout\.\d+)\.weight\Z", name))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized.

    mode, bits, group_size: of what is quantized; None: the mode's usual ones (affine:
    4 bits in groups of 64). parts: other bits for a part, or None to keep it as it is;
    the encoder and the connector are kept unless they are named here. mixed: a name of
    MIXED instead of `bits`.
    """

    mode: str = "affine"
    bits: int | None = None
    group_size: int | None = None
    parts: dict[str, int | None] = field(default_factory=dict)
    mixed: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in QUANTIZATION_MODES:
            modes = ", ".join(map(repr, QUANTIZATION_MODES))
            raise ConfigError(f"q-mode is {self.mode!r}, but must be one of {modes}.")
        if unknown := sorted(self.parts.keys() - set(PARTS)):
            raise ConfigError(
                f"There is no part {unknown[0]!r}. The parts are: {', '.join(PARTS)}."
            )
        if self.mixed is not None and self.mixed not in MIXED:
            raise ConfigError(
                f"There is no recipe {self.mixed!r}. The recipes are: "
                f"{', '.join(MIXED)}."
            )
        if self.mixed is not None and (self.mode != "affine" or self.bits is not None):
            raise ConfigError(
                f"The recipe {self.mixed!r} has its own bits, in the mode 'affine'. "
                f"Leave out --q-bits and --q-mode."
            )
        for bits in {self.default["bits"], *self.parts.values()} - {None}:
            check_quantization("quantization", self.default | {"bits": bits})

    @property
    def default(self) -> dict:
        """The settings of what no part or recipe changes."""
        sizes, choices = QUANTIZATION_MODES[self.mode]
        bits = self.bits
        if bits is None:
            usual = 4 if 4 in choices else choices[0]
            bits = MIXED[self.mixed][0] if self.mixed else usual
        size = self.group_size
        if size is None:
            size = 64 if 64 in sizes else sizes[0]
        return {"group_size": size, "bits": bits, "mode": self.mode}

    def chooser(self, num_layers: int) -> Choose:
        """(name, shape) -> the settings of a weight of a model, or None to keep it."""

        def choose(name: str, shape: tuple[int, ...]) -> dict | None:
            """The settings of one weight."""
            part = part_of(name)
            if part is None or len(shape) < 2:
                return None
            settings: dict = self.default
            if part in self.parts:
                if self.parts[part] is None:
                    return None
                settings = settings | {"bits": self.parts[part]}
            elif part in _KEPT:
                return None
            elif self.mixed is not None and _important(name, num_layers):
                settings = settings | {"bits": MIXED[self.mixed][1]}
            return settings if shape[-1] % settings["group_size"] == 0 else None

        return choose


def _important(name: str, num_layers: int) -> bool:
    """What a mixed recipe gives its high bits: mlx-lm's rule.

    The head, and in the first and last eighth of the layers and every third one
    between: down projections and values. Our values share a matrix with queries and
    keys, which get the high bits with them.
    """
    if ".lm_head." in name:
        return True
    match = re.search(r"\.layers\.(\d+)\.", name)
    if not match or not re.search(r"(qkv_proj|down_proj)(\.weight)?\Z", name):
        return False
    layer, eighth = int(match[1]), num_layers // 8
    ends = layer < eighth or layer >= 7 * num_layers // 8
    return ends or (layer - eighth) % 3 == 2


def most_common(settings: Iterable[dict]) -> dict:
    """The settings that most weights have; of equals the first."""
    every = list(settings)
    return max(every, key=every.count)


def settings_for_config(chosen: dict[str, dict], default: dict) -> dict:
    """The `quantization` of a config.json: the default, and what differs from it.

    chosen: weight name -> its settings, of every weight that is quantized. Of others
    the loader sees that they have no scales.
    """
    values = dict(default)
    for name, settings in chosen.items():
        if settings != default:
            values[name.removesuffix(".weight")] = settings
    return values


def parts_from_text(texts: list[str]) -> dict[str, int | None]:
    """Of "experts=6" or "encoder=16" (kept as it is): part -> bits or None."""
    parts: dict[str, int | None] = {}
    for text in texts:
        name, _, bits = text.partition("=")
        if name not in PARTS or not (bits.isascii() and bits.isdigit()):
            raise ConfigError(
                f"--q-part is {text!r}, but must be PART=BITS, like experts=6; the "
                f"parts are: {', '.join(PARTS)}."
            )
        parts[name] = None if int(bits) == 16 else int(bits)
    return parts
