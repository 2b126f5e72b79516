"""What a round of everything learns too slowly: boxes, steps, talk, numbered pictures.

recipe_9.json and recipe_10.json read this module. What is new takes so many documents;
where a tenth of them are about it, it takes ten times as many (LAB.md).
"""

import random

from examples.mm1_tiny import documents
from mm1_mlx.training.documents import Document

MIXES = documents.Mixes(
    caption={
        "boxes": 0.5, "steps": 0.35, "scene": 0.05, "unnamed": 0.02, "digits": 0.02,
        "word": 0.04, "unknown": 0.02,
    },
    interleaved={
        "talk": 0.78, "comparison": 0.15, "few_shot": 0.04, "multi_turn": 0.03,
    },
    text={
        "told": 0.25, "naming": 0.3, "numbered": 0.35, "facts": 0.06, "sentences": 0.04,
    },
    long={
        "numbered": 0.66, "naming": 0.22, "tiles": 0.06, "steps": 0.04, "shots": 0.02,
    },
)  # fmt: skip


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return documents.document(rng, kind, progress, MIXES)
