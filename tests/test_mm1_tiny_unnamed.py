"""Scenes with a colour or a shape that has no name: what is asked, and what is not."""

import colorsys
import random
from collections import Counter

import pytest
from scene_reader import COLOURS, SHAPES, answer_to

from examples.mm1_tiny import drawing, scenes, unnamed

# Hues that somebody might call by the colour that the shape is held out with.
NEVER = {"star": (72, 172), "triangle": (42, 71), "square": (250, 315)}


def asked(colours: bool, count: int = 400):
    rng = random.Random(1)
    for _ in range(count):
        scene = unnamed.sample_scene(rng, colours)
        for question in unnamed.ask(scene, rng, colours):
            yield scene, question


@pytest.mark.parametrize("colours", [False, True])
def test_answers_are_true(colours):
    for scene, question in asked(colours):
        assert answer_to(question.question, scene) == question.answer, question


@pytest.mark.parametrize("colours", [False, True])
def test_only_what_has_a_name_is_named(colours):
    hidden, shown = (SHAPES, COLOURS) if colours else (COLOURS, SHAPES)
    unsaid = {*hidden, *scenes.UNNAMED_SHAPES}
    tasks = Counter()
    for _, question in asked(colours):
        words = set(question.question.lower().strip("?. ").replace(",", "").split())
        words |= {word.rstrip("s") for word in words} | {question.answer}
        assert not words & unsaid, question
        tasks[question.task] += 1
        assert question.answer in shown or question.task not in ("colour", "shape")
    own = {"colour", "count_colour"} if colours else {"shape", "count_shape"}
    assert set(tasks) == own | {"count", "existence", "position", "relation"}
    assert min(tasks.values()) > 100


def test_nothing_comes_near_a_held_out_pair():
    assert {shape for _, shape in scenes.HELD_OUT_PAIRS} == set(NEVER)
    rng = random.Random(2)
    for _ in range(3000):
        for shape, (low, high) in NEVER.items():
            rgb = drawing.shade(unnamed.any_colour(shape, rng), rng)
            hue = 360 * colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0]
            assert not low < hue < high, (shape, rgb)
    seen = {thing.pair for scene, _ in asked(True) for thing in scene.things}
    assert {shape for _, shape in seen} == set(scenes.UNNAMED_SHAPES)


def test_unnamed_shapes_fit_their_circle_and_are_not_squares():
    for shape in scenes.UNNAMED_SHAPES:
        thing = scenes.Thing("red", shape, 0.5, 0.5, 0.3)
        far = max(((x - 0.5) ** 2 + (y - 0.5) ** 2) ** 0.5 for x, y in thing.corners())
        assert abs(far - 0.3) < 1e-9
        left, top, right, bottom = thing.box()
        if len(thing.corners()) == 4:
            assert (right - left) / (bottom - top) > 2
