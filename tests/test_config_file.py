"""Flags from a YAML file: the same names, types and checks as on the command line."""

import argparse
from pathlib import Path

import pytest

from helpers import need
from mm1_mlx.cli.config_file import merged, yaml_text
from mm1_mlx.cli.parser import Parser, number, whole_number
from mm1_mlx.cli.tuning import parser as lora_parser
from mm1_mlx.cli.tuning import saved_config

need("yaml")


def small() -> Parser:
    """A parser with every kind of flag."""
    p = Parser(prog="mm1_mlx try", description="")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--batch-size", type=whole_number(1), default=4)
    p.add_argument("--shift", type=number(-9, 9), default=0.0)
    p.add_argument("--kind", choices=["one", "two"], default="one")
    p.add_argument("--train", action="append", default=[])
    p.add_argument("--words", nargs="+", default=[])
    p.add_argument("--pack", action="store_true")
    p.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True)
    either = p.add_mutually_exclusive_group()
    either.add_argument("--alpha", type=number(0), default=16.0)
    either.add_argument("--scale", type=number(0))
    p.add_config()
    p.add_debug()
    return p


def parse(tmp_path, text: str, *more: str, parser=small) -> argparse.Namespace:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return parser().parse_args(["--config", str(file), *more])


WHOLE = """# a comment
data: a folder
batch-size: 8
shift: -1.5e-0
kind: two
train: [attention=16, experts]
words: [a]
pack: true
plot: false
scale: 2
"""


def test_a_file_says_what_flags_say(tmp_path):
    found = parse(tmp_path, WHOLE.replace("[a]", "[a, b]"))
    flags = (
        "--data|a folder|--batch-size|8|--shift|-1.5|--kind|two|--train|attention=16|"
        "--train|experts|--words|a|b|--pack|--no-plot|--scale|2"
    )
    wanted = small().parse_args(flags.split("|"))
    assert {**vars(found), "config": None} == vars(wanted)


def test_the_command_line_goes_first(tmp_path):
    more = ("--batch-size=2", "--train", "mlp", "--plot", "--alpha", "4", "--data", "x")
    found = parse(tmp_path, WHOLE, *more)
    assert (found.batch_size, found.train, found.plot) == (2, ["mlp"], True)
    assert (found.alpha, found.scale, str(found.data)) == (4, None, "x")
    assert found.kind == "two" and found.words == ["a"]  # what it does not say stays


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("train: {attention: 16, experts: }", "train", ["attention=16", "experts"]),
        ("train: mlp", "train", ["mlp"]),
        ("train: []", "train", []),
        ("kind: ", "kind", "one"),
        ("pack: false", "pack", False),
        ("plot: true", "plot", True),
        ("shift: 1e-4", "shift", 1e-4),  # a text for YAML 1.1
        ("batch_size: '8'", "batch_size", 8),
    ],
)
def test_forms_of_a_value(tmp_path, text, name, value):
    assert getattr(parse(tmp_path, "data: x\n" + text), name) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("batchsize: 8", r"run.yaml: unknown key 'batchsize'; did you mean 'batch_si"),
        ("zebra: 8", r"run.yaml: unknown key 'zebra'. See:"),
        ("config: other.yaml", r"unknown key 'config'"),
        ("help: true", r"unknown key 'help'"),
        ("batch_size: 0", r"batch_size must be a whole number of 1 or more, not '0'"),
        ("batch_size: 2.5", r"batch_size must be a whole number of 1 or more, not '2"),
        ("batch_size: true", r"batch_size must be a whole number .* not 'True'"),
        ("batch_size: [1, 2]", r"batch_size is a list, but must be one value"),
        ("batch_size: {a: 1}", r"batch_size is a mapping, but must be one value"),
        ("kind: twoo", r"kind cannot be used: unknown value 'twoo'; did you mean 'tw"),
        ("pack: 1", r"pack is 1, but must be true or false"),
        ("plot: maybe", r"plot is 'maybe', but must be true or false"),
        ("train: [[a]]", r"train holds \['a'\], but must hold single values"),
        ("pack: true\npack: false", r"the key 'pack' is there twice"),
        ("batch-size: 1\nbatch_size: 2", r"'batch_size' is there twice, with - and"),
        ("- a\n- b", r"is no mapping"),
        ("a: b: c", r"run.yaml is not YAML"),
        ("a: !!python/object:os.system {}", r"run.yaml is not YAML"),
        ("alpha: 1\nscale: 2", r"not allowed with argument --"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, capsys, text, message):
    import re

    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, text, "--data", "x")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert re.search(message, told), told


def test_no_file_no_yaml_and_a_flag_that_is_still_needed(tmp_path, capsys, monkeypatch):
    import sys

    for more, message in (
        (["--config", str(tmp_path / "none")], "cannot be read: No such file"),
        (["--config"], "argument --config: expected one argument"),
    ):
        with pytest.raises(SystemExit):
            small().parse_args(more)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(tmp_path, "pack: true")
    assert "required: --data" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SystemExit):
        parse(tmp_path, "data: x")
    assert "pip install pyyaml" in capsys.readouterr().err


def test_what_is_saved_is_read_again_as_it_was(tmp_path):
    """Also what YAML might take for something else, and letters of other tongues."""
    values = ["--data", "C:\\a: 'b' #é猫🐱", "--train", "yes", "--train", "1e3=0x1"]
    for more in ([], ["--alpha", "3"], ["--scale", "2"], ["--pack", "--no-plot"]):
        args = small().parse_args([*values, *more])
        text = yaml_text(merged(small(), args, without=()), "a heading")
        found = parse(tmp_path, text)
        assert {**vars(found), "config": None} == vars(args)
    assert "words" not in merged(small(), args, without=("words",))


# --- mlx-lm's keys -------------------------------------------------------------------

# From mlx_lm/examples/lora_config.yaml, with the values that mean the same here.
MLX_LM = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    weight_decay: 0.02
data: "/path/to/training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: wandb
project_name: mine
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: true
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 900, 1e-6]
"""


def test_a_file_of_mlx_lm_means_the_same(tmp_path):
    found = parse(tmp_path, MLX_LM, parser=lora_parser)
    wanted = {
        "model": "mlx_model", "train": [], "fine_tune_type": "lora", "rank": 4,
        "scale": 20.0, "dropout": 0.1, "projections": "q_proj,v_proj", "iters": 1000,
        "num_layers": 16, "val_samples": 100, "learning_rate": "1e-05", "warmup": 100,
        "floor": pytest.approx(0.1), "weight_decay": 0.02, "wandb": "mine",
        "steps_per_eval": 200, "max_seq_length": 2048, "batch_size": 4,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert "learning_rate" in saved_config(found)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mask_prompt: false", r"mask_prompt: False, but only answers are learned"),
        ("train: false", r"train: false, but this command trains"),
        ("resume_adapter_file: a.safetensors", r"use --resume"),
        ("lora_parameters: {keys: [mlp.gate]}", r"has the key 'mlp.gate', but pairs"),
        ("lora_parameters: {keys: q}", r"keys: q, but no list of names"),
        ("lora_parameters: {alpha: 2}", r"must be a mapping of keys, rank, scale"),
        (
            "lora_parameters: {rank: 4}\nrank: 8",
            r"rank and lora_parameters, which",
        ),
        ("lora_parameters: {rank: x}", r"rank must be a whole number"),
        (
            "lr_schedule: {name: step_decay, arguments: [1, 2, 3]}",
            r"lr_schedule is step_decay, but the rate falls by a cosine here",
        ),
        (
            "lr_schedule: {name: cosine_decay, warmup: 9, arguments: [1e-5, 1000]}",
            r"both together are iters \(1000\): write \[1e-05, 991, end\]",
        ),
        ("lr_schedule: {name: cosine_decay, arguments: 3}", r"they must be \[peak"),
        ("optimizer_config: {adamw: {betas: [0, 1]}}", r"a mapping of weight_decay"),
        ("optimizer: muon", r"optimizer cannot be used: unknown value 'muon'"),
        ("val_batches: many", r"val_batches: many, but no whole number"),
        ("report_to: swanlab", r"report_to: swanlab, but only wandb"),
        ("trust_remote_code: true", r"no code of a model's folder is ever run"),
        (
            "mask_prompt: true\ngrad_accumulation_steps: 4",
            r"count micro-batches, here updates",
        ),
    ],
)
def test_keys_of_mlx_lm_that_would_train_something_else(
    tmp_path, capsys, text, message
):
    import re

    with pytest.raises(SystemExit):
        parse(tmp_path, f"model: m\ndata: d\n{text}", parser=lora_parser)
    told = capsys.readouterr().err
    assert re.search(message, told) and told.count("\n") == 1, told


def test_our_own_accumulation_is_no_key_of_mlx_lm(tmp_path):
    text = "model: m\ndata: d\ngrad_accumulation_steps: 4\nval_batches: null"
    assert parse(tmp_path, text, parser=lora_parser).grad_accumulation_steps == 4
    text = "model: m\ndata: d\nval_batches: -1\nreport_to: wandb"
    found = parse(tmp_path, text, parser=lora_parser)
    assert found.val_samples >= 10**9 and found.wandb == "mm1_mlx"
