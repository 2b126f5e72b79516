"""An answer style: what mm1-tiny says in a word, it says in a sentence when asked to.

    python -m examples.sentences data DATA
    python -m examples.teach DATA OUT

As examples/corners.py. Without the words "In a sentence" it must go on answering in one
word, so the old questions to train on are for the greater part those same questions.
"""

import random
import sys

from PIL import Image

from examples.mm1_tiny.drawing import draw
from examples.mm1_tiny.scenes import sample_scene
from examples.teach import NewTask, data_main


def sample(rng: random.Random) -> tuple[Image.Image, str, str]:
    """A picture, a question for a colour or a shape, and its answer as a sentence."""
    while True:
        scene = sample_scene(rng)
        thing = rng.choice(scene.things)
        if rng.random() < 0.5 and scene.count(shape=thing.shape) == 1:
            asked = f"what colour is the {thing.shape}?"
            answer = f"The {thing.shape} is {thing.colour}."
        elif scene.count(colour=thing.colour) == 1:
            asked = f"what shape is the {thing.colour} thing?"
            answer = f"The {thing.colour} thing is a {thing.shape}."
        else:
            continue
        return draw(scene, rng), f"In a sentence: {asked}", answer


TASK = NewTask("sentences", sample, close=("colour", "shape"))


if __name__ == "__main__":
    sys.exit(data_main(TASK, __doc__ or ""))
