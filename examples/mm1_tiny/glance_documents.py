"""Names as short as they can be: one to three tokens of a picture, as a word has, and
in half of the documents the same picture again. recipe_7.json reads this module.

A name that follows one token of a picture is found as one that follows a word is; with
sixteen tokens, the last of them background, it was not in 25,000 documents (LAB.md).
"""

import random

from examples.mm1_tiny.practice_documents import Names, practised
from mm1_mlx.training.documents import Document

NAMES = Names(0.97, 0.96, (1, 1, 1, 2, 2, 3, 6, 12), again=0.5)


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return practised(rng, kind, progress, NAMES)
