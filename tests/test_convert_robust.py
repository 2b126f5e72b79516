"""Conversion when something is wrong: nothing half-written, one line, and again."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.conversion import convert
from helpers import FIXTURES, ROOT, assert_fails, run_python
from mm1_mlx.checkpoint.folder import read_weights
from mm1_mlx.checkpoint.writer import Slot, WeightWriter, cut
from mm1_mlx.errors import CheckpointError

DENSE, SHARDED = "decoder_qwen2", "decoder_mixtral"


@pytest.fixture
def source(tmp_path):
    """A copy of a fixture that a test may spoil."""

    def copy(folder: str) -> Path:
        place = tmp_path / "source"
        shutil.copytree(FIXTURES / folder, place)
        return place

    return copy


def weights_of(folder: Path) -> dict:
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in mx.load(str(path)).items()
    }


def write(folder: Path, weights: dict) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def refuses(folder: Path, message: str, **settings) -> None:
    """One line, and no trace of an output."""
    out = folder.parent / "out"
    with pytest.raises(CheckpointError, match=message) as raised:
        convert(folder, out, **settings)
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


def test_a_weight_too_many(source):
    folder = source(DENSE)
    write(folder, weights_of(folder) | {"model.extra.weight": mx.zeros(3)})
    refuses(folder, r"1 weight no rule knows: model\.extra\.weight\. Is this another")


def test_the_first_five_of_many(source):
    folder = source(DENSE)
    more = {f"model.extra.{i}": mx.zeros(1) for i in range(9)}
    write(folder, weights_of(folder) | more)
    refuses(folder, r"9 weights no rule knows: model\.extra\.0, .*\.4 and 4 more")


def test_a_weight_missing(source):
    folder = source(DENSE)
    weights = weights_of(folder)
    del weights["model.norm.weight"]
    write(folder, weights)
    refuses(folder, r"1 missing: decoder\.norm\.weight")


def test_a_part_of_a_fused_weight_missing(source):
    folder = source(DENSE)
    weights = weights_of(folder)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    write(folder, weights)
    refuses(folder, r"lacking a part: decoder\.layers\.1\.attn\.qkv_proj\.weight")


def test_a_wrong_shape(source):
    folder = source(DENSE)
    weights = weights_of(folder)
    weights["model.norm.weight"] = mx.zeros(7)
    write(folder, weights)
    refuses(folder, r"misshaped: decoder\.norm\.weight is \(7,\) but must be \(")


def test_two_names_for_one_target(source):
    folder = source("llava15/hf5")
    weights = weights_of(folder)
    name = "vision_tower.post_layernorm.weight"
    weights["vision_tower.vision_model.post_layernorm.weight"] = weights[name]
    write(folder, weights)
    refuses(folder, r"more than one rule fills: vision\.norm_out\.weight")


def test_whole_numbers_where_weights_should_be(source):
    folder = source(DENSE)
    weights = weights_of(folder)
    name = "model.norm.weight"
    weights[name] = mx.zeros(weights[name].shape, mx.int32)
    write(folder, weights)
    refuses(folder, r"model\.norm\.weight has the type I32, but weights of a type like")


def test_another_family(source):
    folder = source(DENSE)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    refuses(folder, r"unexpected: decoder\.layers\.0\.attn\.qkv_proj\.bias")
    refuses(folder, r"weights no rule knows: model\.layers\.0\.mlp", source="mixtral")


def test_a_missing_and_a_truncated_shard(source):
    folder = source(SHARDED)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refuses(folder, r"00002\.safetensors is not a sound .* it was cut off, so download")
    shard.unlink()
    refuses(folder, r"names 'model-00002-of-00002\.safetensors', but the folder lacks")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", ".."])
def test_an_index_that_leaves_the_folder(source, name):
    folder = source(SHARDED)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(table))
    refuses(folder, r"which is outside of it\. Only plain file names")


def test_the_same_weight_in_two_files(source):
    folder = source(DENSE)
    shutil.copy(folder / "model.safetensors", folder / "model-again.safetensors")
    refuses(folder, r"is both in model-again\.safetensors and in model\.safetensors")


def test_a_folder_that_is_in_use(source, tmp_path):
    folder, out = source(DENSE), tmp_path / "out"
    convert(folder, out)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(folder, out)
    (out / "notes.txt").write_text("mine")
    convert(folder, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="is not a model folder"):
        convert(folder, other, overwrite=True)


def test_a_disk_that_is_too_small(source, monkeypatch):
    folder = source(DENSE)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refuses(folder, r"out needs 262\.3 kB, but 1\.0 kB are free on its disk")


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_is_full_in_the_middle(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "convert", "--hf-path"]
    command += [str(FIXTURES / DENSE), "--mlx-path", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit_files
    )
    assert_fails(done, r"could not be written: File too large after \d+ of \d+ bytes")
    assert list(tmp_path.iterdir()) == []


# Converts, and stops at a place where it can be killed.
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from convert.conversion import convert
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05)
convert(Path({source!r}), Path({out!r}), progress=progress)
"""


def test_killed_in_the_middle_and_run_again(tmp_path):
    out = tmp_path / "out"
    folder = FIXTURES / SHARDED
    code = SLOW.format(root=str(ROOT), source=str(folder), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had begun
    convert(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = tmp_path / "again"
    convert(folder, again)
    for name, array in read_weights(again).items():
        assert mx.array_equal(array, read_weights(out)[name]), name


def test_an_old_folder_comes_back_after_a_kill(tmp_path):
    old = tmp_path / ".out.999999999.abc.old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
        convert(FIXTURES / DENSE, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    convert(FIXTURES / DENSE, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_nothing(tmp_path):
    def progress(done, total):
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(FIXTURES / SHARDED, tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


# --- The writer ----------------------------------------------------------------------


def test_shards_are_cut_where_they_are_full(tmp_path):
    slots = [Slot(f"a{i}", "F32", (10,)) for i in range(7)]
    assert [len(part) for part in cut(slots, 100)] == [2, 2, 2, 1]
    assert [len(part) for part in cut(slots, 1)] == [1] * 7
    values = np.arange(70, dtype=np.float32).reshape(7, 10)
    with WeightWriter(tmp_path, slots, 100) as writer:
        for i in (3, 0, 1, 6, 5, 4, 2):  # any order, in parts
            writer.add(f"a{i}", values[i, :4])
            writer.add(f"a{i}", values[i, 4:])
    assert len(list(tmp_path.glob("model-0000?-of-00004.safetensors"))) == 4
    found = read_weights(tmp_path)
    for i in range(7):
        np.testing.assert_array_equal(np.array(found[f"a{i}"]), values[i])


def test_a_slot_that_is_not_full_is_our_mistake(tmp_path):
    writer = WeightWriter(tmp_path, [Slot("a", "F32", (3,))])
    with pytest.raises(AssertionError, match="not all bytes of"), writer:
        writer.add("a", np.zeros(2, np.float32))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Anonymous memory of a conversion to 4 bit, of 0.4 and of 0.9 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    code = (
        "from pathlib import Path\n"
        "from mm1_mlx.benchmarks.convert import synthetic, _convert\n"
        "import sys\n"
        "here = Path(sys.argv[1])\n"
        "synthetic(here / 'source', int(float(sys.argv[2]) * 1e9), lambda line: None)\n"
        "print(_convert(here / 'source', here / 'out', '4 bit', ['-q']).anonymous)\n"
    )
    peaks = []
    for size in ("0.4", "0.9"):
        place = tmp_path / size
        done = run_python("-c", code, place, size, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        shutil.rmtree(place)
    assert max(peaks) < 400 * 2**20, peaks
    assert peaks[1] < peaks[0] * 1.3 + 20 * 2**20, peaks
