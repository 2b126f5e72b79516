"""The fine-tuning example's data, as the trainer reads it."""

import random

from examples.corners import CORNERS, sample, write
from mm1_mlx.training.conversations import open_split


def test_the_answer_is_that_of_the_thing_asked_for():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        _, question, answer = sample(rng)
        assert question.startswith("How many corners does the ")
        seen.add(int(answer))
    assert seen == set(CORNERS.values())


def test_both_splits_are_read_and_differ(tmp_path):
    write(tmp_path, 6, 3, 0)
    train, valid = open_split(tmp_path, "train"), open_split(tmp_path, "valid")
    assert train is not None and valid is not None
    assert (len(train), len(valid)) == (6, 3)
    pictures = {(tmp_path / f"train_{i:04}.png").read_bytes() for i in range(6)}
    assert not pictures & {
        (tmp_path / f"valid_{i:04}.png").read_bytes() for i in range(3)
    }
