"""Rows of parquet files, as the hub's datasets are: read a part at a time.

A row cannot be read alone, only with its row group, or at least with what stands before
it there. So the order of an epoch goes by parts: row groups in any order, and the rows
of a window of a few of them in any order. A window is what is held in memory.
"""

import hashlib
import random
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError

WINDOW = 1 << 27  # bytes of rows that are shuffled together, and held
_PART = WINDOW // 4  # bytes of a part; a larger row group has several
_OPEN = 8  # row groups that are being read
_PROBED = 64  # rows that are read to know how large they are


@dataclass(frozen=True)
class _Part:
    """Rows that are read together.

    file, group: where they stand. start: the number of the first row in its file.
    nbytes: about what they take.
    """

    file: int
    group: int
    start: int
    rows: int
    nbytes: int


class ParquetTable:
    """The rows of parquet files; kept are the places of their parts, and a window.

    Needs pyarrow. Held are WINDOW bytes of rows, and while reading a page or two of
    each column: writers put up to 1024 values into one, however large they are.
    """

    def __init__(
        self,
        files: Sequence[Path],
        wanted: Callable[[str], bool] = lambda path: True,
        check: Callable[[Path, list[str]], None] = lambda file, columns: None,
    ):
        """wanted: whether a column is read, by its path, as "image.bytes" or
        "images.list.element.path". check: raises where a file's columns will not do.
        """
        self._files, self._wanted, self._check = list(files), wanted, check
        self._arrow = _pyarrow(self._files[0])
        self._parts: list[_Part] = []
        self._starts = array("Q", [0])  # of parts, in rows of all files
        self._columns: list[list[str]] = []  # that are read of a file
        self._held: OrderedDict[int, Any] = OrderedDict()  # part -> its table
        self._bytes = 0  # of what is held
        # Row groups that are read part by part: the next part, and what gives it.
        self._readers: OrderedDict[tuple[int, int], tuple[int, Iterator]] = (
            OrderedDict()
        )
        self._lock = threading.Lock()  # batches are made in a thread of their own
        for number, file in enumerate(self._files):
            self._add(number, file)
        if not len(self):
            raise DatasetError(f"{self._files[0]} is empty: it has no rows.")

    def _add(self, number: int, file: Path) -> None:
        """The parts of a file, from its footer."""
        with _readable(file), self._open(file) as opened:
            metadata, names = opened.metadata, opened.schema_arrow.names
            paths = [opened.schema.column(k).path for k in range(len(opened.schema))]
        self._check(file, names)
        self._columns.append([path for path in paths if self._wanted(path)])
        start = 0
        for group in range(metadata.num_row_groups):
            about = metadata.row_group(group)
            if not about.num_rows:
                continue
            each = max(self._size(about) // about.num_rows, 1)
            if not self._parts:
                self._growth = self._measure(file, group, each)
            each *= self._growth
            most = max(_PART // each, 1)
            for first in range(0, about.num_rows, most):
                rows = min(most, about.num_rows - first)
                part = _Part(number, group, start + first, rows, rows * each)
                self._parts.append(part)
                self._starts.append(self._starts[-1] + rows)
            start += about.num_rows

    def _measure(self, file: Path, group: int, each: int) -> int:
        """How many times larger rows are than the footer says: where pictures repeat,
        each is stored once."""
        with _readable(file), self._open(file) as opened:
            batches = opened.iter_batches(
                batch_size=_PROBED,
                row_groups=[group],
                columns=self._columns[0],
                use_threads=False,
            )
            rows = _next(batches)
            return max(round(rows.nbytes / (rows.num_rows * each)), 1)

    def _open(self, file: Path) -> Any:
        # In small pieces: else whole columns of a row group are in memory.
        return self._arrow.ParquetFile(str(file), buffer_size=1 << 20, pre_buffer=False)

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        """The file and the row of a number, for messages."""
        number = bisect_right(self._starts, index) - 1
        part, row = self._parts[number], index - self._starts[number]
        return f"{self._files[part.file]}, row {part.start + row + 1}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """The values of all rows, in order."""
        for number in range(len(self._parts)):
            with self._lock, _readable(self.where(self._starts[number])):
                table = self._table(number)
            for first in range(0, table.num_rows, _PROBED):
                yield from table.slice(first, _PROBED).to_pylist()

    def row(self, index: int) -> dict[str, Any]:
        """The values of a row by column; DatasetError where it cannot be read."""
        number = bisect_right(self._starts, index) - 1
        row = index - self._starts[number]
        with self._lock, _readable(self.where(index)):
            return self._table(number).slice(row, 1).to_pylist()[0]

    def _size(self, group: Any) -> int:
        """What the columns that are read take in a row group, by the footer."""
        columns = [group.column(k) for k in range(group.num_columns)]
        read = [column for column in columns if self._wanted(column.path_in_schema)]
        return sum(column.total_uncompressed_size for column in read)

    def _table(self, number: int) -> Any:
        """The rows of a part. What has to be read before it in its group is held too:
        it belongs to the same window, or the one before."""
        if number not in self._held:
            key = self._group(number)
            at, reader = self._readers.pop(key, (number + 1, iter(())))
            if at > number:
                at = self._first_of_group(number)
                reader = self._read_group(at)
            while at <= number:
                self._hold(at, next(reader))
                at += 1
            if at < len(self._parts) and self._group(at) == key:
                self._readers[key] = at, reader
            while len(self._readers) > _OPEN:
                self._readers.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]

    def _group(self, number: int) -> tuple[int, int]:
        return self._parts[number].file, self._parts[number].group

    def _first_of_group(self, number: int) -> int:
        first = number
        while first and self._group(first - 1) == self._group(number):
            first -= 1
        return first

    def _read_group(self, first: int) -> Iterator[Any]:
        """Tables of the parts of a row group, in order."""
        from pyarrow import Table

        begin = self._parts[first]
        with self._open(self._files[begin.file]) as opened:
            batches = opened.iter_batches(
                batch_size=begin.rows,
                row_groups=[begin.group],
                columns=self._columns[begin.file],
                use_threads=False,
            )
            left = _next(batches)
            for number in range(first, len(self._parts)):
                if self._group(number) != self._group(first):
                    return
                pieces, missing = [], self._parts[number].rows
                while missing:
                    left = left if left.num_rows else _next(batches)
                    pieces.append(left.slice(0, missing))
                    left = left.slice(pieces[-1].num_rows)
                    missing -= pieces[-1].num_rows
                yield Table.from_batches(pieces)

    def _hold(self, number: int, table: Any) -> None:
        if number not in self._held:
            self._bytes += self._parts[number].nbytes
        self._held[number] = table
        while self._bytes > WINDOW and len(self._held) > 1:
            oldest, _ = self._held.popitem(last=False)
            self._bytes -= self._parts[oldest].nbytes

    def shuffled(self, rng: random.Random) -> array:
        """Every number once: row groups in any order, then the rows of each window."""
        groups: list[list[int]] = []
        for number in range(len(self._parts)):
            if number and self._group(number) == self._group(number - 1):
                groups[-1].append(number)
            else:
                groups.append([number])
        rng.shuffle(groups)
        order, window, size = array("Q"), array("Q"), 0
        for number in (number for group in groups for number in group):
            if window and size + self._parts[number].nbytes > WINDOW:
                rng.shuffle(window)  # type: ignore[arg-type]
                order.extend(window)
                window, size = array("Q"), 0
            window.extend(range(self._starts[number], self._starts[number + 1]))
            size += self._parts[number].nbytes
        rng.shuffle(window)  # type: ignore[arg-type]
        return order + window

    def fingerprint(self) -> dict[str, Any]:
        """The files by their sizes and footers, which tell how long each column is and
        what its least and largest values are."""
        digest = hashlib.sha256()
        for path in self._files:
            with _readable(path), path.open("rb") as file:
                end = file.seek(-8, 2) + 8
                footer = int.from_bytes(file.read(4), "little")
                file.seek(-min(footer + 8, end), 2)
                digest.update(end.to_bytes(8, "little") + file.read(footer))
        return {"samples": len(self), "sha256": digest.hexdigest()[:16]}


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DatasetError(
            f"{file} is a parquet file, and reading it needs one more package: pip "
            f"install pyarrow (or 'mm1_mlx[train]')."
        ) from None
    return pyarrow.parquet


def _next(batches: Iterator[Any]) -> Any:
    for batch in batches:
        return batch
    raise EOFError("it has fewer rows than its footer says")


@contextmanager
def _readable(where: Path | str) -> Iterator[None]:
    """What pyarrow says of a damaged file, as a DatasetError."""
    try:
        yield
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # pyarrow's own kinds, OSError, ValueError
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DatasetError(
            f"{where}: cannot be read as parquet ({reason}). Download or write it "
            f"again."
        ) from error
