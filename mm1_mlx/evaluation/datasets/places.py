"""Where a dataset lies: its folder here or on the hub, and its files in there."""

import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mm1_mlx.checkpoint.hub import download_dataset
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.samples import Source

# What splits are called in file names, beside their own name.
_WORDS = {
    "val": ("val", "validation", "valid", "val2014"),
    "testdev": ("testdev", "test_dev", "test-dev"),
}
_DATA = (".json", ".jsonl", ".tsv", ".csv", ".parquet", ".p")
_DEPTH = 3  # folders below the dataset's that are looked into
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<rev>[\w./-]+))?"
)
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_PLAIN = ("", "data", "default")  # folders that are no configuration's


class Place:
    """The folder of a dataset."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: list[str] | None = None

    @property
    def names(self) -> list[str]:
        """The data files in it and below, as "data/val.json"; pictures are left out."""
        if self._names is None:
            self._names = sorted(_walk(self.folder, "", _DEPTH), key=_order)
        return self._names

    def find(self, *patterns: str) -> Path | None:
        """The first file whose name, or its end, fits a pattern like "val_*.json"."""
        for pattern in patterns:
            for name in self.names:
                if _fits(name, pattern):
                    return self.folder / name
        return None

    def need(self, *patterns: str) -> Path:
        """As find; DatasetError where there is none."""
        found = self.find(*patterns)
        if found is None:
            raise self.missing(f"{' or '.join(patterns)} (as published)")
        return found

    def parquet(self, split: str, config: str | None = None) -> list[Path]:
        """The parquet files of a split, [] where it has none.

        config: the folder of a configuration, "*" for all; without such a folder those
        of no configuration.
        """
        files = split_files(self.names, split, config)
        return [self.folder / name for name in files]

    def missing(self, wanted: str) -> DatasetError:
        """What to raise where a dataset's files are not there."""
        here = ", ".join(self.names[:6]) or "no data files"
        more = ", ..." if len(self.names) > 6 else ""
        return DatasetError(f"{self.folder} has no {wanted}. It has: {here}{more}.")


def open_place(
    source: Source,
    split: str,
    config: str | None = None,
    others: Callable[[list[str]], list[str]] = lambda names: [],
) -> Place:
    """The folder of a source; of a dataset on the hub the split's files are downloaded.

    source: a folder, or "owner/name", maybe with "@revision". What is here wins.
    others: of all files of a dataset those that are wanted where it has no parquet
    files of the split. DatasetError says what is wrong.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Place(folder)
    match = _HUB.fullmatch(str(source))
    if folder.exists() or match is None or isinstance(source, Path):
        found = "is a file" if folder.exists() else "does not exist"
        raise DatasetError(
            f"The dataset's folder {source} {found}: give a folder, or a dataset on "
            f"the hub like 'owner/name'."
        )

    def choose(names: list[str]) -> list[str]:
        files = split_files(names, split, config) or others(names)
        if not files:
            raise DatasetError(_no_split(str(source), names, split))
        return files

    return Place(download_dataset(match["repo"], match["rev"], choose))


def split_files(
    names: Sequence[str], split: str, config: str | None = None
) -> list[str]:
    """Of a dataset's files the parquet files of a split, in order.

    DatasetError where several configurations have it, or numbered files are missing.
    """
    words = "|".join(map(re.escape, _WORDS.get(split, (split,))))
    named = re.compile(rf"(?:(.+)/)?(?:{words})(?:[-._]\d[\w.-]*)?\.parquet")
    inside = re.compile(rf"(?:(.+)/)?(?:{words})/[^/]+\.parquet")
    found: dict[str, list[str]] = {}
    for pattern in (named, inside):
        for name in names if not found else ():
            if match := pattern.fullmatch(name):
                found.setdefault(match[1] or "", []).append(name)
    chosen = _of_config(found, config)
    for files in chosen.values():
        _check_shards(files)
    if len(chosen) > 1 and config != "*":
        folders = ", ".join(sorted(chosen)[:5])
        raise DatasetError(
            f"The split {split!r} is there several times, in {folders}: give the "
            f"folder of one of them."
        )
    return sorted(name for files in chosen.values() for name in files)


def _of_config(found: dict[str, list[str]], config: str | None) -> dict[str, list[str]]:
    if config == "*":
        return found
    if config is not None:
        own = {f: n for f, n in found.items() if config.lower() in f.lower().split("/")}
        if own:
            return own
    plain = {folder: names for folder, names in found.items() if folder in _PLAIN}
    return plain or found


def _check_shards(names: list[str]) -> None:
    shards = [match for name in names if (match := _SHARD.search(name))]
    if not shards:
        return
    wanted = max(int(match[2]) for match in shards)
    if len({int(match[1]) for match in shards}) < wanted:
        raise DatasetError(
            f"There are {len(shards)} of the {wanted} files like {names[0]}: get the "
            f"others."
        )


def _no_split(repo: str, names: list[str], split: str) -> str:
    tables = sorted({re.split(r"-\d", n)[0] for n in names if n.endswith(".parquet")})
    has = ", ".join(tables[:8]) or "no parquet files"
    return (
        f"'{repo}' on the hub has no parquet files of the split {split!r}. It has: "
        f"{has}. Other formats are read from a folder: download them."
    )


def _walk(folder: Path, start: str, depth: int) -> list[str]:
    found = []
    try:
        listed = list(os.scandir(folder))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}.") from error
    for entry in listed:
        if entry.name.lower().endswith(_DATA):
            found.append(start + entry.name)
        elif depth and entry.is_dir() and not entry.name.startswith("."):
            found += _walk(folder / entry.name, f"{start}{entry.name}/", depth - 1)
    return found


def _order(name: str) -> tuple[int, str]:
    return name.count("/"), name  # the nearest first


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    ends = parts[-len(wanted) :]
    return len(ends) == len(wanted) and all(map(fnmatchcase, ends, wanted))
