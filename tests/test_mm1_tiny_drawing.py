"""Scenes as pictures: shades keep their names, shapes their area and place."""

import colorsys
import math
import random

import numpy as np
import pytest

from examples.mm1_tiny import drawing
from examples.mm1_tiny.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
)

HELD_OUT_NAMES = [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]


def name_of_colour(rgb) -> str:
    """An independent reading of a colour, by borders halfway between the names."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))
    if value < 0.25:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.8 else "grey"
    warm, reddish = 11 < hue * 360 < 44, not 11 < hue * 360 < 350
    if value < 0.69 and (warm or (reddish and saturation < 0.6)):
        return "brown"
    if 308 < hue * 360 < 351 and value > 0.86 and saturation < 0.75:
        return "pink"
    borders = [(14, "red"), (44, "orange"), (75, "yellow"), (180, "green")]
    borders += [(256, "blue"), (330, "purple"), (361, "red")]
    return next(name for border, name in borders if hue * 360 < border)


def body(thing: Thing) -> tuple[float, float]:
    """A point inside: a moon and a ring have nothing at their centre."""
    corners = thing.corners()
    pair = {"ring": (0, -1), "moon": (12, 32)}.get(thing.shape)
    if pair is None:
        return thing.x, thing.y
    (x0, y0), (x1, y1) = (corners[i] for i in pair)
    return (x0 + x1) / 2, (y0 + y1) / 2


def test_shades_keep_their_names():
    rng = random.Random(3)
    for name in COLOURS:
        for _ in range(2000):
            colour = drawing.shade(name, rng)
            assert all(0 <= value <= 255 for value in colour)
            assert name_of_colour(colour) == name, colour


def test_pictures_show_the_scene():
    """Each thing's colour stands in the middle of its body."""
    rng = random.Random(4)
    for _ in range(400):
        scene = sample_scene(rng)
        image = drawing.draw(scene, rng)
        assert image.mode == "RGB"
        longer = max(image.size)
        assert 64 <= longer <= 224
        assert abs(image.width / longer - scene.width) < 0.01
        pixels = np.asarray(image)
        for thing in scene.things:
            x, y = (at * longer for at in body(thing))
            wide = 0.1 if thing.shape in ("moon", "ring") else 0.25
            reach = max(1, wide * thing.radius * longer)
            part = pixels[
                int(y - reach) : int(y + reach) + 1, int(x - reach) : int(x + reach) + 1
            ]
            middle = np.median(part.reshape(-1, 3), axis=0)
            assert name_of_colour(middle) == thing.colour, (thing, middle)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_a_drawn_shape(shape, monkeypatch):
    """The filled area equals the formula's, with and without antialiasing."""
    monkeypatch.setattr(drawing, "_spoil", lambda image, rng: image)
    monkeypatch.setattr(
        drawing, "_background", lambda colours, square, rng: ((255,) * 3,) * 2
    )
    monkeypatch.setattr(drawing, "shade", lambda name, rng: (0, 0, 0))
    parts = {
        "circle": math.pi,
        "square": 2.0,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * 0.5 * 0.42 * math.sin(math.pi / 5),
        "ring": math.pi * (1 - 0.55**2),
    }
    level = Thing("black", shape, 0.5, 0.45, 0.3).box()
    unit = (level[2] - level[0]) / 32  # x = 16 sin^3(t) encloses 180 pi
    parts["heart"] = 180 * math.pi * (unit / 0.3) ** 2
    # A disk less its overlap with one of radius 0.8 at 0.45; the disk is as high.
    a, b = math.acos(0.5625 / 0.9), math.acos(0.45 / 0.8 - 0.5625 / 0.9 / 0.8)
    wedge = a - math.sin(a) * math.cos(a) + 0.64 * (b - math.sin(b) * math.cos(b))
    unit = (level[3] - level[1]) / 2
    parts["moon"] = (math.pi - wedge) * (unit / 0.3) ** 2
    for seed in range(20):
        rng = random.Random(seed)
        thing = Thing("black", shape, 0.5, 0.45, 0.3, rng.uniform(0, 360))
        image = drawing.draw(Scene((thing,)), rng)
        ink = (255 - np.asarray(image.convert("L"), np.float32)).sum() / 255
        expected = parts[shape] * (0.3 * image.width) ** 2
        assert abs(ink / expected - 1) < 0.08, (seed, image.size)  # edge pixels


def test_backgrounds_stand_out():
    rng = random.Random(5)
    for _ in range(500):
        colours = [drawing.shade(name, rng) for name in rng.sample(COLOURS, 3)]
        for end in drawing._background(colours, False, rng):
            # Three colours may leave none of the last resorts far from all of them.
            least = min(math.dist(end, colour) for colour in colours)
            assert least >= drawing.MIN_CONTRAST or end in drawing._PLAIN
            assert least > 70


def test_drawing_is_determined_by_the_seed():
    scene = sample_scene(random.Random(6))
    first, second = (drawing.draw(scene, random.Random(7)) for _ in range(2))
    other = drawing.draw(scene, random.Random(8))
    assert first.tobytes() == second.tobytes() != other.tobytes()
