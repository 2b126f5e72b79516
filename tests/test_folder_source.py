"""A user's own folder as training data: train.jsonl and its pictures."""

import json
import random

import mlx.core as mx
import pytest
from PIL import Image
from training_kit import encode, recipe_with

from mm1_mlx.errors import DatasetError
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.documents import Region, Text
from mm1_mlx.training.folder_source import FolderSource
from mm1_mlx.training.pretraining import _check_kinds, make_trainer
from mm1_mlx.training.recipe import Recipe


@pytest.fixture
def write(tmp_path):
    """Writes train.jsonl from dictionaries and gives the source."""
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (8 + i, 8), colour).save(tmp_path / f"{i}.png")

    def write(*lines):
        text = [x if isinstance(x, str) else json.dumps(x) for x in lines]
        (tmp_path / "train.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
        return FolderSource(tmp_path)

    return write


def only(source, kind):
    return source.document(random.Random(0), kind)


def test_kinds_follow_from_the_pictures_or_are_given(write):
    source = write(
        {"text": "just text"},
        {"text": "<image> a", "images": ["0.png"]},
        {"text": "<image> b", "images": ["1.png"], "kind": "interleaved"},
        {"text": "<image>c<image>", "images": ["0.png", "1.png"]},
        "",
        {"text": "more text"},
    )
    counts = {"caption": 1, "interleaved": 2, "text": 2}
    assert source.counts == {"long": 0, "many": 0, **counts}


def test_a_document_learns_its_text_and_not_its_pictures(write):
    source = write(
        {"text": "One <image> two <image> three", "images": ["0.png", "2.png"]}
    )
    document = only(source, "interleaved")
    assert document.context == [
        Text("One ", True),
        Text("<image>"),
        Text(" two ", True),
        Text("<image>"),
    ]
    assert document.branches == [[Text(" three", True)]]
    assert [image.size for image in document.images] == [(8, 8), (10, 8)]
    assert document.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert document.regions == [[], []] and document.tasks == ["interleaved"]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("a", [Text("a", True)]),
        ("<image>a", [Text("<image>"), Text("a", True)]),
        ("a<image>", [Text("a", True), Text("<image>"), Text("", True)]),
    ],
)
def test_where_pictures_stand(write, text, pieces):
    images = ["0.png"] * text.count("<image>")
    document = only(write({"text": text, "images": images}), _kind(images))
    assert [*document.context, *document.branches[0]] == pieces


def _kind(images):
    return ("text", "caption", "interleaved")[min(len(images), 2)]


def test_pictures_without_a_mark_come_first(write):
    document = only(write({"text": "A dog.", "images": ["0.png"]}), "caption")
    assert document.context == [Text("<image>")]
    assert document.branches == [[Text("A dog.", True)]]


def test_every_line_is_drawn_and_the_generator_decides(write):
    source = write(*({"text": f"line {i} é"} for i in range(5)))

    def draw(seed):
        rng = random.Random(seed)
        return [source.document(rng, "text").branches[0][0].text for _ in range(40)]

    assert set(draw(0)) == {f"line {i} é" for i in range(5)}
    assert draw(1) == draw(1) != draw(2)


def test_region_pictures_have_their_regions_or_the_whole_text(write):
    box = [0.0, 0.25, 0.5, 1]
    source = write({"text": "A  red <image>thing.", "images": ["0.png"]})
    image, regions = source.region_picture(random.Random(0))
    assert image.size == (8, 8)
    assert regions == [Region((0.0, 0.0, 1.0, 1.0), "A red thing.")]
    source = write(
        {
            "text": "x",
            "images": ["0.png", "1.png"],
            "regions": [[{"box": box, "text": "red"}], []],
        }
    )
    found = {}
    for seed in range(10):
        image, regions = source.region_picture(random.Random(seed))
        found[image.size] = regions
    assert found == {
        (8, 8): [Region((0.0, 0.25, 0.5, 1), "red")],
        (9, 8): [Region((0.0, 0.0, 1.0, 1.0), "x")],
    }


def test_a_batch_of_a_folder(write, tmp_path):
    """The whole way: jsonl to a step's arrays and loss."""
    write(
        {"text": "<image> a", "images": ["0.png"]},
        {"text": "<image>c<image> d", "images": ["0.png", "1.png"]},
        {"text": "more text"},
    )
    recipe = Recipe.from_dict(recipe_with(data=str(tmp_path)))
    for stage in ("encoder", "joint"):
        trainer = make_trainer(recipe, stage, MM1(recipe.model), encode, tmp_path)
        arrays, count = trainer.stage.host_batch(random.Random(0), 3, 0.0)
        loss, _ = trainer.stage.loss(*map(mx.array, arrays))
        assert count >= 3 and mx.isfinite(loss).item()


WRONG = [
    ("{", r"line 2: not a JSON object"),
    ("[1]", r"line 2: not a JSON object but '\[1\]'"),
    ({"txt": "a"}, r"line 2: unknown keys \['txt'\]"),
    ({"images": ["0.png"]}, r"line 2: 'text' is None"),
    ({"text": " "}, r"'text' is ' ', but must be a text"),
    ({"text": "<image>", "images": ["0.png"]}, r"'text' is '<image>'"),
    ({"text": "a", "images": "0.png"}, r"'images' is '0\.png', but must be a list"),
    ({"text": "<image> a"}, r"has 1 <image> but there are 0 images"),
    ({"text": "<image>a", "images": ["0.png"] * 2}, r"has 1 <image> but .* 2 images"),
    ({"text": "a", "kind": "poem"}, r"'kind' is 'poem', but must be one of caption"),
    ({"text": "a", "kind": "caption"}, r"kind 'caption' does not go with 0 images"),
    ({"text": "a", "images": ["0.png"], "kind": "text"}, r"'text' does not go with 1"),
    ({"text": "a", "images": ["0.png"], "regions": [[], []]}, r"'regions' must hold"),
    (
        {"text": "a", "images": ["0.png"], "regions": [[{"box": [0, 0, 1, 2]}]]},
        r"'regions' must hold for each of the 1 images",
    ),
    (
        {
            "text": "a",
            "images": ["0.png"],
            "regions": [[{"box": [0.5, 0, 0.2, 1], "text": "a"}]],
        },
        r"boxes as fractions",
    ),
]


@pytest.mark.parametrize("line, message", WRONG, ids=[str(x) for x, _ in WRONG])
def test_a_wrong_line_is_named(write, line, message):
    with pytest.raises(DatasetError, match=message):
        write({"text": "right"}, line)


def test_folders_without_documents(tmp_path, write):
    with pytest.raises(DatasetError, match=r"is empty: one JSON object a line"):
        write("", "  ")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"has no train\.jsonl"):
        FolderSource(tmp_path)


def test_kinds_and_pictures_that_are_not_there(write):
    source = write({"text": "a"}, {"text": "b", "images": ["gone.png"]})
    with pytest.raises(DatasetError, match=r"'interleaved'.*There are .*'caption': 1"):
        only(source, "interleaved")
    with pytest.raises(
        DatasetError, match=r"train\.jsonl, the line at byte \d+: .*gon"
    ):
        only(source, "caption")
    with pytest.raises(DatasetError, match="has no pictures"):
        write({"text": "a"}).region_picture(random.Random(0))


def test_a_mix_that_a_folder_cannot_give_is_refused_at_the_start(write):
    source = write({"text": "a"})
    _check_kinds(source, {"text": 1.0, "caption": 0.0})
    with pytest.raises(
        DatasetError, match=r"kinds \['caption'\].*There are {'text': 1"
    ):
        _check_kinds(source, {"text": 0.5, "caption": 0.5})
