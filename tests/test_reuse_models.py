"""Reuse with real pictures, adapters, tiles, quantized weights, several processes."""

import io
import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from process_kit import run_two
from small import small_model
from test_adapter_switch import LORA, PLANS, base_model
from test_reuse import SHORT, SHOTS, Work, plain

from helpers import ROOT, assert_equal, need_tiny
from mm1_mlx import Reuse, load
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.layers import AdaptedLinear, AdaptedStack
from mm1_mlx.adapters.switch import drop_adapter, use_adapter
from mm1_mlx.adapters.targets import Plan, adapt
from mm1_mlx.config import TilingConfig
from mm1_mlx.inference.generation import batch_generate, generate
from mm1_mlx.inputs import images as images_module
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.shelf import Shelf
from mm1_mlx.inputs.tokenizer import number_tokenizer
from mm1_mlx.loading import load_adapters

SHAPES = ROOT / "examples" / "shapes.png"
STAR = "What colour is the star?"
CIRCLES = "How many circles are there?"


# --- pictures, by their content ------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    need_tiny()
    return load("mm1-tiny")


@pytest.fixture
def tiny(loaded):
    """Nothing is known yet."""
    loaded[0].reuse = None
    return loaded


def as_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def test_the_same_picture_in_other_forms_is_not_encoded_again(
    tiny, tmp_path, monkeypatch
):
    other = shutil.copy(SHAPES, tmp_path / "other.png")
    image = Image.open(SHAPES).convert("RGB")
    generate(*tiny, CIRCLES, [SHAPES], **SHORT)
    work = Work(monkeypatch)
    forms = [other, str(other), SHAPES.read_bytes(), image, np.asarray(image)]
    forms += [as_bytes(image), mx.array(np.asarray(image))]
    for form in forms:
        found = generate(*tiny, STAR, [form], **SHORT)
        pictures, tokens = work.since()
        assert pictures == 0 and tokens < 20
        assert found.text == plain(*tiny, STAR, [SHAPES], **SHORT).text
        work.since()


def test_a_file_that_was_overwritten_is_another_picture(tiny, tmp_path):
    path = tmp_path / "picture.png"
    for colour in ((220, 30, 30), (30, 60, 220), (220, 30, 30)):
        Image.new("RGB", (64, 64), colour).save(path)
        found = generate(*tiny, STAR, [path], **SHORT)
        expected = plain(*tiny, STAR, [path], **SHORT)
        assert found.token_ids == expected.token_ids
        assert found.reused_tokens < 16 or colour == (220, 30, 30)
    assert found.reused_tokens == found.prompt_tokens - 1


def test_pictures_of_one_colour_and_two_sizes_are_two(tiny):
    """mlx-vlm 0.7 takes 10x20 and 20x10 for one. Squashed they are one here, too."""
    wide, high = (Image.new("RGB", size, (9, 99, 9)) for size in ((20, 10), (10, 20)))
    wide.putpixel((0, 0), (255, 0, 0))
    high.putpixel((0, 0), (255, 0, 0))
    for image in (wide, high):
        found = generate(*tiny, STAR, [image], **SHORT)
        assert found.token_ids == plain(*tiny, STAR, [image], **SHORT).token_ids
    assert found.reused_tokens < 16


def test_a_file_is_decoded_once(tiny, monkeypatch):
    opened = []
    decode = images_module._decode

    def watched(data, name, max_pixels):
        opened.append(name)
        return decode(data, name, max_pixels)

    monkeypatch.setattr(images_module, "_decode", watched)
    for asked in (STAR, CIRCLES, STAR):
        generate(*tiny, asked, [SHAPES], **SHORT)
    assert len(opened) == 1
    generate(*tiny, STAR, [SHAPES], reuse=False, **SHORT)
    assert len(opened) == 2


def test_pixels_are_known_for_the_settings_that_made_them(tiny):
    _, processor = tiny
    known = Shelf(10**9)
    first = processor(STAR, SHAPES, known=known).pixel_values
    before = processor.image_settings
    try:
        processor.image_settings = ImageSettings(size=before.size, resize_mode="pad")
        padded = processor(STAR, SHAPES, known=known).pixel_values
        assert_equal(padded, processor(STAR, SHAPES).pixel_values)
    finally:
        processor.image_settings = before
    assert_equal(processor(STAR, SHAPES, known=known).pixel_values, first)
    assert len(known) == 2


def test_a_known_picture_that_is_too_large_now_is_refused(tiny):
    generate(*tiny, STAR, [SHAPES], **SHORT)
    with pytest.raises(Exception, match="but at most 10 are decoded"):
        generate(*tiny, STAR, [SHAPES], max_pixels=10, **SHORT)


def test_messages_that_grow(tiny):
    """What `chat` does: each turn begins with all before it."""
    talk = [{"role": "user", "content": f"<image> {CIRCLES}"}]
    before = 0
    for asked in (STAR, "How many stars are there?"):
        found = generate(*tiny, talk, [SHAPES], **SHORT)
        expected = plain(*tiny, talk, [SHAPES], **SHORT)
        assert found.token_ids == expected.token_ids
        assert found.reused_tokens >= before
        before = found.prompt_tokens
        talk = [
            *talk,
            {"role": "assistant", "content": found.text},
            {"role": "user", "content": asked},
        ]
    found = generate(*tiny, talk, [SHAPES], **SHORT)
    assert found.reused_tokens >= before
    assert found.token_ids == plain(*tiny, talk, [SHAPES], **SHORT).token_ids


def test_examples_for_many_questions(tiny, monkeypatch):
    """Few-shot: what comes before the question is computed once."""
    shots = f"<image> {STAR} green. <image> {CIRCLES} "
    expected = [
        plain(*tiny, shots + asked, [SHAPES, SHAPES], **SHORT).token_ids
        for asked in (STAR, CIRCLES)
    ]
    work = Work(monkeypatch)
    rows = batch_generate(
        *tiny, [shots + STAR, shots + CIRCLES], [[SHAPES, SHAPES]] * 2, **SHORT
    )
    assert [row.token_ids for row in rows] == expected
    pictures, tokens = work.since()
    assert pictures == 1  # twice the same
    assert tokens < 1.3 * rows[0].prompt_tokens
    later = generate(*tiny, shots + "Is there a star?", [SHAPES, SHAPES], **SHORT)
    assert work.since()[0] == 0
    assert later.reused_tokens > 0.8 * later.prompt_tokens


def tiled_model():
    """LLaVA-NeXT's way: up to four tiles and an overview."""
    tiling = TilingConfig(type="anyres", grids=[[1, 2], [2, 1], [2, 2]])
    model = small_model(tiling_config=tiling)
    words = number_tokenizer(90, 1, 2, 0)
    settings = ImageSettings(size=16)
    return model, Processor(words, settings, model.config, chat_template="plain")


def test_pictures_in_tiles(monkeypatch):
    model, processor = tiled_model()
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 255, (*size, 3), np.uint8) for size in ((30, 12), (20, 40))
    ]
    asked = ["<image> 5 6 <image> 7 8", "<image> 5 6 <image> 9", "4 <image> <image> 5"]
    work = Work(monkeypatch)
    for number, prompt in enumerate(asked):
        found = generate(model, processor, prompt, images, **SHORT)
        assert (work.since()[0] > 0) == (number == 0)
        expected = plain(model, processor, prompt, images, **SHORT)
        assert found.token_ids == expected.token_ids
        work.since()
    rows = batch_generate(model, processor, asked, [images] * 3, **SHORT)
    assert work.since()[0] == 0
    for prompt, row in zip(asked, rows, strict=True):
        expected = plain(model, processor, prompt, images, **SHORT)
        assert row.token_ids == expected.token_ids


# --- adapters ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for number, (name, plan) in enumerate(PLANS.items()):
        model = base_model(False)
        adapt(model, plan, seed=number)
        weights = {
            name: array + 0.5 if name.endswith("lora_b") else array * 1.1
            for name, array in adapter_weights(model).items()
        }
        made[name] = tmp_path_factory.mktemp("adapters") / name
        write_adapter(made[name], weights, adapter_config(plan, "x"))
    return made


def test_what_one_adapter_computed_is_never_anothers(folders, processor, monkeypatch):
    model = base_model(False)
    load_adapters(model, folders)
    names = [*folders, None]
    expected = {}
    for name in names:
        use_adapter(model, name)
        expected[name] = plain(model, processor, SHOTS, [1, 2], **SHORT).token_ids
    assert len(set(expected.values())) > 2
    for reused in (0, 23):  # the second time each finds its own
        for name in names:
            use_adapter(model, name)
            found = generate(model, processor, SHOTS, [1, 2], **SHORT)
            assert found.token_ids == expected[name]
            assert found.reused_tokens == reused
    held = model.reuse.nbytes
    for name in folders:
        drop_adapter(model, name)
    del name
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    assert model.reuse.nbytes < held  # theirs went with them


def test_features_are_shared_by_adapters_of_the_decoder(
    folders, processor, monkeypatch
):
    model = base_model(False)
    load_adapters(model, folders)
    work = Work(monkeypatch)
    use_adapter(model, None)
    generate(model, processor, SHOTS, [1, 2], **SHORT)
    assert work.since()[0] == 2
    counts = {}
    for name in folders:
        use_adapter(model, name)
        generate(model, processor, SHOTS, [1, 2], **SHORT)
        counts[name] = work.since()[0]
    assert counts == {"cats": 0, "art": 2, "whole": 2, "late": 0}


def test_an_adapters_prefixes_on_the_disk(folders, processor, tmp_path):
    for name in (*folders, None) * 2:
        model = base_model(False)
        load_adapters(model, folders)
        use_adapter(model, name)
        expected = plain(model, processor, SHOTS, [1, 2], **SHORT)
        store = Reuse(folder=tmp_path)
        found = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        assert found.token_ids == expected.token_ids
    assert found.reused_tokens == 23
    assert len(list(tmp_path.iterdir())) == len(folders) + 1


def test_adapters_of_equal_arrays_and_another_scale(folders, processor, tmp_path):
    """A scale is no array: two models, in memory and on the disk."""
    found, shared = [], Reuse()
    for scale in (2.0, 30.0, 2.0):
        how = replace(LORA, pairs=replace(LORA.pairs, scale=scale))
        config = adapter_config(Plan(parts={"attention": how, "experts": how}), "x")
        folder = shutil.copytree(
            folders["cats"], tmp_path / str(scale), dirs_exist_ok=1
        )
        (folder / "adapter_config.json").write_text(json.dumps(config))
        model = base_model(False)
        load_adapters(model, {"one": folder})
        use_adapter(model, "one")
        expected = plain(model, processor, SHOTS, [1, 2], **SHORT)
        for store in (shared, Reuse(folder=tmp_path / "kept")):
            answer = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
            assert answer.token_ids == expected.token_ids
        found.append(answer.reused_tokens)
    assert found == [0, 0, 23]


def test_a_scale_that_was_changed_is_noticed(folders, processor):
    model = base_model(False)
    load_adapters(model, {"one": folders["cats"]})
    use_adapter(model, "one")
    for scale in (1.0, 30.0):
        for layer in model.modules():
            if isinstance(layer, (AdaptedLinear, AdaptedStack)):
                layer._settings = replace(layer.settings, scale=scale)
                layer._stacked = layer._kept_scales = None
        expected = plain(model, processor, SHOTS, [1, 2], **SHORT)
        answer = generate(model, processor, SHOTS, [1, 2], **SHORT)
        assert (answer.token_ids, answer.reused_tokens) == (expected.token_ids, 0)


def test_in_16_bits_on_the_disk(processor, tmp_path):
    """Type and width of what is kept are those that the model computes."""
    tokens = set()
    for reused in (0, 23):
        model = small_model()
        model.set_dtype(mx.bfloat16)
        store = Reuse(folder=tmp_path)
        found = generate(model, processor, SHOTS, [1, 2], reuse=store, **SHORT)
        tokens.add(found.token_ids)
        assert found.reused_tokens == reused
    assert len(tokens) == 1


# --- several processes ---------------------------------------------------------------

_SHARED = """
import json
import sys
from pathlib import Path
from mm1_mlx import Reuse, batch_generate, generate, load
from mm1_mlx.processes import world

folder, case = Path(sys.argv[1]), sys.argv[2]
group = world()
model, processor = load(folder / "model", group=group)
second = group.rank() == 1
limit = 0 if case == "forgets" and second else None
place = folder / f"kept{group.rank()}" if case == "disk" else None
told = []
asks = ["What is <image> this? " + more for more in ("It is", "Is it that?")]
for number in range(2):
    for ask in asks:
        store = Reuse(limit, folder=place) if place or not told else store
        found = generate(model, processor, ask, [folder / "red.png"], max_tokens=5,
                         reuse=store)
        told.append([found.token_ids, found.reused_tokens])
    rows = batch_generate(model, processor, asks, [[folder / "red.png"]] * 2,
                          max_tokens=5, reuse=store)
    told += [[row.token_ids, row.reused_tokens] for row in rows]
    if case == "disk" and second:  # its disk has lost them
        for path in place.iterdir():
            path.unlink()
(folder / f"{group.rank()}.json").write_text(json.dumps(told))
"""


@pytest.mark.parametrize("case", ["memory", "forgets", "disk"])
def test_processes_begin_where_the_one_that_knows_least_can(tmp_path, case):
    """They would wait for each other's sums for ever."""
    from test_sharing import LLAMA, make_model

    make_model(tmp_path / "model", LLAMA)
    Image.new("RGB", (20, 16), (200, 30, 30)).save(tmp_path / "red.png")
    for end in run_two(tmp_path, "-c", _SHARED, tmp_path, case):
        assert end.returncode == 0, end.stderr
    first, second = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first == second
    model, processor = load(tmp_path / "model")
    asks = ["What is <image> this? " + more for more in ("It is", "Is it that?")]
    alone = [
        list(
            plain(model, processor, ask, [tmp_path / "red.png"], max_tokens=5).token_ids
        )
        for ask in asks
    ]
    assert [tokens for tokens, _ in first] == alone * 4
    reused = [count for _, count in first]
    assert any(reused) == (case != "forgets")
