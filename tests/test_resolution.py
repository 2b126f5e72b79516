"""How large pictures are read: every resolution, through processor and model."""

import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from resolution_kit import DYNAMIC, SMALL, WIDE, Q, dynamic, parts, picture, words
from small import DENSE, VISION, small_config, small_model
from test_dynamic import as_bytes
from test_reuse import SHORT, Work, plain

from helpers import assert_close, assert_equal
from mm1_mlx import Reuse
from mm1_mlx.config import ConnectorConfig, TilingConfig
from mm1_mlx.errors import MM1Warning
from mm1_mlx.grids import Layout
from mm1_mlx.inference import picture_progress
from mm1_mlx.inference.generation import batch_generate, generate
from mm1_mlx.inference.pictures import image_tokens, pictures_of
from mm1_mlx.inference.steps import encode_images
from mm1_mlx.inputs.images import ImageSettings, fit
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.resolution import with_default
from mm1_mlx.inputs.tokenizer import number_tokenizer

assert dynamic and words  # fixtures


# --- what the model is given ---------------------------------------------------------


def test_the_ids_of_a_picture_in_tiles(words, dynamic):
    """Every piece between the tiles is encoded alone."""
    _, processor = dynamic
    found = processor("A<image>B", WIDE, resolution="dynamic")
    whole = processor("A<image>B", WIDE)
    before, image, after = whole.input_ids[0].tolist(), whole.image_tokens[0], []
    at = before.index(model_id(words))
    before, after = before[:at], before[at + image :]
    expected = list(before)
    for text in ("(0,1,1)", "(0,1,2)", "(0,1,3)", "(0,0,0)"):
        expected += words.encode(text, place="mark") + [model_id(words)] * Q
    assert found.input_ids[0].tolist() == [*expected, *after]
    assert found.layouts == (Layout(1, 3, 48, 16),)
    assert found.image_tokens == (4 * Q,) and found.pixel_values.shape[0] == 4
    assert words.decode(found.input_ids[0].tolist()).count("(0,1,2)") == 1


def model_id(words) -> int:
    return words.token_to_id("<image>")


def test_numbers_of_pictures_are_those_of_the_prompt(words, dynamic):
    _, processor = dynamic
    found = processor("<image> and <image>", [SMALL, WIDE], resolution="dynamic")
    text = words.decode(found.input_ids[0].tolist())
    assert "(1,1,1)" in text and "(1,0,0)" in text and "(0," not in text
    assert found.layouts == (Layout(0, 0, 12, 9), Layout(1, 3, 48, 16))
    assert found.image_tokens == (Q, 4 * Q)


@pytest.mark.parametrize("indicator", ["separators", "none"])
def test_other_indicators(words, indicator):
    tiling = replace(DYNAMIC, indicator=indicator, default="tiles")
    _, processor = parts(words, tiling)
    ids = processor("<image>?", WIDE).input_ids[0].tolist()
    runs = [Q] * 4 if indicator == "separators" else [4 * Q]
    seen = "".join("i" if i == model_id(words) else "." for i in ids)
    assert [len(run) for run in seen.split(".") if run] == runs


def test_a_picture_of_one_tile_is_the_native_one(dynamic):
    _, processor = dynamic
    native = processor("<image>?", SMALL, resolution="native")
    found = processor("<image>?", SMALL, resolution="dynamic")
    usual = processor("<image>?", SMALL)
    assert_equal(found.input_ids, native.input_ids)
    assert_equal(found.pixel_values, native.pixel_values)
    assert_equal(usual.pixel_values, native.pixel_values)
    assert found.layouts == native.layouts == ()


def test_from_three_pictures_on_none_is_cut(dynamic):
    """MM1.5: fewer than three, unless they are asked for one by one."""
    _, processor = dynamic
    three = [WIDE] * 3
    with pytest.warns(MM1Warning, match="has 3 images, and with more than 2 none is"):
        found = processor("<image>" * 3 + "?", three, resolution="dynamic", max_tiles=3)
    assert found.pixel_values.shape[0] == 3 and found.layouts == ()
    each = processor("<image>" * 3 + "?", three, resolution=["dynamic", None, "native"])
    assert [layout.tiles for layout in each.layouts] == [4, 1, 1]


def test_the_models_own_way(words):
    _, tiles = parts(words, replace(DYNAMIC, default="tiles"))
    assert tiles("?", WIDE).pixel_values.shape[0] == 4
    assert tiles("?", WIDE, max_tiles=2).pixel_values.shape[0] == 3
    assert tiles("?", WIDE, resolution="native").pixel_values.shape[0] == 1
    _, fixed = parts(words, TilingConfig(type="sub_images"))
    assert fixed("?", SMALL).layouts == (Layout(2, 2, 12, 9),)
    assert fixed("?", SMALL, resolution="native").pixel_values.shape == (1, 16, 16, 3)


def test_what_a_processor_takes_where_a_call_does_not_say(words):
    _, processor = parts(words)
    processor.resolution, processor.max_tiles = "dynamic", 2
    assert processor("?", WIDE).pixel_values.shape[0] == 3
    assert processor("?", WIDE, resolution="native").num_images == 1


def test_what_a_processor_takes_is_warned_of_only_where_a_call_asks(words):
    """An adapter was trained so, whatever the model's config says."""
    _, processor = parts(words, tiling=None)
    processor.resolution = "dynamic"
    with warnings.catch_warnings():
        warnings.simplefilter("error", MM1Warning)
        (way,) = processor.ways(1)
        assert way.tiling.type == "dynamic"
        assert [w.tiling for w in processor.ways(3)] == [None] * 3
        low, high = processor.ways(2, ["native", None])  # as mixed shots are read
        assert low.tiling is None and high.tiling.type == "dynamic"
    with pytest.warns(MM1Warning, match="none is cut into tiles"):
        processor.ways(3, "dynamic")
    with pytest.warns(MM1Warning, match="not say that it was trained for sub-images"):
        processor.ways(1, 1344)


SUB_IMAGES = TilingConfig(type="sub_images", default="native")


@pytest.mark.parametrize(
    "tiling, asked, expected",
    [
        (DYNAMIC, (None, None), DYNAMIC),
        (DYNAMIC, ("native", None), DYNAMIC),
        (DYNAMIC, (16, None), DYNAMIC),
        (replace(DYNAMIC, default="tiles"), ("native", None), DYNAMIC),
        (DYNAMIC, ("dynamic", None), replace(DYNAMIC, default="tiles")),
        (DYNAMIC, (None, 2), replace(DYNAMIC, default="tiles", max_tiles=2)),
        (DYNAMIC, ("dynamic", 9), replace(DYNAMIC, default="tiles", max_tiles=9)),
        (None, ("dynamic", 2), TilingConfig(type="dynamic", min_tiles=2, max_tiles=2)),
        (SUB_IMAGES, ("dynamic", None), TilingConfig(type="dynamic")),
        (None, ("native", None), None),
    ],
)
def test_a_models_default(tiling, asked, expected):
    config = small_config(DENSE, tiling_config=tiling)
    found = with_default(config, 16, *asked)
    assert found == replace(config, tiling_config=expected)


def test_a_default_that_a_config_cannot_say():
    config = small_config(DENSE)
    assert with_default(config, 16, 32, None) is None
    assert with_default(config, 16, 1344, None) is None  # its tiles have 672 pixels
    made = with_default(config, 672, 1344, None)
    assert made is not None and made.tiling_config == TilingConfig(type="sub_images")


def test_more_tiles_than_it_was_trained_with(dynamic):
    """MM1.5: 4 to 9 in training, up to 16 when it answers; and fewer than its least."""
    _, processor = dynamic
    image = picture(160, 16)
    tiles = [
        processor("?", image, resolution="dynamic", max_tiles=most).layouts
        for most in (1, 2, 6, 10)
    ]
    assert tiles == [
        (), (Layout(1, 2, 160, 16),), (Layout(1, 6, 160, 16),),
        (Layout(1, 10, 160, 16),),
    ]  # fmt: skip


@pytest.mark.parametrize("side", [12, 16, 20, 32])
def test_other_sizes_are_the_same_picture_larger(dynamic, side):
    _, processor = dynamic
    found = processor("?", WIDE, resolution=side)
    expected = np.asarray(fit(WIDE, ImageSettings(size=side)))
    assert_equal(as_bytes(np.array(found.pixel_values))[0], expected)
    assert found.image_tokens == (Q,)


def test_above_672_a_picture_is_cut_into_four(words):
    _, processor = parts(words, None)
    with pytest.warns(MM1Warning, match="not say that it was trained for sub-images"):
        found = processor("?", WIDE, resolution=704)
    assert found.pixel_values.shape == (5, 352, 352, 3)
    assert found.image_tokens == (5 * Q,)
    large = np.asarray(fit(WIDE, ImageSettings(size=704)))
    values = as_bytes(np.array(found.pixel_values))
    assert_equal(values[3], large[352:, 352:])
    overview = np.asarray(fit(WIDE, ImageSettings(size=352)))
    assert_equal(values[4], overview)
    assert words.decode(found.input_ids[0].tolist()).count("(") == 0


def test_mm1_and_mm1_5_numbers():
    """336 to 672 in one piece of 144 tokens, 1344 in five: 720 (MM1 section 5)."""
    vision = replace(VISION, image_size=336, patch_size=14)
    connector = ConnectorConfig(type="average_pool", num_query_tokens=144)
    text = replace(DENSE, max_position_embeddings=4096)
    config = small_config(
        text, vision_config=vision, connector_config=connector,
        tiling_config=TilingConfig(type="dynamic", default="native"),
    )  # fmt: skip
    processor = Processor(
        number_tokenizer(90, 1, 2, 0), ImageSettings(size=336), config,
        chat_template="plain",
    )  # fmt: skip
    image = picture(1344, 1344)
    tokens = {
        asked: processor("5", image, resolution=asked).image_tokens
        for asked in (336, 448, 560, 672, 1344)
    }
    assert tokens == {336: (144,), 448: (144,), 560: (144,), 672: (144,), 1344: (720,)}
    found = processor("5", image, resolution="dynamic", max_tiles=16)
    assert found.image_tokens == (17 * 144,)  # 4 x 4 tiles of 336


def test_mm1_5_reads_four_megapixels():
    """Section 3.5: tiles of 672 of an encoder of 378, by interpolated positions; 4 to 9
    of them, and up to 16 when it answers: at most 1440 and 2448 tokens."""
    connector = ConnectorConfig(type="average_pool", num_query_tokens=144)
    config = small_config(
        vision_config=replace(VISION, image_size=378, patch_size=14),
        connector_config=connector,
        tiling_config=TilingConfig(type="dynamic"),
    )
    processor = Processor(
        number_tokenizer(90, 1, 2, 0), ImageSettings(size=672), config,
        chat_template="plain",
    )  # fmt: skip

    def tokens(side: int, max_tiles: int | None = None) -> int:
        ways = processor.ways(1, max_tiles=max_tiles)
        return processor.slots(ways, [ways[0].layout(side, side)])[0].tokens

    assert tokens(2016) == tokens(9000) == 10 * 144 == 1440
    assert tokens(600) == tokens(1344) == 5 * 144
    assert tokens(9000, 16) == 17 * 144 == 2448


def test_a_model_that_was_never_trained_for_tiles_is_warned_of(words):
    _, processor = parts(words, None)
    with pytest.warns(MM1Warning, match="trained for dynamic tiles: its answers may"):
        found = processor("?", picture(64, 16), resolution="dynamic")
    assert found.layouts == (Layout(1, 4, 64, 16),)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        processor("?", [WIDE] * 3, resolution="dynamic")  # too many: no tiles result
    assert ["trained" in str(one.message) for one in met] == [False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor("?", WIDE, resolution="native")
        processor("?", WIDE, resolution=32)


def test_tiles_of_a_model_without_words():
    """Its prompts are numbers, so there is no text between tiles."""
    config = small_config(DENSE, tiling_config=DYNAMIC)
    processor = Processor(
        number_tokenizer(90, 1, 2, 0), ImageSettings(size=16), config,
        chat_template="plain",
    )  # fmt: skip
    ids = processor("5 <image> 6", WIDE, resolution="dynamic").input_ids[0].tolist()
    assert ids == [5, *[3] * 4 * Q, 6]


# --- invariants ----------------------------------------------------------------------


def test_features_follow_their_tiles(dynamic):
    """Swapped tiles give swapped features, and each is what it is alone."""
    model, processor = dynamic
    pixels = processor("?", WIDE, resolution="dynamic").pixel_values
    order = [2, 0, 3, 1]
    found = encode_images(model, pixels)
    swapped = encode_images(model, pixels[mx.array(order)])
    assert_close(swapped, found[mx.array(order)], atol=1e-6)  # sums of other batches
    for n in range(4):
        assert_close(encode_images(model, pixels[n : n + 1])[0], found[n], atol=1e-6)


def test_swapped_tiles_change_the_answer(dynamic):
    """They are read where they lie: otherwise their order would not matter."""
    model, processor = dynamic
    inputs = processor("<image>?", WIDE, resolution="dynamic")
    features = encode_images(model, inputs.pixel_values)
    logits = [
        model.decoder(None, None, model.embed(inputs.input_ids, image_features=x))
        for x in (features, features[mx.array([1, 0, 2, 3])])
    ]
    assert mx.abs(logits[0] - logits[1]).max().item() > 1e-3


def test_one_call_of_the_model_is_what_generate_reads(dynamic):
    model, processor = dynamic
    asked = {"resolution": ["dynamic", 20, "native"]}
    images = [WIDE, SMALL, WIDE]
    inputs = processor("<image> a <image> b <image>?", images, **asked)
    assert isinstance(inputs.pixel_values, tuple) and len(inputs.pixel_values) == 3
    logits = model(inputs.input_ids, inputs.pixel_values, layouts=inputs.layouts)
    found = generate(
        model, processor, "<image> a <image> b <image>?", images,
        max_tokens=1, reuse=False, **asked,
    )  # fmt: skip
    assert found.token_ids == (mx.argmax(logits[0, -1]).item(),)
    seen = pictures_of(inputs, sum(inputs.image_tokens))
    assert [each.pixels.shape[:2] for each in seen] == [(4, 16), (1, 20), (1, 16)]
    assert [each.tokens for each in seen] == [4 * Q, Q, Q]


PROMPTS = ["<image>What?", "What <image> and <image>", "no picture", "<image> red"]
GIVEN = [[WIDE], [SMALL, WIDE], [], [picture(30, 40, 3)]]
ASKED = ["dynamic", ["native", "dynamic"], None, 24]


def test_rows_of_a_batch_are_each_alone(dynamic):
    model, processor = dynamic
    for asked in ("dynamic", ASKED):
        found = batch_generate(
            model, processor, PROMPTS, GIVEN, resolution=asked, **SHORT
        )
        each = asked if isinstance(asked, list) else [asked] * 4
        for prompt, images, one, row in zip(PROMPTS, GIVEN, each, found, strict=True):
            alone = plain(model, processor, prompt, images, resolution=one, **SHORT)
            assert row.token_ids == alone.token_ids
            assert row.image_tokens == alone.image_tokens


def test_a_batch_of_inputs_is_its_rows(dynamic):
    """As they are padded; in several sizes, too."""
    model, processor = dynamic
    batch = processor(PROMPTS, GIVEN, resolution=ASKED)
    logits = model(
        batch.input_ids, batch.pixel_values, layouts=batch.layouts,
        left_padding=batch.left_padding,
    )  # fmt: skip
    for n, (prompt, images, one) in enumerate(zip(PROMPTS, GIVEN, ASKED, strict=True)):
        row = processor(prompt, images, resolution=one)
        alone = model(row.input_ids, row.pixel_values, layouts=row.layouts)
        assert_close(logits[n, -1], alone[0, -1], atol=2e-5)  # order of sums


def test_cached_is_not_cached(dynamic, monkeypatch):
    model, processor = dynamic
    store, work = Reuse(), Work(monkeypatch)
    asked = {"resolution": "dynamic", **SHORT}
    for number, prompt in enumerate(["<image>What?", "<image>Where?", "<image>What?"]):
        found = generate(model, processor, prompt, [WIDE], reuse=store, **asked)
        encoded, _ = work.since()
        assert (encoded > 0) == (number == 0)
        assert (found.reused_tokens > 4 * Q) == (number > 0)
        expected = plain(model, processor, prompt, [WIDE], **asked)
        assert found.token_ids == expected.token_ids
        work.since()
    # The same picture in another resolution is another one.
    other = generate(
        model, processor, "<image>What?", [WIDE], reuse=store, resolution=24, **SHORT
    )
    assert work.since()[0] > 0
    expected = plain(model, processor, "<image>What?", [WIDE], resolution=24, **SHORT)
    assert other.token_ids == expected.token_ids


def test_a_file_is_known_in_each_resolution(dynamic, tmp_path):
    """What is kept of a file's pixels is told apart by how they were made."""
    _, processor = dynamic
    WIDE.save(tmp_path / "a.png")
    store = Reuse()
    for asked in ("native", "dynamic", 20, "native", "dynamic"):
        read = {"resolution": asked}
        found = processor("?", tmp_path / "a.png", known=store.pixels, **read)
        expected = processor("?", WIDE, **read)
        assert_equal(found.pixel_values, expected.pixel_values)
        assert found.layouts == expected.layouts


@pytest.mark.parametrize("resolution", ["dynamic", 32, ["native", "dynamic"]])
def test_progress_changes_no_number(dynamic, monkeypatch, resolution):
    """However often it is told; without need nothing is evaluated for it."""
    model, processor = dynamic
    images = [WIDE, SMALL] if isinstance(resolution, list) else [WIDE]
    inputs = processor("What?", images, resolution=resolution)
    found = pictures_of(inputs, 0)
    expected = image_tokens(model, found)
    tiles = sum(picture.pixels.shape[0] for picture in found)
    total, told = tiles * model.vision.used_layers, []

    def report(*numbers: int) -> None:
        told.append(numbers)

    usual = image_tokens(model, found, report=report)
    assert told == [(0, total), (total, total)]
    told.clear()
    monkeypatch.setattr(picture_progress, "REPORTED", 1)
    often = image_tokens(model, found, report=report)
    done, alls = zip(*told, strict=True)
    assert set(alls) == {total} and (done[0], done[-1]) == (0, total)
    assert len(done) > 2 and sorted(set(done)) == list(done)
    for one, two, three in zip(expected, usual, often, strict=True):
        assert_equal(one, two)
        assert_equal(one, three)


def test_one_small_picture_is_not_waited_for(dynamic, monkeypatch):
    model, processor = dynamic
    monkeypatch.setattr(picture_progress, "REPORTED", 1)
    told = []
    how = {"max_tokens": 1, "on_images": lambda *numbers: told.append(numbers)}
    generate(model, processor, "What?", WIDE, **how)
    assert not told
    generate(model, processor, "What?", [SMALL, picture(7, 7, 5)], **how)
    assert told[0] == (0, 2 * model.vision.used_layers)
    told.clear()
    generate(model, processor, "What now?", [SMALL, WIDE], **how)
    assert not told  # both are known


@pytest.mark.parametrize(
    "asked, tiles", [("dynamic", 3), (32, None), (["native", "dynamic"], 3)]
)
def test_a_draft_reads_pictures_as_was_asked(words, dynamic, asked, tiles):
    """It is the model itself: all its guesses are right if it sees the same, and the
    caller hears nothing of what the draft's config does not say."""
    model, processor = dynamic
    config = replace(model.config, tiling_config=None)
    look = processor.image_settings
    untold = Processor(words, look, config, chat_template="mm1-tiny")
    how = {"resolution": asked, "max_tiles": tiles, "max_tokens": 12}
    images = [WIDE, WIDE] if isinstance(asked, list) else [WIDE]
    with warnings.catch_warnings():
        warnings.simplefilter("error", MM1Warning)
        found = generate(
            model, processor, "What?", images, draft_model=(model, untold), **how
        )
    assert found.accepted_tokens == found.drafted_tokens > 4


def test_a_draft_that_cannot_read_them_so_says_it(words, dynamic):
    model, processor = dynamic
    room = processor("What?", WIDE).input_ids.shape[1] + 3
    draft = parts(words, context=room)
    how = {"resolution": "dynamic", "max_tokens": 4}
    plain = generate(model, processor, "What?", WIDE, **how)
    with pytest.warns(
        MM1Warning, match="draft model reads .* in its own resol.*tokens"
    ):
        found = generate(model, processor, "What?", WIDE, draft_model=draft, **how)
    assert found.token_ids == plain.token_ids and found.drafted_tokens > 0


def test_positions_are_those_of_a_square_grid_of_any_size():
    """Interpolated in the encoder and in the connector, or the shapes would not do."""
    for kind in ("c_abstractor", "attention_pool", "average_pool"):
        connector = ConnectorConfig(
            type=kind, num_query_tokens=Q, hidden_size=16, depth=1,
            num_attention_heads=2,
        )  # fmt: skip
        model = small_model(connector_config=connector)
        for side in (8, 12, 20, 64):
            found = model.encode_images(mx.zeros((1, side, side, 3)))
            assert found.shape == (1, Q, 32)
