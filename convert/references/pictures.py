"""Pictures as the originals read them: transformers' processor, or Pillow alone."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mm1_mlx.inputs.settings import PREPROCESSOR_FILE, ImageSettings


def pixels(
    picture: Image.Image, settings: ImageSettings, folder: Path | None
) -> np.ndarray:
    """Pixels (1, 3, H, W) float32.

    folder: with transformers' preprocessor_config.json, where the original's pictures
    go through that; None where they do not.
    """
    if folder is not None and (folder / PREPROCESSOR_FILE).is_file():
        found = _of_transformers(picture, folder)
        if found is not None:
            return found
    return _plain(picture, settings)


def _of_transformers(picture: Image.Image, folder: Path) -> np.ndarray | None:
    from transformers import AutoImageProcessor

    try:  # the one on Pillow: the other needs torchvision and differs by a grey level
        processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception:  # whatever an older transformers does not know
        return None
    found = processor(picture, return_tensors="np")["pixel_values"]
    return np.asarray(found, np.float32).reshape(-1, *found.shape[-3:])


def _plain(picture: Image.Image, settings: ImageSettings) -> np.ndarray:
    size, (width, height) = settings.size, picture.size
    if settings.resize_mode == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side), settings.pad_color)
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    if settings.resize_mode == "crop":
        short = min(width, height)
        wide, high = width * size // short, height * size // short
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    else:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(picture, np.float64) / 255
    values = (values - np.array(settings.image_mean)) / np.array(settings.image_std)
    return values.astype(np.float32).transpose(2, 0, 1)[None]
