"""New abilities beside the old ones.

recipe_6.json to recipe_8.json read this module and the two that change its names,
glance_documents.py and widening_documents.py.

Two of five steps are mostly what mm1-tiny knows already: where new words were all there
was, it had forgotten how to read pictures after 400 steps (LAB.md).
"""

import random
from dataclasses import dataclass

from examples.mm1_tiny import documents, long_documents
from mm1_mlx.training.documents import Document

MIXES = documents.Mixes(
    caption={
        "scene": 0.36, "several": 0.05, "unnamed": 0.1, "digits": 0.1, "word": 0.2,
        "unknown": 0.05, "boxes": 0.1, "steps": 0.04,
    },
    interleaved={
        "comparison": 0.52, "few_shot": 0.2, "multi_turn": 0.1, "talk": 0.18,
    },
    text={
        "naming": 0.74, "told": 0.08, "numbered": 0.08, "facts": 0.06,
        "sentences": 0.04,
    },
    long={
        "numbered": 0.55, "naming": 0.0, "tiles": 0.27, "steps": 0.08, "shots": 0.1,
    },
)  # fmt: skip
LEAST, MOST = 3, 7  # pictures


@dataclass(frozen=True)
class Names:
    """How pictures are named by words that mean nothing before.

    share: of "long" documents. glances: of these, how many read a part of each picture;
    tokens: how many tokens of its thing, drawn for each document. again: how often a
    class is one picture, shown again and again.
    """

    share: float
    glances: float
    tokens: tuple[int, ...]
    again: float = 0.0


FIRST = Names(0.7, 0.9, (3, 6, 12, 12))


def document(rng: random.Random, kind: str, progress: float = 1.0) -> Document:
    """One document, of the kinds of documents.document."""
    return practised(rng, kind, progress, FIRST)


def practised(rng: random.Random, kind: str, progress: float, names: Names) -> Document:
    """The same with other names."""
    if kind == "long" and rng.random() < names.share:
        return long_documents.naming_document(
            rng, progress, LEAST, MOST, names.glances, names.tokens, names.again
        )
    return documents.document(rng, kind, progress, MIXES)
