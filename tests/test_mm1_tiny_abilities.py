"""Training documents and test questions of shots, tiles, boxes, steps and talk."""

import itertools
import random
import re
import zlib
from collections import Counter

import pytest
from scene_reader import answer_to

from examples.mm1_tiny import boxes, naming, reasoning, turns
from examples.mm1_tiny.abilities import another_name
from examples.mm1_tiny.examples import iou, is_right
from examples.mm1_tiny.scenes import SHAPES, Scene, Thing, sample_scene
from helpers import need
from mm1_mlx.training.documents import Text

RED = Thing("red", "circle", 0.25, 0.25, 0.1)
BLUE = Thing("blue", "circle", 0.75, 0.25, 0.2)
STAR = Thing("red", "star", 0.5, 0.4, 0.1)
WIDE = Scene((RED, BLUE, STAR), 1.0, 0.5)


# --- boxes ---------------------------------------------------------------------------


def test_a_box_counts_in_the_padded_square():
    # 0.25 above and below a picture that is half as high as wide
    assert boxes.box_text(WIDE, RED) == "<15,40,35,60>"
    assert boxes.point_text(WIDE, RED.x, RED.y) == "<25,50>"
    assert boxes.point_text(Scene((), 1.0, 1.0), 1.0, 0.0) == "<99,0>"


def test_overlap_by_hand():
    assert iou([0, 0, 10, 10], [0, 0, 10, 10]) == 1
    assert iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert iou(None, [0, 0, 1, 1]) == 0


def test_what_counts_as_right():
    assert is_right("yes", " yes\n") and not is_right("yes", "no")
    assert is_right("8", "2 x 4 = 8. Answer: 8", "last") and is_right("8", "8", "last")
    assert not is_right("8", "2 x 4 = 8. Answer: 9", "last")
    assert is_right("<10,10,30,30>", "<12,10,30,30>", "box")
    assert not is_right("<10,10,30,30>", "<40,10,60,30>", "box")
    assert not is_right("<10,10,30,30>", "the star", "box")


# --- steps ---------------------------------------------------------------------------


def test_steps_add_up_and_count_what_is_there():
    rng = random.Random(1)
    for _ in range(300):
        scene = sample_scene(rng)
        asked = reasoning.two_steps(scene, rng)
        found = re.findall(r"(\d) (\w+): (\d) x (\d) = (\d+)\.", asked.steps)
        assert len(found) == 2
        products = []
        for count, name, again, worth, product in found:
            kind = (None, name) if name in SHAPES else (name, None)
            assert int(count) == int(again) == scene.count(*kind)
            assert int(count) * int(worth) == int(product)
            article = "an" if name == "orange" else "a"
            told = asked.question.lower().replace("gray", "grey")
            assert re.search(rf"{article} {name}[^.?]* {worth}\b", told, re.I)
            products.append(int(product))
        total = f"{products[0]} + {products[1]} = {sum(products)}."
        assert asked.steps.endswith(total) and asked.answer == str(sum(products))
        assert is_right(asked.answer, asked.reasoned, "last")


# --- talk ----------------------------------------------------------------------------


def test_a_later_turn_needs_the_one_before():
    rng = random.Random(2)
    seen = Counter()
    for _ in range(400):
        scene = sample_scene(rng)
        asked = turns.talk(scene, rng)
        if not asked:
            continue
        first = asked[0]
        assert first.answer == answer_to(first.question, scene), first
        for turn in asked[1:]:
            seen[turn.task] += 1
            words = turn.question.lower()
            assert re.search(r"\bit\b|\bits\b|^and\b|about", words), turn
    assert set(seen) == {"colour", "shape", "position", "box", "count"}


def test_it_is_the_thing_of_the_turn_before():
    """Where only one thing stands, every turn is about it."""
    rng = random.Random(3)
    scene = Scene((Thing("pink", "moon", 0.2, 0.2, 0.1),))
    answers = {
        "colour": "pink",
        "shape": "moon",
        "position": "top left",
        "box": boxes.box_text(scene, scene.things[0]),
    }
    for _ in range(100):
        for turn in turns.talk(scene, rng):
            if turn.task != "count":
                assert turn.answer == answers[turn.task], turn


# --- new names -----------------------------------------------------------------------


def test_test_words_are_never_trained():
    rng = random.Random(4)
    trained = {naming.invented(rng) for _ in range(4000)}
    tested = {naming.invented(rng, "test") for _ in range(1000)}
    assert not trained & tested
    for _ in range(500):
        words = naming.names(4, rng, "test")
        assert len(set(words)) == 4
        assert all(zlib.crc32(word.encode()) % 4 == 0 for word in words)


def test_a_naming_question_has_one_answer():
    """By hand, and of the questions themselves, drawn without pictures."""
    told = ["red", "blue", "red", "blue"], ["a", "b", "a", "b"]
    assert another_name([*told[0], "red"], [*told[1], "b"])
    assert not another_name([*told[0], "red"], [*told[1], "a"])
    assert not another_name([*told[0], "green"], [*told[1], "b"])
    assert not another_name(["red", "red", "blue"], ["a", "b", "b"])


def test_a_name_is_learned_only_where_it_was_shown_before():
    text = naming.pieces(["dax", "wug", "dax"], [False, False, True], random.Random(0),
                         "turns")  # fmt: skip
    assert [piece.supervised for piece in text] == [False] * 5 + [True]
    plain = naming.pieces(["dax", "wug"], [False, True], random.Random(1), "plain")
    assert plain == [
        Text("<image>"), Text(" dax", False), Text("\n<image>"), Text(" wug", True)
    ]  # fmt: skip


def test_names_follow_what_they_name():
    rng = random.Random(5)
    pool = [(thing, f"picture {i}", []) for i, thing in enumerate((RED, BLUE, STAR))]
    pool += [(Thing("blue", "star", 0.5, 0.5, 0.2), "picture 3", [])]
    by_key = Counter()
    for _ in range(200):
        shown, text = naming.named_pictures(pool, rng, 3, 6)
        if any(" star" in p.text or " circle" in p.text for p in text):
            continue  # words beside pictures, or in their place
        names = [
            p.text.strip()
            for p in text
            if p.text.strip() and not re.search("image|assistant", p.text)
        ]
        assert len(names) == len(shown)
        things = [thing for thing, _, _ in shown]
        fits = [
            name
            for name, key in naming.KEYS.items()
            if len({(key(t), n) for t, n in zip(things, names, strict=True)})
            == len(set(names))
        ]
        assert fits
        by_key.update(fits)
    assert by_key["colour"] > 20 and by_key["shape"] > 20


# --- documents and test questions ----------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    need("sklearn")
    need("skimage")
    from examples.mm1_tiny import documents

    return documents


@pytest.mark.parametrize("kind, most", [("long", 5), ("many", 16)])
def test_long_documents_are_well_formed(drawn, kind, most):
    rng = random.Random(6)
    seen = Counter()
    for _ in range(60):
        document = drawn.document(rng, kind, 0.7)
        context = "".join(piece.text for piece in document.context)
        assert context.count("<image>") == len(document.images)
        # At a glance a picture has a quarter of its tokens: twice as many have room.
        glanced = document.tasks[0] == "of_many" and document.kept is not None
        assert len(document.images) <= (min(2 * most, 16) if glanced else most)
        assert len(document.regions) == len(document.images)
        assert len(document.tasks) == len(document.branches) >= 1
        seen[document.tasks[0]] += 1
    assert len(seen) > 3


def test_documents_of_a_batch_share_pictures(drawn):
    def pictures(seed):
        rng = random.Random(seed)
        found = [drawn.document(rng, "long", 0.7) for _ in range(20)]
        named = [d for d in found if d.tasks == ["naming"]]
        return [id(image) for d in named for image in d.images]

    own = pictures(7)
    assert len(set(own)) < len(own)


def test_tiles_are_those_that_the_processor_makes(drawn):
    import numpy as np
    from PIL import Image

    from examples.mm1_tiny import small
    from mm1_mlx.inputs.images import pixels
    from mm1_mlx.inputs.tiling import expansion, tiles

    settings, config = small.reading()
    image = Image.effect_noise((250, 180), 80).convert("RGB")
    cut, marks = small.as_pieces(image, 9)
    made, layout = tiles(image, settings, config)
    assert np.array_equal(np.stack([pixels(tile, settings) for tile in cut]), made)
    text = "".join(piece or "<image>" for piece in expansion(layout, 0, config))
    assert marks == text


def test_compared_tasks_ask_the_same(drawn):
    from examples.mm1_tiny.abilities import SAME_QUESTIONS, TASKS

    for task, other in SAME_QUESTIONS.items():
        one, two = TASKS[task](random.Random(8)), TASKS[other](random.Random(8))
        assert one.answer == two.answer and one.task != two.task
    right = TASKS["naming_right"](random.Random(9))
    shuffled = TASKS["naming_shuffled"](random.Random(9))
    assert right.prompt != shuffled.prompt
    assert sorted(right.prompt.split()) == sorted(shuffled.prompt.split())
    assert len(right.images) == 9


def test_numbered_pictures_by_hand():
    from examples.mm1_tiny.long_documents import about_many

    rng = random.Random(10)
    seen = set()
    for _ in range(300):
        found = about_many([RED, BLUE, STAR], rng)
        if found is None:
            continue
        question, answer = found[0].lower(), found[1]
        number = re.search(r"picture (\d)", question)
        if number:
            names = ("a red circle", "a blue circle", "a red star")
            assert answer == names[int(number[1]) - 1]
        elif "star" in question:
            assert answer == ("1" if "how many" in question else "3")
        elif "blue" in question:
            assert answer == ("1" if "how many" in question else "2")
        seen.add(answer)
    assert {"1", "2", "3", "a red circle"} <= seen


def test_every_picture_of_boxes_has_a_question(drawn):
    from examples.mm1_tiny import pictures

    for seed in range(150):
        rng = random.Random(seed)
        assert pictures.sample_picture(rng, 0.8, {"boxes": 1.0}).questions


# --- what its card calls weak --------------------------------------------------------


@pytest.mark.parametrize("task", ["count", "colour", "caption"])
def test_smaller_things_are_as_small_as_their_group_says(task, monkeypatch, drawn):
    from examples.mm1_tiny import edges, scenes

    made = []
    arrange = scenes.arrange

    def kept(*args, **kwargs):
        made.append(arrange(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(edges.s, "arrange", kept)
    seen = set()
    for seed in range(30):
        example = edges.TASKS[f"smaller_{task}"](random.Random(seed))
        least, most = map(float, example.groups["diameter"].split(" to "))
        seen.add(least)
        for thing in made[-1].things:
            assert least - 1e-9 <= 2 * thing.radius <= most + 1e-9
    assert len(seen) == len(edges.DIAMETERS)


def test_of_an_empty_picture_nothing_is_there(drawn):
    from examples.mm1_tiny.edges import TASKS

    answers = {TASKS["empty"](random.Random(seed)).answer for seed in range(60)}
    assert {"0", "nothing"} <= answers and not answers & {"1", "yes"}


def test_doubled_words_have_a_letter_twice_in_a_row():
    from examples.mm1_tiny.edges import TASKS, doubled_words

    assert "apple" in doubled_words() and "able" not in doubled_words()
    for seed in range(5):
        text = TASKS["doubled"](random.Random(seed)).answer
        assert any(a == b for a, b in itertools.pairwise(text))
