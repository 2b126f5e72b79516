"""Where a picture comes from: what the user gave -> its bytes and a name for messages.

Standard library only; no Pillow here.
"""

import base64
import binascii
import difflib
import os
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mm1_mlx.errors import ImageError

MAX_BYTES = 200_000_000
_SHOWN = 120  # characters of a name that a message repeats


def shown(name: str) -> str:
    """The name as a message repeats it: one line, not longer than a line or two."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= _SHOWN else name[: _SHOWN - 3] + "..."


def pasted_path(text: str) -> Path:
    """The path that a user meant by a string, as terminals and Finder paste it.

    Understands surrounding spaces and quotes, `~`, backslash-escaped characters and
    file:// URLs. A file that exists under the literal name wins.
    """
    literal = Path(text)
    if os.path.lexists(literal):
        return literal
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
        escaped = text
    else:
        escaped = re.sub(r"\\(.)", r"\1", text) if os.name == "posix" else text
    if text[:7].lower() == "file://":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ImageError(
                f"{shown(text)} names the machine {parts.netloc!r}, but only files of "
                f"this machine can be read: write file:///path or a plain path."
            )
        # '?' and '#' have no meaning in a file's URL that was pasted unescaped.
        return Path(unquote(text[7 + len(parts.netloc) :]))
    for candidate in (text, escaped):
        path = Path(candidate)
        if candidate[:1] == "~":
            try:
                path = path.expanduser()
            except RuntimeError:  # ~nobody: no such user
                continue
        if os.path.lexists(path):
            return path
    return Path(os.path.expanduser(escaped))


def _missing(path: Path) -> ImageError:
    """The error for a file that is not there, with the nearest name that is."""
    folder = path.parent
    if not folder.is_dir():
        return ImageError(
            f"No image file {shown(str(path))}: the folder {shown(str(folder))} does "
            f"not exist. Check the path."
        )
    names = sorted(os.listdir(folder))
    by_lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(path.name.lower(), by_lower, n=1, cutoff=0.6)
    hint = (
        f"Did you mean {shown(by_lower[near[0]])}?"
        if near
        else f"The folder {shown(str(folder.resolve()))} has no similar name."
    )
    return ImageError(f"No image file {shown(str(path))}. {hint}")


def _read_file(path: Path, max_bytes: int) -> bytes:
    name = shown(str(path))
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(
                f"{name} is a folder, but an image file was expected: name one file "
                f"in it."
            )
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(
                f"{name} is a device or pipe, but an image file was expected."
            )
        if info.st_size > max_bytes:
            raise ImageError(too_many_bytes(name, info.st_size, max_bytes))
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        try:
            raise _missing(path) from error
        except OSError:
            raise ImageError(f"No image file {name}. Check the path.") from error
    except PermissionError as error:
        raise ImageError(
            f"{name} may not be read by this user: check its permissions (on a Mac "
            f"also System Settings > Privacy & Security > Files and Folders)."
        ) from error
    except (OSError, ValueError) as error:  # name too long, null byte, not a folder
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name} cannot be read: {reason}. Check the path.") from error


def too_many_bytes(name: str, size: int, max_bytes: int) -> str:
    """The message for data over the limit of bytes."""
    return (
        f"{name} has {size:,} bytes, but at most {max_bytes:,} are read. Save it "
        f"smaller, for example as a JPEG."
    )


def _data_url(text: str) -> bytes:
    head, comma, payload = text.partition(",")
    if not comma:
        raise ImageError(
            f"The data URL {shown(text)} has no comma: expected "
            f"data:image/png;base64,... with the picture after it."
        )
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    payload = re.sub(r"\s+", "", unquote(payload))
    payload += "=" * (-len(payload) % 4)
    alphabet = b"-_" if "-" in payload or "_" in payload else None
    try:
        return base64.b64decode(payload, altchars=alphabet, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"The data URL {shown(head)},... is not valid base64 ({error}). Encode the "
            f"file's bytes with base64."
        ) from error


def read_source(
    source: object, *, allow_url: bool = False, max_bytes: int = MAX_BYTES
) -> tuple[bytes, str]:
    """The bytes of a path, URL, data URL, bytes or open binary file, and its name.

    Raises ImageError for what cannot be read, is empty or has over max_bytes.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), "The picture"  # of standard input or memory
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data, name = _data_url(source), "The data URL"
    elif isinstance(source, str) and re.match(r"\s*[a-zA-Z]+://", source):
        return _read_url(source.strip(), allow_url, max_bytes)
    elif isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if isinstance(text, bytes):
            text = os.fsdecode(text)
        if not text.strip():
            raise ImageError("The image path is empty: give the path of a file.")
        path = Path(source) if isinstance(source, Path) else None
        try:
            if path is None or not os.path.lexists(path):
                path = pasted_path(text)
        except ValueError as error:  # a null byte
            raise ImageError(f"{shown(text)} is not a path: {error}.") from error
        data, name = _read_file(path, max_bytes), shown(str(path))
    elif callable(getattr(source, "read", None)):
        data = _read_open(source, max_bytes)
        name = getattr(source, "name", None)  # that of a descriptor is a number
        name = shown(name) if isinstance(name, str) else "The open file"
        if not isinstance(data, bytes):
            raise ImageError(
                "The open file gives text, but bytes were expected: open it with 'rb'."
            )
    else:
        raise ImageError(
            f"An image of type {type(source).__name__} cannot be used: give a path, "
            f"bytes, a PIL image, or a uint8 array (H, W, 3)."
        )
    if len(data) > max_bytes:
        raise ImageError(too_many_bytes(name, len(data), max_bytes))
    if not data:
        raise ImageError(f"{name} is empty (0 bytes): it holds no picture.")
    return data, name


def _read_url(url: str, allow_url: bool, max_bytes: int) -> tuple[bytes, str]:
    scheme = url.partition(":")[0].lower()
    if scheme == "file":
        path = pasted_path(url)
        return read_source(path, max_bytes=max_bytes)
    if scheme not in ("http", "https"):
        raise ImageError(
            f"{shown(url)} is a {scheme}:// address, but only files and https:// "
            f"addresses can be read."
        )
    if not allow_url:
        raise ImageError(
            f"{shown(url)} is an address on the network, and those are off unless "
            f"asked for: add --allow-url (allow_url=True), or download the file first."
        )
    from mm1_mlx.inputs.urls import fetch  # http, ssl, socket: only when asked for

    data = fetch(url)
    if not data:
        raise ImageError(f"{shown(url)} gave 0 bytes: it holds no picture.")
    return data, shown(url)


def _read_open(file: Any, max_bytes: int) -> Any:
    """What an open file has from where it stands; it stands there again."""
    seekable = getattr(file, "seekable", None)
    place = file.tell() if callable(seekable) and seekable() else None
    data = file.read(max_bytes + 1)
    if place is not None:
        file.seek(place)
    return data
