"""Parquet files with pictures, as the hub's datasets are: the texts are read at once,
a picture when it is used."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.parquet_file import ParquetTable
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets.pictures import Pictures, Stored
from mm1_mlx.evaluation.datasets.places import Place, open_place
from mm1_mlx.evaluation.datasets.rows import Fault, Row, samples_of
from mm1_mlx.evaluation.samples import Sample, Source

Read = Callable[[Source, str], Iterator[Sample]]
Make = Callable[[dict[str, Any]], Iterable[Sample]]

_BYTES = ".bytes"
SPLIT = "#split"  # in a row: the split that was asked for
_SECRET = ("test", "testdev")  # splits whose answers a server keeps


class Table:
    """Rows of parquet files. Where a column holds pictures, the row has sources for
    `load_image`: one, a list of them, or None."""

    def __init__(self, files: Sequence[Path], folder: Path):
        """folder: what the paths of pictures start from."""
        self._files, self._pictures = files, Pictures(folder)
        self._kinds: dict[str, bool] = {}  # columns of pictures: whether they are lists
        self._texts = ParquetTable(files, self._is_text)
        self._opened: dict[str, ParquetTable] = {}  # one column of pictures each

    def _is_text(self, path: str) -> bool:
        if not path.endswith(_BYTES):
            return True
        column, *between = path.removesuffix(_BYTES).split(".")
        self._kinds[column] = bool(between)
        return False

    def rows(self) -> Iterator[Row]:
        """The rows with their places, and their numbers from 1 under "#"."""
        for index, values in enumerate(self._texts.rows()):
            for column, listed in self._kinds.items():
                held = values.get(column)
                if held is None:
                    values[column] = None
                elif listed:
                    values[column] = [
                        self._source(index, column, k) for k in range(len(held))
                    ]
                else:
                    values[column] = self._source(index, column)
            yield self._texts.where(index), {**values, "#": str(index + 1)}

    def _source(self, index: int, column: str, which: int | None = None) -> Stored:
        number = "" if which is None else f" {which + 1}"
        where = f"{self._texts.where(index)}, {column}{number}"

        def load(limit: int) -> bytes:
            held = self._column(column).row(index)[column]
            held = held if which is None else held[which]
            if held["bytes"] is not None:
                return held["bytes"]
            return self._file(held.get("path"), where, limit)

        return Stored(where, load)

    def _column(self, column: str) -> ParquetTable:
        if column not in self._opened:
            start = column + "."
            self._opened[column] = ParquetTable(
                self._files, lambda path: path.startswith(start)
            )
        return self._opened[column]

    def _file(self, path: object, where: str, limit: int) -> bytes:
        """A picture of which the table has the path alone."""
        try:
            found = self._pictures.find(path)
        except Fault as fault:
            raise DatasetError(f"{where}: {fault}.") from None
        if isinstance(found, Stored):
            return found.read(limit)
        with found.open("rb") as file:
            return file.read(limit)


def table_samples(files: Sequence[Path], folder: Path, make: Make) -> Iterator[Sample]:
    """The samples of parquet files."""
    shards = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return samples_of(Table(files, folder).rows, make, f"{files[0]}{shards}")


def reader(
    make: Make,
    published: Callable[[Place, str], Iterator[Sample]],
    config: str | None = None,
) -> Read:
    """Reads a benchmark from the hub's parquet files, or else from the original ones.

    make: the samples of a row of the hub's columns, which also has SPLIT. published:
    those of the original files in a folder. config: the hub's name of a configuration,
    "*" for all.
    """

    def read(source: Source, split: str) -> Iterator[Sample]:
        place = open_place(source, split, config)
        files = place.parquet(split, config)
        if not files:
            return published(place, split)
        return table_samples(
            files, place.folder, lambda values: make({**values, SPLIT: split})
        )

    return read


def is_secret(split: str) -> bool:
    """Whether a split of a challenge has no public answers."""
    return split in _SECRET


def picture(values: dict[str, Any], *keys: str) -> tuple[Any, ...]:
    """The one picture of a row; Fault where it has none."""
    for key in keys:
        if values.get(key) is not None:
            return (values[key],)
    raise Fault(f"has no picture in {' or '.join(map(repr, keys))}")
