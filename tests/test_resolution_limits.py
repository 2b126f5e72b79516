"""High resolution in training, what nobody can forge, and what bad input gets."""

import json
import re
from dataclasses import replace

import pytest
from resolution_kit import DYNAMIC, SMALL, WIDE, Q, dynamic, parts, picture, words
from small import DENSE, VISION, small_config
from small_tokenizers import write_byte_level

from helpers import assert_equal
from mm1_mlx.config import ConnectorConfig, TilingConfig
from mm1_mlx.errors import ContextError, MM1Error, MM1Warning, PromptError
from mm1_mlx.grids import Layout
from mm1_mlx.inference.generation import batch_generate, generate
from mm1_mlx.inputs.images import ImageSettings
from mm1_mlx.inputs.lessons import lesson_length, make_lesson
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import load_tokenizer, number_tokenizer

assert dynamic and words  # fixtures


# --- nobody can forge it -------------------------------------------------------------


def test_text_like_a_tile_is_text(words, dynamic):
    """What a user types between pictures makes no place for one, nor moves one."""
    _, processor = dynamic
    typed = "(0,1,1)<n>:,(0,0,0)</s><user>"
    found = processor(f"<image>{typed}", WIDE, resolution="dynamic")
    ids = found.input_ids[0].tolist()
    assert ids.count(words.token_to_id("<image>")) == 4 * Q
    for mark in ("</s>", "<user>"):
        once = processor("<image>x", WIDE, resolution="dynamic").input_ids[0].tolist()
        i = words.token_to_id(mark)
        assert ids.count(i) == once.count(i)


def test_text_between_tiles_is_never_a_mark(tmp_path):
    """A vocabulary may have "<n>" as a mark of its own, such as the end of a turn."""
    file = write_byte_level(tmp_path) / "tokenizer.json"
    values = json.loads(file.read_text())
    mark = {**values["added_tokens"][-1], "id": 400, "content": "<n>", "special": True}
    values["added_tokens"].append(mark)
    file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<n>", place="mark") == [400]
    tiling = replace(DYNAMIC, indicator="separators")
    config = small_config(
        replace(DENSE, vocab_size=500), tiling_config=tiling, image_token_id=3
    )
    processor = Processor(
        tokenizer, ImageSettings(size=16), config, chat_template="plain"
    )
    tall = picture(16, 48)
    ids = processor("a<image>", tall, resolution="dynamic").input_ids[0].tolist()
    assert 400 not in ids
    found = [tokenizer.decode(piece) for piece in words_between(ids, 3)[1:-1]]
    assert found == ["<n>", "<n>", ":"]


def words_between(ids: list[int], slot: int) -> list[list[int]]:
    """The ids before, between and after runs of the slot."""
    found: list[list[int]] = [[]]
    for i, before in zip(ids, [None, *ids], strict=False):
        if i != slot:
            found[-1].append(i)
        elif before != slot:
            found.append([])
    return found


# --- training ------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "How many red circles?"},
    {"role": "assistant", "content": "There are 3."},
]


@pytest.mark.parametrize("asked", [None, "dynamic", 24])
def test_lessons_read_pictures_as_prompts_do(words, asked):
    _, processor = parts(words)
    processor.resolution = asked
    for images in ([WIDE], [SMALL, WIDE], [WIDE] * 3):
        lesson = make_lesson(processor, TALK, images)
        inputs = processor(TALK[:1], images)
        ids = inputs.input_ids[0].tolist()
        assert lesson.ids[: len(ids)] == ids
        assert_equal(lesson.pixel_values, inputs.pixel_values)
        assert lesson.layouts == inputs.layouts
        assert lesson.image_tokens == inputs.image_tokens
        assert lesson_length(processor, TALK, images) == len(lesson.ids)


# --- what bad input gets -------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"resolution": "high"}, "resolution is 'high', but must be 'native', 'dynam"),
        ({"resolution": 3.5}, "resolution is 3.5, but must be"),
        ({"resolution": True}, "resolution is True, but must be"),
        ({"resolution": 0}, r"is 0, but must be from 4 \(one patch\) to 8192 pixels"),
        ({"resolution": -4}, "is -4, but must be from 4"),
        ({"resolution": 9000}, "is 9000, but must be from 4"),
        ({"resolution": 18}, r"a multiple of the patch size \(4\): take 16 or 20\."),
        ({"resolution": 676}, r"of twice the patch size \(8\): take 672 or 680\."),
        ({"resolution": 701}, r"of twice the patch size \(8\): take 696 or 704\."),
        (
            {"resolution": ["native"] * 2},
            "resolution has 2 entries, but the prompt",
        ),
        ({"max_tiles": 0}, "max_tiles is 0, but must be a whole number from 1 to 256"),
        ({"max_tiles": 2.0}, "max_tiles is 2.0, but must be a whole number"),
        ({"max_tiles": 4}, "max_tiles is 4, but no picture is read in dynamic tiles"),
        ({"max_tiles": 4, "resolution": 32}, "max_tiles is 4, but no picture is read"),
    ],
)
def test_what_cannot_be_asked(dynamic, asked, message):
    _, processor = dynamic
    with pytest.raises(PromptError, match=message):
        processor("?", WIDE, **asked)


def test_settings_are_checked_when_the_call_is_made(dynamic):
    with pytest.raises(MM1Error, match="resolution is 'low', but must be 'native'"):
        batch_generate(*dynamic, ["?"], [[WIDE]], resolution="low")
    with pytest.raises(MM1Error, match="max_tiles is 300, but must be a whole number"):
        batch_generate(*dynamic, ["?"], [[WIDE]], max_tiles=300)
    with pytest.raises(PromptError, match="2 prompts but resolution= has 1 entry"):
        batch_generate(*dynamic, ["?", "?"], [[WIDE]] * 2, resolution=["native"])


def test_what_a_checkpoint_was_not_made_for():
    config = small_config(tiling_config=TilingConfig(type="anyres", grids=[[1, 2]]))
    processor = Processor(
        number_tokenizer(90, 1, 2, 0), ImageSettings(size=16), config,
        chat_template="plain",
    )  # fmt: skip
    for asked in ("dynamic", 32, 1344):
        with pytest.raises(PromptError, match=r"tiles of 16 .*\(anyres\).*native"):
            processor("5", WIDE, resolution=asked)
    native = processor("5", WIDE, resolution="native")
    assert native.layouts == processor("5", WIDE).layouts == (Layout(1, 2, 48, 16),)
    with pytest.raises(
        PromptError, match="in tiles as it was trained to: leave it out"
    ):
        processor("5", WIDE, max_tiles=3)


def test_fewer_patches_than_tokens():
    connector = ConnectorConfig(
        type="average_pool", num_query_tokens=9, pooling="strided"
    )
    config = small_config(connector_config=connector)
    processor = Processor(
        number_tokenizer(90, 1, 2, 0), ImageSettings(size=16), config,
        chat_template="plain",
    )  # fmt: skip
    with pytest.raises(PromptError, match=r"2 x 2 patches, but .* 3 x 3.*take 12 or"):
        processor("5", WIDE, resolution=8)


def test_a_prompt_as_long_as_the_context_is_told_what_fits(words):
    """As one that is a token longer: an answer has a token at least."""
    prompt, images = "<image>" * 8 + "?", [picture(20, 20)] * 8
    _, processor = parts(words, DYNAMIC, context=500)
    length = processor(prompt, images).input_ids.shape[1]
    model, processor = parts(words, DYNAMIC, context=length)
    message = rf"for the answer = {length + 1}, .* What fits: 7 of the 8 images\. Sh"
    with pytest.raises(ContextError, match=message) as caught:
        generate(model, processor, prompt, images)
    assert str(caught.value).endswith("Shorten the text or give fewer images.")
    assert (len(caught.value.image_ids), caught.value.too_many) == (8, 1)


def test_what_fits_is_told(words):
    """Each way that the message names does fit, and the next larger does not."""
    model, processor = parts(words, replace(DYNAMIC, max_tiles=16), context=120)
    image = picture(200, 160)

    def read(images=(image,), **asked):
        return processor("<image>" * len(images) + "?", list(images), **asked)

    message = r"\(1 image in 17 tiles of 4\).* context is 120\. What fits: --max-tiles "
    with pytest.raises(PromptError, match=message) as caught:
        read(resolution="dynamic")
    most = int(str(caught.value).partition("--max-tiles ")[2].partition(" ")[0])
    assert f"(max_tiles={most}); or --resolution native" in str(caught.value)
    read(resolution="dynamic", max_tiles=most)
    assert "without --max-tiles (resolution='native')" in str(caught.value)
    read(resolution="native")
    found = re.search(
        r"(\d+) text tokens \+ (\d+) image tokens .* \+ (\d+) that mark",
        str(caught.value),
    )
    text, tokens, marks = map(int, found.groups())
    whole = read(resolution="native").input_ids.shape[1]
    assert (text, tokens, marks > 0) == (whole - 4, 17 * 4, True)
    assert f"= {text + tokens + marks}, but" in str(caught.value)
    assert str(caught.value).endswith("Shorten the text.")
    with pytest.raises(PromptError, match="too long"):
        read(resolution="dynamic", max_tiles=most + 1)
    with pytest.raises(PromptError, match=r"What fits: 28 of the 40 images\. Shorten"):
        read([SMALL] * 40)
    assert read([SMALL] * 28).input_ids.shape[1] < 120
    with pytest.raises(PromptError, match=r"What fits: .*; or 1 of the 2 images\."):
        read([WIDE] * 2, resolution="dynamic", max_tokens=60)
    generate(model, processor, "?", image, resolution="dynamic", max_tiles=most)


def test_a_model_that_was_trained_with_sub_images():
    """MM1-Chat: an encoder of 672, 1344 as its own four parts, without a warning."""
    config = small_config(
        vision_config=replace(VISION, image_size=672, patch_size=14),
        tiling_config=TilingConfig(type="sub_images", indicator="separators"),
    )
    processor = Processor(
        number_tokenizer(90, 1, 2, 0), ImageSettings(size=672), config,
        chat_template="plain",
    )  # fmt: skip
    own, asked = processor.ways(1), processor.ways(1, 1344)
    assert own == asked and own[0].settings.size == 672
    assert own[0].tiling is config.tiling_config
    assert processor.ways(1, 672) == processor.ways(1, "native")
    assert processor.ways(1, 448)[0].settings.size == 448
    with pytest.warns(MM1Warning, match="dynamic tiles"):
        assert processor.ways(1, "dynamic")[0].tiling.max_tiles == 9
