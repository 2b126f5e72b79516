"""The mixes of the last rounds: what a round of everything had left behind round 5.

recipe_13.json to recipe_16.json read this module (with other shares in 13 to 15:
LAB.md).
Equal things, of which round 12 counted one too few or too many; what the first card
called weak: questions in capitals, outlines, things that overlap; and what round 13 had
too little of: words, digits, things whose colour or shape has no name.
"""

import random

from examples.mm1_tiny import documents
from mm1_mlx.training.documents import Document

MIXES = documents.Mixes(
    caption={
        "scene": 0.25, "several": 0.05, "capitals": 0.04, "outlined": 0.03,
        "overlapping": 0.03, "boxes": 0.05, "steps": 0.05, "unnamed": 0.12,
        "digits": 0.12, "word": 0.18, "unknown": 0.08,
    },
    interleaved={
        "comparison": 0.66, "few_shot": 0.08, "multi_turn": 0.1, "talk": 0.16,
    },
    long={
        "naming": 0.3, "tiles": 0.44, "numbered": 0.08, "steps": 0.13, "shots": 0.05,
    },
)  # fmt: skip


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return documents.document(rng, kind, progress, MIXES)
