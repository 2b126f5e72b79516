"""Documents to rows of tokens in which examples cannot see each other.

MM1 masks packed examples apart and calls it critical for few-shot. A row holds whole
documents; inside one, each branch sees the context and itself. Positions restart with
every document and, after the context, with every branch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from mm1_mlx.errors import DatasetError
from mm1_mlx.training.documents import Document, Region, Text

IMAGE_MARK = "<image>"
_MISSES = 5  # documents tried for the rest of a row: rows are 90% full, with 1: 77%
TARGETS = 64  # learned tokens are padded to a multiple of so many: few shapes
PADDING = -1  # the document number of padding


@dataclass
class Marks:
    """Token ids that rows need, and how many tokens an image takes (Q).

    counts_as: tokens that packing counts for an image, Q or more; 0 is Q. Models with
    other connectors then read the same rows.
    """

    bos: int
    eos: int
    pad: int
    image: int
    tokens_per_image: int
    counts_as: int = 0


@dataclass(eq=False)  # two documents are never one
class Tokens:
    """A document as parallel lists, one entry per token."""

    ids: list[int]
    branch: list[int]  # 0 is the context
    position: list[int]
    weight: list[float]  # of this token as a target; 0 is unsupervised
    images: list
    regions: list[list[Region]]  # of each image
    tasks: list[str]
    # Of each image the tokens that are read; None, or an empty list: all.
    kept: list[list[int] | None] = field(default_factory=list)
    more: int = 0  # tokens that packing counts beside its own

    @property
    def length(self) -> int:
        """Tokens as packing counts them."""
        return len(self.ids) + self.more


class DocumentEncoder:
    """Text pieces to token ids.

    encode(text, place=...): text -> ids; it knows special marks. place is "start" for
    a document's first text and "middle" after that, where a vocabulary that puts a
    space before a text must not. An end mark follows every supervised piece that ends a
    turn: the last of its branch, or one before a `<user>` mark.
    """

    def __init__(self, encode: Callable[..., list[int]], marks: Marks):
        self.encode = encode
        self.marks = marks
        self._known: dict[tuple[str, str], list[int]] = {}

    @property
    def smallest(self) -> int:
        """Less room than this in a row is not worth another document."""
        return self.marks.tokens_per_image + self._more + 8

    @property
    def _more(self) -> int:
        """Tokens that packing counts for an image beside its own."""
        return max(self.marks.counts_as - self.marks.tokens_per_image, 0)

    def _ids(self, text: str, place: str) -> list[int]:
        if (text, place) not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            ids: list[int] = []
            for i, part in enumerate(text.split(IMAGE_MARK)):
                if i:
                    ids += [self.marks.image] * self.marks.tokens_per_image
                if part:
                    ids += self.encode(part, place="middle" if i else place)
            self._known[text, place] = ids
        return self._known[text, place]

    def _pieces(
        self, pieces: list[Text], *, last: bool, place: str = "middle"
    ) -> tuple[list[int], list[bool]]:
        """Ids, and which of them are targets. last: a turn ends after these pieces."""
        ids: list[int] = []
        supervised: list[bool] = []
        for i, piece in enumerate(pieces):
            new = list(self._ids(piece.text, "middle" if i else place))
            ends = i + 1 == len(pieces)
            turn_ends = last if ends else pieces[i + 1].text.startswith("<user>")
            if piece.supervised and turn_ends:
                new.append(self.marks.eos)
            ids += new
            supervised += [piece.supervised] * len(new)
        return ids, supervised

    def __call__(self, document: Document, max_tokens: int) -> Tokens:
        """The document's tokens; branches that do not fit into max_tokens are left out.

        A context that does not fit is a DatasetError: an image is never cut.
        """
        following = document.branches[0][0].text if document.branches else ""
        ids, supervised = self._pieces(
            document.context, last=following.startswith("<user>"), place="start"
        )
        ids, supervised = [self.marks.bos, *ids], [False, *supervised]
        start = len(ids)
        Q = self.marks.tokens_per_image
        left_out = sum(Q - len(k) for k in document.kept if k is not None)
        whole = sum(k is None for k in document.kept or [None] * len(document.images))
        more = whole * self._more
        branch, position = [0] * start, list(range(start))
        weight = _weights(supervised)
        tasks = []
        names = document.tasks or [""] * len(document.branches)
        for number, pieces in enumerate(document.branches, 1):
            new, flags = self._pieces(pieces, last=True)
            if len(ids) + len(new) + more - left_out > max_tokens:
                continue
            ids += new
            branch += [number] * len(new)
            position += range(start, start + len(new))
            weight += _weights(flags)
            tasks.append(names[number - 1])
        if not tasks:
            raise DatasetError(
                f"A {document.kind} document needs more than {max_tokens} tokens "
                f"({start} before its first branch). Raise the row length."
            )
        regions = document.regions or [[] for _ in document.images]
        kept = document.kept or [None] * len(document.images)
        read = self._read(ids, kept)
        return Tokens(
            ids=[ids[i] for i in read],
            branch=[branch[i] for i in read],
            position=[position[i] for i in read],
            weight=[weight[i] for i in read],
            images=document.images,
            regions=regions,
            tasks=tasks,
            kept=kept,
            more=more,
        )

    def _read(self, ids: list[int], kept: list[list[int] | None]) -> list[int]:
        """Places of the ids that are read: all but image tokens that are left out."""
        if not any(numbers is not None for numbers in kept):
            return list(range(len(ids)))
        Q, read, seen = self.marks.tokens_per_image, [], 0
        for place, one in enumerate(ids):
            if one == self.marks.image:
                image, number = divmod(seen, Q)
                seen += 1
                numbers = kept[image]
                if numbers is not None and number not in numbers:
                    continue
            read.append(place)
        return read


def _weights(supervised: list[bool]) -> list[float]:
    # A caption of 30 tokens would outweigh a count of one: by the root of the length.
    total = sum(supervised)
    return [total**-0.5 if flag else 0.0 for flag in supervised]


@dataclass
class Row:
    """Documents side by side in one row of a batch."""

    parts: list[Tokens]

    @property
    def length(self) -> int:
        """Tokens of all its documents, as packing counts them."""
        return sum(part.length for part in self.parts)

    @property
    def images(self) -> list:
        """Pictures of all its documents, in order."""
        return [image for part in self.parts for image in part.images]


def distinct(images: list) -> tuple[list[int], list[int]]:
    """Where each different picture stands first, and which of these stands where.

    Two pictures are the same one if they are one object: a source that shows a picture
    in several documents of a batch has it encoded once.
    """
    number: dict[int, int] = {}
    first = []
    for i, image in enumerate(images):
        if number.setdefault(id(image), len(number)) == len(first):
            first.append(i)
    return first, [number[id(image)] for image in images]


def fill_row(
    draw: Callable[[], Document],
    encoder: DocumentEncoder,
    length: int,
    waiting: list[Tokens] | None = None,
    misses: int = 1,
) -> Row:
    """Draw documents into a row until `misses` of them did not fit beside the others.

    waiting: documents that did not fit into earlier rows; the longest that fit come
    first, and those that do not fit now are added to it. Without it they are lost.
    A document that would not fit into an empty row is passed over; twenty in a row are
    a DatasetError.
    """
    row, too_long, missed = Row([]), 0, 0
    waiting = [] if waiting is None else waiting
    waiting.sort(key=lambda tokens: tokens.length, reverse=True)
    for tokens in list(waiting):
        if tokens.length <= length - row.length:
            row.parts.append(tokens)
            waiting.remove(tokens)
    while not row.parts or length - row.length >= encoder.smallest:
        try:
            tokens = encoder(draw(), length)
        except DatasetError:
            too_long += 1
            if too_long == 20:
                raise
            continue
        if tokens.length <= length - row.length:
            row.parts.append(tokens)
            continue
        waiting.append(tokens)
        missed += 1
        if missed == misses:
            break
    return row


@dataclass
class Batch:
    """Arrays of one step; R rows of L tokens, N images, M targets.

    Shapes:
        ids, document, branch, position: (R, L) int32
        images, regions: N pictures in reading order, and what stands in each
    kept: of each picture the numbers of its tokens that are read, None for all
        source, target: (M,) flat index of the state that predicts, and the id it
            should predict; weight: (M,) float32, 0 where padded
    """

    ids: np.ndarray
    document: np.ndarray
    branch: np.ndarray
    position: np.ndarray
    images: list
    regions: list[list[Region]]
    kept: list[list[int] | None]
    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    documents: int


def collate(rows: list[Row], length: int, pad: int, targets: int = TARGETS) -> Batch:
    """Rows to arrays. M is rounded up to a multiple of `targets`, for few shapes."""
    shape = (len(rows), length)
    ids = np.full(shape, pad, np.int32)
    document = np.full(shape, PADDING, np.int32)
    branch, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    images: list = []
    regions: list[list[Region]] = []
    kept: list[list[int] | None] = []
    source, target, weight = [], [], []
    count = 0
    for r, row in enumerate(rows):
        at = 0
        for part in row.parts:
            stop = at + len(part.ids)
            ids[r, at:stop] = part.ids
            document[r, at:stop] = count
            branch[r, at:stop] = part.branch
            position[r, at:stop] = part.position
            images += part.images
            regions += part.regions
            kept += part.kept or [None] * len(part.images)
            context = part.branch.count(0)
            for j, w in enumerate(part.weight):
                if w and j:
                    # The first token of a branch is predicted by the context's last.
                    first = part.branch[j] != part.branch[j - 1]
                    before = context - 1 if first else j - 1
                    source.append(r * length + at + before)
                    target.append(part.ids[j])
                    weight.append(w)
            at = stop
            count += 1
    padded = max(-(-len(source) // targets), 1) * targets
    extra = padded - len(source)
    return Batch(
        ids=ids,
        document=document,
        branch=branch,
        position=position,
        images=images,
        regions=regions,
        kept=kept,
        source=np.array(source + [0] * extra, np.int32),
        target=np.array(target + [0] * extra, np.int32),
        weight=np.array(weight + [0.0] * extra, np.float32),
        documents=count,
    )


def may_see(document, branch, xp=np):
    """Which tokens each token sees: itself and earlier ones of its document, if they
    are in its own branch or in the context.

    Shapes:
        document, branch: (R, L)
        returns: (R, 1, L, L) bool
    """
    L = document.shape[1]
    same = document[:, :, None] == document[:, None, :]
    inside = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    earlier = xp.tril(xp.ones((L, L), dtype=bool if xp is np else xp.bool_))
    return (same & inside & earlier)[:, None]


class DocumentMixer:
    """Kinds of documents by weight; each row holds one kind (MM1: 45/45/10)."""

    def __init__(self, make: Callable[..., Document], weights: dict[str, float]):
        self._make = make
        self._kinds = list(weights)
        self._weights = list(weights.values())
        self._has_text = weights.get("text", 0) > 0

    def rows(
        self,
        rng: random.Random,
        count: int,
        length: int,
        encoder: DocumentEncoder,
        progress: float,
        max_images: int,
    ) -> list[Row]:
        """`count` rows of at most `length` tokens and `max_images` different pictures.

        Rows that come when the pictures are used up hold text, so that every batch has
        one shape: each new shape costs a compile. Where the mix has no text, they end
        before the first document whose pictures do not fit.
        """
        rows: list[Row] = []
        images: list = []
        waiting: dict[str, list[Tokens]] = {kind: [] for kind in self._kinds}
        for _ in range(count):
            kind = rng.choices(self._kinds, self._weights)[0]
            draw = partial(self._make, rng, kind, progress)
            row = fill_row(draw, encoder, length, waiting[kind], _MISSES)
            if len(distinct(images + row.images)[0]) > max_images:
                if self._has_text:
                    draw = partial(self._make, rng, "text", progress)
                    row = fill_row(draw, encoder, length)
                else:
                    row = _cut(row, images, max_images)
            images += row.images
            rows.append(row)
        return rows


def _cut(row: Row, before: list, max_images: int) -> Row:
    """The first documents of a row, as many as their pictures allow; maybe none."""
    kept: list[Tokens] = []
    for part in row.parts:
        images = before + Row([*kept, part]).images
        if len(distinct(images)[0]) > max_images:
            break
        kept.append(part)
    return Row(kept)
