"""Configurations: frozen, strict, with the key names of the hub's config.json.

Only plain Python here: importing this module loads neither MLX nor NumPy.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from mm1_mlx.errors import ConfigError

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "silu", "relu", "relu2")
NORMS = ("rms_norm", "layer_norm")
CONNECTORS = ("average_pool", "attention_pool", "c_abstractor", "mlp")


def _one_of(owner: str, key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{owner}.{key} is {value!r}, but must be one of {choices}.")


def _positive(owner: str, config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{owner}.{key} is {value!r}, but must be a whole number of at least 1."
            )


class _Strict:
    """from_dict and to_dict for a frozen dataclass; `_name` is its name in messages."""

    _name = "config"

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The config with these values; an unknown or missing key is a ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError(
                f"{cls._name} is {values!r}, but must be an object of keys and values."
            )
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"{cls._name}: unknown keys {unknown}. Known keys: {sorted(known)}."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls._name}: {str(error).split(') ')[-1]}.") from error

    def to_dict(self) -> dict:
        """A plain dictionary that from_dict turns back into the same config."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class VisionConfig(_Strict):
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
        _positive(
            self._name,
            self,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "image_size",
            "patch_size",
            "num_channels",
        )
        _one_of(self._name, "hidden_act", self.hidden_act, ACTIVATIONS)
        _one_of(self._name, "norm_type", self.norm_type, NORMS)
        _one_of(self._name, "norm_in", self.norm_in, (None, "all", "patches", "embed"))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config.hidden_size is {self.hidden_size}, but must be a "
                f"multiple of num_attention_heads ({self.num_attention_heads}), or "
                f"head_dim must be given."
            )
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"vision_config.image_size is {self.image_size}, but must be at least "
                f"patch_size ({self.patch_size})."
            )
        if not -self.num_hidden_layers <= self.feature_layer <= -1:
            raise ConfigError(
                f"vision_config.feature_layer is {self.feature_layer}, but must be "
                f"between -{self.num_hidden_layers} and -1 (the last block)."
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
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(_Strict):
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
        _one_of(self._name, "type", self.type, CONNECTORS)
        _one_of(self._name, "hidden_act", self.hidden_act, ACTIVATIONS)
        _one_of(self._name, "pooling", self.pooling, ("adaptive", "strided"))
        _one_of(self._name, "variant", self.variant, ("honeybee", "tamm"))
        _positive(self._name, self, "hidden_size", "mlp_depth", "num_attention_heads")
        if self.type == "mlp":
            if self.num_query_tokens is not None:
                raise ConfigError(
                    f"connector_config.num_query_tokens is {self.num_query_tokens}, "
                    f"but an 'mlp' connector keeps every patch: leave it null."
                )
            return
        _positive(self._name, self, "num_query_tokens")
        q = self.num_query_tokens or 0
        if self.type != "attention_pool" and round(q**0.5) ** 2 != q:
            raise ConfigError(
                f"connector_config.num_query_tokens is {q}, but '{self.type}' pools "
                f"to a square grid: use a perfect square such as 64, 144 or 256."
            )

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


@dataclass(frozen=True, kw_only=True)
class MoEConfig(_Strict):
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
        _positive(
            self._name, self, "num_local_experts", "num_experts_per_tok", "sparse_step"
        )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"moe_config.num_experts_per_tok is {self.num_experts_per_tok}, but "
                f"must be between 1 and num_local_experts ({self.num_local_experts})."
            )
        if self.first_sparse_layer < 0:
            raise ConfigError(
                f"moe_config.first_sparse_layer is {self.first_sparse_layer}, but "
                f"must be 0 or more."
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(
                f"moe_config.capacity_factor is {self.capacity_factor}, but must be "
                f"above 0, or null for no limit."
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) has experts."""
        offset = layer - self.first_sparse_layer
        return offset >= 0 and offset % self.sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(_Strict):
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
    rope_scaling: dict | None = None  # {"rope_type": "llama3", ...} or "linear"
    partial_rotary_factor: float = 1.0
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head" (Qwen3) or "full" (OLMoE)
    parallel_block: bool = False  # Phi-2: one norm, attention beside the MLP
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    moe_config: MoEConfig | None = None

    def __post_init__(self):
        if isinstance(self.moe_config, dict):
            object.__setattr__(self, "moe_config", MoEConfig.from_dict(self.moe_config))
        _positive(
            self._name,
            self,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        )
        _one_of(self._name, "hidden_act", self.hidden_act, ACTIVATIONS)
        _one_of(self._name, "norm_type", self.norm_type, NORMS)
        _one_of(self._name, "qk_norm", self.qk_norm, (None, "head", "full"))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"text_config.hidden_size is {self.hidden_size}, but must be a "
                f"multiple of num_attention_heads ({self.num_attention_heads}), or "
                f"head_dim must be given."
            )
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"text_config.num_attention_heads is {self.num_attention_heads}, but "
                f"must be a multiple of num_key_value_heads ({self.kv_heads})."
            )
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(
                f"text_config.partial_rotary_factor is {self.partial_rotary_factor}, "
                f"but must be above 0 and at most 1."
            )
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))
            _one_of(self._name, "rope_scaling.rope_type", kind, ("llama3", "linear"))

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def size_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.size_per_head * self.partial_rotary_factor)

    def is_sparse(self, layer: int) -> bool:
        return self.moe_config is not None and self.moe_config.is_sparse(layer)


@dataclass(frozen=True, kw_only=True)
class MM1Config(_Strict):
    """An image encoder, a connector and a decoder. The folder's config.json."""

    _name = "config"

    vision_config: VisionConfig
    connector_config: ConnectorConfig
    text_config: DecoderConfig
    image_token_id: int  # stands once per image token in input_ids
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "mm1"
    quantization: dict | None = None  # written by `quantize`
    extra: dict = field(default_factory=dict)  # provenance; never read by the model

    def __post_init__(self):
        parts = {
            "vision_config": VisionConfig,
            "connector_config": ConnectorConfig,
            "text_config": DecoderConfig,
        }
        for key, kind in parts.items():
            if isinstance(value := getattr(self, key), dict):
                object.__setattr__(self, key, kind.from_dict(value))
        if self.model_type != "mm1":
            raise ConfigError(
                f"config.model_type is {self.model_type!r}, but must be 'mm1'. Other "
                f"checkpoints must be converted: python -m mm1_mlx.convert --help"
            )
        if not 0 <= self.image_token_id < 2**31:
            raise ConfigError(
                f"config.image_token_id is {self.image_token_id}, but must be 0 or "
                f"more."
            )

    @property
    def tokens_per_image(self) -> int:
        """Q: decoder positions that one image takes."""
        queries = self.connector_config.num_query_tokens
        patches = self.vision_config.num_patches
        return (queries or patches) + self.connector_config.num_eos_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        ids = self.eos_token_id
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)
