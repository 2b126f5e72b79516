"""Colour modes, EXIF rotation, transparency, animations, HEIC and AVIF -> RGB."""

import io
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features
from test_images import array, encoded

from helpers import assert_close, assert_equal, need
from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.images import load_image
from mm1_mlx.inputs.video import video_frames


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # a white top left quarter
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(turn(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        settings = {"lossless": True}
    actual = load_image(encoded(stored, kind, exif=exif, **settings))
    assert_close(actual, upright, atol=2)  # JPEG loses a little
    # What was turned may come again, as a picture or as a frame, and stays as it is.
    assert_equal(load_image(actual), actual)
    (frame,) = video_frames(encoded(stored, kind, exif=exif, **settings))
    assert_equal(load_image(frame), frame)


def test_orientation_in_xmp_turns_once():
    name = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.new("RGB", (6, 4)), "JPEG", xmp=name)
    found = load_image(data)
    assert found.size == (4, 6) and load_image(found).size == (4, 6)


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_ignored(rng):
    picture = Image.fromarray(rng.integers(0, 256, (7, 11, 3), np.uint8))
    data = encoded(picture, "PNG", exif=b"Exif\0\0MM\0*broken")
    assert_equal(load_image(data), array(picture))
    picture.info["exif"] = b"nonsense"
    assert_equal(load_image(picture), array(picture))


def test_transparency_lies_over_white():
    rgba = Image.fromarray(
        np.uint8([[[255, 0, 0, 255], [255, 0, 0, 0], [0] * 3 + [51]]])
    )
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert_equal(load_image(encoded(rgba, "PNG")), expected)
    assert_equal(load_image(rgba.convert("RGBa")), expected)
    grey = Image.fromarray(np.uint8([[[0, 255], [0, 0], [100, 0]]]), "LA")
    expected = [[[0] * 3, [255] * 3, [255] * 3]]
    assert_equal(load_image(encoded(grey, "PNG")), expected)


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    assert_equal(load_image(encoded(image, "PNG")), [[[255, 0, 0], [0, 255, 0]]])
    for transparency in (1, b"\xff\x00"):
        data = encoded(image, "PNG", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_equal(load_image(data), [[[255, 0, 0], [255, 255, 255]]])


def test_one_transparent_colour():
    image = Image.fromarray(np.uint8([[[9, 9, 9], [1, 2, 3]]]))
    data = encoded(image, "PNG", transparency=(1, 2, 3))
    assert_equal(load_image(data), [[[9, 9, 9], [255, 255, 255]]])
    grey = Image.fromarray(np.uint8([[7, 8]]))
    data = encoded(grey, "PNG", transparency=8)
    assert_equal(load_image(data), [[[7] * 3, [255] * 3]])


def grey_row(image: Image.Image) -> list[int]:
    result = array(image)
    assert (result == result[..., :1]).all()
    return result[0, :, 0].tolist()


def test_deep_greys():
    values = np.array([[0, 128, 129, 257 * 100, 65535]], np.uint16)
    expected = [0, 0, 1, 100, 255]  # value / 257, rounded
    for kind in ("PNG", "TIFF"):
        assert grey_row(load_image(encoded(Image.fromarray(values), kind))) == expected
    for mode in ("I;16", "I;16B", "I"):
        image = Image.new(mode, (2, 1))
        image.putpixel((1, 0), 257 * 30)
        assert grey_row(load_image(image)) == [0, 30]
    pgm = b"P5 2 1 1023\n" + bytes([0, 0, 3, 255])
    assert grey_row(load_image(pgm)) == [0, 255]
    deep = Image.fromarray(np.array([[-5, 0, 5]], np.int32))
    assert grey_row(load_image(deep)) == [0, 128, 255]  # stretched


def test_float_greys():
    def row(*values):
        return grey_row(load_image(Image.fromarray(np.float32([values]))))

    assert row(0, 0.2, 1) == [0, 51, 255]
    assert row(0, 99.6, 255) == [0, 100, 255]
    assert row(-1, 0, 1) == [0, 128, 255]
    assert row(0, float("nan"), 1) == [0, 0, 255]
    assert row(300, 300) == [0, 0]


def test_transparent_value_of_a_16_bit_png():
    image = Image.fromarray(np.array([[0, 500]], np.uint16))
    data = bytearray(encoded(image, "PNG"))
    end_of_header = 8 + 25
    body = b"tRNS" + (500).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    data[end_of_header:end_of_header] = chunk
    assert grey_row(load_image(bytes(data))) == [0, 255]


def test_one_bit_cmyk_and_others():
    bits = Image.fromarray(np.array([[True, False]]))
    assert grey_row(load_image(encoded(bits, "PNG"))) == [255, 0]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = array(load_image(encoded(cmyk, "JPEG", quality=100)))
    assert_close(red, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)
    assert load_image(Image.new("YCbCr", (2, 2))).mode == "RGB"
    assert load_image(Image.new("HSV", (2, 2))).mode == "RGB"


def test_a_mode_without_a_way_to_rgb(monkeypatch):
    def refuse(self, mode):  # Pillow before 13 on LAB
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ImageError, match="colour mode LAB, which cannot be turned"):
        load_image(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert_equal(load_image(data), array(frames[0]))


def test_mpo_gives_its_first_picture():
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert_close(load_image(data), array(frames[0]), atol=3)


def test_heic_needs_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 20
    with pytest.raises(ImageError, match=r"pip install 'mm1_mlx\[heic\]'"):
        load_image(data)


def test_avif_needs_a_newer_pillow(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ImageError, match="AVIF picture, which this Pillow cannot"):
        load_image(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + b"\0" * 20)


def test_heic(rng):
    pillow_heif = need("pillow_heif", "pip install 'mm1_mlx[heic]'")
    small = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(small).resize((64, 48))
    file = io.BytesIO()
    try:
        pillow_heif.from_pillow(image).save(file, quality=100, chroma=444)
    except Exception as error:  # a build without an encoder
        pytest.skip(f"pillow_heif cannot write here: {error}")
    assert "HEIF" not in Image.OPEN  # no global registration
    assert_close(load_image(file.getvalue()), array(image), atol=8)  # lossy
    assert "HEIF" not in Image.OPEN
    with pytest.raises(ImageError, match=r"64x48.*at most 3,000"):
        load_image(file.getvalue(), max_pixels=3000)
    with pytest.raises(ImageError, match="damaged or cut off HEIF"):
        load_image(file.getvalue()[:200])
