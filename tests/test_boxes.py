"""Boxes and points: read out of texts, written into prompts, to pixels and back."""

import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small import small_config

from examples.mm1_tiny.boxes import box_text
from examples.mm1_tiny.scenes import TRAINING_PAIRS, arrange
from mm1_mlx.config import MM1Config
from mm1_mlx.config_boxes import STYLES, BoxFormat
from mm1_mlx.convert.sources import llava, llava_next
from mm1_mlx.errors import ConfigError, ImageError, MM1Warning, PromptError
from mm1_mlx.inputs import images
from mm1_mlx.inputs.boxes import (
    Region,
    boxes_of,
    from_pixels,
    parse,
    to_pixels,
    with_boxes,
)
from mm1_mlx.inputs.drawing import draw_boxes
from mm1_mlx.inputs.images import fit
from mm1_mlx.inputs.settings import ImageSettings

TINY = BoxFormat(style="mm1", scale=100, frame="padded")
MM1, FERRET, LLAVA, QWEN = (BoxFormat(style=style) for style in STYLES)


def processor(box_config=None, resize_mode="pad"):
    settings = ImageSettings(size=32, resize_mode=resize_mode)
    config = SimpleNamespace(box_config=box_config)
    return SimpleNamespace(config=config, image_settings=settings)


# --- the format ---


def test_a_style_has_its_usual_scale_and_frame():
    assert (LLAVA.scale, LLAVA.frame) == (100, "padded")
    assert (FERRET.scale, FERRET.frame) == (1000, "image")
    assert BoxFormat.from_dict(TINY.to_dict()) == TINY


@pytest.mark.parametrize(
    "values, pattern",
    [
        (
            {"style": "kosmos"},
            r"box_config\.style is 'kosmos', but must be one of 'mm1",
        ),
        ({"style": "mm1", "scale": 1}, r"scale is 1, but must be .* at least 2"),
        ({"style": "mm1", "frame": "tile"}, r"frame is 'tile', .* 'image', 'padded'"),
        ({"style": "mm1", "size": 3}, r"box_config: unknown keys \['size'\]"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(values, pattern):
    with pytest.raises(ConfigError, match=pattern):
        BoxFormat.from_dict(values)


def test_a_model_folder_says_how_it_writes_boxes_or_not():
    config = small_config()
    assert config.box_config is None
    values = config.to_dict()
    del values["box_config"]  # as older folders are
    assert MM1Config.from_dict(values) == config
    config = small_config(box_config={"style": "mm1", "scale": 100, "frame": "padded"})
    assert config.box_config == TINY
    assert MM1Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("aspect, form", [("pad", LLAVA), (None, None)])
def test_llava_writes_parts_of_the_padded_square(aspect, form):
    """Known of LLaVA 1.5, which pads; the first version knew no boxes."""
    hub = {
        "model_type": "llava_llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 90,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": aspect,
    }
    assert llava.config(hub).box_config == form
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert llava.config({"text_config": text}).box_config == LLAVA
    assert llava_next.config({"text_config": text}).box_config is None


def test_it_reads_what_mm1_tiny_is_taught():
    """Its data writes the boxes of drawn things; here they are pixels again."""
    rng = random.Random(0)
    for _ in range(50):
        scene = arrange(rng.sample(TRAINING_PAIRS, 2), rng)
        side = 1000
        size = round(scene.width * side), round(scene.height * side)
        for thing in scene.things:
            (region,) = parse(box_text(scene, thing), TINY)
            expected = np.clip(np.array(thing.box()) * side, 0, [*size, *size])
            # Half of a hundredth, and what rounding the size moves it.
            assert np.allclose(region.to_pixels(*size), expected, atol=6)


# --- reading: what is found, by hand ---

# Of a thousand parts each is read as its middle: "100" is 0.1005 of the side.
FOUR = (0.1005, 0.2005, 0.3005, 0.4005)
TWO = (0.5005, 0.2505)
TENTHS = (0.1, 0.2, 0.3, 0.4)
READ = [
    (MM1, "<100,200,300,400>", FOUR),
    (MM1, "< 100 , 200 , 300 , 400 >", FOUR),
    (MM1, "<100 200 300 400>", FOUR),
    (MM1, "<300,400,100,200>", FOUR),  # corners in order
    (MM1, "<0,0,999,1040>", (0.0005, 0.0005, 0.9995, 1.0)),  # a bit outside: clipped
    (MM1, "<-20,0,500,500>", (0.0, 0.0005, 0.5005, 0.5005)),
    (MM1, "<100,200,100,200>", (0.1005, 0.2005) * 2),  # no area: as it is written
    (MM1, "<500,250>", TWO),
    (MM1, "[0.1, 0.2, 0.3, 0.4]", TENTHS),  # another style's writing
    (TINY, "<10,20,30,99>", (0.105, 0.205, 0.305, 0.995)),
    (FERRET, "[100, 200, 300, 400]", FOUR),
    (FERRET, "[500, 250]", TWO),
    (LLAVA, "[0.12, 0.30, 0.45, 0.60]", (0.12, 0.3, 0.45, 0.6)),
    (LLAVA, "[.5, 0, 1, 1.0]", (0.5, 0.0, 1.0, 1.0)),
    (QWEN, "<box>(100,200),(300,400)</box>", FOUR),
    (QWEN, "<|box_start|>(100,200),(300,400)<|box_end|>", FOUR),
    (QWEN, "<box>[[100, 200, 300, 400]]</box>", FOUR),
    (QWEN, "<point>(500,250)</point>", TWO),
    (None, "<100,200,300,400>", FOUR),
    (None, "[100, 200, 300, 400]", FOUR),
    (None, "[0.1, 0.2, 0.3, 0.4]", TENTHS),
    (None, "(100,200),(300,400)", FOUR),
    (None, "<500,250>", TWO),
]


@pytest.mark.parametrize("form, text, place", READ)
def test_a_region_is_read(form, text, place):
    (region,) = parse(f"It is {text} here", form)
    assert region.place == pytest.approx(place, abs=1e-12)
    assert region.span == (6, 6 + len(text))
    assert region.guessed == (form is None)
    assert region.kind == ("box" if len(place) == 4 else "point")


NOTHING = [
    (None, "The numbers (3, 4) and [1, 2] are no points."),
    (None, "(1, 2, 3)"),
    (MM1, "[1, 2] and (3, 4)"),  # points in brackets of others
    (MM1, "<9000,1,2,3>"),
    (MM1, "<1,2,3,4]"),
    (MM1, "<a,b,c,d> <1,2,3> <1,2,3,4,5> <> <,> <1,,2>"),
    (MM1, "<1),(2,3),(4>"),
    (MM1, "Is 3 < 4, 5 > 2?"),  # a comparison
    (None, "2 < 3, 4 > 1"),
    (LLAVA, "[12, 30, 45, 60]"),  # no parts of a side
    (FERRET, "[-500, 1, 2, 3]"),
    (MM1, "<" * 3000 + "1," * 3000),
    (MM1, "<1" + " " * 9000 + ",2>"),
    (MM1, "<99999999999999999999,1,2,3>"),
    (MM1, ""),
]


@pytest.mark.parametrize("form, text", NOTHING)
def test_what_only_looks_like_a_region_is_none(form, text):
    assert parse(text, form) == []


def test_odd_texts_never_raise():
    rng = random.Random(0)
    letters = "<>[](){},.;:-+ 0123456789\n\"'boxpitn|/ref\u00e9\ufdd0\0image 1"
    for _ in range(3000):
        text = "".join(rng.choices(letters, k=rng.randrange(60)))
        form = rng.choice([None, MM1, TINY, FERRET, LLAVA, QWEN])
        for region in parse(text, form, pictures=rng.randrange(4)):
            assert all(0 <= part <= 1 for part in region.place)
            start, end = region.span
            assert 0 <= start < end <= len(text)


LABELS = [
    ("There is a red circle at <1,2,3,4>.", ["a red circle"]),
    ("A cat <1,2,3,4> and a dog <5,6,7,8>.", ["A cat", "a dog"]),
    ("The dog [0.1,0.2,0.3,0.4] is left of the cat [0.5,0.5,0.9,0.8]", None),
    ("1. star: <1,2,3,4>\n2. circle: <5,6>", ["star", "circle"]),
    ("two dogs <1,2,3,4><5,6,7,8>, <9,9,10,10>", ["two dogs"] * 3),
    ("<ref>the woman</ref><box>(1,2),(3,4)</box>", ["the woman"]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a tree"}]', ["a tree"]),
    ('[{"label": "a tree", "bbox_2d": [1, 2, 3, 4]}]', ["a tree"]),
    ("<1,2,3,4>", [""]),
    ("Yes. It is <1,2,3,4>", [""]),
    ("字 <1,2,3,4>", ["字"]),
]


@pytest.mark.parametrize("text, labels", LABELS)
def test_the_label_is_the_phrase_before(text, labels):
    labels = labels or ["The dog", "the cat"]
    assert [region.label for region in parse(text)] == labels


def test_a_region_is_of_the_picture_named_before_it_else_of_the_last():
    text = "a dog <1,2>, in image 1 a cat <3,4>, in the second picture one <5,6>"
    assert [r.picture for r in parse(text, MM1, pictures=3)] == [2, 0, 1]
    assert [r.label for r in parse(text, MM1, pictures=3)][1] == "a cat"
    assert [r.picture for r in parse("in image 7 a dog <1,2>", MM1, pictures=2)] == [1]
    assert [r.picture for r in parse(text, MM1)] == [0, 0, 0]


# --- frames: parts of a side to pixels ---

FRAMES = [  # a box of a half and a quarter, in pictures that are wide, high, square
    ("image", (200, 100), (100, 25, 200, 100)),
    ("padded", (200, 100), (100, 0, 200, 100)),
    ("padded", (100, 200), (50, 50, 100, 200)),
    ("padded", (101, 200), (51, 50, 101, 200)),  # the border in front: 49 of 99
    ("cropped", (200, 100), (100, 25, 150, 100)),
    ("cropped", (100, 201), (50, 75.5, 100, 150.5)),
]


@pytest.mark.parametrize("frame, size, pixels", FRAMES)
def test_parts_of_a_frame_are_pixels_of_the_picture(frame, size, pixels):
    assert to_pixels((0.5, 0.25, 1.0, 1.0), *size, frame) == pixels


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (63, 32), (32, 95), (40, 40)])
def test_the_frame_is_where_the_pixels_of_the_model_are(mode, size):
    """A white block, found again in the square that the model is shown."""
    width, height = size
    block = (width // 2 - 8, height // 2 - 8, width // 2 + 6, height // 2 + 4)
    image = Image.new("RGB", size, "black")
    image.paste("white", block)
    side = 320  # fine enough to see where the edges are
    settings = ImageSettings(size=side, resize_mode=mode, pad_color=(0, 0, 0))
    rows, columns = np.nonzero(np.asarray(fit(image, settings))[..., 0] > 127)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    form = BoxFormat(style="llava", scale=1000)
    (region,) = parse(from_pixels(block, *size, form, resize_mode=mode), form)
    assert np.allclose(np.array(region.place) * side, seen, atol=1.5)


@pytest.mark.parametrize("form", [MM1, TINY, FERRET, LLAVA, QWEN], ids=str)
def test_pixels_to_text_and_back_is_exact_to_the_rounding(form):
    rng = random.Random(1)
    for _ in range(400):
        width, height = rng.randint(1, 5000), rng.randint(1, 5000)
        mode = rng.choice(["pad", "squash"])
        xs = sorted(rng.uniform(0, width) for _ in range(2))
        ys = sorted(rng.uniform(0, height) for _ in range(2))
        pixels = [xs[0], ys[0], xs[1], ys[1]]
        if rng.random() < 0.3:
            pixels = pixels[:2]
        text = from_pixels(pixels, width, height, form, resize_mode=mode)
        (region,) = parse(text, form, resize_mode=mode)
        assert region.span == (0, len(text))
        padded = region.frame == "padded"
        sides = [max(width, height)] * 2 if padded else [width, height]
        back = region.to_pixels(width, height)
        for i, (value, found) in enumerate(zip(pixels, back, strict=True)):
            unit = sides[i % 2] / form.scale
            assert abs(value - found) <= 0.5 * unit + 1e-6


WRITTEN = [
    (MM1, "<100,200,300,999>"),
    (TINY, "<10,20,30,99>"),
    (FERRET, "[100, 200, 300, 999]"),
    (LLAVA, "[0.10, 0.20, 0.30, 1.00]"),
    (QWEN, "<box>(100,200),(300,999)</box>"),
]


@pytest.mark.parametrize("form, text", WRITTEN, ids=[text for _, text in WRITTEN])
def test_a_box_is_written_as_the_model_writes_it(form, text):
    assert from_pixels((10, 20, 30, 100), 100, 100, form) == text
    assert from_pixels((30, 130, 10, 20), 100, 100, form) == text  # ordered, clipped


def test_whole_numbers_are_rounded_down_and_decimals_to_the_nearest():
    assert from_pixels((9, 19.9), 1000, 1000, TINY) == "<0,1>"
    assert from_pixels((4, 5), 1000, 1000, LLAVA) == "[0.00, 0.01]"


WRONG = [
    ((10, 20, 10, 60), r"The box 10,20,10,60 has no area\. Give two corners"),
    ((500, 0, 600, 50), r"The box 500,0,600,50 lies outside of the picture of 200x100"),
    ((-9, -9, 0, 0), r"lies outside of the picture"),
    ((201, 5), r"The point 201,5 lies outside of the picture of 200x100"),
    ((1, 2, 3), r"A box is \(1, 2, 3\), but a box must be four numbers, x1,y1,x2,y2"),
    ((1, 2, 3, float("nan")), r"A box is \(1, 2, 3, nan\), .* a point two, x,y"),
    ((1, 2, 3, float("inf")), r"A box is \(1, 2, 3, inf\)"),
    ((1, 2, 3, 10**400), r"A box is \(1, 2, 3, 1000"),
    (("1", "2", "3", "4"), r"A box is \('1', '2', '3', '4'\)"),
    ("1,2,3,4", r"A box is 1,2,3,4, but"),
    ((1, 2, 3, None), r"A box is \(1, 2, 3, None\)"),
    (7, r"A box is 7, but"),
    (((1, 2), (3, 4)), r"A box is \(\(1, 2\), \(3, 4\)\)"),
]


@pytest.mark.parametrize("pixels, pattern", WRONG)
def test_a_box_that_is_none_is_refused(pixels, pattern):
    with pytest.raises(PromptError, match=pattern):
        from_pixels(pixels, 200, 100, TINY)


def test_a_box_in_what_is_cut_off_is_refused():
    with pytest.raises(PromptError, match=r"The box 0,0,40,40 cannot be told"):
        from_pixels((0, 0, 40, 40), 200, 100, LLAVA, resize_mode="crop")
    message = r"point 10,50 cannot be .* 200x100 it counts boxes from 50,0 to 150,100\."
    with pytest.raises(PromptError, match=message):
        from_pixels((10, 50), 200, 100, LLAVA, resize_mode="crop")
    shown = from_pixels((50, 50), 200, 100, LLAVA, resize_mode="crop")
    assert shown == "[0.00, 0.50]"


def test_a_box_that_the_frame_cuts_is_warned_of():
    reader = processor(LLAVA, "crop")
    image = Image.new("RGB", (200, 100))
    with pytest.warns(MM1Warning, match="40,0,100,50 is cut to 50,0,100,50: .* part"):
        filled = with_boxes("<box>", reader, [image], [(40, 0, 100, 50)])
    assert filled == "[0.00, 0.00, 0.50, 0.50]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_boxes("<box>", reader, [image], [(60, 0, 100, 50)])


# --- answers and prompts, with a processor ---


def test_boxes_of_reads_in_the_format_of_the_model():
    (region,) = boxes_of("a star <50,50,99,99>", processor(TINY))
    assert (region.label, region.frame, region.guessed) == ("a star", "padded", False)
    assert region.to_pixels(200, 100) == pytest.approx((101, 51, 199, 100))
    (region,) = boxes_of("a star <50,50,99,99>", processor(TINY, "squash"))
    assert region.to_pixels(200, 100) == pytest.approx((101, 50.5, 199, 99.5))
    (region,) = boxes_of("a star [0.5, 0.5, 1, 1]", processor(None, "crop"))
    assert region.guessed and region.frame == "cropped"
    (region,) = boxes_of("[500, 500, 600, 600]", processor(), form=FERRET, pictures=3)
    assert not region.guessed and region.picture == 2


def test_the_pictures_of_an_answer_are_those_of_its_own_prompt():
    """What is given counts, then those of the answer without those of examples."""

    class Answer:
        num_images, shot_images = 5, 3

        def __str__(self):
            return "in image 1 a dog <1,2>, in image 4 a cat <3,4>"

    answer = Answer()
    found = [r.picture for r in boxes_of(answer, processor(MM1))]
    assert found == [0, 0]  # of two; there is no fourth
    assert [r.picture for r in boxes_of(answer, processor(MM1), pictures=4)] == [0, 3]
    assert [r.picture for r in boxes_of(answer, processor(MM1), pictures=1)] == [0, 0]
    plain = "a dog <1,2>"
    assert [r.picture for r in boxes_of(plain, processor(MM1), pictures=3)] == [2]


def test_boxes_may_be_rows_of_an_array():
    image, rows = Image.new("RGB", (50, 50)), np.array([[0, 0, 25, 25]])
    assert with_boxes("<box>", processor(MM1), [image], rows) == "<0,0,500,500>"


def test_slots_of_a_prompt_are_filled_in_their_order_and_pictures():
    wide, high = Image.new("RGB", (200, 100)), Image.new("RGB", (100, 200))
    prompt = "What is <box> of <image> and <box> or <point> of <image>, <box>?"
    boxes = [(0, 0, 100, 100), (0, 0, 100, 100), (0, 0, 100, 100)]
    filled = with_boxes(prompt, processor(TINY), [wide, high], boxes, points=[(50, 50)])
    # The first box has no picture before it: it is of the first one.
    assert filled == (
        "What is <0,25,50,75> of <image> and <0,25,50,75> or <25,50> of <image>, "
        "<25,0,75,50>?"
    )


def test_without_slots_for_pictures_a_box_is_of_the_last_one():
    pictures = [Image.new("RGB", (50, 50)), Image.new("RGB", (200, 100))]
    filled = with_boxes("Is <box> red?", processor(MM1), pictures, [(0, 0, 100, 100)])
    assert filled == "Is <0,0,500,999> red?"


def test_a_prompt_that_speaks_of_box_is_left_alone():
    assert with_boxes("What does <box> mean?", processor(), []) == (
        "What does <box> mean?"
    )


@pytest.mark.parametrize(
    "prompt, boxes, points, form, images, pattern",
    [
        ("Hi", [(0, 0, 9, 9)], [], MM1, 1, r"^1 box came .* it has 0 <box>\. Write"),
        ("<box>", [(0, 0, 9, 9)] * 2, [], MM1, 1, r"^2 boxes came .* it has 1 <box>"),
        ("<point>", [], [(1, 1)] * 2, MM1, 1, r"^2 points came .* it has 1 <point>"),
        ("<box>", [(0, 0, 9, 9)], [], None, 1, r"does not say how .* \(--box-format"),
        ("<box>", [(0, 0, 9, 9)], [], MM1, 0, r"but no picture was given"),
        ("<box>", [(1, 2)], [], MM1, 1, r"A box is \(1, 2\), but a box must be four"),
        ("<point>", [], [(1, 2, 3, 4)], MM1, 1, r"A point is \(1, 2, 3, 4\), but"),
        ("<box>", (0, 0, 9, 9), [], MM1, 1, r"A box is 0, but"),
        ("<box>", ["0,0,9,9"], [], MM1, 1, r"A box is 0,0,9,9, but"),
        ("<point>", [], [(1, float("nan"))], MM1, 1, r"A point is \(1, nan\), but"),
        ("<box>", [(60, 0, 90, 9)], [], MM1, 1, r"The box 60,0,90,9 lies outside"),
    ],
)
def test_a_prompt_that_does_not_fit_its_boxes(
    prompt, boxes, points, form, images, pattern
):
    pictures = [Image.new("RGB", (50, 50))] * images
    with pytest.raises(PromptError, match=pattern):
        with_boxes(prompt, processor(form), pictures, boxes, points)


def test_a_model_that_reads_text_only_has_no_boxes():
    reader = SimpleNamespace(config=processor(MM1).config, image_settings=None)
    image = Image.new("RGB", (50, 50))
    with pytest.raises(PromptError, match="This model reads text only"):
        with_boxes("<box>", reader, [image], [(0, 0, 9, 9)])
    assert boxes_of("<1,2>", reader)[0].place == (0.0015, 0.0025)


def test_a_picture_over_the_usual_limit_if_that_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    ask = ("<box>", processor(MM1), [tmp_path / "a.png"], [(0, 0, 25, 25)])
    with pytest.raises(ImageError, match="50x50, 2,500 pixels, but at most 1,000"):
        with_boxes(*ask)
    assert with_boxes(*ask, max_pixels=2500) == "<0,0,500,500>"


# --- drawing ---


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not the same."""
    rows, columns, _ = np.nonzero(np.asarray(before) != np.asarray(after))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("size", [(40, 30), (400, 300), (2000, 1000), (3000, 90)])
def test_the_drawn_box_lies_where_the_box_is(size):
    image = Image.new("RGB", size, (90, 90, 90))
    region = Region(place=(0.25, 0.4, 0.75, 0.8))
    drawn = draw_boxes(image, [region])
    assert drawn.size == size and image.getpixel((size[0] // 4, 20)) == (90, 90, 90)
    edge = max(1, max(1, round(min(size) / 200)) // 2)
    left, top, right, bottom = region.to_pixels(*size)
    grown = (left - edge, top - edge, right + edge, bottom + edge)
    assert np.allclose(changed(image, drawn), grown, atol=1)
    middle = size[0] // 2, round(size[1] * 0.6)
    assert drawn.getpixel(middle) == (90, 90, 90)  # what is in it stays in sight


def test_labels_stay_inside_whatever_the_size_and_the_words():
    for size in [(1, 1), (8, 8), (96, 96), (640, 50), (50, 640)]:
        image = Image.new("RGB", size, "white")
        regions = [
            Region(place=place, label=label)
            for place in [(0, 0, 1, 1), (0.99, 0.99, 1, 1), (1.0, 1.0), (0.5, 0.0)]
            for label in ["", "a very long label " * 9, "字\ufdd0\U0001f600", "\n"]
        ]
        assert draw_boxes(image, regions).size == size


def test_only_the_regions_of_a_picture_are_drawn_on_it():
    image = Image.new("RGB", (60, 60), "white")
    regions = [Region(place=(0.1, 0.1, 0.5, 0.5), picture=1)]
    assert draw_boxes(image, regions, picture=0).tobytes() == image.tobytes()
    assert draw_boxes(image, regions, picture=1).tobytes() != image.tobytes()


def test_same_labels_have_the_same_colour_and_others_another():
    image = Image.new("RGB", (100, 100), "white")
    places = [(0.1, 0.5, 0.2, 0.6), (0.4, 0.5, 0.5, 0.6), (0.7, 0.5, 0.8, 0.6)]
    regions = [Region(place=p, label=n) for p, n in zip(places, "aba", strict=True)]
    drawn = draw_boxes(image, regions)
    first, second, third = (drawn.getpixel((x, 59)) for x in (10, 40, 70))
    assert first == third != second


def test_a_turned_photo_is_drawn_upright(tmp_path):
    photo = Image.new("RGB", (40, 20), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    drawn = draw_boxes(tmp_path / "a.jpg", [Region(place=(0, 0, 1, 0.1))])
    assert drawn.size == (20, 40)
    assert changed(Image.new("RGB", (20, 40), "white"), drawn)[3] < 20
