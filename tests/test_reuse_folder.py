"""Prefixes on the disk: another process goes on, and nothing there is trusted."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from small import SmallProcessor, small_model
from test_reuse import SHORT, SHOTS, Work, plain

from helpers import assert_fails, clean_environment, need_tiny, run_cli
from mm1_mlx import Reuse
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inference.generation import generate
from mm1_mlx.inference.identity import _odd, _row_sums, identity
from mm1_mlx.inference.prefix_folder import _digest, _packed, _unpacked


def ask(folder, more="", *, model=None, images=(1, 2), **settings):
    """An answer of a new process, as far as reuse can know: nothing is in memory."""
    store = Reuse(folder=folder, **settings)
    model = model or small_model()
    prompt = f"{SHOTS} {more}"
    found = generate(
        model, SmallProcessor(), prompt, list(images), reuse=store, **SHORT
    )
    expected = plain(model, SmallProcessor(), prompt, list(images), **SHORT)
    assert found.token_ids == expected.token_ids
    return found


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir())


def test_another_process_goes_on(tmp_path, monkeypatch):
    ask(tmp_path, "50 51")
    work = Work(monkeypatch)
    found = ask(tmp_path, "60")
    assert found.reused_tokens == 24
    # One token was read, no picture was encoded; the rest is the run to compare with.
    assert work.since() == (0 + 2, 1 + 25)
    assert len(files(tmp_path)) == 2  # the second holds only what is new
    sizes = sorted(path.stat().st_size for path in files(tmp_path))
    assert sizes[0] < sizes[1]
    # Both go on: the first from one file, the second from two.
    assert ask(tmp_path, "50 51 7").reused_tokens == 26
    talk = f"60 {' '.join(map(str, found.token_ids))} 7"
    assert ask(tmp_path, talk).reused_tokens == 24 + 12


def test_the_same_again_writes_nothing(tmp_path):
    ask(tmp_path)
    before = [(path, path.stat().st_ino) for path in files(tmp_path)]
    ask(tmp_path)
    assert [(path, path.stat().st_ino) for path in files(tmp_path)] == before


def test_a_processs_memory_and_the_folder_go_together(tmp_path):
    model, store = small_model(), Reuse(folder=tmp_path)
    for more, reused in (("50", 0), ("50", 24), ("60", 24), ("60 61", 25)):
        prompt = f"{SHOTS} {more}"
        found = generate(model, SmallProcessor(), prompt, [1, 2], reuse=store, **SHORT)
        assert found.reused_tokens == reused
    store.clear()
    found = generate(model, SmallProcessor(), SHOTS, [1, 2], reuse=store, **SHORT)
    assert found.reused_tokens == 23


def test_a_file_goes_on_where_memory_ends(tmp_path):
    first = ask(tmp_path, "50 51")
    talk = f"{SHOTS} 50 51 {' '.join(map(str, first.token_ids))}"
    model, store = small_model(), Reuse(folder=tmp_path)
    for prompt, reused in ((f"{SHOTS} 60", 24), (f"{talk} 7", 26 + 11)):
        found = generate(model, SmallProcessor(), prompt, [1, 2], reuse=store, **SHORT)
        expected = plain(model, SmallProcessor(), prompt, [1, 2], **SHORT)
        assert found.token_ids == expected.token_ids
        assert found.reused_tokens == reused


@pytest.mark.parametrize("change", ["seed", "one number", "type", "rope"])
def test_another_model_does_not_see_them(tmp_path, change):
    ask(tmp_path)
    model = small_model(seed=int(change == "seed"))
    if change == "one number":
        model.decoder.layers[1].attn.o_proj.weight[3, 5] += 1e-3
    if change == "type":
        weight = model.decoder.norm.weight
        model.decoder.norm.weight = weight.astype(mx.bfloat16)
    if change == "rope":
        model.config = small_model(seed=0, eos_token_id=5).config
    assert ask(tmp_path, model=model).reused_tokens == 0
    assert ask(tmp_path).reused_tokens == 23


def test_what_a_model_is_known_by():
    model = small_model()
    found = identity(model)
    assert found == identity(small_model()) and len(found) == 32
    rows = model.decoder.embed_tokens.weight
    model.decoder.embed_tokens.weight = rows[mx.array([1, 0, *range(2, 90)])]
    assert identity(model) != found  # the same numbers in other rows


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.uint8], ids=str)
@pytest.mark.parametrize("width", [8, 7])
def test_every_number_and_its_place_counts(dtype, width):
    """Of a row that is summed as it is, and of one that is summed by four bytes."""
    rng = np.random.default_rng(0)
    rows = mx.array(rng.integers(0, 200, (3, width))).astype(dtype)
    base = _row_sums(rows)
    seen = {base.tobytes()}
    for i in range(width):
        one = mx.array(rows)
        one[1, i] += 1
        moved = mx.array(rows)
        moved[1, i], moved[1, i - 1] = rows[1, i - 1], rows[1, i]
        for changed in (one, moved):
            sums = _row_sums(changed)
            assert (sums == base).tolist() == [True, False, True]
            seen.add(sums.tobytes())
    assert len(seen) == 1 + 2 * width  # each differs from the others, too


def test_sums_of_rows_are_made_a_part_at_a_time(monkeypatch):
    rows = mx.random.normal((11, 6))
    whole = _row_sums(rows)
    monkeypatch.setattr("mm1_mlx.inference.identity._AT_ONCE", 13)
    assert _row_sums(rows).tolist() == whole.tolist()
    times = np.array(_odd(6), np.uint64)
    bits = np.array(rows).view(np.uint32).astype(np.uint64)
    assert ((bits * times).sum(-1) % 2**32).tolist() == whole.tolist()
    empty = [mx.zeros((0, 4)), mx.zeros((4, 0))]
    assert [_row_sums(x).size for x in (*empty, mx.array(3.0))] == [0, 0, 1]


@pytest.mark.parametrize("what", ["COMPUTATION", "__version__", "MLX"])
def test_another_computation_is_another_model(what, monkeypatch):
    """Files of before a fix are not of use after it."""
    model = small_model()
    found = identity(model)
    if what == "MLX":
        monkeypatch.setattr(mx, "__version__", "x")
    else:
        monkeypatch.setattr(f"mm1_mlx.inference.identity.{what}", 10**6)
    assert identity(model) != found


# --- files that are not what they should be ------------------------------------------


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut off":
        path.write_bytes(data[:-10])
    elif how == "a bit":  # the disk gives another one
        data[-100] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "text":
        path.write_bytes(b"hello, I am no prefix")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        arrays, about = mx.load(str(path), return_metadata=True)
        values = json.loads(about["metadata"])
        keys = json.loads(values["keys"])
        if how == "keys":
            values["keys"] = json.dumps([["x", 3], *keys])
        elif how == "many keys":
            values["keys"] = json.dumps([[-1, 10**12], *keys])
        elif how == "deep keys":
            values["keys"] = "[" * 100_000
        elif how == "one key more":  # fewer columns than it says
            values["keys"] = json.dumps([*keys, 50])
        elif how == "start":
            values["start"] = "-3"
        elif how == "endless start":  # JSON's Infinity
            values["start"] = float("inf")
        elif how == "late start":
            values["start"] = "4"
        elif how == "who":
            values["who"] = "0" * 32
        elif how == "no metadata":
            about.pop("metadata")
        elif how == "layers":
            about["entries"] = json.dumps(json.loads(about["entries"])[:2])
        elif how == "padding":
            about["entries"] = json.dumps([{"left_padding": [2]}] * 3)
        elif how == "bits":
            about["entries"] = json.dumps([{"left_padding": None, "bits": 5}] * 3)
        elif how == "type":
            arrays = {name: array.astype(mx.float16) for name, array in arrays.items()}
        elif how == "heads":
            arrays = {n: mx.contiguous(a[:, :1]) for n, a in arrays.items()}
        elif how == "numbers":
            arrays = {name: array + 1 for name, array in arrays.items()}
        if how in ("type", "heads"):  # as if it had been written so
            names = [f"{i}.{j}" for i in range(3) for j in range(2)]
            values["sha256"] = _digest([arrays[name] for name in names])
        about["metadata"] = json.dumps(values) if "metadata" in about else "{}"
        mx.save_safetensors(str(path), arrays, metadata=about)


WAYS = [
    *("cut off", "a bit", "empty", "zeros", "text", "folder", "no metadata", "who"),
    *("keys", "many keys", "deep keys", "one key more", "start", "late start"),
    "endless start",
    *("layers", "padding", "bits", "type", "heads", "numbers"),
]


@pytest.mark.parametrize("how", WAYS)
def test_a_spoiled_file_is_passed_over(tmp_path, how):
    ask(tmp_path)
    (path,) = files(tmp_path)
    spoil(path, how)
    assert ask(tmp_path, "50").reused_tokens == 0
    if how != "folder":  # what is sound was written in its place, or beside it
        assert ask(tmp_path, "50").reused_tokens == 24


@pytest.mark.parametrize("error", [RuntimeError("[malloc] 7"), MemoryError(), "open"])
def test_a_sound_file_that_cannot_be_read_now_stays(tmp_path, monkeypatch, error):
    ask(tmp_path)
    (path,) = files(tmp_path)
    os.utime(path, (1, 1))

    def fails(*args, **settings):
        if error == "open":
            cause = OSError(24, "Too many open files")
            raise CheckpointError("it cannot be read") from cause
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("mm1_mlx.inference.prefix_folder.load_cache", fails)
        assert ask(tmp_path).reused_tokens == 0
    assert files(tmp_path) == [path] and path.stat().st_mtime == 1  # not another one
    assert ask(tmp_path).reused_tokens == 23


def test_of_two_files_the_sound_one_is_used(tmp_path):
    ask(tmp_path, "50")
    (first,) = files(tmp_path)
    ask(tmp_path, "60")
    (second,) = set(files(tmp_path)) - {first}
    spoil(second, "a bit")
    assert ask(tmp_path, "60").reused_tokens == 24
    spoil(first, "a bit")  # then nothing reaches the second
    assert ask(tmp_path, "60").reused_tokens == 0


def test_keys_are_packed():
    place = -(12345 << 24) - 1
    keys = [1, 5, place, place - 1, place - 2, 7, place, place - 1, 3]
    assert _packed(keys) == [1, 5, [place, 3], 7, [place, 2], 3]
    assert _unpacked(json.loads(json.dumps(_packed(keys)))) == keys


# --- room, and what goes wrong in writing --------------------------------------------


def room_for_two(folder: Path) -> int:
    ask(folder)
    (path,) = files(folder)
    return int(2.5 * path.stat().st_size)


def test_the_folder_is_bounded(tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"x" * 100_000)
    limit = room_for_two(tmp_path / "one")
    for number in range(8):
        ask(tmp_path, images=(10 + number, 2), folder_limit=limit)
        time.sleep(0.01)  # files are told apart by their time
        kept = [path for path in files(tmp_path) if path.name.startswith("prefix-")]
        assert sum(path.stat().st_size for path in kept) <= limit
    assert len(kept) >= 2
    assert ask(tmp_path, images=(17, 2)).reused_tokens == 23
    assert ask(tmp_path, images=(10, 2)).reused_tokens == 0
    assert (tmp_path / "mine.safetensors").exists()


def test_what_was_used_last_stays(tmp_path):
    limit = room_for_two(tmp_path / "one")
    for number in range(6):
        ask(tmp_path, images=(10 + number, 2), folder_limit=limit)
        time.sleep(0.01)
        found = ask(tmp_path, images=(10, 2), folder_limit=limit)
        assert found.reused_tokens == 23
        time.sleep(0.01)
    assert len(files(tmp_path)) < 6


def test_what_is_larger_than_the_folder_may_be(tmp_path):
    store = Reuse(folder=tmp_path, folder_limit=100)
    generate(small_model(), SmallProcessor(), SHOTS, [1, 2], reuse=store, **SHORT)
    assert files(tmp_path) == []
    assert store.problem == "it is larger than all that the folder may hold"
    other = Reuse(folder=tmp_path, folder_limit=30_000)
    folder = other._folder
    folder.problem = "of before"
    generate(small_model(), SmallProcessor(), SHOTS, [1, 2], reuse=other, **SHORT)
    assert files(tmp_path) and other.problem is None


def test_what_a_killed_process_left_is_deleted_later(tmp_path):
    left = tmp_path / ".prefix-0-0.safetensors.77.safetensors"
    left.write_bytes(b"half")
    ask(tmp_path)
    assert left.exists()  # somebody may be writing it now
    os.utime(left, (1, 1))
    ask(tmp_path, "50")
    assert not left.exists()


def test_a_disk_that_is_full_spoils_no_answer(tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm1_mlx.inference.prefix_folder.save_cache", full)
    store = Reuse(folder=tmp_path)
    found = generate(
        small_model(), SmallProcessor(), SHOTS, [1, 2], reuse=store, **SHORT
    )
    assert found.finish_reason and store.problem == "No space left on device"
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file cannot hold prefixes: File exists"):
        Reuse(folder=tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot hold prefixes: Not a directory"):
        Reuse(folder=tmp_path / "file" / "folder")


_KILLED = """
import os
import sys
import mlx.core as mx
from mm1_mlx.inference import prompt_cache

def die(path, arrays, metadata):
    open(path, "wb").write(b"half of a file")
    os._exit(9)

prompt_cache.mx.save_safetensors = die
sys.path.insert(0, "tests")
from test_reuse_folder import ask
ask(sys.argv[1])
"""


def test_a_killed_write_leaves_nothing_that_counts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        env=clean_environment(),
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    assert done.returncode == 9
    (left,) = files(tmp_path)
    assert left.name.startswith(".prefix-")
    assert ask(tmp_path).reused_tokens == 0
    assert ask(tmp_path).reused_tokens == 23


# --- the command ---------------------------------------------------------------------

STAR = ("-p", "What colour is the star?")


@pytest.fixture
def picture(tmp_path) -> Path:
    from helpers import ROOT

    return Path(shutil.copy(ROOT / "examples" / "shapes.png", tmp_path / "one.png"))


def command(*args: object, **settings):
    need_tiny()
    return run_cli("mm1_mlx.generate", *args, **settings)


def test_a_second_run_of_generate_starts_where_the_first_ended(tmp_path, picture):
    other = shutil.copy(picture, tmp_path / "another name.png")
    more = ("--prefix-cache", tmp_path / "kept")
    plainly = command("--image", picture, *STAR, "--json", "--quiet")
    told = []
    for path in (picture, other):
        done = command("--image", path, *STAR, *more, "--json")
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
        assert told[-1]["token_ids"] == json.loads(plainly.stdout)["token_ids"]
    assert told[0]["reused_tokens"] == 0
    assert told[1]["reused_tokens"] == told[1]["prompt_tokens"] - 1
    reused = f"Reused: {told[1]['reused_tokens']} of {told[1]['prompt_tokens']} prompt"
    assert reused in done.stderr
    assert "Reused" not in command("--image", picture, *STAR).stderr


def test_the_size_of_the_folder_is_a_flag(tmp_path, picture):
    kept = tmp_path / "kept"
    small = ("--prefix-cache", kept, "--prefix-cache-size", "0.00001")
    done = command("--image", picture, *STAR, *small)
    assert done.returncode == 0 and files(kept) == []
    assert "the prompt was not kept: it is larger than all that the fol" in done.stderr
    command("--image", picture, *STAR, *small[:3], "1.5")
    assert len(files(kept)) == 1


def test_generate_says_what_is_wrong_with_its_folder(tmp_path, picture):
    done = command("--image", picture, *STAR, "--prefix-cache", picture)
    assert_fails(done, r"one\.png cannot hold prefixes: File exists\. Give another")


def test_numpy_and_mlx_agree_on_the_bits():
    """A digest is of bytes, also where NumPy knows no such type."""
    array = mx.array(np.random.default_rng(0).standard_normal((1, 2, 3, 4)))
    half = array.astype(mx.bfloat16)
    assert _digest([half]) == _digest([mx.array(half)]) != _digest([half + 1])
