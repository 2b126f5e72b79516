"""A question that mm1-tiny was never asked: how many corners the thing of a colour has.

    python -m examples.corners data DATA
    python -m examples.teach DATA OUT

`data` draws DATA/train.jsonl, valid.jsonl and test.jsonl with their pictures; `score`
asks the questions of test.jsonl. examples/teach.py does the rest.

Two thirds of the samples to train on are questions of the old kinds, every second of
them close to the new one: without them it displaces what it is close to.
"""

import random
import sys

from PIL import Image

from examples.mm1_tiny.drawing import draw
from examples.mm1_tiny.replay import COUNTS
from examples.mm1_tiny.scenes import COLOURS, TRAINING_PAIRS, arrange
from examples.teach import NewTask, data_main

CORNERS = {"circle": 0, "triangle": 3, "square": 4, "star": 10}


def sample(rng: random.Random) -> tuple[Image.Image, str, str]:
    """A picture of one to three things, a question about one, and its answer."""
    colours = rng.sample(COLOURS, rng.randint(1, 3))
    pairs = [
        rng.choice([p for p in TRAINING_PAIRS if p[0] == colour and p[1] in CORNERS])
        for colour in colours
    ]
    colour, shape = pairs[0]
    question = f"How many corners does the {colour} thing have?"
    return draw(arrange(pairs, rng), rng), question, str(CORNERS[shape])


# What it may displace: numbers are the answers there, too, and pictures are full.
TASK = NewTask("corners", sample, (*COUNTS, "colour_many", "shape_many"))


if __name__ == "__main__":
    sys.exit(data_main(TASK, __doc__ or ""))
