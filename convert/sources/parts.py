"""Rules that several tables share: fused projections, experts."""

from ..rules import Rule, Table, concatenate, concatenate_each

LAYER = "layers.{i}"  # ours, in encoder and decoder


def fused_qkv(attention: str) -> Rule:
    """q_proj, k_proj and v_proj of `attention` to our one matmul."""
    return Rule(
        tuple(f"{attention}.{x}_proj.{{p}}" for x in "qkv"),
        LAYER + ".attn.qkv_proj.{p}",
        concatenate,
    )


def fused_gate_up(mlp: str, target: str, last: str = "{p}") -> Rule:
    """gate_proj and up_proj of `mlp` to our one matmul, the gate's rows first."""
    return Rule(
        (f"{mlp}.gate_proj.{last}", f"{mlp}.up_proj.{last}"),
        f"{target}.gate_up_proj.{last}",
        concatenate,
    )


def expert_rules(router: str, expert: str, gate: str, up: str, down: str) -> Table:
    """A router and one file entry per expert ("{e}" in `expert`), stacked."""
    moe = LAYER + ".moe"
    return [
        Rule(router + ".weight", moe + ".router.weight"),
        Rule(
            (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
            moe + ".experts.gate_up_proj",
            concatenate,
            stack="e",
        ),
        Rule(f"{expert}.{down}.weight", moe + ".experts.down_proj", stack="e"),
    ]


def experts_in_mlx(mlp: str) -> Table:
    """Stacked, but gate and up apart, as mlx-lm writes the experts of every family."""
    moe, stacks = LAYER + ".moe.experts", mlp + ".switch_mlp"
    return [
        Rule(
            (f"{stacks}.gate_proj.weight", f"{stacks}.up_proj.weight"),
            moe + ".gate_up_proj",
            concatenate_each,
        ),
        Rule(f"{stacks}.down_proj.weight", moe + ".down_proj"),
    ]


def experts_in_memory(mlp: str) -> Table:
    """Stacked and fused, as transformers 5 holds the experts of every family."""
    moe = LAYER + ".moe.experts"
    return [
        Rule(mlp + ".experts.gate_up_proj", moe + ".gate_up_proj"),
        Rule(mlp + ".experts.down_proj", moe + ".down_proj"),
    ]
