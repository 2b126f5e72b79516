"""The last round's mixes with more names and tiles, as many pictures as tests have.

recipe_11.json reads this module. Eight named pictures and a ninth, or nine tiles and an
overview, are documents of the kind "many"; in round 10 one of some fifteen documents of
names or tiles was so large.
"""

import random
from dataclasses import replace

from examples.mm1_tiny import closing_documents, documents, long_documents
from mm1_mlx.training.documents import Document

MIXES = replace(
    closing_documents.MIXES,
    long={
        "naming": 0.42, "tiles": 0.4, "numbered": 0.04, "steps": 0.1, "shots": 0.04,
    },
    text={
        "naming": 0.6, "told": 0.14, "numbered": 0.08, "facts": 0.12, "sentences": 0.06,
    },
)  # fmt: skip
NUMBERED = 0.15


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    if kind == "many":
        return long_documents.document(rng, kind, progress, MIXES.long, NUMBERED)
    return documents.document(rng, kind, progress, MIXES)
