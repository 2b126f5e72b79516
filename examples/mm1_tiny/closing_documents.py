"""The mixes of a round of everything, in which the encoder learns again, too.

recipe_10.json reads this module. Equal things, and what the first card called weak:
questions in capitals, outlines, things that overlap; and, for what is forgotten first,
words, digits, things whose colour or shape has no name, and two pictures.
"""

import random

from examples.mm1_tiny import documents
from mm1_mlx.training.documents import Document

MIXES = documents.Mixes(
    caption={
        "scene": 0.25, "several": 0.05, "capitals": 0.04, "outlined": 0.03,
        "overlapping": 0.03, "boxes": 0.09, "steps": 0.05, "unnamed": 0.12,
        "digits": 0.1, "word": 0.17, "unknown": 0.07,
    },
    interleaved={
        "comparison": 0.64, "few_shot": 0.09, "multi_turn": 0.1, "talk": 0.17,
    },
    long={
        "naming": 0.4, "tiles": 0.36, "numbered": 0.07, "steps": 0.12, "shots": 0.05,
    },
)  # fmt: skip


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return documents.document(rng, kind, progress, MIXES)
