"""The answers of an evaluation on the disk, so that it can go on where it stopped.

One JSON object a line: the settings that decide the answers, then a record for each
sample. While a run goes on, records stand in the order of its batches; a finished file
is written once more, in the order of the samples and with their scores.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.disk import flush
from mm1_mlx.checkpoint.folder import replacing_file
from mm1_mlx.errors import DatasetError

_FORMAT = "mm1_mlx evaluation 1"
_FLUSH = 5.0  # seconds of answers that a loss of power may cost
_SHOWN = 40  # characters of a setting that a message repeats

Record = dict[str, Any]


class Journal:
    """The file of one task's answers; `records` are those it holds, by sample.

    settings: what decides the answers. A file with other ones is refused, unless
    force, which starts anew. A last line that was cut off is dropped.

    Raises DatasetError for a file that is not ours, or one of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], force: bool = False):
        self.path, self._settings = path, as_kept(settings)
        self.records: dict[str, Record] = {}
        whole = 0
        if path.exists() and not force:
            whole = self._read()
        self._file = path.open("r+b" if whole else "wb", buffering=0)
        self._file.truncate(whole)
        self._file.seek(whole)
        self._flushed = time.monotonic()
        if not whole:
            self._write([self._header()])

    def _header(self) -> Record:
        return {"format": _FORMAT, "settings": self._settings}

    def _read(self) -> int:
        """Take in a file's records; how many of its bytes are whole lines."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if not whole:
            return self._cut_header(data)
        lines = data[:whole].splitlines()
        self._check(self._parsed(lines[0], 1))
        for number, line in enumerate(lines[1:], 2):
            record = self._parsed(line, number)
            if not all(isinstance(record.get(key), str) for key in ("id", "answer")):
                raise DatasetError(
                    f"{self.path}, line {number} is no record of a sample, with 'id' "
                    f"and 'answer': the file is damaged. --force starts it anew."
                )
            self.records.pop(record["id"], None)  # the last one stands last
            self.records[record["id"]] = record
        return whole

    def _cut_header(self, data: bytes) -> int:
        """A file without one whole line: its run ended at once, or it is foreign."""
        if not _line(self._header()).encode().startswith(data[: len(_FORMAT)]):
            raise DatasetError(
                f"{self.path} is not a file of this command. Give another --output."
            )
        return 0

    def _parsed(self, line: bytes, number: int) -> Record:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DatasetError(
                f"{self.path}, line {number} is not a JSON object: the file is "
                f"damaged. --force starts it anew."
            )
        return found

    def _check(self, header: Record) -> None:
        if header.get("format") != _FORMAT:
            raise DatasetError(
                f"{self.path} is not a file of this command (its first line has no "
                f"'{_FORMAT}'). Give another --output."
            )
        there = header.get("settings", {})
        names = sorted(set(there) | set(self._settings))
        other = [n for n in names if there.get(n) != self._settings.get(n)]
        if other:
            listed = ", ".join(
                f"{n} ({_short(there.get(n))} there, {_short(self._settings.get(n))} "
                f"now)"
                for n in other
            )
            raise DatasetError(
                f"{self.path} was begun with other settings: {listed}. Give them "
                f"again, or another --output; --force starts it anew."
            )

    def add(self, records: Sequence[Record]) -> None:
        """Append the records of a batch, in one piece."""
        for record in records:
            self.records.pop(record["id"], None)
            self.records[record["id"]] = record
        self._write(records)

    def _write(self, objects: Iterable[Record]) -> None:
        data = memoryview("".join(f"{_line(o)}\n" for o in objects).encode())
        while data:
            data = data[os.write(self._file.fileno(), data) :]
        if time.monotonic() - self._flushed >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        flush(self._file.fileno())
        self._flushed = time.monotonic()

    def finish(self, records: Sequence[Record]) -> None:
        """The whole file anew: these records in this order, then what else it held."""
        chosen = {record["id"] for record in records}
        others = [r for name, r in self.records.items() if name not in chosen]
        lines = [self._header(), *records, *others]
        with replacing_file(self.path) as new:
            new.write_text("".join(f"{_line(o)}\n" for o in lines), encoding="utf-8")
        self.close()

    def last(self) -> str | None:
        """The sample of the last line."""
        return next(reversed(self.records), None)

    def close(self) -> None:
        """What was added is on the disk."""
        if not self._file.closed:
            self._flush()
            self._file.close()


def as_kept(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(_line(value))


def _line(value: Any) -> str:
    """JSON as people read it; half a character of a name is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
