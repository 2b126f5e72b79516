"""Text models of Apple's tamm 0.2.0 -> names of mm1_mlx.models.decoder.

tamm_text: AFMTextV7 without reuse of keys and values (num_kv_reuse_layers 0).
tamm_moe: AFMParallelTrackMoEConfig with one track, whose layers may have experts: the
decoder that holds tamm's MixtureOfExperts. Of its attention only "local_rope" has a
place here, and its router's logits must not be capped.

A folder for `convert` has the module's state_dict() as model.safetensors or model.pt,
and a config.json with the arguments of the builder (AFMTextV7.create_basic_builder) or
the fields of the config, and "model_type": "tamm_text" or "tamm_moe" (our own
convention: tamm writes no such file). "max_position_embeddings" may be added; tamm has
none, and 4096 is our choice.
"""

from mm1_mlx.config import DecoderConfig, MM1Config, MoEConfig
from mm1_mlx.errors import CheckpointError

from ..rules import Array, Drop, Rule, Table, concatenate, squeeze_first, swap_last
from ..source import DECODER, Source
from .fields import Fields
from .parts import LAYER
from .tamm import experts_down, experts_gate_up

_ENDS: Table = [
    Rule("embedding.weight", "embed_tokens.weight"),
    Rule("output_norm.weight", "norm.weight"),
    Drop("output_transform.weight", why="the token table (tied)"),
]


def _halves(array: Array, head: int, heads: int) -> Array:
    """Rows of the first `heads` heads from pairs to halves.

    tamm rotates neighbours (0, 1), (2, 3), ...; we rotate i with i + head / 2, as Llama
    does. So in every head the even rows come first. The rest (values) stays.
    """
    count, more = heads * head, array.shape[1:]
    rotated = array[:count].reshape(heads, head // 2, 2, *more).swapaxes(1, 2)
    return concatenate(rotated.reshape(count, *more), array[count:])


def _attention(source: str, target: str, c: DecoderConfig) -> Table:
    head, norms = c.size_per_head, source + ".qk_norm."
    rotated = c.num_attention_heads + c.kv_heads

    def fused(weight: Array) -> Array:
        return _halves(weight, head, rotated)

    def norm(weight: Array) -> Array:
        return _halves(weight, head, 1)

    return [
        Rule(
            source + ".qkv_transform.fused_linear.weight",
            target + ".qkv_proj.weight",
            fused,
        ),
        Rule(norms + "query_norm.weight", target + ".q_norm.weight", norm),
        Rule(norms + "key_norm.weight", target + ".k_norm.weight", norm),
        Rule(source + ".output_transform.weight", target + ".o_proj.weight"),
    ]


def _layer(source: str, target: str, c: DecoderConfig) -> Table:
    """A layer of AFMTextV7."""
    mlp = source + ".feed_forward"
    hidden = mlp + ".hidden_transform.linear_"
    return [
        Rule(source + ".attention.norm.weight", target + ".norm1.weight"),
        *_attention(source + ".attention", target + ".attn", c),
        Rule(mlp + ".norm.weight", target + ".norm2.weight"),
        Rule(
            (hidden + "0.weight", hidden + "1.weight"),
            target + ".mlp.gate_up_proj.weight",
            concatenate,
        ),
        Rule(mlp + ".output_transform.weight", target + ".mlp.down_proj.weight"),
    ]


def text_rules(config: MM1Config, values: dict) -> Table:
    """The table of AFMTextV7 for a config: heads are reordered by their size."""
    return [*_ENDS, *_layer("layers.layer_{i}", LAYER, config.text_config)]


def _of_one_track(rule: Rule | Drop) -> Rule:
    """The same weight of the only track: (1, n), or (1, in, out) for [out, in]."""
    assert isinstance(rule, Rule)
    inner = rule.transform or (lambda array: array)
    one = squeeze_first if "norm" in rule.target else _matrix

    def transform(*arrays: Array) -> Array:
        return inner(*map(one, arrays))

    return Rule(rule.source, rule.target, transform)


def _matrix(weight: Array) -> Array:
    return swap_last(squeeze_first(weight))


def moe_rules(config: MM1Config, values: dict) -> Table:
    """Layers are counted within segments; between two of them the tracks meet."""
    per_segment = values.get(_SEGMENT) or _MOE_DEFAULTS[_SEGMENT]
    table = list(_ENDS)
    for i in range(config.text_config.num_hidden_layers):
        source = f"layers.segment_{i // per_segment}.layer_{i % per_segment}"
        target, sparse = f"layers.{i}", source + ".feed_forward"
        experts = sparse + ".experts"
        dense = _layer(source, target, config.text_config)
        table += [_of_one_track(rule) for rule in dense]
        table += [
            Rule(
                sparse + ".router.input_transform.weight",
                target + ".moe.router.weight",
                _matrix,
            ),
            Rule(
                (
                    experts + ".hidden_transform.linear_0.weight",
                    experts + ".hidden_transform.linear_1.weight",
                ),
                target + ".moe.experts.gate_up_proj",
                experts_gate_up,
            ),
            Rule(
                experts + ".output_transform.weight",
                target + ".moe.experts.down_proj",
                experts_down,
            ),
        ]
    return table


_SEGMENT = "num_layers_per_track_per_sync_point"

# Defaults of AFMTextV7.create_basic_builder.
_TEXT_DEFAULTS = {
    "vocab_size": 153600,
    "hidden_dim": 2048,
    "num_layers": 56,
    "num_kv_reuse_layers": 21,
    "num_heads": 16,
    "num_kv_heads": 2,
    "hidden_dim_scale_factor": 3.25,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 4096,
}

# Of AFMParallelTrackMoEConfig.
_MOE_DEFAULTS = {
    "vocab_size": 153600,
    "num_tracks": 8,
    "num_layers_per_track": 48,
    _SEGMENT: 4,
    "hidden_dim": 2048,
    "attention_hidden_dim": 512,
    "dense_feed_forward_hidden_dim": 5888,
    "sparse_feed_forward_hidden_dim": 2944,
    "num_heads": 4,
    "num_kv_heads": None,
    "rope_theta": 500_000.0,
    "attention_layer_pattern": [
        "local_rope",
        "local_rope",
        "local_rope",
        "global_nope",
    ],
    "local_attention_window_size": 4096,
    "feed_forward_layer_pattern": ["dense", "sparse"],
    "num_experts": 40,
    "num_experts_per_token": 2,
    "experts_router_logits_cap": 50.0,
    "pre_norm": "rms_norm",
    "post_norm": None,
    "pre_residual_norm": None,
    "tracks_dispatch_norm": None,
    "tracks_combine_norm": None,
    "scale_qk_norm": True,
    "norm_eps": 1e-5,
    "tracks_combine_op": "mean",
    "max_position_embeddings": 4096,
}


def config(values: dict) -> DecoderConfig:
    """Of AFMTextV7's arguments."""
    f = Fields(values, _TEXT_DEFAULTS, "tamm text")
    f.refuse("num_kv_reuse_layers", 0)
    return DecoderConfig(
        hidden_size=f["hidden_dim"],
        intermediate_size=round(f["hidden_dim"] * f["hidden_dim_scale_factor"]),
        num_hidden_layers=f["num_layers"],
        num_attention_heads=f["num_heads"],
        num_key_value_heads=f.get("num_kv_heads"),
        vocab_size=f["vocab_size"],
        max_position_embeddings=f["max_position_embeddings"],
        rope_theta=float(f["rope_theta"]),
        norm_eps=1e-5,
        qk_norm="rotated_head",
        tie_word_embeddings=True,
    )


def moe_config(values: dict) -> DecoderConfig:
    """Of AFMParallelTrackMoEConfig's fields."""
    f = Fields(values, _MOE_DEFAULTS, "tamm parallel-track")
    f.refuse("num_tracks", 1)
    f.refuse("pre_norm", "rms_norm")
    f.refuse("scale_qk_norm", True)
    for key in ("post_norm", "pre_residual_norm", "tracks_dispatch_norm"):
        f.refuse(key, None)
    f.refuse("tracks_combine_norm", None)
    if values.get("experts_router_logits_cap", 50.0) is not None:
        raise CheckpointError(
            "The tamm parallel-track config caps the router's logits "
            "(experts_router_logits_cap), which is not supported; only null."
        )
    if set(f["attention_layer_pattern"]) != {"local_rope"}:
        raise CheckpointError(
            f"The tamm parallel-track config has attention_layer_pattern = "
            f"{f['attention_layer_pattern']}, which is not supported; only "
            f"'local_rope'."
        )
    window = f["local_attention_window_size"] + 1  # tamm leaves out the token itself
    width, heads = f["attention_hidden_dim"], f["num_heads"]
    return DecoderConfig(
        hidden_size=f["hidden_dim"],
        intermediate_size=f["dense_feed_forward_hidden_dim"],
        num_hidden_layers=f["num_layers_per_track"],
        num_attention_heads=heads,
        num_key_value_heads=f.get("num_kv_heads"),
        head_dim=width // heads,
        vocab_size=f["vocab_size"],
        max_position_embeddings=min(f["max_position_embeddings"], window),
        rope_theta=float(f["rope_theta"]),
        norm_eps=f["norm_eps"],
        qk_norm="rotated_head",
        tie_word_embeddings=True,
        moe_config=_experts(f),
    )


def _experts(f: Fields) -> MoEConfig | None:
    """Which layers are sparse: every k-th from some layer on, of the pattern."""
    pattern, count = list(f["feed_forward_layer_pattern"]), f["num_layers_per_track"]
    sparse = [i for i in range(count) if pattern[i % len(pattern)] == "sparse"]
    if not sparse:
        return None
    step = sparse[1] - sparse[0] if len(sparse) > 1 else count
    if sparse != list(range(sparse[0], count, step)):
        raise CheckpointError(
            f"The tamm parallel-track config has feed_forward_layer_pattern = "
            f"{pattern}, which is not supported; only every k-th layer sparse."
        )
    return MoEConfig(
        num_local_experts=f["num_experts"],
        num_experts_per_tok=f["num_experts_per_token"],
        sparse_step=step,
        first_sparse_layer=sparse[0],
        moe_intermediate_size=f["sparse_feed_forward_hidden_dim"],
    )


ENTRIES = (
    Source(
        name="tamm_text",
        what="AFMTextV7 of Apple's tamm, without reuse of keys and values",
        kind=DECODER,
        rules=text_rules,
        config=lambda values, tower: config(values),
        types=("tamm_text",),
    ),
    Source(
        name="tamm_moe",
        what="the parallel-track decoder with experts of Apple's tamm, with one track",
        kind=DECODER,
        rules=moe_rules,
        config=lambda values, tower: moe_config(values),
        types=("tamm_moe",),
    ),
)
