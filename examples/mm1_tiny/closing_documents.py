"""The mixes of the last round: what a round of everything had left behind round 5.

recipe_13.json reads this module. Plain scenes, and among them equal things, of which
round 12 counted one too few or too many; and what the first card called weak: questions
in capitals, outlines, things that overlap (LAB.md).
"""

import random

from examples.mm1_tiny import documents
from mm1_mlx.training.documents import Document

MIXES = documents.Mixes(
    caption={
        "scene": 0.36, "several": 0.12, "capitals": 0.04, "outlined": 0.04,
        "overlapping": 0.05, "boxes": 0.07, "steps": 0.06, "unnamed": 0.06,
        "digits": 0.06, "word": 0.11, "unknown": 0.03,
    },
    interleaved={
        "comparison": 0.55, "few_shot": 0.12, "multi_turn": 0.13, "talk": 0.2,
    },
    long={
        "naming": 0.3, "tiles": 0.44, "numbered": 0.08, "steps": 0.13, "shots": 0.05,
    },
)  # fmt: skip


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return documents.document(rng, kind, progress, MIXES)
