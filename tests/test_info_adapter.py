"""python -m mm1_mlx.info FOLDER: what an adapter is, and one line for a spoiled one."""

import json
import shutil

import mlx.core as mx
import pytest
from small import SPARSE, small_model

from helpers import assert_fails, run_cli, run_here, run_python
from mm1_mlx.adapters.about import describe_adapter
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.errors import CheckpointError
from mm1_mlx.info import _layers

LORA = Target(pairs=PairSettings(rank=4, scale=2.0))
DORA = Target(pairs=PairSettings(rank=3, scale=1.5, dora=True))
PLAN = Plan(
    parts={"attention": LORA, "connector": DORA, "norms": Target(), "experts": DORA}
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as lora leaves it, and the model."""
    model = small_model(SPARSE)
    adapt(model, PLAN)
    folder = tmp_path_factory.mktemp("info") / "adapter"
    write_adapter(folder, adapter_weights(model), adapter_config(PLAN, "small"))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 30}\n')
    (folder / "run.json").write_text('{"settings": {"steps": 50}}')
    (folder / "tune.safetensors").write_bytes(b"0" * 2500)
    return folder, model


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "adapter")


def test_the_table(folder):
    done = run_cli("info", folder)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "kind DoRA+LoRA+full, in the form of mm1_mlx",
        "base small",
        "steps 30 of 50",
        "other files 2.6 kB; generate and fuse do not read them",
        "k_proj o_proj q_proj v_proj; layers 0-2",
        "down_proj gate_proj up_proj; layer 1",
        "readout.0 readout.1 conv1 conv3",
    ):
        assert any(found.endswith(line) for found in lines), line
    assert any(line.startswith("attention LoRA 4 2 ") for line in lines)
    assert any(line.startswith("experts DoRA 3 1.5 ") for line in lines)
    assert any(line.startswith("norms full - - ") for line in lines)
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert done.stderr == ""


def test_json_counts_what_is_trained(folder, made):
    done = run_here("info", folder, "--json")
    values = json.loads(done.stdout)
    trained = adapter_weights(made[1])
    assert values["parameters"] == sum(a.size for a in trained.values())
    assert sum(row["parameters"] for row in values["parts"]) == values["parameters"]
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    both = ("adapters.safetensors", "adapter_config.json")
    assert values["bytes"] == sum(sizes[name] for name in both)
    assert values["bytes"] + values["other_bytes"] == sum(sizes.values())
    assert (values["steps"], values["steps_planned"]) == (30, 50)
    assert values["types"] == ["F32"] and values["adapter"] == str(folder)


def test_an_adapter_needs_no_mlx_to_be_described(folder):
    code = (
        f"import sys; from mm1_mlx.info import main; main([{str(folder)!r}]);"
        "print({'mlx', 'numpy', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    assert run_python("-c", code).stderr.strip() == "set()"


def test_without_the_files_of_a_run(folder):
    for name in ("metrics.jsonl", "run.json", "tune.safetensors"):
        (folder / name).unlink()
    values = describe_adapter(folder)
    assert values["steps"] is values["steps_planned"] is None
    assert values["other_bytes"] == 0
    (folder / "metrics.jsonl").write_text('{"step": 7}\n{"st')  # killed in a line
    (folder / "run.json").write_text("[]")
    assert describe_adapter(folder)["steps"] is None
    assert "steps" not in run_here("info", folder).stdout


def test_forms_of_others(folder):
    arrays = {
        "model.layers.3.self_attn.q_proj.lora_a": mx.zeros((8, 2)),
        "model.layers.3.self_attn.q_proj.lora_b": mx.zeros((2, 8)),
    }
    config = {"lora_parameters": {"rank": 2, "scale": 20.0}, "iters": 9, "model": "m"}
    write_adapter(folder, arrays, config)
    (folder / "run.json").unlink()
    values = describe_adapter(folder)
    assert (values["form"], values["base"], values["kind"]) == ("mlx-lm", "m", "LoRA")
    (row,) = values["parts"]
    assert (row["part"], row["ranks"], row["scale"]) == ("other", [2], 20.0)
    assert values["steps_planned"] == 9

    start = "base_model.model.model.layers.0.self_attn.q_proj."
    arrays = {
        start + "lora_A.weight": mx.zeros((4, 8)),
        start + "lora_B.weight": mx.zeros((8, 4)),
        start + "lora_magnitude_vector": mx.zeros(8),
    }
    (folder / "adapters.safetensors").unlink()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "use_rslora": False}
    config |= {"base_model_name_or_path": "llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    values = describe_adapter(folder)
    assert (values["form"], values["base"], values["kind"]) == ("PEFT", "llama", "DoRA")
    (row,) = values["parts"]
    assert (row["ranks"], row["scale"]) == ([4], 3.0)
    assert row["projections"] == ["q_proj"] and row["parameters"] == 72
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": 1}))
    assert describe_adapter(folder)["parts"][0]["scale"] == 6.0


def change(**values):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def empty(folder):
    mx.save_safetensors(str(folder / "adapters.safetensors"), {})


def cut(folder):
    path = folder / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def pickled(folder):
    (folder / "adapters.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, r"There is no adapter folder"),
        (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config\.js"),
        (lambda f: (f / "adapters.safetensors").unlink(), r"the adapter is not whole"),
        (pickled, r"are in adapter_model\.bin, a pickle"),
        (lambda f: (f / "adapter_config.json").write_text("{"), r"is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), r"holds no JSON obje"),
        (cut, r"adapters\.safetensors is not a sound safetensors file"),
        (empty, r"holds no weights: nothing was trained"),
        (change(mm1_mlx=3), r"mm1_mlx of adapter_config\.json is 3, but no object"),
        (change(mm1_mlx={"parts": {"attention": {"scale": "2"}}}), r"scale of .* '2'"),
        (change(mm1_mlx={}, lora_parameters={"scale": True}), r"scale of .* True"),
        (
            change(mm1_mlx={}, lora_parameters={}, lora_alpha=2, r=0),
            r"r of adapter_config\.json cannot be 0",
        ),
    ],
)
def test_a_spoiled_folder_is_one_line(spoil, message, folder):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        describe_adapter(folder)
    assert "\n" not in str(error.value)


def test_wrong_commands(folder, tmp_path):
    cut(folder)
    assert_fails(run_here("info", folder), r"is not a sound safetensors file")
    assert_fails(run_here("info", "mm1-3b"), r"is a model: info --model mm1-3b", code=2)
    both = run_here("info", folder, "--model", "mm1-3b")
    assert_fails(both, r"the folder of an adapter or --model, not both", code=2)
    as_model = run_here("info", "--model", folder)
    assert_fails(as_model, r"has no config\.json\. It holds an adapter: mm1_mlx info")
    (tmp_path / "config.json").write_text("{}")
    assert_fails(
        run_here("info", tmp_path), r"It is a model folder: give it with --mod"
    )


def test_layers_in_few_words():
    assert _layers([]) == ""
    assert _layers([2]) == "; layer 2"
    assert _layers([0, 1, 2, 5, 7, 8]) == "; layers 0-2, 5, 7-8"
