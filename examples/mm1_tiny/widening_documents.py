"""Names after more and more of a picture, up to all of it. recipe_8.json reads this."""

import random

from examples.mm1_tiny.practice_documents import Names, practised
from mm1_mlx.training.documents import Document

NAMES = Names(0.97, 0.85, (1, 2, 4, 8, 16, 32), again=0.35)


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return practised(rng, kind, progress, NAMES)
