"""Documents of new names alone, with pictures ("long") and without ("text").

recipe_7.json reads this module: names for pictures are learned at once or not at all,
and only where they are most of what there is (LAB.md).
"""

import random

from examples.mm1_tiny import documents, long_documents
from mm1_mlx.training.documents import Document

GLANCES = 0.95  # share of documents that read a quarter of each picture's tokens
LEAST, MOST = 3, 7  # pictures


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document. kind: "long" or "text"."""
    if kind == "long":
        return long_documents.naming_document(rng, progress, LEAST, MOST, GLANCES)
    return documents.document(rng, kind, progress)
