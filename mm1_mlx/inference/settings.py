"""The settings of an answer, checked before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm1_mlx.config_tiling import MOST_TILES
from mm1_mlx.errors import MM1Error
from mm1_mlx.inference.few_shot import FewShot
from mm1_mlx.inference.sampling import (
    check_number,
    make_logits_processors,
    make_sampler,
)
from mm1_mlx.inputs.counting import resolutions
from mm1_mlx.inputs.resolution import check_resolution
from mm1_mlx.models.cache import QUANTIZED_BITS
from mm1_mlx.models.mm1 import MM1

# What is counted: the least, and the most where there is one.
_WHOLE = {
    "max_tokens": (1,),
    "prefill_step_size": (1,),
    "quantized_kv_start": (0,),
    "max_tiles": (1, MOST_TILES),
    "max_pixels": (1,),
    "seed": (0, 2**64 - 1),
    "num_draft_tokens": (1, 64),  # more are hardly ever right, and cost memory
    "lookup": (1, 16),  # the table of a prompt grows with its square
}
_NEEDED = ("max_tokens", "prefill_step_size", "num_draft_tokens")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What generate, stream_generate and batch_generate take; stream_generate explains.

    Raises MM1Error for a value that is out of range. Numbers may be NumPy's.
    """

    system: str | None = None
    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    prefill_step_size: int = 2048
    resolution: Any = None
    max_tiles: int | None = None
    max_pixels: int | None = None
    allow_url: bool = False
    use_template: bool = True
    chat_template_config: Mapping[str, Any] | None = None
    draft_model: Any = None
    num_draft_tokens: int = 3
    lookup: int | None = None
    check_memory: bool = True
    shots: FewShot | None = None
    on_images: Callable[[int, int], None] | None = None

    def __post_init__(self):
        for name, limits in _WHOLE.items():
            value = getattr(self, name)
            if value is not None or name in _NEEDED:
                self._set(name, check_number(name, value, *limits, whole=True))
        self._set_choice("kv_bits", (*QUANTIZED_BITS, None))
        self._set_choice("kv_group_size", (32, 64, 128))
        if not all(isinstance(stop, str) and stop for stop in self.stops):
            raise MM1Error(
                f"stop is {self.stop!r}, but must be a text of at least one character, "
                f"or a list of such texts."
            )
        names = self.chat_template_config
        if names is not None and not (
            isinstance(names, Mapping) and all(isinstance(name, str) for name in names)
        ):
            raise MM1Error(
                f"chat_template_config is {names!r}, but must be a dict with the names "
                f"and values of the template's variables."
            )
        if self.on_images is not None and not callable(self.on_images):
            raise MM1Error(
                f"on_images is of the type {type(self.on_images).__name__}, but must "
                f"be a function of two numbers: what is done, and all."
            )
        self._set("resolution", check_resolution(self.resolution))
        self._check_draft()
        if self.shots is not None and not isinstance(self.shots, FewShot):
            raise MM1Error(
                f"shots is of the type {type(self.shots).__name__}, but must be a "
                f"FewShot: shots=FewShot(FILE, 8)."
            )
        self.decoding()  # checks the sampling settings

    def _check_draft(self) -> None:
        given = self.draft_model
        if given is None:
            return
        pair = given if isinstance(given, tuple) else (given, None)
        if len(pair) != 2 or not isinstance(pair[0], MM1):
            raise MM1Error(
                f"draft_model is of the type {type(given).__name__}, but must be a "
                f"model, or what load() gives: (model, processor)."
            )
        if self.lookup is not None:
            raise MM1Error(
                "draft_model and lookup were both given, but only one can guess. "
                "Leave one of them out."
            )

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        """From keyword arguments; TypeError for an unknown one."""
        known = sorted(cls.__dataclass_fields__)
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(
                f"unknown settings {unknown}; the settings are {', '.join(known)}"
            )
        return cls(**given)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _set_choice(self, name: str, choices: tuple) -> None:
        """The choice that the value equals: NumPy's 8 becomes 8."""
        value = getattr(self, name)
        if isinstance(value, bool) or value not in choices:
            *others, last = choices
            listed = f"{', '.join(map(str, others))} or {last}"
            raise MM1Error(f"{name} is {value!r}, but must be {listed}.")
        self._set(name, choices[choices.index(value)])

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def limits(self) -> dict[str, Any]:
        """The keyword arguments of what reads a picture."""
        given: dict[str, Any] = {}
        if self.max_pixels is not None:
            given["max_pixels"] = self.max_pixels
        if self.allow_url:
            given["allow_url"] = True
        return given

    def reading(self) -> dict[str, Any]:
        """The keyword arguments of the processor."""
        given: dict[str, Any] = {"system": self.system, **self.limits()}
        for name in ("resolution", "max_tiles"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        if not self.use_template:
            given["use_template"] = False
        if self.chat_template_config:
            given["chat_template_config"] = self.chat_template_config
        return given

    def each(self, rows: int) -> "list[Settings]":
        """The settings of each of several prompts: a list of resolutions has an entry
        for each."""
        each = resolutions(self.resolution, rows, batch=True)
        return [replace(self, resolution=one) for one in each]

    def decoding(self) -> dict[str, Any]:
        """The keyword arguments of Decoding."""
        return {
            "sampler": make_sampler(
                self.temp, self.top_p, self.top_k, self.min_p, self.seed
            ),
            "logits_processors": make_logits_processors(
                self.repetition_penalty, self.repetition_context_size
            ),
            "prefill_step_size": self.prefill_step_size,
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }
