"""The model folder: headers, names, paths, shards, and where folders come from."""

import gc
import json
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import small_config, small_model

from helpers import assert_equal, need
from mm1_mlx.checkpoint import hub
from mm1_mlx.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    check_weights,
    make_shards,
    read_config,
    read_weights,
    weight_files,
    write_folder,
)
from mm1_mlx.checkpoint.hub import choose_files, find_folder
from mm1_mlx.checkpoint.safetensors import TensorInfo, read_header
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.presets import ENCODERS, PRESETS

WEIGHTS = {
    "a": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "b": mx.ones((4,), mx.float16),
    "c": mx.zeros((2, 2), mx.bfloat16),
}


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None):
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


# --- Headers ---------------------------------------------------------------------


def test_header_of_a_sound_file(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), WEIGHTS, metadata={"format": "mlx"})
    infos = read_header(path)
    assert infos.keys() == WEIGHTS.keys()
    assert infos["a"].shape == (2, 3)
    assert infos["a"].dtype == "F32"
    assert infos["b"].stop - infos["b"].start == 8
    assert isinstance(infos["c"], TensorInfo)


def test_header_of_scalars_and_empty_arrays(tmp_path):
    header = {"s": entry(0, 4, ()), "e": entry(4, 4, (0, 3))}
    infos = read_header(raw_file(tmp_path / "x.safetensors", header, bytes(4)))
    assert infos["s"].shape == ()
    assert infos["e"].shape == (0, 3)


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": entry(0, 8)}, 4, "need 8 bytes but 4 are there; it was cut off"),
        ({"a": entry(0, 8)}, 12, "4 bytes at its end belong to no array"),
        ({"a": entry(0, 12)}, 12, r"'a' has 12 bytes, but F32 \(2,\) takes 8"),
        ({"a": entry(0, 8, (4,), "F16"), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 8, (2,), "F8_E4M3")}, 8, "'a' has the type 'F8_E4M3'"),
        ({"a": entry(0, 8, (-2,))}, 8, "'a' has a shape or offsets that are not"),
        ({"a": entry(0, 8, (2.0,))}, 8, "'a' has a shape or offsets that are not"),
        ({"a": entry(-8, 0)}, 8, "'a' has a shape or offsets that are not"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' lacks dtype, shape or"),
        ({"a": 5}, 8, "'a' lacks dtype, shape or"),
        ([1, 2], 0, "its header is not a JSON object"),
        (b"{nonsense", 0, "its header is not JSON"),
        (b"[" * 200000, 0, "its header is not JSON"),
    ],
)
def test_unsound_headers(tmp_path, header, data, message):
    path = raw_file(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(path)
    assert str(raised.value).startswith(f"{path} is not a sound safetensors file: ")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\xff" * 100])
def test_files_without_a_header(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its header does not fit into the file"):
        read_header(path)


def test_git_lfs_pointer_says_what_to_do(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer; run `git lfs pull`"):
        read_header(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


# --- Files of a folder -----------------------------------------------------------


def shards(folder: Path, *parts: dict, index: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(parts):
        mx.save_safetensors(str(folder / f"model-{i}.safetensors"), part)
    if index is not None:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    return folder


def test_one_file_or_several_without_an_index(tmp_path):
    folder = shards(tmp_path, {"a": WEIGHTS["a"]}, {"b": WEIGHTS["b"]})
    found = read_weights(folder)
    assert_equal(found["a"], WEIGHTS["a"])
    assert_equal(found["b"], WEIGHTS["b"])
    assert found["b"].dtype == mx.float16


def test_weights_are_read_lazily(tmp_path):
    big = {"a": mx.zeros((1000, 1000))}
    mx.eval(big)
    folder = shards(tmp_path, big)
    gc.collect()  # what other tests left must not be freed in the middle
    before = mx.get_active_memory()
    found = read_weights(folder)
    assert mx.get_active_memory() - before < 100_000
    mx.eval(found)
    assert mx.get_active_memory() - before >= 4_000_000


def test_a_name_in_two_files(tmp_path):
    folder = shards(tmp_path, {"a": WEIGHTS["a"]}, {"a": WEIGHTS["a"]})
    with pytest.raises(
        CheckpointError, match=r"'a' is both in model-0.* and in model-1.*no index"
    ):
        weight_files(folder)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model\*.safetensors"):
        weight_files(tmp_path)


def test_index_names_the_files_and_others_are_ignored(tmp_path):
    index = {"a": "model-0.safetensors"}
    folder = shards(tmp_path, {"a": WEIGHTS["a"]}, {"a": WEIGHTS["a"]}, index=index)
    assert [path.name for path in weight_files(folder)] == ["model-0.safetensors"]


@pytest.mark.parametrize(
    "index, message",
    [
        ({"a": "model-7.safetensors"}, "names 'model-7.safetensors', but the folder"),
        ({"z": "model-0.safetensors"}, "do not hold the same names; first: a, z"),
        ({"a": 5}, "has no weight_map"),
        ({"a": "../model-0.safetensors"}, "which is outside of it"),
        ({"a": "sub/model-0.safetensors"}, "which is outside of it"),
        ({"a": "/etc/passwd"}, "refers to '/etc/passwd', which is outside of it"),
        ({"a": "C:\\x"}, "which is outside of it"),
        ({"a": ".."}, "which is outside of it"),
        ({"a": ""}, "which is outside of it"),
    ],
)
def test_wrong_indices(tmp_path, index, message):
    folder = shards(tmp_path, {"a": WEIGHTS["a"]}, index=index)
    with pytest.raises(CheckpointError, match=message):
        weight_files(folder)


def test_index_that_is_not_json(tmp_path):
    folder = shards(tmp_path, {"a": WEIGHTS["a"]})
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        weight_files(folder)


@pytest.mark.parametrize("indexed", [False, True])
def test_links_must_not_lead_outside(tmp_path, indexed):
    outside = tmp_path / "elsewhere.safetensors"
    mx.save_safetensors(str(outside), {"a": WEIGHTS["a"]})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    if indexed:
        shards(folder, index={"a": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside of"):
        weight_files(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """It keeps files in blobs/ and links to them from snapshots/REVISION/."""
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    mx.save_safetensors(str(blobs / "00.safetensors"), {"a": WEIGHTS["a"]})
    (blobs / "00.safetensors").rename(blobs / "00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/00")
    assert_equal(read_weights(snapshot)["a"], WEIGHTS["a"])


# --- Names and shapes ------------------------------------------------------------


def test_names_and_shapes_must_be_the_models():
    expected = {f"x{i}": (i,) for i in range(8)}
    check_weights(expected, expected, "m")
    with pytest.raises(CheckpointError) as raised:
        check_weights({"y": (1,)}, expected, "here/model")
    assert str(raised.value) == (
        "The weights of here/model do not fit its config.json. 8 missing: x0, x1, x2, "
        "x3, x4 and 3 more; 1 unexpected: y. Convert it again, or correct config.json."
    )
    with pytest.raises(CheckpointError, match=r"1 misshaped: x2 is \(3,\) but must be"):
        check_weights(expected | {"x2": (3,)}, expected, "m")


# --- Config ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, kind, message",
    [
        (None, CheckpointError, "has no config.json, so it is not a model folder"),
        ("{", CheckpointError, "config.json is not JSON"),
        ("[]", CheckpointError, "config.json holds no JSON object"),
        ("{}", ConfigError, "has no model_type"),
        ('{"model_type": "llava"}', ConfigError, "missing|unknown|must be 'mm1'"),
    ],
)
def test_wrong_configs(tmp_path, text, kind, message):
    if text is not None:
        (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(kind, match=message):
        read_config(tmp_path)


# --- Writing ---------------------------------------------------------------------


def test_shards_keep_the_order_and_the_limit():
    weights = {str(i): mx.zeros((n,)) for i, n in enumerate([2, 2, 9, 1, 1, 1])}
    parts = make_shards(weights, limit=16)
    assert [list(part) for part in parts] == [["0", "1"], ["2"], ["3", "4", "5"]]


@pytest.mark.parametrize("limit, files", [(10**9, 1), (2000, None)])
def test_written_folder_is_read_again(tmp_path, limit, files):
    model = small_model()
    weights = dict(tree_flatten(model.parameters()))
    folder = tmp_path / "out"
    write_folder(folder, model.config, weights, shard_bytes=limit)
    found = read_weights(folder)
    assert found.keys() == weights.keys()
    for name in weights:
        assert_equal(found[name], weights[name], what=name)
    assert read_config(folder) == model.config
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if files == 1:
        assert names == ["model.safetensors"]
    else:
        assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
        assert len(names) > 5
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    _, metadata = mx.load(str(folder / names[0]), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_when_writing_fails(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "out", small_config(), WEIGHTS, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "photo.png").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_folder(tmp_path, small_config(), WEIGHTS)
    with pytest.raises(CheckpointError, match="is not a model folder"):
        write_folder(tmp_path, small_config(), WEIGHTS, overwrite=True)
    with pytest.raises(CheckpointError, match=r"is a file\. Give a folder"):
        write_folder(tmp_path / "photo.png", small_config(), WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_an_empty_folder_is_used(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_folder(folder, small_config(), WEIGHTS)
    assert (folder / CONFIG_FILE).is_file()


def test_overwriting_while_the_weights_are_still_on_disk(tmp_path):
    """The lazy weights of the old folder are read while the new one is written."""
    folder = tmp_path / "out"
    write_folder(folder, small_config(), WEIGHTS, shard_bytes=8)
    (folder / "README.md").write_text("mine")
    lazy = {name: w.astype(mx.float32) + 1 for name, w in read_weights(folder).items()}
    write_folder(folder, small_config(), lazy, overwrite=True)
    found = read_weights(folder)
    assert_equal(found["a"], WEIGHTS["a"] + 1)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    folder = tmp_path / "out"
    write_folder(folder, small_config(), WEIGHTS)
    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, small_config(), {}, fail, overwrite=True)
    assert read_weights(folder).keys() == WEIGHTS.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Names of models -------------------------------------------------------------


def test_a_folder_is_found(tmp_path, monkeypatch):
    assert find_folder(tmp_path) == tmp_path
    assert find_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_folder("~/model") == tmp_path / "model"


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_folder("org/name") == Path("org/name")


def test_built_in_names(tmp_path, monkeypatch):
    monkeypatch.setitem(hub.BUILT_IN, "mm1-tiny", tmp_path)
    with pytest.raises(CheckpointError, match=r"mm1-tiny is missing from .*not whole"):
        find_folder("mm1-tiny")
    (tmp_path / "config.json").write_text("{}")
    assert find_folder("mm1-tiny") == tmp_path


@pytest.mark.parametrize(
    "name, message",
    [
        ("mm1-tny", "no model or folder 'mm1-tny'. Did you mean 'mm1-tiny'. Built in"),
        ("MM1_Tiny", "Did you mean 'mm1-tiny'"),
        ("qwerty", "no model or folder 'qwerty'. Built in: mm1-tiny. Else give"),
        ("./no/such/folder", "no model or folder './no/such/folder'"),
        ("/no/such", "no model or folder '/no/such'"),
        ("a/b/c", "no model or folder 'a/b/c'"),
        ("", "The model's name is empty. Built in: mm1-tiny"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(CheckpointError, match=message):
        find_folder(name)


@pytest.mark.parametrize("name", [*PRESETS, "MM1-3B"])
def test_a_preset_has_no_weights(name):
    what = "a size of the papers, without public weights"
    if name in ENCODERS:
        what = "an encoder alone, not a whole model"
    with pytest.raises(CheckpointError) as caught:
        find_folder(name)
    start, cure = str(caught.value).split(". Give ")
    assert start == f"'{name.lower()}' is {what}"
    assert "convert assemble" in cure
    assert cure.endswith("or the built-in mm1-tiny.")


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("")
    with pytest.raises(CheckpointError, match=r"is a file\. Give the folder that"):
        find_folder(path)


def fake_hub(monkeypatch, answer) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = answer
    empty = types.SimpleNamespace(siblings=[])
    module.HfApi = lambda: types.SimpleNamespace(model_info=lambda *a, **k: empty)
    module.constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_id_downloads_only_the_models_files(tmp_path, monkeypatch):
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    fake_hub(monkeypatch, download)
    assert find_folder("some-org/MM1.v2") == tmp_path
    assert asked["repo"] == "some-org/MM1.v2"
    assert not any(p.endswith((".py", ".bin", "*")) for p in asked["patterns"])


def test_of_a_repository_only_what_is_read():
    names = [
        *("config.json", "README.md", "tokenizer.json", "model.safetensors"),
        *("pytorch_model.bin", "onnx/model.safetensors", "onnx/config.json"),
        *("checkpoint-500/pytorch_model.bin", "projector/model.safetensors"),
        *("visual_encoder/config.json", "run.py", "figure.png"),
    ]
    assert sorted(choose_files(names)) == [
        *("README.md", "config.json", "model.safetensors"),
        *("projector/model.safetensors", "tokenizer.json"),
        "visual_encoder/config.json",
    ]
    both = ["open_clip_pytorch_model.bin", "pytorch_model.bin"]
    only = ["open_clip_config.json", *both]
    assert choose_files(only) == ["open_clip_config.json", both[0]]
    assert choose_files(["config.json", *only])[-1] == both[1]


def test_without_the_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="run pip install huggingface_hub"):
        find_folder("org/name")


def error_named(name: str, text: str = "") -> Exception:
    return type(name, (Exception,), {})(text)


@pytest.mark.parametrize(
    "error, message",
    [
        (ConnectionError("x"), "the hub cannot be reached. Check the network"),
        (error_named("LocalEntryNotFoundError"), "the hub cannot be reached"),
        (error_named("RepositoryNotFoundError"), "There is no model 'org/name' on the"),
        (error_named("GatedRepoError"), "needs your consent to its licence"),
        (ValueError("two\nlines"), "could not be downloaded from the hub: two lines"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, message):
    def download(repo, revision, allow_patterns):
        raise error

    fake_hub(monkeypatch, download)
    with pytest.raises(CheckpointError, match=message) as raised:
        find_folder("org/name")
    assert "\n" not in str(raised.value)


def test_the_real_hub_package_without_network():
    need("huggingface_hub")  # tests run with HF_HUB_OFFLINE=1
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        find_folder("no-such-org-here/no-such-model")
