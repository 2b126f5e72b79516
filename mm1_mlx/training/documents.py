"""What a pretraining source yields: documents of text and images.

A document has one shared context and any number of branches. A branch sees the context
and itself, never another branch: several questions about one picture would otherwise
answer each other. Plain documents (a caption, a page, a text) have a single branch.
"""

from dataclasses import dataclass, field
from typing import Any

# MM1 section 4 mixes the first three 45/45/10. The others are ours: interleaved
# documents of several pictures or tiles, and of up to 16 pictures, each apart because
# they need longer rows (recipe.StageSettings.at).
KINDS = ("caption", "interleaved", "text", "long", "many")


@dataclass(frozen=True)
class Text:
    """A piece of text. `<image>` inside it stands for the next image.

    supervised: whether the loss is taken on its tokens (and on the end mark after it,
    when it is the last piece of its branch).
    """

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Region:
    """What stands where in a picture, for the region contrast of the encoder stage.

    box: (left, top, right, bottom) as fractions of the image's width and height.
    text: a short phrase, for example "red circle", "digit 7", "nothing".
    """

    box: tuple[float, float, float, float]
    text: str


@dataclass
class Document:
    """One training example.

    kind: one of KINDS.
    images: PIL images, RGB, in the order of their `<image>` marks.
    context: pieces that every branch sees; all `<image>` marks stand here.
    branches: each a list of pieces; at least one.
    tasks: a name per branch, for statistics.
    regions: a list per image, empty lists where nothing is known.
    kept: of each image the numbers of the image tokens that are read, in order, or None
        for all; empty: all of all. The others are left out, and everything keeps its
        position: documents of many pictures cost a fraction where a few tokens show
        what they are about (as patch dropout does in an encoder).
    """

    kind: str
    images: list[Any]
    context: list[Text]
    branches: list[list[Text]]
    tasks: list[str] = field(default_factory=list)
    regions: list[list[Region]] = field(default_factory=list)
    kept: list[list[int] | None] = field(default_factory=list)
