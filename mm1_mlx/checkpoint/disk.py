"""What is written survives a loss of power, and nobody else writes there meanwhile."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm1_mlx.errors import CheckpointError

if sys.platform == "darwin":
    from fcntl import F_FULLFSYNC, fcntl


def flush(file: int) -> None:
    """Wait until the bytes of an open file are on the disk itself.

    On macOS fsync only hands them to the drive, which may keep them in its own memory:
    fsync(2) there names F_FULLFSYNC, which some network volumes do not have.
    """
    if sys.platform == "darwin":
        with suppress(OSError):
            fcntl(file, F_FULLFSYNC)
            return
    os.fsync(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that no other process has locked meanwhile; it must exist.

    Nothing is left in it, however the process ends. CheckpointError where another one
    has it. Where the volume knows no locks, none is held.
    """
    from fcntl import LOCK_EX, LOCK_NB, flock  # not on Windows

    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                flock(opened, LOCK_EX | LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"Another run is working in {folder}. Wait for it or stop it, or "
                    f"give another folder."
                ) from error
        yield
    finally:
        os.close(opened)


def flush_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, too: a file that was renamed."""
    with suppress(OSError):  # Windows and some network volumes cannot
        opened = os.open(folder, os.O_RDONLY)
        try:
            flush(opened)
        finally:
            os.close(opened)
