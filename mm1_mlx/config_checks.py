"""What every configuration checks: the type of each field, ranges, choices.

Only plain Python here, as in config.py.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, Self, get_args, get_origin

from mm1_mlx.errors import ConfigError

LARGEST = 2**31 - 1  # ids and sizes are int32 in MLX

_OBJECT = "an object of keys and values"
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    dict: _OBJECT,
    list[int]: "a list of whole numbers",
    NoneType: "null",
}


def shown(value: Any) -> str:
    """A value as a message shows it: one line, and not a page long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """The ConfigError of a value that is not usable."""
    raise ConfigError(f"{name} is {shown(value)}, but must be {expected}.")


def check_keys(name: str, values: Mapping, known: set, required: set) -> None:
    """ConfigError where a key is unknown or missing."""
    if unknown := sorted(values.keys() - known, key=str):
        raise ConfigError(
            f"{name}: unknown keys {shown(unknown)}. Known keys: {sorted(known)}."
        )
    if lacking := sorted(required - values.keys()):
        raise ConfigError(f"{name}: missing keys {lacking}.")


def is_number(value: Any) -> bool:
    """A finite int or float; JSON does not tell 1 from 1.0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= 1e300  # false for NaN too


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, int) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return isinstance(value, kind)


@cache
def _kinds(config: type) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Each field and the types that its annotation allows."""
    return tuple(
        (f.name, get_args(f.type) if isinstance(f.type, UnionType) else (f.type,))
        for f in fields(config)
    )


class Strict:
    """The base of the frozen dataclasses: strict from_dict, to_dict, types checked.

    `_name` is the configuration's name in messages. A subclass checks its ranges in
    __post_init__, after super().__post_init__().
    """

    _name = "config"

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The config with these values; a key or value not understood: ConfigError."""
        if not isinstance(values, dict):
            refuse(cls._name, values, _OBJECT)
        every: Any = fields(cls)  # type: ignore[arg-type]
        required = {
            f.name
            for f in every
            if f.default is MISSING and f.default_factory is MISSING
        }
        check_keys(cls._name, values, {f.name for f in every}, required)
        return cls(**values)

    def to_dict(self) -> dict:
        """A plain dictionary that from_dict turns back into the same config."""
        return asdict(self)  # type: ignore[call-overload]

    def __post_init__(self) -> None:
        for name, kinds in _kinds(type(self)):
            value = getattr(self, name)
            nested = [kind for kind in kinds if _is_config(kind)]
            if nested and isinstance(value, dict):
                value = nested[0].from_dict(value)
                object.__setattr__(self, name, value)
            if not any(_fits(value, kind) for kind in kinds):
                words = [_WORDS.get(kind, _OBJECT) for kind in kinds]
                self._refuse(name, " or ".join(words))
            if isinstance(value, int) and abs(value) > LARGEST and int in kinds:
                self._refuse(name, f"at most {LARGEST}")

    def _refuse(self, key: str, expected: str) -> NoReturn:
        refuse(f"{self._name}.{key}", getattr(self, key), expected)

    def _at_least(self, least: int, *keys: str) -> None:
        """Whole numbers from `least` on, where they are given."""
        for key in keys:
            if (value := getattr(self, key)) is not None and value < least:
                self._refuse(
                    key,
                    f"a whole number of at least {least}" if least else "0 or more",
                )

    def _above_zero(self, *keys: str, otherwise: str = "") -> None:
        """Numbers above 0, where they are given."""
        for key in keys:
            if (value := getattr(self, key)) is not None and value <= 0:
                self._refuse(key, "above 0" + otherwise)

    def _one_of(self, key: str, allowed: tuple) -> None:
        if getattr(self, key) not in allowed:
            self._refuse(key, f"one of {', '.join(map(repr, allowed))}")


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Strict)


# --- Dictionaries inside configurations ------------------------------------------

# The numbers that each kind of rope_scaling needs, besides its rope_type.
ROPE_SCALING: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def check_rope_scaling(name: str, scaling: dict) -> str:
    """The rope_type of a rope_scaling whose keys and values make sense."""
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in ROPE_SCALING:
        kinds = ", ".join(map(repr, ROPE_SCALING))
        refuse(f"{name}.rope_type", kind, f"one of {kinds}")
    if (older := scaling.get("type", kind)) != kind:
        refuse(f"{name}.type", older, f"{kind!r} as rope_type is, or left out")
    needed = set(ROPE_SCALING[kind])
    check_keys(name, scaling, needed | {"rope_type", "type"}, needed)
    for key in ROPE_SCALING[kind]:
        if not is_number(value := scaling[key]) or value <= 0:
            refuse(f"{name}.{key}", value, "a number above 0")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        refuse(
            f"{name}.high_freq_factor",
            scaling["high_freq_factor"],
            f"above low_freq_factor ({scaling['low_freq_factor']})",
        )
    return kind


# What MLX can read, by mode: group sizes and bits.
QUANTIZATION_MODES = {
    "affine": ((32, 64, 128), (1, 2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def check_quantization(name: str, settings: dict) -> None:
    """ConfigError unless these are settings that the loader can use."""
    own = {key: v for key, v in settings.items() if isinstance(v, dict)}
    settings = {key: v for key, v in settings.items() if key not in own}
    for path, values in own.items():  # settings of one module, as mlx-lm writes them
        check_quantization(f"{name}.{path}", settings | values)
    check_keys(name, settings, {"group_size", "bits", "mode"}, {"bits"})
    mode = settings.get("mode", "affine")
    if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
        modes = ", ".join(map(repr, QUANTIZATION_MODES))
        refuse(f"{name}.mode", mode, f"one of {modes}")
    sizes, bits = QUANTIZATION_MODES[mode]
    for key, allowed in (("group_size", sizes), ("bits", bits)):
        value = settings.get(key, allowed[0])
        if not _fits(value, int) or value not in allowed:
            choices = ", ".join(map(str, allowed))
            refuse(f"{name}.{key}", value, f"one of {choices} in the mode {mode!r}")
