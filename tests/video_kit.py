"""Frames whose colours tell their numbers, as animations and films."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import need

COUNT = 30


def frame(number: int, width: int = 32) -> Image.Image:
    """A colour that tells the frame's number; its left half is brighter in green."""
    picture = Image.new("RGB", (width, 16), (number * 8, 0, 255 - number * 8))
    picture.paste((number * 8, 200, 255 - number * 8), (0, 0, width // 2, 16))
    return picture


def numbers(frames: list[Image.Image]) -> list[int]:
    """Which frames these are; a codec moves a colour by less than half a step of 8."""
    assert all(each.mode == "RGB" for each in frames)
    reds = [np.asarray(each)[:, :, 0].mean() for each in frames]
    return [round(float(red) / 8) for red in reds]


FRAMES = [frame(i) for i in range(COUNT)]


def animation(path: Path, **settings) -> Path:
    FRAMES[0].save(
        path, save_all=True, append_images=FRAMES[1:], duration=40, **settings
    )
    return path


def film(path: Path, codec: str, pixels: str = "yuv420p") -> Path:
    av = need("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this av has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.bit_rate = 2_000_000  # colours stay what they are
        stream.width, stream.height, stream.pix_fmt = 32, 16, pixels
        stream.gop_size = 7  # so that key frames stand between the chosen ones
        for each in FRAMES:
            for packet in stream.encode(av.VideoFrame.from_image(each)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
