"""Pictures with small things, small numbers and small words, to be read in tiles.

A picture is cut as the model cuts it (mm1_mlx.inputs.tiling), each tile is a picture of
the document, and the text between them is what the processor writes there.
"""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

from PIL import Image

from examples.mm1_tiny import asking, drawing, glyphs
from examples.mm1_tiny import scenes as s
from examples.mm1_tiny.questions import Question
from mm1_mlx.config import TilingConfig
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tiling import cut, expansion
from mm1_mlx.training.recipe import read_recipe

SMALLEST = 0.02  # radius: 4 of 96 pixels across, 12 of 288
LARGEST = 0.11
NAMED = ("colour", "shape", "count", "count_colour", "count_shape", "existence",
         "position", "relation", "caption", "box", "at", "count_pair")  # fmt: skip


def small_scene(
    rng: random.Random,
    pairs: str = "training",
    smallest: float = SMALLEST,
    largest: float = LARGEST,
    most: int = 4,
) -> s.Scene:
    """One to `most` small things; smallest, largest: their radius."""
    number = rng.randint(1, most)
    chosen = s.sample_pairs(rng, number, s.allowed_pairs(pairs))
    return s.arrange(chosen, rng, smallest=smallest, largest=largest)


def draw_large(scene: s.Scene, rng: random.Random, side: int) -> Image.Image:
    """The scene, its longer side `side` pixels."""
    return drawing.draw(scene, rng, longer=side)


def small_text(
    rng: random.Random, side: int, split: str = "train", share: float | None = None
) -> tuple[Image.Image, Question]:
    """A number or a word in a corner of a large picture.

    share: of the picture's side that the line takes; 0.2 to 0.45 unless given.
    """
    digits = rng.random() < 0.4
    found = (glyphs.sample_digits if digits else glyphs.sample_word)(rng, split)
    share = rng.uniform(0.2, 0.45) if share is None else share
    line = found.image
    scale = share * side / max(line.size)
    size = max(round(line.width * scale), 8), max(round(line.height * scale), 8)
    line = line.resize(size, Image.Resampling.BICUBIC)
    corner = line.getpixel((0, 0))
    canvas = Image.new("RGB", (side, side), corner)
    x, y = rng.randint(0, side - size[0]), rng.randint(0, side - size[1])
    canvas.paste(line, (x, y))
    asked = glyphs.digit_questions(rng) if digits else glyphs.word_questions(rng)
    return canvas, Question("digits" if digits else "words", asked, found.text)


def small_picture(rng: random.Random) -> tuple[Image.Image, list[Question]]:
    """A large picture of small things with questions about it."""
    side = rng.choice((192, 192, 224, 256, 288, 320))
    if rng.random() < 0.3:
        image, question = small_text(rng, side)
        return image, [question]
    smallest = SMALLEST * 288 / side if side < 288 else SMALLEST
    largest = rng.choice((2 * SMALLEST, LARGEST))  # half of them hard to see whole
    scene = small_scene(rng, smallest=smallest, largest=largest, most=6)
    found: dict[str, Question] = {}
    for task in rng.sample(NAMED, 8):
        if question := asking.ASKERS[task](scene, rng, "training", None):
            found[question.question] = question
    if len(scene.things) > 4:  # a caption of six would be long
        found = {k: x for k, x in found.items() if x.task != "caption"}
    return draw_large(scene, rng, side), list(found.values())


@cache
def reading() -> tuple[ImageSettings, TilingConfig]:
    """How mm1-tiny reads pictures: recipe_8.json."""
    recipe = read_recipe(Path(__file__).parent / "recipe_8.json")
    assert recipe.model.tiling_config is not None
    return recipe.images, recipe.model.tiling_config


def as_pieces(image: Image.Image, most: int) -> tuple[list[Image.Image], str]:
    """At most `most` tiles of a picture, and the text with a mark for each of them."""
    settings, config = reading()
    config = replace(config, max_tiles=most)
    tiles, layout = cut(image, settings, config)
    marks = expansion(layout, 0, config)
    return tiles, "".join("<image>" if mark is None else mark for mark in marks)
