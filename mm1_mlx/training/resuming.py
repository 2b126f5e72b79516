"""What a fine-tuning run may go on from: the same command, or another one by force."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm1_mlx.errors import ConfigError
from mm1_mlx.training.state import load_state
from mm1_mlx.training.trainer import changes

# The flags of `lora` where they are not the settings' own names.
_FLAGS = {
    "steps": "--iters",
    "batch": "--batch-size",
    "accumulate": "--grad-accumulation-steps",
    "rates": "--part-rate",
    "max_tokens": "--max-seq-length",
    "chunk": "--vocabulary-chunk",
    "window": "--length-window",
    "recompute": "--grad-checkpoint",
    "betas": "",
}
_PLAN_FLAGS = {
    "layers": "--num-layers, --first-layers",
    "first": "--num-layers, --first-layers",
    "projections": "--projections",
    "parts": "--train",
    "rank": "--rank, --train",
    "scale": "--alpha, --rslora",
    "dropout": "--dropout",
    "dora": "--fine-tune-type, --train",
}


def flag_of(name: str) -> str:
    """The flag of `lora` that sets an entry of a recipe; '' where none does."""
    kind, _, rest = name.partition(".")
    if kind == "settings":
        rest = rest.partition(".")[0]
        return _FLAGS.get(rest, f"--{rest.replace('_', '-')}")
    if kind == "plan":  # "parts.attention.rank"
        first, _, last = rest.partition(".")
        return _PLAN_FLAGS.get(last.rpartition(".")[2], _PLAN_FLAGS.get(first, ""))
    known = {"model": "--model", "base": "--model", "data": "--data", "seed": "--seed"}
    return known.get(kind, "")


def check_changes(
    file: Path, recipe: dict[str, Any], force: bool, tell: Callable[[str], None]
) -> None:
    """ConfigError where a checkpoint is of another recipe, unless forced.

    recipe: of this run, with its seed. tell: receives what is changed by force.
    """
    _, facts = load_state(file)
    before = facts["recipe"] | {"seed": facts.get("seed", recipe["seed"])}
    if before.get("base") == recipe["base"]:  # the same model, wherever it lies
        before["model"] = recipe["model"]
    lines = dict.fromkeys(map(_said, changes(before, recipe)))
    text = "; ".join(list(lines)[:6])
    text += f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
    if lines and not force:
        raise ConfigError(
            f"{file} was made with other settings: {text}. Use the same ones to go on "
            f"exactly, --force to go on with the new ones, or another --adapter-path "
            f"to start anew."
        )
    if lines:
        tell(f"by force: {text}")
    if facts["step"] > (steps := recipe["settings"]["steps"]):
        raise ConfigError(
            f"{file} is of step {facts['step']}, which is past the last one ({steps}). "
            f"Give more steps (--iters)."
        )


def _said(change: str) -> str:
    """A line of `changes` with its flag, and without what nobody can read."""
    name = change.partition(":")[0]
    hidden = {
        "base.config": "the model's config",
        "base.weights": "the model's weights",
    }
    said = hidden.get(name, change)
    if name.endswith(("sha256", "pictures")):
        said = "what the data holds"
    flag = flag_of(name)
    return f"{said} ({flag})" if flag else said
