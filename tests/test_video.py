"""Video as frames: which ones, and from which files."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image
from video_kit import COUNT, FRAMES, animation, film, frame, numbers

from helpers import need, needs
from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.video import (
    natural_order,
    pictures_in,
    uniform_places,
    video_frames,
)

# --- which frames --------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, wanted, places",
    [
        (10, 1, [5]),
        (10, 2, [2, 7]),
        (10, 3, [1, 5, 8]),
        (5, 3, [0, 2, 4]),
        (4, 4, [0, 1, 2, 3]),
        (3, 24, [0, 1, 2]),
        (1, 1, [0]),
        (0, 3, []),
        (25, 24, [*range(12), *range(13, 25)]),
        (240, 24, list(range(5, 240, 10))),
    ],
)  # fmt: skip
def test_the_middle_of_each_of_so_many_equal_parts(count, wanted, places):
    assert uniform_places(count, wanted) == places


def test_places_are_in_order_and_as_far_from_both_ends():
    for count in range(1, 60):
        for wanted in range(1, 40):
            places = uniform_places(count, wanted)
            assert len(places) == min(count, wanted)
            assert places == sorted(set(places))
            assert abs(places[0] - (count - 1 - places[-1])) <= 1


def test_names_are_sorted_as_people_count():
    names = ["f10.png", "f2.png", "F1.png", "a.png", "f2b.png", "10.png", "9.png"]
    expected = ["9.png", "10.png", "a.png", "F1.png", "f2.png", "f2b.png", "f10.png"]
    assert sorted(names, key=natural_order) == expected


# --- where they come from ------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings",
    [
        ("a.gif", {}),
        ("a.webp", {"lossless": True}),
        ("a.png", {}),
    ],
)
def test_animations(tmp_path, name, settings):
    path = animation(tmp_path / name, **settings)
    assert numbers(video_frames(path, 3)) == [5, 15, 25]
    assert numbers(video_frames(str(path))) == uniform_places(COUNT, 24)
    assert numbers(video_frames(path.read_bytes(), 100)) == list(range(COUNT))


def test_the_still_of_an_animated_png_is_no_frame(tmp_path):
    path = animation(tmp_path / "a.png", default_image=True)
    assert numbers(video_frames(path, 100)) == list(range(1, COUNT))


def test_frames_of_a_gif_are_whole_pictures(tmp_path):
    """A GIF stores what changes; each frame is laid over the one before."""
    small = Image.new("P", (2, 2))
    small.putpalette([255, 0, 0] * 256)
    path = tmp_path / "a.gif"
    first = Image.new("RGB", (8, 8), (0, 0, 255))
    second = first.copy()
    second.paste((255, 0, 0), (0, 0, 2, 2))
    first.save(path, save_all=True, append_images=[second], duration=40, disposal=1)
    last = np.asarray(video_frames(path)[1])
    assert last[7, 7].tolist() == [0, 0, 255]
    assert last[0, 0].tolist() == [255, 0, 0]


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    frame(7).save(tmp_path / "a.png")
    assert numbers(video_frames(tmp_path / "a.png")) == [7]


def test_a_folder_in_natural_order_without_what_is_no_picture(tmp_path):
    for i in (0, 1, 2, 10, 11):
        frame(i).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "._frame1.png").write_bytes(b"what macOS leaves on other disks")
    assert [p.name for p in pictures_in(tmp_path)][2:4] == ["frame2.png", "frame10.png"]
    assert numbers(video_frames(tmp_path)) == [0, 1, 2, 10, 11]
    assert numbers(video_frames(tmp_path, 2)) == [1, 10]


def test_a_list_of_pictures():
    assert numbers(video_frames(FRAMES, 3)) == [5, 15, 25]


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp4", "mpeg4"),
        ("b.mp4", "libx264"),  # frames are stored in another order
        ("a.mov", "mjpeg"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx"),
        ("a.mkv", "libx264"),
    ],
)
def test_films(tmp_path, name, codec):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = film(tmp_path / name, codec, pixels)
    assert numbers(video_frames(path, 3)) == [5, 15, 25]
    assert numbers(video_frames(path, 24)) == uniform_places(COUNT, 24)
    assert numbers(video_frames(path.read_bytes(), 100)) == list(range(COUNT))


def test_a_film_of_a_phone_that_was_held_upright(tmp_path):
    """Its frames lie on their side, and the header has a matrix that turns them."""
    path = film(tmp_path / "a.mp4", "mpeg4")
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    assert data[at : at + 36] == struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    # x' = -y, y' = x: a quarter clockwise, as iPhones write it.
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + turned + data[at + 36 :])
    (picture,) = video_frames(path, 1)
    assert picture.size == (16, 32)
    green = np.asarray(picture)[:, :, 1]
    assert green[:12].mean() > 150 > 50 > green[20:].mean()  # left is now above


def test_the_limit_of_pixels(tmp_path):
    path = animation(tmp_path / "a.gif")
    with pytest.raises(ImageError, match=r"32x16, 512 pixels, .* --max-image-pixels"):
        video_frames(path, max_pixels=500)


@needs("av")
def test_the_limit_of_pixels_of_a_film(tmp_path):
    path = film(tmp_path / "a.mp4", "mpeg4")
    with pytest.raises(ImageError, match=r"32x16, 512 pixels"):
        video_frames(path, max_pixels=500)


# --- what is no video ----------------------------------------------------------------


def test_without_the_package_for_films(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"pip install 'mm1_mlx\[video\]'\. Or give a"):
        video_frames(tmp_path / "a.mp4")


@needs("av")
@pytest.mark.parametrize("part", [0.1, 0.5])
def test_a_film_that_was_cut_off(tmp_path, part):
    path = film(tmp_path / "a.mp4", "mpeg4")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ImageError, match=r"a\.mp4 (has no|is) .*cut off"):
        video_frames(path)


@needs("av")
def test_a_film_without_pictures(tmp_path):
    av = need("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ImageError, match=r"has no pictures: it is sound alone"):
        video_frames(path)


def test_a_phones_photo_is_one_frame(tmp_path):
    """An MPO has smaller pictures of itself behind the photo."""
    photo, small = Image.new("RGB", (60, 40)), Image.new("RGB", (30, 20))
    photo.save(tmp_path / "a.mpo", save_all=True, append_images=[small])
    assert [frame.size for frame in video_frames(tmp_path / "a.mpo")] == [(60, 40)]


@pytest.mark.parametrize("frames", [0, -1, 2.5, "3", True])
def test_a_number_of_frames_that_is_none(frames):
    with pytest.raises(ImageError, match="must be a whole number above 0"):
        video_frames(FRAMES, frames)


def test_other_sources_that_are_none(tmp_path):
    with pytest.raises(ImageError, match="has no pictures: expected files that end"):
        video_frames(tmp_path)
    with pytest.raises(ImageError, match=r"No image file .*absent\.gif"):
        video_frames(tmp_path / "absent.gif")
    with pytest.raises(ImageError, match="the list of them is empty"):
        video_frames([])
    with pytest.raises(ImageError, match="The image path is empty"):
        video_frames("")  # and not the folder that one is in
    with Image.open(animation(tmp_path / "b.gif")) as opened:
        for given, kind in ((opened, "GifImageFile"), (np.zeros((2, 9, 9, 3)), "nda")):
            with pytest.raises(
                ImageError, match=f"video of type {kind}.*give its file"
            ):
                video_frames(given)
        assert video_frames([opened], 1)[0].size == opened.size  # a frame
    with pytest.raises(
        ImageError, match=r"A video of type int .* a folder of pictures"
    ):
        video_frames(7)
    (tmp_path / "a.gif").write_text("no animation")
    with pytest.raises(ImageError, match="is not an image, or of a format"):
        video_frames(tmp_path / "a.gif")
    with pytest.raises(ImageError, match="--allow-url"):
        video_frames("https://a.example/a.gif")
    whole = animation(tmp_path / "b.gif").read_bytes()
    (tmp_path / "b.gif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"b\.gif is a damaged or cut off GIF file"):
        video_frames(tmp_path / "b.gif")
