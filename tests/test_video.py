"""Video as frames: which ones, from which files, in a prompt and in a command."""

import json
import shutil
import struct
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import assert_fails, need, need_tiny, needs, run_cli, run_here
from mm1_mlx import FewShot, load
from mm1_mlx.cli.asking import read_asked
from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import ImageError, MM1Warning, PromptError
from mm1_mlx.inputs.conversation import read_conversation
from mm1_mlx.inputs.prompts import flatten_messages
from mm1_mlx.inputs.video import (
    is_frame,
    natural_order,
    pictures_in,
    place_videos,
    uniform_places,
    video_frames,
)

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


# --- in a prompt ---------------------------------------------------------------------


def test_videos_in_a_prompt():
    text, images = place_videos(
        "First <image>, then <video>, then <video>.", ["a"], [["b", "c"], ["d"]]
    )
    assert text == "First <image>, then <image><image>, then <image>."
    assert images == ["a", "b", "c", "d"]
    assert place_videos("Hi", ["a"], [["b", "c"]]) == ("Hi", ["a", "b", "c"])
    assert place_videos("<video> <image>", ["a"], [["b"]])[1] == ["b", "a"]
    assert place_videos("Hi <image>", ["a"], []) == ("Hi <image>", ["a"])


@pytest.mark.parametrize(
    "prompt, images, videos, message",
    [
        ("<video>?", [], [], r"has 1 <video>, but 0 videos were given"),
        ("<video>?", [], [["a"], ["b"]], r"has 1 <video>, but 2 videos were given"),
        ("<image>?", ["a"], [["b"]], r"has 0 <video>, but 1 video was given"),
        ("<video>?", ["a"], [["b"]], r"has 0 <image>, but 1 image was given"),
    ],
)
def test_another_number_of_marks(prompt, images, videos, message):
    with pytest.raises(PromptError, match=message):
        place_videos(prompt, images, videos)


def test_a_part_of_a_message(tmp_path):
    path = animation(tmp_path / "a.gif")
    parts = [
        {"type": "image", "image": "first"},
        {"type": "video", "video": str(path), "frames": 3},
        {"type": "text", "text": "What happens?"},
    ]
    flat, images = flatten_messages([{"role": "user", "content": parts}])
    assert flat[0]["content"] == "<image><image><image><image>What happens?"
    assert images[0] == "first"
    assert numbers(images[1:]) == [5, 15, 25]
    parts[1].pop("frames")
    _, images = flatten_messages([{"role": "user", "content": parts}])
    assert len(images) == 1 + 24


def test_limits_hold_for_the_videos_of_messages(tmp_path, monkeypatch):
    """By the flags, and in Python."""
    data = animation(tmp_path / "a.gif").read_bytes()
    monkeypatch.setattr("mm1_mlx.inputs.urls.fetch", lambda url: data)
    part = {"type": "video", "video": "https://a.example/a.gif", "frames": 2}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]
    (tmp_path / "talk.json").write_text(json.dumps(messages))
    parser = import_module("mm1_mlx.generate").parser()

    def asked(*flags):
        talk = ("--messages", str(tmp_path / "talk.json"))
        return read_asked(parser.parse_args([*talk, *flags]))

    with pytest.raises(ImageError, match=r"message 1: .* add --allow-url"):
        asked()
    assert numbers(asked("--allow-url")[1]) == [7, 22]
    with pytest.raises(ImageError, match="pixels"):
        asked("--allow-url", "--max-image-pixels", "20")
    need_tiny()
    _, processor = load("mm1-tiny")
    with pytest.raises(ImageError, match="add --allow-url"):
        processor(messages)
    assert processor(messages, allow_url=True).num_images == 2
    with pytest.raises(ImageError, match="pixels"):
        processor(messages, allow_url=True, max_pixels=20)
    shots = FewShot([{"images": [], "prompt": "a", "answer": "b"}])
    with pytest.raises(ImageError, match="add --allow-url"):
        shots.ask(messages, processor=processor)
    found = shots.ask(messages, processor=processor, allow_url=True)
    assert numbers(found.images) == [7, 22]


def test_frames_in_a_file_start_from_its_folder(tmp_path):
    names = []
    for i, frame in enumerate(video_frames(FRAMES, 2)):
        names.append(f"f{i}.png")
        frame.save(tmp_path / names[-1])
    part = {"type": "video", "video": names}
    place = tmp_path / "talk.json"
    place.write_text(json.dumps([{"role": "user", "content": [part]}]))
    assert numbers(read_conversation(place)[1]) == [7, 22]


def test_more_frames_than_any_context_holds_are_refused_unread(capsys):
    """Before a file is opened, and by the flag before anything."""
    from mm1_mlx.generate import main

    with pytest.raises(ImageError, match="frames is 4097, but must be 4096 at most"):
        video_frames("absent.mp4", 4097)
    with pytest.raises(SystemExit) as ended:
        main(["--video", "absent.mp4", "--frames", "4097", "-p", "Hi"])
    assert ended.value.code == 2
    assert "must be a whole number from 1 to 4096" in capsys.readouterr().err


def sizes_and_tiles(processor, images, resolution=None, **settings):
    """Of each picture: the side of a tile, and whether it is cut."""
    frames = [is_frame(image) for image in images]
    ways = processor.ways(len(images), resolution, frames=frames, **settings)
    return [(way.settings.size, way.tiling is not None) for way in ways]


def test_frames_are_read_whole():
    """Whatever other pictures are read in; a list says it for each."""
    need_tiny()
    _, processor = load("mm1-tiny")
    side = processor.image_settings.size
    frames, other = video_frames(FRAMES, 1), Image.new("RGB", (8, 8))
    whole, large = (side, False), (2 * side, False)
    assert sizes_and_tiles(processor, [other, *frames], 2 * side) == [large, large]
    assert sizes_and_tiles(processor, [other, *frames]) == [whole, whole]
    for cut, cut_side in (("dynamic", side), (2 * 8 * side, 8 * side)):
        with pytest.warns(MM1Warning, match=rf"read with .*'native', not .*{cut}"):
            assert sizes_and_tiles(processor, frames, cut) == [whole]
        with pytest.warns(MM1Warning, match="Frames"):
            found = sizes_and_tiles(processor, [other, *frames], cut)
        assert found == [(cut_side, True), whole]
        processor.resolution = cut  # an adapter's
        assert sizes_and_tiles(processor, [other, *frames]) == [(cut_side, True), whole]
        processor.resolution = None
    found = sizes_and_tiles(processor, frames * 2, ["native", 2 * side])
    assert found == [whole, large]
    with pytest.raises(PromptError, match=r"max_tiles is 4, .*: frames of a video are"):
        sizes_and_tiles(processor, frames, "dynamic", max_tiles=4)


def test_with_frames_too_many_pictures_are_not_cut_either():
    need_tiny()
    _, processor = load("mm1-tiny")
    images = [Image.new("RGB", (8, 8)), *video_frames(FRAMES, 3)]
    with pytest.warns(MM1Warning, match="has 4 images, and with more than 2 none is"):
        found = sizes_and_tiles(processor, images, "dynamic")
    assert found == [(processor.image_settings.size, False)] * 4


def test_a_model_of_tiles_cuts_stills_beside_frames():
    need_tiny()
    _, processor = load("mm1-tiny")
    tiling = TilingConfig(type="dynamic", default="tiles", max_images=3)
    processor.config = replace(processor.config, tiling_config=tiling)
    side = processor.image_settings.size
    images = [Image.new("RGB", (8, 8)), *video_frames(FRAMES, 2)]
    found = sizes_and_tiles(processor, images)
    assert found == [(side, True), (side, False), (side, False)]


def test_a_processor_reads_frames_whole():
    need_tiny()
    _, processor = load("mm1-tiny")
    side = 2 * processor.image_settings.size
    frames = video_frames(FRAMES, 2)
    whole = processor("<image><image>?", frames, resolution=side)
    assert whole.pixel_values.shape == (2, side, side, 3)
    plain = [Image.fromarray(np.asarray(each)) for each in frames]
    large = processor("<image><image>?", plain, resolution=side)
    assert np.array_equal(large.pixel_values, whole.pixel_values)


# --- the command ---------------------------------------------------------------------


def generate(*args, **settings):
    need_tiny()
    return run_here("generate", *args, "--json", "--quiet", **settings)


@pytest.fixture(scope="module")
def gif(tmp_path_factory) -> Path:
    return animation(tmp_path_factory.mktemp("video") / "a.gif")


def test_the_command_reads_frames(gif, tmp_path):
    ask = ("-p", "What is it?", "-m", 4, "--json")
    done = run_cli("mm1_mlx.generate", "--video", gif, "--frames", 4, *ask)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_images"] == 4
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for each, path in zip(video_frames(gif, 4), paths, strict=True):
        each.save(path)
    same = run_here("generate", "--image", *paths, *ask)
    assert json.loads(same.stdout)["token_ids"] == found["token_ids"]


def test_frames_and_pictures_in_their_places(gif, tmp_path):
    frame(3).save(tmp_path / "a.png")
    ask = ("--video", gif, "--frames", "2", "--image", tmp_path / "a.png", "-m", "2")
    done = generate(*ask, "-p", "<image> or <video>?")
    assert json.loads(done.stdout)["num_images"] == 3
    assert_fails(generate(*ask, "-p", "<image>?"), r"has 0 <video>, but 1 video was")


def test_more_frames_than_the_context_holds(gif, tmp_path):
    """What the error says would fit does fit, and one more does not."""
    model = need_tiny()
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 600
    (folder / "config.json").write_text(json.dumps(config))
    ask = ("--model", folder, "--video", gif, "-p", "What happens?", "-m", "1")
    done = generate(*ask)
    assert_fails(done, r"24 images of 64\)", r"context is 600", r"--frames 9\.$")
    assert generate(*ask, "--frames", "9").returncode == 0
    assert_fails(generate(*ask, "--frames", "10"), r"--frames 9\.$")


def test_wrong_flags_of_video(gif, tmp_path):
    assert_fails(
        generate("-p", "Hi", "--frames", "3"), r"--frames goes with --video", code=2
    )
    wrong = ("--frames", "0", "--video", gif)
    assert_fails(generate("-p", "Hi", *wrong), r"--frames: must be a whole", code=2)
    absent = generate("-p", "Hi", "--video", tmp_path / "absent.mp4")
    assert_fails(absent, r"No image file .*absent\.mp4")
    assert_fails(generate("-p", "Hi", "--video", tmp_path), r"has no pictures")
