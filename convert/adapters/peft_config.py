"""PEFT's adapter_config.json: what can be read of it; rank and scale of a module."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm1_mlx.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"

# What changes the meaning of the arrays, and is not read: key -> the values that do
# nothing.
_OFF: dict[str, tuple] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
}
# Ways to start that change the base weights, too: without these the pairs mean nothing.
# EVA and the others only choose the first numbers of A.
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json of PEFT says of the arrays beside it."""

    values: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        kind = self.values.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{self.where} is a PEFT adapter of the kind {kind}; only LORA can be "
                f"read (with DoRA and rsLoRA)."
            )
        for key, off in _OFF.items():
            value = self.values.get(key)
            if value not in off:
                raise CheckpointError(
                    f"{self.where} has {key} = {value!r} in {CONFIG_FILE}, which is "
                    f"not supported."
                )
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
            raise CheckpointError(
                f"{self.where} was started with {start}, which changed the base "
                f"weights: it fits no plain model. Save it with PEFT's "
                f"path_initial_model_for_weight_conversion, which makes plain LoRA "
                f"of it."
            )

    @property
    def dora(self) -> bool:
        """Whether pairs have DoRA's row lengths."""
        return bool(self.values.get("use_dora"))

    @property
    def tied(self) -> bool:
        """Whether a tied head follows trained embeddings."""
        return bool(self.values.get("ensure_weight_tying"))

    @property
    def dropout(self) -> float:
        """Of what pairs read, in training."""
        return float(self._number("lora_dropout", 0.0))

    def key_of(self, module: str) -> str:
        """What patterns are matched with for a matrix: its module, or its weight where
        that was adapted as a parameter."""
        weight = f".{module}.weight"
        parameters = self.values.get("target_parameters") or []
        found = any(weight.endswith(f".{name}") for name in parameters)
        return weight[1:] if found else module

    def rank(self, key: str) -> int:
        """The rank of a module, by its path (of a parameter, with its name)."""
        return int(self._matching("rank_pattern", key, self._number("r", 8)))

    def scale(self, key: str) -> float:
        """What its product of pairs is multiplied by."""
        alpha = self._matching("alpha_pattern", key, self._number("lora_alpha", 8))
        rank = self.rank(key)
        if rank < 1:
            raise CheckpointError(f"{self.where} says the rank {rank} of {key}.")
        by = math.sqrt(rank) if self.values.get("use_rslora") else rank
        return float(alpha / by)

    def _number(self, key: str, default: float) -> float:
        return self._checked(self.values.get(key, default), key)

    def _checked(self, value: Any, key: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e9:
            raise CheckpointError(f"{key} of {self.where} cannot be {value!r}.")
        return value

    def _matching(self, table: str, key: str, default: float) -> float:
        """As peft.utils.other.get_pattern_key: the first pattern that ends the key."""
        patterns = self.values.get(table) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{table} of {self.where} is no object.")
        for pattern, value in patterns.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", key)
            except re.error as error:
                raise CheckpointError(
                    f"{table} of {self.where} has {pattern!r}: {error}."
                ) from error
            if found:
                return self._checked(value, table)
        return default


def patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """A rank_pattern or alpha_pattern: what is not usual, by key.

    values: of all adapted modules by key. One entry stands for all with the same last
    part, where they agree.
    """
    by_end: dict[str, set[float]] = {}
    for key, value in values.items():
        by_end.setdefault(key.rpartition(".")[2], set()).add(value)
    table: dict[str, float] = {}
    for key, value in sorted(values.items()):
        end = key.rpartition(".")[2]
        if value != usual:
            table[re.escape(end if len(by_end[end]) == 1 else key)] = value
    return table


def targets(keys: list[str], every: Callable[[str], set[str]]) -> list[str]:
    """target_modules for exactly these: by their last part, where that says no more.

    every: last part of a key -> all keys of the model that end so.
    """
    found: set[str] = set()
    chosen = set(keys)
    for key in keys:
        end = key.rpartition(".")[2]
        alone = every(end) <= chosen and not end.isdigit()  # layers end so, too
        found.add(end if alone else key)
    return sorted(found)
