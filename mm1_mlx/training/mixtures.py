"""Sources of data, where they lie, and how they are mixed by weight.

Which sample comes at which place of a run is a function of the seed and the place
alone, so a run that goes on needs no state, and processes agree without asking.
"""

import math
import random
import re
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from mm1_mlx.checkpoint.hub import download_dataset
from mm1_mlx.errors import ConfigError, DatasetError
from mm1_mlx.training.conversations import (
    FORMATS,
    SPLITS,
    open_split,
    open_train,
    split_files,
)
from mm1_mlx.training.samples import Sample, Samples, shuffle

# OWNER/NAME, OWNER/NAME/FOLDER or OWNER/NAME/FILE.json, and maybe @REVISION.
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<inside>[^@]+?))?/?"
    r"(@(?P<revision>[\w./-]+))?"
)
_PICTURES = {
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".ico", ".avif", ".heic", ".heif"),
}


class Order:
    """Which sample comes at which place of an endless stream: each epoch shuffled anew.

    shuffled: makes an epoch's order; None for any order of all.
    """

    def __init__(
        self,
        count: int,
        seed: int | str,
        shuffled: Callable[[random.Random], Sequence[int]] | None = None,
    ):
        self._count, self._seed = count, seed
        self._shuffled = shuffled or (lambda rng: shuffle(count, rng))
        self._known: tuple[int, Sequence[int]] = -1, ()

    def __getitem__(self, place: int) -> int:
        epoch, inside = divmod(place, self._count)
        known, numbers = self._known
        if known != epoch:
            numbers = self._shuffled(random.Random(f"{self._seed}/{epoch}"))
            self._known = epoch, numbers
        return numbers[inside]


class Turns:
    """Which source has the turn at which place, and for the how-manieth time.

    At every place each source has had its share of all turns so far, to less than one:
    at most 1 - 1/(2n - 2) off for n sources, which is the best that is possible.
    (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980)
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(repr(weight)) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * unit) for weight in exact]
        divisor = math.gcd(*whole)
        self._weights = [weight // divisor for weight in whole]
        self._period = sum(self._weights)
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._done, self._counts, self._last = 0, [0] * len(self._weights), 0

    def __getitem__(self, place: int) -> tuple[int, int]:
        period, inside = divmod(place, self._period)
        with self._lock:
            if inside + 1 < self._done:
                self._begin()
            while self._done <= inside:
                self._next()
            source = self._last
            earlier = period * self._weights[source] + self._counts[source] - 1
        return source, earlier

    def _next(self) -> None:
        """Of those that may have the turn, the one that must have one soonest."""
        self._done += 1
        scale = max(2 * len(self._weights) - 2, 1)
        best, soonest = 0, math.inf
        for source, weight in enumerate(self._weights):
            missing = weight * self._done - self._period * self._counts[source]
            if missing * scale < self._period:
                continue
            slack = ((scale - 1) * self._period - scale * missing) / weight
            if slack < soonest:
                best, soonest = source, slack
        self._counts[best] += 1
        self._last = best


class Mixture:
    """Several sources as one, by weight; a sample's number counts through all of them.

    names: of the sources, all different. weights: relative; None for equal ones.
    """

    def __init__(
        self,
        parts: Sequence[Samples],
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.parts = list(parts)
        self.names = list(names or map(str, range(1, len(parts) + 1)))
        self.weights = [float(w) for w in weights or [1.0] * len(parts)]
        for name, weight in zip(self.names, self.weights, strict=True):
            if not 0 < weight < math.inf:
                raise ConfigError(
                    f"The weight of {name} is {weight:g}, but must be above 0."
                )
        self._starts = array("Q", [0])
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> Sample:
        """A sample; DatasetError names the place where it is none."""
        part = self.part_of(number)
        return self.parts[part][number - self._starts[part]]

    def part_of(self, number: int) -> int:
        """Which source a sample is from."""
        return bisect_right(self._starts, number) - 1

    def shares(self) -> list[float]:
        """The part of all samples that comes from each source."""
        return [weight / sum(self.weights) for weight in self.weights]

    def order(self, seed: int) -> Callable[[int], int]:
        """From a place in a run to the number of the sample there."""
        orders = [
            Order(len(part), f"{number}:{seed}" if number else seed, part.shuffled)
            for number, part in enumerate(self.parts)
        ]
        if len(orders) == 1:
            return orders[0].__getitem__
        turns = Turns(self.weights)

        def number_at(place: int) -> int:
            part, earlier = turns[place]
            return self._starts[part] + orders[part][earlier]

        return number_at

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether a run goes on with the same data, in the same mixture."""
        found = [part.fingerprint() for part in self.parts]
        if len(found) == 1:
            return found[0]
        rows = zip(self.names, self.shares(), found, strict=True)
        return {
            name: {"place": place, "share": share, **of_part}
            for place, (name, share, of_part) in enumerate(rows, 1)
        }


def as_mixture(samples: Samples | Mixture) -> Mixture:
    """Samples as the only source of a mixture; a mixture as it is."""
    return samples if isinstance(samples, Mixture) else Mixture([samples])


def fingerprint(samples: Samples | Mixture) -> dict[str, Any]:
    """What tells whether a run goes on with the same data."""
    return as_mixture(samples).fingerprint()


@dataclass(frozen=True)
class Source:
    """Where data is. name: a folder, a file, or a dataset on the hub. weight: relative.
    images: what paths of pictures start from, where that is not the folder."""

    name: str
    weight: float = 1.0
    images: Path | None = None


class Data:
    """The sources of a run, found and where needed downloaded; DatasetError if not."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._places = [find_data(source.name) for source in sources]
        self.names = _labels([source.name for source in sources])

    def train(self) -> Mixture:
        """All samples to train on; every source must have some."""
        pairs = zip(self._places, self._sources, strict=True)
        parts = [open_train(place, source.images) for place, source in pairs]
        return Mixture(parts, self.names, [source.weight for source in self._sources])

    def split(self, split: str) -> Mixture | None:
        """The samples of a split, of the sources that have it; None where none has."""
        pairs = zip(self._places, self._sources, strict=True)
        parts = [open_split(place, split, source.images) for place, source in pairs]
        found = [
            (part, name) for part, name in zip(parts, self.names, strict=True) if part
        ]
        return Mixture(*zip(*found, strict=True)) if found else None


def find_data(name: str) -> Path:
    """The folder or file of a path, or of a dataset on the hub, which is downloaded:
    "owner/name", "owner/name/folder" or "owner/name/file.json", and maybe "@revision".

    What is here wins. Raises DatasetError.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    match = _HUB.fullmatch(name)
    if match is None:
        raise DatasetError(
            f"There is no data folder {name}: expected one with train.jsonl, a file, "
            f"or a dataset on the hub like 'owner/name'."
        )
    repo, inside, revision = match.group("repo", "inside", "revision")

    def choose(names: list[str]) -> list[str]:
        return wanted_files(names, inside or "", f"'{repo}' on the hub")

    return download_dataset(repo, revision, choose) / (inside or "")


def wanted_files(names: Sequence[str], inside: str, what: str) -> list[str]:
    """Patterns of the files of a repository that are data: those of the splits, and
    pictures. inside: a folder of it, or a file, which is wanted alone. what: the
    repository, for messages. Raises DatasetError."""
    if inside in names:
        folder, files = inside.rpartition("/")[0], [inside]
        start = f"{folder}/" if folder else ""
    else:
        start = f"{inside}/" if inside else ""
        below = [n.removeprefix(start) for n in names if n.startswith(start)]
        try:
            files = {split: split_files(below, split) for split in SPLITS}
        except DatasetError as error:
            raise DatasetError(f"{what}: {error}") from error
        if not files["train"]:
            folders = sorted({n.partition("/")[0] for n in below if "/" in n})
            shown = f" Its folders are {', '.join(folders[:8])}: name one, as in "
            hint = f"{shown}owner/name/{folders[0]}." if folders else ""
            raise DatasetError(
                f"{what} has no train.jsonl, train.json or train.parquet, nor numbered "
                f"ones{f' in {inside}' if inside else ''}.{hint}"
            )
        files = [start + name for found in files.values() for name in found]
    suffixes = {PurePosixPath(n).suffix for n in names if n.startswith(start)}
    pictures = sorted(s for s in suffixes if s.lower() in _PICTURES)
    return [*map(escape, files), *(f"{escape(start)}*{s}" for s in pictures)]


def _labels(names: Sequence[str]) -> list[str]:
    """A short name for each source, none twice."""
    labels: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        short = path.resolve() if path.exists() else Path(name.partition("@")[0])
        label = short.stem if short.suffix.lstrip(".") in FORMATS else short.name
        number = 1 + sum(re.sub(r"-\d+$", "", known) == label for known in labels)
        labels.append(label if number == 1 else f"{label}-{number}")
    return labels
