"""python -m mm1_mlx.info, through the real command line."""

import json
import sys
import types

import pytest

from helpers import FIXTURES, ROOT, assert_fails, run_cli, run_here, run_python
from mm1_mlx import info, memory
from mm1_mlx.convert.cache import converted
from mm1_mlx.presets import PRESETS, preset


def test_the_list_of_presets():
    done = run_cli("info")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if line[:2] == "  "}
    assert listed == set(PRESETS)
    assert json.loads(run_cli("info", "--json").stdout) == list(PRESETS)


def test_the_table_of_a_model():
    done = run_cli("mm1_mlx.info", "--model", "mm1-3b-moe")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[3:9]}
    assert list(rows) == [
        "vision",
        "connector",
        "decoder",
        "embeddings",
        "experts",
        "all",
    ]
    assert rows["experts"] == ["61.832", "B", "1.932", "B"]
    assert "fits a Mac from             192 GB       96 GB       48 GB" in done.stdout
    assert "144 tokens" in done.stdout
    assert "Apple did not publish" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stderr == ""


@pytest.mark.parametrize("name", PRESETS)
def test_json_of_every_preset(name):
    values = json.loads(json.dumps(info.describe(preset(name))))
    counts = values["parameters"]
    parts = [count["total"] for part, count in counts.items() if part != "all"]
    assert sum(parts) == counts["all"]["total"]
    assert values["macs_gb"]["4"], "no Mac fits it at 4 bit"


def test_tokens_and_images_count():
    few = json.loads(run_here("info", "--model", "mm1-3b", "--json").stdout)
    args = ("--tokens", 12048, "--images", 64)
    many = json.loads(run_here("info", "--model", "mm1-3b", "--json", *args).stdout)
    kv = memory.kv_bytes(preset("mm1-3b").text_config, 10_000)
    assert many["needed_bytes"]["16"] > few["needed_bytes"]["16"] + kv
    assert few["kv_bytes_per_1k_tokens"] == kv // 10


def test_a_folder(tmp_path):
    config = preset("mm1-1.2b").to_dict() | {"quantization": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    done = run_here("info", "--model", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on disk               5 B" in done.stdout
    assert "stored bits           4" in done.stdout
    assert "Apple" not in done.stdout.replace("Apple silicon", "")


def test_wrong_input(tmp_path):
    unknown = run_here("info", "--model", "mm1-8b")
    assert_fails(unknown, r"no model 'mm1-8b'", r"did you mean 'mm1-\db'")
    capitals = run_here("info", "--model", "MM1-3B")
    assert_fails(capitals, r"no model 'MM1-3B'.*; did you mean 'mm1-3b'\?")
    assert_fails(run_here("info", "--model", "zzz"), r"without --model for the presets")
    assert_fails(run_here("info", "--model", tmp_path), r"has no config\.json")
    file = tmp_path / "config.json"
    file.write_text("{")
    assert_fails(run_here("info", "--model", tmp_path), r"cannot be read as JSON")
    file.write_text('{"model_type": "llama"}')
    foreign = run_here("info", "--model", tmp_path)
    assert_fails(foreign, r"is another project's checkpoint \(llama\) and not conver")
    file.write_text("[]")
    assert_fails(run_here("info", "--model", tmp_path), r"holds no JSON object")
    usage = run_here("info", "--model", "mm1-3b", "--tokens", "0")
    assert_fails(usage, r"--tokens: must be a whole number of 1 or more", code=2)


def test_a_hub_id_is_found_where_generate_finds_it(tmp_path, monkeypatch):
    """In what was downloaded, and in the cache of what generate has converted."""
    cache = tmp_path / "cache"
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(preset("mm1-1.2b").to_dict()))
    there = {"org/llava": FIXTURES / "llava15" / "hf5", "org/own": own}

    def download(repo, *, local_files_only, **settings):
        assert local_files_only, "info asks no hub"
        return str(there[repo])  # KeyError: not downloaded

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    env = {"XDG_CACHE_HOME": str(cache)}

    def ask(name, *more):
        return run_here("info", "--model", name, "--json", *more, env=env)

    assert_fails(ask("org/x"), r"no model 'org/x'.* which mm1_mlx generate --model org")
    assert json.loads(ask("org/own").stdout)["context"] == 4096
    picture = ("--image", ROOT / "examples" / "shapes.png")
    for more in ((), picture):
        done = ask("org/llava", *more)
        assert_fails(done, r"\(llava\) and not converted yet.* mm1_mlx convert --model")
    monkeypatch.setenv("MM1_MLX_CACHE", str(cache / "mm1_mlx"))
    converted(there["org/llava"], "org/llava")
    values = json.loads(ask("org/llava").stdout)
    assert values["image"]["tokens"] == 16 and values["disk_bytes"] > 0
    assert json.loads(ask("org/llava", *picture).stdout)["image_tokens"] == 16


def test_presets_need_no_mlx():
    code = (
        "import sys; from mm1_mlx.info import main; main(['--model', 'mm1-3b']);"
        "print({'mlx', 'numpy', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    assert run_python("-c", code).stderr.strip() == "set()"
