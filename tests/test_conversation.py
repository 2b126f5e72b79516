"""A conversation in Python: what is remembered, computed again, saved and restored."""

import json
import shutil

import pytest
from PIL import Image
from small import small_model

from helpers import ROOT, need_tiny
from mm1_mlx import generate, load
from mm1_mlx.cli.chat_files import as_markdown
from mm1_mlx.errors import ContextError, ImageError, MM1Error, PromptError
from mm1_mlx.inference.conversation import Conversation
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.video import video_frames

SHAPES = ROOT / "examples" / "shapes.png"


@pytest.fixture(scope="module")
def tiny():
    return load(need_tiny())


@pytest.fixture
def talk(tiny):
    tiny[0].reuse = None  # nothing of an earlier test
    return Conversation(*tiny, max_tokens=40)


def test_a_second_turn_reads_only_what_is_new(tiny, talk):
    """Every token of the first turn is used again, the answer's but for the last, and
    the answers are those of reading all anew."""
    talk.show(SHAPES)
    first = talk.answer("What colour is the star?")
    second = talk.answer("What shape is the blue thing?")
    assert (first.reused_tokens, first.text) == (0, "yellow")
    assert second.reused_tokens >= first.prompt_tokens + first.generation_tokens - 1
    assert second.num_images == 1 and second.image_seconds == 0
    fresh = Conversation(*tiny, max_tokens=40, reuse=False)
    fresh.show(SHAPES)
    answers = [fresh.answer(each.asked) for each in talk.exchanges]
    assert [a.text for a in answers] == [first.text, second.text]
    assert [a.token_ids for a in answers] == [first.token_ids, second.token_ids]
    assert all(a.reused_tokens == 0 for a in answers)


def test_its_messages_are_what_generate_takes(tiny, talk, tmp_path):
    talk.show(SHAPES)
    talk.answer("What colour is the star?")
    messages = talk.messages()
    assert messages == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(SHAPES)},
                {"type": "text", "text": "What colour is the star?"},
            ],
        },
        {"role": "assistant", "content": "yellow"},
    ]
    question = {"role": "user", "content": "What colour is the circle?"}
    same = generate(*tiny, [*messages, question], max_tokens=40)
    assert same.text == talk.answer(question["content"]).text


def test_a_restored_conversation_goes_on_alike(tiny, talk):
    talk.show(SHAPES)
    talk.answer("<image> What colour is the star?")
    talk.answer("And the circle?")
    saved = json.loads(json.dumps(talk.messages()))
    other = Conversation(*tiny, max_tokens=40)
    other.show(SHAPES)  # forgotten: what was there is replaced
    other.restore(saved)
    assert other.messages() == talk.messages() and not other.waiting
    question = "What shape is the blue thing?"
    assert other.answer(question).token_ids == talk.answer(question).token_ids


def test_pictures_are_those_that_were_shown_even_if_their_files_change(talk, tmp_path):
    place = tmp_path / "a.png"
    place.write_bytes(SHAPES.read_bytes())
    talk.show(place)
    place.unlink()
    assert talk.answer("What colour is the star?").text == "yellow"
    assert talk.answer("What colour is the circle?").text == "red"


def test_several_pictures_and_places_in_the_text(talk):
    talk.show(SHAPES)
    talk.show(Image.new("RGB", (50, 50), "white"))
    assert talk.answer("<image> <image> What colour is the star?").num_images == 2
    assert talk.exchanges[0].content.count("<image>") == 2
    talk.show(SHAPES)
    with pytest.raises(PromptError, match="has 2 <image> but only 1 image was given"):
        talk.answer("<image> or <image>?")
    assert len(talk.exchanges) == 1 and len(talk.waiting) == 1
    assert talk.answer("What colour is the star?").num_images == 3
    with pytest.raises(MM1Error, match="came as pixels, and has no file to name"):
        talk.messages()


def test_videos_are_kept_by_name(tiny, talk, tmp_path):
    """Their frames are one part, also of several videos one behind the other."""
    frames = [tmp_path / "f" / f"{i}.png" for i in range(3)]
    frames[0].parent.mkdir()
    for file in frames:
        shutil.copy(SHAPES, file)
    film = {"type": "video", "video": str(frames[0].parent), "frames": 2}
    listed = film | {"video": [str(file) for file in frames]}
    image = {"type": "image", "image": str(SHAPES)}
    content = [film, film, image, listed, {"type": "text", "text": "What?"}]
    messages = [said("user", content), said("assistant", "x")]
    talk.restore(messages)
    assert len(talk.exchanges[0].pictures) == 7
    assert talk.messages() == messages
    saved = as_markdown(messages, "m")
    assert f"![]({frames[0].parent})" in saved and f"![]({frames[2]})" in saved
    flat = [said("user", "<image> or <image>?"), said("assistant", "x")]
    for source, text in (
        (frames[0].parent, flat[0]["content"]),  # words between its frames
        ([Image.open(file) for file in frames[:2]], "<image><image>?"),
    ):
        talk.restore([said("user", text), flat[1]], video_frames(source, 2))
        with pytest.raises(MM1Error, match="came as pixels, and has no file to name"):
            talk.messages()


def test_undo_and_drop(talk):
    talk.show(SHAPES)
    talk.answer("What colour is the star?")
    talk.answer("What colour is the circle?")
    assert talk.undo().asked == "What colour is the circle?"
    assert not talk.waiting
    assert talk.undo().answer == "yellow"
    assert [p.name for p in talk.waiting] == [str(SHAPES)]
    assert talk.undo() is None
    again = talk.answer("What colour is the star?")
    assert (again.text, again.num_images) == ("yellow", 1)
    talk.answer("What colour is the circle?")
    assert talk.drop_oldest().answer == "yellow"
    assert talk.answer("Hi").num_images == 0  # its picture went with it
    talk.clear()
    assert talk.messages() == [] and talk.drop_oldest() is None


def test_an_answer_keeps_the_pictures_that_it_was_given_for(tiny, talk, tmp_path):
    """Those of its own turn and of the turns before it, whatever is forgotten since."""
    other = tmp_path / "other.png"
    Image.open(SHAPES).save(other)
    for place in (SHAPES, other):
        talk.show(place)
        talk.answer("What colour is the star?")
    saved = talk.messages()
    restored = Conversation(*tiny)
    restored.restore(saved)
    for each in (talk, restored):
        names = [[p.name for p in exchange.seen] for exchange in each.exchanges]
        assert names == [[str(SHAPES)], [str(SHAPES), str(other)]]
        each.drop_oldest()
        assert [p.name for p in each.exchanges[0].seen] == [str(SHAPES), str(other)]
        assert [p.name for p in each.exchanges[0].pictures] == [str(other)]
    talk.answer("What colour is the circle?")
    assert [p.name for p in talk.exchanges[1].seen] == [str(other)]


def test_an_answer_that_is_left_is_remembered_as_far_as_it_came(talk):
    talk.show(SHAPES)
    pieces = talk.ask("Describe the picture.")
    text = "".join(next(pieces).text for _ in range(8))
    pieces.close()
    assert talk.exchanges[0].answer == text.strip() and text.strip()
    second = talk.answer("What colour is the star?")
    assert second.reused_tokens >= talk.exchanges[0].last.prompt_tokens


def test_a_turn_that_fails_leaves_everything_as_it_was(talk):
    talk.show(SHAPES)
    with pytest.raises(PromptError, match="The prompt is empty"):
        talk.answer("  ")
    with pytest.raises(ContextError, match=r"\d+ tokens|too long"):
        talk.answer("red circle " * 5000)
    with pytest.raises(ImageError, match=r"No image file"):
        talk.show("absent.png")
    assert not talk.exchanges and len(talk.waiting) == 1
    assert talk.answer("What colour is the star?").text == "yellow"


def test_a_system_prompt_stands_first(tiny):
    model, processor = tiny
    plain = Processor(
        processor.tokenizer,
        processor.image_settings,
        processor.config,
        chat_template="chatml",
    )
    talk = Conversation(model, plain, system="Be brief.", max_tokens=2)
    talk.answer("Hi")
    assert talk.messages()[0] == {"role": "system", "content": "Be brief."}
    other = Conversation(model, plain)
    other.restore(talk.messages())
    assert other.system == "Be brief."
    other.system = None
    assert other.messages()[0]["role"] == "user"
    with pytest.raises(PromptError, match=r"'mm1-tiny' has no place for a system"):
        Conversation(model, processor, system="Be brief.")


def test_what_a_model_says_of_image_is_no_picture(talk):
    talk.restore([said("user", "Hi"), said("assistant", "an <image> of it")])
    assert talk.answer("What?").num_images == 0


def said(role: str, content: object) -> dict:
    return {"role": role, "content": content}


BAD = [
    ([], r"no messages"),
    ([said("user", "Hi")], r"ends with a question, not an answer"),
    ([said("user", "Hi"), said("user", "Ho")], r"Message 2 .* 'user', but 'assistant'"),
    (
        [said("user", "<image>"), said("assistant", "x")],
        r"have 1 <image>, but 0",
    ),
    ([said("user", 3)], r"content '3'"),
    (["x"], r"A message is 'x'"),
    (
        [
            said("user", [{"type": "image", "image": "absent.png"}]),
            said("assistant", "x"),
        ],
        r"No image file absent\.png",
    ),
]


@pytest.mark.parametrize("messages, pattern", BAD, ids=[p for _, p in BAD])
def test_messages_that_are_no_conversation_change_nothing(talk, messages, pattern):
    talk.restore([said("user", "Hi"), said("assistant", "Ho")])
    with pytest.raises(MM1Error, match=pattern):
        talk.restore(messages)
    assert talk.messages()[1] == said("assistant", "Ho")


def test_settings_and_models_that_do_not_fit(tiny, model, processor):
    with pytest.raises(MM1Error, match=r"max_tokens is 0"):
        Conversation(*tiny, max_tokens=0)
    reader = small_model(vision_config=None, connector_config=None, image_token_id=None)
    with pytest.raises(PromptError, match="a decoder alone and reads text only"):
        Conversation(reader, processor).show(SHAPES)
