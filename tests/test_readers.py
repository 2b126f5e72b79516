"""Foreign weight files: what is read without torch, and what is refused.

A pickle may hold anything; nothing of it may run. Headers are mutated thousands of
times: the reader gives arrays that lie in the file, or one CheckpointError.
"""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from convert.readers import read_safetensors, read_torch
from helpers import FIXTURES, assert_equal, need
from mm1_mlx.errors import CheckpointError

# --- .bin and .pt --------------------------------------------------------------------


def float_bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == np.float16 else array


def torch_file(path: Path, tree) -> Path:
    need("torch").save(tree, path)
    return path


def same_as_torch(found, tensors) -> None:
    torch = need("torch")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = found[name].read()
        if tensor.dtype == torch.bfloat16:
            assert found[name].dtype == "BF16"
            tensor = tensor.view(torch.int16)
            array = array.view(np.int16)
        assert array.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(array, tensor.detach().numpy())


def test_types_strides_shared_and_tied_tensors(tmp_path):
    torch = need("torch")
    base = torch.randn(6, 8)
    tensors = OrderedDict(
        f32=torch.randn(3, 4),
        f16=torch.randn(5).half(),
        bf16=torch.randn(2, 3, 4).bfloat16(),
        f64=torch.randn(2).double(),
        i64=torch.arange(7),
        u8=torch.arange(9, dtype=torch.uint8),
        flag=torch.tensor([True, False]),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 4),
        transposed=base.T,
        part=base[1:4, 2:5],
        every_second=base[:, ::2],
        whole=base,
        tied=base,
        parameter=torch.nn.Parameter(torch.randn(4)),
    )
    path = torch_file(tmp_path / "a.bin", tensors)
    same_as_torch(read_torch(path), tensors)


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_a_dictionary_inside_and_what_is_no_array(tmp_path, key):
    torch = need("torch")
    tensors = {"a.weight": torch.randn(2, 2), "a.bias": torch.randn(2)}
    tree = {key: tensors, "epoch": 3, "note": "text", "rates": [0.1, 0.2]}
    same_as_torch(read_torch(torch_file(tmp_path / "a.pt", tree)), tensors)


@pytest.mark.parametrize(
    "folder",
    ["llava15/original", "llava15/tower", "honeybee/last", "decoder_vicuna/bin"],
)
def test_stored_checkpoints_are_read_as_torch_reads_them(folder):
    torch = need("torch")
    for path in sorted((FIXTURES / folder).glob("*.bin")):
        tensors = torch.load(path, weights_only=True)
        same_as_torch(read_torch(path), tensors)


# --- pickles that want more ----------------------------------------------------------


class Runs:
    """Unpickles by calling something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(path: Path, data: bytes, *, compress=zipfile.ZIP_STORED, more=()) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        for name, content in more:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "function, arguments, name",
    [
        (os.system, ("touch {mark}",), r"posix\.system"),
        (eval, ("open('{mark}', 'w')",), r"builtins\.eval"),
        (exec, ("open('{mark}', 'w')",), r"builtins\.exec"),
        (open, ("{mark}", "w"), r"io\.open"),
        (getattr, (dict, "fromkeys"), r"builtins\.getattr"),
    ],
)
def test_a_pickle_that_would_run_something(tmp_path, function, arguments, name):
    mark = tmp_path / "ran"
    arguments = tuple(
        a.format(mark=mark) if isinstance(a, str) else a for a in arguments
    )
    tree = {"a": Runs(function, *arguments)}
    path = zipped(tmp_path / "a.bin", pickle.dumps(tree))
    with pytest.raises(CheckpointError, match=rf"asks to load {name}, which weights"):
        read_torch(path)
    assert not mark.exists()


def test_a_call_inside_a_call_and_through_an_allowed_name(tmp_path):
    mark = tmp_path / "ran"
    inner = Runs(os.system, f"touch {mark}")
    for tree in (
        {"a": Runs(OrderedDict, [("x", inner)])},
        [inner],
        {inner: 1} if False else {"a": [[[inner]]]},
    ):
        path = zipped(tmp_path / "a.bin", pickle.dumps(tree))
        with pytest.raises(CheckpointError, match="asks to load"):
            read_torch(path)
    assert not mark.exists()


# Opcodes by hand: a global, its arguments, REDUCE.
def called(module: str, name: str, arguments: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


@pytest.mark.parametrize(
    "data, message",
    [
        (called("torch._utils", "_rebuild_tensor_v2", b")"), "cannot be read"),
        (called("torch._utils", "_rebuild_tensor_v2", b"(NK\x00))t"), "cannot be read"),
        (called("torch", "FloatStorage", b")"), "cannot be read"),
        (b"\x80\x02X\x04\x00\x00\x00dataQ.", "reference to something that is no stor"),
        (b"\x80\x02" + b"(" * 100_000, "cannot be read"),
        (
            b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
            "no dictionary of names|can",
        ),
        (b"", "cannot be read"),
        (b"\x80\x02.", "cannot be read"),
        (b"\x80\x02N.", "no dictionary of names"),
        (b"\x80\x02}.", "no dictionary of names"),
        (b"\x80\x04\x95" + b"\xff" * 8, "cannot be read"),  # a frame of 2^64 bytes
        (b"\x80\x02\x8b\xff\xff\xff\x7f", "cannot be read"),  # a number of 2 GB
    ],
)
def test_pickles_that_make_no_sense(tmp_path, data, message):
    path = zipped(tmp_path / "a.bin", data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_torch(path)
    assert "\n" not in str(raised.value)


def deep(count: int) -> bytes:
    """() inside () inside (), so deep that to hash it ends the process."""
    return b")" + b"\x85" * count


@pytest.mark.parametrize(
    "data, message",
    [
        # To note a value under a large number made Python's unpickler reserve 16 GB.
        (b"\x80\x02}r\xff\xff\xff\x7f.", r"holds no dictionary of names"),
        (b"\x80\x02}" + deep(300_000) + b"K\x01s.", r"it has a tuple as a key"),
        (b"\x80\x02}K\x01" + deep(300_000) + b"s.", r"holds no dictionary of names"),
        # 2^40 elements to hash, or to compare
        (b"\x80\x02}(K\x01K\x02t" + b"2\x86" * 40 + b"K\x01s.", r"the operation DUP"),
        (
            b"\x80\x02}(K\x01K\x02tq\x00" + b"0h\x00h\x00\x86q\x00" * 40 + b"K\x01s.",
            r"it has a tuple as a key",
        ),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00abc.", r"it is damaged"),
        (
            b"\x80\x02}" + b"\x8b\x00\x01\x00\x00" + b"\x7f" * 256 + b"K\x01s.",
            r"too lo",
        ),
        (b"\x80\x02K\x01K\x02K\x03s.", r"int where a dict belongs"),
        (b"\x80\x02(K\x010K\x02.", r"."),
        (b"\x80\x02K\x01", r"ends too early|is damaged"),
        (b"\x80\x02(.", r"takes a value that is not there"),
        (b"\x80\x02h\x07.", r"it is damaged"),
    ],
)
def test_pickles_that_cost_or_crash(tmp_path, data, message):
    path = zipped(tmp_path / "x.bin", data)
    with pytest.raises(CheckpointError, match=message):
        read_torch(path)


def huge_tensor(shape, strides, offset=0, numel=4) -> bytes:
    """A state dict with one tensor of a storage "0" of `numel` float32."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.pid if isinstance(obj, Storage) else None

    class Storage:
        pid = None

    torch = need("torch")
    from torch._utils import _rebuild_tensor_v2

    storage = Storage()
    storage.pid = ("storage", torch.FloatStorage, "0", "cpu", numel)
    arguments = (storage, offset, shape, strides, False, OrderedDict())
    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Runs(_rebuild_tensor_v2, *arguments)})
    return out.getvalue()


@pytest.mark.parametrize(
    "shape, strides, offset, numel",
    [
        ((5,), (1,), 0, 4),
        ((4,), (2,), 0, 4),
        ((4,), (1,), 1, 4),
        ((4,), (1,), 0, 2**60),
        ((2**40, 2**40), (2**40, 1), 0, 4),
        ((4,), (2**62,), 0, 4),
        ((1,), (1,), 2**61, 4),
    ],
)
def test_a_tensor_beyond_its_storage(tmp_path, shape, strides, offset, numel):
    data = huge_tensor(shape, strides, offset, numel)
    path = zipped(tmp_path / "a.bin", data, more=[("archive/data/0", b"\0" * 16)])
    with pytest.raises(CheckpointError, match=r"'a' needs \d+ bytes, but its storage"):
        read_torch(path)


@pytest.mark.parametrize(
    "shape, strides",
    [((-1,), (1,)), ((2, 2), (1,)), ((2.0,), (1,)), (4, 1), ((True,), (1,))],
)
def test_a_tensor_without_a_sound_shape(tmp_path, shape, strides):
    data = huge_tensor(shape, strides)
    path = zipped(tmp_path / "a.bin", data, more=[("archive/data/0", b"\0" * 16)])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_torch(path)


# --- zip files that are not as torch writes them -------------------------------------


def good(tmp_path: Path) -> Path:
    torch = need("torch")
    return torch_file(tmp_path / "good.bin", {"a": torch.arange(1000.0)})


def test_zip_bombs_and_other_archives(tmp_path):
    bomb = tmp_path / "bomb.bin"
    zipped(bomb, b"\0" * 10_000_000, compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(
        CheckpointError, match=r"is compressed, which torch\.save never"
    ):
        read_torch(bomb)
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match=r"has no data\.pkl"):
        read_torch(tmp_path / "other.bin")
    script = zipped(
        tmp_path / "script.bin", b"\x80\x02}.", more=[("archive/constants.pkl", b"")]
    )
    with pytest.raises(CheckpointError, match="TorchScript program"):
        read_torch(script)
    big = zipped(
        tmp_path / "big.bin", b"\x80\x02}.", more=[("archive/byteorder", b"big")]
    )
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch(big)
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped(
            tmp_path / "twice.bin", b"\x80\x02}.", more=[("archive/data.pkl", b"x")]
        )
    with pytest.raises(CheckpointError, match="is in it twice"):
        read_torch(twice)


def test_older_formats_say_how_to_write_them_again(tmp_path):
    torch = need("torch")
    path = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"before PyTorch 1\.6.*torch\.save\("
    ) as e:
        read_torch(path)
    assert "\n" not in str(e.value)


def test_a_truncated_file_at_any_place(tmp_path):
    whole = good(tmp_path).read_bytes()
    cut = tmp_path / "cut.bin"
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_torch(cut)


def check_arrays(path: Path, found) -> None:
    """Everything that was accepted can be read, and lies inside the file."""
    size = path.stat().st_size
    for array in found.values():
        assert array.nbytes <= size or 0 in (array.strides or (1,))
        values = array.read()
        assert values.shape == array.shape
        values.reshape(-1)[-1:].sum()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, doubled, removed or moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[place] = rng.randrange(256)
            case 1:
                out[place] ^= 1 << rng.randrange(8)
            case 2:
                del out[place : place + rng.randint(1, 8)]
            case _:
                piece = out[place : place + rng.randint(1, 8)]
                out[place:place] = piece
        if not out:
            out = bytearray(b"\0")
    return bytes(out)


@pytest.mark.filterwarnings("ignore")
def test_mutated_pickles_and_archives(tmp_path):
    torch = need("torch")
    tensors = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(3).half()}
    whole = torch_file(tmp_path / "good.bin", tensors).read_bytes()
    rng, path = random.Random(0), tmp_path / "x.bin"
    accepted = 0
    for _ in range(3000):
        path.write_bytes(mutated(whole, rng))
        try:
            found = read_torch(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        check_arrays(path, found)
        accepted += 1
    assert accepted < 2900  # most mutations hit the numbers or the padding


# --- .safetensors --------------------------------------------------------------------


def write_safetensors(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_are_views_of_the_file(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}
    path = write_safetensors(tmp_path / "a.safetensors", header, values.tobytes())
    found = read_safetensors(path)["a"]
    assert_equal(found.read(), values)
    assert not found.read().flags.writeable


def test_mutated_headers(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [48, 52]},
    }
    whole = write_safetensors(tmp_path / "good", header, bytes(52)).read_bytes()
    rng, path = random.Random(1), tmp_path / "x.safetensors"
    refused = 0
    for _ in range(5000):
        data = mutated(whole[: len(whole) - 52], rng) + whole[-52:]
        path.write_bytes(data)
        try:
            found = read_safetensors(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        check_arrays(path, found)
    assert refused > 3000


def test_headers_that_name_an_array_twice_or_leave_bytes(tmp_path):
    """JSON keeps the last of two, and bytes of nobody hide where another reads."""
    one = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    text = "{" + one % (0, 4) + ", " + one % (4, 8) + "}"
    path = write_safetensors(tmp_path / "x.safetensors", text.encode(), b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"its header has 'a' twice"):
        read_safetensors(path)
    text = "{" + one % (4, 8) + "}"
    path = write_safetensors(tmp_path / "x.safetensors", text.encode(), b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"4 bytes before 'a' belong to no array"):
        read_safetensors(path)
