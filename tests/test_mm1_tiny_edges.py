"""What mm1-tiny's first card called weak: outlines, overlapping things, capitals."""

import importlib
import math
import random
from itertools import combinations

import numpy as np
import pytest

from examples.mm1_tiny import (
    drawing,
    edges,
    glance_documents,
    pictures,
    practice_documents,
)
from examples.mm1_tiny import scenes as s
from helpers import ROOT, needs
from mm1_mlx.training.recipe import read_recipe


def test_overlapping_things_touch_and_differ():
    for seed in range(40):
        scene, _ = pictures.overlapping(random.Random(seed))
        touching = [
            (a, b)
            for a, b in combinations(scene.things, 2)
            if math.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius
        ]
        assert touching
        for a, b in touching:
            assert a.radius >= b.radius, "the smaller one is drawn over the larger"
        assert any(a.colour != b.colour for a, b in touching)


def test_nothing_overlaps_unless_it_is_asked_for():
    for seed in range(40):
        for a, b in combinations(s.sample_scene(random.Random(seed)).things, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius


@pytest.mark.parametrize("shape", s.OUTLINED)
def test_an_outline_has_the_background_inside(shape):
    thing = s.Thing("blue", shape, 0.5, 0.5, 0.4)
    filled, hollow = (
        _plain(s.Scene((thing,)), line=line) for line in (None, 0.2)
    )  # the same colours and background
    background = hollow[0, 0]
    assert np.abs(filled[100, 100] - background).sum() > 100
    assert np.abs(hollow[100, 100] - background).sum() == 0
    covered = [(np.abs(x - background).sum(-1) > 100).mean() for x in (filled, hollow)]
    assert 0.2 * covered[0] < covered[1] < 0.85 * covered[0]


def _plain(scene: s.Scene, line: float | None) -> np.ndarray:
    """A picture of 200 pixels that noise, blur and jpeg have left alone."""
    for seed in range(100):
        image = drawing.draw(scene, random.Random(seed), longer=200, line=line)
        pixels = np.asarray(image).astype(int)
        if (pixels[:20, :20] == pixels[0, 0]).all():
            return pixels
    raise AssertionError("no picture without noise in a hundred")


def test_no_outline_could_be_another_shape():
    """An empty circle is a ring; a moon's and a ring's own holes would be lost."""
    for seed in range(40):
        scene, _ = pictures.outlined(random.Random(seed))
        assert {thing.shape for thing in scene.things} <= set(s.OUTLINED)


@pytest.mark.parametrize("task", ["outlines", "overlapping", "crowded", "capitals"])
def test_edge_tasks_ask_each_question(task):
    asked = [edges.TASKS[task](random.Random(seed)) for seed in range(120)]
    assert {x.groups["question"] for x in asked} == set(edges.ASKED)
    capitals = sum(x.prompt == x.prompt.upper() for x in asked)
    # A few of all questions are typed so.
    assert capitals == 120 if task == "capitals" else capitals < 12


def test_pictures_of_several_ask_for_all_of_a_kind():
    for seed in range(30):
        picture = pictures.sample_picture(random.Random(seed), 1.0, {"several": 1})
        tasks = {question.task for question in picture.questions}
        assert tasks & {"colour_many", "shape_many"}


@needs("sklearn", "skimage")
@pytest.mark.parametrize("number", range(6, 11))
def test_the_later_rounds_make_each_kind_of_document(number):
    """And their recipes can be read."""
    recipe = read_recipe(ROOT / f"examples/mm1_tiny/recipe_{number}.json")
    data = importlib.import_module(recipe.data)
    stage = recipe.stages["joint"]
    kinds = {kind for part in stage.alternates for kind in part["mix"]} | set(stage.mix)
    assert kinds == {"caption", "interleaved", "text", "long", "many"}
    for kind in sorted(kinds):
        for seed in range(6):
            assert data.document(random.Random(seed), kind).branches
    mixes = getattr(data, "MIXES", practice_documents.MIXES)
    for mix in ("caption", "interleaved", "text", "long"):
        assert sum(getattr(mixes, mix).values()) == pytest.approx(1)


@needs("sklearn", "skimage")
def test_names_after_few_tokens_and_the_same_picture():
    """One token of a thing is on it; a picture that comes again is read alike."""
    few = again = 0
    rng = random.Random(2)
    for _ in range(60):
        document = glance_documents.document(rng, "long")
        if not document.kept or document.tasks != ["naming"]:
            continue
        seen: dict[int, list[int]] = {}
        for image, kept in zip(document.images, document.kept, strict=True):
            assert seen.setdefault(id(image), kept) == kept
        few += max(map(len, document.kept)) <= 3
        again += len(seen) < len(document.images)
    assert few > 25 and again > 20
