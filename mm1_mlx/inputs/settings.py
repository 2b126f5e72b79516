"""How pictures become pixels: ImageSettings, and the hub's preprocessor_config.json.

Plain Python, no Pillow.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.errors import CheckpointError, ConfigError

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # of transformers 5: the other one inside it
RESIZE_MODES = ("squash", "crop", "pad")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LLAVA_PAD = (122, 116, 104)  # CLIP_MEAN in 0..255, as LLaVA pads
_BICUBIC = 3  # Pillow's number for it

_OURS = ("resize_mode", "pad_color")
_READ = (
    "size",
    "crop_size",
    "do_resize",
    "do_center_crop",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "do_convert_rgb",
    "image_mean",
    "image_std",
    "resample",
)
# What transformers writes beside them and what changes no pixel here.
_LABELS = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_valid_processor_keys",
    "auto_map",
    "data_format",
    "input_data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "return_tensors",
    "image_seq_length",
)


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"preprocessor: {key} is {value!r}, but {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_preprocessor(folder: Path) -> dict | None:
    """What a folder of the hub says of its pictures, or None where it says nothing."""
    places = ((PREPROCESSOR_FILE, None), (PROCESSOR_FILE, "image_processor"))
    for name, inside in places:
        path = folder / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        if isinstance(values, dict) and inside is not None:
            values = values.get(inside)
        if isinstance(values, dict):
            return values
    return None


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _square(key: str, value: Any) -> int:
    """The side of a square that is given as a number or as height and width."""
    side = value
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        side = value["height"] if value["height"] == value["width"] else None
    if not isinstance(side, int) or not _is_side(side):
        raise _wrong(key, value, "must be one number or an equal height and width")
    return side


def _shortest(size: Any) -> int | None:
    """The shortest edge that a CLIP-style size asks for, or None for a square."""
    if isinstance(size, dict):
        if set(size) != {"shortest_edge"}:
            return None
        size = size["shortest_edge"]
    return size if _is_side(size) else None


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """From a picture to pixels: side, resize mode, normalisation.

    size: the side of the square in pixels. resize_mode: "squash" (bicubic to the
    square), "crop" (shortest side, then the middle) or "pad" (to a square with
    pad_color first). Sources: checkpoints.md section 4 of the design notes; MM1 does
    not say, DFN's own settings squash.
    """

    size: int
    resize_mode: str = "squash"
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    pad_color: tuple[int, int, int] = LLAVA_PAD

    def __post_init__(self):
        if not _is_side(self.size):
            raise _wrong("size", self.size, "must be a whole number of at least 1")
        if self.resize_mode not in RESIZE_MODES:
            modes = ", ".join(map(repr, RESIZE_MODES))
            raise _wrong("resize_mode", self.resize_mode, f"must be one of {modes}")
        for key in ("image_mean", "image_std", "pad_color"):
            value = getattr(self, key)
            good = isinstance(value, (list, tuple)) and len(value) == 3
            if not good or not all(map(_is_number, value)):
                raise _wrong(key, value, "must be three numbers, for red, green, blue")
            object.__setattr__(self, key, tuple(value))
        if min(self.image_std) <= 0:
            raise _wrong("image_std", list(self.image_std), "must be above 0")
        if not all(isinstance(c, int) and 0 <= c <= 255 for c in self.pad_color):
            color = list(self.pad_color)
            raise _wrong("pad_color", color, "must be whole numbers from 0 to 255")

    @classmethod
    def from_dict(cls, values: dict) -> "ImageSettings":
        """The settings of a preprocessor_config.json of the hub, or of to_dict.

        Reads CLIP, SigLIP, AIMv2 and LLaVA style files. A key or value that would
        change pixels in a way that is not implemented is a ConfigError.
        """
        if not isinstance(values, dict):
            raise _wrong("the file", values, "must be an object of keys and values")
        known = {*_OURS, *_READ, *_LABELS}
        given = {k: v for k, v in values.items() if v is not None}
        if unknown := sorted(given.keys() - known):
            raise ConfigError(
                f"preprocessor: unknown keys {unknown}. Known keys: "
                f"{sorted({*_OURS, *_READ})}."
            )
        for key in ("do_resize", "do_rescale", "do_convert_rgb"):
            if given.get(key, True) is not True:
                raise _wrong(key, given[key], "only true is supported")
        factor = given.get("rescale_factor", 1 / 255)
        if not _is_number(factor) or abs(factor * 255 - 1) > 1e-6:
            raise _wrong("rescale_factor", factor, "only 1/255 is supported")
        if given.get("resample", _BICUBIC) != _BICUBIC:
            raise _wrong("resample", given["resample"], "only 3 (bicubic) is supported")
        size, mode = _size_and_mode(given)
        settings: dict[str, Any] = {"size": size, "resize_mode": mode}
        if given.get("do_normalize", True):
            for key in ("image_mean", "image_std"):
                if key in given:
                    settings[key] = given[key]
        else:
            settings |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
        if "pad_color" in given:
            settings["pad_color"] = given["pad_color"]
        return cls(**settings)

    def to_dict(self) -> dict:
        """What from_dict reads back; for squash and crop transformers reads it too."""
        square = {"height": self.size, "width": self.size}
        values: dict[str, Any] = {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square,
            "resample": _BICUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "resize_mode": self.resize_mode,
        }
        if self.resize_mode == "crop":
            values["image_processor_type"] = "CLIPImageProcessor"
            values |= {
                "size": {"shortest_edge": self.size},
                "do_center_crop": True,
                "crop_size": square,
            }
        if self.resize_mode == "pad":
            values["image_processor_type"] = "LlavaImageProcessor"
            values |= {"do_pad": True, "pad_color": list(self.pad_color)}
        return values

    @classmethod
    def read(cls, folder: str | Path) -> "ImageSettings":
        """The settings in a model folder."""
        path = Path(folder) / PREPROCESSOR_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} does not exist. A model folder needs it to turn pictures into "
                f"pixels; convert the checkpoint again."
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        return cls.from_dict(values)

    def write(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into an existing folder."""
        path = Path(folder) / PREPROCESSOR_FILE
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _size_and_mode(given: dict) -> tuple[int, str]:
    """Side and resize mode; the mode is ours if given, else what the hub keys mean."""
    size, crop = given.get("size"), given.get("crop_size")
    if size is None and crop is None:
        raise ConfigError("preprocessor: 'size' is missing: give the side in pixels.")
    if "resize_mode" in given:
        shortest = _shortest(size)
        side = shortest or _square("size", size if size is not None else crop)
        if crop is not None and _square("crop_size", crop) != side:
            raise _wrong("crop_size", crop, f"must be equal to size ({side})")
        return side, given["resize_mode"]
    if given.get("do_pad"):
        return _square("size", _shortest(size) or size), "pad"
    # A file that does not say do_center_crop crops if it names a crop size.
    if given.get("do_center_crop", crop is not None):
        side = _square("crop_size", crop if crop is not None else size)
        shortest = _shortest(size) if size is not None else side
        if shortest is None and _square("size", size) == side:
            return side, "squash"  # a crop of what already has its size
        if shortest != side:
            raise _wrong(
                "size",
                size,
                f"must be equal to crop_size ({side}) or its shortest edge",
            )
        return side, "crop"
    if isinstance(size, dict) and _shortest(size) is not None:
        raise _wrong("size", size, "needs do_center_crop: only squares are supported")
    return _square("size", size), "squash"
