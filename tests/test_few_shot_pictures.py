"""The pictures of examples: resolution, the nearest by their features, context."""

import re
import warnings
from ast import literal_eval
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small import DENSE, VISION, small_config
from small_tokenizers import write_tiny
from test_few_shot import BARE, CHAT, near, numbers, write

from helpers import ROOT, assert_close, assert_equal, need_tiny
from mm1_mlx import FewShot, Reuse, batch_generate, generate, image_features, load
from mm1_mlx.config import ConnectorConfig
from mm1_mlx.errors import (
    CheckpointError,
    ContextError,
    DatasetError,
    ImageError,
    MM1Error,
    MM1Warning,
    PromptError,
)
from mm1_mlx.inference import features
from mm1_mlx.inference.asking import read
from mm1_mlx.inference.features import Features
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inputs.images import ImageSettings, load_image, pixels
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.inputs.video import video_frames

STAR = "What colour is the star?"
LARGE = "high_resolution_shots"

# --- open files ----------------------------------------------------------------------


def test_open_files_may_be_needed_more_than_once():
    """By the nearest shots, by a draft model, by the next question."""
    need_tiny()
    model, processor = load("mm1-tiny")
    shapes = ROOT / "examples" / "shapes.png"
    expected = generate(model, processor, STAR, [shapes]).text
    with shapes.open("rb") as file, shapes.open("rb") as other:
        shots = [{"image": other, "answer": name} for name in ("a", "b")]
        near = FewShot(shots, 1, choice="nearest")
        for _ in "12":
            assert generate(model, processor, "", [file], shots=near).text
        guessed = generate(
            model, processor, STAR, [file], draft_model=(model, processor)
        )
        assert guessed.text == expected and file.tell() == 0
        file.seek(7)
        with pytest.raises(ImageError, match="is not an image"):
            load_image(file)


# --- in which resolution -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, resolution, expected",
    [
        ({}, None, None),
        ({}, 672, 672),
        ({"high_resolution_shots": 1}, 672, ["native", "native", 672, 672]),
        ({"high_resolution_shots": 0}, "dynamic", ["native"] * 3 + ["dynamic"]),
        ({"high_resolution_shots": 9}, 672, [672] * 4),
        ({"high_resolution_shots": 1}, None, ["native", "native", None, None]),
        ({}, [1344], [None, None, None, 1344]),
    ],
)
def test_the_last_shots_are_read_as_the_question(settings, resolution, expected):
    shots = FewShot(BARE, 3, choice="first", **settings)
    for question in ("", "What?"):
        found = shots.ask(question, "q.png", processor=CHAT, resolution=resolution)
        assert found.resolution == expected


def test_high_resolution_shots_have_one_meaning(paper):
    """The last ones as the question, which must be read higher than the others."""
    shots = FewShot(BARE, 3, choice="first", high_resolution_shots=1)
    with pytest.raises(PromptError, match=r"goes with one resolution, .* a list was"):
        shots.ask("", "q.png", processor=CHAT, resolution=[1344])
    for same in (None, "native", 24):  # 24 pixels are the encoder's own
        with pytest.raises(PromptError, match=r"that is the encoder's own, .*--resol"):
            shots.ask("", "q.png", processor=paper, resolution=same)
    found = shots.ask("", "q.png", processor=paper, resolution=48)
    assert found.resolution == ["native", "native", 48, 48]
    paper.resolution = 48  # what a call takes that is given none
    found = shots.ask("", "q.png", processor=paper)
    assert found.resolution == ["native", "native", None, None]
    one = Image.new("RGB", (24, 24))
    frames = video_frames([one, one], 2)  # are not cut here, either
    with pytest.warns(MM1Warning, match="Frames of a video are not cut"):
        found = shots.ask("", frames, processor=paper, resolution="dynamic")
    assert found.resolution == ["native", "native", "dynamic", "native", "native"]


def test_an_adapters_resolution_is_that_of_the_last_shots(paper):
    """And of every None in a list, with the adapter's number of tiles."""
    paper.resolution = 48
    picture = Image.new("RGB", (48, 48))
    examples = [{"image": picture, "answer": "a"}] * 3
    shots = FewShot(examples, high_resolution_shots=1)
    asked = shots.ask("", picture, processor=paper)
    inputs = paper(asked.prompt, asked.images, resolution=asked.resolution)
    read = [each.shape[1] for each in inputs.pixel_values]
    assert read == [24, 24, 48, 48]
    assert [w.settings.size for w in paper.ways(2, [None, "native"])] == [48, 24]
    paper.resolution, paper.max_tiles = "dynamic", 4
    one, two = paper.ways(2, [None, "native"])
    assert one.tiling.max_tiles == 4 and two.tiling is None


def test_examples_that_are_left_out_make_room_for_others():
    assert numbers(FewShot(BARE, 3, choice="first").choose(leave_out={2})) == [1, 3, 4]
    drawn = numbers(FewShot(BARE, 4).choose())
    assert numbers(FewShot(BARE, 2).choose(leave_out={drawn[0]})) == drawn[1:3]
    shots = near((1, 0), (0, 1), (0.6, 0.8), num_shots=2)
    assert numbers(shots.choose(None, None, [(1, 0)], leave_out={1})) == [2, 3]


def test_every_picture_of_a_shot_has_its_resolution():
    two = [{"images": ["a", "b"], "answer": "x"}, {"image": "c", "answer": "y"}]
    shots = FewShot(two, high_resolution_shots=1)
    found = shots.ask("", ["q", "r"], processor=CHAT, resolution=672)
    assert found.resolution == ["native", "native", 672, 672, 672]


@pytest.mark.parametrize("wrong", [-1, 1.5, "2", True])
def test_numbers_of_large_shots_that_are_none(wrong):
    with pytest.raises(MM1Error, match=r"high_resolution_shots is .* must be a whole"):
        FewShot(BARE, high_resolution_shots=wrong)


# --- as many as in the paper ---------------------------------------------------------


@pytest.fixture
def paper(tmp_path) -> Processor:
    """144 tokens a picture, and a context of 4096 (MM1 section 4)."""
    vision = replace(VISION, image_size=24, patch_size=2)
    connector = ConnectorConfig(type="average_pool", num_query_tokens=144)
    text = replace(DENSE, vocab_size=400, max_position_embeddings=4096)
    config = small_config(
        text, vision_config=vision, connector_config=connector, image_token_id=4
    )
    tokenizer = load_tokenizer(write_tiny(tmp_path))
    settings = ImageSettings(size=24)
    return Processor(tokenizer, settings, config, chat_template="mm1-tiny")


def test_sixteen_pictures_fit_and_24_frames_do(paper):
    one = Image.new("RGB", (24, 24))
    many = [{"image": one, "answer": f"label {i}"} for i in range(40)]
    asked = FewShot(many, 16).ask("", one, processor=paper)
    inputs = paper(asked.prompt, asked.images)
    assert inputs.num_images == 17 and inputs.input_ids.shape[1] < 4096
    frames = video_frames([one] * 100)
    ids = paper("What happens?", frames).input_ids[0].tolist()
    assert ids.count(4) == 24 * 144 == 3456
    with pytest.raises(ContextError) as met:
        paper("What happens?", [one] * 40)
    assert met.value.image_ids == (144,) * 40
    assert "28 of the 40 images" in str(met.value)


@pytest.mark.parametrize(
    "settings, resolution, flags",
    [
        (
            {"high_resolution_shots": 9},
            "dynamic",
            ["max_tiles", LARGE, "num_shots"],
        ),
        ({"high_resolution_shots": 9}, 1344, [LARGE, "num_shots"]),
        ({}, 1344, ["resolution", LARGE, "num_shots"]),
        ({"num_shots": 30}, "dynamic", ["num_shots"]),
        ({"num_shots": 30}, None, ["num_shots"]),
        ({}, "the adapter's", ["resolution", LARGE, "num_shots"]),
    ],
)
def test_what_is_said_to_fit_does(paper, settings, resolution, flags):
    """Each change alone; and one shot more, in number or in size, does not fit."""
    picture = Image.new("RGB", (48, 48))
    many = [{"image": picture, "answer": "a"}] * 30
    given = {"num_shots": 9, "choice": "first"} | settings
    if resolution == "the adapter's":
        paper.resolution, resolution = 1344, None

    def ask(changed: dict, **reading) -> Any:
        how = Settings(**{"resolution": resolution} | reading)
        shots = FewShot(many, **(given | changed))
        asked = shots.ask("", picture, processor=paper, resolution=how.resolution)
        return read(paper, asked, how, 4096)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MM1Warning)  # not trained for tiles
        with pytest.raises(ContextError) as met:
            ask({})
        found = re.findall(r"\((\w+)=(\S+)\)", str(met.value))
        assert "images" not in " ".join(met.value.ways)
        assert [name for name, _ in found] == flags
        for name, value in found:
            if name in ("max_tiles", "resolution"):
                ask({}, **{name: literal_eval(value)})
                continue
            ask({name: int(value)})
            with pytest.raises(ContextError):
                ask({name: int(value) + 1})


# --- with pictures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    need_tiny()
    return load("mm1-tiny")


COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220)}


@pytest.fixture
def coloured(tmp_path):
    """A file of two pictures of each of three colours."""
    lines = []
    for size in (20, 60):
        for name, colour in COLOURS.items():
            path = tmp_path / f"{name}{size}.png"
            Image.new("RGB", (size, size), colour).save(path)
            lines.append({"image": path.name, "answer": name})
    return write(tmp_path, *lines)


def test_features_are_the_mean_of_patches(tiny, coloured, tmp_path):
    model, processor = tiny
    paths = [tmp_path / "red20.png", str(tmp_path / "blue60.png")]
    found = image_features(model, processor, paths)
    settings = processor.image_settings
    shots = np.stack([pixels(load_image(path), settings) for path in paths])
    patches = np.array(model.vision(mx.array(shots)).astype(mx.float32), np.float64)
    mean = patches.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    # Float32 sums of 144 patches in another order.
    assert_close(found, expected, atol=1e-5)
    assert image_features(model, processor, []).shape == (0, expected.shape[1])
    same = image_features(model, processor, [Image.open(paths[0])])
    assert_close(same[0], found[0], atol=1e-5)


def test_the_nearest_by_features(tiny, coloured, tmp_path):
    model, processor = tiny
    shots = FewShot(coloured, 2, choice="nearest")
    for name in COLOURS:
        query = tmp_path / f"{name}60.png"
        chosen = shots.choose(model, processor, [query])
        assert [shot.answer for shot in chosen] == [name, name]
        assert chosen[-1].images == (tmp_path / f"{name}20.png",)  # the same, enlarged


def count_encoded(model, monkeypatch) -> list[int]:
    counts: list[int] = []
    kind, vision = type(model.vision), type(model.vision).__call__

    def watched(self, pixel_values, **settings):
        counts.append(pixel_values.shape[0])
        return vision(self, pixel_values, **settings)

    monkeypatch.setattr(kind, "__call__", watched)
    return counts


def test_features_are_computed_once(tiny, coloured, tmp_path, monkeypatch):
    model, processor = tiny
    counts = count_encoded(model, monkeypatch)
    kept = tmp_path / "features.safetensors"
    query = [tmp_path / "green20.png"]
    shots = FewShot(coloured, 2, choice="nearest", features=kept)
    first = shots.choose(model, processor, query)
    assert counts == [6]  # the query is one of them
    assert numbers(shots.choose(model, processor, query)) == numbers(first)
    again = FewShot(coloured, 2, choice="nearest", features=kept)
    assert numbers(again.choose(model, processor, query)) == numbers(first)
    assert counts == [6]
    # A file with other contents under the same name is another picture.
    Image.new("RGB", (20, 20), (0, 0, 0)).save(tmp_path / "red20.png")
    again.choose(model, processor, query)
    assert counts == [6, 1]
    FewShot(coloured, 2, choice="nearest", features=kept).choose(
        model, processor, query
    )
    assert counts == [6, 1]


def test_features_that_are_held_are_those_of_looking_again(
    tiny, coloured, tmp_path, monkeypatch
):
    model, processor = tiny
    shots = FewShot(coloured, 3, choice="nearest")
    held = shots.looked(model, processor)
    opened = []
    plain = Features._opened
    monkeypatch.setattr(
        Features,
        "_opened",
        lambda self, image, limits: opened.append(image) or plain(self, image, limits),
    )
    for name in COLOURS:
        query = tmp_path / f"{name}20.png"
        near = held.choose(model, processor, [query])
        assert opened == [query]
        assert numbers(near) == numbers(shots.choose(model, processor, [query]))
        opened.clear()


def test_features_are_of_the_eyes_settings_too(tiny, coloured, tmp_path, monkeypatch):
    """An adapter's scale is no array: in memory, and in a file of features."""
    paths, read = [tmp_path / "red20.png"], []
    plain = Features._encode

    def encode(self, model, waiting):
        read.extend(waiting)
        plain(self, model, waiting)

    monkeypatch.setattr(Features, "_encode", encode)
    kept = Features(tmp_path / "features.safetensors")
    for scale, count in (("2", 1), ("20", 2), ("20", 2)):
        said = "all", f"scale {scale}"
        monkeypatch.setattr(features, "settings_of", lambda model, said=said: said)
        for one in (kept, Features(tmp_path / "features.safetensors")):
            one.of(*tiny, paths)
            assert len(read) == count


def test_pictures_without_features_can_be_passed_over(tiny, coloured, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    names = ["red20.png", "bad.png", "blue20.png", "absent.png"]
    failed: dict = {}
    kept = Features()
    found = kept.of(*tiny, [tmp_path / name for name in names], failed=failed)
    assert sorted(failed) == [1, 3] and "bad.png is not an ima" in str(failed[1])
    assert not found[[1, 3]].any()
    alone = image_features(*tiny, [tmp_path / "red20.png", tmp_path / "blue20.png"])
    assert_equal(found[[0, 2]], alone)


def test_features_of_another_encoder_are_not_taken(tiny, coloured, tmp_path):
    model, processor = tiny
    kept = Features(tmp_path / "features.safetensors")
    paths = [tmp_path / "red20.png"]
    before = kept.of(model, processor, paths)
    weight = model.vision.patch_embed.weight
    model.vision.patch_embed.weight = weight * 2
    try:
        changed = kept.of(model, processor, paths)
        fresh = Features(tmp_path / "features.safetensors").of(model, processor, paths)
        assert_equal(changed, fresh)
        assert np.abs(changed - before).max() > 1e-3
    finally:
        model.vision.patch_embed.weight = weight
    assert_equal(kept.of(model, processor, paths), before)


def test_files_of_features_that_are_none(tiny, coloured, tmp_path):
    (tmp_path / "f.safetensors").write_text("no features")
    shots = FewShot(coloured, choice="nearest", features=tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"no file of .* features\. Name another"):
        shots.choose(*tiny, [tmp_path / "red20.png"])
    assert (tmp_path / "f.safetensors").read_text() == "no features"
    shots = FewShot(coloured, choice="nearest", features=coloured + "/f.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        shots.choose(*tiny, [tmp_path / "red20.png"])
    with pytest.raises(ImageError, match="takes a list of pictures"):
        image_features(*tiny, str(tmp_path / "red20.png"))


def test_a_model_without_an_encoder_has_no_features(tiny):
    model = SimpleNamespace(config=SimpleNamespace(vision_config=None))
    with pytest.raises(PromptError, match="has no image encoder, so its pictures"):
        image_features(model, tiny[1], [])


@pytest.mark.parametrize("choice", ["first", "random", "nearest"])
def test_answers_are_those_of_the_written_out_prompt(tiny, coloured, tmp_path, choice):
    """Cached or not, alone or in a batch."""
    model, processor = tiny
    shots = FewShot(coloured, 3, choice=choice)
    queries = [tmp_path / f"{name}60.png" for name in COLOURS]
    given = {"shots": shots, "max_tokens": 6, "stop": "never"}
    store = Reuse()
    batch = batch_generate(model, processor, [""] * 3, queries, reuse=False, **given)
    for query, of_batch in zip(queries, batch, strict=True):
        cached = generate(model, processor, "", query, reuse=store, **given)
        fresh = generate(model, processor, "", query, reuse=False, **given)
        asked = shots.ask("", query, model=model, processor=processor)
        out = generate(
            model, processor, asked.prompt, asked.images, stop="\n", max_tokens=6
        )
        tokens = {r.token_ids for r in (cached, fresh, out, of_batch)}
        assert len(tokens) == 1
    if choice != "nearest":
        assert cached.reused_tokens >= 3 * processor.tokens_per_image


def test_mixed_resolutions_are_those_of_the_written_out_prompt(
    tiny, coloured, tmp_path
):
    model, processor = tiny
    shots = FewShot(coloured, 3, choice="first", high_resolution_shots=1)
    query, side = tmp_path / "blue60.png", 2 * processor.image_settings.size
    given = {"shots": shots, "max_tokens": 6, "resolution": side}
    (found,) = batch_generate(model, processor, [""], [query], reuse=False, **given)
    asked = shots.ask("", query, processor=processor, resolution=side)
    out = generate(
        *(model, processor, asked.prompt, asked.images),
        **{"resolution": ["native", "native", side, side], "max_tokens": 6},
        stop="\n",
    )
    assert found.token_ids == out.token_ids
    inputs = processor(
        asked.prompt, asked.images, resolution=["native", "native", side, side]
    )
    widths = [each.shape[-2] for each in inputs.pixel_values]
    assert widths == [side // 2, side // 2, side, side]


def test_a_broken_picture_of_a_shot_is_named_with_its_line(tiny, coloured, tmp_path):
    (tmp_path / "green20.png").write_text("no picture")
    for choice in ("first", "nearest"):
        shots = FewShot(coloured, choice=choice)
        with pytest.raises(DatasetError, match=r"line 2: .*green20\.png is not an ima"):
            generate(*tiny, "", tmp_path / "red20.png", shots=shots)
    with pytest.raises(ImageError, match=r"^No image file .*absent"):
        generate(*tiny, "", tmp_path / "absent.png", shots=FewShot(coloured, 1))


def test_more_shots_than_the_context_holds(tiny, coloured, tmp_path):
    """What the error says would fit does fit, and one more does not."""
    model, processor = tiny
    context = model.config.text_config.max_position_embeddings
    many = [{"image": tmp_path / "red20.png", "answer": "red"}] * (context // 64 + 2)
    shots = FewShot(many, choice="first")
    with pytest.raises(ContextError, match=r"--num-shots \d+ \(num_shots=\d+\)") as met:
        generate(model, processor, "", tmp_path / "red60.png", shots=shots)
    (count,) = map(int, re.findall(r"num_shots=(\d+)", str(met.value)))
    less = FewShot(many, count, choice="first")
    assert generate(
        model, processor, "", tmp_path / "red60.png", shots=less, max_tokens=1
    ).shots == tuple(range(1, count + 1))
    with pytest.raises(ContextError):
        more = FewShot(many, count + 1, choice="first")
        generate(model, processor, "", tmp_path / "red60.png", shots=more)
