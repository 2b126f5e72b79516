"""Samples in JSON files, of which only the places of the samples are kept in memory."""

import hashlib
import json
import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mm1_mlx.errors import DatasetError
from mm1_mlx.training.samples import Sample, parse_sample, shuffle

COMPARED = 64  # samples whose pictures a fingerprint covers
_CHUNK = 1 << 24  # bytes of a list that are scanned at a time
_MOST = 1 << 28  # bytes of one entry of a list
_SPACE = re.compile(r"[ \t\r\n]*")


class _JsonFile:
    """What both kinds of files share."""

    what = "line"

    def __init__(self, file: Path, folder: Path | None = None):
        """folder: what paths of pictures start from; None for the file's own."""
        self.file = file
        self._folder = folder or file.parent
        self._starts, self._numbers = array("Q"), array("Q")
        try:
            with file.open("rb") as opened:
                self._scan(opened)
        except OSError as error:
            raise DatasetError(f"{file} cannot be read: {error.strerror}.") from error
        if not self._starts:
            raise DatasetError(f"{file} is empty: one JSON object a {self.what}.")

    def _scan(self, opened: BinaryIO) -> None:
        raise NotImplementedError

    def _text(self, opened: BinaryIO, index: int) -> bytes:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        """A sample; DatasetError names the line where it is none."""
        where = f"{self.file}, {self.what} {self._numbers[index]}"
        try:
            with self.file.open("rb") as opened:
                opened.seek(self._starts[index])
                text = self._text(opened, index)
        except OSError as error:
            raise DatasetError(f"{where}: cannot be read: {error.strerror}.") from error
        return parse_sample(_json(text, where), self._folder, where)

    def shuffled(self, rng: random.Random) -> array:
        """Every number once, in any order."""
        return shuffle(len(self), rng)

    def fingerprint(self, pictures: int = COMPARED) -> dict[str, Any]:
        """The file by its bytes, and the pictures of so many samples spread over it."""
        digest = hashlib.sha256()
        with self.file.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {
            "samples": len(self),
            "sha256": digest.hexdigest()[:16],
            "pictures": self._pictures(pictures),
        }

    def _pictures(self, most: int) -> str:
        """A digest of the picture files of at most so many samples."""
        digest, count = hashlib.sha256(), min(len(self), most)
        for number in range(count):
            sample = self[number * len(self) // count]
            parts = [m["content"] for m in sample.messages]
            held = [p.get("image") for x in parts if isinstance(x, list) for p in x]
            for image in [*sample.images, *held]:
                if isinstance(image, Path):  # what stands in the file is compared there
                    digest.update(_bytes(image, sample.where))
        return digest.hexdigest()[:16]


class JsonLines(_JsonFile):
    """The samples of a file with a JSON object in every line."""

    def _scan(self, opened: BinaryIO) -> None:
        start = 0
        for number, line in enumerate(opened, 1):
            if line.strip():
                self._starts.append(start)
                self._numbers.append(number)
            start += len(line)

    def _text(self, opened: BinaryIO, index: int) -> bytes:
        return opened.readline()


class JsonList(_JsonFile):
    """The samples of a file that is one JSON list, as LLaVA's are.

    It is scanned once, at about 100 MB a second, a part at a time; an entry may have up
    to 256 MB.
    """

    what = "entry"

    def _scan(self, opened: BinaryIO) -> None:
        self._ends = array("Q")
        # Every byte as one character: places in the text are places in the file, and
        # the bytes of a letter beyond ASCII can only stand inside of strings.
        text = opened.read(_CHUNK).decode("latin-1")
        at = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
        if text[at : at + 1] != "[":
            raise DatasetError(
                f"{self.file} begins with {text[at : at + 20]!r}, but must be one JSON "
                f"list, or have a JSON object in every line."
            )
        base, at, first = 0, at + 1, True
        while True:
            base, at, text = self._refill(opened, base, at, text)
            if text[at : at + 1] == "]" and first:
                return
            end, base, at, text = self._entry(opened, base, at, text)
            self._starts.append(base + at)
            self._ends.append(base + end)
            self._numbers.append(len(self._starts))
            base, at, text = self._refill(opened, base, end, text)
            if text[at : at + 1] == "]":
                return
            if text[at : at + 1] != ",":
                found = repr(text[at : at + 20]) if text[at:] else "the file's end"
                raise DatasetError(
                    f"{self.file}, after entry {len(self._starts)}: {found}, but must "
                    f"be ',' or ']': the file is damaged or was cut off."
                )
            at, first = at + 1, False

    def _refill(
        self, opened: BinaryIO, base: int, at: int, text: str
    ) -> tuple[int, int, str]:
        """The next character that is no space: its place, with more text behind it."""
        at = _skip(text, at)
        if len(text) - at > _CHUNK >> 8:
            return base, at, text
        while more := opened.read(_CHUNK):
            base, text, at = base + at, text[at:] + more.decode("latin-1"), 0
            if (at := _skip(text, at)) < len(text):
                break
        return base, at, text

    def _entry(
        self, opened: BinaryIO, base: int, at: int, text: str
    ) -> tuple[int, int, int, str]:
        """Where the entry that begins at `at` ends; with as much text as that needs."""
        decoder, size = json.JSONDecoder(), _CHUNK
        while True:
            try:
                return decoder.raw_decode(text, at)[1], base, at, text
            except RecursionError as error:
                raise self._broken("it is too deep") from error
            except ValueError as error:
                cut = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string")
                    or error.pos > len(text) - 16
                )
                more = opened.read(size) if cut and size <= _MOST else b""
                if not more:
                    raise self._broken(str(getattr(error, "msg", error))) from error
                base, text, at = base + at, text[at:] + more.decode("latin-1"), 0
                size *= 2

    def _broken(self, reason: str) -> DatasetError:
        return DatasetError(
            f"{self.file}, entry {len(self._starts) + 1}: not a JSON object ({reason})."
        )

    def _text(self, opened: BinaryIO, index: int) -> bytes:
        return opened.read(self._ends[index] - self._starts[index])


def open_json(file: Path, folder: Path | None = None) -> JsonLines | JsonList:
    """The samples of a .json file: one list, or a JSON object in every line.

    folder: what paths of pictures start from; None for the file's own.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from error
    return (JsonLines if start[:1] in (b"{", b"") else JsonList)(file, folder)


class Joined:
    """The samples of several JSON files, one after the other."""

    def __init__(self, parts: Sequence[_JsonFile]):
        self._parts, self._starts = parts, array("Q", [0])
        for part in parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        """A sample of the part that holds this number."""
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]

    def shuffled(self, rng: random.Random) -> array:
        """Every number once, in any order."""
        return shuffle(len(self), rng)

    def fingerprint(self) -> dict[str, Any]:
        """Of all parts together."""
        each = max(COMPARED // len(self._parts), 1)
        found = [part.fingerprint(each) for part in self._parts]
        digest = hashlib.sha256(json.dumps(found).encode())
        return {"samples": len(self), "sha256": digest.hexdigest()[:16]}


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _bytes(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{where}: {path}: {error.strerror}.") from error


def _json(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{where}: not a JSON object ({error.msg}, character {error.pos + 1})."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(values, dict):
        raise DatasetError(f"{where}: not a JSON object but {str(values)[:40]!r}.")
    return values
