"""Names and lazy arrays of a checkpoint: .safetensors, and .bin/.pt without torch.

Nothing in a file is trusted and nothing in it is run. A pickle is read by a machine of
our own (unpickle.py) that knows the few names and operations that weights need; every
other one is refused. Arrays are
views of the mapped file, so reading one costs no memory until it is copied.
"""

import mmap
import struct
import zipfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.checkpoint.safetensors import ITEM_SIZES, read_header
from mm1_mlx.errors import CheckpointError

from .unpickle import RefusedError, UnpickleError, unpickle

MAX_PICKLE = 256 << 20  # bytes of data.pkl; that of a 70B model has 2 MB
MAX_TENSORS = 1_000_000

# Type names as safetensors writes them -> NumPy. bfloat16 has none: its bits.
NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16,
    "I16": np.int16, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32,
    "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64,
    "F64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class LazyArray:
    """One array of a file, not read yet.

    dtype: its type's name as in safetensors ("BF16"). strides: of its elements, None
    where they lie in order. start: of its storage, bytes from the file's beginning;
    length: of the storage in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: "MappedFile" = field(repr=False)
    start: int
    length: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    def read(self) -> np.ndarray:
        """A read-only view of the file; bfloat16 as its bits, in uint16."""
        kind = np.dtype(NUMPY[self.dtype]).newbyteorder("<")
        if prod(self.shape) == 0:
            return np.zeros(self.shape, kind)
        if self.strides is None:
            return np.ndarray(self.shape, kind, self.file.buffer(), self.start)
        size = kind.itemsize
        steps = tuple(step * size for step in self.strides)
        return np.ndarray(self.shape, kind, self.file.buffer(), self.start, steps)


class MappedFile:
    """A file that is mapped when its first array is read."""

    def __init__(self, path: Path):
        self.path = path
        self._map: mmap.mmap | None = None

    def buffer(self) -> mmap.mmap:
        """The file's bytes; CheckpointError where it cannot be read."""
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{self.path} cannot be read: {error}."
                ) from error
        return self._map


def read_safetensors(path: Path) -> dict[str, LazyArray]:
    """The arrays of a .safetensors file by name; its header is checked first."""
    infos = read_header(path)
    with path.open("rb") as file:
        base = 8 + struct.unpack("<Q", file.read(8))[0]
    mapped = MappedFile(path)
    return {
        name: LazyArray(i.dtype, i.shape, mapped, base + i.start, i.stop - i.start)
        for name, i in infos.items()
    }


# --- .bin and .pt: the zip format of torch.save -----------------------------------

_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch's magic, pickled
_STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16",
    "BFloat16Storage": "BF16", "LongStorage": "I64", "IntStorage": "I32",
    "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "float": "F32", "half": "F16", "double": "F64", "long": "I64",
    "int": "I32", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Dtype:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    """What a persistent id of a pickle stands for."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> dict[str, LazyArray]:
    """The arrays of a file that torch.save wrote, by name. torch is not needed.

    The file holds a dictionary of names to arrays, or has one under "state_dict",
    "model", "module" or "model_state_dict". Everything in it that is not an array is
    passed over. CheckpointError for other files, older formats, and pickles that name
    anything but arrays: nothing of those is run.
    """
    archive = _Archive(path)
    tree = _unpickle(path, archive)
    tensors = _named(path, tree)
    return {name: archive.array(name, tensor) for name, tensor in tensors.items()}


class _Archive:
    """The zip around a pickle and its storages; nothing in it may be compressed."""

    def __init__(self, path: Path):
        self.path = path
        self._mapped = MappedFile(path)
        try:
            with path.open("rb") as file:
                start = file.read(len(_LEGACY))
                file.seek(0, 2)
                self.size = file.tell()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}."
            ) from error
        if start == _LEGACY or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise CheckpointError(
                f"{path} is in the format of before PyTorch 1.6, which only torch "
                f'reads. Write it again where torch is installed: python -c "import '
                f"torch; f = '{path}'; torch.save(torch.load(f, weights_only=True), f)"
                f'"'
            )
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise self.broken(f"it is no whole zip archive ({error})") from error
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            if entry.filename in self._entries:
                raise self.broken(f"{entry.filename!r} is in it twice")
            self._entries[entry.filename] = entry
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise self.broken("it has no data.pkl, so torch.save did not write it")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if self.prefix + "constants.pkl" in self._entries:
            raise self.broken("it is a TorchScript program; only weights are read")
        order = self._entries.get(self.prefix + "byteorder")
        if order is not None and self.bytes_of(order, 16) != b"little":
            raise self.broken("its numbers are big-endian")

    def broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a sound PyTorch file: {why}.")

    def pickle(self) -> bytes:
        return self.bytes_of(self._entries[self.prefix + "data.pkl"], MAX_PICKLE)

    def bytes_of(self, entry: zipfile.ZipInfo, limit: int) -> bytes:
        start, length = self._place(entry)
        if length > limit:
            raise self.broken(
                f"{entry.filename!r} has {length} bytes, more than {limit} are not read"
            )
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def _place(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Where an entry's bytes lie in the file; they are stored as they are."""
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise self.broken(f"{name!r} is compressed, which torch.save never does")
        if entry.file_size != entry.compress_size:
            raise self.broken(f"{name!r} has two different sizes")
        head = b""
        if 0 <= entry.header_offset < self.size:
            with self.path.open("rb") as file:
                file.seek(entry.header_offset)
                head = file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise self.broken(f"{name!r} does not lie where its directory says")
        names, extra = struct.unpack("<HH", head[26:30])
        start = entry.header_offset + 30 + names + extra
        if start + entry.file_size > self.size:
            raise self.broken(f"{name!r} is cut off; download or copy the file again")
        return start, entry.file_size

    def array(self, name: str, tensor: _Tensor) -> LazyArray:
        """The array that a tensor of the pickle describes, if it is all there."""
        storage = tensor.storage
        entry = self._entries.get(f"{self.prefix}data/{storage.key}")
        if entry is None:
            raise self.broken(f"the numbers of {name!r} are missing")
        start, length = self._place(entry)
        item = ITEM_SIZES[storage.dtype]
        shape, strides = tensor.shape, tensor.strides
        last = tensor.offset
        if prod(shape):
            last += sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            if (last + 1) * item > length or storage.numel * item > length:
                raise self.broken(
                    f"{name!r} needs {(last + 1) * item} bytes, but its storage has "
                    f"{length}"
                )
        start += tensor.offset * item
        ordered = strides == _strides(shape)
        return LazyArray(
            storage.dtype, shape, self._mapped, start, length,
            None if ordered else strides,
        )  # fmt: skip


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    return tuple(reversed(steps))


def _size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    good = isinstance(storage, _Storage) and _size(offset)
    good = good and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (good and len(shape) == len(strides) and all(map(_size, shape + strides))):
        raise UnpickleError("a tensor without a sound storage, shape, strides")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_) -> Any:
    return data


def _rebuild_size(shape=()) -> tuple:
    if not isinstance(shape, tuple | list):
        raise UnpickleError("a size that is no tuple")
    return tuple(shape)


def _ordered(*arguments) -> dict:
    """A dictionary that is filled later, as Python 3 writes it."""
    if arguments:
        raise UnpickleError("an OrderedDict that is not written by Python 3")
    return {}


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): _rebuild_size,
    **{("torch", name): _StorageType(kind) for name, kind in _STORAGES.items()},
    **{("torch.storage", name): _StorageType(kind) for name, kind in _STORAGES.items()},
    **{("torch", name): _Dtype(kind) for name, kind in _DTYPES.items()},
}


def _find(module: str, name: str) -> Any:
    try:
        return _ALLOWED[module, name]
    except KeyError:
        raise RefusedError(f"{module}.{name}") from None


def _persistent(pid: Any) -> _Storage:
    match pid:
        case ("storage", _StorageType(dtype), str(key), _, int(numel)) if (
            numel >= 0 and "/" not in key
        ):
            return _Storage(dtype, key, numel)
    raise UnpickleError("a reference to something that is no storage")


def _unpickle(path: Path, archive: _Archive) -> Any:
    try:
        return unpickle(archive.pickle(), _find, _persistent)
    except RefusedError as error:
        raise CheckpointError(
            f"{path} asks to load {error}, which weights do not need. Nothing of it "
            f"was run. If you trust the file, save its state_dict() alone with torch."
        ) from None
    except UnpickleError as error:
        raise archive.broken(f"its data.pkl cannot be read ({error})") from error


_INSIDE = ("state_dict", "model_state_dict", "model", "module")


def _named(path: Path, tree: Any) -> dict[str, _Tensor]:
    """The tensors of the dictionary that holds them."""
    for _ in range(4):
        if not isinstance(tree, dict):
            break
        if any(isinstance(value, _Tensor) for value in tree.values()):
            break
        inner = [tree[key] for key in _INSIDE if isinstance(tree.get(key), dict)]
        if len(inner) != 1:
            break
        tree = inner[0]
    found = {}
    if isinstance(tree, dict):
        found = {k: v for k, v in tree.items() if isinstance(v, _Tensor)}
    if not found or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{path} holds no dictionary of names to arrays. Expected is what "
            f"torch.save(model.state_dict(), ...) writes."
        )
    return found
