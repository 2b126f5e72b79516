"""Tables with tabs between the cells and a first line of names, as pandas reads them.

Cells in quotes may hold tabs, line ends and doubled quotes. (Python's csv module has a
limit for a cell that is global to the process, and pictures are above it.)
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mm1_mlx.errors import DatasetError

_MOST = 1 << 28  # bytes of a row
_CELL = re.compile(r'"((?:[^"]|"")*)"(?=\t|\r?\n|$)|([^\t\r\n]*)')


def table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows by name of column, with their places in bytes; "#": the line.

    DatasetError where the file cannot be read as such a table.
    """
    try:
        with path.open("rb") as file:
            names, line = _names(path, file), 2
            while True:
                start = file.tell()
                cells, lines = _row(path, file, line)
                if cells is None:
                    return
                if cells != [""]:
                    yield start, _named(path, names, cells, line)
                line += lines
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error


def row_at(path: Path, start: int) -> dict[str, Any]:
    """The row that begins at a place."""
    try:
        with path.open("rb") as file:
            names = _names(path, file)
            file.seek(start)
            cells, _ = _row(path, file, 0)
            return _named(path, names, cells or [], 0)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error


def _names(path: Path, file: BinaryIO) -> list[str]:
    names, _ = _row(path, file, 1)
    if not names or len(names) < 2:
        raise DatasetError(f"{path}, line 1: must hold names of columns, with tabs.")
    return [name.removeprefix("\ufeff") for name in names]


def _named(path: Path, names: list[str], cells: list[str], line: int) -> dict[str, Any]:
    if len(cells) > len(names):
        raise DatasetError(
            f"{path}, line {line}: has {len(cells)} cells, but there are {len(names)} "
            f"columns."
        )
    return {**dict(zip(names, cells, strict=False)), "#": line}


def _row(path: Path, file: BinaryIO, line: int) -> tuple[list[str] | None, int]:
    """The cells of the next row, None at the end; how many lines it has."""
    text, lines = "", 0
    while True:
        found = file.readline(_MOST)
        if not found and not text:
            return None, 0
        try:
            text += found.decode("utf-8")
        except UnicodeDecodeError:
            raise DatasetError(
                f"{path}, line {line + lines}: not UTF-8 text."
            ) from None
        lines += 1
        cells = _cells(text)
        if cells is not None:
            return cells, lines
        if not found or len(text) > _MOST:
            raise DatasetError(
                f"{path}, line {line}: a quote is opened and not closed."
            )


def _cells(text: str) -> list[str] | None:
    """The cells of a row's text; None where it goes on in the next line."""
    cells, at = [], 0
    while True:
        match = _CELL.match(text, at)
        assert match is not None, "the second form fits anything"
        quoted, plain = match.groups()
        if quoted is None and text.startswith('"', at):
            return None
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        at = match.end()
        if not text.startswith("\t", at):
            return cells
        at += 1
