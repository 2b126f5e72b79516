"""Configurations: frozen, strict, with the key names of the hub's config.json.

Only plain Python here: importing this module loads neither MLX nor NumPy.
"""

import math
from dataclasses import dataclass, field
from typing import Self

from mm1_mlx.config_boxes import BoxFormat
from mm1_mlx.config_checks import (
    LARGEST,
    Strict,
    check_quantization,
    check_rope_scaling,
)
from mm1_mlx.config_tiling import TilingConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.grids import Layout, map_size

__all__ = [
    "ConnectorConfig",
    "DecoderConfig",
    "EncoderConfig",
    "MM1Config",
    "MoEConfig",
    "TilingConfig",
    "VisionConfig",
]

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "silu", "relu", "relu2")
NORMS = ("rms_norm", "layer_norm")
CONNECTORS = ("average_pool", "attention_pool", "c_abstractor", "mlp")


def _check_heads(config: "VisionConfig | DecoderConfig") -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    if config.head_dim is None and width % heads:
        config._refuse(
            "hidden_size",
            f"a multiple of num_attention_heads ({heads}), or head_dim must be given",
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Strict):
    """A ViT: CLIP and DFN, SigLIP, AIM, AIMv2 or tamm, by its switches.

    feature_layer: which block's output the connector reads, -1 the last, -2 the one
    before. feature_norm: whether the output norm is applied to it. MM1 does not say
    (mm1-facts 1.3); Honeybee reads -1 before the norm, LLaVA -2 before the norm.
    """

    _name = "vision_config"

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int = 14
    num_channels: int = 3
    head_dim: int | None = None  # hidden_size // num_attention_heads when not given
    hidden_act: str = "quick_gelu"
    gated_mlp: bool = False  # AIMv2: SwiGLU
    norm_type: str = "layer_norm"
    norm_bias: bool = True  # of LayerNorms; tamm has none
    norm_eps: float = 1e-5
    class_token: bool = True
    norm_in: str | None = None  # None, "all" (CLIP), "patches" (tamm), "embed" (AIMv2)
    norm_out: bool = True  # whether there is a norm after the last block
    patch_bias: bool = False
    qkv_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    feature_layer: int = -1
    feature_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "hidden_size", "num_hidden_layers", "num_attention_heads")
        self._at_least(1, "intermediate_size", "image_size", "patch_size", "head_dim")
        self._above_zero("norm_eps")
        self._one_of("hidden_act", ACTIVATIONS)
        self._one_of("norm_type", NORMS)
        self._one_of("norm_in", (None, "all", "patches", "embed"))
        _check_heads(self)
        if self.num_channels != 3:
            self._refuse("num_channels", "3: pictures are read as RGB")
        if self.image_size < self.patch_size:
            self._refuse("image_size", f"at least patch_size ({self.patch_size})")
        if not -self.num_hidden_layers <= self.feature_layer <= -1:
            self._refuse(
                "feature_layer",
                f"between -{self.num_hidden_layers} and -1 (the last block)",
            )
        if self.feature_norm and not self.norm_out:
            self._refuse(
                "feature_norm", "false where norm_out is false: no norm exists"
            )

    @property
    def grid(self) -> int:
        """G: patches per side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P: patches per image."""
        return self.grid**2

    @property
    def size_per_head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(Strict):
    """How encoder patches become decoder tokens.

    type: "average_pool", "attention_pool", "c_abstractor" or "mlp" (which keeps every
    patch). num_query_tokens: Q, tokens per image; a perfect square for the poolings
    on the grid; None for "mlp".
    """

    _name = "connector_config"

    type: str
    num_query_tokens: int | None = 144  # MM1 section 3.2
    hidden_size: int = 1024  # C-Abstractor and attention pool
    depth: int = 3  # blocks before and after the pool; attention: layers
    mlp_depth: int = 2
    num_attention_heads: int = 16  # attention pool
    hidden_act: str = "silu"
    position_embedding: bool = True
    norm_input: bool = False  # Honeybee calls it prenorm
    pooling: str = "adaptive"  # torch's windows; "strided": tamm's stride and kernel
    norm_bias: bool = True  # tamm: none
    squeeze_bias: bool = True  # tamm: none
    squeeze_ratio: float = 0.25  # of the block's input width
    variant: str = "honeybee"  # C-Abstractor; "tamm": see inner_width, readout_width
    norm_eps: float = 1e-5
    norm_output: bool = False  # RMSNorm: image tokens on the scale of text embeddings
    num_eos_tokens: int = 0  # Honeybee's learned tokens after the image

    def __post_init__(self):
        super().__post_init__()
        self._one_of("type", CONNECTORS)
        self._one_of("hidden_act", ACTIVATIONS)
        self._one_of("pooling", ("adaptive", "strided"))
        self._one_of("variant", ("honeybee", "tamm"))
        self._at_least(1, "hidden_size", "mlp_depth", "num_attention_heads")
        self._at_least(1, "num_query_tokens")
        self._at_least(0, "depth", "num_eos_tokens")
        self._above_zero("squeeze_ratio", "norm_eps")
        queries = self.num_query_tokens
        if self.type == "mlp":
            if queries is not None:
                raise ConfigError(
                    f"connector_config.num_query_tokens is {queries}, but an 'mlp' "
                    f"connector keeps every patch: leave it null."
                )
            return
        if queries is None:
            self._refuse("num_query_tokens", "a whole number of at least 1")
        if self.type == "attention_pool":
            self._check_attention_pool()
        elif math.isqrt(queries) ** 2 != queries:
            raise ConfigError(
                f"connector_config.num_query_tokens is {queries}, but '{self.type}' "
                f"pools to a square grid: use a perfect square such as 64, 144 or 256."
            )

    def _check_attention_pool(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            self._refuse(
                "hidden_size",
                f"a multiple of num_attention_heads ({self.num_attention_heads})",
            )
        if self.depth == 0:  # the queries would never read the picture
            self._refuse("depth", "at least 1 for 'attention_pool'")

    def inner_width(self, width_in: int) -> int:
        """Channels inside a C-Abstractor block that reads `width_in` channels.

        timm, so Honeybee: as many as it gives. tamm (layers/convolution.py): as many
        as it reads, the last convolution changes them.
        """
        return width_in if self.variant == "tamm" else self.hidden_size

    def squeeze_width(self, width_in: int) -> int:
        """Channels inside a block's squeeze-excite; timm rounds, tamm rounds up."""
        share = self.squeeze_ratio * width_in
        return math.ceil(share) if self.variant == "tamm" else round(share)

    def readout_width(self, width_out: int) -> int:
        """Hidden width of the C-Abstractor's MLP: Honeybee takes the decoder's."""
        return self.hidden_size if self.variant == "tamm" else width_out


# Expert, token and choice share a number of 32 bits, of which the last two may take 22;
# see kernels/expert_keys.py.
MOST_EXPERTS = 1024


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Strict):
    """Which decoder layers are sparse, and how their router works and is trained."""

    _name = "moe_config"

    num_local_experts: int
    num_experts_per_tok: int = 2  # MM1 section 4
    sparse_step: int = 2  # one layer in this many is sparse
    first_sparse_layer: int = (
        1  # MM1 does not say; axlearn starts dense, MoE-LLaVA at 0
    )
    norm_topk_prob: bool = True  # the chosen weights sum to 1
    router_aux_loss_coef: float = 0.01  # MM1 section 4
    router_z_loss_coef: float = 0.001  # MM1 section 4
    moe_intermediate_size: int | None = None  # the decoder's intermediate_size
    shared_expert_intermediate_size: int = 0  # Qwen1.5-MoE; 0: no shared expert
    capacity_factor: float | None = None  # axlearn trains with 2.0; None: dropless

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "num_local_experts", "num_experts_per_tok", "sparse_step")
        if self.num_local_experts > MOST_EXPERTS:
            self._refuse("num_local_experts", f"at most {MOST_EXPERTS}")
        self._at_least(1, "moe_intermediate_size")
        self._at_least(0, "first_sparse_layer", "shared_expert_intermediate_size")
        self._at_least(0, "router_aux_loss_coef", "router_z_loss_coef")
        self._above_zero("capacity_factor", otherwise=", or null for no limit")
        if self.num_experts_per_tok > self.num_local_experts:
            self._refuse(
                "num_experts_per_tok",
                f"between 1 and num_local_experts ({self.num_local_experts})",
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) has experts."""
        offset = layer - self.first_sparse_layer
        return offset >= 0 and offset % self.sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Strict):
    """A decoder-only language model, dense or with experts in some layers."""

    _name = "text_config"

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None  # num_attention_heads when not given
    head_dim: int | None = None  # hidden_size // num_attention_heads when not given
    max_position_embeddings: int = 4096
    hidden_act: str = "silu"
    gated_mlp: bool = True  # SwiGLU; False: one up projection
    norm_type: str = "rms_norm"
    norm_bias: bool = True  # of LayerNorms
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" or "linear", ...}
    partial_rotary_factor: float = 1.0
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head" (Qwen3), "full" (OLMoE), "rotated_head" (tamm)
    parallel_block: bool = False  # Phi-2: one norm, attention beside the MLP
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    moe_config: MoEConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "hidden_size", "num_hidden_layers", "num_attention_heads")
        self._at_least(1, "intermediate_size", "vocab_size", "num_key_value_heads")
        self._at_least(1, "head_dim", "max_position_embeddings")
        self._above_zero("norm_eps", "rope_theta")
        self._one_of("hidden_act", ACTIVATIONS)
        self._one_of("norm_type", NORMS)
        self._one_of("qk_norm", (None, "head", "full", "rotated_head"))
        _check_heads(self)
        if self.num_attention_heads % self.kv_heads:
            self._refuse(
                "num_attention_heads",
                f"a multiple of num_key_value_heads ({self.kv_heads})",
            )
        self._check_rope()
        if self.lm_head_bias and self.tie_word_embeddings:
            self._refuse("lm_head_bias", "false where tie_word_embeddings is true")

    def _check_rope(self) -> None:
        if not 0 < self.partial_rotary_factor <= 1:
            self._refuse("partial_rotary_factor", "above 0 and at most 1")
        if self.rotary_dims % 2 or not self.rotary_dims:
            raise ConfigError(
                f"text_config.partial_rotary_factor ({self.partial_rotary_factor}) of "
                f"head_dim ({self.size_per_head}) is {self.rotary_dims} rotary "
                f"dimensions, but must be an even number of at least 2."
            )
        if self.rope_scaling is not None:
            kind = check_rope_scaling("text_config.rope_scaling", self.rope_scaling)
            if kind == "default":
                object.__setattr__(self, "rope_scaling", None)

    @property
    def kv_heads(self) -> int:
        """KV: heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def size_per_head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.size_per_head * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts in place of its MLP."""
        return self.moe_config is not None and self.moe_config.is_sparse(layer)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Strict):
    """An image encoder alone: a part to assemble a model from. Its config.json."""

    _name = "config"

    vision_config: VisionConfig
    model_type: str = "mm1_vision"
    extra: dict = field(default_factory=dict)  # provenance; never read by the model

    def __post_init__(self):
        super().__post_init__()
        self._one_of("model_type", ("mm1_vision",))


@dataclass(frozen=True, kw_only=True)
class MM1Config(Strict):
    """An image encoder, a connector and a decoder. The folder's config.json.

    A decoder alone (Llama, Mixtral, ... as they are) has neither vision_config nor
    connector_config nor image_token_id; it reads text only.
    """

    _name = "config"

    vision_config: VisionConfig | None = None
    connector_config: ConnectorConfig | None = None
    tiling_config: TilingConfig | None = None  # None: a picture is one tile
    text_config: DecoderConfig
    image_token_id: int | None = None  # stands once per image token in input_ids
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "mm1"
    quantization: dict | None = None  # written by `quantize`
    box_config: BoxFormat | None = None  # None: how it writes boxes is not known
    extra: dict = field(default_factory=dict)  # provenance; never read by the model

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The config with these values; a key or value not understood: ConfigError."""
        if isinstance(values, dict):  # before all keys of another family are unknown
            _check_model_type(values.get("model_type", "mm1"))
        return super().from_dict(values)

    def __post_init__(self):
        super().__post_init__()
        _check_model_type(self.model_type)
        self._at_least(0, "image_token_id", "bos_token_id", "pad_token_id")
        if not all(0 <= i <= LARGEST for i in self.eos_token_ids):
            self._refuse("eos_token_id", f"between 0 and {LARGEST}")
        if self.quantization is not None:
            check_quantization("config.quantization", self.quantization)
        self._check_parts()

    def _check_parts(self) -> None:
        """All of the image side, or none; what the connector needs of the encoder."""
        connector, vision = self.connector_config, self.vision_config
        if connector is None or vision is None or self.image_token_id is None:
            keys = ("vision_config", "connector_config", "image_token_id")
            given = [key for key in keys if getattr(self, key) is not None]
            if given:
                lacking = [key for key in keys if key not in given]
                raise ConfigError(
                    f"config has {', '.join(given)} but no {', '.join(lacking)}: give "
                    f"all three, or none of them for a model that reads text only."
                )
            return
        pools = connector.type in ("average_pool", "c_abstractor")
        side = math.isqrt(connector.num_query_tokens or 0)
        if pools and connector.pooling == "strided" and side > vision.grid:
            raise ConfigError(
                f"connector_config.num_query_tokens is {connector.num_query_tokens}, "
                f"but 'strided' pooling gives at most the encoder's {vision.grid} x "
                f"{vision.grid} patches: use fewer, or pooling 'adaptive'."
            )
        if connector.type == "c_abstractor" and connector.depth:
            width = min(vision.hidden_size, connector.hidden_size)
            if connector.squeeze_width(width) < 1:
                connector._refuse(
                    "squeeze_ratio", f"large enough to leave a channel of {width}"
                )

    @property
    def reads_images(self) -> bool:
        """Whether there is an encoder; a decoder alone has none."""
        return self.vision_config is not None

    @property
    def tokens_per_image(self) -> int:
        """Q: decoder positions that one image takes; 0 for a decoder alone."""
        if self.connector_config is None or self.vision_config is None:
            return 0
        queries = self.connector_config.num_query_tokens
        patches = self.vision_config.num_patches
        return (queries or patches) + self.connector_config.num_eos_tokens

    def image_tokens(
        self, layout: Layout | None = None, grid: int | None = None
    ) -> int:
        """Decoder positions that a picture takes.

        layout: its tiles; None for a picture that is read whole. grid: patches per
        side of a tile, where tiles are not of the encoder's own size. Text between
        tiles is not counted.
        """
        connector, vision = self.connector_config, self.vision_config
        if connector is None or vision is None:
            return 0
        patches = (grid or vision.grid) ** 2
        tile = (connector.num_query_tokens or patches) + connector.num_eos_tokens
        if layout is None:
            return tile
        if self.tiling_config is None or not self.tiling_config.arranges:
            return layout.tiles * tile
        if self.tiling_config.type == "crops":
            return 2 * tile
        if layout.tiles == 1:
            return tile + 1
        side = math.isqrt(tile)
        rows, columns = map_size(layout, side, self.tiling_config.unpad)
        return tile + rows * (columns + self.tiling_config.unpad)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        ids = self.eos_token_id
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)


def _check_model_type(kind: object) -> None:
    if kind == "mm1_vision":
        raise ConfigError(
            "This is an image encoder alone. Build a model of it and a decoder: "
            "python -m mm1_mlx.convert assemble --help"
        )
    if kind != "mm1":
        raise ConfigError(
            f"config.model_type is {kind!r}, but must be 'mm1'. Other checkpoints must "
            f"be converted: python -m mm1_mlx.convert --help"
        )
