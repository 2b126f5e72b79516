"""From the rows of a file to samples; what is wrong with rows, all of it at once."""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.samples import Sample

SHOWN = 5  # problems that a message names
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 2, 4, 4
_SHORT.maxstring = _SHORT.maxother = 60
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# A place ("a.json, entry 3"), and what stands there.
Row = tuple[str, Any]


class Fault(Exception):
    """What is wrong with one row."""


def samples_of(
    rows: Callable[[], Iterable[Row]],
    make: Callable[[Any], Iterable[Sample]],
    what: str,
) -> Iterator[Sample]:
    """The samples of all rows, each with its place in fields["where"].

    All rows are checked before the first sample is given, so `rows` is called twice.
    make: the samples of a row, some or none; Fault where it cannot be used. what: what
    was read, for messages. An id that comes again gets a number.
    """
    faults: list[str] = []
    count, found = 0, False
    for where, values in rows():
        count += 1
        try:
            found = bool(list(make(values))) or found
        except Fault as fault:
            faults.append(f"{where}: {fault}")
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            faults.append(f"{where}: a value of the wrong type ({shown(str(error))})")
    if faults:
        raise DatasetError(_summary(faults, count, what))
    if not found:
        raise DatasetError(f"{what} holds no samples.")
    return _numbered(rows, make)


def _summary(faults: list[str], count: int, what: str) -> str:
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return (
        f"{what}: {len(faults)} of {count} cannot be used. "
        f"{'; '.join(faults[:SHOWN])}{more}."
    )


def _numbered(
    rows: Callable[[], Iterable[Row]], make: Callable[[Any], Iterable[Sample]]
) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for where, values in rows():
        for sample in make(values):
            seen[sample.id] = again = seen.get(sample.id, 0) + 1
            name = sample.id if again == 1 else f"{sample.id}#{again}"
            yield replace(sample, id=name, fields={**sample.fields, "where": where})


# --- values of a row -----------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as a message shows it, without reading all of what may be endless."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first(values: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that is there and not None; Fault where none is."""
    for key in keys:
        if values.get(key) is not None:
            return values[key]
    names = " or ".join(map(repr, keys))
    raise Fault(f"has no {names}, only {sorted(map(str, values))[:8]}")


def text(values: Mapping[str, Any], *keys: str, empty: bool = False) -> str:
    """A text; Fault for anything else, and for "" unless `empty`."""
    value = first(values, *keys)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise Fault(f"{keys[0]!r} is {shown(value)}, but must be a text")
    return value


def name(values: Mapping[str, Any], *keys: str) -> str:
    """An id: a text or a whole number, as text."""
    value = first(values, *keys)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a table made of a column with gaps
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise Fault(f"{keys[0]!r} is {shown(value)}, but must be a text or a number")
    return str(value)


def is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with: no NaN, nothing huge."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good and abs(value) < 1e12


def texts(values: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """A list of texts, at least one; a single text and {"answer": ...} will do."""
    value = first(values, *keys)
    listed = value if isinstance(value, list) else [value]
    listed = [v.get("answer") if isinstance(v, dict) else v for v in listed]
    found = tuple(v for v in listed if isinstance(v, str))
    if not found or len(found) < len(listed):
        raise Fault(f"{keys[0]!r} is {shown(value)}, but must be a list of texts")
    return found


def letter(values: Mapping[str, Any], key: str, choices: int) -> str:
    """The letter of the right choice, which is given as letter or as its number."""
    value = first(values, key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a table made of a column with gaps
    found = str(value).strip()
    if found.isascii() and found.isdigit() and int(found) < choices:
        return LETTERS[int(found)]
    if len(found) == 1 and found.upper() in LETTERS[:choices]:
        return found.upper()
    raise Fault(f"{key!r} is {shown(value)}, but must name one of {choices} choices")


def choices(values: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """At least two choices."""
    found = texts(values, *keys)
    if not 2 <= len(found) <= len(LETTERS):
        raise Fault(f"{keys[0]!r} has {len(found)} choices, but must have 2 to 26")
    return found


def kept(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of the keys that have a value."""
    return {key: values[key] for key in keys if values.get(key) is not None}


# --- files ---------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds; DatasetError names the line where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON "
            f"({error.msg}). Download it again."
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or too deep
        raise DatasetError(f"{path} is not JSON: {shown(str(error))}.") from error


def entries(path: Path, values: Any, key: str | None = None) -> Callable[[], list[Row]]:
    """The rows of a JSON list, or of the list that is called `key` in an object."""
    listed = values
    if key is not None:
        listed = values.get(key) if isinstance(values, dict) else None
    if not isinstance(listed, list):
        wanted = "one JSON list" if key is None else f"an object with the list {key!r}"
        raise DatasetError(f"{path} must hold {wanted}, but holds {shown(values)}.")
    places = f"{path}, entry " if key is None else f"{path}, entry of {key!r} "
    return lambda: [(f"{places}{n}", _object(v)) for n, v in enumerate(listed, 1)]


def json_lines(path: Path) -> Callable[[], Iterator[Row]]:
    """The rows of a file with a JSON object in every line; a broken line is a row that
    cannot be used."""

    def rows() -> Iterator[Row]:
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}, line {number}", _parsed(line)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error

    return rows


class Broken(dict):
    """A row that is no JSON object. Every use of it is a Fault."""

    def __init__(self, reason: str):
        self.reason = reason

    def get(self, *_: Any) -> Any:
        """Fault."""
        raise Fault(self.reason)

    __getitem__ = get


def _parsed(line: bytes) -> dict:
    try:
        return _object(json.loads(line.decode("utf-8-sig")))
    except json.JSONDecodeError as error:
        at = f"character {error.pos + 1}"
        return Broken(f"not a JSON object ({error.msg}, {at})")
    except (ValueError, RecursionError):
        return Broken("not a JSON object (not UTF-8 text, or too deep)")


def _object(value: Any) -> dict:
    if isinstance(value, dict):
        return value
    return Broken(f"not a JSON object but {shown(value)}")


def merged(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The row with more values; one that is no object stays what it is."""
    return row if isinstance(row, Broken) else {**row, **more}
