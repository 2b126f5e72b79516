"""Documents of what a round of everything learns too slowly: boxes, steps, talk.

recipe_9.json reads this module. What is asked of a tenth of the pictures takes as many
rounds as what is new takes documents (LAB.md); here it is most of what there is.
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
    text={"told": 0.4, "naming": 0.35, "facts": 0.15, "sentences": 0.1},
)  # fmt: skip


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return documents.document(rng, kind, progress, MIXES)
