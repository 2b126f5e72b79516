"""How long a lesson will be, known from headers: no picture is decoded for it."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small import DENSE, small_config
from small_tokenizers import write_tiny
from test_tiling import GRIDS

from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import ImageError, PromptError
from mm1_mlx.inputs import images
from mm1_mlx.inputs.images import image_size, load_image
from mm1_mlx.inputs.lessons import lesson_length, make_lesson
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tokenizer import load_tokenizer

TALK = [
    {"role": "user", "content": "How many red circles?"},
    {"role": "assistant", "content": "There are 3."},
]


def saved(kind: str, size=(30, 12), orientation: int = 1) -> bytes:
    held, image = io.BytesIO(), Image.new("RGB", size, "red")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(held, kind, exif=exif) if kind != "BMP" else image.save(held, kind)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_loaded_picture(tmp_path, kind, orientation):
    data = saved(kind, orientation=orientation)
    path = tmp_path / "a"
    path.write_bytes(data)
    for source in (data, path, str(path), np.zeros((9, 7, 3), np.uint8)):
        assert image_size(source) == load_image(source).size


def test_a_header_is_enough_for_a_jpeg(monkeypatch):
    """Half a file has a size, which is how it is seen that nothing is decoded."""
    data = saved("JPEG", (300, 200), 6)
    half = data[: len(data) // 2]
    assert image_size(half) == (200, 300)
    with pytest.raises(ImageError, match="damaged or cut off"):
        load_image(half)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"no picture", "is not an image"),
        (saved("PNG")[:20], "damaged or cut off PNG"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_picture(data, message):
    with pytest.raises(ImageError, match=message):
        image_size(data)


def test_too_many_pixels_are_refused_by_the_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="300x200, 60,000 pixels, but at most 100"):
        image_size(saved("JPEG", (300, 200)))


TILINGS = {
    "whole": None,
    "anyres": TilingConfig(type="anyres", grids=GRIDS),
    "unpadded": TilingConfig(type="anyres", grids=GRIDS, unpad=True),
    "crops": TilingConfig(type="crops", grids=[[2, 2]]),
}


@pytest.mark.parametrize("kind", TILINGS)
def test_lengths_are_those_of_lessons(tmp_path, kind):
    write_tiny(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tiling = TILINGS[kind]
    config = small_config(
        replace(DENSE, vocab_size=tokenizer.vocab_size),
        image_token_id=tokenizer.token_to_id("<image>"),
        eos_token_id=2,
        pad_token_id=3,
        tiling_config=tiling,
    )
    settings = ImageSettings(size=config.vision_config.image_size)
    processor = Processor(tokenizer, settings, config, chat_template="mm1-tiny")
    sources = [saved("JPEG", size, 6) for size in ((16, 16), (70, 20), (30, 90))]
    for count in range(4):
        lesson = make_lesson(processor, TALK, sources[:count])
        assert lesson_length(processor, TALK, sources[:count]) == len(lesson.ids)
    with pytest.raises(PromptError, match="no message of the role 'assistant'"):
        lesson_length(processor, TALK[:1])
