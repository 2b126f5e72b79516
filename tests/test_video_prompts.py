"""Frames of videos in prompts, in conversations and in the command."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_kit import FRAMES, animation, frame, numbers

from helpers import assert_fails, need_tiny, run_cli, run_here
from mm1_mlx import FewShot, load
from mm1_mlx.cli.asking import read_asked
from mm1_mlx.config import TilingConfig
from mm1_mlx.errors import ImageError, MM1Warning, PromptError
from mm1_mlx.inputs.conversation import read_conversation
from mm1_mlx.inputs.prompts import flatten_messages
from mm1_mlx.inputs.video import (
    is_frame,
    place_videos,
    video_frames,
)


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
    for i, each in enumerate(video_frames(FRAMES, 2)):
        names.append(f"f{i}.png")
        each.save(tmp_path / names[-1])
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
    frame(3).save(tmp_path / "a.png")  # in five parts: as many tokens as five frames
    more = ("--image", tmp_path / "a.png", "--resolution", "1344")
    assert_fails(generate(*ask, *more), r"context is 600", r"--frames 4\.$")
    assert generate(*ask, *more, "--frames", "4").returncode == 0
    assert_fails(generate(*ask, *more, "--frames", "5"), r"--frames 4\.$")


def test_wrong_flags_of_video(gif, tmp_path):
    assert_fails(
        generate("-p", "Hi", "--frames", "3"), r"--frames goes with --video", code=2
    )
    wrong = ("--frames", "0", "--video", gif)
    assert_fails(generate("-p", "Hi", *wrong), r"--frames: must be a whole", code=2)
    absent = generate("-p", "Hi", "--video", tmp_path / "absent.mp4")
    assert_fails(absent, r"No image file .*absent\.mp4")
    assert_fails(generate("-p", "Hi", "--video", tmp_path), r"has no pictures")
