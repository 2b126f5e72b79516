"""Boxes, steps, talk, tiles and numbered pictures beside the old tasks and new names.

recipe_9.json reads this module: these come slowly where a tenth of the documents is
about them (LAB.md).
"""

import random

from examples.mm1_tiny import documents
from mm1_mlx.training.documents import Document

MIXES = documents.Mixes(
    caption={
        "scene": 0.28, "several": 0.05, "capitals": 0.02, "outlined": 0.015,
        "overlapping": 0.015, "boxes": 0.25, "steps": 0.1, "unnamed": 0.06,
        "digits": 0.05, "word": 0.12, "unknown": 0.04,
    },
    interleaved={
        "talk": 0.42, "comparison": 0.42, "few_shot": 0.08, "multi_turn": 0.08,
    },
    text={
        "naming": 0.5, "told": 0.22, "numbered": 0.14, "facts": 0.1, "sentences": 0.04,
    },
    long={
        "naming": 0.32, "tiles": 0.32, "numbered": 0.22, "steps": 0.09, "shots": 0.05,
    },
)  # fmt: skip


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return documents.document(rng, kind, progress, MIXES)
