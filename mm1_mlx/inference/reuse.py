"""What is kept between answers, so that a picture or a beginning is read once."""

import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import MM1Error
from mm1_mlx.inference.identity import Numbered, identity, settings_of, weights_of
from mm1_mlx.inference.prefix_folder import Kind, PrefixFolder
from mm1_mlx.inference.prefix_tree import Columns, PrefixTree, joined
from mm1_mlx.inference.steps import generation_stream
from mm1_mlx.inputs.shelf import Shelf
from mm1_mlx.memory import working_set
from mm1_mlx.models.cache import KVCache
from mm1_mlx.models.mm1 import MM1

SHARE, MOST = 10, 4 * 2**30  # a tenth of the working set, and no more than 4 GiB
FOLDER_LIMIT = 10_000_000_000
_LEFT = 4  # answers that were broken off since the last prompt


class Reuse:
    """Pictures, image tokens and prompts' keys and values, for the answers to come.

    Each model makes one for itself when it answers first (model.reuse), and it goes
    with the model. What is known of a picture is found by its pixels, of a prompt by
    its tokens and pictures, and by the weights: others put into the model, an adapter
    among them, never meet what these computed. Only what is written into a weight in
    place (weight[3] = 0) is not noticed: call clear() after it.

    In 32 bits the answer is that of reading all again. In 16 bits a prompt that is read
    in other parts may round otherwise, as it does in a batch: where two tokens are as
    likely but for that rounding, the other one may come.

    limit: bytes of memory at most; by default a tenth of what the machine's arrays may
    take, 4 GiB at most. Most goes to prompts, an eighth each to image tokens and to
    pixels; what was not used for longest goes first.
    folder: where prompts are kept on the disk, too, for other processes; it holds
    folder_limit bytes at most. problem: why the last one could not be written.

    For several threads. Raises MM1Error for a limit that is none, CheckpointError for
    a folder that cannot be written to.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        folder: str | Path | None = None,
        folder_limit: int = FOLDER_LIMIT,
    ):
        if limit is None:
            limit = min(working_set() // SHARE, MOST)
        for name, value in (("limit", limit), ("folder_limit", folder_limit)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise MM1Error(
                    f"{name} is {value!r}, but must be a whole number of bytes."
                )
        self.limit, self.folder_limit = limit, folder_limit
        self._folder = None if folder is None else PrefixFolder(folder, folder_limit)
        self._lock, self._disk = Lock(), Lock()
        self._wholes, self._eyes = Numbered(), Numbered()
        self._left: deque = deque(maxlen=_LEFT)
        self.clear()

    def __deepcopy__(self, memo: dict) -> "Reuse":
        """An empty one: a copy of a model has other weights."""
        copy = Reuse(self.limit, folder_limit=self.folder_limit)
        copy._folder = self._folder
        return copy

    def clear(self) -> None:
        """Forget all that is in memory; the folder stays as it is."""
        with self._lock:
            self._wholes.forget()  # an answer that is being made is not kept, either
            self._eyes.forget()
            self._left.clear()
            self._kinds: dict[int, Kind] = {}
            self._most = self.limit - 2 * (self.limit // 8)  # bytes of prompts
            self._prompts = PrefixTree(self._most)
            self._features = Shelf(self.limit // 8)
            self.pixels = Shelf(self.limit // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        kept = self._prompts.nbytes + self._features.nbytes + self.pixels.nbytes
        return kept + self._left_bytes()

    @property
    def problem(self) -> str | None:
        """Why the last prompt could not be kept on the disk, or None."""
        return None if self._folder is None else self._folder.problem

    # --- what generation asks for ----------------------------------------------------

    def numbers(self, model: MM1) -> tuple[int, int]:
        """What tells a model's weights apart: of the whole, of what reads pictures."""
        weights = weights_of(model)
        eyes = [pair for pair in weights if not pair[0].startswith("decoder.")]
        settings, its_eyes = settings_of(model)
        numbers = (
            self._wholes.number(weights, settings),
            self._eyes.number(eyes, its_eyes),
        )
        gone = self._eyes.gone()
        self._features.drop_where(lambda key: key[0] in gone)
        with self._lock:
            for number in self._wholes.gone():
                self._prompts.drop(number)
                self._kinds.pop(number, None)
        for _ in range(len(self._left)):
            self._take(model, numbers[0])
        return numbers

    def _take(self, model: MM1, whole: int) -> None:
        """Keep what `leave` was given last, if it is of this model as it is now."""
        with suppress(IndexError):  # another thread was faster
            owner, number, keys, cache, nbytes = self._left.pop()
            if owner() is model and number == whole:
                self.keep(model, whole, keys, cache)
            elif owner() is not None and owner() is not model:
                self._left.appendleft((owner, number, keys, cache, nbytes))

    def features(self, eyes: int, digest: str) -> mx.array | None:
        """Image tokens of a picture, (T, D)."""
        return self._features.get((eyes, digest))

    def keep_features(self, eyes: int, digest: str, features: mx.array) -> None:
        """Keep a picture's image tokens, (T, D)."""
        self._features.put((eyes, digest), features, features.nbytes)

    def prefix(
        self, model: MM1, whole: int, keys: Sequence[int]
    ) -> tuple[int, list[Columns]]:
        """How many columns are known of a prompt, and these in pieces."""
        with self._lock:
            known, pieces = self._prompts.find(whole, keys)
        if self._folder is None or known == len(keys):
            return known, pieces
        kind = self._kind(model, whole)
        with self._disk:
            reach, more = self._folder.find(kind, keys, known)
        if reach == known:
            return known, pieces
        with mx.stream(generation_stream()):
            arrays = joined([*pieces, *more])
            mx.eval(arrays)
            self._add(whole, list(keys)[:reach], arrays)
        return reach, [arrays]

    def leave(
        self, model: MM1, whole: int, keys: Sequence[int], cache: Sequence[Any]
    ) -> None:
        """Have what was read of a prompt kept when the next one is asked for.

        It waits for no lock and computes nothing: a generator may be ended by Python's
        garbage collector, in the midst of anything. What does not fit beside it goes,
        the oldest of what was left first; where that cannot be done now, it does.
        """
        nbytes = sum(entry.nbytes for entry in cache)
        if nbytes > self._most or not self._wholes.knows(whole):
            return
        with suppress(IndexError):  # there is none any more
            while self._left_bytes() + nbytes > self._most:
                self._left.popleft()
        beside = self._left_bytes() + nbytes
        if self._lock.acquire(blocking=False):
            try:
                self._prompts.make_room(beside)
            finally:
                self._lock.release()
        if beside + self._prompts.nbytes <= self._most:
            owner = weakref.ref(model)
            self._left.append((owner, whole, list(keys), list(cache), nbytes))

    def _left_bytes(self) -> int:
        """Bytes of what `leave` was given, spare room of the caches included."""
        return sum(nbytes for *_, nbytes in tuple(self._left))

    def _add(self, whole: int, keys: Sequence[int], arrays: Columns) -> None:
        """To the prompts in memory, as far as what was left has room for them."""
        with self._lock:
            self._prompts.make_room(self._left_bytes())
            self._prompts.add(whole, keys, arrays)

    def has_room(self, cache: Sequence[Any]) -> bool:
        """Whether copies of a cache would fit: Metal ends a process where they do not.

        They are no part of the memory plan: the answer needs none.
        """
        nbytes = sum(entry.nbytes for entry in cache)
        copies = min(nbytes, self.limit)
        if self._folder is not None:  # a file is made of a copy of its own
            copies += 2 * nbytes
        return mx.get_active_memory() + copies <= working_set()

    def keep(
        self,
        model: MM1,
        whole: int,
        keys: Sequence[int],
        cache: Sequence[Any],
        row: int = 0,
        pad: int = 0,
    ) -> None:
        """Keep the columns of these keys of a cache's row, which are behind `pad`.

        Where there is no memory for it, nothing is kept: the answer is not to blame.
        """
        if not self.has_room(cache):
            return
        stop = pad + len(keys)
        with mx.stream(generation_stream()), suppress(RuntimeError, MemoryError):
            every = [array for entry in cache for array in entry.state]
            arrays = [array[row : row + 1, :, pad:stop] for array in every]
            self._add(whole, keys, arrays)
            if self._folder is not None:
                kind = self._kind(model, whole)
                with self._disk:
                    self._folder.add(kind, keys, arrays)

    def _kind(self, model: MM1, whole: int) -> Kind:
        """For files; computed once for the same weights."""
        kind = self._kinds.get(whole)  # another thread may clear them meanwhile
        if kind is None:
            with mx.stream(generation_stream()):
                who = identity(model)
                layers, entry = model.decoder.layers, KVCache()
                # Lazy: it tells shape and type, and is never computed.
                layers[0](model.decoder.embed_tokens(mx.array([[0]])), None, entry)
                keys = entry.state[0]
            heads, width = keys.shape[1], keys.shape[3]
            kind = Kind(who, len(layers), heads, width, keys.dtype)
            self._kinds[whole] = kind
        return kind


def store_of(model: MM1, reuse: Any) -> Reuse | None:
    """What generate's `reuse` means: a Reuse, the model's own for None, or nothing.

    In training nothing is kept: dropout changes what a prompt gives.
    """
    if reuse is None:
        reuse = model.reuse
    if not (reuse is None or isinstance(reuse, (bool, Reuse))):
        raise MM1Error(
            f"reuse is of the type {type(reuse).__name__}, but must be a Reuse, or "
            f"False for none."
        )
    if reuse is False or model.training:
        return None
    if isinstance(reuse, Reuse):
        return reuse
    if not isinstance(model.reuse, Reuse):
        model.reuse = Reuse()
    return model.reuse
