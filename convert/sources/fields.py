"""What the config readers share: both spellings of transformers, activations, RoPE."""

from typing import Any

from mm1_mlx.config_checks import ROPE_SCALING
from mm1_mlx.errors import CheckpointError

from ..packed import settings_of

# Names of transformers' ACT2FN that mean one of ours.
_ACTIVATIONS = {
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "swish": "silu",
}


def names_theta(values: dict) -> bool:
    """Whether a hub configuration says which RoPE theta its decoder has."""
    parts = [v for k, v in values.items() if isinstance(v, dict) and "vision" not in k]
    return values.get("rope_theta") is not None or any(map(names_theta, parts))


class Fields:
    """A hub configuration with its family's class defaults.

    fields["key"] is the file's value; null counts as left out, then the default is
    used. A key in neither is a CheckpointError.
    """

    def __init__(self, values: dict, defaults: dict, family: str):
        settings_of(values)  # refuses what other tools have quantized
        self.values, self.defaults, self.family = values, defaults, family

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None and key not in self.defaults:
            raise CheckpointError(
                f"The {self.family} config has no {key!r}, and the family has no "
                f"default for it. Is it the right config.json?"
            )
        return value

    def get(self, key: str) -> Any:
        """The file's value, else the family's default, else None."""
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def refuse(self, key: str, *allowed: Any) -> None:
        """CheckpointError when a switch that we do not have is on."""
        if (value := self.get(key)) not in allowed:
            raise CheckpointError(
                f"The {self.family} config has {key} = {value!r}, which is not "
                f"supported; only {', '.join(map(repr, allowed))}."
            )

    def activation(self, key: str = "hidden_act") -> str:
        """The name that an activation has here."""
        name: str = self[key]
        return _ACTIVATIONS.get(name, name)

    def square(self, key: str) -> int:
        """A size that may be written as a pair."""
        value = self[key]
        if isinstance(value, (list, tuple)):
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"The {self.family} config has {key} = {value!r}, but must be "
                    f"square."
                )
            return int(value[0])
        return int(value)

    def vision(self, eps: str = "layer_norm_eps") -> dict[str, Any]:
        """What all encoders of transformers write alike, for VisionConfig."""
        same = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        same += ("intermediate_size", "num_channels")
        return {key: self[key] for key in same} | {
            "image_size": self.square("image_size"),
            "patch_size": self.square("patch_size"),
            "hidden_act": self.activation(),
            "norm_eps": self[eps],
        }

    def decoder(
        self, eps: str = "rms_norm_eps", *, windowed: bool = False
    ) -> dict[str, Any]:
        """What all decoders of transformers write alike, for DecoderConfig.

        windowed: whether its attention sees a sliding window; see `context`.
        """
        same = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        same += ("intermediate_size", "vocab_size", "tie_word_embeddings")
        return {key: self[key] for key in same} | {
            "num_key_value_heads": self.get("num_key_value_heads"),
            "max_position_embeddings": self.context(windowed),
            "hidden_act": self.activation(),
            "norm_eps": self[eps],
            **self.rope(),
        }

    def rope(self) -> dict[str, Any]:
        """rope_theta, rope_scaling and partial_rotary_factor for DecoderConfig.

        transformers 4 writes them beside the other keys, transformers 5 into
        rope_parameters. A reader that knows one spelling gets the theta wrong with no
        error, so both are read here. Sparse configs have neither: the default is the
        family's own, and open_checkpoint warns of it.
        """
        written = self.values.get("rope_parameters") or {}
        scaling = written or self.values.get("rope_scaling") or {}
        if any(isinstance(value, dict) for value in scaling.values()):
            raise CheckpointError(
                f"The {self.family} config has a RoPE for each kind of layer, which is "
                f"not supported."
            )
        one, two = written.get("rope_theta"), self.values.get("rope_theta")
        if one is not None and two is not None and float(one) != float(two):
            raise CheckpointError(
                f"The {self.family} config has two different rope_theta: {two}, and "
                f"{one} in rope_parameters. Remove the wrong one."
            )
        result: dict[str, Any] = {"rope_scaling": self._scaling(scaling)}
        for key in ("rope_theta", "partial_rotary_factor"):
            value = written.get(key)
            result[key] = self[key] if value is None else value
        if written and not names_theta(self.values):
            raise CheckpointError(
                f"The {self.family} config has rope_parameters without a rope_theta. "
                f"Write the one that the model was trained with there; a wrong one "
                f"gives wrong answers with no error."
            )
        result["rope_theta"] = float(result["rope_theta"])
        return result

    def _scaling(self, values: dict) -> dict | None:
        kind = values.get("rope_type") or values.get("type") or "default"
        if kind == "default":
            return None
        if kind not in ROPE_SCALING:
            raise CheckpointError(
                f"The {self.family} config has RoPE scaling {kind!r}, which is not "
                f"supported; only 'linear' and 'llama3'."
            )
        if lacking := [key for key in ROPE_SCALING[kind] if key not in values]:
            raise CheckpointError(
                f"The {self.family} config's RoPE scaling {kind!r} has no "
                f"{lacking[0]!r}."
            )
        return {"rope_type": kind} | {k: values[k] for k in ROPE_SCALING[kind]}

    def context(self, windowed: bool) -> int:
        """max_position_embeddings, or the attention window where that is smaller.

        Within the window, sliding-window attention and full attention are the same, so
        a shorter context keeps the answers right.
        """
        longest, window = self["max_position_embeddings"], self.get("sliding_window")
        return min(longest, window) if windowed and window else longest
