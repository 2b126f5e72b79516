"""Pictures of datasets: found by name within a folder, opened when they are used."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mm1_mlx.errors import ImageError
from mm1_mlx.evaluation.datasets.rows import Fault, shown
from mm1_mlx.inputs.sources import MAX_BYTES

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class Stored:
    """A picture inside of another file, as a source for `load_image`.

    `read` gives its bytes, all of them each time. name: where it stands.
    """

    def __init__(self, name: str, load: Callable[[int], bytes]):
        """load: at most so many bytes of it."""
        self.name = name
        self._load = load

    def read(self, size: int = -1) -> bytes:
        """The bytes, at most `size` of them."""
        found = self._load(MAX_BYTES + 1 if size < 0 else size)
        return found if size < 0 else found[:size]

    def __repr__(self) -> str:
        return f"Stored({self.name!r})"


def relative(name: str) -> str:
    """A name from a dataset as a path that stays within its folder; else Fault."""
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    leads_out = name.startswith("/") or ".." in parts or "\0" in name
    if not parts or leads_out or ":" in parts[0]:  # C:, https:
        raise Fault(
            f"the picture {shown(name)} is not a path within the dataset's folder"
        )
    return "/".join(parts)


class Pictures:
    """The pictures of a dataset's folder, as files or in zip archives beside them.

    Links are followed: people link the folders of COCO, and the hub's cache has links
    alone. Names that lead out of the folder are refused.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[str, frozenset[str]] = {}
        self._members: dict[str, tuple[Path, int]] | None = None

    def find(self, name: object, *folders: str | Path) -> Path | Stored:
        """The picture of this name in the first of the folders that has it.

        folders: from the dataset's folder; "" is that itself. Fault where none has it.
        """
        if not isinstance(name, str) or not name:
            raise Fault(f"the picture's name is {shown(name)}, but must be a text")
        path = relative(name)
        inside, _, file = path.rpartition("/")
        for folder in folders or ("",):  # as text: a Path takes longer than the rest
            place = os.path.join(self.folder, folder, inside)
            if file in self._names(place):
                return Path(place, file)
        for folder in folders or ("",):
            if stored := self._zipped(str(PurePosixPath(folder) / path)):
                return stored
        looked = str(self.folder)
        if any(folders):
            looked = f"{', '.join(str(f) or '.' for f in folders)} of {looked}"
        raise Fault(f"there is no picture {shown(name)} in {looked}")

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._listed:
            try:
                names = frozenset(os.listdir(folder))
            except OSError:
                names = frozenset()
            self._listed[folder] = names
        return self._listed[folder]

    def _zipped(self, name: str) -> Stored | None:
        if self._members is None:
            self._members = {}
            for archive in sorted(self.folder.glob("*.zip")):
                self._add(archive)
        if name not in self._members:
            return None
        archive, size = self._members[name]
        where = f"{archive}: {name}"
        if size > MAX_BYTES:
            raise Fault(
                f"{where} has {size:,} bytes, but at most {MAX_BYTES:,} are read"
            )
        return Stored(where, lambda limit: _unzipped(archive, name, limit))

    def _add(self, archive: Path) -> None:
        assert self._members is not None
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    if not member.is_dir():
                        self._members.setdefault(
                            member.filename, (archive, member.file_size)
                        )
        except (OSError, zipfile.BadZipFile):
            return  # not an archive: what is missing then is said of the picture


def _unzipped(archive: Path, name: str, limit: int) -> bytes:
    """At most so many bytes, whatever the archive says of their number."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(name) as member:
            return member.read(limit)
    except Exception as error:  # zipfile's own kinds, zlib's, OSError, RuntimeError
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ImageError(
            f"{name} in {archive} cannot be read ({reason}). Download it again."
        ) from error
